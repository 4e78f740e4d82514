"""What several seeds say together, and which differences are more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.outcomes import Evaluation, Mask
from m3el_hf.evaluation.ranking import Difference, bootstrap_means, holm, paired_difference, share_interval
from m3el_hf.evaluation.report import Estimate

LEVEL = 0.05

RESAMPLES = 10_000
"""Of a comparison: its p-value is multiplied by the number of comparisons, so it must be able to be small."""

RULE = (
    "A difference counts as more than noise where its 95 % interval over the rows (whole entities drawn with "
    "replacement, each row's value averaged over the seeds) excludes zero, every seed has the same sign, and the "
    f"p-value of a paired randomisation test, corrected for the number of comparisons (Holm), is below {LEVEL}. All "
    "else is within noise."
)


@dataclass(frozen=True)
class Seeds:
    """One system's values on the same rows, once a seed.

    Attributes:
        values: ``[S, m]``; the mean of a seed's values is its figure.
        golds: ``[m]``, the rows' entities: several rows of one are not independent.
    """

    values: NDArray[np.float64]
    golds: NDArray[Any]

    @classmethod
    def of(
        cls, evaluations: Sequence[Evaluation], system: str, task: str | None = None, where: Mask | None = None
    ) -> Seeds | None:
        """Accuracies on a task, or the mean over tasks where it is None; None where there are none.

        Raises:
            M3ELError: If the rows that count differ between seeds.
        """
        found = [one.values(system, task, where=where) for one in evaluations]
        known = [pair for pair in found if pair is not None]
        if len(known) < len(found):
            return None
        rows = known[0][0]
        if any(not np.array_equal(rows, others) for others, _ in known):
            raise M3ELError(f"seeds of {system} were measured on different rows: measure all on the same")
        return cls(np.stack([values for _, values in known]), evaluations[0].facts["gold"][rows])

    @property
    def estimate(self) -> Estimate:
        """The mean over seeds, its interval over rows, and the standard deviation of the seeds' figures."""
        low, high = share_interval(self.values.mean(0), self.golds)
        deviation = float(self.values.mean(1).std(ddof=1)) if len(self.values) > 1 else None
        return Estimate(float(self.values.mean()), low, high, self.values.shape[1], deviation)


@dataclass(frozen=True)
class Comparison:
    """A difference of two systems.

    Attributes:
        difference: Over the seeds' mean values, paired by row.
        p_value: Corrected for how many comparisons are made together.
        seeds_agree: Whether it has the same sign with every seed.
    """

    difference: Difference
    p_value: float
    seeds_agree: bool

    @property
    def is_noise(self) -> bool:
        """Whether it is within noise, by `RULE`."""
        return self.difference.low <= 0 <= self.difference.high or not self.seeds_agree or self.p_value >= LEVEL

    @property
    def estimate(self) -> Estimate:
        """The difference as a figure."""
        return Estimate(self.difference.mean, self.difference.low, self.difference.high, self.difference.n)

    @property
    def verdict(self) -> str:
        """For a table."""
        return "within noise" if self.is_noise else "higher" if self.difference.mean > 0 else "lower"

    @property
    def said(self) -> str:
        """For a sentence that begins with what is compared."""
        low, high = 100 * self.difference.low, 100 * self.difference.high
        p_value = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        interval = f"95 % interval {low:+z.1f} to {high:+z.1f}, {p_value}"
        points = 100 * self.difference.mean
        if self.is_noise:
            return f"differs by {points:+z.1f} points, which is within noise ({interval})"
        return f"is {abs(points):.1f} points {self.verdict} ({interval})"


def compare(pairs: Sequence[tuple[Seeds, Seeds]]) -> list[Comparison]:
    """Compares the first of each pair with the second, on the same rows; all are made together, so all are corrected.

    The correction is Holm's.

    Raises:
        M3ELError: If the rows of a pair differ.
    """
    if any(not np.array_equal(one.golds, other.golds) for one, other in pairs):
        raise M3ELError("systems are compared by row: measure both on the same rows")
    found = [
        paired_difference(one.values.mean(0), other.values.mean(0), one.golds, resamples=RESAMPLES)
        for one, other in pairs
    ]
    corrected = holm([one.p_value for one in found])
    agreeing = [len({*np.sign(one.values.mean(1) - other.values.mean(1))}) == 1 for one, other in pairs]
    return [Comparison(*values) for values in zip(found, corrected, agreeing, strict=True)]


def unpaired(one: Seeds, other: Seeds, resamples: int = RESAMPLES) -> tuple[Estimate, bool]:
    """Compares two groups of rows: the difference with its interval, and whether every seed has the same sign.

    Entities are drawn with replacement within each group.
    """
    mine, theirs = (
        bootstrap_means(part.values.mean(0), part.golds, seed=seed, resamples=resamples)
        for seed, part in enumerate((one, other))  # draws that differ, for the groups are independent
    )
    low, high = np.quantile(mine - theirs, [0.025, 0.975])
    signs = np.sign(one.values.mean(1) - other.values.mean(1))
    return Estimate(float(one.values.mean() - other.values.mean()), float(low), float(high)), len({*signs}) == 1


def percent(estimate: Estimate) -> str:
    """A figure for a sentence."""
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.1f} %"
    interval = f"95 % interval {100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
    spread = f", ± {100 * estimate.deviation:.1f} over seeds" if estimate.deviation is not None else ""
    return f"{100 * estimate.value:.1f} % ({interval}{spread}, n = {estimate.n})"
