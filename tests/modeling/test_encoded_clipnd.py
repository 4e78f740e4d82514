from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3el_hf import ClipNDConfig, ClipNDModel
from m3el_hf.modeling import modeling_clipnd
from m3el_hf.modeling.encoded_clipnd import MatchingEntities, MatchingMentions
from m3el_hf.modeling.matching_clipnd import Features
from tests.modeling.conftest import ENTITIES, HEADS, encode_all, headed, only, prepare

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


def test_numbers_that_a_type_cannot_hold_are_refused(model, processor):
    mentions, _ = encode_all(model, processor)
    large = replace(mentions, text=mentions.text * 1e6)
    with pytest.raises(ValueError, match=r"text has numbers beyond what torch.float16 holds: keep torch.bfloat16"):
        large.to(dtype=torch.float16)
    assert large.to(dtype=torch.bfloat16).text.isfinite().all()


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


@pytest.mark.parametrize("size", [1, 2, 3])
def test_entities_are_scored_in_blocks_as_at_once(model, processor, monkeypatch, size):
    with torch.no_grad():
        sides = encode_all(model, processor)
        whole, factorised = model.score(*sides), model.score_factorised(*sides)
        monkeypatch.setattr(modeling_clipnd, "ENTITY_BLOCK", size)
        blocks = model.score(*sides)
    torch.testing.assert_close(blocks.total, whole.total)
    assert blocks.branches.keys() == whole.branches.keys()
    for name, branch in whole.branches.items():
        torch.testing.assert_close(blocks.branches[name], branch)
    with torch.no_grad():
        torch.testing.assert_close(model.score_factorised(*sides), factorised)


def test_parts_of_other_weights_or_none_cannot_be_joined(model, processor):
    mentions, entities = encode_all(model, processor)
    with pytest.raises(ValueError, match="nothing to join"):
        mentions.join([])
    with pytest.raises(ValueError, match="different weights"):
        entities.join([entities, replace(entities, fingerprint="another")])


def test_what_is_kept_can_be_written_and_read(model, processor, tmp_path):
    mentions, entities = encode_all(model, processor)
    torch.save(entities.to(dtype=torch.float16), tmp_path / "entities.pt")
    read = torch.load(tmp_path / "entities.pt")
    assert type(read) is type(entities) and read.fingerprint == entities.fingerprint
    torch.testing.assert_close(
        model.score(mentions, read).total, model.score(mentions, entities).total, rtol=0.01, atol=0.01
    )


# The bound.


def scaled(model: ClipNDModel, seed: int) -> None:
    """Weights of any size, so that no term is too small to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.startswith("matching."):
                one.copy_(torch.randn(one.shape, generator=generator) * (1 + seed % 3) / one.shape[-1] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("head", "kept"), [*((head, None) for head in HEADS), ("unidirectional", ["text"]), ("bidirectional", ["cross"])]
)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_the_exact_score_is_within_the_bound_of_the_factorised(processor, dtype, head, kept, seed):
    model = headed(processor, head, matching_branches=kept)
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


@pytest.mark.parametrize("offset", [1.0, 100.0, 10_000.0])
@pytest.mark.parametrize("spread", [1.0, 0.01, 0.0])
def test_the_bound_holds_where_channels_share_a_large_offset(processor, offset, spread):
    model = headed(processor, "unidirectional")
    scaled(model, 7)
    with torch.no_grad():
        for module in (model.matching.text, model.matching.image):  # q . LN(c) is then about 100 times the sum of n
            module.layer_norm.weight.fill_(1.0)
            module.fc_cls.weight.zero_()
            module.fc_cls.bias.fill_(100.0)
            module.fc_value.weight.mul_(spread)
            module.fc_value.bias.fill_(offset)
        mentions, entities = encode_all(model, processor)
        exact = model.score(mentions, entities).total
        factorised, bound = model.score_factorised(mentions, entities)
    assert ((exact - factorised).abs() <= bound).all()


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
