"""Checks of what a user gives a ClipNDModel, each refusal one line that says what to do. Flat file, for the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig

from .configuration_clipnd import ClipNDConfig
from .encoded_clipnd import Encoded, MatchingEntities, MatchingMentions

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KINDS: dict[str, tuple[str, int, tuple[torch.dtype, ...]]] = {
    "input_ids": ("integers [n, L]", 2, (torch.int64, torch.int32)),
    "attention_mask": ("numbers or bools [n, L]", 2, (*_INTEGERS, *_FLOATS, torch.bool)),
    "pixel_values": ("floats [n, 3, S, S]", 4, _FLOATS),
    "has_text": ("bools [n]", 1, (torch.bool,)),
    "has_image": ("bools [n]", 1, (torch.bool,)),
}
"""What the encoders take, as a message says it, with dimensions and types."""

SAME_PROCESSOR = "prepare them with the processor that was saved with the model"
OTHER_WEIGHTS = "mentions or entities were encoded by other weights than the model has: encode them again"


@torch.compiler.disable
def check_inputs(side: str, inputs: Any, config: CLIPConfig, device: torch.device | None) -> None:
    """Refuses what ``encode_mentions`` or ``encode_entities`` cannot encode.

    Args:
        side: "mentions" or "entities".
        inputs: The arguments, by name.
        config: Of the CLIP that encodes them.
        device: Where they must lie; None for anywhere.

    Raises:
        ValueError: The message says what is wrong and what to do.
    """
    if not isinstance(inputs, Mapping) or not inputs.keys() <= _KINDS.keys():
        found = sorted(inputs.keys() - _KINDS.keys()) if isinstance(inputs, Mapping) else type(inputs).__name__
        expected = f"a dict of {', '.join(_KINDS)}, as ClipNDProcessor.{side} makes it"
        raise ValueError(f"{side} must be {expected}, not {found}")
    for name, (kind, dimensions, dtypes) in _KINDS.items():
        value = inputs.get(name)
        if value is not None or name.startswith("has_"):
            _check_tensor(name, value, kind, dimensions, dtypes)
    given = {name: value for name, value in inputs.items() if value is not None}
    for what, values in (
        ("rows", {name: len(value) for name, value in given.items()}),
        ("devices", {name: str(value.device) for name, value in given.items()}),
    ):
        if len(set(values.values())) > 1:
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            raise ValueError(f"the arguments must have the same {what}: {found}")
    _check_device(side, given["has_text"], device)
    for has, names in (("has_text", ("input_ids", "attention_mask")), ("has_image", ("pixel_values",))):
        for name in names:
            if name not in given and given[has].any():
                raise ValueError(f"{has} says that rows have one, but {name} is None")
    if "input_ids" in given and "attention_mask" in given:
        _check_text(given["input_ids"], given["attention_mask"], config.text_config)
    if "pixel_values" in given:
        _check_pixels(given["pixel_values"], config.vision_config)


@torch.compiler.disable
def check_nothing_empty(encoded: Encoded) -> None:
    """Refuses rows that have neither text nor picture; the message names the first."""
    empty = (~(encoded.has_text | encoded.has_image)).nonzero().flatten()
    if len(empty):
        raise ValueError(f"row {empty[0].item()} has neither text nor picture: there is nothing to link it by")


@torch.compiler.disable
def check_labels(labels: Any, mentions: int, entities: int, device: torch.device | None) -> None:
    """Refuses labels unless they are ``[mentions]``, each an entity's index; ``device`` as in `check_inputs`."""
    _check_tensor("labels", labels, "integers [B]", 1, _INTEGERS)
    _check_device("labels", labels, device)
    if len(labels) != mentions:
        raise ValueError(f"{len(labels)} labels for {mentions} mentions: there must be one a mention")
    wrong = ((labels < 0) | (labels >= entities)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"label {labels[row].item()} of mention {row} is no index of the {entities} entities")


@torch.compiler.disable
def check_views(rows: Any, views: Any, mentions: int, device: torch.device | None) -> None:
    """Refuses ``rows`` ``[R]`` that are no mentions' indices, and ``views`` unless they are bools ``[R, 4]``.

    ``device`` is as in `check_inputs`.
    """
    _check_tensor("rows", rows, "integers [R], given with views", 1, _INTEGERS)
    _check_tensor("views", views, "bools [R, 4], given with rows", 2, (torch.bool,))
    for name, value in (("rows", rows), ("views", views)):
        _check_device(name, value, device)
    if views.shape != (len(rows), 4):
        raise ValueError(f"views must be [{len(rows)}, 4], four for each row, not {list(views.shape)}")
    wrong = ((rows < 0) | (rows >= mentions)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"row {row} is of mention {rows[row].item()}, no index of the {mentions} mentions")


@torch.compiler.disable
def check_encoded(mentions: Any, entities: Any, config: ClipNDConfig, device: torch.device | None) -> None:
    """Refuses sides that a model of this configuration did not encode, or that lie on other devices.

    Args:
        mentions: What ``encode_mentions`` returned.
        entities: What ``encode_entities`` returned.
        config: Of the model.
        device: Where both must lie; None for anywhere, but together.
    """
    kinds = (MatchingMentions, MatchingEntities) if config.head == "matching" else (Encoded, Encoded)
    if (type(mentions), type(entities)) != kinds:  # a subclass is another head's
        raise ValueError("scoring takes what this model's encode_mentions and encode_entities return, in this order")
    devices = [one.text.device for one in (mentions, entities)]
    if devices[0] != devices[1]:
        raise ValueError(f"mentions lie on {devices[0]}, entities on {devices[1]}: move one of them with .to(device)")
    _check_device("mentions and entities", mentions.text, device)
    clip: Any = config.clip_config
    width = config.matching_dim if config.head == "pooled" else clip.projection_dim
    expected = {"text": [width]}
    if config.head == "matching":
        expected["cross"] = [2 if config.matching_direction == "bidirectional" else 1, config.matching_dim]
    for side in (mentions, entities):
        if any(list(getattr(side, name).shape[1:]) != shape for name, shape in expected.items()):
            raise ValueError(OTHER_WEIGHTS)


def _check_tensor(name: str, value: Any, kind: str, dimensions: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if isinstance(value, Tensor) and value.ndim == dimensions and value.dtype in dtypes:
        return
    found = type(value).__name__
    if isinstance(value, Tensor):
        found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    raise ValueError(f"{name} must be a tensor of {kind}, not {found}")


def _check_device(name: str, value: Tensor, device: torch.device | None) -> None:
    if device is not None and value.device != device:
        raise ValueError(f"{name} lie on {value.device}, the model on {device}: move one of them with .to(device)")


def _check_text(input_ids: Tensor, attention_mask: Tensor, config: Any) -> None:
    length, positions, vocabulary = input_ids.shape[1], config.max_position_embeddings, config.vocab_size
    if attention_mask.shape != input_ids.shape:
        shapes = f"{list(attention_mask.shape)}, input_ids {list(input_ids.shape)}"
        raise ValueError(f"attention_mask is {shapes}: they must have the same shape; {SAME_PROCESSOR}")
    if length > positions:
        raise ValueError(
            f"input_ids are {length} tokens long, and the model has {positions} positions: prepare them with a "
            f"processor of max_text_length={positions} or less"
        )
    wrong = (input_ids < 0) | (input_ids >= vocabulary)
    if wrong.any():
        raise ValueError(
            f"input_ids hold {input_ids[wrong][0].item()}, and the model's vocabulary has {vocabulary} tokens: "
            f"{SAME_PROCESSOR}, and add no tokens to it"
        )


def _check_pixels(pixel_values: Tensor, config: Any) -> None:
    expected = [config.num_channels, config.image_size, config.image_size]
    if list(pixel_values.shape[1:]) != expected:
        found = f"pixel_values are {list(pixel_values.shape)}, and the model takes {['n', *expected]}"
        raise ValueError(f"{found}: {SAME_PROCESSOR}".replace("'", ""))
