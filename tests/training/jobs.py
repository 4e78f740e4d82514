"""Training jobs that tests run in this process, in one that they kill, or in several that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from m3el_hf import ClipNDConfig, ClipNDModel, ClipNDProcessor
from m3el_hf.data.collator import LinkingCollator
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.loop import TrainingResult, train

ROOT = Path(__file__).parents[2]


def job(
    store: Path,
    output: Path,
    *,
    head: str = "clip",
    model: Any = None,
    rows: int = 32,
    trains_scale: bool = True,
    **settings: Any,
) -> dict:
    """What `run_job` does: settings of the run, arguments of `ClipNDConfig.tiny`, and how many rows it sees."""
    few = {"per_device_train_batch_size": 8, "max_steps": 5, "learning_rate": 1e-3, "warmup_steps": 2}
    few |= {"adam_epsilon": 1e-3, "eval_steps": 5, "save_steps": 1000, "logging_steps": 1, "tasks_per_mention": 2}
    return {
        "store": str(store),
        "model": {"head": head, "entity_to_mention_weight": 0.5, "dropout": 0.0} | (model or {}),
        "rows": rows,
        "trains_scale": trains_scale,
        "settings": few | settings | {"output_dir": str(output)},
    }


def start(job: dict) -> tuple[ClipNDModel, ClipNDProcessor]:
    """A tiny model, the same in every process, with dropout of attention if the job says so."""
    processor = ClipNDProcessor.tiny(
        ["a band from Kansas known for a red star", "a state of the plains"], vocab_size=600
    )
    options = dict(job["model"])
    dropout = options.pop("dropout")
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    config = ClipNDConfig.tiny(len(tokenizer), tokenizer.eos_token_id, width=32, **options)
    config.clip_config.text_config.attention_dropout = dropout
    config.clip_config.vision_config.attention_dropout = dropout
    return ClipNDModel(config), processor


def run_job(job: dict) -> tuple[ClipNDModel, TrainingResult]:
    torch.set_num_threads(1)
    data = load_dataset(job["store"])
    model, processor = start(job)
    model.clip.logit_scale.requires_grad_(job["trains_scale"])
    rows = data["train"].select(range(job["rows"]))
    settings = TrainingArguments(**job["settings"])
    return train(model, LinkingCollator(processor), rows, data["validation"].select(range(4)), settings, progress=False)


def run_jobs(jobs: list[dict], folder: Path, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """Runs jobs one after another in ``processes`` new processes."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    return launch([str(Path(__file__)), str(path)], processes, check)


def launch(command: list[str], processes: int, check: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    parallel = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    full = [sys.executable, *(parallel if processes > 1 else []), *command]
    done = subprocess.run(full, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def main(path: str) -> None:
    from accelerate import PartialState

    for one in json.loads(Path(path).read_text()):
        run_job(one)
        assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    main(sys.argv[1])
