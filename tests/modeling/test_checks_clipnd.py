from __future__ import annotations

import pytest
import torch

from tests.modeling.conftest import MENTIONS, TASK_ROWS, encode_all, forward_inputs, headed, prepare


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
