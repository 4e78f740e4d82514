"""Each line of docs/bad-input.md, through a whole build; what concerns the machine is in test_store.py."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from PIL import Image

from m3el_hf.data.manifest import Manifest, read_unusable_images
from m3el_hf.data.readers import READERS
from m3el_hf.data.schema import Reader, Record, Report
from m3el_hf.data.store import build
from m3el_hf.errors import M3ELError
from tests.conftest import instance, write_release

TABLE = Path(__file__).parents[2] / "docs" / "bad-input.md"


def built(folder: Path) -> tuple[Manifest, dict[str, dict[str, Any]]]:
    """Builds a release and returns its manifest and its rows by the number of their gold."""
    manifest = build("m3el", folder, folder.with_name("built"), progress=False)
    data = load_dataset(str(folder.with_name("built")))
    rows = [row for split in data.values() for row in split.with_format("arrow")[:].to_pylist()]
    assert manifest.read == len(rows) + len(manifest.skipped)
    return manifest, {row["answer_qid"]: row for row in rows}


Change = Callable[[dict[str, Any]], object]
UNUSABLE: dict[str, tuple[Change, str]] = {
    "an instance without a Qid": (lambda one: one.pop("Qid"), r"has no gold"),
    "an instance whose gold is not among its candidates": (lambda one: one.update(Qid="Q9"), r"Q9 is not among"),
    "an instance without candidates": (lambda one: one.update(candidates=[]), r"has no candidates"),
    "an instance that lists a candidate twice": (
        lambda one: one["candidates"].append(one["candidates"][0]),
        r"lists a candidate twice",
    ),
    "text with an unpaired surrogate (not Unicode)": (lambda one: one.update(name="\ud83d"), r"not Unicode"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_instance_is_reported(tmp_path, case):
    change, reason = UNUSABLE[case]
    rows = [instance(number, images=False) for number in range(3)]
    change(rows[1])
    manifest, found = built(write_release(tmp_path / "release", rows))
    assert set(found) == {"Q00", "Q20"}
    (line,) = manifest.skipped
    assert re.match(rf"person.json row 1: .*{reason}", line)


@pytest.mark.parametrize("value", [7, True, float("nan"), ["x"], {"x": "y"}])
@pytest.mark.parametrize("field", ["Qid", "name", "sentence", "description of a candidate"])
def test_what_is_no_text_is_reported(tmp_path, field, value):
    """a number, true, NaN, a list or an object in place of a text"""
    rows = [instance(number, images=False) for number in range(3)]
    key, _, of_candidate = field.partition(" ")
    (rows[1]["candidates"][2] if of_candidate else rows[1])[key] = value
    manifest, found = built(write_release(tmp_path / "release", rows))
    assert set(found) == {"Q00", "Q20"}
    (line,) = manifest.skipped
    place = "person.json row 1: candidate 2: " if of_candidate else "person.json row 1: "
    assert line == f"{place}field {key} is of type {type(value).__name__}, not text"


def test_an_integer_as_the_difficulty(tmp_path):
    _, found = built(write_release(tmp_path / "release", [instance(0, images=False, difficulty=2)]))
    assert found["Q00"]["difficulty"] == "2"


def test_a_field_that_the_format_does_not_have(tmp_path):
    rows = [instance(number, images=False, notes="x") for number in range(2)] + [instance(2, images=False)]
    rows[2]["candidates"][0] |= {f"extra{number}": 1 for number in range(20)}
    manifest, found = built(write_release(tmp_path / "release", rows))
    assert set(found) == {"Q00", "Q10", "Q20"}
    counts = {name: count for name, count in manifest.counts.items() if "field" in name}
    named = {f"candidate field 'extra{number}' not read": 1 for number in range(19)}
    assert counts == {"field 'notes' not read": 2, "other fields, not read here": 1} | named


def mistake(reader: str, folder: Path | None, output: Path) -> str:
    """The one line with which a build stops."""
    with pytest.raises(M3ELError) as caught:
        build(reader, folder, output, progress=False)
    assert len(str(caught.value).splitlines()) == 1
    assert not output.exists()
    return str(caught.value)


def test_no_folder(tmp_path):
    for reader in set(READERS) - {"mini"}:
        assert mistake(reader, None, tmp_path / "built").startswith("no --input: pass the folder that holds ")


def test_a_file_in_place_of_the_folder(tmp_path):
    file = write_release(tmp_path / "release", [instance(0)]) / "person.json"
    assert mistake("m3el", file, tmp_path / "built").startswith(f"{file} is a file: pass the folder that holds ")


def test_a_folder_that_another_reader_reads(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "kb_entity.json").write_text("[]")
    assert mistake("m3el", tmp_path / "set", tmp_path / "built").endswith("pass --reader mimic")
    release = write_release(tmp_path / "release", [instance(0)])
    for reader in set(READERS) - {"mini", "m3el"}:
        assert mistake(reader, release, tmp_path / "built").endswith("; it looks like M³EL: pass --reader m3el")


def test_json_lines_by_their_name(tmp_path):
    """`.jsonl` files alone"""
    folder = write_release(tmp_path / "release", [instance(0)], "person.jsonl", form="jsonl")
    message = mistake("m3el", folder, tmp_path / "built")
    assert message.endswith("; rename person.jsonl to person.json: JSON lines are read from .json files")
    (folder / "person.jsonl").rename(folder / "person.json")
    assert set(built(folder)[1]) == {"Q00"}


def test_a_file_that_is_not_read_is_counted(tmp_path):
    """other JSON files beside those of the release"""
    folder = write_release(tmp_path / "release", [instance(0)])
    (folder / "notes.json").write_text("{}")
    manifest, _ = built(folder)
    assert [count for name, count in manifest.counts.items() if "notes.json not read" in name] == [1]


def test_an_instance_that_cannot_be_parsed_is_reported(tmp_path):
    """an instance that cannot be parsed, in the middle of a list; a line that cannot be parsed, in JSON lines"""
    for form, separator, place in (("list", ", ", "row 1"), ("lines", "\n", r"row 1 \(line 2\)")):
        rows = [json.dumps(instance(number, images=False)) for number in range(3)]
        rows[1] = rows[1].replace('"name"', "name", 1)
        text = separator.join(rows)
        folder = tmp_path / form / "release"
        folder.mkdir(parents=True)
        (folder / "person.json").write_text(f"[{text}]" if form == "list" else text)
        manifest, found = built(folder)
        assert set(found) == {"Q00", "Q20"}
        (line,) = manifest.skipped
        assert re.match(rf"person.json {place}: cannot be parsed \(", line)


def test_a_file_that_cannot_be_cut_into_instances_stops_the_build(tmp_path):
    """a file that breaks off"""
    whole = json.dumps([instance(number, images=False) for number in range(3)])
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "person.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(M3ELError, match=r"person.json.* row 1 .*fetch it again$") as caught:
        built(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("old", "new"), [('"name": "Name 1"', '"name": "Name 1'), ("]}", "}")])
def test_an_instance_that_does_not_end_is_reported(tmp_path, old, new):
    """an instance whose quotes or brackets do not close"""
    rows = [json.dumps(instance(number, images=False)) for number in range(4)]
    rows[1] = rows[1].replace(old, new, 1)
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "person.json").write_text(f"[{', '.join(rows)}]")
    manifest, found = built(folder)
    assert set(found) == {"Q00", "Q20", "Q30"}
    assert manifest.skipped[0].startswith("person.json row 1: cannot be parsed")


def test_a_file_in_another_encoding_stops_the_build(tmp_path):
    """a file that is not UTF-8"""
    folder = write_release(tmp_path / "release", [instance(0, images=False)])
    (folder / "person.json").write_bytes((folder / "person.json").read_bytes().replace(b"Name 0", b"Nam\xe9 0"))
    with pytest.raises(M3ELError, match=r"person.json is not UTF-8 text .* at byte \d+"):
        built(folder)


def test_two_rows_with_the_same_id(tmp_path, monkeypatch):
    whole = READERS["m3el"].records

    def twice(folder: Path, report: Report) -> Iterator[Record]:
        for record in whole(folder, report):
            yield record
            report.read += 1
            yield replace(record, source="the same again", mention="other")

    monkeypatch.setitem(READERS, "m3el", Reader("twice", twice))
    manifest, found = built(write_release(tmp_path / "release", [instance(0, images=False)]))
    assert (manifest.read, manifest.total) == (2, 1)
    assert manifest.skipped == ["the same again: its id person-0 is that of an earlier row"]
    assert found["Q00"]["mention"] == "Name 0"


def test_a_single_candidate_is_counted(tmp_path):
    """an instance with a single candidate"""
    one = instance(1, images=False)
    one["candidates"] = one["candidates"][:1]
    manifest, found = built(write_release(tmp_path / "release", [instance(0, images=False), one]))
    assert found["Q10"]["candidate_qids"] == ["Q10"]
    assert [count for name, count in manifest.counts.items() if "single candidate" in name] == [1]


ODD_TEXTS = {
    "a name of 10,000 characters": "x" * 10_000,
    "control characters in a name": "a\x00b\x07\x1b[31m",
    "right-to-left text and emoji": "\u0645\u0643\u0629 \U0001f54b\u200d\u202e",
}


@pytest.mark.parametrize("case", ODD_TEXTS)
def test_odd_text_is_kept_as_it_is(tmp_path, case):
    text = ODD_TEXTS[case]
    one = instance(0, images=False, name=text, sentence=f"on {text} off")
    one["candidates"][0] |= {"name": text, "description": text}
    manifest, found = built(write_release(tmp_path / "release", [one]))
    row = found["Q00"]
    assert (row["mention"], row["context"]) == (text, f"on {text} off")
    assert row["candidate_names"][row["answer"]] == row["candidate_descriptions"][row["answer"]] == text
    assert manifest.skipped == []
    assert load_dataset(str(tmp_path / "built"), "t2t", split="train")[0]["mention"] == text
    assert (tmp_path / "built" / "README.md").is_file()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png(1, 1)[33:]


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_out(path: Path) -> None:
    outside = path.parents[3] / "outside.png"
    outside.write_bytes(png(30, 30))
    path.unlink()
    path.symlink_to(outside)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a picture that is not there": (Path.unlink, "is missing"),
    "a link that leads out of the folder": (link_out, "lies outside"),
    "a web page in place of a picture": (
        lambda path: path.write_text("<html>404 not found</html>"),
        "is not a picture in one of the formats",
    ),
    "a picture that breaks off": (lambda path: path.write_bytes(png(99, 99)[:150]), "cannot be decoded"),
    "a picture of 0 bytes": (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
    "a picture of more than 60 megapixels": (
        lambda path: path.write_bytes(png_header(10_000, 6_001)),
        "has 10000 x 6001 pixels, over 60,000,000",
    ),
    "a folder or a pipe in place of a picture": (replace_by_folder, "is not a file"),
    "a pipe": (replace_by_pipe, "is not a file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_picture_is_null_with_its_reason(tmp_path, case):
    breaks, reason = BROKEN[case]
    folder = write_release(tmp_path / "release", [instance(0), instance(1)])
    path = folder / "person_candidates_images" / "Name 1-Q10" / "mention1.png"
    breaks(path)
    manifest, found = built(folder)
    assert [row["mention_image"] is None for row in (found["Q00"], found["Q10"])] == [False, True]
    assert all(found["Q10"]["candidate_images"])
    ((file, why),) = read_unusable_images(tmp_path / "built").items()
    assert file == str(path.relative_to(folder))
    assert why.startswith(reason)


@pytest.mark.parametrize("location", ["/M3EL/../outside.png", "/M3EL/a/../../outside.png", "../../outside.png"])
def test_a_path_that_climbs_out_of_the_folder(tmp_path, location):
    (tmp_path / "outside.png").write_bytes(png(30, 30))
    rows = [instance(0, images=False, image=["x", "u", location])]
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "person.json").write_text(json.dumps(rows))
    manifest, found = built(tmp_path / "release")
    assert found["Q00"]["mention_image"] is None
    (why,) = read_unusable_images(tmp_path / "built").values()
    assert why.startswith("lies outside")


def test_an_absolute_path(tmp_path):
    (tmp_path / "outside.png").write_bytes(png(30, 30))
    rows = [instance(0, images=False, image=["x", "u", str(tmp_path / "outside.png")])]
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "person.json").write_text(json.dumps(rows))
    manifest, found = built(tmp_path / "release")
    assert found["Q00"]["mention_image"] is None
    ((file, why),) = read_unusable_images(tmp_path / "built").items()
    assert file == os.path.join(*tmp_path.parts[2:], "outside.png")  # without its first part, in the release
    assert why == "is missing"


def test_a_wide_picture_is_stored(tmp_path):
    """a picture 20,000 pixels wide and 100 high"""
    folder = write_release(tmp_path / "release", [instance(0)])
    (folder / "person_candidates_images" / "Name 0-Q00" / "mention0.png").write_bytes(png(20_000, 100))
    _, found = built(folder)
    assert Image.open(io.BytesIO(found["Q00"]["mention_image"]["bytes"])).size == (20_000, 100)


def test_the_table_and_the_tests_speak_of_the_same():
    """Each case above stands in the table, and each line of the table in some test's words."""
    lines = re.findall(
        r"^\| (?!input|-)(.+?) \|", TABLE.read_text(encoding="utf-8").partition("## The machine")[0], re.M
    )
    tests = Path(__file__).read_text(encoding="utf-8").replace("_", " ")
    assert len(lines) == 33
    assert [line for line in lines if line not in tests] == []
    assert set(UNUSABLE) | set(ODD_TEXTS) | (set(BROKEN) - {"a pipe"}) <= set(lines)
