"""Pooling tokens into one vector by class-specific residual attention, and the head that does so. Flat file.

CSRA (K. Zhu and J. Wu, Residual Attention, ICCV 2021, arXiv 2108.02456, section 3) pools a channel x over L tokens as

    base + lambda * mean_T att_T,   base = mean_l x_l,   att_T = sum_l x_l softmax_l(T x_l),   att_max = max_l x_l

with lambda = 1 and T in 2, 2.5, 3.5, 4.5 and max, the values of the matching network (arXiv 2412.10440).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .configuration_clipnd import ClipNDConfig

TEMPERATURES = (2.0, 2.5, 3.5, 4.5)


def csra(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pools ``tokens`` ``[n, L, d]`` to ``[n, d]``.

    Args:
        tokens: At least one a row.
        mask: ``[n, L]`` bool, False for tokens that are left out; a row of which all are is pooled whole. None for no
            mask.
    """
    if mask is None:
        mask = torch.ones_like(tokens[..., 0], dtype=torch.bool)
    kept = (mask | ~mask.any(1, keepdim=True)).unsqueeze(-1)
    tokens = tokens.masked_fill(~kept, 0.0)
    lowest = torch.finfo(tokens.dtype).min
    attended = tokens.masked_fill(~kept, lowest).amax(1)
    for temperature in TEMPERATURES:
        attended = attended + (tokens * (temperature * tokens).masked_fill(~kept, lowest).softmax(1)).sum(1)
    return tokens.sum(1) / kept.sum(1) + attended / (len(TEMPERATURES) + 1)


def csra_of_two(once: Tensor, often: Tensor, times: Tensor | int) -> Tensor:
    """`csra` of one token ``once`` and ``times`` tokens that all equal ``often``, without building them.

    A softmax over them gives ``once`` the weight sigmoid(T (once - often) - log(times)), which no value overflows.

    Args:
        once: ``[n, d]``.
        often: ``[n, d]``.
        times: ``[n, 1]`` of at least 1, or one number for all rows.
    """
    difference, log_times = once - often, math.log(times) if isinstance(times, int) else times.log()
    weight = sum(torch.sigmoid(temperature * difference - log_times) for temperature in TEMPERATURES)
    attended = often + (weight * difference + difference.relu()) / (len(TEMPERATURES) + 1)
    return often + difference / (times + 1) + attended


class PoolingHead(nn.Module):
    """One fixed-size vector for a text and one for a picture, of one space.

    Each is ``unit(csra(W h + b))`` over the tower's last hidden states h, with weights of its own modality. A side is
    the unit vector of the sum of what it has, and a score the cosine of two sides times CLIP's learned scale, so any
    side is scored against any other.
    """

    def __init__(self, config: ClipNDConfig) -> None:
        super().__init__()
        clip: Any = config.clip_config
        self.mask_padding = config.mask_padding
        self.text_fc = nn.Linear(clip.text_config.hidden_size, config.matching_dim)
        self.image_fc = nn.Linear(clip.vision_config.hidden_size, config.matching_dim)

    def pool_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns unit vectors ``[n, d]`` of hidden states ``[n, L, H]``; ``mask`` ``[n, L]`` is False for padding."""
        return _unit(csra(self.text_fc(tokens), mask if self.mask_padding else None))

    def pool_image(self, tokens: Tensor) -> Tensor:
        """Returns unit vectors ``[n, d]`` of hidden states ``[n, P, H]``, the class patch's among them."""
        return _unit(csra(self.image_fc(tokens)))


def _unit(vectors: Tensor) -> Tensor:
    """Unit vectors ``[n, d]``, computed in fp32: in fp16 zeros, of a row without the modality, become NaN."""
    return F.normalize(vectors.float(), dim=-1).to(vectors.dtype)
