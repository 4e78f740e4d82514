from __future__ import annotations

import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from m3el_hf.evaluation.report import Column, Estimate
from m3el_hf.evaluation.report.charts import DARK, STRONG, about, draw, png, svg
from tests.evaluation.report.samples import EMOJI, NASTY, RIGHT_TO_LEFT, nasty, table, topics


def words(axes) -> set[str]:
    return {text.get_text() for text in axes.texts}


def test_bars_are_as_high_as_the_figures_and_their_errors_as_long_as_the_intervals():
    axes = draw(table()).axes[0]
    assert sorted(bar.get_height() for bar in axes.patches) == pytest.approx(
        [40, 45, 45, 50, 78, 79, 81.2, 86.6, 87.9, 96.1]
    )
    drawn = [segment for one in axes.collections for segment in one.get_segments()]
    ends = sorted((round(low, 1), round(high, 1)) for (_, low), (_, high) in drawn)
    given = [value for row in table().rows for value in row if isinstance(value, Estimate)]
    assert ends == sorted(
        (round(100 * (one.low or one.value), 1), round(100 * (one.high or one.value), 1)) for one in given
    )


def test_the_strong_system_is_blue_and_no_other():
    axes = draw(table()).axes[0]
    colours = {
        bars.get_label(): to_hex(bars.patches[0].get_facecolor())
        for bars in axes.containers
        if bars.get_label()[0] != "_"
    }
    assert colours["after"] == STRONG and list(colours.values()).count(STRONG) == 1
    assert len(set(colours.values())) == 3


def test_chance_is_a_line_with_its_name_and_not_a_bar_too():
    columns = (Column("task"), Column("chance", "%"), Column("after", "%", True), Column("string match", "%"))
    axes = draw(table(columns=columns)).axes[0]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == pytest.approx([100 / 3])
    assert "chance 33.3 %" in words(axes)
    assert "chance" not in axes.get_legend_handles_labels()[1]


def test_the_means_stand_apart():
    axes = draw(table()).axes[0]
    assert np.diff(axes.get_xticks()) == pytest.approx([1, 1, 1.4])  # a row without figures is not drawn


def test_bars_lie_down_for_long_names():
    rows = tuple((f"a condition with a long name, the {place}th", *row[1:]) for place, row in enumerate(topics().rows))
    long = table(columns=topics().columns, rows=rows, tags=(), chance=None, summary_rows=0)
    bars = draw(long).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([5, -2, 11, 0, 3, -8])
    assert [bar.get_y() for bar in bars] == sorted(bar.get_y() for bar in bars)
    assert draw(long).axes[0].yaxis_inverted()  # the first row is at the top


def lines_table(firsts: tuple, **changes):
    columns = (Column("rows"), Column("text", "%"), Column("both", "%", True))
    rows = tuple(
        (first, Estimate(0.4 + 0.1 * k, 0.3, 0.7), Estimate(0.5 + 0.1 * k, 0.4, 0.8)) for k, first in enumerate(firsts)
    )
    return table(columns=columns, rows=rows, tags=(), chart="lines", summary_rows=0, **changes)


@pytest.mark.parametrize(
    ("firsts", "scale"),
    [((1, 10, 50), "linear"), ((1, 10, 1000), "log"), ((0, 10, 1000), "linear"), (("a", "b", "c"), "linear")],
)
def test_lines_are_to_scale_and_over_two_decades_by_powers(firsts, scale):
    axes = draw(lines_table(firsts)).axes[0]
    assert axes.get_xscale() == scale
    line = next(line for line in axes.lines if line.get_label() == "both")
    assert list(line.get_xdata()) == ([0, 1, 2] if firsts[0] == "a" else list(firsts))
    assert list(line.get_ydata()) == pytest.approx([50, 60, 70])
    assert len(axes.collections) == 2  # a band a line


def test_lines_go_by_number_in_whatever_order_the_rows_are():
    line = draw(lines_table((100, 1, 10))).axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 10, 100] and list(line.get_ydata()) == pytest.approx([50, 60, 40])


def test_the_names_of_lines_do_not_cover_each_other():
    columns = (Column("rows"), *(Column(f"system {k}", "%") for k in range(6)))
    rows = tuple((first, *(Estimate(0.5 + k / 1000) for k in range(6))) for first in (1, 2))
    figure = draw(table(columns=columns, rows=rows, tags=(), chart="lines", chance=0.5, summary_rows=0))
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 7
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize("ink_is_dark", [False, True])
def test_a_heatmap_has_its_numbers_where_they_are_and_readable(ink_is_dark):
    columns = (Column("topic"), Column("t2t", "%"), Column("i2i", "%"))
    rows = (("person", Estimate(0.02), Estimate(0.5)), ("books", None, Estimate(0.99)), ("mean", Estimate(0.3), None))
    figure = draw(table(columns=columns, rows=rows, tags=(), chart="heatmap", summary_rows=1), *[DARK] * ink_is_dark)
    axes = figure.axes[0]
    found = {text.get_position(): text for text in axes.texts}
    assert {place: text.get_text() for place, text in found.items()} == {
        (0.5, 0.5): "2.0", (1.5, 0.5): "50.0", (0.5, 1.5): "–", (1.5, 1.5): "99.0", (0.5, 2.5): "30.0", (1.5, 2.5): "–",
    }  # fmt: skip
    figure.draw_without_rendering()
    faces = axes.collections[0].get_facecolors().reshape(3, 2, 4)
    for (x, y), text in found.items():
        if text.get_text() != "–":
            assert contrast(faces[int(y), int(x)], text.get_color()) > 3


def contrast(one, other) -> float:
    def light(colour) -> float:
        parts = np.array(to_rgb(colour))
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_cell_of_a_signed_heatmap_is_readable():
    shares = np.linspace(-0.3, 0.3, 7)
    columns = (Column("topic"), *(Column(str(k), "%") for k in range(7)))
    figure = draw(
        table(columns=columns, rows=(("a", *map(Estimate, shares)),), tags=(), chart="heatmap", summary_rows=0)
    )
    figure.draw_without_rendering()
    faces = figure.axes[0].collections[0].get_facecolors()
    assert all(contrast(face, text.get_color()) > 3 for face, text in zip(faces, figure.axes[0].texts, strict=True))


def test_only_columns_of_one_unit_share_an_axis():
    rows = (("a", Estimate(0.5), Estimate(3.0)), ("b", Estimate(0.6), Estimate(2.0)))
    columns = (Column("task"), Column("accuracy", "%"), Column("rank", "rank"))
    assert len(draw(table(columns=columns, rows=rows, tags=(), summary_rows=0)).axes[0].patches) == 2


def test_the_picture_is_told_in_words():
    assert about(table()) == (
        "Bar chart of “Accuracy by task”: before, after, string match by task; chance is a dashed line. "
        "The table has its figures."
    )


@pytest.mark.parametrize("one", nasty().tables, ids=lambda one: one.key)
def test_nasty_names_are_drawn_as_they_are(one):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = ElementTree.fromstring(svg(one))  # it is XML
        assert png(one).startswith(b"\x89PNG")
    said = "".join(drawn.itertext())
    for name in (NASTY, EMOJI.split()[1], RIGHT_TO_LEFT):
        assert name in said or name not in one.title


def test_the_same_figures_give_the_same_picture():
    assert svg(table()) == svg(table()) != svg(table(), DARK)
