"""credit_view.py: what `credit` measures, as a Markdown table and as a figure."""

import math
import re

import dyco
from tools.charts import TICK_COLOR, Axis, decimals, drawing, interval, svg_text, ticks
from tools.gradients import ORACLES
from tools.markup import Html, tag

# ------------------------------------------------------------------------------------------- names

OF_DYCO = ("paper", "signed", "centered", "response")


def label(name: str) -> str:
    """What people call a rule: the paper's name for it, with ours where that is another one.

    >>> [label(name) for name in ("entropy", "vppo", "signed minmax", "surprise", "oracle", "off")]
    ['80/20 (entropy)', 'VPPO', 'DyCo (signed minmax)', 'surprise', 'oracle', 'host']
    """
    if name == "off":
        return "host"
    rule = name.partition(" ")[0]
    if rule in OF_DYCO:
        return f"DyCo ({name})"
    source = dyco.RULES[rule].source if rule in dyco.RULES else ""
    in_brackets = re.search(r"\((.+)\)", source)
    if in_brackets is None:
        return name
    of_paper = in_brackets[1]
    return of_paper if of_paper.lower() == name else f"{of_paper} ({name})"


def by_gain(rules: dict[str, dict]) -> list[str]:
    """Oracles first, then rules by what they gain over their shuffled controls; without the
    host."""
    oracles = [name for name in rules if name in ORACLES]
    others = [name for name in rules if name not in ORACLES and name != "off"]

    def gain(name: str) -> float:
        value = rules[name]["over shuffled"][0]
        return -math.inf if value is None else value  # a rule without any gradient

    return sorted(oracles, key=gain, reverse=True) + sorted(others, key=gain, reverse=True)


# ------------------------------------------------------------------------------------------- table


def percent(values: list[float | None]) -> str:
    return "–" if values[0] is None else f"{100 * values[0]:.0f}".replace("-", "−")


def number(values: list[float | None], digits: int = 2) -> str:
    return "–" if values[0] is None else f"{values[0]:.{digits}f}"


def cells(name: str, row: dict, with_decisions: bool) -> list[str]:
    """One line of the table."""
    roles = " / ".join(percent(row[role]) for role in ("visual", "text", "neutral"))
    line = [label(name), f"{number(row['factor'])} ± {number(row['spread'])}"]
    line += [percent(row["raised"]), roles]
    if with_decisions:
        line += [interval(row["deciding"]), interval(row["wrong"])]
    if name == "off":
        line += ["0", "–", "–"]
    else:
        line += [number(row["angle"], 1), interval(row["gain"], 100)]
        line.append(f"**{interval(row['over shuffled'], 100)}**")
    if with_decisions:
        line.append("–" if name == "off" else percent(row["share"]))
    return line


def credit_table(content: dict) -> str:
    """What credit.json holds, as a page of Markdown."""
    rules = content["rules"]
    with_decisions = "deciding" in rules["off"]
    heads = ["rule", "factor, mean ± spread", "raised tokens, %"]
    heads.append("weight on visual / text / neutral tokens, %")
    if with_decisions:
        heads += ["finds deciding tokens", "finds wrong decisions"]
    heads += ["angle to the host's gradient, °", "gain over the host"]
    heads.append("gain over its own shuffled control")
    if with_decisions:
        heads.append("of the oracle's, %")
    lines = ["# What the rules weigh, and what their gradients do", "", *about(content), ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in ["off", *by_gain(rules)]:
        lines.append(f"| {' | '.join(cells(name, rules[name], with_decisions))} |")
    lines += ["", *notes(content, with_decisions), "", "![The table as a figure](credit.svg)", ""]
    return "\n".join(lines)


def about(content: dict) -> list[str]:
    """Where the figures come from."""
    sizes = " or ".join(str(size) for size in content["group_sizes"])
    second_half = content["batches"] - content["batches"] // 2
    skipped = second_half - content["compared"]
    without = f" ({skipped} more have no gradient: equal rewards)" if skipped else ""
    reference = content["rules"]["off"]["reference"]
    level = "" if content["level"] is None else f" (level {content['level']})"
    return [
        f"Model {content['model']}, data {content['data']}{level}, host {content['algo']}: "
        f"{content['prompts']} prompts × {sizes} responses in {content['batches']} batches.",
        f"The figures are means over {content['compared']} batches{without}, the brackets 95 % "
        "intervals over them; fewer than four batches have none. "
        "The sum of the host's gradients over the other batches is the reference; 100 · cosine of "
        f"a batch's gradient with it is {interval(reference, 100)} for the host.",
    ]


def notes(content: dict, with_decisions: bool) -> list[str]:
    """What the columns mean."""
    lines = [
        "- *factor*: what multiplies the response's advantage, over the tokens of all responses "
        "that have one.",
        "- *raised tokens*: those whose factor is above the mean of their response.",
        "- *weight on …*: shares of the sum of all factors. The host's are the shares of tokens.",
    ]
    if with_decisions:
        lines += [
            "- *finds deciding tokens*: how often a token that decides something has a larger "
            "factor than a token that does not (area under the ROC curve; 0.5 is chance). All "
            "responses are pooled.",
            "- *finds wrong decisions*: the same for wrong decisions against right ones, in "
            "responses worse than the mean of their group.",
        ]
    lines += [
        "- *gain*: in 100 · cosine with the reference.",
        "- *shuffled control*: the same factors on other tokens of the same response, drawn once "
        "for each batch. What a rule gains over it, it gains by its choice of tokens. That can be "
        "much although it gains nothing over the host: large factors on random tokens do harm. A "
        "rule with one factor for the whole response gains 0 by definition.",
    ]
    if with_decisions:
        lines.append(
            f"- *oracles*: eq. 7 and 8 at α = {content['dyco']['alpha']:g} with the score 1 at "
            "deciding tokens; with blame only at the wrong ones in responses worse than the mean "
            "of their group. The last column is a share of what the oracle with blame gains. A "
            "rule whose factors differ more can gain more."
        )
    return lines


# ------------------------------------------------------------------------------------------ figure

WIDTH = 740
TOP = 104  # above the first row
ROW = 22  # between rows
NAMES_END = 158  # where the rules' names end
GAINS = (176, 486)  # from left to right
AREAS = (536, 716)
RULE_COLOR = "#0072b2"
ORACLE_COLOR = "#009e73"
DECIDING_COLOR = "#111111"
WRONG_COLOR = "#d55e00"
RING_COLOR = "#aa4499"


def plain_names(marks: list[float]) -> dict[float, str]:
    """{mark: its number}, as many decimals as the marks need."""
    digits = decimals(marks[1] - marks[0])
    # Adding 0.0 turns a negative zero into a plain one.
    return {mark: f"{round(mark, digits) + 0.0:.{digits}f}".replace("-", "−") for mark in marks}


def caption(x: float, y: float, content: str) -> Html:
    return svg_text(x, y, content, fill=TICK_COLOR, text_anchor="middle")


def gains_axis(rules: dict[str, dict]) -> Axis:
    """An axis that holds 0, all intervals and all gains over the host."""
    values = [0.0]
    for row in rules.values():
        values += [100 * end for end in (*row["over shuffled"], row["gain"][0]) if end is not None]
    margin = 0.04 * (max(values) - min(values)) or 1
    return Axis(GAINS, min(values) - margin, max(values) + margin)


def gain_mark(axis: Axis, name: str, row: dict, y: float) -> Html:
    """A dot with its interval, and a ring for the gain over the host."""
    color = ORACLE_COLOR if name in ORACLES else RULE_COLOR
    over_shuffled = row["over shuffled"]
    value, low, high = (None if end is None else axis.x(100 * end) for end in over_shuffled)
    hint = f"{label(name)}: {interval(over_shuffled, 100)} over its own shuffled control, "
    hint += f"{interval(row['gain'], 100)} over the host"
    parts = [tag("title", hint)]
    if low is not None:
        ends = {"x1": f"{low:.1f}", "x2": f"{high:.1f}", "y1": y, "y2": y}
        parts.append(tag("line", **ends, stroke_width=2))
    if value is not None:
        parts.append(tag("circle", cx=f"{value:.1f}", cy=y, r=4))
    if row["gain"][0] is not None:
        ring = f"{axis.x(100 * row['gain'][0]):.1f}"
        parts.append(tag("circle", cx=ring, cy=y, r=4, fill="none", stroke=RING_COLOR))
    return tag("g", *parts, class_="gain", stroke=color, fill=color)


def area_marks(axis: Axis, name: str, row: dict, y: float) -> list[Html]:
    """A dot for each of the two areas under the curve."""
    colors = {"deciding": DECIDING_COLOR, "wrong": WRONG_COLOR}
    parts = []
    for figure, color in colors.items():
        if row[figure][0] is not None:
            hint = tag("title", f"{label(name)}: finds {figure} tokens {interval(row[figure])}")
            x = f"{axis.x(row[figure][0]):.1f}"
            parts.append(tag("circle", hint, cx=x, cy=y, r=4, fill=color, fill_opacity=0.85))
    return parts


def areas_panel(rules: dict[str, dict], names: list[str], bottom: float) -> list[Html]:
    """The second column: does the rule find what it should?"""
    axis = Axis(AREAS, 0, 1)
    left = AREAS[0]
    parts = [
        svg_text(left, 58, "How well its factors find …", font_weight="bold"),
        svg_text(left, 74, "● tokens that decide something", fill=DECIDING_COLOR),
        svg_text(left, 89, "● wrong decisions", fill=WRONG_COLOR),
        *axis.draw(plain_names([0, 0.25, 0.5, 0.75, 1]), strong=0.5, top=TOP - 12, bottom=bottom),
        caption(axis.x(0.5), bottom + 34, "area under the ROC curve"),
        caption(axis.x(0.5), bottom + 49, "0.5 is chance, 1 is all"),
    ]
    for place, name in enumerate(names):
        parts += area_marks(axis, name, rules[name], TOP + ROW * place)
    return parts


def gains_panel(rules: dict[str, dict], names: list[str], bottom: float) -> list[Html]:
    """The first column: what does a rule gain by choosing its tokens?"""
    axis = gains_axis(rules)
    marks = ticks(axis.low, axis.high, 6)
    middle = sum(GAINS) / 2
    parts = [
        svg_text(
            GAINS[0], 58, "Does its gradient point in a better direction …", font_weight="bold"
        ),
        svg_text(GAINS[0], 74, "● than with the same factors on other tokens?", fill=RULE_COLOR),
        svg_text(GAINS[0], 89, "○ than the gradient of the host?", fill=RING_COLOR),
        *axis.draw(plain_names(marks), strong=0, top=TOP - 12, bottom=bottom),
        caption(middle, bottom + 34, "gain in 100 · cosine with the sum of other batches"),
        caption(middle, bottom + 49, "right of 0 is better; lines: 95 % intervals"),
    ]
    for place, name in enumerate(names):
        y = TOP + ROW * place
        color = ORACLE_COLOR if name in ORACLES else "#000000"
        parts.append(svg_text(NAMES_END, y + 4, label(name), fill=color, text_anchor="end"))
        parts.append(gain_mark(axis, name, rules[name], y))
    return parts


def credit_figure(rules: dict[str, dict]) -> str:
    """One row for each rule: what it gains over its own shuffled control, and what it finds."""
    names = by_gain(rules)
    bottom = TOP + ROW * len(names) - 8
    height = bottom + 62
    with_decisions = "deciding" in rules["off"]
    title = "Which rule of token credit finds the tokens that matter?"
    parts = [
        svg_text(14, 24, title, font_weight="bold", font_size=16),
        *gains_panel(rules, names, bottom),
    ]
    if with_decisions:
        what = "Oracles know what each token decides; the one with blame knows the errors, too."
        parts.append(svg_text(14, 41, what, fill=ORACLE_COLOR))
        parts += areas_panel(rules, names, bottom)
    return drawing(WIDTH, height, title, parts, font_size=12)
