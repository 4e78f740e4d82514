"""What tests of the model share: one of each head, some mentions and entities, and how they are scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3el_hf import TASKS, ClipNDConfig, ClipNDModel, ClipNDProcessor
from m3el_hf.modeling.encoded_clipnd import Encoded

HEADS: dict[str, dict[str, Any]] = {
    "clip": {"head": "clip"},
    "pooled": {"head": "pooled"},
    "unidirectional": {"head": "matching"},
    "bidirectional": {"head": "matching", "matching_direction": "bidirectional"},
}

Item = tuple[str | None, str | None, Image.Image | None]
View = tuple[bool, bool, bool, bool]


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
