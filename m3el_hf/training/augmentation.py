"""Modality augmentation: each mention draws tasks, and what a task hides is masked on both sides.

The dataset paper (arXiv 2410.18096) trains CLIPND with modality augmentation on names and descriptions; that a task is
drawn at random for each mention is our reading of it. Draws depend on the seed, the epoch and the row's id alone, so an
example gets the same draw on any number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from m3el_hf.tasks import TASKS, Task

Row = Mapping[str, Any]


def draw_tasks(row: Row, count: int, seed: int, epoch: int) -> list[Task]:
    """Draws ``count`` different tasks among those the row fits, or all of those if they are fewer."""
    fitting = [task for task in TASKS.values() if task.fits(row)]
    return random.Random(f"{seed}:{epoch}:{row['id']}").sample(fitting, min(count, len(fitting)))


def task_views(drawn: Sequence[Sequence[Task]]) -> tuple[Tensor, Tensor]:
    """Turns each mention's tasks into ``rows`` ``[R]`` and ``views`` ``[R, 4]`` of `ClipNDModel.forward`."""
    pairs = [(mention, task) for mention, tasks in enumerate(drawn) for task in tasks]
    views = [
        (task.mention.has_text, task.mention.has_image, task.candidate.has_text, task.candidate.has_image)
        for _, task in pairs
    ]
    rows = torch.tensor([mention for mention, _ in pairs], dtype=torch.long)
    return rows, torch.tensor(views, dtype=torch.bool).reshape(-1, 4)


def augment_pictures(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Moves, turns, scales and tints pictures at random.

    Args:
        pixels: ``[n, 3, S, S]``, normalised.
        generator: Makes the draws.

    Returns:
        New pictures of the same shape: up to 14 degrees, 25 % in scale, 20 % of the side in place, 20 % in contrast and
        0.4 standard deviations in brightness.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    n = len(pixels)
    scale, angle = 1 + 0.25 * uniform(n), 0.25 * uniform(n)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    place = 0.2 * uniform(2, n)
    transform = torch.stack([cosine, sine, place[0], -sine, cosine, place[1]], 1).reshape(n, 2, 3)
    grid = F.affine_grid(transform, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved * (1 + 0.2 * uniform(n, 3, 1, 1)) + 0.4 * uniform(n, 1, 1, 1)


def drop_tokens(attention_mask: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Hides a random share of each text's tokens, never the first and the last, at which CLIP starts and pools.

    Args:
        attention_mask: ``[n, L]``, 1 for tokens.
        share: The probability of hiding a token.
        generator: Makes the draws.
    """
    inner = torch.ones_like(attention_mask, dtype=torch.bool)
    inner[:, 0] = False
    inner[torch.arange(len(inner)), attention_mask.sum(1) - 1] = False
    hidden = inner & (torch.rand(attention_mask.shape, generator=generator) < share)
    return attention_mask.masked_fill(hidden, 0)
