"""ablation_figures.py: the figures of a grid of runs: gains with their intervals, and curves."""

import html
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from tools.charts import ticks
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
COLUMN, COLUMN_PITCH = 380, 394  # a column's width, with and without the space behind it
GAIN_STEPS = 8  # between the ticks of the gains' axis, about

Gains = dict[str, tuple]  # name of COLORS -> (mean, low, high), the ends None without an interval


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="14" y="20" font-weight="bold" font-size="14">{html.escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


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
    places = rows_of(columns[0].groups)
    bottom = 14 + max(places.values(), default=GAINS_TOP)
    parts = []
    for group, gains in columns[0].groups.items():
        if gains:
            middle = statistics.fmean(places[group, name] for name in gains) + 4
            parts.append(f'<text x="14" y="{middle:g}">{html.escape(group)}</text>')
        for name in gains:
            parts.append(
                f'<text x="234" y="{places[group, name] + 4}" text-anchor="end" font-size="11" '
                f'fill="{COLORS[name]}">{name}</text>'
            )
    for number, column in enumerate(columns):
        parts += gains_column(column, GAINS_LEFT + number * COLUMN_PITCH, places, bottom=bottom)
    return svg(GAINS_LEFT + len(columns) * COLUMN_PITCH, bottom + 26, title, parts)


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


def gains_column(column: Column, left: float, places: dict, bottom: float) -> list[str]:
    """An axis with a mark for each gain. places: as rows_of gives them."""
    gains = [gain for of_group in column.groups.values() for gain in of_group.values()]
    bound = max([2.0, *(abs(end) for gain in gains for end in gain if end is not None)])

    def x(value: float) -> str:
        return f"{left + COLUMN / 2 * (1 + value / bound):.1f}"

    parts = [f'<text x="{left}" y="40" fill="#555">{html.escape(column.heading)}</text>']
    for value in ticks(-bound, bound, GAIN_STEPS):
        color = "#888" if value == 0 else "#e4e4e4"
        name = f"{value:+g}".replace("-", "−") if value else "0"
        parts.append(
            f'<line x1="{x(value)}" x2="{x(value)}" y1="{GAINS_TOP + 4}" y2="{bottom}" '
            f'stroke="{color}"/>'
            f'<text x="{x(value)}" y="{bottom + 16}" text-anchor="middle" fill="#555">{name}</text>'
        )
    for group, of_group in column.groups.items():
        for name, gain in of_group.items():
            parts.append(gain_mark(f"{name}: {group}", gain, x, name, places[group, name]))
    return parts


def gain_mark(hint: str, gain: tuple, x: Callable[[float], str], name: str, y: int) -> str:
    mean, low, high = gain
    low, high = (mean if end is None else end for end in (low, high))
    width = 3 if name in BOLD else 1.5
    hint = html.escape(f"{hint} {gain_text(gain)}")
    return (
        f'<g stroke="{COLORS[name]}" fill="{COLORS[name]}"><title>{hint}</title>'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}" stroke-width="{width}"/>'
        f'<circle cx="{x(mean)}" cy="{y}" r="{1.3 * width:.1f}"/></g>'
    )


# ----------------------------------------------------------------------------------------- curves


class Panel(NamedTuple):
    """Curves of one host: accuracy over steps, means over the seeds that all of its rules have."""

    host: str
    steps: list[int]
    curves: dict[str, list[float]]  # rule -> accuracy at each of the steps, from 0 to 1


def curves_figure(panels: list[Panel]) -> str:
    """Two panels in a row."""
    parts = []
    for place, panel in enumerate(panels):
        row, column = divmod(place, 2)
        parts += curves_panel(panel, left=44 + 320 * column, top=66 + 240 * row)
    title = "Accuracy at temperature 1 on held-out samples, percent, over steps"
    return svg(640, 30 + 240 * math.ceil(len(panels) / 2), title, parts)


def curves_panel(panel: Panel, left: int, top: int) -> list[str]:
    width, height = 250, 160
    parts = [f'<text x="{left}" y="{top - 22}" font-weight="bold">{html.escape(panel.host)}</text>']
    for percent in (0, 25, 50, 75, 100):
        y = top + height * (1 - percent / 100)
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>'
            f'<text x="{left - 6}" y="{y + 4}" text-anchor="end" fill="#555">{percent}</text>'
        )

    def x(step: int) -> str:
        return f"{left + width * step / panel.steps[-1]:.1f}"

    colors = dict(zip(panel.curves, CURVE_COLORS, strict=False))
    for rule, color in colors.items():
        points = [
            f"{x(step)},{top + height * (1 - share):.1f}"
            for step, share in zip(panel.steps, panel.curves[rule], strict=True)
        ]
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
    for step in panel.steps:
        parts.append(
            f'<text x="{x(step)}" y="{top + height + 16}" text-anchor="middle" '
            f'fill="#555">{step}</text>'
        )
    names = " · ".join(
        f'<tspan fill="{color}">{html.escape(rule)}</tspan>' for rule, color in colors.items()
    )
    parts.append(f'<text x="{left}" y="{top - 8}">{names}</text>')
    return parts
