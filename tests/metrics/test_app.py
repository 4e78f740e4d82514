"""The page of the metric's Space: what it computes, and, where gradio is installed, the page itself."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3el_hf.metrics import LINKING_ACCURACY, load_metric
from m3el_hf.metrics.linking_accuracy.app import COLUMNS, RANKED, SCORES, figures, read

ROOT = Path(__file__).parents[2]


def shown(markdown: str) -> dict[str, float]:
    """The figures of a table, by name."""
    return {name: float(value) for name, value in re.findall(r"^\| `(.*?)` \| `(.*?)` \|", markdown, re.MULTILINE)}


def expected(config: str | None = None, ties: str = "expected", **columns: list) -> dict[str, float]:
    return pytest.approx(load_metric(config).compute(**columns, ties=ties), abs=5e-5, nan_ok=True)


SCORES_GIVEN = {"scores": [[0.9, 0.1, 0.2], [0.5, 0.5], [0.3, 0.8, 0.1, 0.4], [0.7, 0.2]], "references": [0, 1, 3, -1]}
RANKED_GIVEN = {
    "predictions": [["Q1558", "Q486396"], ["Q612", "Q486396"], ["Q1558"]],
    "references": ["Q612", "Q486396", "Q612"],
}


@pytest.mark.parametrize("ties", ["expected", "optimistic", "pessimistic"])
def test_the_first_example_has_the_figures_of_the_metric(ties):
    assert shown(figures(SCORES, ties)) == expected(ties=ties, **SCORES_GIVEN)


def test_the_second_example_has_the_figures_of_the_metric():
    rows = [line.split(",") for line in RANKED.splitlines()[1:]]
    given = {"predictions": [ids.split(";") for ids, _ in rows], "references": [gold for _, gold in rows]}
    assert shown(figures(RANKED)) == expected("ranked", **given)


@pytest.mark.parametrize("config", COLUMNS)
def test_csv_and_json_lines_say_the_same(config):
    given = {
        "default": SCORES_GIVEN,
        "padded": {**SCORES_GIVEN, "candidate_counts": [3, 2, 4, 1]},
        "ranked": RANKED_GIVEN,
    }[config]
    rows = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
    lines = "\n".join(map(json.dumps, rows))
    cells = [
        [";".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in row.values()] for row in rows
    ]
    table = "\r\n".join([", ".join(given), *(", ".join(row) for row in cells)])
    assert shown(figures(lines)) == shown(figures(table)) == expected(config, **given)


def test_rows_that_are_all_misses_have_no_mean_rank():
    assert math.isnan(shown(figures("predictions,references\nQ1,Q2"))["mean_rank"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (" \n", "there are none: paste some, or upload a file"),
        ("scores,references", "there are none below the header"),
        ('{"scores": [1]', "line 1 is no JSON"),
        ("[1, 2]", "line 1 is no JSON object"),
        ('{"scores": [1], "references": 0}\n{"scores": [1]}', "row 1 has scores, and the first has scores, references"),
        ('{"score": [1]}', "they have score, and need references, scores; or"),
        ("a;b\nc", "they have a;b, and need"),
        ("scores,references\n1;2", "line 2 has not as many cells as the header"),
        ("scores,references\n1;2,0,3", "line 2 has not as many cells as the header"),
        ("scores,references\n1;x,0", "line 2: could not convert string to float: 'x'"),
        ("scores,references\n1;2,0\n1;nan,0", "row 1 has a NaN"),
        ("scores,references\n1;2,2", "row 0 has reference 2, but 2 candidates"),
        ("predictions,references\nQ1;Q1,Q1", "row 0 ranks Q1 twice"),
        ("predictions,references\n ,Q1", "row 0 has no prediction"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(text, says):
    answer = figures(text)
    assert answer.startswith("**These rows cannot be measured:** ")
    assert says in answer
    assert "\n" not in answer


def test_a_file_is_read(tmp_path):
    (tmp_path / "rows.csv").write_text(f"\ufeff{RANKED}", encoding="utf-8")
    assert read(str(tmp_path / "rows.csv")) == RANKED
    (tmp_path / "rows.csv").write_bytes(b"\xff\xfe\x00")
    assert read(str(tmp_path / "rows.csv")) == "rows.csv is no text in UTF-8"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page, started as a Space starts it, from a copy of the folder."""
    pytest.importorskip("gradio", reason="gradio is not installed, so the page is not started: pip install gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("space")
    for file in LINKING_ACCURACY.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    environment = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env={**os.environ, **environment})
    for _ in range(600):
        with socket.socket() as probe:
            if process.poll() is not None or not probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


def test_the_page_measures_what_it_is_given(page):
    import gradio_client

    client = gradio_client.Client(page, verbose=False)
    assert client.predict(SCORES, "pessimistic", api_name="/figures") == figures(SCORES, "pessimistic")
    assert client.predict("", "expected", api_name="/figures") == figures("")


def test_the_page_shows_the_first_example_and_its_figures(page):
    import gradio_client

    client = gradio_client.Client(page, verbose=False)
    values = [component["props"].get("value") for component in client.config["components"]]
    assert {SCORES, figures(SCORES)} <= {value for value in values if isinstance(value, str)}
