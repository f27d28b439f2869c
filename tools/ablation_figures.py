"""ablation_figures.py: the figures of a grid of runs: gains with their intervals, and curves."""

import math
import statistics
from typing import NamedTuple

from tools.charts import TICK_COLOR, Axis, drawing, svg_text, ticks
from tools.markup import Html, tag
from tools.rule_table import gain_text

# What a gain is of: a host, a level of the toy, or all of them.
COLORS = {
    "grpo": "#0072b2",
    "dapo": "#d55e00",
    "gspo": "#009e73",
    "sapo": "#aa4499",
    "all": "#111111",
    "level 1": "#0072b2",
    "level 3": "#d55e00",
    "both": "#111111",
}
BOLD = ("all", "both")
CURVE_COLORS = ("#888888", "#0072b2", "#d55e00", "#009e73")  # of a panel's curves, in their order

GAINS_LEFT, GAINS_TOP = 246, 44  # where the gains begin
NAMES_END = 234  # where their names end
COLUMN, COLUMN_PITCH = 380, 394  # a column's width, without and with the space behind it
GAIN_STEPS = 8  # between the ticks of the gains' axis, about

PANEL_WIDTH, PANEL_HEIGHT = 250, 160  # of the curves' part of a panel
PANEL_PITCH = (320, 240)  # from one panel to the next, to the right and down

Gains = dict[str, tuple]  # name of COLORS -> (mean, low, high), the ends None without an interval


def figure(width: float, height: float, title: str, parts: list[Html]) -> str:
    heading = svg_text(14, 20, title, font_weight="bold", font_size=14)
    return drawing(width, height, title, [heading, *parts], font_size=12)


# ------------------------------------------------------------------------------------------ gains


class Column(NamedTuple):
    """Gains over one thing. All columns of a figure have the same groups and names, as its rows."""

    heading: str
    groups: dict[str, Gains]


def gains_figure(title: str, columns: list[Column]) -> str:
    """Gains in accuracy, mean over the held-out curve, in percentage points.

    One row for each name of a group, with its interval, bold where it is one for all. Without an
    interval there is a dot alone.
    """
    groups = columns[0].groups
    places = rows_of(groups)
    bottom = 14 + max(places.values(), default=GAINS_TOP)
    parts = names_of_rows(groups, places)
    for number, column in enumerate(columns):
        parts += gains_column(column, GAINS_LEFT + number * COLUMN_PITCH, places, bottom=bottom)
    return figure(GAINS_LEFT + len(columns) * COLUMN_PITCH, bottom + 26, title, parts)


def rows_of(groups: dict[str, Gains]) -> dict[tuple[str, str], int]:
    """(group, name) -> the height of its row in the figure."""
    places = {}
    y = GAINS_TOP
    for group, gains in groups.items():
        y += 8 if gains else 0
        for name in gains:
            y += 14
            places[group, name] = y
    return places


def names_of_rows(groups: dict[str, Gains], places: dict) -> list[Html]:
    """The group in the middle of its rows, and the name of each row."""
    parts = []
    for group, gains in groups.items():
        if gains:
            middle = statistics.fmean(places[group, name] for name in gains)
            parts.append(svg_text(14, middle + 4, group))
        for name in gains:
            y = places[group, name] + 4
            style = {"text_anchor": "end", "font_size": 11, "fill": COLORS[name]}
            parts.append(svg_text(NAMES_END, y, name, **style))
    return parts


def gains_column(column: Column, left: float, places: dict, bottom: float) -> list[Html]:
    """An axis with a mark for each gain. places: as rows_of gives them."""
    gains = {
        (group, name): gain
        for group, of_group in column.groups.items()
        for name, gain in of_group.items()
    }
    ends = [end for gain in gains.values() for end in gain if end is not None]
    bound = max([2.0, *map(abs, ends)])
    axis = Axis((left, left + COLUMN), -bound, bound)
    marks = {value: signed(value) for value in ticks(-bound, bound, GAIN_STEPS)}
    return [
        svg_text(left, 40, column.heading, fill=TICK_COLOR),
        *axis.draw(marks, strong=0, top=GAINS_TOP + 4, bottom=bottom),
        *(gain_mark(axis, row, gain, places[row]) for row, gain in gains.items()),
    ]


def signed(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"


def gain_mark(axis: Axis, row: tuple[str, str], gain: tuple, y: int) -> Html:
    """A dot with its interval. row: the group and the name of the gain."""
    group, name = row
    mean, low, high = gain
    if low is None:
        low = high = mean
    width = 3 if name in BOLD else 1.5
    ends = {"x1": f"{axis.x(low):.1f}", "x2": f"{axis.x(high):.1f}", "y1": y, "y2": y}
    return tag(
        "g",
        tag("title", f"{name}: {group} {gain_text(gain)}"),
        tag("line", **ends, stroke_width=width),
        tag("circle", cx=f"{axis.x(mean):.1f}", cy=y, r=f"{1.3 * width:.1f}"),
        stroke=COLORS[name],
        fill=COLORS[name],
    )


# ----------------------------------------------------------------------------------------- curves


class Panel(NamedTuple):
    """Curves of one host: accuracy over steps, means over the seeds that all of its rules have."""

    host: str
    steps: list[int]
    curves: dict[str, list[float]]  # rule -> accuracy at each of the steps, from 0 to 1


def curves_figure(panels: list[Panel]) -> str:
    """Two panels in a row."""
    across, down = PANEL_PITCH
    parts = []
    for place, panel in enumerate(panels):
        row, column = divmod(place, 2)
        parts += curves_panel(panel, left=44 + across * column, top=66 + down * row)
    title = "Accuracy at temperature 1 on held-out samples, percent, over steps"
    return figure(2 * across, 30 + down * math.ceil(len(panels) / 2), title, parts)


def curves_panel(panel: Panel, left: int, top: int) -> list[Html]:
    """The curves, with the percents to their left, the steps below and the names above."""
    bottom = top + PANEL_HEIGHT

    def across(step: int) -> float:
        return left + PANEL_WIDTH * step / panel.steps[-1]

    def down(share: float) -> float:
        return bottom - PANEL_HEIGHT * share

    parts = [svg_text(left, top - 22, panel.host, font_weight="bold")]
    for percent in (0, 25, 50, 75, 100):
        y = down(percent / 100)
        parts.append(tag("line", x1=left, x2=left + PANEL_WIDTH, y1=y, y2=y, stroke="#e4e4e4"))
        parts.append(svg_text(left - 6, y + 4, percent, text_anchor="end", fill=TICK_COLOR))
    for step in panel.steps:
        of_step = {"text_anchor": "middle", "fill": TICK_COLOR}
        parts.append(svg_text(across(step), bottom + 16, step, **of_step))

    colors = dict(zip(panel.curves, CURVE_COLORS, strict=False))
    for rule, color in colors.items():
        places = zip(panel.steps, panel.curves[rule], strict=True)
        points = " ".join(f"{across(step):.1f},{down(share):.1f}" for step, share in places)
        parts.append(tag("polyline", points=points, fill="none", stroke=color, stroke_width=2))
    names = [tag("tspan", rule, fill=color) for rule, color in colors.items()]
    parts.append(svg_text(left, top - 8, Html(" · ".join(names))))
    return parts
