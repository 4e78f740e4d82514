"""What a run is about to do and how long it may take, measured before it starts."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import nn

from m3el_hf.training.objective import TrainingBatch, backward


def seconds_of_a_step(objective: nn.Module, batch: TrainingBatch, parts: int, accelerator: Accelerator) -> float:
    """Measures a forward and a backward pass; no weight, gradient or random state is another one afterwards.

    The second of two passes counts, since the first one also compiles and allocates.

    Args:
        objective: What `Accelerator.prepare` made of an `Objective`; it has no gradients yet.
        batch: This process's share of a batch.
        parts: Into how many parts encoding is divided.
        accelerator: Scales losses and synchronises processes.
    """
    device = accelerator.device
    with random_state_kept(device):
        for _ in range(2):
            _wait_for(device)
            began = time.monotonic()
            backward(objective, batch, parts, accelerator)
            _wait_for(device)
            seconds = time.monotonic() - began
            objective.zero_grad()
    return seconds


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Draws of torch within it leave those after it as they were, on the CPU and on a device."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say_time(seconds: float) -> str:
    """Says a duration as people do."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size and unit == 'h' else 0}f} {unit}"
    return f"{seconds:.{0 if seconds >= 10 else 1 if seconds >= 1 else 2}f} s"


def say_size(objective: nn.Module, rows: int | None, mentions: int, entities: int, candidates: int) -> str:
    """Says how much is trained on how much: parameters, rows (None if streamed), and what a step has of both sides.

    Candidates are counted for each mention; many are the same entity, which is encoded once.
    """
    sizes = [(one.numel(), one.requires_grad) for one in objective.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return (
        f"{'streamed' if rows is None else f'{rows:,}'} rows; {trained:,} of {sum(size for size, _ in sizes):,} "
        f"parameters are trained; {mentions:,} mentions and {entities:,} entities a step, each encoded once for "
        f"{candidates / entities:.2f} candidates"
    )


def say_plan(steps: float, seconds_each: float, limit: float) -> str:
    """Says how long a run may take, besides its validation runs.

    Args:
        steps: How many are left; infinite where time alone ends the run.
        seconds_each: What one takes.
        limit: Seconds after which it ends anyway; infinite for no limit.
    """
    each = f"({say_time(seconds_each)} each)"
    if steps * seconds_each > limit:
        fitting = math.floor(limit / seconds_each)
        return f"{say_time(limit)} for about {fitting:,} steps {each}, fewer by what validation takes"
    return f"about {say_time(steps * seconds_each)} for {steps:,} steps {each}, and validation"
