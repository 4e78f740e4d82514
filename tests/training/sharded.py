"""Trains with weights that torch's fully_shard divides among the processes that torchrun starts: as FSDP does.

Accelerate refuses FSDP without accelerators, so what it would do stands here: divide layer by layer, and give the
optimiser the divided weights.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from m3el_hf.training import loop
from tests.training.jobs import run_job


def prepare(accelerator, objective, optimizer):
    names = {id(weight): name for name, weight in objective.named_parameters()}
    for module in objective.modules():
        if type(module).__name__ in objective._no_split_modules:
            fully_shard(module)
    fully_shard(objective)
    divided = dict(objective.named_parameters())
    assert all(isinstance(weight, DTensor) for weight in divided.values())
    for group in optimizer.param_groups:
        group["params"] = [divided[names[id(weight)]] for weight in group["params"]]
    return objective, optimizer


@contextmanager
def no_sync(accelerator, objective):
    objective.set_requires_gradient_sync(False)
    yield
    objective.set_requires_gradient_sync(True)


def main(path: str) -> None:
    loop.is_sharded = lambda accelerator: True
    loop.save_checkpoint = lambda *_: None
    Accelerator.prepare, Accelerator.no_sync = prepare, no_sync
    for one in json.loads(Path(path).read_text()):
        model, _ = run_job(one)
        assert not any(isinstance(weight, DTensor) for weight in model.state_dict().values())


if __name__ == "__main__":
    main(sys.argv[1])
