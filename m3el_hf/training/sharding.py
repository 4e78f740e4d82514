"""Weights that are divided among processes (FSDP): what the model must be like, and how they come together again.

Tested with torch's `fully_shard` on CPUs. Accelerate refuses FSDP there, so that its own preparing and its checkpoints
of divided weights, which need accelerators, are used as its documentation says and not tested.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.training.start import base_of


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the weights will be divided among processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def fix_scale(model: ClipNDModel) -> None:
    """Makes CLIP's scale a buffer, in place: FSDP divides no scalars. It keeps its name, and is not trained."""
    scale = model.clip.logit_scale.detach()
    del model.clip.logit_scale
    model.clip.register_buffer("logit_scale", scale)


def collect_weights(objective: nn.Module, model: ClipNDModel | PeftModel) -> None:
    """Copies divided weights, put together, into the main process's ``model``; all processes must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(objective, options=options)
    if weights:  # which the main process alone is given
        base_of(model).load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})


def as_number(value: Any) -> Tensor:
    """A norm over divided weights as each process's own tensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
