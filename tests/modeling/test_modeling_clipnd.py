from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, BertConfig, CLIPConfig, CLIPModel, CLIPProcessor

from m3el_hf import TASKS, ClipNDConfig, ClipNDModel, ClipNDProcessor
from m3el_hf.modeling import fingerprint_clipnd
from m3el_hf.modeling.encoded_clipnd import Encoded, MatchingEntities, MatchingMentions
from m3el_hf.modeling.matching_clipnd import Features
from tests.conftest import tiny_model
from tests.modeling.test_matching_clipnd import slow_contrastive

HEADS: dict[str, dict[str, Any]] = {
    "clip": {"head": "clip"},
    "pooled": {"head": "pooled"},
    "unidirectional": {"head": "matching"},
    "bidirectional": {"head": "matching", "matching_direction": "bidirectional"},
}

Item = tuple[str | None, str | None, Image.Image | None]
View = tuple[bool, bool, bool, bool]

ALL: View = (True, True, True, True)


def headed(processor: ClipNDProcessor, head: str, seed: int = 0, **config: Any) -> ClipNDModel:
    """A tiny random model of an entry of `HEADS`."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    settings = HEADS[head] | config
    return ClipNDModel(ClipNDConfig.tiny(len(tokenizer), tokenizer.eos_token_id, width=32, **settings)).eval()


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest, processor: ClipNDProcessor) -> ClipNDModel:
    return headed(processor, request.param)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8))


MENTIONS: list[Item] = [
    ("Kansas", "Kansas toured with a red star.", picture(0)),
    ("a state", "of the plains, which is known for a band that toured with a red star on it", picture(1)),
    ("band", None, picture(2)),
]
ENTITIES: list[Item] = [
    ("Kansas", "a band known for a red star", picture(3)),
    ("Kansas", "a state of the plains", picture(4)),
    ("star", None, picture(5)),
    ("a", "x", picture(6)),
]


def prepare(prepared: Callable[..., dict[str, Any]], items: Sequence[Item]) -> dict[str, Any]:
    return prepared(*(list(column) for column in zip(*items, strict=True)))


def only(item: Item, text: bool, image: bool) -> Item:
    return (item[0] if text else None, item[1] if text else None, item[2] if image else None)


def scored_alone(model: ClipNDModel, processor: ClipNDProcessor, mention: Item, entity: Item, view: View) -> float:
    """The score of one pair that is given no more than the view shows, in batches of one."""
    m, e = only(mention, *view[:2]), only(entity, *view[2:])
    if not any(m) or not any(e):
        return -math.inf
    with torch.no_grad():
        encoded_mention = model.encode_mentions(**prepare(processor.mentions, [m]))
        encoded_entity = model.encode_entities(**prepare(processor.entities, [e]))
        return model.score(encoded_mention, encoded_entity).total.item()


def encode_all(model: ClipNDModel, processor: ClipNDProcessor) -> tuple[Encoded, Encoded]:
    mentions = model.encode_mentions(**prepare(processor.mentions, MENTIONS))
    return mentions, model.encode_entities(**prepare(processor.entities, ENTITIES))


def view_of(task: str) -> View:
    mention, candidate = TASKS[task].mention, TASKS[task].candidate
    return (mention.has_text, mention.has_image, candidate.has_text, candidate.has_image)


# What a row lacks.

PRESENCE = ((True, True), (True, False), (False, True), (False, False))


def test_each_pair_of_all_sixteen_presences_scores_as_it_would_alone(model, processor):
    mentions, entities = [*MENTIONS, MENTIONS[0]], ENTITIES
    given = [[only(item, *has) for item, has in zip(items, PRESENCE, strict=True)] for items in (mentions, entities)]
    # Encoders refuse a row with nothing, so the last row of each side is hidden after encoding.
    given[0][3], given[1][3] = mentions[3], entities[3]
    shown = torch.tensor([True, True, True, False])
    with torch.no_grad():
        encoded = (
            model.encode_mentions(**prepare(processor.mentions, given[0])).show(shown, shown),
            model.encode_entities(**prepare(processor.entities, given[1])).show(shown, shown),
        )
        scores = model.score(*encoded)
    assert all(not branch.isnan().any() for branch in (scores.total, *scores.branches.values()))
    for (b, m), (n, e) in product(enumerate(PRESENCE), enumerate(PRESENCE)):
        alone = scored_alone(model, processor, mentions[b], entities[n], (*m, *e))
        assert scores.total[b, n].item() == pytest.approx(alone, rel=1e-5, abs=1e-5)
        finite = [branch[b, n].item() for branch in scores.branches.values() if branch[b, n].isfinite()]
        assert scores.total[b, n].item() == pytest.approx(np.mean(finite) if finite else -math.inf, rel=1e-5)


def test_sixteen_presences_have_finite_gradients(model, processor):
    has_text, has_image = (torch.tensor(column) for column in zip(*PRESENCE, strict=True))
    side = prepare(processor.mentions, [*MENTIONS, MENTIONS[0]]) | {"has_text": has_text, "has_image": has_image}
    scores = model(mentions=side, entities=side).scores
    assert scores.isfinite().sum() == 9
    scores[scores.isfinite()].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("padding", [1, 11])
def test_padding_changes_nothing(model, processor, padding):
    prepared = prepare(processor.mentions, MENTIONS)
    end = processor.tokenizer.eos_token_id
    longer = prepared | {
        "input_ids": torch.nn.functional.pad(prepared["input_ids"], (0, padding), value=end),
        "attention_mask": torch.nn.functional.pad(prepared["attention_mask"], (0, padding)),
    }
    with torch.no_grad():
        mentions, entities = encode_all(model, processor)
        scores = [model.score(model.encode_mentions(**one), entities).total for one in (prepared, longer)]
        turned = [model.score(mentions, model.encode_entities(**one)).total for one in (prepared, longer)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned[1], turned[0], rtol=1e-5, atol=1e-5)


def test_a_row_with_nothing_is_an_error_that_names_it(model, processor):
    for prepared, encode in (
        (processor.mentions, model.encode_mentions),
        (processor.entities, model.encode_entities),
    ):
        with pytest.raises(ValueError, match="row 1 has neither"):
            encode(**prepared(["Kansas", " ", None], [None, "", "x"], [None, None, None]))


@pytest.mark.parametrize(("text", "image"), [(True, False), (False, True)])
def test_a_tower_that_no_row_needs_does_not_run(model, processor, monkeypatch, text, image):
    idle = "get_image_features" if text else "get_text_features"
    monkeypatch.setattr(model.clip, idle, lambda **_: pytest.fail("ran for nothing"))
    items = [only(item, text, image) for item in MENTIONS]
    everything = prepare(processor.mentions, MENTIONS)
    hidden = everything | {"has_text": everything["has_text"] & text, "has_image": everything["has_image"] & image}
    with torch.no_grad():
        scores = [
            model.score(model.encode_mentions(**one), model.encode_entities(**one)).total
            for one in (prepare(processor.mentions, items), hidden)
        ]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)


def test_all_of_a_text_counts(model, processor):
    """Namesakes differ in nothing but their descriptions, and those in nothing but a word."""
    entities = processor.entities(["Kansas"] * 3, ["a band of 7", "a state of 7", "a band of 7. x"])
    with torch.no_grad():
        encoded = model.encode_entities(**entities)
        mention = model.encode_mentions(**processor.mentions(["Kansas"], ["a band"]))
        scores = model.score(mention, encoded).total[0]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (encoded.text[one] - encoded.text[other]).abs().max() > 1e-3
        assert (scores[one] - scores[other]).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_score_about_the_same(model, processor, dtype):
    def score() -> Tensor:
        with torch.no_grad():
            return model.score(*encode_all(model, processor)).total

    full = score()
    model.to(dtype)
    other = score()
    assert other.dtype == torch.float32
    torch.testing.assert_close(other, full, rtol=0.05, atol=0.5)


def test_scores_are_batches_of_rows(model, processor):
    with torch.no_grad():
        mentions, entities = encode_all(model, processor)
        whole = model.score(mentions, entities).total
        for rows in (torch.tensor([2, 0]), torch.tensor([False, True, True]), slice(1, 2)):
            torch.testing.assert_close(model.score(mentions[rows], entities).total, whole[rows], rtol=1e-5, atol=1e-5)
        parts = [model.score(mentions, entities[one]).total for one in (slice(0, 3), slice(3, 4))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_clip_head_is_the_cosine_of_sums_times_the_scale(processor):
    model = tiny_model(processor, "clip")
    with torch.no_grad():
        model.clip.logit_scale.fill_(1.5)
        mentions, entities = encode_all(model, processor)
        scores = model.score(mentions, entities).total
        for b, n in np.ndindex(3, 4):
            m, e = mentions.text[b] + mentions.image[b], entities.text[n] + entities.image[n]
            cosine = (m @ e / m.norm() / e.norm()).item()
            assert scores[b, n].item() == pytest.approx(math.exp(1.5) * cosine, rel=1e-5)
            assert mentions.text[b].norm().item() == pytest.approx(1, rel=1e-5)
        model.clip.logit_scale.fill_(9.0)
        assert model.score(mentions, mentions).total.max().item() == pytest.approx(100, rel=1e-5)


def test_the_matching_head_is_given_what_its_paper_encodes(processor):
    """Class vectors of the common space, unit; the text's tokens after the final LayerNorm, the picture's before it."""
    model = tiny_model(processor, "matching")
    prepared = prepare(processor.mentions, MENTIONS)
    with torch.no_grad():
        encoded = model.encode_mentions(**prepared)
        words = model.clip.text_model(prepared["input_ids"], prepared["attention_mask"])
        patches = model.clip.vision_model(prepared["pixel_values"]).last_hidden_state
        ends = prepared["attention_mask"].sum(1) - 1
        text = model.clip.text_projection(words.last_hidden_state[torch.arange(3), ends])
        image = model.clip.visual_projection(model.clip.vision_model.post_layernorm(patches[:, 0]))
        unit = image / image.norm(dim=1, keepdim=True)
        expected = {
            "text": text / text.norm(dim=1, keepdim=True),
            "text_mask": prepared["attention_mask"].bool(),
            "image": unit,
            "image_cls": model.image_cls_fc(unit),
        }
        head = model.matching
        for kind, tokens in (("text", words.last_hidden_state), ("image", model.image_tokens_fc(patches))):
            tokens = getattr(head, f"{kind}_tokens_layernorm")(tokens)
            expected[f"{kind}_keys"] = getattr(head, kind).fc_key(tokens)
            expected[f"{kind}_values"] = getattr(head, kind).fc_value(tokens)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(encoded, name), value, rtol=1e-5, atol=1e-5)


def test_a_side_of_the_pooled_head_is_the_unit_sum_of_what_it_pools(processor):
    model = headed(processor, "pooled")
    prepared = prepare(processor.mentions, MENTIONS)
    with torch.no_grad():
        encoded, entities = encode_all(model, processor)
        words = model.clip.text_model(prepared["input_ids"], prepared["attention_mask"]).last_hidden_state
        patches = model.clip.vision_model(prepared["pixel_values"]).last_hidden_state
        text = model.pooling.pool_text(words, prepared["attention_mask"].bool())
        image = model.pooling.pool_image(patches)
        sides = text + image
        torch.testing.assert_close(encoded.fused, sides / sides.norm(dim=1, keepdim=True))
        assert encoded.fused.shape == (3, model.config.matching_dim)
        cosine = encoded.fused @ entities.fused.T
        scale = model.clip.logit_scale.exp()
        torch.testing.assert_close(model.score(encoded, entities).total, scale * cosine)


@pytest.mark.parametrize("head", ["unidirectional", "bidirectional", "pooled"])
def test_padding_counts_only_where_the_configuration_says_so(processor, head):
    model = headed(processor, head, mask_padding=False)
    one, other = (
        model.encode_mentions(**processor.mentions(names)) for names in (["Kansas"], ["Kansas", "a longer name by far"])
    )
    entities = model.encode_entities(**prepare(processor.entities, ENTITIES))
    with torch.no_grad():
        short, padded = model.score(one, entities).total, model.score(other, entities).total[:1]
    assert (short - padded).abs().max() > 1e-4


# What is kept of a side.

WIDE = {"projection_dim": 512, "text_config": {"hidden_size": 512, "num_attention_heads": 8}}


def full_size(direction: str, mentions: int, entities: int) -> tuple[ClipNDModel, MatchingMentions, MatchingEntities]:
    """Random features of ViT-B/32's sizes, which a hull of a model scores: towers of one narrow layer each."""
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 1, "intermediate_size": 8}
    clip = WIDE | {"text_config": WIDE["text_config"] | tower, "vision_config": tower}
    model = ClipNDModel(ClipNDConfig(clip, head="matching", matching_direction=direction)).eval()
    sides = []
    for rows, encode in ((mentions, model.matching.mentions), (entities, model.matching.entities)):
        present = torch.ones(rows, dtype=torch.bool)
        features = Features(
            torch.nn.functional.normalize(torch.randn(rows, 512), dim=-1),
            torch.randn(rows, 40, 512),
            torch.arange(40) < torch.randint(5, 41, (rows, 1)),
            torch.randn(rows, 96),
            torch.randn(rows, 50, 96),
            present,
            present,
        )
        unit = torch.nn.functional.normalize(torch.randn(rows, 512), dim=-1)
        with torch.no_grad():
            sides.append(replace(encode(features), image=unit))
    return model, *sides


@pytest.mark.parametrize("direction", ["unidirectional", "bidirectional"])
def test_a_cached_entity_is_small_and_ranks_as_it_did(direction):
    model, mentions, entities = full_size(direction, 100, 200)
    kept = entities.to(dtype=torch.float16)
    assert kept.bytes_per_row <= 21_000
    assert kept.has_text.dtype == kept.text_mask.dtype == torch.bool
    with torch.no_grad():
        exact, rounded = (model.score(mentions, one).total for one in (entities, kept))
    assert rounded.dtype == torch.float32
    best, found = (one.topk(10).indices.sort().values for one in (exact, rounded))
    assert (best == found).all(1).float().mean() >= 0.99


def test_rows_and_types_of_all_that_is_kept_go_together(model, processor):
    mentions, _ = encode_all(model, processor)
    part = mentions.to("cpu", torch.float64)[torch.tensor([2, 0])].show(image=False)
    assert type(part) is type(mentions) and part.fingerprint == mentions.fingerprint and len(part) == 2
    for name, value in part.tensors().items():
        expected = getattr(mentions, name)[[2, 0]]
        assert torch.equal(value, torch.zeros(2, dtype=torch.bool) if name == "has_image" else expected.to(value.dtype))
        assert value.dtype == (torch.float64 if expected.is_floating_point() else expected.dtype)
    assert mentions.bytes_per_row * 3 == sum(value.nbytes for value in mentions.tensors().values())


def test_joined_parts_score_as_they_do_apart(model, processor):
    items = [*ENTITIES, only(ENTITIES[0], True, False), only(ENTITIES[1], False, True)]
    with torch.no_grad():
        mentions, _ = encode_all(model, processor)
        parts = [model.encode_entities(**prepare(processor.entities, [item])) for item in items]
        apart = torch.cat([model.score(mentions, part).total for part in parts], 1)
        joined = parts[0].join(parts)
        assert type(joined) is type(parts[0]) and len(joined) == 6
        torch.testing.assert_close(model.score(mentions, joined).total, apart, rtol=1e-5, atol=1e-5)


def test_no_rows_have_no_scores(model, processor):
    with torch.no_grad():
        mentions, entities = encode_all(model, processor)
        for m, e in ((slice(0, 0), slice(0, 4)), (slice(0, 3), slice(0, 0)), (slice(0, 0), slice(0, 0))):
            shape = (len(mentions[m]), len(entities[e]))
            assert model.score(mentions[m], entities[e]).total.shape == shape
            assert [one.shape for one in model.score_factorised(mentions[m], entities[e])] == [shape, shape]


def test_parts_of_other_weights_or_none_cannot_be_joined(model, processor):
    mentions, entities = encode_all(model, processor)
    with pytest.raises(ValueError, match="nothing to join"):
        mentions.join([])
    with pytest.raises(ValueError, match="different weights"):
        entities.join([entities, replace(entities, fingerprint="another")])


# The bound.


def scaled(model: ClipNDModel, seed: int) -> None:
    """Weights of any size, so that no term is too small to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.startswith("matching."):
                one.copy_(torch.randn(one.shape, generator=generator) * (1 + seed % 3) / one.shape[-1] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head", HEADS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_the_exact_score_is_within_the_bound_of_the_factorised(processor, dtype, head, seed):
    model = headed(processor, head)
    scaled(model, seed)
    shown = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)) < 0.7
    with torch.no_grad():
        mentions, entities = encode_all(model, processor)
        mentions = mentions.to(dtype=dtype).show(shown[0, :3], shown[1, :3])
        entities = entities.to(dtype=dtype).show(shown[2], shown[3])
        exact = model.score(mentions, entities)
        factorised, bound = model.score_factorised(mentions, entities)
    assert bound.shape == factorised.shape == exact.total.shape and (bound >= 0).all()
    able = exact.total.isfinite()
    assert torch.equal(able, factorised.isfinite())
    assert ((exact.total - factorised).abs()[able] <= bound[able]).all()
    by_clip = able if "clip" not in exact.branches else exact.branches["clip"].isfinite()
    if model.config.head == "matching":
        assert (bound[able & ~by_clip] > 0).all()
    assert not bound[by_clip].any()


@pytest.mark.parametrize("head", ["unidirectional", "bidirectional"])
def test_the_bound_is_the_formula(processor, head):
    model = headed(processor, head)
    scaled(model, 5)
    with torch.no_grad():
        mentions, entities = encode_all(model, processor)
        bound = model.score_factorised(mentions, entities)[1]
        for n in range(4):
            lengths = []
            for module, q in (
                (model.matching.text, entities.text_global),
                (model.matching.image, entities.image_global),
            ):
                product = module.layer_norm.weight * q[n]
                lengths.append((product - product.mean()).norm() * math.sqrt(len(product)) / 2)
            expected = sum(lengths).item() / len(model.matching.cross.branches + ("text", "image"))
            assert bound[:, n].tolist() == pytest.approx([expected] * 3, rel=1e-3)


def test_mixed_precision_scores_in_full(processor):
    """Encoders and projections run in bf16, scores and the contrastive loss on what they give in fp32."""
    for head in HEADS:
        model = headed(processor, head)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                mentions, entities = encode_all(model, processor)
                mixed = model.score(mentions, entities).total
                losses = [model.matching.contrastive_loss(entities[:3], mentions)] if "directional" in head else []
            torch.testing.assert_close(mixed, model.score(mentions, entities).total, rtol=0, atol=0)
            for loss in losses:
                torch.testing.assert_close(
                    loss, model.matching.contrastive_loss(entities[:3], mentions), rtol=0, atol=0
                )


# Which weights encoded it.


def test_what_other_weights_encoded_is_refused(model, processor):
    mentions, entities = encode_all(model, processor)
    assert mentions.fingerprint is not None
    weight = next(one for name, one in model.named_parameters() if name.endswith("fc1.weight"))
    with torch.no_grad():
        weight[0, 0] += 1e-3
    for score in (model.score, model.score_factorised):
        with pytest.raises(ValueError, match="encoded by other weights .* encode them again"):
            score(mentions, entities)
        with pytest.raises(ValueError, match="encoded by other weights"):
            score(model.encode_mentions(**prepare(processor.mentions, MENTIONS)), entities)
    model.score(*encode_all(model, processor))


def test_equal_weights_have_equal_fingerprints_wherever_they_come_from(model, processor, tmp_path):
    mentions, entities = encode_all(model, processor)
    model.save_pretrained(tmp_path)
    loaded = ClipNDModel.from_pretrained(tmp_path)
    other_mentions, other_entities = encode_all(loaded, processor)
    assert mentions.fingerprint == other_mentions.fingerprint == other_entities.fingerprint
    loaded.score(mentions, other_entities)
    with torch.no_grad():
        loaded.clip.logit_scale.fill_(1.0)  # which encoding does not read
    loaded.score(mentions, entities)


def test_training_computes_no_fingerprint(model, processor, monkeypatch):
    monkeypatch.setattr(fingerprint_clipnd, "_digest", lambda _: pytest.fail("costs time at each step"))
    model.train()
    mentions, entities = encode_all(model, processor)
    assert mentions.fingerprint is None
    model.score(mentions, entities)
    model(**forward_inputs(processor, TASK_ROWS), labels=LABELS)


def test_a_fingerprint_is_computed_once(model, processor, monkeypatch):
    computed = []
    digest = fingerprint_clipnd._digest
    monkeypatch.setattr(fingerprint_clipnd, "_digest", lambda weights: computed.append(1) or digest(weights))
    model.score(*encode_all(model, processor))
    model.score(*encode_all(model, processor))
    assert len(computed) == 1


# Bad input.


@pytest.mark.parametrize("side", ["mentions", "entities"])
def test_arguments_of_different_lengths_or_devices_are_named(model, processor, side):
    encode, prepared = getattr(model, f"encode_{side}"), prepare(getattr(processor, side), MENTIONS)
    with pytest.raises(ValueError, match="the same rows: input_ids 3, attention_mask 3, pixel_values 3, has_text 2"):
        encode(**prepared | {"has_text": prepared["has_text"][:2]})
    with pytest.raises(ValueError, match="the same devices: .*pixel_values meta"):
        encode(**prepared | {"pixel_values": prepared["pixel_values"].to("meta")})


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "pixel_values"])
def test_what_rows_are_said_to_have_must_be_given(model, processor, name):
    prepared = prepare(processor.mentions, MENTIONS)
    with pytest.raises(ValueError, match=f"rows have one, but {name} is None"):
        model.encode_mentions(**prepared | {name: None})


def test_sides_on_different_devices_are_refused(model, processor):
    mentions, entities = encode_all(model, processor)
    with pytest.raises(
        ValueError, match=r"mentions lie on cpu, entities on meta: move one of them with \.to\(device\)"
    ):
        model.score(mentions, entities.to("meta"))


def test_sides_in_the_wrong_order_are_refused(processor):
    model = headed(processor, "unidirectional")
    mentions, entities = encode_all(model, processor)
    with pytest.raises(ValueError, match="in this order"):
        model.score(entities, mentions)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1], "2 labels for 3 mentions"), ([0, 4, 1], "label 4 of mention 1 is no index of the 4"), ([0, 1, -1], "-1")],
)
def test_labels_that_cannot_be_are_named(model, processor, labels, message):
    with pytest.raises(ValueError, match=message):
        model(**forward_inputs(processor, TASK_ROWS), labels=torch.tensor(labels))


# Training.

TASK_ROWS = [(0, "it2it"), (2, "i2t"), (0, "t2i"), (1, "t2t"), (1, "it2t"), (0, "t2i"), (2, "i2i"), (1, "i2it")]
LABELS = torch.tensor([2, 0, 3])


def forward_inputs(processor: ClipNDProcessor, rows: Sequence[tuple[int, str]]) -> dict[str, Any]:
    mentions, views = zip(*((mention, view_of(task)) for mention, task in rows), strict=True)
    return {
        "mentions": prepare(processor.mentions, MENTIONS),
        "entities": prepare(processor.entities, ENTITIES),
        "rows": torch.tensor(mentions),
        "views": torch.tensor(views),
    }


def slow_cross_entropy(scores: list[list[float]], golds: list[int]) -> float:
    losses = [math.log(sum(math.exp(s - row[gold]) for s in row)) for row, gold in zip(scores, golds, strict=True)]
    return sum(losses) / len(losses)


def test_forward_scores_what_each_row_shows_as_it_would_alone(model, processor):
    with torch.no_grad():
        scores = model(**forward_inputs(processor, TASK_ROWS)).scores
    assert scores.shape == (len(TASK_ROWS), 4)
    for r, (mention, task) in enumerate(TASK_ROWS):
        for n, entity in enumerate(ENTITIES):
            alone = scored_alone(model, processor, MENTIONS[mention], entity, view_of(task))
            assert scores[r, n].item() == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_forward_leaves_out_what_an_entity_lacks(model, processor):
    inputs = forward_inputs(processor, [(0, "t2i"), (0, "t2it")])
    lacking = [*ENTITIES[:3], only(ENTITIES[3], True, False)]
    scores = model(**inputs | {"entities": prepare(processor.entities, lacking)}).scores
    assert scores.isfinite().tolist() == [[True, True, True, False], [True, True, True, True]]


def test_forward_without_rows_shows_every_mention_once_with_all_it_has(model, processor):
    with torch.no_grad():
        out = model(prepare(processor.mentions, MENTIONS), prepare(processor.entities, ENTITIES))
        assert out.loss is None
        torch.testing.assert_close(out.scores, model.score(*encode_all(model, processor)).total)


def slow_branch_losses(model, processor, task_rows: list[tuple[int, str]], labels: torch.Tensor) -> float:
    """Each branch's cross-entropy, over the rows whose gold it can score."""
    mentions, entities = encode_all(model, processor)
    total = 0.0
    for name in ("text", "image", *model.matching.cross.branches):
        rows, golds = [], []
        for mention, task in task_rows:
            view, gold = view_of(task), labels[mention].item()
            shown = model.score(mentions[[mention]].show(*view[:2]), entities.show(*view[2:]))
            scores = shown.branches[name][0].tolist()
            if math.isfinite(scores[gold]):
                rows.append(scores)
                golds.append(gold)
        total += slow_cross_entropy(rows, golds) if rows else 0.0
    return total


def test_the_loss_is_the_cross_entropy_of_total_and_branches_plus_the_contrastive_term(model, processor):
    model.config.contrastive_weight = 0.7
    out = model(**forward_inputs(processor, TASK_ROWS), labels=LABELS)
    expected = slow_cross_entropy(out.scores.tolist(), [LABELS[mention].item() for mention, _ in TASK_ROWS])
    if model.config.head == "matching":
        expected += slow_branch_losses(model, processor, TASK_ROWS, LABELS)
        mentions, entities = encode_all(model, processor)
        for kind in ("text", "image_cls"):
            m, e = (getattr(side, kind).detach().double() for side in (mentions, entities[LABELS]))
            expected += 0.7 * (slow_contrastive(e, m, "exclude") + slow_contrastive(m, e, "exclude")) / 4
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_contrastive_term_can_be_left_out(processor):
    model = tiny_model(processor, "matching")
    model.config.contrastive_weight = 0.0
    out = model(**forward_inputs(processor, TASK_ROWS), labels=LABELS)
    golds = [LABELS[mention].item() for mention, _ in TASK_ROWS]
    expected = slow_cross_entropy(out.scores.tolist(), golds)
    expected += slow_branch_losses(model, processor, TASK_ROWS, LABELS)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_mentions_of_one_entity_are_not_each_others_negatives(processor):
    """The released code pushes them apart; here two mentions of one entity have no negative between them."""
    model = tiny_model(processor, "matching")
    twice = prepare(processor.mentions, [MENTIONS[0], MENTIONS[1]])
    entities = prepare(processor.entities, ENTITIES)
    out = model(mentions=twice, entities=entities, labels=torch.tensor([2, 2]))
    ranking = slow_cross_entropy(out.scores.tolist(), [2, 2])
    ranking += slow_branch_losses(model, processor, [(0, "it2it"), (1, "it2it")], torch.tensor([2, 2]))
    assert out.loss.item() == pytest.approx(ranking, rel=1e-5)


def random_inputs_where_hidden(inputs: dict[str, Any], hidden: str) -> dict[str, Any]:
    """The same batch with other pictures, or with other words of the same length."""
    sides = {}
    for side in ("mentions", "entities"):
        sides[side] = dict(inputs[side])
        if hidden == "image":
            sides[side]["pixel_values"] = torch.randn_like(inputs[side]["pixel_values"])
        else:
            ids = inputs[side]["input_ids"].clone()
            ids[:, 1] = 7
            sides[side]["input_ids"] = ids
    return inputs | sides


@pytest.mark.parametrize(("task", "hidden", "tower"), [("t2t", "image", "vision_model"), ("i2i", "text", "text_model")])
def test_what_a_task_hides_has_no_influence_and_gets_no_gradient(model, processor, task, hidden, tower):
    model.config.contrastive_weight = 0.0
    inputs = forward_inputs(processor, [(b, task) for b in range(3)]) | {"labels": LABELS}
    out = model(**inputs)
    other = model(**random_inputs_where_hidden(inputs, hidden))
    assert torch.equal(other.scores, out.scores)
    assert torch.equal(other.loss, out.loss)
    out.loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    blind = [name for name in gradients if f".{tower}." in name]
    assert not any(gradients[name].any() for name in blind)
    assert any(gradients[name].any() for name in gradients if name not in blind)


# Saving and loading.

REMOTE = """
import json, sys
sys.modules["m3el_hf"] = None
import torch
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
picture, *folders = sys.argv[1:]
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = [["Kansas", None], ["a band", None], [None, picture]]
    with torch.inference_mode():
        mentions = model.encode_mentions(**processor.mentions(*inputs))
        scores = model.score(mentions, model.encode_entities(**processor.entities(*inputs))).total
    print(json.dumps([processor.max_text_length, scores.tolist()]))
"""


def save_all(processor: ClipNDProcessor, folder: Path) -> dict[str, ClipNDModel]:
    models = {head: headed(processor, head) for head in HEADS}
    for head, model in models.items():
        model.save_pretrained(folder / head)
        processor.save_pretrained(folder / head)
    return models


def scores_of(model: ClipNDModel, processor: ClipNDProcessor, path: Path) -> list[list[float]]:
    inputs = [["Kansas", None], ["a band", None], [None, str(path)]]
    with torch.no_grad():
        mentions = model.encode_mentions(**processor.mentions(*inputs))
        return model.score(mentions, model.encode_entities(**processor.entities(*inputs))).total.tolist()


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    picture(9).save(path)
    return path


def test_a_saved_model_scores_the_same_when_it_is_loaded(processor, picture_file, tmp_path):
    for head, model in save_all(processor, tmp_path).items():
        folder = tmp_path / head
        loaded, loaded_processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert type(loaded) is ClipNDModel and type(loaded_processor) is ClipNDProcessor
        assert not loaded.training
        for name in ("head", "matching_dim", "matching_direction"):
            assert getattr(loaded.config, name) == getattr(model.config, name)
        expected = scores_of(model, processor, picture_file)
        np.testing.assert_allclose(scores_of(loaded, loaded_processor, picture_file), expected, rtol=1e-5)


def test_a_saved_model_can_be_placed_automatically_and_in_half_precision(processor, picture_file, tmp_path):
    for head, model in save_all(processor, tmp_path).items():
        expected = scores_of(model, processor, picture_file)
        placed = ClipNDModel.from_pretrained(tmp_path / head, device_map="auto")
        np.testing.assert_allclose(scores_of(placed, processor, picture_file), expected, rtol=1e-5)
        half = ClipNDModel.from_pretrained(tmp_path / head, dtype=torch.bfloat16)
        assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
        np.testing.assert_allclose(scores_of(half, processor, picture_file), expected, rtol=0.1, atol=0.5)


def test_a_saved_model_scores_the_same_where_the_package_is_absent(processor, picture_file, tmp_path):
    models = save_all(processor, tmp_path)
    command = [sys.executable, "-c", REMOTE, str(picture_file), *(str(tmp_path / head) for head in models)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for model, line in zip(models.values(), done.stdout.splitlines(), strict=True):
        max_text_length, scores = json.loads(line)
        assert max_text_length == processor.max_text_length
        np.testing.assert_allclose(scores, scores_of(model, processor, picture_file), rtol=1e-5)


# Starting from a pretrained CLIP.


def save_clip(processor: ClipNDProcessor, folder: Path, eos_token_id: int | None = None) -> CLIPModel:
    """A random CLIP with its processor, as a Hub repository holds it; 2 is the wrong end-of-text id of old ones."""
    tokenizer = processor.tokenizer
    config: CLIPConfig = ClipNDConfig.tiny(len(tokenizer), tokenizer.eos_token_id, width=32).clip_config
    config.text_config.eos_token_id = eos_token_id or tokenizer.eos_token_id
    torch.manual_seed(3)
    clip = CLIPModel(config).eval()
    clip.save_pretrained(folder)
    CLIPProcessor(processor.image_processor, tokenizer).save_pretrained(folder)
    return clip


def text_features(clip: CLIPModel, processor: ClipNDProcessor) -> Tensor:
    prepared = processor.mentions(["Kansas", "a state of the plains", "x"])
    with torch.no_grad():
        return clip.get_text_features(prepared["input_ids"], prepared["attention_mask"]).pooler_output


@pytest.mark.parametrize("head", ["clip", "matching"])
def test_from_clip_has_the_checkpoints_weights(processor, tmp_path, head):
    clip = save_clip(processor, tmp_path)
    model = ClipNDModel.from_clip(str(tmp_path), head=head, matching_dim=8)
    found = model.clip.state_dict()
    for name, weight in clip.state_dict().items():
        assert torch.equal(found[name], weight), name
    assert (model.config.head, model.config.matching_dim) == (head, 8)
    assert model.config.clip_config.to_dict() == model.clip.config.to_dict()


def test_from_clip_scores_with_the_processor_of_the_same_folder(processor, picture_file, tmp_path):
    save_clip(processor, tmp_path / "clip")
    model = ClipNDModel.from_clip(str(tmp_path / "clip")).eval()
    same = ClipNDProcessor.from_pretrained(tmp_path / "clip")
    assert same.max_text_length == ClipNDProcessor(processor.image_processor, processor.tokenizer).max_text_length
    expected = scores_of(model, processor, picture_file)
    np.testing.assert_allclose(scores_of(model, same, picture_file), expected, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    loaded = ClipNDModel.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(scores_of(loaded, same, picture_file), expected, rtol=1e-5)


def test_from_clip_pools_an_old_checkpoint_where_it_always_did(processor, tmp_path):
    clip = save_clip(processor, tmp_path / "clip", eos_token_id=2)
    expected = text_features(clip, processor)
    assert len(expected.unique(dim=0)) == 3
    model = ClipNDModel.from_clip(str(tmp_path / "clip"))
    assert model.config.clip_config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    torch.testing.assert_close(text_features(model.clip, processor), expected)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(text_features(ClipNDModel.from_pretrained(tmp_path / "saved").clip, processor), expected)


def test_from_clip_refuses_another_kind_of_checkpoint(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' checkpoint: from_clip takes a CLIP"):
        ClipNDModel.from_clip(str(tmp_path))


def test_from_clip_says_when_there_is_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match="absent"):
        ClipNDModel.from_clip(str(tmp_path / "absent"))
