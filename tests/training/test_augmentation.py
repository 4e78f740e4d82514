from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3el_hf.errors import M3ELError
from m3el_hf.modeling import processing_clipnd
from m3el_hf.tasks import TASKS, TEMPLATES, Modality, Task
from m3el_hf.training.augmentation import (
    augment_pictures,
    draw_tasks,
    draw_template,
    drop_tokens,
    task_views,
    uniform,
)
from m3el_hf.training.distributions import parse_stages, parse_templates, weights_at


def row(number: int = 0, *, mention_image: bool = True, candidate_images: bool = True) -> dict[str, Any]:
    image = {"bytes": b"picture"}
    return {
        "id": f"row-{number}",
        "mention": "Kansas",
        "mention_image": image if mention_image else None,
        "candidate_names": ["Kansas", "Kansas"],
        "candidate_images": [image, image if candidate_images else None],
    }


def assert_follows(counts: Counter, odds: dict[str, float], kinds: int) -> None:
    """Chi-square below what one in 10,000 samples of the distribution exceeds (Wilson and Hilferty, 1931)."""
    assert set(counts) <= {name for name, weight in odds.items() if weight}
    n, whole, degrees = sum(counts.values()), sum(odds.values()), kinds - 1
    expected = {name: n * weight / whole for name, weight in odds.items() if weight}
    statistic = sum((counts[name] - one) ** 2 / one for name, one in expected.items())
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


def test_a_draw_depends_on_seed_epoch_and_row_alone():
    assert draw_tasks(row(3), 4, seed=1, epoch=2) == draw_tasks(row(3), 4, seed=1, epoch=2)
    draws = {tuple(draw_tasks(row(n), 4, seed=s, epoch=e)) for n in range(3) for s in range(3) for e in range(3)}
    assert len(draws) > 20


@pytest.mark.parametrize("tasks", ["uniform", "t2t=1,it2it=2", "t2t=0,i2i=0.5,it2t=0.25,t2it=3"])
def test_tasks_are_drawn_as_their_weights_say(tasks):
    weights = parse_stages(tasks)[0][1]
    counts = Counter(draw_tasks(row(n), 1, 0, e, weights)[0].name for n in range(1500) for e in range(2))
    assert_follows(counts, dict(weights), sum(weight > 0 for weight in weights.values()))


def test_two_tasks_are_drawn_without_replacement_as_their_weights_say():
    weights = {"t2t": 1.0, "i2i": 2.0, "it2it": 3.0}
    counts: Counter = Counter()
    for number in range(3000):
        one, other = draw_tasks(row(number), 2, 0, 0, weights)
        counts[f"{one.name} {other.name}"] += 1
    odds = {
        f"{one} {other}": weights[one] / 6 * weights[other] / (6 - weights[one])
        for one in weights
        for other in weights
        if one != other
    }
    assert_follows(counts, odds, 6)


@given(st.integers(1, 9), st.sets(st.sampled_from(list(TASKS)), min_size=1), st.booleans(), st.booleans())
def test_what_is_drawn_fits_and_has_a_weight(count, weighted, mention_image, candidate_images):
    one = row(mention_image=mention_image, candidate_images=candidate_images)
    drawn = draw_tasks(one, count, 0, 0, dict.fromkeys(weighted, 1.0))
    fitting = {name for name, task in TASKS.items() if task.fits(one)}
    wanted = fitting & weighted or fitting
    assert {task.name for task in drawn} <= wanted
    assert len({task.name for task in drawn}) == len(drawn) == min(count, len(wanted))


def test_a_row_that_fits_no_weighted_task_draws_equally_among_those_it_fits():
    bare = [row(n, mention_image=False) for n in range(1500)]
    counts = Counter(draw_tasks(one, 1, 0, 0, {"i2i": 5.0, "it2t": 1.0})[0].name for one in bare)
    assert_follows(counts, {"t2t": 1.0, "t2i": 1.0, "t2it": 1.0}, 3)


def test_a_row_that_fits_no_task_draws_none():
    assert draw_tasks(row(mention_image=False) | {"mention": None}, 9, 0, 0) == []


@given(st.lists(st.lists(st.sampled_from(list(TASKS.values())), max_size=9, unique=True), max_size=6))
def test_views_say_what_each_drawn_task_shows(drawn):
    rows, views = task_views(drawn)
    expected = [(mention, task) for mention, tasks in enumerate(drawn) for task in tasks]
    assert rows.tolist() == [mention for mention, _ in expected]
    for view, (_, task) in zip(views.tolist(), expected, strict=True):
        assert Task(*(shown(*view[side : side + 2]) for side in (0, 2))) == task


def shown(text: bool, image: bool) -> Modality:
    return {(True, False): Modality.TEXT, (False, True): Modality.IMAGE, (True, True): Modality.BOTH}[text, image]


def test_stages_begin_where_they_say():
    stages = parse_stages(" t2t=1 ; 0.3: uniform;0.75:i2i=1, it2it=2")
    assert [start for start, _ in stages] == [0.0, 0.3, 0.75]
    shares = {0.0: 1, 0.2999: 1, 0.3: 9, 0.7499: 9, 0.75: 2, 1.0: 2}
    assert {share: len(weights_at(stages, share)) for share in shares} == shares
    assert weights_at(stages, 1.0) == {"i2i": 1.0, "it2it": 2.0}


@pytest.mark.parametrize(
    "text",
    [
        "", "t2t", "t2t=", "t2t=much", "t2x=1", "t2t=-1", "t2t=nan", "t2t=inf", "t2t=0", "t2t=1,t2t=2", "t2t=1,,i2i=1",
        "uniform,t2t=1", "t2t=1;", "t2t=1; i2i=1", "0.5: t2t=1", "uniform; 0: t2t=1", "uniform; 1: t2t=1",
        "uniform; late: t2t=1", "uniform; 0.5: t2t=1; 0.5: uniform", "uniform; 0.5: t2t=1; 0.2: uniform",
        "t2t=1\ni2i=1",
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_read_are_one_line_that_shows_how(text):
    with pytest.raises(M3ELError) as caught:
        parse_stages(text)
    message = str(caught.value)
    assert re.fullmatch(
        r"tasks is .*: (give each weight once, as in|each stage .* as in|some weight must be) .*", message
    )


@pytest.mark.parametrize("text", ["", "uniform", "X=1", "N", "N=0", "ND=1,ND=1", "N=1;D=1"])
def test_entity_texts_that_cannot_be_read_are_one_line_that_shows_how(text):
    with pytest.raises(M3ELError, match=r"\Aentity_text is .*: (give .* as in N=1,ND=2|some weight must be above 0)\Z"):
        parse_templates(text)


def test_no_entity_text_is_none():
    assert parse_templates(None) is None


def test_entity_texts_are_drawn_as_their_weights_say():
    weights = parse_templates("N=1,D=2,ND=3")
    counts = Counter(draw_template(f"Q{n}", (True, True), weights, 0, e) for n in range(1000) for e in range(2))
    assert_follows(counts, {"N": 1.0, "D": 2.0, "ND": 3.0}, 3)


@given(st.booleans(), st.booleans(), st.sets(st.sampled_from(["N", "D", "ND"]), min_size=1), st.integers(0, 30))
def test_a_drawn_entity_text_shows_something(name, description, weighted, epoch):
    drawn = draw_template("Q1", (name, description), dict.fromkeys(weighted, 1.0), 0, epoch)
    able = {one for one, has in (("N", name), ("D", description), ("ND", name or description)) if has}
    assert drawn in (able & weighted or able or {None})


def test_numbers_are_equally_likely_and_each_name_has_its_own():
    drawn = uniform([f"row-{n}" for n in range(400)], 10)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert_follows(Counter(str(int(10 * one)) for one in drawn.flatten()), dict.fromkeys("0123456789", 1.0), 10)
    assert len({tuple(one) for one in drawn.tolist()}) == 400
    assert torch.equal(uniform(["row-7", "row-3"], 4), drawn[[7, 3], :4])  # whatever stands beside, and however wide


def names(count: int, seed: int = 0) -> list[str]:
    return [f"{seed}:{number}" for number in range(count)]


def test_pictures_change_by_their_names_alone_and_keep_their_shape_and_range():
    pixels = torch.randn(5, 3, 16, 16)
    one, other = augment_pictures(pixels, names(5)), augment_pictures(pixels, names(5, seed=1))
    assert torch.equal(augment_pictures(pixels[[3]], names(5)[3:4]), one[[3]])
    assert torch.equal(augment_pictures(pixels.flip(0), names(5)[::-1]).flip(0), one)
    assert not torch.isclose(one, other).flatten(1).all(1).any()
    assert one.shape == pixels.shape
    assert one.abs().max() <= 1.2 * pixels.abs().max() + 0.4 + 1e-5


def test_a_turned_picture_shows_what_lay_there():
    moved = augment_pictures(torch.ones(8, 3, 16, 16), names(8))
    assert (moved.flatten(2).std(-1) < 1e-5).all()  # no foreign border comes in


def test_pictures_move_turn_and_scale_no_further_than_said():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    spot = torch.exp(-(x**2 + y**2) / 0.02).expand(300, 3, 64, 64)  # a spot in the middle shows where the middle went
    moved = augment_pictures(spot, names(300))[:, 0]
    place = moved.flatten(1).argmax(1)
    away = torch.stack([place % 64, place // 64], 1) / 63 * 2 - 1
    assert (
        0.2 < away.abs().max() < 0.2 / 0.75 * math.sqrt(2) + 0.05
    )  # of the half side, seen through the turn and scale


@given(st.integers(0, 100), st.sampled_from([0.0, 0.5, 0.99]))
def test_dropped_tokens_never_include_the_first_the_last_or_padding(seed, share):
    lengths = torch.tensor([2, 5, 9])
    mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    dropped = drop_tokens(mask, share, names(3, seed))
    assert (dropped <= mask).all()
    assert (dropped[:, 0] == 1).all()
    assert (dropped[torch.arange(3), lengths - 1] == 1).all()
    if share == 0:
        assert torch.equal(dropped, mask)


def test_padding_changes_no_text_s_dropped_tokens():
    mask = torch.ones(3, 9, dtype=torch.long)
    padded = torch.cat([mask, torch.zeros(3, 20, dtype=torch.long)], 1)
    assert torch.equal(drop_tokens(padded, 0.5, names(3))[:, :9], drop_tokens(mask, 0.5, names(3)))


def test_about_the_share_of_inner_tokens_is_dropped():
    dropped = drop_tokens(torch.ones(200, 52, dtype=torch.long), 0.3, names(200))
    assert abs(1 - dropped[:, 1:-1].float().mean().item() - 0.3) < 0.02


def test_templates_are_those_of_the_processor():
    assert TEMPLATES == processing_clipnd.TEMPLATES
