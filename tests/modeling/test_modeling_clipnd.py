from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m3el_hf import TASKS, ClipNDModel, ClipNDProcessor
from m3el_hf.modeling.matching_clipnd import MatchingScores
from tests.conftest import tiny_model
from tests.modeling.conftest import (
    ENTITIES,
    HEADS,
    LABELS,
    MENTIONS,
    TASK_ROWS,
    encode_all,
    forward_inputs,
    headed,
    only,
    prepare,
    scored_alone,
    view_of,
)
from tests.modeling.test_matching_clipnd import slow_contrastive

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


# Training.


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
    for name in model.config.matching_branches:
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


def shows_both(task: str, column: int) -> bool:
    """Whether a task shows texts, or with column 1 pictures, on both sides."""
    return view_of(task)[column] and view_of(task)[2 + column]


def test_the_loss_is_the_cross_entropy_of_total_and_branches_plus_the_contrastive_term(model, processor):
    model.config.contrastive_weight = 0.7
    out = model(**forward_inputs(processor, TASK_ROWS), labels=LABELS)
    expected = slow_cross_entropy(out.scores.tolist(), [LABELS[mention].item() for mention, _ in TASK_ROWS])
    if model.config.head == "matching":
        expected += slow_branch_losses(model, processor, TASK_ROWS, LABELS)
        mentions, entities = encode_all(model, processor)
        for kind, column in (("text", 0), ("image_cls", 1)):
            both = [n for n in range(len(LABELS)) if any(shows_both(task, column) for m, task in TASK_ROWS if m == n)]
            m, e = (getattr(side, kind).detach().double()[both] for side in (mentions, entities[LABELS]))
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


KEPT = [("unidirectional", ["text"]), ("unidirectional", ["image", "cross"]), ("bidirectional", ["text", "image_text"])]


def scores_as(task: str, model: ClipNDModel, processor: ClipNDProcessor) -> MatchingScores:
    mentions, entities = encode_all(model, processor)
    view = view_of(task)
    return model.score(mentions.show(*view[:2]), entities.show(*view[2:]))


@pytest.mark.parametrize(("direction", "kept"), KEPT)
def test_a_pair_that_only_branches_left_out_could_score_has_the_score_of_clip(processor, direction, kept):
    model, clip = headed(processor, direction, matching_branches=kept), headed(processor, "clip")
    clip.clip = model.clip
    with torch.no_grad():
        for task in TASKS:
            shared = {"text": shows_both(task, 0), "image": shows_both(task, 1)}
            able = [name for name in kept if shared.get(name, all(shared.values()))]
            scores = scores_as(task, model, processor)
            if able:
                mean = torch.stack([scores.branches[name] for name in able]).mean(0)
                torch.testing.assert_close(scores.total, mean)
                assert not scores.branches["clip"].isfinite().any()
            else:
                torch.testing.assert_close(scores.total, scores_as(task, clip, processor).total)
            rows = [(0, task), (2, task)]
            by_rows = model(**forward_inputs(processor, rows)).scores
            torch.testing.assert_close(by_rows, scores.total[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("direction", "kept"), KEPT)
def test_branches_left_out_bring_no_loss_and_get_no_gradient(processor, direction, kept):
    model = headed(processor, direction, matching_branches=kept, contrastive_weight=0.7)
    out = model(**forward_inputs(processor, TASK_ROWS), labels=LABELS)
    contrastive = {f"contrastive_{name}" for name in kept if name in ("text", "image")}
    assert set(out.losses) == {"total", *kept, *contrastive}
    expected = slow_cross_entropy(out.scores.tolist(), [LABELS[mention].item() for mention, _ in TASK_ROWS])
    expected += slow_branch_losses(model, processor, TASK_ROWS, LABELS)
    expected += sum(0.7 * out.losses[name].item() for name in contrastive) / max(1, len(contrastive))
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    out.loss.backward()
    for name in {"text", "image"} - set(kept):
        module = getattr(model.matching, name)
        assert all(one.grad is None or not one.grad.any() for one in module.parameters())
    assert all(getattr(model.matching, name).fc_query.weight.grad.any() for name in {"text", "image"} & set(kept))


@pytest.mark.parametrize(("direction", "kept"), KEPT)
def test_a_saved_model_scores_by_the_branches_it_was_saved_with(processor, tmp_path, direction, kept):
    model = headed(processor, direction, matching_branches=kept)
    model.save_pretrained(tmp_path)
    loaded = ClipNDModel.from_pretrained(tmp_path)
    scores = [one.score(*encode_all(one, processor)) for one in (model, loaded)]
    assert scores[0].branches.keys() == scores[1].branches.keys() == {*kept, "clip"}
    torch.testing.assert_close(scores[0].total, scores[1].total)


@pytest.mark.parametrize(("direction", "kept"), KEPT)
def test_training_by_some_branches_lowers_the_loss(processor, direction, kept):
    model = headed(processor, direction, matching_branches=kept).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**forward_inputs(processor, TASK_ROWS), labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
