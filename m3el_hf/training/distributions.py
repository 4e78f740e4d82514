"""Which tasks and texts are drawn how often, as settings say it. No torch here: settings are read before it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS, TEMPLATES

Weights = Mapping[str, float]


def parse_stages(text: str) -> list[tuple[float, Weights]]:
    """Reads which tasks are drawn: from which share of the run on, and with which weights.

    Args:
        text: ``"uniform"``; weights as in ``"t2t=1,it2it=2"``; or stages, parted by semicolons, of which all but the
            first say when they begin, as in ``"t2t=1; 0.3: uniform"``.

    Raises:
        M3ELError: If it cannot be read.
    """
    stages: list[tuple[float, Weights]] = []
    for stage in text.split(";"):
        begin, _, weights = stage.rpartition(":")
        try:
            start = float(begin) if begin.strip() else 0.0
        except ValueError:
            start = math.nan
        if not (0 < start < 1 if stages else start == 0) or (stages and start <= stages[-1][0]):
            raise M3ELError(
                f"tasks is {text!r}: each stage but the first begins at a share, as in 'uniform; 0.5: t2t=1'"
            )
        uniform = dict.fromkeys(TASKS, 1.0)
        stages.append((start, uniform if weights.strip() == "uniform" else _parse("tasks", weights, tuple(TASKS))))
    return stages


def parse_templates(text: str | None) -> Weights | None:
    """Reads with which weights an entity's text is drawn, as in ``"N=1,D=1,ND=2"``; None for none.

    Raises:
        M3ELError: If it cannot be read.
    """
    return None if text is None else _parse("entity_text", text, tuple(TEMPLATES))


def _parse(name: str, text: str, known: Sequence[str]) -> Weights:
    weights = {}
    for part in text.split(","):
        key, _, value = (one.strip() for one in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if key not in known or key in weights or not 0 <= weight < math.inf:
            raise M3ELError(f"{name} is {text.strip()!r}: give each weight once, as in {known[0]}=1,{known[-1]}=2")
        weights[key] = weight
    if not any(weights.values()):
        raise M3ELError(f"{name} is {text.strip()!r}: some weight must be above 0")
    return weights


def weights_at(stages: Sequence[tuple[float, Weights]], share: float) -> Weights:
    """The weights of the stage that a share of the run lies in."""
    return next(weights for start, weights in reversed(stages) if share >= start)
