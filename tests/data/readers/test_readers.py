from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m3el_hf.data.mini import read_mini
from m3el_hf.data.readers import READERS, get_reader
from m3el_hf.data.schema import Report
from m3el_hf.errors import M3ELError

READ = sorted(set(READERS) - {"mini"})

PASSAGE = ["Lions won.", "", "sports", [["Lions", "", 0, 5, "Lions"]]]
MENTION = ["Lions won.", "", "Lions", "", "", "", "Lions", ["Lions"], "sports", 0, 5]
FILES: dict[str, list[tuple[str, Any]]] = {
    "m3el": [("person.json", []), ("books_test.json", [])],
    "mimic": [("kb_entity.json", []), ("WIKIMEL_test.json", []), ("wiki_diverse_dev.json", [])],
    "melbench": [("Wikidata-MEL.json", {}), ("Richpedia-MEL.json", {})],
    "wikidiverse": [("train.json", [PASSAGE]), ("all.json", [PASSAGE])],
    "wikidiverse-candidates": [("train_w_10cands.json", [MENTION]), ("train.json", [MENTION])],
}
"""Files by which each reader may know its folder, alone."""


def write(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def mistakes(name: str, folder: Path | None) -> list[str]:
    """What a reader says of a folder, as a source of mentions and as one of entities."""
    reader, messages = get_reader(name), []
    for read in filter(None, (reader.records, reader.entities)):
        with pytest.raises(M3ELError) as caught:
            list(read(folder, Report()))
        messages.append(str(caught.value))
    assert all(len(message.splitlines()) == 1 for message in messages)
    return messages


@pytest.mark.parametrize("name", READERS)
def test_every_reader_says_what_its_data_is(name):
    reader = READERS[name]
    assert reader.title and reader.about.endswith(".") and reader.licence.endswith(".")
    assert bool(reader.citations) == (name != "mini")
    for entry in reader.citations:
        assert entry.count("@") == 1 and entry.startswith("@")
        assert entry.count("{") == entry.count("}") and "title = {" in entry
    assert len(set(reader.citations)) == len(reader.citations)


def test_every_licence_is_one_of_the_hub():
    assert {name: reader.license_id for name, reader in READERS.items()} == {
        "m3el": "unknown",
        "mimic": "unknown",
        "melbench": "mit",
        "wikidiverse": "cc-by-sa-4.0",
        "wikidiverse-candidates": "cc-by-sa-4.0",
        "mini": "apache-2.0",
    }


def test_sets_with_a_knowledge_base_are_those_without_candidates():
    assert {name for name, reader in READERS.items() if reader.entities} == {"mimic", "melbench", "wikidiverse"}
    assert all((get_reader(name).entities is None) == (READERS[name].entities is None) for name in READERS)


@pytest.mark.parametrize("name", READ)
def test_a_wrong_folder_is_a_mistake_that_says_what_to_pass(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("[]")
    expected = {
        None: "no --input: pass the folder that holds",
        tmp_path / "absent": f"no such folder: {tmp_path / 'absent'}; pass the folder that holds",
        tmp_path / "file.json": f"{tmp_path / 'file.json'} is a file: pass the folder that holds",
        tmp_path / "empty": f"{tmp_path / 'empty'} holds no",
    }
    for folder, message in expected.items():
        for found in mistakes(name, folder):
            assert found.startswith(message)
            assert "--reader" not in found


@pytest.mark.parametrize(("own", "file"), [(own, file) for own in FILES for file in FILES[own]])
def test_a_folder_is_recognised_by_its_reader_alone(tmp_path, own, file):
    folder = write(tmp_path / "set", *file)
    (folder / "broken.json").write_text("<html>")
    assert [name for name in READ if READERS[name].recognises(folder)] == [own]
    for name in set(READ) - {own}:
        (folder / "broken.json").unlink(missing_ok=True)
        for found in mistakes(name, folder):
            assert found.endswith(f"; it looks like {READERS[own].title}: pass --reader {own}")


def test_a_folder_of_several_formats_names_them_all(tmp_path):
    write(write(tmp_path, "valid.json", [PASSAGE]), "valid_w_10cands.json", [MENTION])
    (message,) = mistakes("m3el", tmp_path)
    assert "; it looks like WikiDiverse or WikiDiverse with candidates: pass --reader " in message
    assert message.endswith("--reader wikidiverse or wikidiverse-candidates")


def test_a_recognised_folder_gets_no_advice(tmp_path):
    write(write(tmp_path, "person.json", []), "Wikidata-MEL.json", {})
    (tmp_path / "person.json").write_text("<html>")
    (message,) = mistakes("m3el", tmp_path)
    assert message.endswith("fix it or fetch it again")


@pytest.mark.parametrize(
    ("name", "file"),
    [("m3el", "person"), ("mimic", "WIKIMEL_test"), ("wikidiverse", "train"), ("wikidiverse-candidates", "train")],
)
def test_json_lines_are_to_be_renamed(tmp_path, name, file):
    write(tmp_path, f"{file}.jsonl", PASSAGE)
    for message in mistakes(name, tmp_path):
        assert message.endswith(f"; rename {file}.jsonl to {file}.json: JSON lines are read from .json files")


def test_an_unknown_reader_is_a_mistake():
    with pytest.raises(M3ELError, match="unknown reader 'csv': choose one of m3el, mimic, "):
        get_reader("csv")


def test_mini_reads_nothing(tmp_path):
    report = Report()
    assert list(get_reader("mini").records(None, report, instances=5)) == list(read_mini(5))
    assert report == Report(read=5)
    with pytest.raises(M3ELError, match="reads nothing.*or use another reader$"):
        list(get_reader("mini").records(write(tmp_path, "person.json", []), Report()))
