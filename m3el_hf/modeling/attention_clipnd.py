"""Attention averaged over the asking tokens, for every pair of an asker and an answerer. Flat file, for the Hub.

``mean_i (P_i V)`` equals ``(mean_i P_i) V``, so attention is averaged before it meets the values, and of the logits
``[B, N, Lq, Lk]`` no more than a block exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_BLOCK_BYTES = 2**20
"""Of one block of logits on a CPU: it is read and written several times, which is fast in a core's level-2 cache."""

CPU_GROUP = 10
"""Of answerers in a block: more make their product no faster, and leave more of shorter ones' padding in it."""

GPU_BLOCK_BYTES = 2**28
"""Of one block of answers on an accelerator: large enough to keep it busy, small beside its memory."""


def averaged_attention(
    query: Tensor, weights: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None
) -> Tensor:
    """Returns ``c[b, n] = sum_i weights[n, i] softmax_j(query[n, i] . key[b, j] / sqrt(d)) value[b]``.

    On a CPU blocks of logits stay in cache, and the backward pass computes them again instead of keeping them. Other
    devices run ``scaled_dot_product_attention``.

    Args:
        query: ``[N, Lq, d]``.
        weights: ``[N, Lq]``, of each asking token; it gets no gradient. 0 leaves a token out.
        key: ``[B, Lk, d]``.
        value: ``[B, Lk, dv]``.
        key_mask: ``[B, Lk]`` bool, False for tokens that give no answer; None where all do.

    Returns:
        ``[B, N, dv]``; zeros for a row of ``key`` that is masked throughout.
    """
    key = key / math.sqrt(key.shape[-1])
    if key_mask is not None:
        answered = key_mask.any(1, keepdim=True)
        value, key_mask = value * answered.unsqueeze(-1), key_mask | ~answered  # a softmax over no key is NaN
    if query.device.type == "cpu":
        return _BlockedAttention.apply(query, weights, key, value, key_mask)
    return _fused_attention(query, weights, key, value, key_mask)


def _fused_attention(query: Tensor, weights: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """The same through a fused kernel, for keys that come scaled; a block of askers' tokens against each answerer."""
    count, width = len(key), value.shape[-1]
    mask = None if key_mask is None else key_mask[:, None, None]
    size = max(1, GPU_BLOCK_BYTES // max(1, value.element_size() * count * query.shape[1] * width))
    parts = []
    for asking, weight in zip(query.split(size), weights.split(size), strict=True):
        flat = asking.reshape(1, 1, -1, asking.shape[-1]).expand(count, -1, -1, -1)
        answers = F.scaled_dot_product_attention(flat, key[:, None], value[:, None], attn_mask=mask, scale=1.0)
        parts.append((answers.reshape(count, *asking.shape[:2], width) * weight[..., None]).sum(2))
    return torch.cat(parts, 1)


class _BlockedAttention(torch.autograd.Function):
    """The same in blocks of a group of answerers and as many askers as `CPU_BLOCK_BYTES` holds."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, weights: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, weights, key, value, key_mask)
        context = value.new_zeros(len(key), len(query), value.shape[-1])
        for group in _groups(key, value, key_mask):
            for rows in group.blocks(query):
                averaged = torch.bmm(weights[rows].unsqueeze(1), group.attention(query[rows]))
                context[group.rows, rows] = torch.bmm(group.by_answerer(averaged), group.value)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value.

        With g the gradient of c and h = V g that of the averaged attention, the logits S = Q K^T have
        dS_ij = w_i P_ij (h_j - sum_k P_ik h_k), and dQ = dS K, dK = dS^T Q, dV = (sum_i w_i P_i)^T g.
        """
        query, weights, key, value, key_mask = ctx.saved_tensors
        of_query, of_key, of_value = (one.new_zeros(one.shape) for one in (query, key, value))
        for group in _groups(key, value, key_mask):
            keys, (count, length, _) = group.key.flatten(0, 1), group.key.shape
            of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(group.value)
            for rows in group.blocks(query):
                weight, g = weights[rows].unsqueeze(1), gradient[group.rows, rows]
                attention = group.attention(query[rows])
                of_values.baddbmm_(group.by_answerer(torch.bmm(weight, attention)).mT, g)
                h = torch.bmm(g, group.value.mT).transpose(0, 1).reshape(-1, 1, count * length)
                of_logits = attention * h
                sums = of_logits.view(-1, length).sum(-1, keepdim=True)
                of_logits.view(-1, length).addcmul_(attention.view(-1, length), sums, value=-1)
                flat = of_logits.flatten(0, 1)
                of_query[rows].flatten(0, 1).addmm_(flat, keys)
                of_keys.addmm_(flat.T, (query[rows] * weight.mT).flatten(0, 1))
            of_key[group.rows, :length], of_value[group.rows, :length] = of_keys.view_as(group.key), of_values
        return of_query * weights.unsqueeze(-1), None, of_key, of_value, None


@dataclass
class _Group:
    """Answerers that are asked at once, cut to the longest of them: one large product is faster than many small ones.

    Attributes:
        rows: ``[G]``, which of all answerers they are.
        key: ``[G, M, d]``.
        value: ``[G, M, dv]``.
        bias: ``[G * M]``, -inf for masked tokens; None where there are none.
    """

    rows: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None

    def blocks(self, query: Tensor) -> Iterator[slice]:
        """Slices of the askers."""
        size = max(1, CPU_BLOCK_BYTES // max(1, query.element_size() * query.shape[1] * self.key.shape[:2].numel()))
        return (slice(start, start + size) for start in range(0, len(query), size))

    def attention(self, query: Tensor) -> Tensor:
        """``[C, Lq, G * M]``. The kernel subtracts each row's largest logit: they pass 100 after long training."""
        flat, keys = query.flatten(0, 1), self.key.flatten(0, 1).T
        logits = flat @ keys if self.bias is None else torch.addmm(self.bias, flat, keys)
        return torch.softmax(logits.view(-1, self.key.shape[1]), -1).view(*query.shape[:2], -1)

    def by_answerer(self, averaged: Tensor) -> Tensor:
        """``[G, C, M]`` of ``[C, 1, G * M]``."""
        return averaged.view(len(averaged), *self.key.shape[:2]).transpose(0, 1)


def _groups(key: Tensor, value: Tensor, key_mask: Tensor | None) -> Iterator[_Group]:
    """Answerers by their length, so that few tokens of a group are padding."""
    if key_mask is None:
        for rows in torch.arange(len(key)).split(CPU_GROUP):
            yield _Group(rows, key[rows], value[rows], None)
        return
    lengths = (torch.arange(1, key.shape[1] + 1) * key_mask).amax(1)  # of the last token that counts
    for rows in lengths.argsort().split(CPU_GROUP):
        length = int(lengths[rows[-1]])
        bias = key.new_zeros(len(rows), length).masked_fill(~key_mask[rows, :length], -math.inf)
        yield _Group(rows, key[rows, :length], value[rows, :length], bias.flatten())
