"""The page of the Space: scores or ranked ids in, figures out. Only `page` needs gradio, which a Space has."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate

SCRIPT = Path(__file__).with_name("linking_accuracy.py")

COLUMNS = {
    "default": {"scores", "references"},
    "padded": {"scores", "candidate_counts", "references"},
    "ranked": {"predictions", "references"},
}
"""What a row has, by the config of the metric that takes it."""

SCORES = """{"scores": [0.9, 0.1, 0.2], "references": 0}
{"scores": [0.5, 0.5], "references": 1}
{"scores": [0.3, 0.8, 0.1, 0.4], "references": 3}
{"scores": [0.7, 0.2], "references": -1}
"""
RANKED = """predictions,references
Q1558;Q486396;Q612,Q1558
Q612;Q486396,Q486396
Q1558,Q612
"""

HELP = """One row a mention, as **JSON lines** or **CSV** with a header. In CSV the values of a cell are separated by
semicolons.

- `scores`: one score a candidate, higher is better; `references`: the gold's index among them, from 0, or -1 where the
  gold is not among them. With `candidate_counts`, only so many of a row's scores are those of candidates.
- or `predictions`: entity ids, best first; `references`: the gold's id.
"""

MEANINGS = {
    "accuracy": "mentions whose gold comes first",
    "accuracy_low": "95 % interval, from",
    "accuracy_high": "95 % interval, to",
    "mrr": "mean reciprocal rank",
    "mean_rank": "where the gold is a candidate",
    "median_rank": "where the gold is a candidate",
    "tie_share": "mentions whose gold shares the first place",
    "misses": "mentions whose gold is no candidate",
    "ceiling": "the highest possible accuracy",
    "n": "mentions",
}


def figures(text: str, ties: str = "expected") -> str:
    """Returns the figures of rows as a Markdown table, or the line that says what is wrong with the rows.

    Args:
        text: JSON lines or CSV, see `HELP`.
        ties: "expected", "optimistic" or "pessimistic".
    """
    try:
        rows = list(_rows(text))
        config = _config(rows)
        metric = evaluate.load(str(SCRIPT), config, keep_in_memory=True)
        result = metric.compute(**{name: [row[name] for row in rows] for name in COLUMNS[config]}, ties=ties)
    except ValueError as error:
        return f"**These rows cannot be measured:** {error}"
    lines = [
        f"| `{name}` | `{value if isinstance(value, int) else f'{value:.4f}'}` | {_meaning(name)} |"
        for name, value in result.items()
    ]
    return "\n".join(["| figure | value | |", "| --- | ---: | --- |", *lines])


def _meaning(name: str) -> str:
    return MEANINGS.get(name) or f"gold among the first {name.removeprefix('hits@')}"


def _rows(text: str) -> Iterator[dict[str, Any]]:
    """Yields the rows, each with the columns it has."""
    if not text.strip():
        raise ValueError("there are none: paste some, or upload a file")
    if text.lstrip()[0] not in "{[":
        yield from _csv_rows(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield row


def _csv_rows(text: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text.strip()), skipinitialspace=True)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many cells as the header")
        try:
            yield {name: _cell(name, cell, "scores" in row) for name, cell in row.items()}
        except ValueError as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def _cell(name: str, cell: str, has_scores: bool) -> Any:
    values = [value.strip() for value in cell.split(";") if value.strip()]
    if name == "scores":
        return [float(value) for value in values]
    if name == "predictions":
        return values
    return int(cell) if has_scores else cell.strip()


def _config(rows: list[dict[str, Any]]) -> str:
    """The config that takes the rows."""
    if not rows:
        raise ValueError("there are none below the header: paste some, or upload a file")
    for config, names in COLUMNS.items():
        if rows[0].keys() == names:
            other = next((row for row, one in enumerate(rows) if one.keys() != names), None)
            if other is not None:
                raise ValueError(f"row {other} has {', '.join(rows[other])}, and the first has {', '.join(rows[0])}")
            return config
    choices = "; or ".join(", ".join(sorted(names)) for names in COLUMNS.values())
    raise ValueError(f"they have {', '.join(map(str, rows[0]))}, and need {choices}")


def read(path: str) -> str:
    """Returns the text of an uploaded file; a line that says so where it is not text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return f"{Path(path).name} is no text in UTF-8"


def page() -> Any:
    """Returns the gradio page, the first example prefilled and measured."""
    import gradio

    with gradio.Blocks(title="Linking accuracy") as blocks:
        gradio.Markdown(f"# Linking accuracy\n{HELP}")
        with gradio.Row():
            with gradio.Column():
                text = gradio.Textbox(SCORES, label="Rows", lines=10, max_lines=20)
                ties = gradio.Radio(["expected", "optimistic", "pessimistic"], value="expected", label="Ties")
                upload = gradio.UploadButton("Upload CSV or JSON lines", file_types=[".csv", ".jsonl"])
                gradio.Examples([[SCORES], [RANKED]], [text], label="Examples", example_labels=["Scores", "Ranked ids"])
            result = gradio.Markdown(figures(SCORES))
        upload.upload(read, upload, text)
        gradio.on([text.change, ties.change], figures, [text, ties], result, trigger_mode="always_last")
    return blocks


if __name__ == "__main__":
    page().launch()
