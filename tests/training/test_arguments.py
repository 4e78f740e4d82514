from __future__ import annotations

import pytest

from m3el_hf import M3ELError
from m3el_hf.training.arguments import TrainingArguments


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train_epochs": 0},
        {"per_device_train_batch_size": 0},
        {"tasks_per_mention": 10},
        {"token_dropout": 1.0},
        {"learning_rate": 0.0},
        {"max_minutes": -1.0},
        {"eval_steps": 0},
    ],
)
def test_a_value_out_of_range_is_named(wrong):
    with pytest.raises(M3ELError, match=next(iter(wrong))):
        TrainingArguments(**wrong)
