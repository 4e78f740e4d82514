from __future__ import annotations

import copy

import torch
from peft import PeftModel

from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.training.lora import add_lora


def scores(model, processor: ClipNDProcessor) -> torch.Tensor:
    with torch.no_grad():
        mentions = model.encode_mentions(**processor.mentions(["Kansas"], ["a band"], [torch.ones(3, 64, 64)]))
        entities = model.encode_entities(
            **processor.entities(["Kansas", "Kansas"], ["a state", "a band"], [torch.zeros(3, 64, 64), None])
        )
        return model.score(mentions, entities).total


def test_adapters_and_heads_survive_saving_loading_and_merging(model: ClipNDModel, processor, tmp_path):
    base, before = copy.deepcopy(model), scores(model, processor)
    trained = add_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
                assert "lora_" in name or "modules_to_save" in name
    expected = scores(trained, processor)
    assert not torch.allclose(expected, before, atol=1e-3)

    trained.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(scores(reloaded, processor), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(trained.merge_and_unload(), processor), expected, rtol=1e-4, atol=1e-4)


def test_both_towers_get_adapters_and_the_rest_of_them_is_frozen(model, processor):
    trained = add_lora(model, rank=2)
    adapted = {name for name, parameter in trained.named_parameters() if parameter.requires_grad and "lora_" in name}
    assert any("text_model" in name for name in adapted) and any("vision_model" in name for name in adapted)
    towers = ("text_model.", "vision_model.")
    frozen = {n: p for n, p in trained.named_parameters() if any(t in n for t in towers) and "lora_" not in n}
    assert frozen and not any(parameter.requires_grad for parameter in frozen.values())
    whole = {name for name, p in trained.named_parameters() if p.requires_grad} - adapted
    assert any("matching" in name for name in whole) == (model.config.head == "matching")
