"""Encoded rows of every process, with gradient, so that each process's entities are negatives of all mentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3el_hf.modeling.encoded_clipnd import Encoded


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this is."""
    return dist.get_rank() if process_count() > 1 else 0


def gather(columns: Sequence[Tensor]) -> list[list[Tensor]]:
    """Returns the columns ``[n, ...]`` of each process, in their order; n and the second size may differ.

    The gradient of what this process gave is the sum of all processes' gradients of it. All columns are one node of the
    graph, and even a process whose columns need no gradient has it: backward, whose sums pair up between processes, is
    then the same in each, whatever of the columns its loss reads.
    """
    if process_count() == 1:
        return [list(columns)]
    shapes, columns = _agreed(columns)
    longest = [[max(size) for size in zip(*(shape[i] for shape in shapes), strict=True)] for i in range(len(columns))]
    padded = [_pad(column, most) for column, most in zip(columns, longest, strict=True)]
    values = iter(_AllGather.apply(torch.zeros((), device=columns[0].device, requires_grad=True), *padded))
    return [[next(values)[tuple(slice(length) for length in size)] for size in shape] for shape in shapes]


def gather_encoded(*sides: Encoded) -> list[list[Any]]:
    """Returns of each side the encoded rows of each process, in their order, with gradient."""
    processes = [iter(values) for values in gather([value for side in sides for value in side.tensors().values()])]
    return [[side._replace({name: next(values) for name in side.tensors()}) for values in processes] for side in sides]


def total(value: Tensor) -> Tensor:
    """Returns the sum over processes of a tensor that needs no gradient."""
    if process_count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def _agreed(columns: Sequence[Tensor]) -> tuple[list[list[list[int]]], list[Tensor]]:
    """Returns each process's shapes, and the columns in the type that all processes have them in.

    A tower that does not run leaves fp32 zeros where autocast makes another process's values bf16.
    """
    known = [[column.element_size(), *column.shape] for column in columns]
    mine = torch.tensor([number for one in known for number in one], device=columns[0].device)
    found = [torch.empty_like(mine) for _ in range(process_count())]
    dist.all_gather(found, mine)
    lengths = [len(one) for one in known]
    processes = [[one.tolist() for one in numbers.split(lengths)] for numbers in found]
    largest = [max(one[i][0] for one in processes) for i in range(len(columns))]
    alike = [
        column.float() if column.is_floating_point() and size > column.element_size() else column
        for column, size in zip(columns, largest, strict=True)
    ]
    return [[one[1:] for one in process] for process in processes], alike


def _pad(values: Tensor, sizes: Sequence[int]) -> Tensor:
    padding = [
        part for have, most in zip(reversed(values.shape), reversed(sizes), strict=True) for part in (0, most - have)
    ]
    return F.pad(values, padding)


class _AllGather(torch.autograd.Function):
    """Columns of one shape in all processes, process by process. The first argument only asks for a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        gathered = []
        for column in columns:
            parts = [torch.empty_like(column) for _ in range(process_count())]
            dist.all_gather(parts, column.contiguous())
            gathered.append(parts)
        values = tuple(value for process in zip(*gathered, strict=True) for value in process)
        ctx.mark_non_differentiable(*(value for value in values if not value.is_floating_point()))
        ctx.floating = [column.is_floating_point() for column in columns]
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None]
        for number, is_floating in enumerate(ctx.floating):
            if not is_floating:
                result.append(None)
                continue
            gradient = torch.stack(gradients[number :: len(ctx.floating)])
            dist.all_reduce(gradient)
            result.append(gradient[process_index()])
        return tuple(result)
