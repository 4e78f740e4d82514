"""From a raw release to the Hub and back: built, audited, pushed, loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import real
from tests.hub_server import HubServer, hub_environment, run_python

ROUND_TRIP = """
import json, sys
from itertools import zip_longest
from datasets import disable_progress_bars, load_dataset
from m3el_hf import load_m3el
from m3el_hf.cli import main

disable_progress_bars()
build, built, topic = {build!r}, {built!r}, {topic!r}
assert main(["data", "build", *build, "--output", built]) == 0
assert main(["data", "audit", built]) == 0
assert main(["data", "push", built, "user/m3el", "--tag", "v1.0"]) == 0
counts = {{}}
for config in ("all", topic, "t2t", "i2i", "it2it", "entities"):
    here = load_dataset(built, config)
    there = load_dataset("user/m3el", config)
    streamed = load_dataset("user/m3el", config, streaming=True, revision="v1.0")
    assert here.keys() == there.keys() == streamed.keys()
    for split, rows in here.items():
        assert rows.features == there[split].features
        expected = rows.with_format("arrow")[:].to_pylist()
        assert there[split].with_format("arrow")[:].to_pylist() == expected
        assert all(one == other for one, other in zip_longest(streamed[split].decode(False), expected))
        counts[f"{{config}} {{split}}"] = len(expected)
for task in ("t2t", "i2it"):
    here, there = (load_m3el(topic, task=task, data_dir=source, split="train") for source in (built, "user/m3el"))
    assert there.with_format("arrow")[:].to_pylist() == here.with_format("arrow")[:].to_pylist()
print(json.dumps(counts))
"""


def round_trip(hub: HubServer, folder: Path, build: list[str], topic: str) -> dict[str, int]:
    """Takes the whole way and returns the rows of each config and split."""
    code = ROUND_TRIP.format(build=build, built=str(folder / "m3el"), topic=topic)
    done = run_python(code, hub_environment(hub.url, folder / "home"), timeout=500)
    files = hub.files("user/m3el", "dataset")
    assert {"README.md", "manifest.json", "audit/audit.json", "audit/audit.md", "audit/audit.html"} <= set(files)
    assert "## Audit" in files["README.md"].decode()
    return json.loads(done.stdout.splitlines()[-1])


def test_generated_data_comes_back_from_the_hub_as_it_was_built(hub, tmp_path):
    counts = round_trip(hub, tmp_path, ["--reader", "mini", "--instances", "60"], "books")
    assert sum(count for name, count in counts.items() if name.startswith("all ")) == 60


@pytest.mark.parametrize(
    ("name", "topic", "rows"),
    [
        ("emoji", "common", {"train": 921, "validation": 141, "test": 257}),
        ("person", "person", {"all": 8992}),
    ],
)
def test_real_data_comes_back_from_the_hub_as_it_was_built(hub, tmp_path, name, topic, rows):
    counts = round_trip(hub, tmp_path, ["--input", str(real(f"data/{name}"))], topic)
    if "all" in rows:
        assert sum(count for config, count in counts.items() if config.startswith("all ")) == rows["all"]
    else:
        assert {split: counts[f"all {split}"] for split in rows} == rows
