"""charts.py and markup.py: round ticks, numbers as people read them, charts whose labels fit."""

import doctest
import json
import re

import pytest

from tools import charts, markup
from tools.charts import Line, chart, figure, interval, ticks


def test_examples_in_docstrings():
    for module, count in ((charts, 3), (markup, 1)):
        result = doctest.testmod(module)
        assert result.attempted == count
        assert result.failed == 0


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 1e-7), (-3, 12345), (0, 7), (0.2, 0.21), (0, 3e9)]
)
def test_ticks_are_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 6
    assert low <= marks[0] + 1e-12
    assert marks[-1] <= high * 1.000001
    line = Line("a", "first", [0, 1, 2], [low, high, low])
    assert "nan" not in chart("t", "u", [line])
    assert chart("t", "u", [Line("a", "first", [], [])]) == ""


@pytest.mark.parametrize("largest", [0, 1e-9, 0.5, 1, 7, 99.9, 12345, 3e9])
def test_the_axis_ends_above_the_largest_value(largest):
    axes = charts.make_axes([Line("a", "first", [0, 1], [0, largest])], top=None, labels=[])
    assert axes.high >= largest
    assert axes.marks[-1] == pytest.approx(axes.high)
    assert axes.down(largest) >= charts.TOP - 1e-6


def test_labels_lie_inside_the_picture_and_apart():
    """The margins grow with the ticks and the names, and names that would overlap move apart."""
    names = ["a", "alignment of both", "|ratio − 1|", "swapped"]
    lines = [Line(name, "first", [0, 1], [0, 1e-7]) for name in names]
    text = chart("t", "u", lines)
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="label"[^>]*>([^<]*)<', text)
    assert [label for *_, label in labels] == names
    for x, _, label in labels:
        assert float(x) + charts.CHARACTER * len(label) <= charts.WIDTH
    heights = [float(y) for _, y, _ in labels]
    assert all(below - above >= 14.9 for above, below in zip(heights, heights[1:], strict=False))
    assert heights[0] > 0
    assert heights[-1] < charts.HEIGHT
    marks = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end">([^<]*)<', text)
    assert len(marks) >= 2
    for x, mark in marks:
        assert float(x) - charts.CHARACTER * len(mark) >= 0


def test_a_chart_holds_its_numbers_for_the_pointer_and_as_a_table():
    rising = Line("up", "first", [1, 2, 3], [0.1, 0.2, 0.3])
    text = chart("Title", "unit", [rising], note="Higher is better.")
    for expected in ("Title", "unit", "Higher is better.", "last step:", "<td>0.200</td>"):
        assert expected in text, expected
    pointed = json.loads(re.search(r'data-chart="([^"]*)"', text)[1].replace("&quot;", '"'))
    assert pointed["lines"] == [[[1, 2, 3], ["0.100", "0.200", "0.300"]]]
    assert pointed["from"] == 1 and pointed["to"] == 3
    # One curve needs no name beside it, and a histogram no last value.
    assert 'class="label"' not in text
    assert "last step:" not in chart("Title", "unit", [rising], values=False)


def test_long_curves_are_thinned_to_means_of_neighbours():
    line = Line("a", "first", list(range(1000)), [float(i) for i in range(1000)])
    thinned = charts.thin(line)
    assert len(thinned.xs) == len(thinned.ys) == 250
    assert thinned.ys[:2] == [1.5, 5.5]
    assert "(40 of 250 points)" in chart("t", "u", [line])


def test_numbers():
    assert figure(float("nan")) == figure(float("inf")) == "–"
    assert figure(123456.0) == "1.2e5"
    assert interval([None, None, None]) == "–"
    assert interval([0.5, None, None], 100) == "50.0"
    assert interval([-0.0001, -0.3, 0.2]) == "0.000 [−0.300, 0.200]"


def test_named_places_without_a_value_are_on_the_axis():
    """Such as tenths of a response that no response reaches."""
    text = chart("t", "u", [Line("a", "first", [0, 1], [1, 2])], x_names=["1", "2", "3"])
    places = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="middle">[123]<', text)
    assert len(places) == 3
    assert float(places[2]) <= charts.WIDTH - charts.CHARACTER
