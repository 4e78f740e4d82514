from __future__ import annotations

import pytest
import torch

from m3el_hf import M3ELError
from m3el_hf.training.start import start_model
from tests.conftest import tiny_model


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
    clip.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    model, loaded = start_model(str(tmp_path), "matching", data["train"], template="D")
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
