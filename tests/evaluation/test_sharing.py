from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.outcomes import COUNTS, Evaluation
from m3el_hf.evaluation.sharing import Share
from tests.evaluation.jobs import FEW, counting_system, eleven_rows, make_small, measure
from tests.training.jobs import launch

JOB = str(Path(__file__).with_name("jobs.py"))
RANKS = ("0", "1")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("shared")
    launch([JOB, "shared", str(folder)], 2)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process finds and encodes."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        yield measure(None, tmp_path_factory.mktemp("single"))


def assert_same(one: Evaluation, other: Evaluation) -> None:
    assert (one.systems, one.tasks, one.missing) == (other.systems, other.tasks, other.missing)
    for system in other.systems:
        assert one.outcomes[system].keys() == other.outcomes[system].keys()
        for task, outcome in other.outcomes[system].items():
            for name in COUNTS:
                np.testing.assert_array_equal(getattr(one.outcomes[system][task], name), getattr(outcome, name))
    assert one.facts.keys() == other.facts.keys()
    for name, values in other.facts.items():
        np.testing.assert_array_equal(one.facts[name], values)


def test_two_processes_find_what_one_does_and_both_know_it(both, single):
    """Both protocols, with the control, more batches than processes and fewer, a cache and none."""
    found, _ = single
    assert len(found) == 10
    for name, evaluation in found.items():
        assert all(len(by_task["it2it"].rows) for by_task in evaluation.outcomes.values())
        for rank in RANKS:
            assert_same(Evaluation.load(both / rank / name), evaluation)


def test_two_processes_encode_each_entity_once_between_them(both, single):
    _, alone = single
    mine, others = (json.loads((both / rank / "encoded.json").read_text()) for rank in RANKS)
    assert {name: mine[name] + others[name] for name in alone} == alone
    assert alone == {
        "clip fresh": 33, "clip fresh, base": 33,
        "clip one row": 3, "clip one row, base": 33,
        "matching kept": 33, "matching kept, base": 33,
        "matching again": 0, "matching again, base": 0,
        "matching one row": 3, "matching one row, base": 0,
    }  # fmt: skip
    for name in ("clip fresh", "matching kept, base"):
        assert {mine[name], others[name]} == {15, 18}  # of seven chunks, the last of three


def test_processes_that_write_the_same_chunks_at_the_same_time_find_the_same(both, monkeypatch, tmp_path):
    make_small(monkeypatch.setattr)
    alone = evaluate([counting_system()], eleven_rows(), FEW, cache_dir=tmp_path)
    for rank in RANKS:
        assert_same(Evaluation.load(both / rank / "alone"), alone)
    written = sorted((both / "contested").rglob("*.*"))
    expected = sorted(tmp_path.rglob("*.*"))
    assert [path.name for path in written] == [path.name for path in expected]
    for one, other in zip(map(load_file, written), map(load_file, expected), strict=True):
        assert all(torch.equal(one[name], value) for name, value in other.items())


def test_a_process_by_itself_has_all_of_it():
    share = Share(None)
    assert (share.is_main, share.mine([1, 2, 3]), share.gathered([1, 2])) == (True, [1, 2, 3], [1, 2])
    with share.folder(None) as folder:
        (folder / "file").write_text("")
    assert not folder.exists()


def test_a_folder_that_is_given_stays(tmp_path):
    with Share(None).folder(tmp_path) as folder:
        assert folder == tmp_path
    assert tmp_path.is_dir()
