from __future__ import annotations

import os

import pytest
from datasets import load_dataset

from m3el_hf.data.manifest import Manifest
from m3el_hf.data.schema import SPLITS
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from tests.conftest import instance, write_release


def test_the_rows_of_an_earlier_version_keep_their_splits(tmp_path):
    """Splits change with the seed, but not those of a previous version's rows; topics, order and number may change."""
    rows = [instance(number, images=False) for number in range(60)]
    write_release(tmp_path / "old", rows[:40])
    write_release(tmp_path / "new", rows[::-1])
    old = build("m3el", tmp_path / "old", tmp_path / "v1", progress=False)
    build("m3el", tmp_path / "new", tmp_path / "v2", progress=False, seed=5, previous=tmp_path / "v1")
    splits = [
        {row["answer_qid"]: split for split, one in load_dataset(str(tmp_path / name)).items() for row in one}
        for name in ("v1", "v2")
    ]
    assert len(splits[0]) == old.total == 40
    assert len(splits[1]) == 60
    assert splits[0].items() <= splits[1].items()
    assert {split for qid, split in splits[1].items() if qid not in splits[0]} == set(SPLITS)


def test_splits_of_an_earlier_version_are_not_the_sources_own(tmp_path):
    folder = write_release(tmp_path / "release", [instance(number, images=False) for number in range(20)])
    build("m3el", folder, tmp_path / "v1", progress=False)
    manifest = build("m3el", folder, tmp_path / "v2", progress=False, previous=tmp_path / "v1")
    assert not manifest.released_splits
    assert manifest.previous == {"name": "v1", "revision": Manifest.load(tmp_path / "v1").revision, "rows": 20}
    card = " ".join((tmp_path / "v2" / "README.md").read_text(encoding="utf-8").split())
    assert "20 rows have the splits that they had in an earlier version, v1" in card


def test_a_previous_version_of_other_data_is_refused(tmp_path):
    for name, start in (("old", 0), ("new", 50)):
        write_release(tmp_path / name, [instance(start + number, images=False) for number in range(9)])
    build("m3el", tmp_path / "old", tmp_path / "v1", progress=False)
    with pytest.raises(M3ELError, match="none of these rows stands in v1, .* leave --previous out"):
        build("m3el", tmp_path / "new", tmp_path / "v2", progress=False, previous=tmp_path / "v1")


def test_new_rows_beside_an_earlier_version_are_split_as_ever(tmp_path):
    """Each new row shares a distractor with old rows of every split."""
    shared = instance(0, images=False)["candidates"][1:]
    rows = [instance(number, images=False) for number in range(200)]
    for row in rows:
        row["candidates"] = [row["candidates"][0], *shared]
    write_release(tmp_path / "old", rows[:100])
    write_release(tmp_path / "new", rows)
    build("m3el", tmp_path / "old", tmp_path / "v1", progress=False)
    manifest = build("m3el", tmp_path / "new", tmp_path / "v2", progress=False, previous=tmp_path / "v1")
    assert manifest.rows["person"]["train"] == pytest.approx(160, abs=4)


def test_a_previous_version_must_be_a_built_one(source, tmp_path):
    with pytest.raises(M3ELError, match="is no dataset that m3el-hf data build wrote"):
        build("m3el", source, tmp_path / "m3el", progress=False, previous=source)


def test_an_earlier_version_is_no_use_where_every_split_is_the_sources_own(source, tmp_path):
    folder = write_release(tmp_path / "release", [instance(0, images=False)], "person_train.json")
    build("m3el", folder, tmp_path / "v1", progress=False)
    with pytest.raises(M3ELError, match="every row has a split of the source's own, which is kept: leave --previous"):
        build("m3el", folder, tmp_path / "v2", progress=False, previous=tmp_path / "v1")


def test_of_a_row_in_two_splits_the_held_out_one_counts(tmp_path):
    row = instance(0, images=False)
    for split in ("train", "test"):
        write_release(tmp_path / "old", [row, instance(5 + len(split), images=False)], f"person_{split}.json")
    build("m3el", tmp_path / "old", tmp_path / "v1", progress=False)
    write_release(tmp_path / "new", [row, instance(9, images=False)])
    build("m3el", tmp_path / "new", tmp_path / "v2", progress=False, previous=tmp_path / "v1")
    assert row["Qid"] in load_dataset(str(tmp_path / "v2"), split="test")["answer_qid"]


def test_a_replaced_version_gives_its_splits_after_a_kill_too(tmp_path, monkeypatch):
    """Killed when the old version was moved away and the new one not yet there."""
    folder = write_release(tmp_path / "release", [instance(number, images=False) for number in range(20)])
    build("m3el", folder, tmp_path / "m3el", progress=False)
    again = {"progress": False, "previous": tmp_path / "m3el", "overwrite": True}
    whole, moves = os.rename, []

    def rename(*names: object) -> None:
        moves.append(names)
        if len(moves) == 2:
            raise KeyboardInterrupt
        whole(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            build("m3el", folder, tmp_path / "m3el", **again)
    assert not (tmp_path / "m3el").exists()
    assert build("m3el", folder, tmp_path / "m3el", **again).previous["rows"] == 20
