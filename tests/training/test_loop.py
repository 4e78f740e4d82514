from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict

from m3el_hf import ClipNDModel, M3ELError
from m3el_hf.evaluation.evaluator import ModelSystem, evaluate
from m3el_hf.training import loop
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.loop import train
from m3el_hf.training.objective import Objective
from tests.conftest import tiny_model


def arguments(folder: Path, **changes) -> TrainingArguments:
    few = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "eval_steps": 0.5, "warmup_steps": 1}
    return TrainingArguments(output_dir=folder, **({"learning_rate": 2e-3, "token_dropout": 0.1} | few | changes))


def test_training_learns_its_own_rows(processor, data: DatasetDict, tmp_path):
    rows = data["train"].select(range(24))
    model = tiny_model(processor)
    before = evaluate([ModelSystem("m", model, processor)], rows).mean("m")
    settings = arguments(tmp_path, num_train_epochs=50, tasks_per_mention=9, token_dropout=0.0)
    model, result = train(model, processor, rows, rows, settings, progress=False)
    after = evaluate([ModelSystem("m", model, processor)], rows).mean("m")
    assert result.steps == 150
    assert before < 0.5 and after > before + 0.2


def test_the_model_has_the_weights_of_the_best_validation_run(processor, data, tmp_path, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    values = iter([0.4, 0.9, 0.2, 0.5])

    class Fixed:
        def mean(self, *_):
            return next(values)

    def fake_evaluate(systems, rows):
        seen.append({name: one.clone() for name, one in systems[0].model.state_dict().items()})
        return Fixed()

    monkeypatch.setattr(loop, "evaluate", fake_evaluate)
    settings = arguments(tmp_path, eval_steps=0.25)
    model, result = train(
        tiny_model(processor), processor, data["train"].select(range(16)), data["validation"], settings, progress=False
    )
    assert [entry["validation_mrr"] for entry in result.history] == [0.4, 0.9, 0.2, 0.5]
    assert result.best_mrr == 0.9 and result.best_step == result.history[1]["step"]
    for weights in (model.state_dict(), ClipNDModel.from_pretrained(tmp_path / "best").state_dict()):
        assert all(torch.equal(weights[name], one) for name, one in seen[1].items())
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_seed_gives_the_same_weights(processor, data, tmp_path):
    rows, held_out = data["train"].select(range(16)), data["validation"].select(range(4))
    settings = arguments(tmp_path, augment_pictures=True, num_train_epochs=1)
    one, other = (
        train(tiny_model(processor), processor, rows, held_out, settings, progress=False)[0].state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_not_finite_stops_the_run(processor, data, tmp_path):
    model = tiny_model(processor)
    with torch.no_grad():
        model.clip.text_projection.weight.fill_(math.nan)
    with pytest.raises(M3ELError, match=r"loss is nan at step 0.*no checkpoint"):
        train(model, processor, data["train"], data["validation"], arguments(tmp_path), progress=False)


def test_a_loaded_model_is_trained_in_training_mode(processor, data, tmp_path, monkeypatch):
    tiny_model(processor).save_pretrained(tmp_path / "start")
    model, modes, forward = ClipNDModel.from_pretrained(tmp_path / "start"), [], Objective.forward

    def noted(self, *inputs):
        modes.append(all(module.training for module in self.model.modules()))
        return forward(self, *inputs)

    monkeypatch.setattr(Objective, "forward", noted)
    rows = data["train"].select(range(16))
    train(model, processor, rows, data["validation"], arguments(tmp_path, num_train_epochs=1), progress=False)
    assert modes and all(modes)


@pytest.mark.parametrize("empty", ["training", "validation"])
def test_an_empty_split_is_named(empty, processor, data, tmp_path):
    splits = {"training": data["train"], "validation": data["validation"]}
    splits[empty] = splits[empty].select([])
    with pytest.raises(M3ELError, match=empty):
        train(tiny_model(processor), processor, *splits.values(), arguments(tmp_path), progress=False)


def test_time_ends_a_run(processor, data, tmp_path):
    settings = arguments(tmp_path, num_train_epochs=10_000, max_minutes=0.02)
    _, result = train(
        tiny_model(processor), processor, data["train"], data["validation"].select(range(4)), settings, progress=False
    )
    assert 0 < result.steps < 1000
    assert len(result.history) >= 1


def test_two_processes_train_and_agree(processor, store, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        """
import sys
from accelerate import PartialState
from datasets import load_dataset
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.objective import Objective
from m3el_hf.training.loop import train
from m3el_hf.training.start import start_model

store, output = sys.argv[1:]
data = load_dataset(store)
model, processor = start_model(None, "clip", data["train"])
settings = TrainingArguments(output, num_train_epochs=1, per_device_train_batch_size=8, eval_steps=1e9)
model, result = train(model, processor, data["train"].select(range(32)), data["validation"], settings, progress=False)
total = sum(p.double().sum().item() for p in model.parameters())
state = PartialState()
open(f"{output}.{state.process_index}", "w").write(f"[{state.num_processes}, {result.steps}, {total!r}]")
"""
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), str(store), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    assert one == other
    assert one[:2] == [2, 2]  # two processes really ran, and each saw half of the four batches
