from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from m3el_hf import ClipNDModel
from tests.modeling.conftest import HEADS, MENTIONS, TASK_ROWS, encode_all, forward_inputs, headed, prepare


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


def wrong_inputs(given: dict[str, Tensor]) -> list[tuple[dict[str, Any], str]]:
    """What may be given by mistake in place of what a processor made, and what is said of it."""
    ids, mask, pixels, has_text = (given[name] for name in ("input_ids", "attention_mask", "pixel_values", "has_text"))
    return [
        ({"input_ids": ids.float()}, r"input_ids must be a tensor of integers \[n, L\], not float32 \[3, "),
        ({"input_ids": ids.bool()}, "integers .* not bool"),
        ({"input_ids": ids.tolist()}, "integers .* not list"),
        ({"input_ids": ids[0]}, r"integers \[n, L\], not int64 \["),
        (
            {"input_ids": ids + 1000},
            "input_ids hold 15.., and the model's vocabulary has 545 tokens: prepare",
        ),
        ({"input_ids": -ids}, "input_ids hold -"),
        ({"input_ids": ids[:, :-1]}, "attention_mask is .* the same shape"),
        ({"attention_mask": mask[:, :-1]}, "attention_mask is .* the same shape"),
        (
            {"input_ids": ids.repeat(1, 9), "attention_mask": mask.repeat(1, 9)},
            "the model has 77 positions: prepare",
        ),
        ({"pixel_values": pixels.bool()}, r"pixel_values must be a tensor of floats \[n, 3, S, S\], not bool"),
        ({"pixel_values": (255 * pixels).byte()}, "floats .* not uint8"),
        ({"pixel_values": pixels[0]}, "floats .* not float32"),
        (
            {"pixel_values": pixels[..., :32, :32]},
            r"are \[3, 3, 32, 32\], and the model takes \[n, 3, 64, 64\]",
        ),
        ({"pixel_values": pixels[:, :1]}, r"are \[3, 1, 64, 64\]"),
        ({"has_text": None}, r"has_text must be a tensor of bools \[n\], not NoneType"),
        ({"has_image": None}, r"has_image must be a tensor of bools \[n\], not NoneType"),
        ({"has_text": [True] * 3}, "bools .* not list"),
        ({"has_text": has_text.long()}, "bools .* not int64"),
        ({"has_text": has_text.unsqueeze(1)}, r"bools .* not bool \[3, 1\]"),
        (dict.fromkeys(given), "has_text must be a tensor"),
        ({name: one.to("meta") for name, one in given.items()}, "lie on meta, the model on cpu: move one of them with"),
    ]


@pytest.mark.parametrize("side", ["mentions", "entities"])
def test_what_cannot_be_encoded_is_refused_in_one_line(model, processor, side):
    given = prepare(getattr(processor, side), MENTIONS)
    sides = forward_inputs(processor, TASK_ROWS)
    encode = getattr(model, f"encode_{side}")
    for changes, message in wrong_inputs(given):
        with pytest.raises(ValueError, match=message) as raised:
            encode(**given | changes)
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match=message):
            model(**sides | {side: given | changes})


def test_a_side_must_be_what_the_processor_makes(model, processor):
    sides = forward_inputs(processor, TASK_ROWS)
    for side in ("mentions", "entities"):
        for wrong, found in ((None, "NoneType"), ([1], "list"), (sides[side] | {"names": 1}, r"\['names'\]")):
            with pytest.raises(ValueError, match=f"{side} must be a dict of input_ids, .*, not {found}"):
                model(**sides | {side: wrong})


def test_any_integers_and_floats_are_taken(model, processor):
    given = prepare(processor.mentions, MENTIONS)
    mentions, entities = encode_all(model, processor)
    expected = model.score(mentions, entities).total
    for changes in (
        {"input_ids": given["input_ids"].int()},
        {"attention_mask": given["attention_mask"].bool()},
        {"attention_mask": given["attention_mask"].float()},
        {"pixel_values": given["pixel_values"].double()},
    ):
        torch.testing.assert_close(model.score(model.encode_mentions(**given | changes), entities).total, expected)


def test_tokens_that_the_model_does_not_have_are_refused(model, processor):
    """The tokenizers are as large as the vocabulary of their model, and stay so: nothing is ever resized."""
    size = len(processor.tokenizer)
    assert size == model.config.clip_config.text_config.vocab_size
    prepared = processor.mentions(["Kansas"])
    prepared["input_ids"][0, 1] = size
    with pytest.raises(ValueError, match=f"input_ids hold {size}, .* has {size} tokens: .* and add no tokens to it$"):
        model.encode_mentions(**prepared)


def test_a_model_without_weights_says_so(model, processor):
    with torch.device("meta"):
        empty = ClipNDModel(model.config)
    with pytest.raises(ValueError, match="mentions lie on cpu, the model on meta"):
        empty.encode_mentions(**processor.mentions(["Kansas"]))
    mentions, entities = encode_all(model, processor)
    with pytest.raises(ValueError, match="mentions and entities lie on cpu, the model on meta"):
        empty.score(mentions, entities)


def test_what_this_model_did_not_encode_is_refused(model, processor):
    mentions, entities = encode_all(model, processor)
    given = prepare(processor.mentions, MENTIONS)
    for score in (model.score, model.score_factorised):
        for wrong in (None, given, mentions.text):
            for sides in ((wrong, entities), (mentions, wrong)):
                with pytest.raises(ValueError, match="takes what this model's encode_mentions and encode_entities"):
                    score(*sides)


@pytest.mark.parametrize(
    ("head", "another"), zip(HEADS, ["pooled", "unidirectional", "bidirectional", "clip"], strict=True)
)
def test_what_another_checkpoint_encoded_is_refused(processor, head, another):
    """By its fingerprint or, where it has none, by its kind and widths."""
    model = headed(processor, head)
    mentions, _ = encode_all(model, processor)
    same, other = headed(processor, head, seed=1), headed(processor, another, matching_dim=12)
    narrow = headed(processor, head, matching_dim=12)
    unknown = [replace(encode_all(one, processor)[1], fingerprint=None) for one in (other, narrow)]
    for entities in (encode_all(same, processor)[1], *(unknown if head != "clip" else unknown[:1])):
        with pytest.raises(ValueError, match=r"encoded by other weights|takes what this model's"):
            model.score(mentions, entities)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0, 2.0]), r"labels must be a tensor of integers \[B\], not float32 \[3\]"),
        (torch.tensor([[0], [1], [2]]), r"not int64 \[3, 1\]"),
        ([0, 1, 2], "not list"),
        (torch.tensor([0, 1, 2], device="meta"), "labels lie on meta, the model on cpu"),
    ],
)
def test_labels_must_be_whole_numbers_on_the_models_device(model, processor, labels, message):
    with pytest.raises(ValueError, match=message):
        model(**forward_inputs(processor, TASK_ROWS), labels=labels)


@pytest.mark.parametrize(
    ("rows", "views", "message"),
    [
        (torch.tensor([0, 1]), None, r"views must be a tensor of bools \[R, 4\], given with rows, not NoneType"),
        (None, torch.ones(2, 4, dtype=torch.bool), "rows must be a tensor of integers .*, given with views"),
        (torch.tensor([0, 3]), torch.ones(2, 4, dtype=torch.bool), "row 1 is of mention 3, no index of the 3"),
        (torch.tensor([-1, 0]), torch.ones(2, 4, dtype=torch.bool), "row 0 is of mention -1"),
        (torch.tensor([0.0, 1.0]), torch.ones(2, 4, dtype=torch.bool), "integers .* not float32"),
        (torch.tensor([0, 1]), torch.ones(3, 4, dtype=torch.bool), r"views must be \[2, 4\], .* not \[3, 4\]"),
        (torch.tensor([0, 1]), torch.ones(2, 3, dtype=torch.bool), r"not \[2, 3\]"),
        (torch.tensor([0, 1]), torch.ones(2, 4), "bools .* not float32"),
        (torch.tensor([0, 1], device="meta"), torch.ones(2, 4, dtype=torch.bool), "rows lie on meta"),
    ],
)
def test_rows_and_views_that_cannot_be_are_named(model, processor, rows, views, message):
    with pytest.raises(ValueError, match=message):
        model(**forward_inputs(processor, TASK_ROWS) | {"rows": rows, "views": views})
