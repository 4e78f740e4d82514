"""Reports to render: one with everything, and random tables."""

from __future__ import annotations

import io
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from m3el_hf.evaluation.report import Candidate, Column, DataTable, Estimate, Example, Report, Setting

NASTY = "<script>alert('a & b')</script>"
SIGNS = r"a|b \ & % $x_1^2$ # {~} [c] < > \"quoted\""
RIGHT_TO_LEFT = "مرحبا بالعالم"
EMOJI = "🎸 Kansas 👩‍🚀"
TEXTS = (NASTY, SIGNS, RIGHT_TO_LEFT, EMOJI, "two\nlines\x0b", "")

SETTING = Setting("test", "candidate set, as released", "expected rank", "0")
TASKS, TOPICS = ("t2t", "i2i", "it2t"), ("person", "books")


def table(key: str = "tasks", **changes: Any) -> DataTable:
    """Tasks by system, with a mean, a dash, words in place of a figure, and chance."""
    rows = (
        (
            "t2t",
            Estimate(0.5, 0.45, 0.55, 391),
            Estimate(0.812, 0.77, 0.85, 391, 0.012),
            Estimate(0.78, 0.74, 0.82, 391),
        ),
        ("i2i", Estimate(0.4, 0.35, 0.45, 387), Estimate(0.961, 0.94, 0.98, 387, 0.004), None),
        ("it2t", Estimate(0.45, 0.4, 0.5, 387), Estimate(0.866, 0.83, 0.9, 387, 0.02), Estimate(0.79, 0.75, 0.83, 387)),
        ("t2i", "not evaluable, 0 images", None, None),
        ("mean", Estimate(0.45), Estimate(0.879), None),
    )
    tags = tuple({"task": task} for task in ("t2t", "i2i", "it2t", "t2i"))
    whole: dict[str, Any] = {
        "key": key,
        "title": "Accuracy by task",
        "about": "Accuracy of linking each mention among its own candidates.",
        "setting": SETTING,
        "columns": (Column("task"), Column("before", "%"), Column("after", "%", True), Column("string match", "%")),
        "rows": rows,
        "tags": (*tags, {}),
        "chart": "bars",
        "chance": 1 / 3,
        "summary_rows": 1,
    }
    return DataTable(**(whole | changes))


def topics() -> DataTable:
    """Topics and tasks in rows, with an effect and its p value."""
    rows = tuple(
        (f"{topic}, {task}", Estimate(effect / 100, effect / 100 - 0.04, effect / 100 + 0.04, 80), p)
        for (topic, task), effect, p in zip(
            [(topic, task) for topic in TOPICS for task in TASKS],
            (5, -2, 11, 0, 3, -8),
            (0.01, 0.4, 0.001, 0.9, 0.2, 1),
            strict=True,
        )
    )
    tags = tuple({"topic": topic, "task": task} for topic in TOPICS for task in TASKS)
    columns = (Column("condition"), Column("difference", "%"), Column("p"))
    return DataTable("effect", "What pictures add", "With minus without.", SETTING, columns, rows, tags, "bars")


def example(number: int = 0, **changes: Any) -> Example:
    """An example with pictures of every form, and something that is none."""
    pictures = [picture(form) for form in ("PNG", "JPEG", "GIF", "WEBP")] + [None, b"no picture"]
    candidates = tuple(
        Candidate(f"candidate {place}", f"description {place}" if place % 2 else None, 3.0 - place, place == 1, one)
        for place, one in enumerate(pictures)
    )
    whole: dict[str, Any] = {
        "task": TASKS[number % 3],
        "topic": TOPICS[number % 2],
        "system": ("before", "after")[number // 2 % 2],
        "mention": f"mention {number}",
        "context": f"A sentence about {number}.",
        "picture": picture("JPEG") if number % 2 else None,
        "candidates": candidates,
        "remark": "the gold is 2nd of 6",
    }
    return Example(**(whole | changes))


def report(**changes: Any) -> Report:
    """A report with everything."""
    whole: dict[str, Any] = {
        "title": "Do pictures help?",
        "question": "What does a picture add?",
        "answers": ("Pictures add 5.0 points (1.0 to 9.0).", "Elsewhere the effect is within noise."),
        "tables": (table(), topics()),
        "examples": tuple(example(number) for number in range(30)),
        "notes": ("Ties count as chance.",),
        "provenance": {"data": "mini", "seeds": [0, 1], "versions": {"torch": "2.13"}},
    }
    return Report(**(whole | changes))


def nasty() -> Report:
    """A report with nasty text wherever text can stand."""
    tables = []
    for number, text in enumerate(TEXTS):
        columns = (Column(text), Column(f"{text} a", text), Column(f"{text} b", text, True))
        rows = ((text, Estimate(0.5, 0.4, 0.6, 3), text), (f"{text} 2", Estimate(0.7, 0.6, 0.8, 4), None))
        tags = ({"task": text, "topic": f"{text} 1"}, {"task": f"{text} 2"})
        setting = Setting(text, text, text, text)
        chart = ("bars", "lines", "heatmap")[number % 3]
        tables.append(DataTable(f"t{number}", text, text, setting, columns, rows, tags, chart, 0.5))
    candidates = tuple(Candidate(text, text, 0.5, False, picture("PNG")) for text in TEXTS)
    examples = tuple(Example(text, text, text, text, text, None, candidates, text) for text in TEXTS)
    return Report(NASTY, NASTY, TEXTS, tuple(tables), examples, TEXTS, {text: {text: [text]} for text in TEXTS})


def picture(form: str) -> bytes:
    """A small picture in a form."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, form)
    return file.getvalue()


finite = st.floats(-1e6, 1e6)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def estimates(draw: st.DrawFn) -> Estimate:
    """Any figure, with or without what is known of its error."""
    ends = draw(st.none() | st.tuples(finite, finite).map(sorted))
    low, high = ends or (None, None)
    n = draw(st.none() | st.integers(0, 10**6))
    return Estimate(draw(finite), low, high, n, draw(st.none() | st.floats(0, 1e3)))


values = estimates() | texts | st.integers(-(10**6), 10**6) | finite | st.none()


@st.composite
def tables(draw: st.DrawFn) -> DataTable:
    """Any table, without a chart."""
    names = draw(st.lists(texts, min_size=1, max_size=5, unique=True))
    columns = tuple(Column(name, draw(st.sampled_from(["", "%", "s"]))) for name in names)
    rows = tuple(tuple(row) for row in draw(st.lists(st.tuples(*[values] * len(names)), max_size=6)))
    setting = Setting(*(draw(texts) for _ in range(4)))
    means = draw(st.integers(0, len(rows)))
    return DataTable("any", draw(texts), draw(texts), setting, columns, rows, summary_rows=means)
