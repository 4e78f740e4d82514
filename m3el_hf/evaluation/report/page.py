"""The report as one HTML page: it needs no other file, no network, and to be read no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import jinja2

from m3el_hf.evaluation.report import charts
from m3el_hf.evaluation.report.cells import (
    common_unit,
    counts,
    described,
    deviation,
    interval,
    number,
    of_words,
    places,
    setting_line,
    text,
    with_counts,
)
from m3el_hf.evaluation.report.document import Column, DataTable, Estimate, Report, Value

KINDS = ("task", "topic", "system")
"""What can be filtered by."""

OPEN_EXAMPLES = 24
"""More wait behind a click."""

_FORMS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF87a": "gif", b"GIF89a": "gif"}


@dataclass(frozen=True)
class Cell:
    """A value as shown.

    Attributes:
        text: The figure, text or dash.
        small: What is known of its error, and its n where that is its own; one a line.
        place: Where it comes among the column's values, from 0; None last, and for a mean.
        kind: ``"figure"``, ``"text"`` or ``"none"``, for its look.
    """

    text: str
    small: tuple[str, ...]
    place: int | None
    kind: str


@dataclass(frozen=True)
class Row:
    """A row as shown, with what filters look at."""

    cells: tuple[Cell, ...]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Shown:
    """A table as shown.

    Attributes:
        table: The table.
        columns: Its columns, and ``n`` where it needs one.
        words: Whether each holds texts alone.
        rows: The rows that are no means.
        means: The rows that are.
        unit: What all figures are in, which the setting says; empty where headings say it.
        setting: The line below.
        chart: The chart's alternative text and its pictures for light and dark pages, or None.
    """

    table: DataTable
    columns: tuple[Column, ...]
    words: list[bool]
    rows: tuple[Row, ...]
    means: tuple[Row, ...]
    unit: str
    setting: str
    chart: tuple[str, str, str] | None


def page(report: Report) -> str:
    """Renders a report."""
    return _template().render(
        report=report,
        tables=[_shown(table) for table in report.tables],
        filters=_filters(report),
        kinds=KINDS,
        opened=OPEN_EXAMPLES,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"picture": _picture, "described": described}
    source = files("m3el_hf.evaluation.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _shown(table: DataTable) -> Shown:
    columns, rows = with_counts(table)
    body = len(table.body)
    means: list[int | None] = [None] * table.summary_rows  # they have no place among the others
    order = [places([row[column] for row in rows[:body]]) + means for column in range(len(columns))]
    own_n = counts(table).in_cells
    shown = tuple(
        Row(tuple(_cell(*parts, own_n) for parts in zip(row, columns, ranks, strict=True)), tags)
        for row, ranks, tags in zip(rows, zip(*order, strict=True), table.tags or [{}] * len(rows), strict=True)
    )
    chart = None
    if table.chart:
        light, dark = (_data_url("svg+xml", charts.svg(table, ink)) for ink in (charts.LIGHT, charts.DARK))
        chart = (charts.about(table), light, dark)
    setting = setting_line(table)
    if any(interval(value) for row in rows for value in row):
        setting += " · small type: 95 % intervals"
    words = of_words(columns, rows)
    return Shown(table, columns, words, shown[:body], shown[body:], common_unit(table), setting, chart)


def _cell(value: Value, column: Column, place: int | None, own_n: bool) -> Cell:
    small = [interval(value, column.unit), deviation(value, column.unit)]
    if own_n and isinstance(value, Estimate) and value.n is not None:
        small.append(f"n = {number(value.n)}")
    kind = "none" if value is None else "text" if isinstance(value, str) else "figure"
    return Cell(text(value, column.unit), tuple(part for part in small if part), place, kind)


def _filters(report: Report) -> dict[str, list[str]]:
    """By kind, what there is to choose, in the order met; a kind without a choice is left out."""
    tags: list[Mapping[str, str]] = [tags for table in report.tables for tags in table.tags]
    tags += [{"task": one.task, "topic": one.topic, "system": one.system} for one in report.examples]
    found = {kind: list(dict.fromkeys(one[kind] for one in tags if one.get(kind))) for kind in KINDS}
    return {kind: values for kind, values in found.items() if len(values) > 1}


def _picture(data: bytes) -> str:
    """A picture's address that holds it; empty if it is in no form that browsers show."""
    form = "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""
    form = next((name for start, name in _FORMS.items() if data.startswith(start)), form)
    return _data_url(form, data) if form else ""


def _data_url(form: str, data: bytes) -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"
