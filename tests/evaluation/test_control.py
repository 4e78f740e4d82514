from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from m3el_hf import TASKS
from m3el_hf.data.collator import LinkingCollator
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation import control
from m3el_hf.evaluation.control import MentionBlind, average_mention
from m3el_hf.evaluation.evaluator import evaluate, score_candidates
from m3el_hf.evaluation.systems import ModelSystem
from tests.conftest import tiny_model
from tests.evaluation.test_evaluator import dataset, make_row


def test_the_average_mention_is_the_mean_over_what_mentions_have(model, processor, monkeypatch):
    monkeypatch.setattr(control, "BATCH_SIZE", 2)
    rows = [make_row(0), make_row(1, mention_image=None), make_row(2, context=None), make_row(3), make_row(4)]
    average = average_mention(ModelSystem("model", model, processor), dataset(rows))
    assert len(average) == 1
    with torch.no_grad():
        alone = [
            model.encode_mentions(**processor.mentions([row["mention"]], [row["context"]], [row["mention_image"]]))
            for row in rows
        ]
    pictured = [one for one in alone if one.has_image[0]]
    assert len(pictured) == 4

    def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return sum(values) / len(values)

    expected = {"text": mean([one.text[0] for one in alone]), "image": mean([one.image[0] for one in pictured])}
    expected = {name: value / value.norm() for name, value in expected.items()}
    if model.config.head == "matching":
        for name in ("text_keys", "text_values"):
            expected[name] = mean([token for one in alone for token in getattr(one, name)[0]])[None]
        for name in ("image_keys", "image_values"):
            expected[name] = mean([token for one in pictured for token in getattr(one, name)[0]])[None]
        for name in ("image_cls", "cross"):
            expected[name] = mean([getattr(one, name)[0] for one in pictured])
        assert average.text_mask.all()
    for name, value in expected.items():
        torch.testing.assert_close(getattr(average, name)[0], value, rtol=1e-4, atol=1e-5)
    assert average.has_text.all() and average.has_image.all()


def test_without_a_picture_the_average_has_none(model, processor):
    average = average_mention(
        ModelSystem("model", model, processor), dataset(make_row(number, mention_image=None) for number in range(3))
    )
    assert (average.has_text.tolist(), average.has_image.tolist()) == ([True], [False])
    mentions = average.show(text=False)
    assert not (mentions.has_text | mentions.has_image).any()


def test_the_control_scores_alike_whatever_the_mention_is(model, processor):
    rows = [make_row(0)]
    for number in (1, 2):
        other = make_row(number)
        rows.append(rows[0] | {name: other[name] for name in ("mention", "context", "mention_image")})
    system = ModelSystem("model", model, processor)
    average = average_mention(system, dataset(rows))
    blind, seeing = score_candidates(MentionBlind("control", system, average), rows), score_candidates(system, rows)
    for name in TASKS:
        assert all(np.array_equal(one, blind[name][0]) for one in blind[name])
        assert not np.allclose(seeing[name][0], seeing[name][1], rtol=1e-3)
    entities = model.encode_entities(**LinkingCollator(processor)(rows[:1]).entities)
    with torch.no_grad():
        expected = model.score(average.show(image=False), entities.show(text=False)).total[0]
    np.testing.assert_allclose(blind["t2i"][0], expected, rtol=1e-5)


def test_the_control_is_at_chance_where_the_gold_stands_anywhere(processor):
    """Random weights know no shortcut: the control is right about as often as a draw, whatever the head."""
    rows = dataset(make_row(number) for number in range(60))
    for head in ("clip", "matching", "pooled"):
        system = ModelSystem("model", tiny_model(processor, head), processor)
        found = evaluate([MentionBlind("control", system, average_mention(system, rows))], rows, [TASKS["it2it"]])
        assert abs(found.mean("control") - 1 / 3) < 0.2


def test_measuring_the_average_leaves_the_model_in_the_mode_that_it_found(processor):
    model, rows = tiny_model(processor), dataset([make_row(0)])
    for training in (True, False):
        model.train(training)
        average_mention(ModelSystem("model", model, processor), rows)
        assert model.training is training


def test_rows_without_any_mention_are_left_out_and_only_such_rows_are_an_error(model, processor):
    system = ModelSystem("model", model, processor)
    blank = {"mention": "", "context": None, "mention_image": None}
    some = average_mention(system, dataset([make_row(0), make_row(1, **blank)]))
    alone = average_mention(system, dataset([make_row(0)]))
    torch.testing.assert_close(some.text, alone.text)
    with pytest.raises(M3ELError, match="nothing to average"):
        average_mention(system, dataset([make_row(0, **blank)]))
