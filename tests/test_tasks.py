from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3el_hf.data.schema import ROW_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS, TOPICS, Modality, get_task

NAMES = ["t2t", "t2i", "t2it", "i2t", "i2i", "i2it", "it2t", "it2i", "it2it"]
REVEALING = {
    "answer_qid",
    "candidate_qids",
    "gold_position_released",
    "mention_image_is_gold",
    "mention_name_is_gold",
    "image_urls",
    "licences",
    "difficulty",
    "split_group",
}
PICTURE = {"bytes": b"...", "path": None}

quick = settings(deadline=None, max_examples=60, database=None)


def test_there_are_nine_tasks_and_five_topics():
    assert list(TASKS) == NAMES
    assert set(TOPICS) == {"movies", "common", "person", "books", "sports"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_each_side_shows(name):
    mention, candidate = name.split("2")
    task = get_task(name)
    assert task.name == name
    assert (task.mention.has_text, task.mention.has_image) == ("t" in mention, "i" in mention)
    assert (task.candidate.has_text, task.candidate.has_image) == ("t" in candidate, "i" in candidate)
    assert task.needs_images == ("i" in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_sees_what_it_shows_and_nothing_else(name):
    mention, candidate = name.split("2")
    expected = {"id", "topic", "answer"}
    expected |= {"mention", "context"} if "t" in mention else set()
    expected |= {"mention_image"} if "i" in mention else set()
    expected |= {"candidate_names", "candidate_descriptions"} if "t" in candidate else set()
    expected |= {"candidate_images"} if "i" in candidate else set()
    columns = get_task(name).columns
    assert set(columns) == expected
    assert len(columns) == len(expected)
    assert not expected & REVEALING
    assert expected <= set(ROW_FEATURES)


def test_every_column_is_either_shown_by_some_task_or_revealing():
    shown = {column for task in TASKS.values() for column in task.columns}
    assert shown | REVEALING == set(ROW_FEATURES)


@given(
    name=st.sampled_from(NAMES),
    mention=st.sampled_from(["Kansas", "", None]),
    mention_image=st.sampled_from([PICTURE, None]),
    candidates=st.lists(
        st.tuples(st.sampled_from(["Kansas", "", None]), st.sampled_from([PICTURE, None])), min_size=1, max_size=3
    ),
)
@quick
def test_a_row_fits_if_all_that_is_shown_is_there(name, mention, mention_image, candidates):
    names, images = map(list, zip(*candidates, strict=True))
    row = {
        "mention": mention,
        "mention_image": mention_image,
        "candidate_names": names,
        "candidate_images": images,
    }
    sides = name.split("2")
    needed = []
    if "t" in sides[0]:
        needed.append(mention not in ("", None))
    if "i" in sides[0]:
        needed.append(mention_image is not None)
    for one, image in candidates:
        needed += ["t" not in sides[1] or one not in ("", None), "i" not in sides[1] or image is not None]
    assert get_task(name).fits(row) == all(needed)


def test_modalities_show_something():
    assert all(modality.has_text or modality.has_image for modality in Modality)


@pytest.mark.parametrize("name", ["t2x", "", "T2T", "it2ti"])
def test_an_unknown_task_is_named_beside_the_known(name):
    with pytest.raises(M3ELError) as caught:
        get_task(name)
    assert str(caught.value) == f"unknown task {name!r}: choose one of {', '.join(NAMES)}"
