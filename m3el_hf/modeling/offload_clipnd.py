"""Weights that are not at hand, since a ``device_map`` put them on a disk or in another memory. Flat file, for the Hub.

Accelerate fetches a module's weights around its ``forward``. What is read elsewhere must be fetched by its hook.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import CLIPModel

Method = TypeVar("Method", bound=Callable[..., Any])


def home_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first weight lies or, if that is offloaded, where it is fetched to."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            return torch.device(_hook(part).execution_device) if _is_offloaded(part) else weight.device
    raise ValueError(f"{type(module).__name__} has no weights")


def with_weights_at_hand(method: Method) -> Method:
    """Fetches what scoring reads itself, where it is offloaded: weights of the head's LayerNorms and CLIP's scale."""

    @wraps(method)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for name, part in self.named_modules() if _hook(self) else ():
                reads = isinstance(part, nn.LayerNorm | CLIPModel) and not name.startswith("clip.")
                if reads and _is_offloaded(part):
                    _hook(part).pre_forward(part)
                    stack.callback(_hook(part).post_forward, part, None)
            return method(self, *args, **kwargs)

    return cast(Method, wrapped)


def _hook(module: nn.Module) -> Any:
    """What accelerate put on the module; None where it put nothing."""
    return getattr(module, "_hf_hook", None)


def _is_offloaded(module: nn.Module) -> bool:
    return getattr(_hook(module), "offload", False)
