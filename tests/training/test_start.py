from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m3el_hf import ClipNDModel, ClipNDProcessor, M3ELError
from m3el_hf.training.lora import add_lora
from m3el_hf.training.start import MATCHING_ONLY, start_model
from tests.conftest import tiny_model


def saved_clip(processor: ClipNDProcessor, folder: Path) -> str:
    """A CLIP checkpoint as transformers saves it."""
    for part in (tiny_model(processor, seed=3).clip, processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("head", ["clip", "matching"])
def test_from_scratch_it_knows_the_words_of_its_rows(data, head):
    model, processor = start_model(None, head, data["train"], template="N")
    assert processor.template == "N"
    assert model.config.head == head
    assert model.num_parameters() < 1_000_000
    assert len(processor.tokenizer) == model.clip.config.text_config.vocab_size
    word = max(data["train"][0]["candidate_names"][0].split(), key=len)
    assert len(processor.tokenizer.tokenize(word)) < len(word)


def test_from_a_clip_it_has_its_weights(processor, data, tmp_path):
    clip = tiny_model(processor, seed=3).clip
    model, loaded = start_model(saved_clip(processor, tmp_path), "matching", data["train"], template="D")
    assert loaded.template == "D"
    for name, weight in clip.state_dict().items():
        torch.testing.assert_close(model.clip.state_dict()[name], weight, rtol=0, atol=0)
    assert loaded.tokenizer("a band").input_ids == processor.tokenizer("a band").input_ids


def test_what_is_no_clip_is_one_line(data, tmp_path):
    with pytest.raises(M3ELError, match=f"cannot start from {tmp_path}: [^\n]+$"):
        start_model(str(tmp_path), "clip", data["train"])
    with pytest.raises(M3ELError, match="no such folder: nowhere"):
        start_model("nowhere", "clip", data["train"])


def test_the_seed_decides_the_weights(data):
    def first_weights(seed):
        return torch.cat([one.flatten() for one in start_model(None, "matching", data["train"], seed)[0].parameters()])

    assert first_weights(1).equal(first_weights(1))
    assert not first_weights(1).equal(first_weights(2))


def test_settings_reach_the_model_from_scratch_and_from_a_clip(processor, data, tmp_path):
    settings = {"matching_direction": "bidirectional", "contrastive_weight": 0.5, "entity_to_mention_weight": 0.25}
    for base in (None, saved_clip(processor, tmp_path)):
        config = start_model(base, "matching", data["train"], **settings)[0].config
        assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize("direction", ["unidirectional", "bidirectional"])
def test_branches_that_are_left_out_stay_so_wherever_the_model_starts(processor, data, tmp_path, direction):
    settings = {"matching_direction": direction, "matching_branches": ["text", "cross"]}
    expected = {"unidirectional": ["text", "cross"], "bidirectional": ["text", "text_image", "image_text"]}[direction]
    clip = start_model(saved_clip(processor, tmp_path / "clip"), "matching", data["train"], **settings)[0]
    model, processor = start_model(None, "matching", data["train"], **settings)
    assert clip.config.matching_branches == model.config.matching_branches == expected
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for same in ({}, {"matching_branches": ["cross", "text"]}):
        assert start_model(str(tmp_path), None, data["train"], **same)[0].matching.kept == expected
    with pytest.raises(M3ELError, match=r"has the matching_branches \['text', .*, not \['text'\]: leave"):
        start_model(str(tmp_path), None, data["train"], matching_branches=["text"])


@pytest.mark.parametrize("base", [False, True])
def test_branches_of_the_other_direction_are_one_line(processor, data, tmp_path, base):
    start = saved_clip(processor, tmp_path) if base else None
    with pytest.raises(M3ELError, match=r"matching_branches is \['text_image'\]: the unidirectional form has [^\n]+$"):
        start_model(start, "matching", data["train"], matching_branches=["text_image"])


def test_a_saved_model_is_trained_on_as_it_is(processor, data, tmp_path):
    model, processor = start_model(None, "matching", data["train"], seed=5, template="D")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, loaded = start_model(str(tmp_path), None, data["train"], branch_weight=0.5)
    assert loaded.template == "D"
    assert again.config.head == "matching" and again.config.branch_weight == 0.5
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)
    assert start_model(str(tmp_path), "matching", data["train"], template="N")[1].template == "N"
    with pytest.raises(M3ELError, match="has the head matching, not clip: leave head out"):
        start_model(str(tmp_path), "clip", data["train"])
    with pytest.raises(M3ELError, match="has the matching_direction unidirectional, not bidirectional"):
        start_model(str(tmp_path), None, data["train"], matching_direction="bidirectional")


def test_adapters_alone_are_no_start(processor, data, tmp_path):
    tiny_model(processor).save_pretrained(tmp_path / "base")
    add_lora(ClipNDModel.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapters")
    with pytest.raises(M3ELError, match="holds adapters alone"):
        start_model(str(tmp_path / "adapters"), None, data["train"])


@pytest.mark.parametrize("name", MATCHING_ONLY)
def test_a_setting_of_another_head_is_refused(name, data):
    value = {"matching_direction": "bidirectional", "matching_branches": ["text"]}.get(name, 1.0)
    with pytest.raises(M3ELError, match=f"{name} is for the matching head"):
        start_model(None, None, data["train"], **{name: value})
