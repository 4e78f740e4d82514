"""The multi-level matching head (arXiv 2412.10440), unidirectional form. Flat file: it travels to the Hub.

Sizes in the docstrings: B mentions, N entities, L text tokens, P picture tokens (token 0 is the class patch), text
width dt, picture width dv, matching width d. A softmax over one key is constant, and everything but the fine-grained
term is a dot product of one vector a side; both are used below, so nothing of shape [B, N, L, L] is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .configuration_clipnd import ClipNDConfig

CSRA_TEMPERATURES = (2.0, 2.5, 3.5, 4.5)


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

    With Q of the entity's tokens, K and V of the mention's, ``c = mean_i softmax_j(Q_i K_j / sqrt(d)) V_j``:
    score = (cls_m . cls_e + q_e . LN(c)) / 2.
    """

    def __init__(self, cls_width: int, token_width: int, dim: int) -> None:
        super().__init__()
        self.fc_query = nn.Linear(token_width, dim)
        self.fc_key = nn.Linear(token_width, dim)
        self.fc_value = nn.Linear(token_width, dim)
        self.fc_cls = nn.Linear(cls_width, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(
        self,
        mention_cls: Tensor,
        mention_tokens: Tensor,
        mention_mask: Tensor,
        entity_cls: Tensor,
        entity_tokens: Tensor,
        entity_mask: Tensor,
    ) -> Tensor:
        """Returns the scores ``[B, N]``; masks ``[n, L]`` are True for tokens.

        (mean_i P_i) V equals mean_i (P_i V), so the attention is averaged over the entity's tokens before the values.
        """
        query, key, value = self.fc_query(entity_tokens), self.fc_key(mention_tokens), self.fc_value(mention_tokens)
        weights = (entity_mask / entity_mask.sum(1, keepdim=True).clamp(min=1)).to(query.dtype)
        rows = []
        for one_key, one_value, one_mask in zip(key, value, mention_mask, strict=True):
            logits = query @ one_key.T / math.sqrt(query.shape[-1])
            attention = logits.masked_fill(~one_mask, torch.finfo(logits.dtype).min).softmax(-1)
            rows.append((weights.unsqueeze(1) @ attention).squeeze(1) @ one_value)
        local = (self.layer_norm(torch.stack(rows)) * self.fc_cls(entity_cls)).sum(-1)
        return (mention_cls @ entity_cls.T + local) / 2


class CrossModalMatching(nn.Module):
    """Fuses a side's text with its picture into one vector, unidirectional form (arXiv 2412.10440, section 4.3).

    The text asks the picture's tokens; the pooled answer is gated against the text itself. Scores are dot products.
    """

    def __init__(self, text_width: int, image_width: int, dim: int) -> None:
        super().__init__()
        self.text_fc = nn.Linear(text_width, dim)
        self.image_fc = nn.Linear(image_width, dim)
        self.gate_fc = nn.Linear(dim, 1)
        self.gate_layer_norm = nn.LayerNorm(dim)
        self.match = nn.Linear(dim, dim)
        self.fusion = nn.Linear(dim, dim)

    def forward(self, text_cls: Tensor, image_tokens: Tensor) -> Tensor:
        """Returns the fused vectors ``[n, d]`` of ``text_cls`` ``[n, dt]`` and ``image_tokens`` ``[n, P, dv]``."""
        text, image = self.text_fc(text_cls), self.image_fc(image_tokens)
        attention = (text.unsqueeze(1) @ self.match(image).transpose(1, 2)).softmax(-1)
        from_image = self.match((attention @ image).squeeze(1)).relu()
        # Each picture token asks the one text vector: a softmax over one key is 1, so every answer is the same, and
        # the pooling head (base + mean of attentions, each of equal rows) doubles it.
        from_text = 2 * self.match(text).relu()
        gate = torch.sigmoid(self.fusion(from_text) + self.fusion(from_image))
        context = from_image * gate + from_text * (1 - gate)
        return self.gate_layer_norm(text * self.gate_fc(text).tanh() + context)


class MatchingHead(nn.Module):
    """Scores mentions against entities by text, picture and cross-modal branches.

    A branch scores a pair only where both sides have what it reads: ``text`` needs text on both, ``image`` pictures on
    both, ``cross`` both on both.
    """

    def __init__(self, config: ClipNDConfig) -> None:
        super().__init__()
        clip: Any = config.clip_config
        text_width, token_width, dim = clip.projection_dim, clip.text_config.hidden_size, config.matching_dim
        self.temperature = config.contrastive_temperature
        self.intra_weight = config.contrastive_intra_weight
        self.exclude_self = config.contrastive_self == "exclude"
        self.text_cls_layernorm = nn.LayerNorm(text_width)
        self.text_tokens_layernorm = nn.LayerNorm(token_width)
        self.image_cls_layernorm = nn.LayerNorm(dim)
        self.image_tokens_layernorm = nn.LayerNorm(dim)
        self.text = IntraModalMatching(text_width, token_width, dim)
        self.image = IntraModalMatching(dim, dim, dim)
        self.cross = CrossModalMatching(text_width, dim, dim)

    def forward(self, mentions: Features, entities: Features) -> MatchingScores:
        """Returns every score of B mentions against N entities."""
        m, e = self._normalised(mentions), self._normalised(entities)
        patches = torch.ones(1, 1, dtype=torch.bool, device=m.image_tokens.device)
        branches = {
            "text": self.text(m.text_cls, m.text_tokens, m.text_mask, e.text_cls, e.text_tokens, e.text_mask),
            "image": self.image(
                m.image_cls,
                m.image_tokens,
                patches.expand(m.image_tokens.shape[:2]),
                e.image_cls,
                e.image_tokens,
                patches.expand(e.image_tokens.shape[:2]),
            ),
            "cross": self.cross(m.text_cls, m.image_tokens) @ self.cross(e.text_cls, e.image_tokens).T,
        }
        text = m.has_text.unsqueeze(1) & e.has_text
        image = m.has_image.unsqueeze(1) & e.has_image
        return mean_of_present(branches, {"text": text, "image": image, "cross": text & image})

    def contrastive_loss(self, entities: Features, mentions: Features, labels: Tensor | None = None) -> Tensor:
        """The intra-modal contrastive loss of row-aligned pairs, averaged over text and picture (section 4.1).

        Args:
            entities: The gold of each mention, n rows.
            mentions: n rows. Pairs that lack a modality on either side are left out of that modality's term.
            labels: ``[n]``, which entity each row is of: rows of one entity are not each other's negatives. None where
                all differ.
        """
        labels = torch.arange(len(entities.has_text), device=entities.has_text.device) if labels is None else labels
        terms = []
        for kind in ("text", "image"):
            both = getattr(entities, f"has_{kind}") & getattr(mentions, f"has_{kind}")
            e, m = getattr(entities, f"{kind}_cls")[both], getattr(mentions, f"{kind}_cls")[both]
            if len(e):
                twins = (labels[both].unsqueeze(1) == labels[both]).fill_diagonal_(False)
                terms.append((self._contrastive(e, m, twins) + self._contrastive(m, e, twins)) / 2)
        return torch.stack(terms).mean() if terms else entities.text_cls.new_zeros(())

    def _contrastive(self, one: Tensor, other: Tensor, twins: Tensor) -> Tensor:
        one, other = F.normalize(one.float(), dim=-1), F.normalize(other.float(), dim=-1)
        inter = one @ other.T / self.temperature
        intra = self.intra_weight * (one @ one.T) / self.temperature
        diagonal = torch.eye(len(one), dtype=torch.bool, device=one.device)
        intra = intra.masked_fill(diagonal, -math.inf if self.exclude_self else 0.0)
        pairs = torch.cat([inter.masked_fill(twins, -math.inf), intra.masked_fill(twins, -math.inf)], 1)
        return F.cross_entropy(pairs, torch.arange(len(one), device=one.device))

    def _normalised(self, side: Features) -> Features:
        return Features(
            self.text_cls_layernorm(side.text_cls),
            self.text_tokens_layernorm(side.text_tokens),
            side.text_mask,
            self.image_cls_layernorm(side.image_cls),
            self.image_tokens_layernorm(side.image_tokens),
            side.has_text,
            side.has_image,
        )

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor], *, bidirectional: bool = False) -> MatchingHead:
        """Builds a head of the matching weights of the released code, which count self-similarities as exp(0).

        Args:
            state_dict: Names as in the released code: ``timm.*``, ``iimm.*``, ``cmm.*`` and the four ``*_layernorm.*``;
                others are ignored.
            bidirectional: Not supported yet: only the unidirectional form can be loaded.

        Raises:
            ValueError: If ``bidirectional`` is asked for.
            KeyError: If a weight is absent.
        """
        if bidirectional:
            raise ValueError("only the unidirectional form of the released weights can be loaded")
        dim, text_width = state_dict["timm.fc_query.weight"].shape
        clip_config = {
            "projection_dim": text_width,
            "text_config": {"hidden_size": text_width, "num_attention_heads": 1},
        }
        head = cls(ClipNDConfig(clip_config, head="matching", matching_dim=dim, contrastive_self="zero"))
        renamed = {name: state_dict[_released_name(name)] for name in head.state_dict()}
        head.load_state_dict(renamed)
        return head


def _released_name(name: str) -> str:
    for ours, theirs in (
        ("text.", "timm."),
        ("image.", "iimm."),
        ("cross.match.", "cmm.match_module.trans_linear."),
        ("cross.fusion.", "cmm.fusion_module.linear."),
        ("cross.", "cmm."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
