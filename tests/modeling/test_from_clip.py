from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
)

from m3el_hf import ClipNDConfig, ClipNDModel, ClipNDProcessor
from tests.modeling.conftest import HEADS, encode_all, scores_of


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
    assert not any(module.training for module in model.modules())


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


# Widths of the text, the picture and their common space, heads, patches and sides, in the ratios of ViT-B/32, ViT-B/16,
# ViT-L/14 and ViT-L/14@336.
SHAPES = {
    "B/32": (16, 24, 16, 32, 64),
    "B/16": (16, 24, 16, 16, 64),
    "L/14": (24, 32, 24, 14, 70),
    "L/14@336": (24, 32, 24, 14, 98),
    "narrow": (24, 32, 16, 16, 64),
}


def clip_config(vocab_size: int, shape: str) -> CLIPConfig:
    """A CLIP of one layer a tower."""
    text, vision, common, patch, side = SHAPES[shape]
    tower = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "projection_dim": common}
    ids = {"vocab_size": vocab_size, "eos_token_id": vocab_size - 1, "bos_token_id": vocab_size - 2}
    return CLIPConfig(
        text_config=tower | ids | {"hidden_size": text, "pad_token_id": vocab_size - 1},
        vision_config=tower | {"hidden_size": vision, "patch_size": patch, "image_size": side},
        projection_dim=common,
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "narrow"])
def test_a_clip_of_any_shape_gets_any_head(processor, tmp_path, shape, head):
    size = SHAPES[shape][-1]
    square = {"height": size, "width": size}
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    CLIPModel(clip_config(len(processor.tokenizer), shape)).save_pretrained(tmp_path)
    CLIPProcessor(images, processor.tokenizer).save_pretrained(tmp_path)
    model = ClipNDModel.from_clip(str(tmp_path), **HEADS[head], matching_dim=8).eval()
    same = ClipNDProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        scores = model.score(*encode_all(model, same)).total
        model.save_pretrained(tmp_path / "saved")
        loaded = ClipNDModel.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(loaded.score(*encode_all(loaded, same)).total, scores)
    assert scores.isfinite().all() and len(scores.unique()) == scores.numel()


def test_the_bidirectional_form_says_which_clip_it_cannot_take(processor, tmp_path):
    """Where text tokens are wider than text vectors, as in no CLIP of OpenAI's; the other heads take it."""
    CLIPModel(clip_config(len(processor.tokenizer), "narrow")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='this CLIP needs matching_direction="unidirectional"'):
        ClipNDModel.from_clip(str(tmp_path), **HEADS["bidirectional"])
    for head in ("clip", "pooled", "unidirectional"):
        model = ClipNDModel.from_clip(str(tmp_path), **HEADS[head]).eval()
        assert model.score(*encode_all(model, processor)).total.isfinite().all()


def test_from_clip_refuses_another_kind_of_checkpoint(processor, tmp_path):
    clip = clip_config(len(processor.tokenizer), "B/32")
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    siglip = SiglipConfig(text_config=tower | {"vocab_size": 99}, vision_config=tower | {"image_size": 32})
    made = {
        "bert": BertConfig(),
        "siglip": SiglipModel(siglip),
        "clip_text_model": CLIPTextModel(clip.text_config),
        "clip_vision_model": CLIPVisionModel(clip.vision_config),
        "clipnd": ClipNDModel(ClipNDConfig(clip)),
    }
    for kind, one in made.items():
        one.save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=f"'{kind}' checkpoint: from_clip takes a CLIP, with both its towers"):
            ClipNDModel.from_clip(str(tmp_path / kind))


def test_from_clip_refuses_a_checkpoint_that_lacks_a_tower(processor, tmp_path):
    clip = CLIPModel(clip_config(len(processor.tokenizer), "B/32"))
    text = {name: one for name, one in clip.state_dict().items() if not name.startswith("vision_model.")}
    clip.save_pretrained(tmp_path, state_dict=text)
    with pytest.raises(ValueError, match="holds no whole CLIP: it lacks weights of vision_model$"):
        ClipNDModel.from_clip(str(tmp_path))


@pytest.mark.parametrize("read", [ClipNDModel.from_pretrained, ClipNDConfig.from_pretrained])
def test_a_plain_clip_says_how_it_is_loaded(processor, tmp_path, read):
    save_clip(processor, tmp_path)
    with pytest.raises(ValueError, match=r"'clip' checkpoint.*start from it with ClipNDModel\.from_clip$"):
        read(tmp_path)


def test_from_clip_says_when_there_is_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match="absent"):
        ClipNDModel.from_clip(str(tmp_path / "absent"))
