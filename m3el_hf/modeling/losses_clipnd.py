"""What training minimises: how far the golds' scores are from the best. Flat file: it travels to the Hub."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .encoded_clipnd import Encoded
from .offload_clipnd import with_weights_at_hand

Term = tuple[Tensor, Tensor]
"""A term of the loss: its sum, and over how many rows or pairs; a mean over several batches needs both."""


def seen_of_mentions(rows: Tensor, views: Tensor, mentions: int) -> Tensor:
    """What some row of each mention shows: views ``[R, 4]`` of rows ``[R]`` by mention, bool ``[mentions, 4]``."""
    times = torch.zeros(mentions, 4, dtype=torch.long, device=views.device)
    return times.index_add_(0, rows, views.long()) > 0


@with_weights_at_hand
def loss_terms(
    model: Any,
    mentions: Any,
    entities: Any,
    labels: Tensor,
    rows: Tensor,
    views: Tensor,
    mine: slice = slice(None),
    seen: Tensor | None = None,
) -> tuple[Tensor, dict[str, Term]]:
    """Scores rows and compares them with their golds (arXiv 2412.10440, section 4.4).

    A row's total is compared among the entities that show all that its gold shows in its task: one that shows less
    would be told apart by that.

    Args:
        model: The `ClipNDModel`.
        mentions: B encoded mentions.
        entities: N encoded entities, all different.
        labels: ``[B]``, the index of each mention's gold.
        rows: ``[R]``, the mention of each row, all of them within ``mine``.
        views: ``[R, 4]`` bool, what each row shows: mention text and picture, entity text and picture.
        mine: The mentions whose share of each term is computed; the others serve as negatives. This is how
            processes divide one batch.
        seen: ``[B, 4]``, `seen_of_mentions` of all rows; None if these are all.

    Returns:
        The scores ``[R, N]``, and the terms: ``total``, the cross-entropy of the total; that of each branch of the
        matching head, over the rows whose gold it can score; ``contrastive_text`` and ``contrastive_image``, of
        the same head; and ``entity_to_mention``, each gold's cross-entropy over the mentions as the row's task
        shows them, where the configuration gives that a weight.
    """
    golds = labels[rows]
    scores = model._score_rows(mentions, entities, rows, views, mine)
    terms = {
        "total": _cross_entropy(scores.total.masked_fill(~_as_shown(entities, golds, views[:, 2:]), -math.inf), golds)
    }
    if model.config.head == "matching":
        # clip stands in for the pairs that no branch can score: the total has it
        terms |= {name: _cross_entropy(one, golds) for name, one in scores.branches.items() if name != "clip"}
        seen = seen_of_mentions(rows, views, len(mentions)) if seen is None else seen
        pairs = entities[labels].show(seen[:, 2], seen[:, 3]), mentions.show(seen[:, 0], seen[:, 1])
        terms |= model.matching.contrastive_terms(*pairs, labels, mine)
    if model.config.entity_to_mention_weight:
        terms["entity_to_mention"] = _entity_to_mention(model, mentions, entities, labels, rows, views)
    return scores.total, terms


def weigh(losses: dict[str, Tensor], config: Any) -> Tensor:
    """Adds up the means of `loss_terms` with the configuration's weights; those of text and picture are averaged."""
    weights = {name: config.branch_weight for name in losses} | {"total": 1.0}
    weights["entity_to_mention"] = config.entity_to_mention_weight
    contrastive = [name for name in losses if name.startswith("contrastive")]
    weights |= {name: config.contrastive_weight / len(contrastive) for name in contrastive}
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


def _entity_to_mention(model: Any, mentions: Any, entities: Any, labels: Tensor, rows: Tensor, views: Tensor) -> Term:
    """The other direction: which mention means the gold; others that mean it are left out."""
    golds, which = torch.unique(labels[rows], return_inverse=True)
    branches = {}
    if model.config.head == "matching":
        branches = {name: one.mT[which] for name, one in model.matching.branches(mentions, entities[golds]).items()}
    scores = model._score_views(entities, labels[rows], mentions, branches, views[:, [2, 3, 0, 1]]).total
    others = labels[rows].unsqueeze(1) != labels
    others[torch.arange(len(rows), device=rows.device), rows] = True
    return _cross_entropy(scores.masked_fill(~(others & _as_shown(mentions, rows, views[:, :2])), -math.inf), rows)


def _cross_entropy(scores: Tensor, golds: Tensor) -> Term:
    """The summed cross-entropy of the rows whose gold has a score, and how many these are."""
    able = scores.gather(1, golds.unsqueeze(1)).squeeze(1) != -math.inf
    return F.cross_entropy(scores[able], golds[able], reduction="sum"), able.sum()


def _as_shown(side: Encoded, right: Tensor, views: Tensor) -> Tensor:
    """Which of n show what the right one ``[R]`` shows in views ``[R, 2]`` of text and picture; bool ``[R, n]``."""
    text, image = side.has_text[right] & views[:, 0], side.has_image[right] & views[:, 1]
    return (side.has_text | ~text.unsqueeze(1)) & (side.has_image | ~image.unsqueeze(1))
