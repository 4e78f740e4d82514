"""The matching network (arXiv 2412.10440, section 4), transcribed: each formula as it stands, nothing moved or saved.

The yardstick of `scoring.py` and `training_step.py`, and an oracle of the tests. It reads the weights of a
`MatchingHead` and uses none of its arithmetic. Sizes: B mentions, N entities, L text tokens, P picture tokens, text
width dt, picture width dv, matching width d.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from m3el_hf.modeling.matching_clipnd import Features, MatchingHead, MatchingScores

Mask = Tensor | None
Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def attend_einsum(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """softmax_j(Q_i . K_j / sqrt(d)) V_j of every pair: ``[B, N, L, d]``.

    Args:
        query: ``[N, L, d]``, of the entities.
        key: ``[B, L, d]``, of the mentions.
        value: ``[B, L, d]``, of the mentions.
        mask: ``[B, L]``, True for the mention tokens that are attended to; None for all.
    """
    logits = torch.einsum("nid,bjd->bnij", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bnij,bjd->bnid", masked_softmax(logits, over_pairs(mask)), value)


def attend_matmul(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """The same by broadcast ``@``, which copies the queries for each mention: about 1.7 times as slow on a CPU."""
    logits = query.unsqueeze(0) @ key.unsqueeze(1).transpose(-1, -2) / math.sqrt(query.shape[-1])
    return masked_softmax(logits, over_pairs(mask)) @ value.unsqueeze(1)


def over_pairs(mask: Mask) -> Mask:
    return None if mask is None else mask[:, None, None]


def masked_softmax(logits: Tensor, mask: Mask) -> Tensor:
    return (logits if mask is None else logits.masked_fill(~mask, torch.finfo(logits.dtype).min)).softmax(-1)


def masked_mean(tokens: Tensor, mask: Mask) -> Tensor:
    """Mean over the second to last dimension of ``tokens``; ``mask`` is True for what counts."""
    if mask is None:
        return tokens.mean(-2)
    return (tokens * mask.unsqueeze(-1)).sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)


def intra_modal(
    module: nn.Module,
    mention_cls: Tensor,
    mention_tokens: Tensor,
    mention_mask: Mask,
    entity_cls: Tensor,
    entity_tokens: Tensor,
    entity_mask: Mask,
    attend: Attend,
) -> Tensor:
    """(cls_m . cls_e + q_e . LN(mean_i softmax_j(Q_i . K_j / sqrt(d)) V_j)) / 2 (section 4.2): ``[B, N]``."""
    query, key, value = module.fc_query(entity_tokens), module.fc_key(mention_tokens), module.fc_value(mention_tokens)
    context = masked_mean(attend(query, key, value, mention_mask), entity_mask)
    global_to_local = (module.fc_cls(entity_cls) * module.layer_norm(context)).sum(-1)
    global_to_global = mention_cls @ entity_cls.T
    return (global_to_global + global_to_local) / 2


def match(linear: nn.Linear, asking: Tensor, answering: Tensor, mask: Mask = None) -> Tensor:
    """M(p, q) = ReLU(W(softmax_j(p_i . W(q_j)) q)) of p ``[n, A, d]`` and q ``[n, L, d]``: ``[n, A, d]``."""
    attention = masked_softmax(asking @ linear(answering).transpose(1, 2), None if mask is None else mask.unsqueeze(1))
    return linear(attention @ answering).relu()


def csra(tokens: Tensor, mask: Mask = None) -> Tensor:
    """Class-specific residual attention (arXiv 2108.02456) of ``[n, L, d]``, channel by channel over tokens.

    mean_l x_l + mean_T att_T, where att_T = sum_l softmax_l(T x)_l x_l for T in 2, 2.5, 3.5, 4.5, and max_l x_l.
    """
    channels, shown = tokens.transpose(1, 2), None if mask is None else mask.unsqueeze(1)
    attentions = [(masked_softmax(T * channels, shown) * channels).sum(-1) for T in (2.0, 2.5, 3.5, 4.5)]
    attentions.append((channels if shown is None else channels.masked_fill(~shown, -math.inf)).amax(-1))
    return masked_mean(tokens, mask) + torch.stack(attentions).mean(0)


def cross_modal(module: nn.Module, text_cls: Tensor, image_tokens: Tensor) -> Tensor:
    """The fused vector of each row, unidirectional form (section 4.3): ``[n, d]``.

    With t = text_fc(text), X = image_fc(image tokens), p = M(t, X), r = CSRA(M(X, t)) and g = sigmoid(F(r) + F(p)):
    LN(t tanh(gate(t)) + p g + r (1 - g)).
    """
    text, image = module.text_fc(text_cls).unsqueeze(1), module.image_fc(image_tokens)
    from_image = match(module.match, text, image).squeeze(1)
    from_text = csra(match(module.match, image, text))
    gate = torch.sigmoid(module.fusion(from_text) + module.fusion(from_image))
    context = from_image * gate + from_text * (1 - gate)
    text = text.squeeze(1)
    return module.gate_layer_norm(text * module.gate_fc(text).tanh() + context)


def cross_modal_bidirectional(
    module: nn.Module, text_cls: Tensor, text_tokens: Tensor, text_mask: Mask, image_cls: Tensor, image_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The two fused vectors of each row, text that asked the picture and picture that asked the text: ``[n, d]`` each.

    f(x, Y) = LN(x tanh(gate(x)) + CSRA([M(x, Y); M(Y, x)])); f(t, I) and f(i, T) share every weight.
    """

    def fused(x: Tensor, tokens: Tensor, mask: Mask = None) -> Tensor:
        one = x.unsqueeze(1)
        answers = torch.cat([match(module.match, one, tokens, mask), match(module.match, tokens, one)], 1)
        pooled = csra(answers, None if mask is None else F.pad(mask, (1, 0), value=True))
        return module.gate_layer_norm(x * module.gate_fc(x).tanh() + pooled)

    return (
        fused(module.text_fc(text_cls), module.image_fc(image_tokens)),
        fused(module.image_fc(image_cls), module.text_fc(text_tokens), text_mask),
    )


def transcribed_scores(
    head: MatchingHead,
    mentions: Features,
    entities: Features,
    *,
    bidirectional: bool = False,
    mask_padding: bool = True,
    attend: Attend = attend_einsum,
) -> MatchingScores:
    """Every score of B mentions against N entities; a pair's total is the mean of the branches it has what to read for.

    Args:
        head: The weights.
        mentions: B rows.
        entities: N rows.
        bidirectional: Which cross-modal form the weights are of.
        mask_padding: Whether padding is left out; otherwise it is attended to and averaged over, as any token.
        attend: `attend_einsum` or `attend_matmul`.
    """
    m, e = normalised(head, mentions), normalised(head, entities)
    masks = [side.text_mask if mask_padding else None for side in (m, e)]
    branches = {
        "text": intra_modal(
            head.text, m.text_cls, m.text_tokens, masks[0], e.text_cls, e.text_tokens, masks[1], attend
        ),
        "image": intra_modal(head.image, m.image_cls, m.image_tokens, None, e.image_cls, e.image_tokens, None, attend),
    }
    if bidirectional:
        sides = [
            cross_modal_bidirectional(
                head.cross, side.text_cls, side.text_tokens, mask, side.image_cls, side.image_tokens
            )
            for side, mask in zip((m, e), masks, strict=True)
        ]
        for name, of_mentions, of_entities in zip(("text_image", "image_text"), *sides, strict=True):
            branches[name] = of_mentions @ of_entities.T
    else:
        branches["cross"] = cross_modal(head.cross, m.text_cls, m.image_tokens) @ (
            cross_modal(head.cross, e.text_cls, e.image_tokens).T
        )
    text, image = m.has_text.unsqueeze(1) & e.has_text, m.has_image.unsqueeze(1) & e.has_image
    present = {name: {"text": text, "image": image}.get(name, text & image) for name in branches}
    shown = {name: branch.masked_fill(~present[name], 0) for name, branch in branches.items()}
    count = torch.stack(list(present.values())).sum(0)
    return MatchingScores(
        (torch.stack(list(shown.values())).sum(0) / count.clamp(min=1)).masked_fill(count == 0, -math.inf),
        {name: branch.masked_fill(~present[name], -math.inf) for name, branch in branches.items()},
    )


def normalised(head: MatchingHead, side: Features) -> Features:
    """The side after the four LayerNorms that come first."""
    return Features(
        text_cls=head.text_cls_layernorm(side.text_cls),
        text_tokens=head.text_tokens_layernorm(side.text_tokens),
        text_mask=side.text_mask,
        image_cls=head.image_cls_layernorm(side.image_cls),
        image_tokens=head.image_tokens_layernorm(side.image_tokens),
        has_text=side.has_text,
        has_image=side.has_image,
    )


def transcribed_contrastive_loss(
    entities: Features,
    mentions: Features,
    *,
    temperature: float = 0.03,
    intra_weight: float = 0.8,
    exclude_self: bool = True,
) -> Tensor:
    """The intra-modal contrastive loss (section 4.1) of n golds and their mentions, all with text and picture.

    With unit rows e and m, and off = 1 - I, the mean of both directions and of text and picture of

        mean_i -log softmax([e m^T / tau, w (e e^T / tau) off])_ii

    Args:
        entities: The gold of each mention, n rows, all different.
        mentions: n rows.
        temperature: tau.
        intra_weight: w.
        exclude_self: Whether a row's similarity to itself is left out of the denominator; multiplied by 0, as the
            formula has it, it adds exp(0).
    """

    def one_way(one: Tensor, other: Tensor) -> Tensor:
        identity = torch.eye(len(one), dtype=one.dtype, device=one.device)
        inter, intra = one @ other.T / temperature, intra_weight * (one @ one.T / temperature) * (1 - identity)
        if exclude_self:
            intra = intra.masked_fill(identity.bool(), -math.inf)
        return -torch.cat([inter, intra], 1).log_softmax(1).diagonal().mean()

    terms = []
    for kind in ("text_cls", "image_cls"):
        e, m = (F.normalize(getattr(side, kind), dim=-1) for side in (entities, mentions))
        terms += [one_way(e, m), one_way(m, e)]
    return torch.stack(terms).mean()


def training_loss(scores: MatchingScores, contrastive: Tensor) -> Tensor:
    """CE(total) + CE of each branch + the contrastive loss, mention to entity; the gold is the diagonal (4.4)."""
    gold = torch.arange(len(scores.total), device=scores.total.device)
    return sum((F.cross_entropy(each, gold) for each in (scores.total, *scores.branches.values())), start=contrastive)
