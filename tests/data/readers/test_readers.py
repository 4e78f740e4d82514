from __future__ import annotations

import pytest

from m3el_hf.data.mini import read_mini
from m3el_hf.data.readers import READERS
from m3el_hf.data.schema import Report
from m3el_hf.errors import M3ELError

READ = sorted(set(READERS) - {"mini"})


@pytest.mark.parametrize("name", READERS)
def test_every_reader_says_what_its_data_is(name):
    reader = READERS[name]
    assert reader.title and reader.about.endswith(".") and reader.licence.endswith(".")
    works = [entry for entry in reader.citation.split("\n\n") if entry]
    assert bool(works) == (name != "mini")
    assert all(
        entry.startswith("@") and entry.count("{") == entry.count("}") and "title = {" in entry for entry in works
    )
    keys = [entry.partition("{")[2].partition(",")[0] for entry in works]
    assert len(set(keys)) == len(keys)


def test_sets_with_a_knowledge_base_are_those_without_candidates():
    assert {name for name, reader in READERS.items() if reader.entities} == {"mimic", "melbench", "wikidiverse"}


@pytest.mark.parametrize("name", READ)
def test_a_wrong_folder_is_a_mistake_that_says_what_to_pass(tmp_path, name):
    reader = READERS[name]
    (tmp_path / "empty").mkdir()
    for read in filter(None, (reader.records, reader.entities)):
        for folder in (None, tmp_path / "absent", tmp_path / "empty"):
            with pytest.raises(M3ELError, match="pass the folder|expected|holds no"):
                list(read(folder, Report()))


def test_mini_reads_nothing(tmp_path):
    report = Report()
    assert list(READERS["mini"].records(None, report, instances=5)) == list(read_mini(5))
    assert report == Report(read=5)
    with pytest.raises(M3ELError, match="reads nothing"):
        list(READERS["mini"].records(tmp_path, Report()))
