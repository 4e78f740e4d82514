"""A table drawn: bars, lines or a heatmap of its estimates."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from m3el_hf.evaluation.report.cells import DASH, number, printable, text
from m3el_hf.evaluation.report.document import SHARE, SHARES, DataTable, Estimate

STRONG = "#1f6fb2"

COLOURS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#9aa0a6", "#d55e00", "#8b6fb8")
"""Told apart with any colour vision (most are Okabe and Ito's); blue is for the strong system."""

MARKERS = "sD^vPXo"

WIDTH = 8.0
"""Inches."""

SETTINGS: dict[Any, Any] = {
    "font.size": 9.0,
    "text.parse_math": False,  # names hold what they hold
    "svg.fonttype": "none",  # letters that matplotlib's font lacks are the browser's to find
    "svg.hashsalt": "m3el-hf",  # the same figures give the same file
}


@dataclass(frozen=True)
class Ink:
    """The colours of what is no data."""

    paper: str
    text: str
    line: str


LIGHT, DARK = Ink("#ffffff", "#1b1b1b", "#8a8a8a"), Ink("#121212", "#e8e8e8", "#8f8f8f")


@dataclass(frozen=True)
class Series:
    """One column's estimates, in percent if they are shares.

    Attributes:
        name: The column's.
        unit: The column's.
        colour: What it is drawn in.
        marker: Of its points in a line.
        rows: float [k, 4]: row, value, and the ends of the error bar: of the interval, else of one deviation over
            seeds, else the value itself.
    """

    name: str
    unit: str
    colour: str
    marker: str
    rows: NDArray[np.float64]

    @property
    def scale(self) -> float:
        """How many of what is drawn are one of what the table holds."""
        return _scale(self.unit)


def png(table: DataTable) -> bytes:
    """Draws a table's chart with its title, as a file of its own; the same bytes for the same figures."""
    return _saved(table, LIGHT, table.title, format="png", dpi=150, metadata={"Software": None})


def svg(table: DataTable, ink: Ink = LIGHT) -> bytes:
    """Draws a table's chart for the page, where the title stands above it; the same bytes for the same figures."""
    return _saved(table, ink, "", format="svg", transparent=True, metadata={"Date": None})


def about(table: DataTable) -> str:
    """Says what a chart shows, for those who do not see it."""
    kind = {"bars": "Bar chart", "lines": "Line chart", "heatmap": "Heatmap"}[table.chart or "bars"]
    names = ", ".join(one.name for one in _series(table))
    chance = "" if table.chance is None or table.chart == "heatmap" else "; chance is a dashed line"
    return f"{kind} of “{table.title}”: {names} by {table.columns[0].name}{chance}. The table has its figures."


def draw(table: DataTable, ink: Ink = LIGHT, title: str = "") -> Figure:
    """Draws a table's chart.

    Args:
        table: One with a chart.
        ink: The colours around the data.
        title: Stands above; empty for none.
    """
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained", facecolor=ink.paper)
    axes = figure.subplots()
    series = _series(table)
    if not series:
        axes.text(0.5, 0.5, "nothing to draw: the table has no estimates", ha="center", color=ink.text)
        axes.set_axis_off()
    else:
        {"bars": _bars, "lines": _lines, "heatmap": _heatmap}[table.chart or "bars"](table, series, axes, ink)
    if title:
        figure.suptitle(printable(title), x=0.01, ha="left", color=ink.text, fontsize="large", wrap=True)
    axes.set_facecolor("none")
    axes.tick_params(colors=ink.text, which="both")
    axes.xaxis.label.set_color(ink.text)
    axes.yaxis.label.set_color(ink.text)
    axes.spines[:].set_color(ink.line)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _saved(table: DataTable, ink: Ink, title: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context(SETTINGS):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box in a PNG
        draw(table, ink, title).savefig(buffer, **options)
    return buffer.getvalue()


def _series(table: DataTable) -> list[Series]:
    """The columns that are drawn: those that hold estimates in the unit of the first of these.

    Where chance is a line, a column of that name is not drawn again.
    """
    has_line = table.chance is not None and table.chart != "heatmap"
    found = {
        place: [(row, value) for row, line in enumerate(table.rows) if isinstance(value := line[place], Estimate)]
        for place, column in enumerate(table.columns)
        if place and not (has_line and column.name == "chance")
    }
    drawn = [place for place, values in found.items() if values]
    drawn = [place for place in drawn if table.columns[place].unit == table.columns[drawn[0]].unit]
    colours = iter(COLOURS * (1 + len(drawn) // len(COLOURS)))
    series = []
    for order, place in enumerate(drawn):
        column = table.columns[place]
        scale = _scale(column.unit)
        rows = [(row, scale * value.value, *(scale * end for end in _ends(value))) for row, value in found[place]]
        colour = STRONG if column.is_strong or len(drawn) == 1 else next(colours)
        marker = "o" if column.is_strong else MARKERS[order % len(MARKERS)]
        series.append(
            Series(printable(column.name), printable(column.unit), colour, marker, np.array(rows, dtype=np.float64))
        )
    return series


def _scale(unit: str) -> float:
    return 100.0 if unit in SHARES else 1.0


def _ends(value: Estimate) -> tuple[float, float]:
    if value.low is not None and value.high is not None:
        return value.low, value.high
    spread = value.deviation or 0.0
    return value.value - spread, value.value + spread


def _measure(table: DataTable, series: list[Series]) -> str:
    """What the axis of figures says: what is measured, its unit, and what the error bars are."""
    estimates = [value for row in table.rows for value in row if isinstance(value, Estimate)]
    parts = [" in ".join([series[0].name] * (len(series) == 1) + [series[0].unit] * bool(series[0].unit))]
    if any(value.low is not None for value in estimates):
        parts.append("with 95 % intervals")
    elif any(value.deviation is not None for value in estimates):
        parts.append("± deviation over seeds")
    return ", ".join(part for part in parts if part)


def _names(table: DataTable) -> list[str]:
    return [printable(text(row[0], table.columns[0].unit)) for row in table.rows]


def _bars(table: DataTable, series: list[Series], axes: Any, ink: Ink) -> None:
    """A group a row, a bar a column; lying where the rows' names are too long to stand side by side."""
    drawn = sorted({int(row) for one in series for row in one.rows[:, 0]})
    names = [_names(table)[row] for row in drawn]
    means_apart = 0.4 * (np.array(drawn) >= len(table.body))
    centres = dict(zip(drawn, np.arange(len(drawn)) + means_apart, strict=True))
    width = 0.84 / len(series)
    lying = sum(len(name) + 2 for name in names) > 90
    for order, one in enumerate(series):
        at = [centres[int(row)] + (order - (len(series) - 1) / 2) * width for row in one.rows[:, 0]]
        values, low, high = one.rows[:, 1:].T
        error = {"xerr" if lying else "yerr": np.maximum(0, [values - low, high - values])}
        style = {"elinewidth": 0.9, "ecolor": ink.text, "alpha": 0.7}
        bars = axes.barh if lying else axes.bar
        bars(at, values, 0.9 * width, color=one.colour, label=one.name, error_kw=style, **error)
    if lying:
        axes.figure.set_size_inches(WIDTH, 1.2 + len(drawn) * max(0.3, 0.17 * len(series)))
        axes.set_yticks(list(centres.values()), names)
        axes.invert_yaxis()
        axes.set_xlabel(_measure(table, series))
    else:
        axes.set_xticks(list(centres.values()), names)
        axes.set_ylabel(_measure(table, series))
    ends = np.concatenate([one.rows[:, 1:].ravel() for one in series])
    if series[0].unit == SHARE and ends.min() >= 0:
        (axes.set_xlim if lying else axes.set_ylim)(0, 100 if ends.max() > 50 else None)
    elif ends.min() < 0:
        (axes.axvline if lying else axes.axhline)(0, color=ink.line, linewidth=0.8)
    if table.chance is not None:
        value, label = _chance(table, series, axes, ink, lying)
        along = (axes.get_xaxis_transform if lying else axes.get_yaxis_transform)()
        place = (value, 1.01) if lying else (1.01, value)
        align = {"ha": "center", "va": "bottom"} if lying else {"ha": "left", "va": "center"}
        axes.text(*place, label, transform=along, color=ink.text, **align)
    if len(series) > 1:
        axes.figure.legend(
            loc="outside lower center",
            ncols=-(-len(series) // -(-len(series) // 4)),
            frameon=False,
            labelcolor=ink.text,
        )


def _chance(table: DataTable, series: list[Series], axes: Any, ink: Ink, lying: bool) -> tuple[float, str]:
    """Draws the line of chance; returns where it is, and its label."""
    value = float(table.chance or 0) * series[0].scale
    (axes.axvline if lying else axes.axhline)(value, color=ink.text, linewidth=1, linestyle="--")
    return value, f"chance {number(table.chance or 0.0, series[0].unit)} {series[0].unit}".strip()


def _lines(table: DataTable, series: list[Series], axes: Any, ink: Ink) -> None:
    """A line a column, along the rows; the first column's numbers are to scale, its texts in their order."""
    rows = len(table.body)
    firsts = [row[0] for row in table.body]
    numeric = all(isinstance(first, int | float) for first in firsts)
    x = np.array([float(first) for first in firsts] if numeric else range(rows), dtype=np.float64)  # type: ignore[arg-type]
    labels = []
    for one in series:
        points = one.rows[one.rows[:, 0] < rows]
        if not len(points):
            continue
        points = points[np.argsort(x[points[:, 0].astype(int)], kind="stable")]
        at, (values, low, high) = x[points[:, 0].astype(int)], points[:, 1:].T
        style = {"linewidth": 2.2 if one.colour == STRONG else 1.5, "markersize": 4.5, "marker": one.marker}
        axes.plot(at, values, color=one.colour, label=one.name, **style)
        axes.fill_between(at, low, high, color=one.colour, alpha=0.18, linewidth=0)
        labels.append((values[-1], one.name, one.colour))
    if table.chance is not None:
        labels.append((*_chance(table, series, axes, ink, lying=False), ink.text))
    if not numeric:
        axes.set_xticks(range(rows), _names(table)[:rows], rotation=30 if rows > 8 else 0)
    elif x.min() > 0 and x.max() > 100 * x.min():  # over two decades
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value) if value >= 1 else value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(printable(" in ".join(part for part in (table.columns[0].name, table.columns[0].unit) if part)))
    axes.set_ylabel(_measure(table, series))
    axes.grid(axis="y", color=ink.line, alpha=0.25, linewidth=0.6)
    _label_ends(axes, labels)


def _label_ends(axes: Any, labels: list[tuple[float, str, str]]) -> None:
    """Writes each line's name to the right of its end, apart from each other."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    placed: list[float] = []
    for value, name, colour in sorted(labels):
        placed.append(max(value, placed[-1] + gap) if placed else value)
        axes.annotate(
            name,
            (1, value),
            (1.03, placed[-1]),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontweight="bold" if colour == STRONG else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
        )


def _heatmap(table: DataTable, series: list[Series], axes: Any, ink: Ink) -> None:
    """A cell a figure, with its number in it: shares from 0 to 100, differences from orange to purple."""
    values = np.full((len(table.rows), len(series)), np.nan)
    for place, one in enumerate(series):
        values[one.rows[:, 0].astype(int), place] = one.rows[:, 1]
    most = np.nanmax(np.abs(values)) or 1.0
    signed = bool(np.nanmin(values) < 0)
    top = 100.0 if series[0].unit == SHARE and not signed else most
    colours = matplotlib.colormaps["PuOr" if signed else "Blues"]
    scale = Normalize(-most if signed else 0.0, top)
    axes.figure.set_size_inches(WIDTH, 1.0 + 0.34 * len(values))
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=scale, edgecolors=ink.paper, linewidth=1.5)
    for row, line in enumerate(values):
        for place, value in enumerate(line):
            red, green, blue, _ = colours(scale(value))
            is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            colour = ink.text if np.isnan(value) else LIGHT.text if is_light else LIGHT.paper
            shown = DASH if np.isnan(value) else number(float(value) / series[0].scale, series[0].unit)
            axes.text(place + 0.5, row + 0.5, shown, ha="center", va="center", color=colour)
    if table.summary_rows:
        axes.axhline(len(table.body), color=ink.text, linewidth=1.5)
    axes.set_xticks(np.arange(len(series)) + 0.5, [one.name.replace(" ", "\n") for one in series])
    axes.set_yticks(np.arange(len(values)) + 0.5, _names(table))
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
