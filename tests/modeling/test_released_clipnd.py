"""Checkpoints under the released code's names, written here, since the real one is not at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m3el_hf import ClipNDConfig, ClipNDModel
from m3el_hf.modeling.released_clipnd import matching_names

DIRECTIONS = ["unidirectional", "bidirectional"]
IDLE = {
    "encoder.clip.text_model.embeddings.position_ids": (1, 77),
    "encoder.clip.vision_model.embeddings.position_ids": (1, 17),
    "matcher.text_fc.weight": (8, 32),
    "matcher.image_fc.bias": (8,),
    "matcher.scale_text_cls_layernorm.weight": (8,),
    "matcher.scale_image_tokens_layernorm.bias": (8,),
    "matcher.mclet_text_loss.cl_fc.0.weight": (8, 8),
    "matcher.cmm.mclet_text_loss.cl_fc.2.bias": (8,),
    "matcher.cmmb.mclet_image_loss.cl_fc.2.bias": (8,),
    "matcher.cmm.multi_head_module.weight": (5, 1),
    "matcher.cmmb.multi_head_module.weight": (5, 1),
    "loss_fct.weight": (2,),
}
"""Which a whole checkpoint has too."""


def tiny(direction: str) -> ClipNDModel:
    config = ClipNDConfig.tiny(600, 599, width=32, head="matching", matching_dim=8, matching_direction=direction)
    return ClipNDModel(config).eval()


def released(model: ClipNDModel, other: ClipNDModel) -> dict[str, Tensor]:
    """The checkpoint of which ``model`` has the weights, and ``other`` those of the module that was not trained."""
    checkpoint = {name: torch.full(shape, 0.5) for name, shape in IDLE.items()}
    for one in (other, model):
        names = matching_names(one.matching.state_dict(), bidirectional=len(one.matching.cross.branches) == 2)
        checkpoint |= {f"matcher.{names[name]}": value for name, value in one.matching.state_dict().items()}
    towers = {name: value for name, value in model.state_dict().items() if not name.startswith("matching.")}
    return checkpoint | {f"encoder.{name}": value for name, value in towers.items()}


@pytest.fixture(params=[False, True], ids=DIRECTIONS)
def both(request: pytest.FixtureRequest) -> tuple[bool, ClipNDModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    one, other = map(tiny, DIRECTIONS[::-1] if request.param else DIRECTIONS)
    return request.param, one, released(one, other)


def load(both: tuple[bool, ClipNDModel, dict[str, Tensor]], state_dict: dict[str, Any]) -> ClipNDModel:
    clip_config = both[1].config.clip_config
    return ClipNDModel.from_released_matching(state_dict, bidirectional=both[0], clip_config=clip_config)


@pytest.mark.parametrize("lightning", [False, True])
def test_every_weight_is_brought_over(both, lightning):
    bidirectional, expected, checkpoint = both
    model = load(both, {"epoch": 3, "state_dict": checkpoint} if lightning else checkpoint)
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())
    assert model.config.matching_direction == DIRECTIONS[bidirectional]
    assert (model.config.contrastive_self, model.config.mask_padding) == ("zero", False)
    assert not model.matching.exclude_self and not model.matching.mask_padding


def test_it_can_be_saved_and_loaded(both, tmp_path):
    model = load(both, both[2])
    model.save_pretrained(tmp_path)
    loaded = ClipNDModel.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert not loaded.config.mask_padding


@pytest.mark.parametrize(
    "name",
    [
        "encoder.clip.logit_scale",
        "encoder.image_cls_fc.weight",
        "encoder.image_tokens_fc.bias",
        "matcher.timm.fc_cls.bias",
        "matcher.iimm.layer_norm.weight",
        "matcher.image_tokens_layernorm.weight",
    ],
)
def test_an_absent_weight_is_named(both, name):
    del both[2][name]
    with pytest.raises(KeyError, match=f"{name} is not in the checkpoint"):
        load(both, both[2])


def test_the_cross_modal_weights_must_be_those_of_the_form(both):
    module = "cmmb" if both[0] else "cmm"
    del both[2][f"matcher.{module}.match_module.trans_linear.weight"]
    with pytest.raises(KeyError, match=f"{module}.match_module.trans_linear.weight is not"):
        load(both, both[2])


@pytest.mark.parametrize("name", ["encoder.clip.text_model.adapter.weight", "matcher.xyz", "matcher.cmm2.text_fc.bias"])
def test_an_unknown_weight_is_named(both, name):
    with pytest.raises(KeyError, match=f"{name} is no weight of the released"):
        load(both, both[2] | {name: torch.zeros(1)})


def test_a_clip_of_another_size_is_refused(both):
    with pytest.raises(RuntimeError, match="size mismatch"):
        ClipNDModel.from_released_matching(
            both[2], bidirectional=both[0], clip_config=ClipNDConfig.tiny(600, 599, layers=2, width=64).clip_config
        )


def test_the_default_is_vit_b_32_and_an_old_end_of_text_is_repaired(both):
    config = ClipNDConfig.tiny(600, 2, width=32).clip_config
    model = ClipNDModel.from_released_matching(both[2], bidirectional=both[0], clip_config=config.to_dict())
    assert model.config.clip_config.text_config.eos_token_id == 599
    assert model.clip.text_model.eos_token_id == 599
    with pytest.raises(KeyError, match=r"layers\.2\..* is not in the checkpoint"):  # of ViT-B/32's twelve; it has two
        ClipNDModel.from_released_matching(both[2], bidirectional=both[0])
