"""The figures of a report for cards, papers, machines and terminals."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Integral, Real
from typing import Any, Literal

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from m3el_hf.data.card import plain
from m3el_hf.evaluation.report.cells import (
    DASH,
    counts,
    described,
    deviation,
    heading,
    number,
    of_words,
    printable,
    row_name,
    setting_line,
    text,
    with_counts,
)
from m3el_hf.evaluation.report.document import SHARES, Column, DataTable, Estimate, Example, Report, Value

TAGS = ("task", "topic", "system")
FIELDS = ("report", "table", "row", *TAGS, "column", "unit", "value", "low", "high", "n", "deviation", "text")
SETTING_FIELDS = ("split", "protocol", "ties", "seed")

MOST_IN_CELL = 20
"""Longer texts stand below a table in a terminal; a figure with its deviation and n is shorter."""

TERMINAL, GAP = 80, 2
"""Columns of a terminal, and of the space between two columns of a table."""

_LATEX = {sign: f"\\{sign}" for sign in "{}$&#%_"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # at the start of a row it would be an option of the line break before
    "−": "$-$",
    "–": "--",
    "±": r"$\pm$",
}


def markdown(report: Report, level: int) -> str:
    """All but the examples; ``level`` is that of the title."""
    mark = "#" * level
    parts = [f"{mark} {plain(report.title)}", plain(report.question)]
    parts += ["\n".join(f"- {plain(answer)}" for answer in report.answers)]
    parts += [plain(note) for note in report.notes]
    for table in report.tables:
        parts += [f"{mark}# {plain(table.title)}", plain(table.about), plain(setting_line(table)), _pipes(table)]
    if report.provenance:
        parts += [f"{mark}# Where the figures come from"]
        parts += ["\n".join(f"- {plain(name)}: {plain(described(it))}" for name, it in report.provenance.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(report: Report) -> str:
    """A ``tabular`` a table, with its setting and what it comes from in comments above."""
    return "\n".join(_tabular(report, table) for table in report.tables)


def csv_text(report: Report) -> str:
    """One row a cell: a figure, or a text; what is shown in percent is a share here, and says so."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow((*FIELDS, *SETTING_FIELDS, "versions"))
    versions = described(report.provenance.get("versions", {}))
    for table in report.tables:
        setting = [getattr(table.setting, name) for name in SETTING_FIELDS]
        for place, row in enumerate(table.rows):
            tags = [table.tags[place].get(name) if table.tags else None for name in TAGS]
            of_row = (report.title, table.key, row_name(table, row), *tags)
            for column, value in zip(table.columns[1:], row[1:], strict=True):
                known = list(asdict(value).values()) if isinstance(value, Estimate) else [value, *[None] * 4]
                if isinstance(value, str):
                    known[0] = None
                words = value if isinstance(value, str) else None
                writer.writerow((*of_row, column.name, _unit(column), *known, words, *setting, versions))
    return file.getvalue()


def json_text(report: Report) -> str:
    """Everything but pictures, of which it says where there are some; shares are shares, and say so."""
    whole = {
        **vars(report),
        "tables": [_table(table) for table in report.tables],
        "examples": [_without_pictures(example) for example in report.examples],
    }
    return json.dumps(_simple(whole), ensure_ascii=False, indent=1) + "\n"


def rich_group(report: Report) -> Group:
    """The answers and the first table, without what is known of its figures' errors."""
    answers = [Text(f"• {answer}") for answer in report.answers]
    tables = [_rich_table(table) for table in report.tables[:1]]
    return Group(Text(report.title, style="bold"), *answers, *tables)


def _shown(table: DataTable, is_bare: bool = False) -> tuple[list[str], list[bool], list[list[str]]]:
    """The headings, whether each is of words, and the rows as text without intervals, n where a figure has its own.

    Bare figures have no deviation and no n either.
    """
    columns, rows = with_counts(table)
    own_n = counts(table).in_cells

    def written(value: Value, unit: str) -> str:
        if is_bare:
            return text(value, unit)
        parts = [text(value, unit), deviation(value, unit)]
        if own_n and isinstance(value, Estimate) and value.n is not None:
            parts.append(f"(n {number(value.n)})")
        return " ".join(part for part in parts if part)

    heads = [heading(table, column) for column in columns]
    cells = [[written(value, column.unit) for column, value in zip(columns, row, strict=True)] for row in rows]
    return heads, of_words(columns, rows), cells


def _pipes(table: DataTable) -> str:
    heads, words, rows = _shown(table)
    rule = ["---" if of_text else "---:" for of_text in words]
    lines = [list(map(plain, heads)), rule, *(list(map(plain, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tabular(report: Report, table: DataTable) -> str:
    heads, words, rows = _shown(table)
    comments = (table.title, setting_line(table), described(report.provenance.get("versions", {})))
    above = [f"% {printable(comment)}" for comment in comments if comment]
    sides = "".join("l" if of_text else "r" for of_text in words)
    head, *lines = (" & ".join(map(_escaped, cells)) + r" \\" for cells in (heads, *rows))
    body = len(table.body)
    means = [r"\midrule", *lines[body:]] if table.summary_rows else []
    inside = [r"\toprule", head, r"\midrule", *lines[:body], *means, r"\bottomrule"]
    return "\n".join([*above, rf"\begin{{tabular}}{{{sides}}}", *inside, r"\end{tabular}"]) + "\n"


def _escaped(words: str) -> str:
    """Text as LaTeX takes it as text."""
    return "".join(_LATEX.get(letter, letter) for letter in printable(words))


def _rich_table(table: DataTable) -> RichTable:
    heads, words, rows = _shown(table, is_bare=True)
    caption = [setting_line(table, is_bare=True)]
    kept = _fitting(table, heads, words, rows)
    if left_out := len(heads) - len(kept):
        caption.append(f"{left_out} more column{'s' if left_out > 1 else ''} in the report")
        heads, words = [heads[place] for place in kept], [words[place] for place in kept]
        rows = [[row[place] for place in kept] for row in rows]
    shown = RichTable(title=Text(table.title), box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for place, (head, of_text) in enumerate(zip(heads, words, strict=True)):
        # Headings break at spaces and hyphens, texts between words: the table fits 80 columns, and no figure is cut.
        longest = max((len(word) for row in rows for word in row[place].split()), default=0) if of_text else None
        name = Text("\n".join(_pieces(head)) if place else head)
        justify: Literal["left", "right"] = "left" if of_text else "right"
        shown.add_column(name, justify=justify, no_wrap=not of_text, min_width=longest)
    for place, row in enumerate(rows):
        # Words in place of a figure are too long for a narrow column.
        is_long = [not of_text and len(cell) > MOST_IN_CELL for cell, of_text in zip(row, words, strict=True)]
        caption += [f"{row[0]}: {cell}" for cell, too_long in zip(row, is_long, strict=True) if too_long]
        if place == len(table.body):
            shown.add_section()
        shown.add_row(
            *(Text(DASH if too_long else cell) for cell, too_long in zip(row, is_long, strict=True)),
            style="bold" if place >= len(table.body) else None,
        )
    shown.caption = Text("\n".join(caption))
    return shown


def _fitting(table: DataTable, heads: list[str], words: list[bool], rows: list[list[str]]) -> list[int]:
    """The columns that a terminal has room for: the first, those that the report is about, and others in order."""

    def width(place: int) -> int:
        cells = [row[place] for row in rows if words[place] or len(row[place]) <= MOST_IN_CELL]
        pieces = _pieces(heads[place]) + [piece for one in cells for piece in (one.split() if words[place] else [one])]
        return GAP + max(map(len, pieces), default=0)

    strong = [place for place, column in enumerate(table.columns) if column.is_strong]
    room, kept = TERMINAL + GAP, []
    for place in dict.fromkeys([0, *strong, *range(len(heads))]):
        if place == 0 or width(place) <= room:
            kept.append(place)
            room -= width(place)
    return sorted(kept)


def _pieces(heading: str) -> list[str]:
    return re.findall(r"[^\s-]+-?|-", heading)


def _unit(column: Column) -> str:
    return "share" if column.unit in SHARES else column.unit


def _table(table: DataTable) -> dict[str, Any]:
    names = [column.name for column in table.columns]
    rows = [
        {
            "cells": {
                name: asdict(value) if isinstance(value, Estimate) else value
                for name, value in zip(names, row, strict=True)
            },
            "tags": table.tags[place] if table.tags else {},
            "is_summary": place >= len(table.body),
        }
        for place, row in enumerate(table.rows)
    ]
    columns = [{**vars(column), "unit": _unit(column)} for column in table.columns]
    kept = {name: value for name, value in vars(table).items() if name not in ("tags", "summary_rows")}
    return {**kept, "setting": vars(table.setting), "columns": columns, "rows": rows}


def _without_pictures(example: Example) -> dict[str, Any]:
    candidates = [{**vars(one), "picture": one.picture is not None} for one in example.candidates]
    return {**vars(example), "picture": example.picture is not None, "candidates": candidates}


def _simple(value: Any) -> Any:
    """What JSON can hold: other things as text, numbers of NumPy as numbers."""
    if isinstance(value, Mapping):
        return {str(name): _simple(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_simple(one) for one in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    return str(value)
