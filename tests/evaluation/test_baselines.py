from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3el_hf import TASKS
from m3el_hf.evaluation.baselines import BASELINES, Chance, ImageHash, StringMatch
from tests.evaluation.test_evaluator import dataset, make_row


def drawn(*quarters: tuple[int, int, int], size: int = 40) -> dict[str, Any]:
    """A picture of four coloured quarters."""
    picture = Image.fromarray(np.array(quarters, dtype=np.uint8).reshape(2, 2, 3))
    file = io.BytesIO()
    picture.resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


RED, BLUE, WHITE, BLACK = (200, 30, 30), (30, 30, 200), (255, 255, 255), (0, 0, 0)


def test_each_baseline_does_the_tasks_that_show_what_it_reads():
    able = {system.name: [name for name, task in TASKS.items() if system.can_do(task)] for system in BASELINES}
    assert able == {
        "chance": list(TASKS),
        "string match": ["t2t", "t2it", "it2t", "it2it"],
        "image hash": ["i2i", "i2it", "it2i", "it2it"],
    }


@pytest.mark.parametrize("system", BASELINES, ids=lambda system: system.name)
def test_a_row_that_does_not_fit_a_task_has_no_score(system):
    rows = [make_row(0), make_row(1, mention_image=None, candidate_images=[None] * 3)]
    tasks = [task for task in TASKS.values() if system.can_do(task)]
    for name, scores in system.scores(rows, tasks).items():
        assert [one is None for one in scores] == [False, TASKS[name].needs_images]
        assert scores[0].shape == (3,)


def test_chance_scores_all_alike():
    row = make_row(0, candidate_names=["a"] * 5)
    assert len(set(Chance().score(row, TASKS["t2t"]).tolist())) == 1
    assert Chance().score(row, TASKS["t2t"]).shape == (5,)


def test_string_match_is_the_dice_overlap_of_all_words():
    row = make_row(
        0,
        mention="Kansas",
        context="KANSAS toured, 1976!",
        candidate_names=["Kansas", "kansas", "Łódź", ""],
        candidate_descriptions=["a band (toured in 1976)", None, "a town", None],
    )
    mention = {"kansas", "toured", "1976"}
    candidates = [{"kansas", "a", "band", "toured", "in", "1976"}, {"kansas"}, {"łódź", "a", "town"}, set()]
    expected = [2 * len(mention & one) / (len(mention) + len(one)) for one in candidates]
    np.testing.assert_allclose(StringMatch().score(row, TASKS["t2t"]), expected)
    without_context = row | {"context": None}
    assert StringMatch().score(without_context, TASKS["t2t"])[1] == 1


def test_image_hash_is_the_cosine_of_small_centred_pictures():
    same, other = drawn(RED, BLUE, WHITE, BLACK, size=24), drawn(BLUE, RED, BLACK, WHITE)
    opposite = drawn(*(tuple(255 - value for value in colour) for colour in (RED, BLUE, WHITE, BLACK)))
    flat = drawn(RED, RED, RED, RED)
    row = make_row(0, mention_image=drawn(RED, BLUE, WHITE, BLACK), candidate_images=[same, other, opposite, flat])
    scores = ImageHash().score(row, TASKS["i2i"])
    one, two = (
        np.array(colours, dtype=float).ravel() for colours in ([RED, BLUE, WHITE, BLACK], [BLUE, RED, BLACK, WHITE])
    )
    one, two = one - one.mean(), two - two.mean()
    assert scores[0] == pytest.approx(1)
    assert scores[1] == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    assert scores[2] == pytest.approx(-1)
    assert np.isfinite(scores[3]) and abs(scores[3]) < 1


def test_a_picture_of_one_grey_is_like_no_other():
    grey = drawn(*[(90, 90, 90)] * 4)
    row = make_row(0, mention_image=grey, candidate_images=[grey, drawn(RED, BLUE, WHITE, BLACK)])
    assert ImageHash().score(row, TASKS["i2i"]).tolist() == [0, 0]


def test_baselines_take_rows_of_a_dataset():
    rows = [*dataset([make_row(0), make_row(1)]).with_format("arrow")[:].to_pylist()]
    for system in BASELINES:
        tasks = [task for task in TASKS.values() if system.can_do(task)]
        assert system.scores(rows, tasks).keys() == {task.name for task in tasks}
