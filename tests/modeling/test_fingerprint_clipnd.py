from __future__ import annotations

import pytest
import torch

from m3el_hf import ClipNDModel
from m3el_hf.modeling import fingerprint_clipnd
from tests.modeling.conftest import LABELS, MENTIONS, TASK_ROWS, encode_all, forward_inputs, prepare


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
