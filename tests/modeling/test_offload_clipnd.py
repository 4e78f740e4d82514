"""Models of which parts lie on a disk: accelerate fetches each part's weights when it runs, and not before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3el_hf import ClipNDModel
from m3el_hf.modeling.offload_clipnd import home_of
from tests.modeling.conftest import ENTITIES, MENTIONS, TASK_ROWS, encode_all, forward_inputs, only, prepare

HEAD_PARTS = {"clip": [], "pooled": ["pooling"], "matching": ["image_cls_fc", "image_tokens_fc", "matching"]}
TOWERS = ["clip.text_model", "clip.vision_model", "clip.text_projection", "clip.visual_projection"]


def all_scores(model: ClipNDModel, processor: Any) -> list[Tensor]:
    """By every way of scoring, also of rows for which a tower does not run."""
    with torch.no_grad():
        mentions, entities = encode_all(model, processor)
        text = model.encode_entities(**prepare(processor.entities, [only(item, True, False) for item in ENTITIES]))
        image = model.encode_mentions(**prepare(processor.mentions, [only(item, False, True) for item in MENTIONS]))
        pairs = ((mentions, entities), (mentions, text), (image, text))
        trained = model(**forward_inputs(processor, TASK_ROWS)).scores
        return [*(model.score(*pair).total for pair in pairs), *model.score_factorised(mentions, entities), trained]


def reloaded(model: ClipNDModel, folder: Path, device_map: Any, **options: Any) -> ClipNDModel:
    model.save_pretrained(folder / "saved")
    return ClipNDModel.from_pretrained(
        folder / "saved", device_map=device_map, offload_folder=str(folder / "offloaded"), **options
    )


def parts_of(model: ClipNDModel, disk: list[str]) -> dict[str, str]:
    """A device map of towers, projections and head."""
    parts = [*TOWERS, *HEAD_PARTS[model.config.head]]
    return {"clip.logit_scale": "cpu"} | {part: "disk" if part in disk else "cpu" for part in parts}


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # CLIP's scale is none
@pytest.mark.parametrize("offloaded", ["everything", "clip", "head", "text", "image", "projections"])
def test_a_model_scores_the_same_whatever_is_offloaded(model, processor, tmp_path, offloaded):
    head = HEAD_PARTS[model.config.head]
    if offloaded == "head" and not head:
        return  # the head clip has no weights of its own
    device_map = {
        "everything": {"": "disk"},
        "clip": {"clip": "disk"} | dict.fromkeys(head, "cpu"),
        "head": parts_of(model, head),
        "text": parts_of(model, TOWERS[:1]),
        "image": parts_of(model, TOWERS[1:2]),
        "projections": parts_of(model, TOWERS[2:]),
    }[offloaded]
    loaded = reloaded(model, tmp_path, device_map)
    absent = {name for name, one in loaded.named_parameters() if one.is_meta}
    assert absent and home_of(loaded) == torch.device("cpu")
    torch.testing.assert_close(all_scores(loaded, processor), all_scores(model, processor), rtol=1e-5, atol=1e-5)
    assert {name for name, one in loaded.named_parameters() if one.is_meta} == absent  # and is so again
    assert encode_all(loaded, processor)[0].fingerprint is None


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_automatic_map_may_split_the_model_anywhere(model, processor, tmp_path, share):
    size = sum(one.nbytes for one in model.parameters())
    loaded = reloaded(model, tmp_path, "auto", max_memory={"cpu": int(share * size)})
    assert any(one.is_meta for one in loaded.parameters())
    torch.testing.assert_close(all_scores(loaded, processor), all_scores(model, processor), rtol=1e-5, atol=1e-5)
