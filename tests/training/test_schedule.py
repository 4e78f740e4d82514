from __future__ import annotations

import math

import pytest

from m3el_hf.training import schedule
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.schedule import Clock
from m3el_hf.training.start import make_optimizer, make_trainable
from tests.conftest import tiny_model


def rates(**changes) -> list[float]:
    clock, found = Clock(TrainingArguments(**{"max_steps": 10, "warmup_steps": 4} | changes), 100), []
    while clock.progress < 1:
        found.append(clock.rate)
        clock.advance(0.0)
    return found


def test_rates_rise_and_fall():
    rise = [0.25, 0.5, 0.75, 1.0, 1, 1, 1, 1, 1, 1]
    assert rates(lr_scheduler_type="constant") == rise
    assert rates(lr_scheduler_type="linear") == pytest.approx([one * (1 - n / 10) for n, one in enumerate(rise)])
    cosine = [one * (1 + math.cos(math.pi * n / 10)) / 2 for n, one in enumerate(rise)]
    assert rates() == pytest.approx(cosine)
    assert rates(warmup_steps=0, lr_scheduler_type="constant") == [1] * 10


@pytest.mark.parametrize(
    ("every", "steps"), [(0.25, [2, 5, 7, 9]), (0.1, [*range(1, 10)]), (4, [4, 8]), (1, [*range(1, 10)]), (100, [])]
)
def test_what_is_due_is_due_once(every, steps):
    clock = Clock(TrainingArguments(eval_steps=every, num_train_epochs=3), 3)
    found = []
    while clock.progress < 1:
        clock.advance(0.0)
        if clock.is_due("eval_steps"):
            found.append(clock.step)
        assert not clock.is_due("eval_steps")
    if 0 < every < 1 and every * 9 < 1:
        every = 1 / 9
    assert found == ([3, 5, 7, 9] if steps == [2, 5, 7, 9] else steps)
    again = Clock(TrainingArguments(eval_steps=every, num_train_epochs=3), 3)
    again.start(5)
    assert not again.is_due("eval_steps")  # what was due by then was done before


def test_the_shortest_limit_ends_the_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(schedule.time, "monotonic", lambda: now[0])
    clock = Clock(TrainingArguments(num_train_epochs=100, max_minutes=1, max_steps=50), 10)
    assert clock.total_steps == 50
    now[0] += 30
    clock.advance(clock.elapsed())
    assert clock.progress == 0.5 and clock.seconds_left == 30
    clock.start(20, 45.0)  # resumed: the time before counts
    now[0] += 6
    clock.advance(clock.elapsed())
    assert clock.seconds == 51 and clock.progress == pytest.approx(0.85)
    clock.advance(61.0)
    assert clock.progress == 1
    streamed = Clock(TrainingArguments(), None)
    assert streamed.total_steps == math.inf and streamed.progress == 0


@pytest.mark.parametrize("lora", [False, True])
def test_rates_and_decay_by_weight(lora, processor):
    model = tiny_model(processor, "matching")
    arguments = TrainingArguments(learning_rate=1e-4, head_learning_rate=1e-3, weight_decay=0.2, lora=lora)
    make_trainable(model, arguments)
    groups = make_optimizer(model, arguments).param_groups
    found = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    names = dict(model.named_parameters())
    for name, weight in names.items():
        if not weight.requires_grad:
            assert id(weight) not in found
            continue
        is_head = not name.startswith("clip.")
        assert found[id(weight)] == (1e-3 if is_head else 1e-4, 0.2 if weight.ndim > 1 else 0.0), name
        if name.endswith("bias") or "norm" in name or name.endswith("logit_scale"):
            assert found[id(weight)][1] == 0
    assert groups[0]["lr"] == 1e-4  # which is the one that is logged


@pytest.mark.parametrize(
    ("freeze", "frozen"), [("text", ["text"]), ("image", ["vision"]), ("both", ["text", "vision"])]
)
def test_frozen_towers_are_not_trained(freeze, frozen, processor):
    model = tiny_model(processor)
    make_trainable(model, TrainingArguments(freeze=freeze))
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (name.split(".")[1].removesuffix("_model") not in frozen), name
