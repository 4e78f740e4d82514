"""Trains in bf16, and checks what is computed in it: towers are, scores and losses are not."""

from __future__ import annotations

import sys

import torch
from accelerate.state import AcceleratorState

from m3el_hf import M3ELError
from m3el_hf.training import objective
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.loop import _make_accelerator
from tests.training.jobs import main

weigh, loss_terms = objective.weigh, objective.loss_terms
seen = set()


def checked(losses, config):
    assert {one.dtype for one in losses.values()} == {torch.float32}
    return weigh(losses, config)


def scored(model, *given):
    with torch.no_grad():
        out = model.clip.text_model.encoder.layers[0].mlp.fc1(torch.zeros(1, 32))
    seen.add(out.dtype)
    scores, terms = loss_terms(model, *given)
    assert scores.dtype == torch.float32
    return scores, terms


if __name__ == "__main__":
    try:
        _make_accelerator(TrainingArguments(mixed_precision="fp16"))
    except M3ELError as error:
        print(error)
    AcceleratorState._reset_state(True)
    objective.weigh, objective.loss_terms = checked, scored
    main(sys.argv[1])
    assert seen == {torch.bfloat16}
