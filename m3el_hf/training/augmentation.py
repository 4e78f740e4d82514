"""Modality augmentation: each mention draws tasks, and what a task hides is masked on both sides.

The dataset paper (arXiv 2410.18096) trains CLIPND with modality augmentation on names and descriptions, and does not
say how. Ours are these readings of it (inferred): a task is drawn at random for each mention and epoch; equally among
the nine that the row fits, unless weights or stages say otherwise; an entity's text is drawn as name, description or
both. Changed pictures and hidden tokens are additions of our own, and off by default.

All draws depend on the seed, the epoch and what is drawn for alone: a row's id, or an entity's Qid. So an example gets
the same draw in any batch and on any number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from m3el_hf.tasks import TASKS, TEMPLATES, Task
from m3el_hf.training.distributions import Weights

Row = Mapping[str, Any]


def draw_tasks(row: Row, count: int, seed: int, epoch: int, weights: Weights | None = None) -> list[Task]:
    """Draws ``count`` different tasks among those the row fits, or all of those if they are fewer.

    Args:
        row: A dataset row.
        count: How many tasks.
        seed: The run's.
        epoch: Which pass over the rows it is.
        weights: Of the tasks, by name; absent ones have 0. None for equal ones. A row that fits no task of a weight
            draws among all that it fits.
    """
    fitting = [task for task in TASKS.values() if task.fits(row)]
    wanted = [task for task in fitting if weights is None or weights.get(task.name, 0) > 0] or fitting
    dice = random.Random(f"{seed}:{epoch}:{row['id']}")
    # Each waits an exponential time with its weight as rate, and the first are taken (P. Efraimidis and P. Spirakis,
    # Weighted random sampling with a reservoir, 2006).
    waits = {task.name: dice.expovariate((weights or {}).get(task.name, 0) or 1.0) for task in wanted}
    return sorted(wanted, key=lambda task: waits[task.name])[:count]


def draw_template(qid: str, described: tuple[bool, bool], weights: Weights, seed: int, epoch: int) -> str | None:
    """Draws what an entity's text is made of, among what it has; None where it has neither name nor description.

    Args:
        qid: The entity.
        described: Whether it has a name, and a description.
        weights: Of the templates, by name.
        seed: The run's.
        epoch: Which pass over the rows it is.
    """
    has = {"N": described[0], "D": described[1], "ND": any(described)}
    able = [one for one in TEMPLATES if has[one]]
    wanted = [one for one in able if weights.get(one, 0) > 0] or able
    odds = [weights.get(one, 0) or 1.0 for one in wanted]
    return random.Random(f"{seed}:{epoch}:text:{qid}").choices(wanted, odds)[0] if wanted else None


def task_views(drawn: Sequence[Sequence[Task]]) -> tuple[Tensor, Tensor]:
    """Turns each mention's tasks into ``rows`` ``[R]`` and ``views`` ``[R, 4]`` of `ClipNDModel.forward`."""
    pairs = [(mention, task) for mention, tasks in enumerate(drawn) for task in tasks]
    views = [
        (task.mention.has_text, task.mention.has_image, task.candidate.has_text, task.candidate.has_image)
        for _, task in pairs
    ]
    rows = torch.tensor([mention for mention, _ in pairs], dtype=torch.long)
    return rows, torch.tensor(views, dtype=torch.bool).reshape(-1, 4)


def uniform(names: Sequence[str], size: int) -> Tensor:
    """Returns numbers in [0, 1) ``[n, size]``, each row's drawn for its name alone."""
    drawn = [[dice.random() for _ in range(size)] for dice in map(random.Random, names)]
    return torch.tensor(drawn, dtype=torch.float32).reshape(len(names), size)


def augment_pictures(pixels: Tensor, names: Sequence[str]) -> Tensor:
    """Moves, turns, scales and tints pictures at random.

    Args:
        pixels: ``[n, 3, S, S]``, normalised.
        names: What each picture's draws depend on.

    Returns:
        New pictures of the same shape: up to 14 degrees, 25 % in scale, 10 % of the side in place, 20 % in contrast and
        0.4 standard deviations in brightness.
    """
    n = len(pixels)
    draws = 2 * uniform(names, 8) - 1
    scale, angle = 1 + 0.25 * draws[:, 0], 0.25 * draws[:, 1]
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    place = 0.2 * draws[:, 2:4].T
    transform = torch.stack([cosine, sine, place[0], -sine, cosine, place[1]], 1).reshape(n, 2, 3)
    grid = F.affine_grid(transform, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved * (1 + 0.2 * draws[:, 4:7].reshape(n, 3, 1, 1)) + 0.4 * draws[:, 7].reshape(n, 1, 1, 1)


def drop_tokens(attention_mask: Tensor, share: float, names: Sequence[str]) -> Tensor:
    """Hides a random share of each text's tokens, never the first and the last, at which CLIP starts and pools.

    Args:
        attention_mask: ``[n, L]``, 1 for tokens.
        share: The probability of hiding a token.
        names: What each text's draws depend on.
    """
    inner = torch.ones_like(attention_mask, dtype=torch.bool)
    inner[:, 0] = False
    inner[torch.arange(len(inner)), attention_mask.sum(1) - 1] = False
    hidden = inner & (uniform(names, attention_mask.shape[1]) < share)
    return attention_mask.masked_fill(hidden, 0)
