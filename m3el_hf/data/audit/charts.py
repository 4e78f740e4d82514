"""The audit's charts: their figures, which are saved, and how they are drawn."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from m3el_hf.data.audit.measures import Measures
from m3el_hf.data.perceptual import NEAR_SAME

COLOURS = ("#1f6fb2", "#e8a33d", "#8b6fb8", "#5a9e6f")
"""One a series."""

POSITIONS_SHOWN = 20


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        key: Names its file.
        title: The heading.
        about: What it shows, for those who do not see it.
        kind: ``"lying bars"`` (one group a category), ``"bars"`` or ``"steps"``.
        x_label: What the categories, or the numbers ``x``, are.
        y_label: What is counted.
        x: The categories; of ``"steps"`` the numbers from 0.
        series: The values by the name of what they are of.
        mark: A number to draw a line at, with its label, or None.
    """

    key: str
    title: str
    about: str
    kind: str
    x_label: str
    y_label: str
    x: list[str]
    series: dict[str, list[float]]
    mark: tuple[float, str] | None = None

    def png(self) -> bytes:
        """Draws it; the same bytes for the same figures."""
        buffer = io.BytesIO()
        self.draw().savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()

    def draw(self) -> Figure:
        """Draws it."""
        lying = self.kind == "lying bars"
        height = 1.3 + 0.24 * len(self.x) * max(1, len(self.series)) if lying else 3.8
        figure = Figure(figsize=(8, max(2.6, height)), layout="constrained")
        axes = figure.subplots()
        {"lying bars": self._lying_bars, "bars": self._bars, "steps": self._steps}[self.kind](axes)
        if self.mark is not None:
            axes.axvline(self.mark[0], color="black", linewidth=1, linestyle="--", label=self.mark[1])
        axes.set_xlabel(self.y_label if lying else self.x_label)
        axes.set_ylabel(self.x_label if lying else self.y_label)
        axes.spines[["top", "right"]].set_visible(False)
        if len(self.series) > 1 or self.mark is not None:
            figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
        return figure

    def _lying_bars(self, axes: Any) -> None:
        pd.DataFrame(self.series).plot.barh(ax=axes, width=0.84, color=list(COLOURS), legend=False)
        for bars in axes.containers:
            axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
        axes.set_yticks(range(len(self.x)), self.x, parse_math=False)  # names of the data, whatever signs they hold
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))

    def _bars(self, axes: Any) -> None:
        pd.DataFrame(self.series).plot.bar(ax=axes, width=0.84, color=list(COLOURS), legend=False)
        for bars in axes.containers if len(self.x) <= 10 else ():
            axes.bar_label(bars, fmt=lambda value: f"{value:.1f}" if value else "", fontsize="small")
        axes.set_xticks(range(len(self.x)), self.x, rotation=0)

    def _steps(self, axes: Any) -> None:
        for (name, values), colour in zip(self.series.items(), COLOURS, strict=False):
            edges = np.arange(len(values) + 1) - 0.5
            axes.stairs(values, edges, color=colour, label=name, fill=True, alpha=0.35)
            axes.stairs(values, edges, color=colour)


def charts(measures: Measures) -> list[Chart]:
    """Returns the charts that have something to show."""
    made = [_rows(measures), _positions(measures), _distances(measures)]
    return [chart for chart in made if chart is not None]


def _rows(m: Measures) -> Chart:
    series = {
        name: [float((rows & (m.topic == number)).sum()) for number in range(len(m.scan.topics))]
        for name, rows in m.splits.items()
    }
    about = "Number of rows of each topic, one bar a split."
    return Chart("rows", "Rows by topic and split", about, "lying bars", "topic", "rows", list(m.scan.topics), series)


def _positions(m: Measures) -> Chart | None:
    if m.scan.is_knowledge_base:
        return None
    shown = min(POSITIONS_SHOWN, max(1, int(m.count.max())))
    series = {
        name: _shares(np.bincount(np.minimum(places[places >= 0], shown), minlength=shown)[:shown], (places >= 0).sum())
        for name, places in (("in the source", m.released), ("here", m.answer))
    }
    ranks = [str(number + 1) for number in range(shown)]
    about = "Share of rows by the gold's position among the candidates, in the source and here."
    label = "position of the gold among the candidates"
    return Chart("position", "Position of the gold", about, "bars", label, "% of rows", ranks, series)


def _distances(m: Measures) -> Chart | None:
    control = "a row's mention and another row's gold" if m.scan.is_knowledge_base else "mention and distractor"
    found = {"mention and gold": m.gold_distance, control: m.control_distance}
    if not (m.gold_distance >= 0).any():
        return None
    series = {
        name: _shares(np.bincount(distances[distances >= 0], minlength=65), (distances >= 0).sum())
        for name, distances in found.items()
    }
    return Chart(
        "distance",
        "How much pictures look alike",
        "Share of pairs by the number of bits in which the perceptual hashes of both pictures differ: of mention and "
        "gold and, as the control, of pairs that do not belong together.",
        "steps",
        "differing bits of the perceptual hash, of 64",
        "% of pairs",
        [str(bits) for bits in range(65)],
        series,
        (NEAR_SAME + 0.5, f"near-same: at most {NEAR_SAME}"),
    )


def _shares(counts: NDArray[np.int64], of: int) -> list[float]:
    """Percent, to three decimals."""
    return [round(100 * float(count) / max(1, int(of)), 3) for count in counts]
