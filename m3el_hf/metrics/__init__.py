"""`evaluate` modules, each the folder of a Hub Space."""

from __future__ import annotations

from pathlib import Path

import evaluate

LINKING_ACCURACY = Path(__file__).parent / "linking_accuracy"
"""The folder of the `linking_accuracy` metric."""


def load_metric(config: str | None = None) -> evaluate.EvaluationModule:
    """Loads the `linking_accuracy` metric of this package.

    Args:
        config: ``"padded"`` for rows of scores that are padded to one length, ``"ranked"`` for lists of entity ids,
            best first. None for rows of scores.

    Raises:
        M3ELError: If there is no such config.

    Example:
        >>> load_metric().compute(scores=[[1.0, 1.0, 1.0]], references=[2])["accuracy"]  # all alike is chance
        0.3333333333333333
        >>> load_metric("ranked").compute(predictions=[["Q1", "Q2"]], references=["Q2"])["mrr"]
        0.5
    """
    return evaluate.load(str(LINKING_ACCURACY), config, keep_in_memory=True)
