"""Attention averaged over the asking tokens, for every pair of an asker and an answerer. Flat file, for the Hub.

``mean_i (P_i V)`` equals ``(mean_i P_i) V``, so attention is averaged before it meets the values, and of the logits
``[B, N, Lq, Lk]`` no more than a block exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_BLOCK_BYTES = 2**20
"""Of one block of logits on a CPU: it is read and written several times, which is fast in a core's level-2 cache."""

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
    if query.device.type == "cpu":
        return _BlockedAttention.apply(query, weights, key, value, key_mask)
    return _fused_attention(query, weights, key, value, key_mask)


def _fused_attention(query: Tensor, weights: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """The same through a fused kernel: a block of all askers' tokens against each answerer; ``key`` comes scaled."""
    count, width = len(key), value.shape[-1]
    answered, mask = None, None
    if key_mask is not None:
        answered = key_mask.any(1)
        mask = (key_mask | ~answered.unsqueeze(1))[:, None, None]  # a row with no key at all would be NaN
    size = max(1, GPU_BLOCK_BYTES // max(1, value.element_size() * count * query.shape[1] * width))
    parts = []
    for asking, weight in zip(query.split(size), weights.split(size), strict=True):
        flat = asking.reshape(1, 1, -1, asking.shape[-1]).expand(count, -1, -1, -1)
        answers = F.scaled_dot_product_attention(flat, key[:, None], value[:, None], attn_mask=mask, scale=1.0)
        parts.append((answers.view(count, *asking.shape[:2], width) * weight[..., None]).sum(2))
    context = torch.cat(parts, 1) if parts else value.new_zeros(count, 0, width)
    return context if answered is None else context * answered[:, None, None]


class _BlockedAttention(torch.autograd.Function):
    """The same in blocks of one answerer and as many askers as `CPU_BLOCK_BYTES` holds; ``key`` comes scaled."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, weights: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, weights, key, value, key_mask)
        keys, values = _unmasked(key, key_mask), _unmasked(value, key_mask)
        context = value.new_zeros(len(key), len(query), value.shape[-1])
        for rows in _blocks(query, key):
            asking, weight = query[rows], weights[rows].unsqueeze(1)
            for b, (one_key, one_value) in enumerate(zip(keys, values, strict=True)):
                context[b, rows] = torch.bmm(weight, _attention(asking, one_key)).squeeze(1) @ one_value
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value.

        With g the gradient of c and h = V g that of the averaged attention, the logits S = Q K^T have
        dS_ij = w_i P_ij (h_j - sum_k P_ik h_k), and dQ = dS K, dK = dS^T Q, dV = (sum_i w_i P_i)^T g.
        """
        query, weights, key, value, key_mask = ctx.saved_tensors
        keys, values = _unmasked(key, key_mask), _unmasked(value, key_mask)
        of_query = torch.zeros_like(query)
        of_keys, of_values = [torch.zeros_like(one) for one in keys], [torch.zeros_like(one) for one in values]
        for rows in _blocks(query, key):
            asking, weight = query[rows], weights[rows].unsqueeze(-1)
            weighted, sums = (asking * weight).flatten(0, 1), asking.new_zeros(asking.shape)
            for b, (one_key, one_value) in enumerate(zip(keys, values, strict=True)):
                attention, one_gradient = _attention(asking, one_key), gradient[b, rows]
                of_values[b].addmm_(torch.bmm(weight.mT, attention).squeeze(1).T, one_gradient)
                of_mean = one_gradient @ one_value.T
                of_logits = of_mean.unsqueeze(1) - attention @ of_mean.unsqueeze(-1)
                flat = of_logits.mul_(attention).flatten(0, 1)
                sums.view(-1, sums.shape[-1]).addmm_(flat, one_key)
                of_keys[b].addmm_(flat.T, weighted)
            of_query[rows] = sums * weight
        return of_query, None, _masked(of_keys, key, key_mask), _masked(of_values, value, key_mask), None


def _attention(query: Tensor, key: Tensor) -> Tensor:
    """``[C, Lq, Lk]``. The kernel subtracts each row's largest logit: they pass 100 after long training."""
    return torch.softmax(query.flatten(0, 1) @ key.T, -1).view(*query.shape[:2], len(key))


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    size = max(1, CPU_BLOCK_BYTES // max(1, query.element_size() * query.shape[1] * key.shape[1]))
    return (slice(start, start + size) for start in range(0, len(query), size))


def _unmasked(tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Each row's tokens without those that are masked: they cost nothing then."""
    return list(tokens) if mask is None else [row[kept] for row, kept in zip(tokens, mask, strict=True)]


def _masked(rows: list[Tensor], like: Tensor, mask: Tensor | None) -> Tensor:
    """The opposite of `_unmasked`, with zeros for what is masked."""
    if mask is None:
        return torch.stack(rows) if rows else torch.zeros_like(like)
    tokens = torch.zeros_like(like)
    if rows:
        tokens[mask] = torch.cat(rows)
    return tokens
