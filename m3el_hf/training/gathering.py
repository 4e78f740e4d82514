"""Encoded rows of every process, with gradient, so that each process's entities are negatives of all mentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3el_hf.modeling.encoded_clipnd import Encoded

E = TypeVar("E", bound=Encoded)


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this is."""
    return dist.get_rank() if process_count() > 1 else 0


def gather(values: Tensor) -> list[Tensor]:
    """Returns the values ``[n, ...]`` of each process, in their order, whose n and second size may differ.

    The gradient of what this process gave is the sum of all processes' gradients of it.
    """
    if process_count() == 1:
        return [values]
    sizes = _sizes(values)
    longest = [max(size) for size in zip(*sizes, strict=True)]
    padding = [
        part for have, most in zip(reversed(values.shape), reversed(longest), strict=True) for part in (0, most - have)
    ]
    parts = _AllGather.apply(F.pad(values, padding))
    return [part[tuple(slice(length) for length in size)] for part, size in zip(parts, sizes, strict=True)]


def gather_encoded(encoded: E) -> list[E]:
    """Returns the encoded rows of each process, in their order, with gradient."""
    columns = {name: gather(value) for name, value in encoded.tensors().items()}
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [type(encoded)(**{**vars(encoded), **tensors}) for tensors in rows]


def total(value: Tensor) -> Tensor:
    """Returns the sum over processes of a tensor that needs no gradient."""
    if process_count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def _sizes(values: Tensor) -> list[Sequence[int]]:
    mine = torch.tensor(values.shape, device=values.device)
    sizes = [torch.empty_like(mine) for _ in range(process_count())]
    dist.all_gather(sizes, mine)
    return [size.tolist() for size in sizes]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(values) for _ in range(process_count())]
        dist.all_gather(parts, values.contiguous())
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = torch.stack(gradients)
        dist.all_reduce(gradient)
        return gradient[process_index()]
