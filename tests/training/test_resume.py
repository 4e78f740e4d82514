"""A run that is killed anywhere and resumed ends as one that was left alone."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from m3el_hf import M3ELError
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.checkpoints import clean
from m3el_hf.training.log import PLOT, TrainingLog, plot_log, read_log
from tests.training.jobs import job, launch, run_job, run_jobs
from tests.training.killed import kill_at

TIMED = {"mentions_per_second", "waiting_for_data", "peak_memory_gb"}
LIVELY = {
    "head": "matching", "model": {"dropout": 0.2}, "augment_pictures": True, "token_dropout": 0.1, "max_steps": 10,
    "save_steps": 3, "eval_steps": 4, "logging_steps": 4, "entity_text": "N=1,ND=2",
}  # fmt: skip
"""Validates at 4, 8 and 10, saves at 3, 6, 9 and 10, with epochs of 4 steps and everything random that there is."""


def lively(store: Path, folder: Path, **changes) -> dict:
    return job(store, folder, **LIVELY | changes)


def assert_same_run(one: Path, other: Path, processes: int = 1) -> None:
    """Weights, optimiser, random state and log alike, bit for bit, but for times."""
    newest = [max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:])) for folder in (one, other)]
    assert newest[0].name == newest[1].name
    for name in ("best", "last", newest[0].name):
        weights, others = (load_file(folder / name / "model.safetensors") for folder in (one, other))
        assert all(torch.equal(weights[key], others[key]) for key in weights), name
    states = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in newest]
    for number, moments in states[0].items():
        assert all(torch.equal(value, states[1][number][key]) for key, value in moments.items())
    logs = [[{key: line[key] for key in line.keys() - TIMED} for line in read_log(folder)] for folder in (one, other)]
    if processes == 1:
        assert logs[0] == logs[1]
    else:  # what processes had counted by themselves is added up when it is saved
        assert logs[0] == [pytest.approx(line, rel=1e-6) for line in logs[1]]
    known = [json.loads((folder / "state.json").read_text()) for folder in newest]
    for state in known:
        for entry in state["result"]["history"]:
            del entry["seconds"]
    assert known[0]["result"] == known[1]["result"]


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_job(lively(store, folder))
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-10"}
    return folder


def killing(store: Path, folder: Path, where: str, number: int) -> None:
    """Runs until ``where`` is called the ``number``-th time, and kills the process there (SIGKILL)."""
    child = os.fork()
    if not child:
        try:
            kill_at(where, number)
            run_job(lively(store, folder))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("m3el_hf.training.loop._Run._step", 3),  # before the first checkpoint
        ("m3el_hf.training.loop._Run._step", 8),  # between two
        ("torch.save", 4),  # in the middle of the second save: weights are written, the optimiser is not
        ("m3el_hf.training.checkpoints._sync", 3),  # the first is written, but not yet under its name
        (
            "m3el_hf.modeling.processing_clipnd.ClipNDProcessor.save_pretrained",
            2,
        ),  # while the models of the end are written
    ],
)
def test_a_run_that_is_killed_ends_as_one_that_was_not(where, number, store, undisturbed, tmp_path):
    folder = tmp_path / "run"
    killing(store, folder, where, number)
    run_job(lively(store, folder, resume=True))
    assert_same_run(undisturbed, folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}


def test_two_processes_that_are_killed_end_as_two_that_were_not(store, tmp_path):
    jobs = [lively(store, tmp_path / name, per_device_train_batch_size=4) for name in ("one", "other")]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [str(Path(__file__).with_name("killed.py")), str(tmp_path / "jobs.json")]
    assert launch([*command, "m3el_hf.training.loop._Run._step", "18"], 2, check=False).returncode  # 8 of the other
    jobs[1]["settings"]["resume"] = True
    run_jobs(jobs[1:], tmp_path, 2)
    assert_same_run(tmp_path / "one", tmp_path / "other", processes=2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size 8, and now it is 4"),
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"rows": 40}, "steps of an epoch 4, and now it is 5"),
        ({"model": {"dropout": 0.2, "contrastive_weight": 5.0}}, "contrastive_weight 1.0, and now it is 5.0"),
        ({"model": {"matching_dim": 16}}, "holds another model's weights"),
        ({"resume": False}, "is of an earlier run: continue that with --resume"),
    ],
)
def test_another_run_is_not_continued(changes, named, store, undisturbed):
    with pytest.raises(M3ELError, match=named) as error:
        run_job(lively(store, undisturbed, **{"resume": True} | changes))
    assert "\n" not in str(error.value)


def test_a_run_that_is_finished_gives_its_best_model_again(store, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.name != "log.jsonl"}
    log = read_log(undisturbed)
    model, result = run_job(lively(store, undisturbed, resume=True))
    assert result.is_finished and result.steps == 10
    best = load_file(undisturbed / "best" / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in best.items())
    assert read_log(undisturbed) == log
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_a_kill_left_is_cleaned(tmp_path):
    for name in ("checkpoint-3", "checkpoint-3.old", "checkpoint-6.partial", "best.old", "mine.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    clean(tmp_path)
    assert {path.name: (path / "from").read_text() for path in tmp_path.iterdir()} == {
        "checkpoint-3": "checkpoint-3",
        "best": "best.old",
        "mine.old": "mine.old",
    }


def test_a_plot_that_cannot_be_drawn_leaves_the_one_before(tmp_path, monkeypatch):
    entries = [{"step": step, "loss": 1.0, "learning_rate": 0.1, "validation_mrr": 0.5} for step in (1, 2)]
    plot_log(entries[:1], tmp_path / PLOT)
    before = (tmp_path / PLOT).read_bytes()

    def half(self, path, **_):
        Path(path).write_bytes(before[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space"):
        plot_log(entries, tmp_path / PLOT)
    assert (tmp_path / PLOT).read_bytes() == before
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PLOT]


def test_all_processes_go_on_with_the_terms_that_were_counted(tmp_path):
    """Else the sums of one that has counted a term since the checkpoint, and of one that has not, do not pair up."""
    counts = dict.fromkeys(("mentions", "candidates", "entities", "seconds", "waited"), 8.0)
    state = {"lines": 0, "terms": {"loss": (6.0, 3), "loss/image": (2.0, 1)}, "counts": counts}
    main, other = (SimpleNamespace(is_main_process=one, device=torch.device("cpu")) for one in (True, False))
    logs = [TrainingLog(TrainingArguments(output_dir=tmp_path), one) for one in (main, other)]
    for log in logs:
        log.start(state)
    assert logs[0].state() == state
    assert logs[1].state()["terms"] == {"loss": (0.0, 3), "loss/image": (0.0, 1)} and not logs[1].is_empty
    assert not any(logs[1].state()["counts"].values())
