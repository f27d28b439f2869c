"""walkthrough_pictures.py: the three pictures of tools/walkthrough.py, as SVG files.

Each stands by itself, since a page shows it by its name. Texts of a model are escaped by `tag`.
"""

import math

from tools.charts import drawing
from tools.markup import Html, tag

COLORS = {"visual": "#d95f02", "text": "#1f5ac8", "neutral": "#8a8a8a"}
INK = "#222222"
SIDE = 260  # of an image, in the units of the SVG
GAP = 20
CHART_WIDTH, CHART_HEIGHT = 860, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 34, 78  # margins of a chart
LABELS = 64  # a chart of more tokens names only some of them
DARKEST = 0.85  # of the veil over a place without attention


def text(x: float, y: float, content: str, **attributes) -> Html:
    options = {"font_size": 12, "fill": INK, **attributes}
    return tag("text", content, x=f"{x:.1f}", y=f"{y:.1f}", **options)


# --------------------------------------------------------------------------- attention on the image


def attention_picture(
    image: str, size: tuple[int, int], cells: tuple[int, int], panels: list[tuple[str, list[float]]]
) -> str:
    """The image once for each token, dark where the token has little attention.

    image: a data URI; size: its width and height in pixels; cells: rows and columns of the grid.
    panels: a title and the attention of each cell, row by row.
    """
    scale = SIDE / max(size)
    width = size[0] * scale
    height = size[1] * scale
    parts = []
    for place, (title, attention) in enumerate(panels):
        left = GAP + place * (SIDE + GAP)
        parts.append(text(left, 24, title))
        parts.append(
            tag("image", href=image, x=left, y=36, width=f"{width:.1f}", height=f"{height:.1f}")
        )
        parts += veil(left, 36, width / cells[1], height / cells[0], cells[1], attention)
    whole = GAP + len(panels) * (SIDE + GAP)
    title = "The image, dark where a token has little attention"
    return drawing(whole, math.ceil(height) + 36 + GAP, title, parts)


def veil(
    left: float, top: float, width: float, height: float, columns: int, attention: list[float]
) -> list[Html]:
    """A rectangle over each cell of the image, the lighter the more attention the cell has."""
    largest = max(attention) or 1
    rectangles = []
    for place, value in enumerate(attention):
        row, column = divmod(place, columns)
        rectangles.append(
            tag(
                "rect",
                x=f"{left + column * width:.1f}",
                y=f"{top + row * height:.1f}",
                width=f"{width:.1f}",
                height=f"{height:.1f}",
                fill="black",
                fill_opacity=f"{DARKEST * (1 - value / largest):.2f}",
            )
        )
    return rectangles


# ------------------------------------------------------------------------------ along the response


def across(place: int, count: int) -> float:
    """The middle of token `place` of `count`."""
    return LEFT + (place + 0.5) * (CHART_WIDTH - LEFT - RIGHT) / count


def down(value: float, highest: float) -> float:
    return TOP + (1 - value / highest) * (CHART_HEIGHT - TOP - BOTTOM)


def frame(tokens: list[str], highest: float, step: float) -> list[Html]:
    """Horizontal lines with their values, and the tokens below."""
    parts = []
    for mark in range(math.floor(highest / step) + 1):
        y = down(mark * step, highest)
        line = f"M{LEFT} {y:.1f}H{CHART_WIDTH - RIGHT}"
        parts.append(tag("path", d=line, stroke="#dddddd", stroke_width=1))
        parts.append(text(LEFT - 6, y + 4, f"{mark * step:.1f}", text_anchor="end"))
    every = math.ceil(len(tokens) / LABELS)
    y = CHART_HEIGHT - BOTTOM + 10
    for place in range(0, len(tokens), every):
        x = across(place, len(tokens)) + 4
        turned = f"rotate(-60 {x:.1f} {y:.1f})"
        label = f"{place + 1} {tokens[place]}"
        parts.append(text(x, y, label, font_size=10, text_anchor="end", transform=turned))
    return parts


def legend(names: dict[str, str]) -> list[Html]:
    """What each colour means, above the chart."""
    parts = []
    for place, (name, color) in enumerate(names.items()):
        x = LEFT + place * 150
        parts.append(tag("rect", x=x, y=10, width=12, height=12, fill=color))
        parts.append(text(x + 18, 21, name))
    return parts


def shifts_picture(
    tokens: list[str], visual: list[float], words: list[float], marked: list[int]
) -> str:
    """Visual and text shift of each token; the tokens at `marked` places have dots."""
    highest = max([*visual, *words, 0.5]) * 1.05
    parts = frame(tokens, highest, step=0.5)
    for values, color in ((visual, COLORS["visual"]), (words, COLORS["text"])):
        points = []
        for place, value in enumerate(values):
            points.append(f"{across(place, len(tokens)):.1f} {down(value, highest):.1f}")
        parts.append(
            tag("path", d="M" + "L".join(points), stroke=color, stroke_width=2, fill="none")
        )
        for place in marked:
            x, y = points[place].split()
            parts.append(tag("circle", cx=x, cy=y, r=4, fill=color))
    names = {"visual shift, radians": COLORS["visual"], "text shift, radians": COLORS["text"]}
    title = "Shifts of attention along the response, in radians"
    return drawing(CHART_WIDTH, CHART_HEIGHT, title, [*legend(names), *parts])


def weights_picture(tokens: list[str], weights: list[float], roles: list[str]) -> str:
    """The weight of each token as a bar in the colour of its role, and a line at 1, the mean."""
    highest = max([*weights, 1]) * 1.05
    parts = frame(tokens, highest, step=0.5)
    width = 0.8 * (CHART_WIDTH - LEFT - RIGHT) / len(tokens)
    floor = down(0, highest)
    for place, (weight, role) in enumerate(zip(weights, roles, strict=True)):
        y = down(weight, highest)
        parts.append(
            tag(
                "rect",
                x=f"{across(place, len(tokens)) - width / 2:.1f}",
                y=f"{y:.1f}",
                width=f"{width:.1f}",
                height=f"{floor - y:.1f}",
                fill=COLORS[role],
            )
        )
    mean = f"M{LEFT} {down(1, highest):.1f}H{CHART_WIDTH - RIGHT}"
    parts.append(tag("path", d=mean, stroke=INK, stroke_width=1, stroke_dasharray="4 3"))
    names = {f"{role} role": color for role, color in COLORS.items()}
    title = "Weights of the tokens along the response"
    return drawing(CHART_WIDTH, CHART_HEIGHT, title, [*legend(names), *parts])
