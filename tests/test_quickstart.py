from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModel

from m3el_hf import M3ELError
from m3el_hf.quickstart import AFTER, BEFORE, CONTROL, QuickstartOptions, quickstart
from tests.conftest import instance, tiny_model, write_release


def run(**options):
    console = Console(record=True, width=100)
    report = quickstart(QuickstartOptions(**options), console)
    return report, console.export_text()


def test_everything_is_measured_and_written(store: Path, tmp_path):
    report, printed = run(data_dir=store, output=tmp_path, minutes=0.3)
    accuracy = report.tables[0]
    named = [column.name for column in accuracy.columns]
    strings = ["string match", "character match", "BM25"]
    assert named == ["task", "chance", *strings, "image hash", BEFORE, AFTER, CONTROL, "n"]
    assert len(accuracy.rows) == 11
    assert all(row[1].value == pytest.approx(1 / 3) for row in accuracy.rows)
    for task in ("t2t", "it2it", "macro", "linked:", "gold"):
        assert task in printed
    results = json.loads((tmp_path / "results.json").read_text())
    cells = {row["cells"]["task"]: row["cells"] for row in results["tables"][0]["rows"]}
    assert cells["i2i"][AFTER]["n"] == cells["i2i"]["n"] > 0
    assert (tmp_path / "chart-accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "<table" in (tmp_path / "report.html").read_text()
    assert "### Accuracy by task" in (tmp_path / "model" / "README.md").read_text()
    assert AutoModel.from_pretrained(tmp_path / "model").config.head == "clip"


def test_a_set_without_pictures_says_so(tmp_path):
    instances = [instance(n, images=False) for n in range(80)]
    for one in instances:
        one["description"] = ""
    release = write_release(tmp_path / "raw", instances)
    (release / "README.md").write_text("# a release may have one")
    report, printed = run(data_dir=release, output=tmp_path / "out", minutes=0.2)
    counts = {row[0]: row[-1] for row in report.tables[0].rows}
    means = [counts.pop(name) for name in ("macro", "micro")]
    assert counts.pop("t2t") > 0 and means == [None, None] and set(counts.values()) == {0}
    (coverage,) = (table for table in report.tables if table.key == "coverage")
    assert "no mention picture" in [column.name for column in coverage.columns]
    assert "linked: Name" in printed


@pytest.mark.parametrize("lora", [False, True])
def test_a_pretrained_clip_is_the_start(lora, store, processor, tmp_path):
    clip = tmp_path / "clip"
    tiny_model(processor).clip.save_pretrained(clip)
    processor.tokenizer.save_pretrained(clip)
    processor.image_processor.save_pretrained(clip)
    report, _ = run(data_dir=store, output=tmp_path / "out", minutes=0.3, base=str(clip), head="matching", lora=lora)
    assert report.provenance["base"] == str(clip)
    assert AutoModel.from_pretrained(tmp_path / "out" / "model").config.head == "matching"


def test_no_time_to_train_is_an_error(store, tmp_path):
    with pytest.raises(M3ELError, match="allow at least"):
        run(data_dir=store, output=tmp_path, minutes=0.01)
