"""How figures are shown and put in order: the same on the page, in cards, papers, terminals and charts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3el_hf.errors import one_line
from m3el_hf.evaluation.report.document import SHARES, Column, DataTable, Estimate, Value

DASH = "–"
"""What does not apply."""


def number(value: float, unit: str = "") -> str:
    """Writes a number: a share in percent with one decimal, others with about three digits, a whole one as it is.

    Example:
        >>> number(0.5417, "%"), number(1798), number(25000), number(-2.345), number(0.8731), number(1e-5)
        ('54.2', '1798', '25,000', '−2.35', '0.873', '1e-05')
    """
    if unit in SHARES:
        text = f"{100 * value:z.1f}"
    elif isinstance(value, int):
        text = f"{value:,}" if abs(value) >= 10_000 else str(value)  # four digits are read without a comma
    elif 0 < abs(value) < 0.001:
        text = f"{value:.2g}"
    else:
        decimals = next(
            places for most, places in ((1, 3), (100, 2), (1000, 1), (float("inf"), 0)) if abs(value) < most
        )
        text = f"{value:z,.{decimals}f}"
    return text.replace("-", "−", 1) if value < 0 else text


def text(value: Value, unit: str = "") -> str:
    """What stands in a cell, without what is known of its error."""
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    return number(value.value if isinstance(value, Estimate) else value, unit)


def interval(value: Value, unit: str = "") -> str:
    """The 95 % interval; nothing where there is none, or where it is, as written, the figure alone.

    Example:
        >>> interval(Estimate(0.5, 0.481, 0.603), "%"), interval(Estimate(0.5, -0.1, 0.2)), interval(Estimate(1, 1, 1))
        ('48.1–60.3', '−0.100 to 0.200', '')
    """
    if not isinstance(value, Estimate) or value.low is None or value.high is None:
        return ""
    low, high = number(value.low, unit), number(value.high, unit)
    if low == high == number(value.value, unit):
        return ""
    return f"{low} to {high}" if value.low < 0 else f"{low}–{high}"


def deviation(value: Value, unit: str = "") -> str:
    """The standard deviation over seeds, or nothing."""
    if not isinstance(value, Estimate) or value.deviation is None:
        return ""
    return f"± {number(value.deviation, unit)}"


@dataclass(frozen=True)
class Counts:
    """Where a table says how many rows its figures are of.

    Attributes:
        line: ``"n = 391"`` where all are of as many rows, else empty.
        column: Of each row, where the rows differ but a row's figures do not; else None.
        in_cells: Whether a row's figures differ, so that each has its own.
    """

    line: str = ""
    column: tuple[int | None, ...] | None = None
    in_cells: bool = False


def counts(table: DataTable) -> Counts:
    """Finds where a table has to say how many rows its figures are of; nowhere, if it has a column ``n``."""
    if any(column.name == "n" for column in table.columns):
        return Counts()
    by_row = [{value.n for value in row if isinstance(value, Estimate) and value.n is not None} for row in table.rows]
    found = set().union(*by_row)
    if len(found) <= 1:
        return Counts(line="".join(f"n = {number(n)}" for n in found))
    if all(len(row) <= 1 for row in by_row):
        return Counts(column=tuple(next(iter(row), None) for row in by_row))
    return Counts(in_cells=True)


def common_unit(table: DataTable) -> str:
    """The unit that all figures of a table have (numbers of things have none), or nothing; headings need not say it."""
    units = {
        column.unit
        for place, column in enumerate(table.columns)
        if place and (column.unit or any(isinstance(row[place], Estimate | float) for row in table.rows))
    }
    return units.pop() if len(units) == 1 else ""


def heading(table: DataTable, column: Column) -> str:
    """A column's name, with its unit where the setting does not say it."""
    is_said = column.unit in ("", common_unit(table))
    return column.name if is_said else f"{column.name} ({column.unit})"


def setting_line(table: DataTable, is_bare: bool = False) -> str:
    """How a table was measured, in one line, with what holds for all figures: their unit, and n if it is one.

    Args:
        table: The table.
        is_bare: Whether deviations are not shown, so that nothing has to be said of them.
    """
    unit = common_unit(table)
    has_deviation = not is_bare and any(
        isinstance(value, Estimate) and value.deviation is not None for row in table.rows for value in row
    )
    spread = "± standard deviation over seeds" if has_deviation else ""
    parts = (f"in {unit}" if unit else "", table.setting.line(), counts(table).line, spread)
    return " · ".join(part for part in parts if part)


def with_counts(table: DataTable) -> tuple[tuple[Column, ...], tuple[tuple[Value, ...], ...]]:
    """The columns and rows of a table as shown: with a column ``n`` where it needs one."""
    column = counts(table).column
    if column is None:
        return table.columns, table.rows
    return (*table.columns, Column("n")), tuple((*row, n) for row, n in zip(table.rows, column, strict=True))


def of_words(columns: Sequence[Column], rows: Sequence[Sequence[Value]]) -> list[bool]:
    """Whether a column holds texts and no figures; the first, which names the rows, counts as such."""
    held = [[row[place] for row in rows if row[place] is not None] for place in range(len(columns))]
    return [not place or (bool(one) and all(isinstance(value, str) for value in one)) for place, one in enumerate(held)]


def row_name(table: DataTable, row: Sequence[Value]) -> str:
    """What names a row for machines: its first value, and the texts that follow before any column of figures."""
    words = of_words(table.columns, table.rows)
    leading = row[: words.index(False) if False in words else len(words)]
    values = (one.value if isinstance(one, Estimate) else one for one in leading if one is not None)
    return " · ".join(map(str, values))


def places(values: Sequence[Value]) -> list[int | None]:
    """Where each value comes in ascending order, from 0; equal ones share a place, None has none and comes last.

    Numbers go by value, before texts; texts without regard to case, and by value where digits stand in them.

    Example:
        >>> places(["seed 10", "Seed 9", Estimate(0.5), None, 2, 0.5])
        [3, 2, 0, None, 1, 0]
    """
    keys = [None if value is None else _key(value) for value in values]
    order = {key: place for place, key in enumerate(sorted({key for key in keys if key is not None}))}
    return [None if key is None else order[key] for key in keys]


def _key(value: Estimate | str | float) -> tuple[int, float, tuple[str | int, ...]]:
    if not isinstance(value, str):
        return 0, value.value if isinstance(value, Estimate) else value, ()
    # Texts and digits take turns, so that like is compared with like.
    parts = re.split(r"([0-9]{1,15})", value.casefold())
    return 1, 0, tuple(int(part) if place % 2 else part for place, part in enumerate(parts))


def printable(words: str) -> str:
    """Text in one line without signs that are not seen, which files of other forms do not take."""
    return one_line("".join(letter if letter.isprintable() else " " for letter in words))


def described(value: Any) -> str:
    """Writes what is in the provenance as text: names and values of a mapping, the parts of a list.

    Example:
        >>> described({"torch": "2.13", "seeds": [0, 1]})
        'torch 2.13, seeds 0, 1'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {described(one)}" for name, one in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(described, value))
    return str(value)
