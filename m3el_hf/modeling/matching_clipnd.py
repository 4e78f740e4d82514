"""The multi-level matching head (arXiv 2412.10440). Flat file: it travels to the Hub.

Sizes in the docstrings: B mentions, N entities, L text tokens, P picture tokens (token 0 is the class patch), text
width dt, picture width dv, matching width d. Everything but the fine-grained term is a dot product of one vector a
side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .attention_clipnd import averaged_attention
from .configuration_clipnd import ClipNDConfig
from .crossmodal_clipnd import BidirectionalMatching, UnidirectionalMatching
from .encoded_clipnd import MatchingEntities, MatchingMentions, MatchingSide
from .released_clipnd import matching_names

MENTION_BLOCK = 64
"""How many mentions are scored at a time."""

BLOCK_BYTES = 2**24
"""Of the fp32 queries, or of the contexts ``[MENTION_BLOCK, C, d]``, of the C entities that are scored at a time."""

ROUNDING = 2 * torch.finfo(torch.float32).eps
"""A dot product of w numbers is off by at most w eps/2 times the product of the lengths; two are compared, and there
are a few roundings more."""


@dataclass
class Features:
    """What the matching head needs of one side, n rows.

    Rows without text or without picture hold anything in the fields of what they lack; only ``has_text`` and
    ``has_image`` decide.

    Attributes:
        text_cls: ``[n, dt]``, the unit text vector of CLIP.
        text_tokens: ``[n, L, dt]`` (or the text tower's own width, where it differs), the text tower's last hidden
            states after its final LayerNorm.
        text_mask: ``[n, L]``, True for tokens, False for padding.
        image_cls: ``[n, dv]``, the projected picture vector.
        image_tokens: ``[n, P, dv]``, the projected hidden states of the vision tower.
        has_text: ``[n]`` bool.
        has_image: ``[n]`` bool.
    """

    text_cls: Tensor
    text_tokens: Tensor
    text_mask: Tensor
    image_cls: Tensor
    image_tokens: Tensor
    has_text: Tensor
    has_image: Tensor


@dataclass
class MatchingScores:
    """Scores of every mention against every entity.

    Attributes:
        total: ``[B, N]``, the mean over the branches that can score the pair; -inf where none can.
        branches: Each branch's ``[B, N]``; -inf where it cannot score the pair.
    """

    total: Tensor
    branches: dict[str, Tensor]


def mean_of_present(branches: dict[str, Tensor], present: dict[str, Tensor]) -> MatchingScores:
    """Averages the branches over those present for each pair.

    Args:
        branches: Scores ``[B, N]`` by branch; anything finite where absent.
        present: Bool ``[B, N]`` by branch.
    """
    scores = torch.stack(list(branches.values())).float()
    mask = torch.stack([present[name] for name in branches])
    count = mask.sum(0)
    total = torch.where(mask, scores, 0.0).sum(0) / count.clamp(min=1)
    total = total.masked_fill(count == 0, -math.inf)
    return MatchingScores(
        total, {name: score.masked_fill(~mask[i], -math.inf) for i, (name, score) in enumerate(branches.items())}
    )


class IntraModalMatching(nn.Module):
    """Coarse and fine matching within one modality (arXiv 2412.10440, section 4.2).

    With Q of the entity's tokens, K and V of the mention's, ``c = mean_i softmax_j(Q_i K_j / sqrt(d)) V_j``, and q of
    the entity's vector: score = (cls_m . cls_e + q . LN(c)) / 2.
    """

    def __init__(self, cls_width: int, token_width: int, dim: int) -> None:
        super().__init__()
        self.fc_query = nn.Linear(token_width, dim)
        self.fc_key = nn.Linear(token_width, dim)
        self.fc_value = nn.Linear(token_width, dim)
        self.fc_cls = nn.Linear(cls_width, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def local(
        self,
        keys: Tensor,
        values: Tensor,
        key_mask: Tensor | None,
        queries: Tensor,
        query_mask: Tensor | None,
        entity_global: Tensor,
    ) -> Tensor:
        """Returns the fine-grained term q . LN(c), ``[B, N]``, in blocks of mentions and entities.

        Args:
            keys: ``[B, L, d]`` of the mentions.
            values: ``[B, L, d]`` of the mentions.
            key_mask: ``[B, L]``, False for padding; None where there is none.
            queries: ``[N, L, d]`` of the entities.
            query_mask: ``[N, L]``, False for padding; None where there is none.
            entity_global: q, ``[N, d]``.
        """
        if query_mask is None:
            query_mask = torch.ones_like(queries[..., 0], dtype=torch.bool)
        size = max(1, BLOCK_BYTES // (4 * queries.shape[-1] * max(min(len(keys), MENTION_BLOCK), queries.shape[1])))
        columns = []
        for start in range(0, len(queries), size):
            some = slice(start, start + size)
            query, mask, q = queries[some].float(), query_mask[some], entity_global[some].float()
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
            rows = []
            for first in range(0, len(keys), MENTION_BLOCK):
                block = slice(first, first + MENTION_BLOCK)
                # LN ignores what all channels have in common. Where that is large it would round away the rest.
                value = values[block].float()
                value = value - value.mean(-1, keepdim=True)
                tokens = (keys[block].float(), value, None if key_mask is None else key_mask[block])
                rows.append((_normalised(self.layer_norm, averaged_attention(query, weights, *tokens)) * q).sum(-1))
            columns.append(torch.cat(rows))
        return torch.cat(columns, 1)

    def local_bound(self, entity_global: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the fine-grained term of each entity is at most away from, and by how much; both ``[N]``.

        LN(c) = gamma n + beta with n of mean 0 and length at most sqrt(d), so q . LN(c) is within
        sqrt(d) |center(gamma q)| of q . beta. The second figure has the rounding of fp32 added.
        """
        q, gamma, beta = entity_global.float(), self.layer_norm.weight.float(), self.layer_norm.bias.float()
        product, width = q * gamma, q.shape[-1]
        centred = product - product.mean(-1, keepdim=True)
        rounding = ROUNDING * width * (product.norm(dim=-1) * math.sqrt(width) + (q * beta).norm(dim=-1))
        return q @ beta, math.sqrt(width) * centred.norm(dim=-1) + rounding


class MatchingHead(nn.Module):
    """Scores mentions against entities by text, picture and cross-modal branches (arXiv 2412.10440, section 4).

    The score is the mean of the branches: `IntraModalMatching` of texts and of pictures, and the dot products of the
    two sides' cross-modal vectors, of which `UnidirectionalMatching` has one and `BidirectionalMatching` two. Both
    sides' vectors and tokens pass one LayerNorm each before.

    A branch scores a pair only where both sides have what it reads: ``text`` needs text on both, ``image`` pictures on
    both, ``cross`` (in the bidirectional form ``text_image`` and ``image_text``) both on both.

    Branches that the configuration's ``matching_branches`` leaves out are not scored by. Their weights are there all
    the same, without gradient, so that checkpoints of any choice of branches hold the same names.

    ``forward`` scores features at once. `mentions` and `entities` keep what `score` needs, so that it can be cached.
    """

    def __init__(self, config: ClipNDConfig) -> None:
        super().__init__()
        clip: Any = config.clip_config
        text_width, token_width, dim = clip.projection_dim, clip.text_config.hidden_size, config.matching_dim
        bidirectional = config.matching_direction == "bidirectional"
        if bidirectional and text_width != token_width:
            raise ValueError(
                f"the bidirectional form projects text vectors ({text_width} wide) and text tokens ({token_width} "
                'wide) alike: this CLIP needs matching_direction="unidirectional"'
            )
        self.kept = config.matching_branches
        self.temperature = config.contrastive_temperature
        self.intra_weight = config.contrastive_intra_weight
        self.exclude_self = config.contrastive_self == "exclude"
        self.mask_padding = config.mask_padding
        self.text_cls_layernorm = nn.LayerNorm(text_width)
        self.text_tokens_layernorm = nn.LayerNorm(token_width)
        self.image_cls_layernorm = nn.LayerNorm(dim)
        self.image_tokens_layernorm = nn.LayerNorm(dim)
        self.text = IntraModalMatching(text_width, token_width, dim)
        self.image = IntraModalMatching(dim, dim, dim)
        self.cross = (BidirectionalMatching if bidirectional else UnidirectionalMatching)(text_width, dim, dim)

    def forward(self, mentions: Features, entities: Features) -> MatchingScores:
        """Returns every score of B mentions against N entities."""
        return self.score(self.mentions(mentions), self.entities(entities))

    def mentions(self, features: Features) -> MatchingMentions:
        """Keeps what scoring needs of n mentions."""
        text = self.text_tokens_layernorm(features.text_tokens)
        image = self.image_tokens_layernorm(features.image_tokens)
        return MatchingMentions(
            **self._side(features, text, image),
            text_keys=self.text.fc_key(text),
            text_values=self.text.fc_value(text),
            image_keys=self.image.fc_key(image),
            image_values=self.image.fc_value(image),
        )

    def entities(self, features: Features) -> MatchingEntities:
        """Keeps what scoring needs of n entities."""
        text = self.text_tokens_layernorm(features.text_tokens)
        image = self.image_tokens_layernorm(features.image_tokens)
        return MatchingEntities(
            **self._side(features, text, image),
            text_queries=self.text.fc_query(text),
            text_global=self.text.fc_cls(self.text_cls_layernorm(features.text_cls)),
            image_queries=self.image.fc_query(image),
            image_global=self.image.fc_cls(self.image_cls_layernorm(features.image_cls)),
        )

    def _side(self, features: Features, text_tokens: Tensor, image_tokens: Tensor) -> dict[str, Any]:
        mask = features.text_mask if self.mask_padding else torch.ones_like(features.text_mask)
        text_cls, image_cls = self.text_cls_layernorm(features.text_cls), self.image_cls_layernorm(features.image_cls)
        return {
            "text": features.text_cls,
            "image": None,  # which this head does not read
            "has_text": features.has_text,
            "has_image": features.has_image,
            "image_cls": features.image_cls,
            "text_mask": mask,
            "cross": self.cross(text_cls, text_tokens, mask, image_cls, image_tokens),
        }

    def score(self, mentions: MatchingMentions, entities: MatchingEntities) -> MatchingScores:
        """Returns every score of B mentions against N entities, in fp32."""
        text = mentions.has_text.unsqueeze(1) & entities.has_text
        image = mentions.has_image.unsqueeze(1) & entities.has_image
        return self.combine(self.branches(mentions, entities), text, image)

    def combine(self, branches: dict[str, Tensor], text: Tensor, image: Tensor) -> MatchingScores:
        """Averages `branches` over those present, given which pairs share text and which pictures, bool ``[B, N]``."""
        present = dict.fromkeys(self.cross.branches, text & image) | {"text": text, "image": image}
        return mean_of_present(branches, present)

    def branches(self, mentions: MatchingMentions, entities: MatchingEntities) -> dict[str, Tensor]:
        """Scores ``[B, N]`` by kept branch, in fp32; a pair of which a side lacks what it reads gets any number."""
        with torch.autocast(mentions.text.device.type, enabled=False):
            text = image = torch.zeros(1, 1, device=mentions.text.device)
            if "text" in self.kept and mentions.has_text.any() and entities.has_text.any():
                text = self.text.local(
                    mentions.text_keys,
                    mentions.text_values,
                    mentions.text_mask,
                    entities.text_queries,
                    entities.text_mask,
                    entities.text_global,
                )
            if "image" in self.kept and mentions.has_image.any() and entities.has_image.any():
                keys, values = mentions.image_keys, mentions.image_values
                image = self.image.local(keys, values, None, entities.image_queries, None, entities.image_global)
            return _with_fine(self._dots(mentions, entities), {"text": text, "image": image})

    def factorised(
        self, mentions: MatchingMentions, entities: MatchingEntities
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The branches without the fine-grained term, and how far each is at most from `branches`; all ``[B, N]``.

        The bound holds for what is computed, rounding included, from the same encoded mentions and entities.
        """
        with torch.autocast(mentions.text.device.type, enabled=False):
            text, text_bound = self.text.local_bound(entities.text_global)
            image, image_bound = self.image.local_bound(entities.image_global)
            rounding = {
                name: ROUNDING * one.shape[-1] * torch.outer(one.norm(dim=-1), other.norm(dim=-1))
                for name, (one, other) in self._vectors(mentions, entities).items()
            }
            branches = _with_fine(self._dots(mentions, entities), {"text": text, "image": image})
            return branches, _with_fine(rounding, {"text": text_bound, "image": image_bound})

    def _dots(self, mentions: MatchingSide, entities: MatchingSide) -> dict[str, Tensor]:
        return {name: one @ other.T for name, (one, other) in self._vectors(mentions, entities).items()}

    def _vectors(self, mentions: MatchingSide, entities: MatchingSide) -> dict[str, tuple[Tensor, Tensor]]:
        """By kept branch, the fp32 vectors of either side whose dot product it takes."""
        sides = [
            [
                _normalised(self.text_cls_layernorm, side.text),
                _normalised(self.image_cls_layernorm, side.image_cls),
                *side.cross.float().unbind(1),
            ]
            for side in (mentions, entities)
        ]
        pairs = zip(("text", "image", *self.cross.branches), zip(*sides, strict=True), strict=True)
        return {name: pair for name, pair in pairs if name in self.kept}

    def contrastive_loss(
        self, entities: Features | MatchingSide, mentions: Features | MatchingSide, labels: Tensor | None = None
    ) -> Tensor:
        """The mean of `contrastive_terms` over their pairs and over text and picture; 0 without any."""
        terms = self.contrastive_terms(entities, mentions, labels).values()
        means = [total / count for total, count in terms if count]
        return torch.stack(means).mean() if means else entities.text_cls.new_zeros(())

    def contrastive_terms(
        self,
        entities: Features | MatchingSide,
        mentions: Features | MatchingSide,
        labels: Tensor | None = None,
        mine: slice = slice(None),
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The intra-modal contrastive loss of row-aligned pairs, by text and picture (section 4.1).

        Args:
            entities: The gold of each mention, n rows.
            mentions: n rows. Pairs that lack a modality on either side are left out of that modality's term.
            labels: ``[n]``, which entity each row is of: rows of one entity are not each other's negatives. None where
                all differ.
            mine: The rows whose losses are summed; the others are their negatives.

        Returns:
            The sum over pairs and their number, as ``contrastive_text`` and ``contrastive_image``: of the modalities
            whose own branch is kept, which is what they are to help.
        """
        n = len(entities.has_text)
        rows = torch.arange(n, device=entities.has_text.device)
        labels = rows if labels is None else labels
        terms = {}
        for kind in (kind for kind in ("text", "image") if kind in self.kept):
            both = getattr(entities, f"has_{kind}") & getattr(mentions, f"has_{kind}")
            e, m = getattr(entities, f"{kind}_cls")[both], getattr(mentions, f"{kind}_cls")[both]
            counted = torch.isin(rows, rows[mine])[both]
            twins = (labels[both].unsqueeze(1) == labels[both]).fill_diagonal_(False)
            each = (self._contrastive(e, m, twins) + self._contrastive(m, e, twins)) / 2
            terms[f"contrastive_{kind}"] = each[counted].sum(), counted.sum()
        return terms

    def _contrastive(self, one: Tensor, other: Tensor, twins: Tensor) -> Tensor:
        one, other = F.normalize(one.float(), dim=-1), F.normalize(other.float(), dim=-1)
        with torch.autocast(one.device.type, enabled=False):  # so low a temperature magnifies what bf16 rounds
            inter = one @ other.T / self.temperature
            intra = self.intra_weight * (one @ one.T) / self.temperature
        diagonal = torch.eye(len(one), dtype=torch.bool, device=one.device)
        intra = intra.masked_fill(diagonal, -math.inf if self.exclude_self else 0.0)
        pairs = torch.cat([inter.masked_fill(twins, -math.inf), intra.masked_fill(twins, -math.inf)], 1)
        return F.cross_entropy(pairs, torch.arange(len(one), device=one.device), reduction="none")

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor], *, bidirectional: bool = False) -> MatchingHead:
        """Builds a head of the matching weights of the released code, which counts self-similarities as exp(0).

        The head attends to padding, as that code does: give it masks that are True throughout for texts without any.

        Args:
            state_dict: Names as in the released code: ``timm.*``, ``iimm.*``, ``cmm.*`` or ``cmmb.*``, and the four
                ``*_layernorm.*``; others are ignored. `released_clipnd` tells which is which.
            bidirectional: Take the bidirectional form's weights, ``cmmb.*``.

        Raises:
            KeyError: If a weight is absent; the message names it.
        """
        dim, text_width = state_dict["timm.fc_query.weight"].shape
        clip_config = {
            "projection_dim": text_width,
            "text_config": {"hidden_size": text_width, "num_attention_heads": 1},
        }
        config = ClipNDConfig(
            clip_config,
            head="matching",
            matching_dim=dim,
            matching_direction="bidirectional" if bidirectional else "unidirectional",
            contrastive_self="zero",
            mask_padding=False,
        )
        head = cls(config)
        names = matching_names(head.state_dict(), bidirectional=bidirectional)
        head.load_state_dict({ours: state_dict[theirs] for ours, theirs in names.items()})
        return head


def _with_fine(coarse: dict[str, Tensor], fine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of the coarse and the fine-grained term of branches that have one; the others are the coarse alone."""
    return {name: (one + fine[name]) / 2 if name in fine else one for name, one in coarse.items()}


def _normalised(layer_norm: nn.LayerNorm, values: Tensor) -> Tensor:
    """The LayerNorm in fp32, whatever the types of its weights and of what it is given."""
    weight, bias = layer_norm.weight.float(), layer_norm.bias.float()
    return F.layer_norm(values.float(), layer_norm.normalized_shape, weight, bias, layer_norm.eps)
