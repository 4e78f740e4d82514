"""Two processes are one process of the doubled batch."""

from __future__ import annotations

import json
from pathlib import Path

from m3el_hf import ClipNDModel
from m3el_hf.training.log import read_log
from tests.training.jobs import job, launch, run_job, run_jobs

KINDS = {
    "clip": {"head": "clip"},
    "pooled": {"head": "pooled"},
    "uni": {"head": "matching"},
    "bi": {"head": "matching", "model": {"matching_direction": "bidirectional"}},
    "branch": {"head": "matching", "model": {"matching_branches": ["text"]}},
    "parts": {"head": "matching", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "few": {"head": "matching", "rows": 6, "tasks": "t2t=1,i2i=1", "tasks_per_mention": 1, "max_steps": 8},
}


def size(kind: dict, processes: int) -> int:
    whole = 2 if kind.get("rows") == 6 else 8
    return whole // processes // kind.get("gradient_accumulation_steps", 1)


def assert_same_weights(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    one, other = (ClipNDModel.from_pretrained(folder).state_dict() for folder in (one, other))
    for name, value in one.items():
        bound = tolerance * max(1e-2, value.abs().max().item())
        assert (value - other[name]).abs().max() <= bound, name


def assert_same_log(one: Path, other: Path) -> None:
    lines, others = read_log(one), read_log(other)
    assert len(lines) == len(others) > 5
    for line, same in zip(lines, others, strict=True):
        assert line.keys() == same.keys()
        for key in line:
            if key.startswith(("loss", "learning", "validation", "step")):
                bound = 1e-5 * max(1, line.get("loss", 1))  # a term's rounding is measured by the whole loss
                assert abs(line[key] - same[key]) <= bound, (one.name, line["step"], key)


def test_two_processes_are_one_of_the_doubled_batch(store, tmp_path):
    jobs = []
    for name, kind in KINDS.items():
        settings = {"rows": 37} | kind
        two = settings | {"per_device_train_batch_size": size(kind, 2)}
        jobs.append(job(store, tmp_path / f"{name}-two", **two))
        alone = {key: value for key, value in settings.items() if key != "gradient_accumulation_steps"}
        run_job(
            job(store, tmp_path / f"{name}-one", **alone | {"per_device_train_batch_size": 2 if name == "few" else 8})
        )
    run_jobs(jobs, tmp_path, 2)
    for name in KINDS:
        one, other = tmp_path / f"{name}-one", tmp_path / f"{name}-two"
        assert_same_weights(one / "last", other / "last")
        assert_same_log(one, other)


def test_divided_weights_are_trained_as_whole_ones(store, tmp_path):
    """FSDP, as torch has it on CPUs: validation, ``best`` and ``last`` are of whole weights."""
    jobs = []
    for name, head, parts in (("whole", "matching", 1), ("parts", "matching", 3), ("pooled", "pooled", 3)):
        settings = {"head": head, "rows": 37, "tasks": "t2t=1,i2i=1,it2it=1", "tasks_per_mention": 1, "eval_steps": 2}
        settings["learning_rate"] = 3e-4
        sizes = {"per_device_train_batch_size": 3 // parts, "gradient_accumulation_steps": parts}
        jobs.append(job(store, tmp_path / f"{name}-two", **settings | sizes))
        run_job(
            job(store, tmp_path / f"{name}-one", trains_scale=False, **settings | {"per_device_train_batch_size": 6})
        )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    launch([str(Path(__file__).with_name("sharded.py")), str(tmp_path / "jobs.json")], 2)
    for name in ("whole", "parts", "pooled"):
        one, other = tmp_path / f"{name}-one", tmp_path / f"{name}-two"
        assert_same_log(one, other)
        for weights in ("best", "last"):
            assert_same_weights(one / weights, other / weights)
