from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, CLIPConfig, CLIPModel, CLIPProcessor

from m3el_hf import ClipNDConfig, ClipNDModel, ClipNDProcessor
from tests.modeling.conftest import scores_of


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
