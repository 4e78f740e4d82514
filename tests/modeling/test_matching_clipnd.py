from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m3el_hf import ClipNDConfig
from m3el_hf.modeling.matching_clipnd import Features, MatchingHead, mean_of_present
from tests.conftest import real

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def oracle() -> Weights:
    with np.load(real("oracle/matching_unidirectional.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}


@pytest.fixture
def released(oracle: Weights) -> MatchingHead:
    return MatchingHead.from_released(weights_of(oracle))


def weights_of(oracle: Weights) -> Weights:
    return {name.removeprefix("w."): value for name, value in oracle.items() if name.startswith("w.")}


def features_of(oracle: Weights, side: str, rows: int | None = None) -> Features:
    """All rows have text and picture, and the oracle pads nothing."""
    kinds = ("text_cls", "text_tok", "image_cls", "image_tok")
    text_cls, text_tokens, image_cls, image_tokens = (oracle[f"in.{side}.{kind}"][:rows].clone() for kind in kinds)
    present = torch.ones(len(text_cls), dtype=torch.bool)
    mask = torch.ones(text_tokens.shape[:2], dtype=torch.bool)
    return Features(text_cls, text_tokens, mask, image_cls, image_tokens, present, present)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest value, and to 1e-6 where all are noise (a key's bias gets no gradient)."""
    tolerance = max(1e-5 * expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=tolerance)


# The released code, run once.


def test_scores_are_those_of_the_released_code(oracle, released):
    scores = released(features_of(oracle, "men"), features_of(oracle, "ent"))
    assert_same(scores.total, oracle["out.score"])
    for ours, theirs in (("text", "text"), ("image", "image"), ("cross", "image_text")):
        assert_same(scores.branches[ours], oracle[f"out.score_{theirs}"])


def test_contrastive_loss_is_that_of_the_released_code(oracle, released):
    entities, mentions = features_of(oracle, "ent", 4), features_of(oracle, "men")
    assert_same(released.contrastive_loss(entities, mentions).double(), oracle["out.cl"])
    none = torch.zeros(4, dtype=torch.bool)
    for kind, absent in (("text", "has_image"), ("image", "has_text")):
        only = released.contrastive_loss(replace(entities, **{absent: none}), mentions)
        assert_same(only.double(), oracle[f"out.cl_{kind}"])


def training_loss(head: MatchingHead, mentions: Features, entities: Features) -> Tensor:
    scores, gold = head(mentions, entities), torch.arange(len(mentions.has_text))
    each = [F.cross_entropy(one, gold) for one in (scores.total, *scores.branches.values())]
    return sum(each, start=head.contrastive_loss(entities, mentions))


def test_training_loss_and_gradients_are_those_of_the_released_code(oracle, released):
    sides = {"men": features_of(oracle, "men"), "ent": features_of(oracle, "ent", 4)}
    inputs = {"text_cls": "text_cls", "text_tok": "text_tokens", "image_cls": "image_cls", "image_tok": "image_tokens"}
    for side in sides.values():
        for name in inputs.values():
            getattr(side, name).requires_grad_()
    loss = training_loss(released, sides["men"], sides["ent"])
    assert_same(loss.double(), oracle["out.train_loss"])
    loss.backward()
    for side, features in sides.items():
        for theirs, ours in inputs.items():
            assert_same(getattr(features, ours).grad, oracle[f"gradin.{side}.{theirs}"])
    expected = {name.removeprefix("grad."): value for name, value in oracle.items() if name.startswith("grad.")}
    # Loading by the released names a second time tells which gradient is whose.
    gradients = MatchingHead.from_released(weights_of(oracle) | expected).state_dict()
    assert len(gradients) == len(expected)
    for name, parameter in released.named_parameters():
        assert parameter.grad is not None
        assert_same(parameter.grad, gradients[name])


def test_a_released_weight_that_is_absent_is_named(oracle):
    weights = weights_of(oracle)
    del weights["cmm.gate_fc.bias"]
    with pytest.raises(KeyError, match=r"cmm\.gate_fc\.bias"):
        MatchingHead.from_released(weights)


def test_the_bidirectional_form_is_loaded_from_its_own_weights(oracle):
    head = MatchingHead.from_released(weights_of(oracle), bidirectional=True)
    assert torch.equal(head.cross.match.weight, oracle["w.cmmb.match_module.trans_linear.weight"])
    assert torch.equal(head.text.fc_key.weight, oracle["w.timm.fc_key.weight"])
    m, e = features_of(oracle, "men"), features_of(oracle, "ent")
    with torch.no_grad():
        scores = head(m, e)
        for b, n in np.ndindex(4, 7):
            for name, expected in slow_branches(head, m, b, e, n).items():
                assert scores.branches[name][b, n].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


# The formulas, one number at a time.


def softmax(values: list[Tensor]) -> list[Tensor]:
    largest = max(values)
    powers = [torch.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def weighted(weights: list[Tensor], vectors: Tensor) -> Tensor:
    return sum((weight * vector for weight, vector in zip(weights, vectors, strict=True)), torch.zeros_like(vectors[0]))


def csra(tokens: Tensor) -> Tensor:
    """Base plus the mean of five attentions over tokens ``[L, d]``, channel by channel."""
    pooled = []
    for channel in tokens.T:
        attentions = [
            sum(w * x for w, x in zip(softmax([temperature * x for x in channel]), channel, strict=True))
            for temperature in (2.0, 2.5, 3.5, 4.5)
        ]
        pooled.append(channel.mean() + (sum(attentions) + channel.max()) / 5)
    return torch.stack(pooled)


def slow_intra(
    module: nn.Module, mention_cls: Tensor, mention_tokens: Tensor, entity_cls: Tensor, entity_tokens: Tensor
) -> Tensor:
    """One pair, from the vectors and the unpadded tokens after the first LayerNorms."""
    keys, values = module.fc_key(mention_tokens), module.fc_value(mention_tokens)
    answers = []
    for query in module.fc_query(entity_tokens):
        answers.append(weighted(softmax([query @ key / math.sqrt(len(query)) for key in keys]), values))
    context = sum(answers) / len(answers)
    local = module.fc_cls(entity_cls) @ module.layer_norm(context)
    return (mention_cls @ entity_cls + local) / 2


def slow_match(module: nn.Module, asking: Tensor, answering: Tensor) -> Tensor:
    """M(p, q) of one asking vector."""
    weights = softmax([asking @ module.match(one) for one in answering])
    return torch.relu(module.match(weighted(weights, answering)))


def slow_fusion(module: nn.Module, side: dict[str, Tensor]) -> dict[str, Tensor]:
    """One row's cross-modal vector in the unidirectional form."""
    text, image = module.text_fc(side["text_cls"]), module.image_fc(side["image_tokens"])
    pooled_image = slow_match(module, text, image)
    pooled_text = csra(torch.stack([slow_match(module, patch, text[None]) for patch in image]))
    gate = torch.sigmoid(module.fusion(pooled_text) + module.fusion(pooled_image))
    context = pooled_image * gate + pooled_text * (1 - gate)
    return {"cross": module.gate_layer_norm(text * torch.tanh(module.gate_fc(text)) + context)}


def slow_fusions(module: nn.Module, side: dict[str, Tensor]) -> dict[str, Tensor]:
    """One row's two cross-modal vectors in the bidirectional form."""
    vectors = {}
    for one, other in (("text", "image"), ("image", "text")):
        x = getattr(module, f"{one}_fc")(side[f"{one}_cls"])
        tokens = getattr(module, f"{other}_fc")(side[f"{other}_tokens"])
        rows = [slow_match(module, x, tokens), *(slow_match(module, token, x[None]) for token in tokens)]
        gated = x * torch.tanh(module.gate_fc(x)) + csra(torch.stack(rows))
        vectors[f"{one}_{other}"] = module.gate_layer_norm(gated)
    return vectors


def slow_branches(head: MatchingHead, m: Features, b: int, e: Features, n: int) -> dict[str, float]:
    """The branches that can score mention ``b`` against entity ``n``."""
    sides = [
        {
            "text_cls": head.text_cls_layernorm(side.text_cls[row]),
            "text_tokens": head.text_tokens_layernorm(side.text_tokens[row][kept_of(head, side, row)]),
            "image_cls": head.image_cls_layernorm(side.image_cls[row]),
            "image_tokens": head.image_tokens_layernorm(side.image_tokens[row]),
        }
        for side, row in ((m, b), (e, n))
    ]
    text, image = bool(m.has_text[b] & e.has_text[n]), bool(m.has_image[b] & e.has_image[n])
    branches = {}
    for kind, present in (("text", text), ("image", image)):
        if present:
            pair = [side[f"{kind}_{part}"] for side in sides for part in ("cls", "tokens")]
            branches[kind] = slow_intra(getattr(head, kind), *pair).item()
    if text and image:
        fuse = slow_fusion if head.cross.branches == ("cross",) else slow_fusions
        one, other = (fuse(head.cross, side) for side in sides)
        branches |= {name: (one[name] @ other[name]).item() for name in one}
    return branches


def kept_of(head: MatchingHead, side: Features, row: int) -> Tensor:
    return side.text_mask[row] if head.mask_padding else torch.ones_like(side.text_mask[row])


def random_head(
    generator: torch.Generator, text: int, token: int, dim: int, self_term: str = "exclude", **config: Any
) -> MatchingHead:
    clip = {"projection_dim": text, "text_config": {"hidden_size": token, "num_attention_heads": 1}}
    head = MatchingHead(ClipNDConfig(clip, head="matching", matching_dim=dim, contrastive_self=self_term, **config))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return head


def random_features(
    generator: torch.Generator, rows: int, tokens: int, patches: int, text: int, token: int, dim: int
) -> Features:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    present = torch.rand(2, rows, generator=generator) < 0.7
    return Features(
        text_cls=F.normalize(normal(rows, text), dim=-1),
        text_tokens=normal(rows, tokens, token),
        text_mask=torch.arange(tokens) < lengths,
        image_cls=normal(rows, dim),
        image_tokens=normal(rows, patches, dim),
        has_text=present[0],
        has_image=present[1],
    )


INPUTS = ("text_cls", "text_tokens", "image_cls", "image_tokens")
small = st.integers(1, 4)
widths = st.integers(2, 5)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"matching_direction": "bidirectional"},
    {"mask_padding": False},
    {"matching_direction": "bidirectional", "mask_padding": False},
    {"matching_branches": ["text", "cross"]},
    {"matching_branches": ["image"]},
    {"matching_branches": ["cross"]},
    {"matching_direction": "bidirectional", "matching_branches": ["text", "image", "image_text"]},
    {"matching_direction": "bidirectional", "matching_branches": ["text_image"]},
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))


@configs
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    rows=st.tuples(small, small),
    tokens=st.tuples(small, small),
    patches=small,
    sizes=st.tuples(widths, widths, widths),
)
def test_scores_are_the_formulas_pair_by_pair(config, seed, rows, tokens, patches, sizes):
    generator = torch.Generator().manual_seed(seed)
    if "matching_direction" in config:
        sizes = (sizes[0], sizes[0], sizes[2])
    head = random_head(generator, *sizes, **config)
    m = random_features(generator, rows[0], tokens[0], patches, *sizes)
    e = random_features(generator, rows[1], tokens[1], patches, *sizes)
    with torch.no_grad():
        scores = head(m, e)
        kept = config.get("matching_branches", ["text", "image", *head.cross.branches])
        assert list(scores.branches) == kept
        for b, n in np.ndindex(*rows):
            expected = {name: one for name, one in slow_branches(head, m, b, e, n).items() if name in kept}
            mean = sum(expected.values()) / len(expected) if expected else -math.inf
            assert scores.total[b, n].item() == pytest.approx(mean, rel=1e-4, abs=1e-4)
            for name, branch in scores.branches.items():
                assert branch[b, n].item() == pytest.approx(expected.get(name, -math.inf), rel=1e-4, abs=1e-4)


def test_the_bidirectional_form_needs_texts_as_wide_as_their_tokens():
    with pytest.raises(ValueError, match=r"text vectors \(3 wide\) and text tokens \(4 wide\)"):
        random_head(torch.Generator(), 3, 4, 5, matching_direction="bidirectional")


def slow_contrastive(one: Tensor, other: Tensor, self_term: str) -> float:
    """One direction: each row of ``one`` finds its row of ``other`` among all rows of both."""
    losses = []
    for i, row in enumerate(one):
        inter = [math.exp(F.cosine_similarity(row, there, dim=0) / 0.03) for there in other]
        intra = [math.exp(0.8 * F.cosine_similarity(row, here, dim=0) / 0.03) for j, here in enumerate(one) if j != i]
        selves = {"zero": [1.0], "exclude": []}[self_term]
        losses.append(-math.log(inter[i] / sum([*inter, *intra, *selves])))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("self_term", ["zero", "exclude"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5))
def test_contrastive_loss_is_the_formula_over_the_pairs_that_have_both(self_term, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    head = random_head(generator, 3, 3, 4, self_term)
    e, m = (random_features(generator, rows, 2, 2, 3, 3, 4) for _ in range(2))
    terms = []
    for kind in ("text", "image"):
        both = getattr(e, f"has_{kind}") & getattr(m, f"has_{kind}")
        if both.any():
            one, other = (getattr(side, f"{kind}_cls")[both].double() for side in (e, m))
            terms.append((slow_contrastive(one, other, self_term) + slow_contrastive(other, one, self_term)) / 2)
    expected = sum(terms) / len(terms) if terms else 0.0
    assert head.contrastive_loss(e, m).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("kept", "terms"), [(["text", "cross"], ["text"]), (["image"], ["image"]), (["cross"], [])])
def test_without_a_modalitys_own_branch_its_contrastive_loss_is_left_out(kept, terms):
    generator = torch.Generator().manual_seed(3)
    e, m = (random_features(generator, 5, 2, 2, 3, 3, 4) for _ in range(2))
    for side in (e, m):
        side.has_text[:3] = side.has_image[:3] = True
    whole = random_head(generator, 3, 3, 4).contrastive_terms(e, m)
    head = random_head(generator, 3, 3, 4, matching_branches=kept)
    found = head.contrastive_terms(e, m)
    assert list(found) == [f"contrastive_{kind}" for kind in terms]
    assert all(found[name][0] == whole[name][0] > 0 for name in found)
    assert head.contrastive_loss(e, m).item() == pytest.approx(
        sum((total / count).item() for total, count in found.values())
    )


def test_a_lone_pair_has_no_negatives_unless_its_self_similarity_is_one():
    generator = torch.Generator().manual_seed(0)
    side = random_features(generator, 1, 2, 2, 3, 3, 4)
    side = replace(side, has_text=torch.tensor([True]), has_image=torch.tensor([False]))
    assert random_head(generator, 3, 3, 4, "exclude").contrastive_loss(side, side).item() == 0
    zero = random_head(generator, 3, 3, 4, "zero").contrastive_loss(side, side).item()
    assert zero == pytest.approx(math.log1p(math.exp(-1 / 0.03)), abs=1e-6)


# What is absent.


def change(features: Features, edit: Callable[[str, Tensor], Tensor]) -> Features:
    return Features(**{field.name: edit(field.name, getattr(features, field.name)) for field in fields(features)})


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_absent_rows_and_padding_may_hold_anything(seed):
    generator = torch.Generator().manual_seed(seed)
    head = random_head(generator, 3, 4, 5)
    m, e = random_features(generator, 3, 4, 2, 3, 4, 5), random_features(generator, 4, 3, 2, 3, 4, 5)

    def scribbled(side: Features) -> Features:
        def edit(name: str, value: Tensor) -> Tensor:
            if name.startswith("has_") or name == "text_mask":
                return value
            present = getattr(side, "has_text" if name.startswith("text") else "has_image")
            keep = present[:, None, None] & side.text_mask[..., None] if name == "text_tokens" else present
            keep = keep.reshape(*keep.shape, *[1] * (value.ndim - keep.ndim))
            return torch.where(keep, value, 100 * torch.randn(value.shape, generator=generator))

        return change(side, edit)

    before, after = head(m, e), head(scribbled(m), scribbled(e))
    torch.testing.assert_close(after.total, before.total, rtol=1e-5, atol=1e-5)
    for name, branch in before.branches.items():
        torch.testing.assert_close(after.branches[name], branch, rtol=1e-5, atol=1e-5)


def test_what_is_absent_gets_no_gradient_and_what_is_padded_neither():
    generator = torch.Generator().manual_seed(1)
    head = random_head(generator, 3, 4, 5)
    side = random_features(generator, 4, 4, 2, 3, 4, 5)
    has_text, has_image = torch.tensor([[True, True, False, False], [True, False, True, False]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]] * 2)
    side = replace(side, has_text=has_text, has_image=has_image, text_mask=mask)
    inputs = ("text_cls", "text_tokens", "image_cls", "image_tokens")
    for name in inputs:
        getattr(side, name).requires_grad_()
    scores = head(side, side).total
    scores[scores.isfinite()].sum().backward()
    for name in inputs:
        gradient, present = getattr(side, name).grad, has_text if name.startswith("text") else has_image
        assert gradient.isfinite().all()
        assert not gradient[~present].any()
        assert all(row.any() for row in gradient[present])
    assert not side.text_tokens.grad[~mask].any()


PRESENCE = list(product((True, False), repeat=2))


def one_of(side: Features, row: int, spare: int) -> Features:
    """A row as a batch of its own, its text padded by ``spare`` tokens."""
    length = int(side.text_mask[row].sum())
    alone = change(side, lambda name, value: value[row : row + 1, :length] if "text_" in name else value[row : row + 1])
    cls = side.text_cls[row : row + 1]
    tokens, mask = F.pad(alone.text_tokens, (0, 0, 0, spare), value=3.0), F.pad(alone.text_mask, (0, spare))
    return replace(alone, text_cls=cls, text_tokens=tokens, text_mask=mask)


@pytest.mark.parametrize("direction", ["unidirectional", "bidirectional"])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), mentions=st.integers(1, 6), entities=st.integers(1, 50), spare=st.integers(0, 5))
def test_a_pair_of_any_presence_scores_in_a_mixed_batch_as_it_does_alone(direction, seed, mentions, entities, spare):
    generator = torch.Generator().manual_seed(seed)
    head = random_head(generator, 4, 4, 5, matching_direction=direction)
    m, e = random_features(generator, mentions, 5, 3, 4, 4, 5), random_features(generator, entities, 7, 3, 4, 4, 5)
    for side, first in ((m, seed), (e, seed // 4)):  # whatever the seed, all 16 combinations come up
        kinds = torch.tensor([PRESENCE[(first + row) % 4] for row in range(len(side.has_text))])
        side.has_text, side.has_image = kinds.unbind(1)
    inputs = [getattr(side, name).requires_grad_() for side in (m, e) for name in INPUTS]
    scores = head(m, e)
    assert not any(branch.isnan().any() for branch in (scores.total, *scores.branches.values()))
    shown = scores.total.isfinite()
    loss = scores.total[shown].sum() + sum(branch[branch.isfinite()].sum() for branch in scores.branches.values())
    for gradient in torch.autograd.grad(loss, [*inputs, *head.parameters()], allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
    for b, n in {(row % mentions, row * 7 % entities) for row in range(12)}:
        alone = head(one_of(m, b, spare), one_of(e, n, 5 - spare))
        tolerance = {"rel": 1e-5, "abs": 2e-5}  # scores of these heads reach 100
        assert scores.total[b, n].item() == pytest.approx(alone.total.item(), **tolerance)
        for name, branch in scores.branches.items():
            assert branch[b, n].item() == pytest.approx(alone.branches[name].item(), **tolerance)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3))
def test_the_total_is_the_mean_over_what_is_present(seed, mentions, entities):
    generator = torch.Generator().manual_seed(seed)
    branches = {name: torch.randn(mentions, entities, generator=generator) for name in "abc"}
    present = {name: torch.rand(mentions, entities, generator=generator) < 0.5 for name in "abc"}
    scores = mean_of_present(branches, present)
    for pair in np.ndindex(mentions, entities):
        shown = [branches[name][pair].item() for name in "abc" if present[name][pair]]
        expected = sum(shown) / len(shown) if shown else -math.inf
        assert scores.total[pair].item() == pytest.approx(expected, abs=1e-6)
        assert all((scores.branches[name][pair] == -math.inf) == (not present[name][pair]) for name in "abc")
