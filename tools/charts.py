"""charts.py: line charts as inline SVG, and numbers as people read them.

chart("Entropy", "nats per token", [Line("entropy", "first", [1, 2, 3], [0.9, 0.7, 0.6])])
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from tools.markup import Html, join, table, tag

MAX_POINTS = 300  # of a curve; where there are more, neighbours are averaged
MARKED_POINTS = 16  # curves of at most so many points show each point as a dot
TABLE_ROWS = 40  # of the table below a chart

SMALLEST_RANGE = 1e-300  # of the y axis: what is smaller cannot be divided into steps

# A chart's size and margins, in the units of its own SVG. The page scales all of it to its column.
WIDTH, HEIGHT = 384, 190
TOP, BOTTOM = 10, 40
CHARACTER = 8  # width of a character of 12 units in the widest of the usual fonts
LABEL_DISTANCE = 15  # between the baselines of two labels


# ------------------------------------------------------------------------------------------ numbers


def figure(value: float | None) -> str:
    """A number with about three figures, "–" for None and for what is not finite.

    >>> [figure(x) for x in (0.12345, 12.345, 1234.5, -3, 0.00001234, None)]
    ['0.123', '12.3', '1234', '−3', '1.2e−5', '–']
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, power = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(power)}"
    elif value == int(value):
        text = str(int(value))
    else:
        digits = min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
        text = f"{value:.{digits}f}"
    return text.replace("-", "−")


def interval(values: list[float | None], factor: float = 1) -> str:
    """[value, low, high], each times `factor`, with three figures of the largest.

    An interval that is undefined, with None as its ends, leaves the value alone.

    >>> interval([0.3819, 0.3702, 0.3934])
    '0.382 [0.370, 0.393]'
    """
    scaled = [None if value is None else factor * value for value in values]
    value, low, high = scaled
    if value is None:
        return "–"
    largest = max(abs(number) for number in scaled if number is not None) or 1
    digits = max(0, min(3, 2 - math.floor(math.log10(largest))))

    def text(number: float) -> str:
        # Adding 0.0 turns a negative zero into a plain one.
        return f"{round(number, digits) + 0.0:.{digits}f}".replace("-", "−")

    if low is None:
        return text(value)
    return f"{text(value)} [{text(low)}, {text(high)}]"


def interval_cell(values: list[float | None], factor: float = 1) -> Html:
    """`interval` as the content of a table cell, its bracket small."""
    value, bracket, rest = interval(values, factor).partition(" [")
    return join([value, tag("small", bracket, rest)])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `count` steps apart.

    >>> ticks(0, 87)
    [0.0, 25.0, 50.0, 75.0]
    """
    raw_step = (high - low) / count
    power = 10 ** math.floor(math.log10(raw_step))
    # The tolerances keep a bound that is a round number itself, whatever it was rounded to.
    round_steps = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in round_steps if step >= raw_step * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def decimals(step: float) -> int:
    """How many decimals numbers need that are multiples of `step`, at most 11."""
    for digits in range(11):
        if abs(round(step, digits) / step - 1) < 1e-6:
            return digits
    return 11


# ------------------------------------------------------------------------------------------- curves


class Line(NamedTuple):
    """One curve of a chart.

    color: a custom property of the page: visual, text, neutral, good, bad, first, second, third, or
    run-0 to run-7. low, high: the ends of an interval around each point. noisy: draw the points
    thin and their running mean bold.
    """

    label: str
    color: str
    xs: list[float]
    ys: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    noisy: bool = False

    @property
    def style(self) -> str:
        return f"--stroke:var(--{self.color})"

    @property
    def bold(self) -> list[float]:
        """The y values that are drawn bold."""
        if self.noisy and len(self.ys) >= 12:
            return running_mean(self.ys)
        return self.ys


def thin(line: Line) -> Line:
    """The line with at most MAX_POINTS points, each the mean of neighbours."""
    size = math.ceil(len(line.xs) / MAX_POINTS)
    if size <= 1:
        return line

    def means(values: list[float]) -> list[float]:
        chunks = []
        for start in range(0, len(values), size):
            chunks.append(values[start : start + size])
        return [sum(chunk) / len(chunk) for chunk in chunks]

    return line._replace(xs=means(line.xs), ys=means(line.ys))


def running_mean(values: list[float]) -> list[float]:
    """Centred means over about a twelfth of the curve, over fewer values at its ends."""
    half = max(1, len(values) // 24)
    means = []
    for place in range(len(values)):
        window = values[max(0, place - half) : place + half + 1]
        means.append(sum(window) / len(window))
    return means


# ------------------------------------------------------------------------------------------ drawing


class Axes(NamedTuple):
    """Where values lie in the SVG: x from x_from to x_to, y from low to high, and the y ticks."""

    left: float
    right: float
    x_from: float
    x_to: float
    low: float
    high: float
    marks: list[float]
    mark_labels: list[str]

    def across(self, x: float) -> float:
        share = (x - self.x_from) / (self.x_to - self.x_from)
        return self.left + share * (self.right - self.left)

    def down(self, y: float) -> float:
        share = (self.high - y) / (self.high - self.low)
        return TOP + share * (HEIGHT - TOP - BOTTOM)

    def path(self, xs: list[float], ys: list[float]) -> str:
        points = []
        for x, y in zip(xs, ys, strict=True):
            points.append(f"{self.across(x):.1f} {self.down(y):.1f}")
        return "M" + "L".join(points)


def make_axes(
    lines: list[Line],
    top: float | None,
    labels: list[str],
    x_names: list[str] | None = None,
) -> Axes:
    """Axes that hold all lines, with margins that hold the y ticks and the labels at the right.

    top: where the y axis ends, or None for the largest value. It begins at 0 or below. labels: what
    stands at the right. x_names: as in `chart`.
    """
    xs = [x for line in lines for x in line.xs]
    if x_names:
        xs += [0, len(x_names) - 1]  # every named place is on the axis, with a value or without
    ys = [y for line in lines for y in line.ys + (line.low or []) + (line.high or [])]
    x_from, x_to = min(xs), max(xs)
    if x_to == x_from:
        x_to = x_from + 1
    low = min(0, min(ys))
    high = max(ys) if top is None else top
    if high - low < SMALLEST_RANGE:
        high = low + 1
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    if marks[-1] < high - 1e-9 * step:
        # The axis ends at a tick, so that the largest value has one above it.
        marks.append(marks[-1] + step)
    digits = decimals(step)
    mark_labels = [f"{mark:.{digits}f}".replace("-", "−") for mark in marks]
    longest_mark = max(len(label) for label in mark_labels)
    longest_label = max((len(label) for label in labels), default=0)
    return Axes(
        left=10 + CHARACTER * max(3, longest_mark),
        right=WIDTH - 14 - CHARACTER * longest_label,
        x_from=x_from,
        x_to=x_to,
        low=low,
        high=max(high, marks[-1]),
        marks=marks,
        mark_labels=mark_labels,
    )


def svg_text(x: float, y: float, content, **attributes) -> Html:
    return tag("text", content, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def grid(axes: Axes, x_label: str, x_names: list[str] | None) -> list[Html]:
    """Horizontal lines with the y ticks, the x ticks and the name of the x axis."""
    parts = []
    for mark, label in zip(axes.marks, axes.mark_labels, strict=True):
        y = axes.down(mark)
        parts.append(tag("path", class_="grid", d=f"M{axes.left:.1f} {y:.1f}H{axes.right:.1f}"))
        parts.append(svg_text(axes.left - 8, y + 4, label, class_="tick", text_anchor="end"))
    if x_names:
        places = list(enumerate(x_names))
    else:
        places = [(x, int(x)) for x in ticks(axes.x_from, axes.x_to) if x == int(x)]
    for x, name in places:
        y = HEIGHT - 22
        parts.append(svg_text(axes.across(x), y, name, class_="tick", text_anchor="middle"))
    middle = (axes.left + axes.right) / 2
    parts.append(svg_text(middle, HEIGHT - 5, x_label, class_="tick", text_anchor="middle"))
    return parts


def curves(axes: Axes, lines: list[Line]) -> list[Html]:
    """All lines, each with the band of its intervals and with its points where they are noisy."""
    parts = []
    for line in lines:
        bold = line.bold
        if line.low and line.high:
            outline = axes.path(line.xs + line.xs[::-1], line.high + line.low[::-1])
            parts.append(stroke("band", line, outline + "Z"))
        if bold is not line.ys:
            parts.append(stroke("raw", line, axes.path(line.xs, line.ys)))
        parts.append(stroke("line", line, axes.path(line.xs, bold)))
        if len(line.xs) <= MARKED_POINTS:
            parts += dots(axes, line)
    return parts


def stroke(name: str, line: Line, path: str) -> Html:
    return tag("path", class_=name, style=line.style, d=path)


def dots(axes: Axes, line: Line) -> list[Html]:
    """A dot at each point of the bold curve."""
    circles = []
    for x, y in zip(line.xs, line.bold, strict=True):
        across, down = f"{axes.across(x):.1f}", f"{axes.down(y):.1f}"
        circles.append(tag("circle", style=line.style, cx=across, cy=down, r=2.6))
    return circles


def end_labels(axes: Axes, lines: list[Line]) -> list[Html]:
    """Each line's name beside its end. Names that would overlap move apart."""
    ordered = sorted(lines, key=lambda line: axes.down(line.bold[-1]))
    places = [axes.down(line.bold[-1]) for line in ordered]
    # First push each name below the one above it, then back up from the lower edge.
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_DISTANCE)
    floor = HEIGHT - BOTTOM - 1
    for i in reversed(range(len(places))):
        places[i] = min(places[i], floor)
        floor = places[i] - LABEL_DISTANCE
    return [
        svg_text(axes.right + 8, y + 4, line.label, class_="label", style=line.style)
        for line, y in zip(ordered, places, strict=True)
    ]


def readout(lines: list[Line], x_label: str, values: bool) -> Html:
    """The line above a chart that holds each curve's name and its last value.

    The page's script puts the values under the pointer in their place, so nothing moves. values:
    False where the last value says nothing, as in a histogram.
    """
    keys = []
    for line in lines:
        number = tag("b", figure(line.bold[-1]) if values else "")
        keys += [" ", tag("span", tag("i"), line.label, " ", number, style=line.style)]
    at = tag("span", f"last {x_label}:" if values else "", class_="at")
    return tag("output", at, *keys)


def chart(
    title: str,
    unit: str,
    lines: list[Line],
    *,
    x_label: str = "step",
    x_names: list[str] | None = None,
    top: float | None = None,
    values: bool = True,
    end_names: bool = True,
    note: str = "",
) -> Html:
    """A line chart: an HTML figure with inline SVG, a read-out and its numbers as a table.

    x_names: names of the places 0, 1, … on the x axis. top: where the y axis ends, by default at
    the largest value. values: show each line's last value. end_names: write the lines' names at
    their ends, if there are several. note: how to read the chart. Empty if there is nothing to
    draw.
    """
    lines = [thin(line) for line in lines if line.xs]
    if not lines:
        return Html()
    named = lines if end_names and len(lines) > 1 else []
    axes = make_axes(lines, top, labels=[line.label for line in named], x_names=x_names)
    return tag(
        "figure",
        tag("figcaption", tag("b", title), " ", tag("span", unit, class_="unit")),
        readout(lines, x_label, values),
        tag(
            "svg",
            *grid(axes, x_label, x_names),
            *curves(axes, lines),
            *end_labels(axes, named),
            tag("path", class_="rule", d=f"M0 {TOP}V{HEIGHT - BOTTOM}"),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=f"{title}, {unit}: {spoken(lines)}",
            data_chart=json.dumps(pointed(axes, lines, x_label, x_names=x_names)),
        ),
        tag("p", note, class_="note") if note else "",
        numbers_table(lines, x_label, x_names),
        class_="chart",
    )


def spoken(lines: list[Line]) -> str:
    """What a screen reader says of the curves."""
    parts = []
    for line in lines:
        parts.append(f"{line.label} from {figure(line.ys[0])} to {figure(line.ys[-1])}")
    return "; ".join(parts)


def pointed(axes: Axes, lines: list[Line], x_label: str, x_names: list[str] | None) -> dict:
    """What the page's script needs to show the values under the pointer."""
    return {
        "left": axes.left,
        "right": axes.right,
        "from": axes.x_from,
        "to": axes.x_to,
        "x": x_label,
        "names": x_names,
        "lines": [[line.xs, [figure(y) for y in line.ys]] for line in lines],
    }


def numbers_table(lines: list[Line], x_label: str, x_names: list[str] | None) -> Html:
    """The chart's numbers as a folded table, evenly chosen where there are many."""
    by_x: dict[float, dict[str, str]] = {}
    for line in lines:
        for place, x in enumerate(line.xs):
            text = figure(line.ys[place])
            if line.low and line.high:
                text = interval([line.ys[place], line.low[place], line.high[place]])
            by_x.setdefault(x, {})[line.label] = text
    xs = sorted(by_x)
    shown = xs
    note = ""
    if len(xs) > TABLE_ROWS:
        shown = [xs[round(i * (len(xs) - 1) / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)]
        note = f" ({len(shown)} of {len(xs)} points)"
    rows = []
    for x in shown:
        name = x_names[int(x)] if x_names else figure(x)
        rows.append([name, *(by_x[x].get(line.label, "") for line in lines)])
    heads = [x_label, *(line.label for line in lines)]
    return tag("details", tag("summary", "Figures", note), table(heads, rows))


# ------------------------------------------------------------------------------ files of pictures

TICK_COLOR = "#555555"


def drawing(width: float, height: float, title: str, parts: Sequence[Html], **attributes) -> str:
    """An SVG file on white. title: for who cannot see it; it is not drawn."""
    picture = tag(
        "svg",
        tag("title", title),
        tag("rect", width=width, height=height, fill="white"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        font_family="sans-serif",
        **attributes,
    )
    return f"{picture}\n"


class Axis(NamedTuple):
    """Where values from low to high lie between two places of a drawing, from left to right."""

    ends: tuple[float, float]
    low: float
    high: float

    def x(self, value: float) -> float:
        left, right = self.ends
        return left + (value - self.low) / (self.high - self.low) * (right - left)

    def draw(self, names: dict[float, str], strong: float, top: float, bottom: float) -> list[Html]:
        """Vertical lines at some values, with their names below.

        strong: the value that others are held against.
        """
        parts = []
        for value, name in names.items():
            x = f"{self.x(value):.1f}"
            color = "#888888" if abs(value - strong) < 1e-9 else "#e4e4e4"
            parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, stroke=color))
            of_value = {"fill": TICK_COLOR, "text_anchor": "middle"}
            parts.append(svg_text(self.x(value), bottom + 16, name, **of_value))
        return parts
