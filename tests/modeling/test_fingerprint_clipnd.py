from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from m3el_hf import ClipNDModel
from m3el_hf.modeling import fingerprint_clipnd
from tests.modeling.conftest import HEADS, LABELS, MENTIONS, TASK_ROWS, encode_all, forward_inputs, headed, prepare


def test_what_other_weights_encoded_is_refused(model, processor):
    mentions, entities = encode_all(model, processor)
    assert mentions.fingerprint is not None
    weight = next(one for name, one in model.named_parameters() if name.endswith("fc1.weight"))
    with torch.no_grad():
        weight[0, 0] += 1e-3
    for score in (model.score, model.score_factorised):
        with pytest.raises(ValueError, match="encoded by other weights .* encode them again"):
            score(mentions, entities)
        with pytest.raises(ValueError, match="encoded by other weights"):
            score(model.encode_mentions(**prepare(processor.mentions, MENTIONS)), entities)
    model.score(*encode_all(model, processor))


def test_equal_weights_have_equal_fingerprints_wherever_they_come_from(model, processor, tmp_path):
    mentions, entities = encode_all(model, processor)
    model.save_pretrained(tmp_path)
    loaded = ClipNDModel.from_pretrained(tmp_path)
    other_mentions, other_entities = encode_all(loaded, processor)
    assert mentions.fingerprint == other_mentions.fingerprint == other_entities.fingerprint
    loaded.score(mentions, other_entities)
    with torch.no_grad():
        loaded.clip.logit_scale.fill_(1.0)  # which encoding does not read
    loaded.score(mentions, entities)


def test_training_computes_no_fingerprint(model, processor, monkeypatch):
    monkeypatch.setattr(fingerprint_clipnd, "_digest", lambda _: pytest.fail("costs time at each step"))
    model.train()
    mentions, entities = encode_all(model, processor)
    assert mentions.fingerprint is None
    model.score(mentions, entities)
    model(**forward_inputs(processor, TASK_ROWS), labels=LABELS)


def test_a_fingerprint_is_computed_once(model, processor, monkeypatch):
    computed = []
    digest = fingerprint_clipnd._digest
    monkeypatch.setattr(fingerprint_clipnd, "_digest", lambda weights: computed.append(1) or digest(weights))
    model.score(*encode_all(model, processor))
    model.score(*encode_all(model, processor))
    assert len(computed) == 1


def test_every_way_of_changing_weights_is_noticed(processor):
    """Fused optimizers and ``.data`` change weights without torch's count of changes."""

    def step(model: ClipNDModel, **options: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
        model(**forward_inputs(processor, TASK_ROWS), labels=LABELS).loss.backward()
        optimizer.step()

    def through_data(model: ClipNDModel) -> None:
        for one in model.parameters():
            one.data += 0.01

    changes: dict[str, Callable[[ClipNDModel], Any]] = {
        "loop": lambda model: step(model, foreach=False),
        "foreach": lambda model: step(model, foreach=True),
        "fused": lambda model: step(model, fused=True),
        "loaded": lambda model: model.load_state_dict(headed(processor, "clip", seed=1).state_dict(), strict=False),
        "assigned": lambda model: model.load_state_dict(
            headed(processor, "clip", seed=1).state_dict(), strict=False, assign=True
        ),
        "half": lambda model: model.half(),
        "rounded": lambda model: model.half().float(),
        "data": through_data,
    }
    for head in HEADS:
        for name, change in changes.items():
            model = headed(processor, head)
            _, entities = encode_all(model, processor)
            change(model)
            mentions, _ = encode_all(model, processor)
            assert mentions.fingerprint != entities.fingerprint, (head, name)
            with pytest.raises(ValueError, match="encoded by other weights"):
                model.score(mentions, entities)


def test_what_leaves_the_weights_as_they_are_leaves_the_fingerprint(model, processor):
    mentions, entities = encode_all(model, processor)
    model.to("cpu", torch.float32)
    model.load_state_dict({name: one.clone() for name, one in model.state_dict().items()})
    model.score(mentions, entities)
    model.load_state_dict({name: one.clone() for name, one in model.state_dict().items()}, assign=True)
    model.score(mentions, entities)


def test_adapters_that_are_merged_in_place_are_noticed(model, processor):
    adapted = get_peft_model(model, LoraConfig(target_modules=["fc1"], init_lora_weights=False))
    _, entities = encode_all(model, processor)
    for change in (adapted.merge_adapter, adapted.unmerge_adapter, adapted.merge_and_unload):
        change()
        with pytest.raises(ValueError, match="encoded by other weights"):
            model.score(encode_all(model, processor)[0], entities)
        _, entities = encode_all(model, processor)
