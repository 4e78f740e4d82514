from __future__ import annotations

import copy
import math
import time

import pytest
import torch
from accelerate import Accelerator

from m3el_hf.data.collator import LinkingCollator, undecoded
from m3el_hf.training import loop
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.batches import TrainingCollator
from m3el_hf.training.estimate import say_plan, say_time, seconds_of_a_step
from m3el_hf.training.loop import train
from m3el_hf.training.negatives import HardNegatives
from m3el_hf.training.objective import Objective
from tests.conftest import tiny_model


def with_dropout(processor):
    model = tiny_model(processor)
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.3
    return model.train()


@pytest.mark.parametrize("parts", [1, 2])
def test_measuring_a_step_changes_nothing(parts, processor, data, tmp_path):
    model = with_dropout(processor)
    batch = TrainingCollator(LinkingCollator(processor), TrainingArguments(tmp_path), 0)(
        list(undecoded(data["train"].select(range(8))))
    )
    weights, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert 0 < seconds_of_a_step(Objective(model), batch, parts, Accelerator()) < 60
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())
    assert all(one.grad is None for one in model.parameters())


def test_a_run_that_says_its_plan_is_the_run_that_does_not(processor, data, tmp_path, capsys):
    rows, held_out = data["train"].select(range(24)), data["validation"].select(range(4))

    def weights(progress):
        settings = TrainingArguments(
            tmp_path / str(progress),
            num_train_epochs=2,
            per_device_train_batch_size=12,
            eval_steps=1.0,
            learning_rate=1e-3,
        )
        return train(with_dropout(processor), processor, rows, held_out, settings, progress=progress)[0].state_dict()

    one, other = weights(True), weights(False)
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("24 rows; ") and "12 mentions" in first and first.endswith(" candidates")
    assert second.startswith("about ") and " for 4 steps (" in second


def test_what_an_epoch_begins_with_is_no_waiting_for_data(processor, data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(loop, "seconds_of_a_step", lambda *_: 0.0)
    monkeypatch.setattr(loop, "say_plan", lambda steps, seconds, limit: said.append(seconds) or "")
    monkeypatch.setattr(HardNegatives, "mine", lambda *_, **__: time.sleep(3))
    settings = TrainingArguments(tmp_path, max_steps=1, mine_negatives=1, per_device_train_batch_size=2)
    train(tiny_model(processor), processor, data["train"].select(range(2)), None, settings)
    assert 0 < said[0] < 2


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.034, "0.03 s"), (1.84, "1.8 s"), (75, "75 s"), (720, "12 min"), (8000, "2.2 h"), (90000, "25 h")],
)
def test_a_time_is_said_as_people_do(seconds, said):
    assert say_time(seconds) == said


def test_the_plan_says_what_ends_the_run():
    assert say_plan(400, 1.8, math.inf) == "about 12 min for 400 steps (1.8 s each), and validation"
    assert say_plan(math.inf, 0.5, 600) == "10 min for about 1,200 steps (0.50 s each), fewer by what validation takes"
