from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from m3el_hf.tasks import TASKS
from m3el_hf.training.augmentation import augment_pictures, draw_tasks, drop_tokens, task_views


def row(number: int = 0, *, mention_image: bool = True, candidate_images: bool = True) -> dict[str, Any]:
    image = {"bytes": b"picture"}
    return {
        "id": f"row-{number}",
        "mention": "Kansas",
        "mention_image": image if mention_image else None,
        "candidate_names": ["Kansas", "Kansas"],
        "candidate_images": [image, image if candidate_images else None],
    }


def test_a_draw_depends_on_seed_epoch_and_row_alone():
    assert draw_tasks(row(3), 4, seed=1, epoch=2) == draw_tasks(row(3), 4, seed=1, epoch=2)
    draws = {tuple(draw_tasks(row(n), 4, seed=s, epoch=e)) for n in range(3) for s in range(3) for e in range(3)}
    assert len(draws) > 20


def test_every_task_is_drawn_about_equally_often():
    counts = Counter(draw_tasks(row(n), 1, seed=0, epoch=0)[0].name for n in range(1800))
    assert set(counts) == set(TASKS)
    assert all(140 < count < 260 for count in counts.values())


def test_only_tasks_that_the_row_fits_are_drawn():
    no_mention_image = draw_tasks(row(mention_image=False), 9, seed=0, epoch=0)
    assert {task.name for task in no_mention_image} == {"t2t", "t2i", "t2it"}
    one_candidate_lacks_its_image = draw_tasks(row(candidate_images=False), 9, seed=0, epoch=0)
    assert {task.name for task in one_candidate_lacks_its_image} == {"t2t", "i2t", "it2t"}


@given(st.lists(st.lists(st.sampled_from(list(TASKS.values())), max_size=9, unique=True), max_size=6))
def test_views_say_what_each_drawn_task_shows(drawn):
    rows, views = task_views(drawn)
    expected = [(mention, task) for mention, tasks in enumerate(drawn) for task in tasks]
    assert rows.tolist() == [mention for mention, _ in expected]
    for view, (_, task) in zip(views.tolist(), expected, strict=True):
        assert view[:2] == [task.mention.has_text, task.mention.has_image]
        assert view[2:] == [task.candidate.has_text, task.candidate.has_image]


def test_pictures_change_by_the_generator_alone_and_keep_their_shape_and_range():
    pixels = torch.randn(5, 3, 16, 16)
    one, same = (augment_pictures(pixels, torch.Generator().manual_seed(0)) for _ in range(2))
    other = augment_pictures(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert one.shape == pixels.shape
    assert one.abs().max() <= 1.2 * pixels.abs().max() + 0.4 + 1e-5


def test_a_turned_picture_shows_what_lay_there():
    white = torch.ones(8, 3, 16, 16)
    moved = augment_pictures(white, torch.Generator().manual_seed(0))
    assert (moved.flatten(2).std(-1) < 1e-5).all()  # no foreign border comes in


@given(st.integers(0, 100), st.sampled_from([0.0, 0.5, 0.99]))
def test_dropped_tokens_never_include_the_first_the_last_or_padding(seed, share):
    lengths = torch.tensor([2, 5, 9])
    mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    dropped = drop_tokens(mask, share, torch.Generator().manual_seed(seed))
    assert (dropped <= mask).all()
    assert (dropped[:, 0] == 1).all()
    assert (dropped[torch.arange(3), lengths - 1] == 1).all()
    if share == 0:
        assert torch.equal(dropped, mask)


def test_about_the_share_of_inner_tokens_is_dropped():
    mask = torch.ones(200, 52, dtype=torch.long)
    dropped = drop_tokens(mask, 0.3, torch.Generator().manual_seed(0))
    assert abs(1 - dropped[:, 1:-1].float().mean().item() - 0.3) < 0.02
