"""What an audit found: saved as JSON, shown in a terminal, as Markdown and as an HTML page."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from m3el_hf.data.audit.charts import Chart
from m3el_hf.data.card import plain

FOLDER = "audit"
"""Where in a built folder an audit is saved."""

ALL = "all"
"""The column that counts the whole dataset."""

NOT_APPLICABLE = "–"

LEVELS = {3: "act on it", 2: "mind it", 1: "note"}

_STYLES = {3: "bold red", 2: "yellow", 1: "dim"}


@dataclass(frozen=True)
class Fact:
    """One thing that was counted.

    Attributes:
        key: Its name for machines; no two facts of an audit have the same.
        label: Its name for people.
        definition: What exactly was counted; may be empty where the label says it all.
        counts: The count by column of the section: all rows, a split, two splits, a kind of text.
        of: Among how many, by column; empty where a share makes no sense.
    """

    key: str
    label: str
    definition: str
    counts: dict[str, float]
    of: dict[str, float] = field(default_factory=dict)

    def share(self, column: str) -> float | None:
        """The share 0 to 1 in a column, or None where there is nothing to be a share of."""
        return self.counts[column] / self.of[column] if column in self.counts and self.of.get(column) else None

    def cell(self, column: str) -> tuple[str, str]:
        """The count, and the share with what it is of; each empty where there is none."""
        if column not in self.counts or self.of.get(column) == 0:
            return NOT_APPLICABLE, ""
        share = self.share(column)
        return number(self.counts[column]), "" if share is None else f"{percent(share)} of {number(self.of[column])}"


@dataclass(frozen=True)
class Section:
    """One table of facts, with what its columns are."""

    key: str
    title: str
    about: str
    columns: list[str]
    facts: list[Fact]


@dataclass(frozen=True)
class Finding:
    """One sentence for who is about to use the data; ``level`` is one of `LEVELS`."""

    level: int
    text: str


@dataclass(frozen=True)
class Listing:
    """Some lines under a title, and how many more there are."""

    title: str
    lines: list[str]
    more: int


@dataclass(frozen=True)
class Shown:
    """A picture in a case: what it is, and its key in `Audit.thumbnails`, None where there is no picture."""

    caption: str
    picture: str | None


@dataclass(frozen=True)
class Case:
    """Something to look at: pictures, and facts by name."""

    shown: list[Shown]
    facts: dict[str, str]


@dataclass(frozen=True)
class Gallery:
    """Some cases under a title."""

    title: str
    about: str
    cases: list[Case]


@dataclass(frozen=True)
class Audit:
    """All that was found in a built folder.

    Attributes:
        title: What the data is called.
        revision: The data that was audited: `Manifest.revision`.
        settings: How it was built, by name.
        findings: What to know before using it, the worst first.
        clean: What was looked for and not found.
        sections: The tables.
        listings: What was skipped or could not be had.
        charts: The figures of the charts.
        galleries: The worst cases.
        thumbnails: JPEGs in base64, by key.
    """

    title: str
    revision: str
    settings: dict[str, str]
    findings: list[Finding]
    clean: list[str]
    sections: list[Section]
    listings: list[Listing]
    charts: list[Chart]
    galleries: list[Gallery]
    thumbnails: dict[str, str]

    def fact(self, key: str) -> Fact:
        """Returns a fact by its key.

        Raises:
            KeyError: If there is none, as this data cannot have it.
        """
        return {fact.key: fact for section in self.sections for fact in section.facts}[key]

    def save(self, folder: Path) -> None:
        """Writes ``audit.json``, ``audit.md``, ``audit.html`` and a PNG a chart into ``<folder>/audit``."""
        target = folder / FOLDER
        target.mkdir(exist_ok=True)
        plots = {chart.key: chart.png() for chart in self.charts}
        for old in set(target.glob("*.png")) - {target / f"{key}.png" for key in plots}:
            old.unlink()  # of an earlier audit, which had something to show there
        for key, data in plots.items():
            (target / f"{key}.png").write_bytes(data)
        (target / "audit.md").write_text(f"# Audit of {plain(self.title)}\n\n{self.to_markdown(2)}", encoding="utf-8")
        (target / "audit.html").write_text(self._html(plots), encoding="utf-8")
        unfinished = target / ".audit.json"
        unfinished.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, target / "audit.json")  # last: it says that the rest is there

    def to_rich(self) -> Group:
        """The table of rows and the findings for a terminal; all else stands in the saved files."""
        grid = RichTable.grid(padding=(0, 2))
        for one in self.findings:
            grid.add_row(Text(LEVELS[one.level], style=_STYLES[one.level]), Text(one.text))
        if self.clean:
            grid.add_row(Text("clean", style="green"), Text(f"Looked for and not found: {', '.join(self.clean)}."))
        return Group(Text(f"Audit of {self.title}", style="bold"), _rich_table(self.sections[0]), grid)

    def to_markdown(self, level: int = 3) -> str:
        """The findings and tables for a card, without pictures; ``level`` is that of the headings."""
        mark = "#" * level
        parts = [f"{mark} What to know before use"]
        parts += ["\n".join(f"- **{LEVELS[one.level]}**: {one.text}" for one in self.findings)]
        parts += [f"Looked for and not found: {', '.join(self.clean)}."] * bool(self.clean)
        for section in self.sections:
            parts += [f"{mark} {section.title}"]
            parts += [section.about, _markdown_table(section)]
        for listing in self.listings:
            lines = [f"- {plain(line)}" for line in listing.lines]
            lines += [f"- and {listing.more:,} more"] * (listing.more > 0)
            parts += [f"{mark} {listing.title}", "\n".join(lines)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _html(self, plots: dict[str, bytes]) -> str:
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.filters |= {"code": _code, "number": number}
        template = files("m3el_hf.data.audit").joinpath("audit.html.jinja").read_text(encoding="utf-8")
        images = {key: base64.b64encode(data).decode() for key, data in plots.items()}
        return environment.from_string(template).render(audit=self, plots=images, levels=LEVELS)


def number(value: float) -> str:
    """Writes a number with thousands apart, and one decimal where it is no whole number."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def percent(share: float) -> str:
    """Writes a share in percent: never 0 % for something, nor 100 % for less than all."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def _rich_table(section: Section) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(section.title)
    for column in section.columns:
        table.add_column(column, justify="right")
    for fact in section.facts:
        table.add_row(Text(fact.label), *(fact.cell(column)[0] for column in section.columns))
    return table


def _markdown_table(section: Section) -> str:
    lines = [["", *map(plain, section.columns)], ["---", *["---:"] * len(section.columns)]]
    for fact in section.facts:
        cells = [f"{count} ({share})" if share else count for count, share in map(fact.cell, section.columns)]
        lines += [[f"**{plain(fact.label)}** {fact.definition}".strip(), *cells]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> Markup:
    """Sets what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
