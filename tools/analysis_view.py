"""analysis_view.py: the report's sections about analysis/roles.json and analysis/intervene.json.

The two files are what `python -m tools.roles` and `python -m tools.intervene` write.
"""

import math

from tools.charts import Line, chart, figure, interval_cell
from tools.markup import Html, join, table, tag
from tools.token_view import token_text

# How right and wrong responses are called in roles.json, and their label and colour here.
OUTCOMES = {"correct": ("right", "good"), "incorrect": ("wrong", "bad")}

# The arms of an intervention, and their label and colour here.
ARMS = {
    "role tokens": ("role", "first"),
    "random tokens": ("random", "neutral"),
    "other modality": ("other", "third"),
}

ARM_HEADS = [
    "role",
    "arm",
    "λ",
    "accuracy, %",
    "change, points",
    "against random, points",
    "alignment",
    "tokens touched",
    "capped, %",
]


def estimates_line(
    label: str, color: str, points: list[tuple[float, list]], factor: float = 1
) -> Line:
    """A line of estimates (x, [value, low, high]), without those that are undefined."""
    defined = [(x, estimate) for x, estimate in points if None not in estimate]
    return Line(
        label,
        color,
        xs=[x for x, _ in defined],
        ys=[factor * value for _, (value, _, _) in defined],
        low=[factor * low for _, (_, low, _) in defined],
        high=[factor * high for _, (_, _, high) in defined],
    )


# ------------------------------------------------------------------- right and wrong responses


def roles_section(content: dict) -> Html:
    """roles.json: what right and wrong responses attend to."""
    statistics = content["statistics"]
    tenths = [name for name in statistics if name.startswith("alignment at ")]
    rows = []
    for name, row in statistics.items():
        if name not in tenths:
            cells = [interval_cell(row[part]) for part in (*OUTCOMES, "difference")]
            rows.append([name, *cells])
    charts = [
        alignment_by_tenth([statistics[name] for name in tenths]),
        shift_histogram("Visual shift", content["shifts"]["visual_shift"]),
        shift_histogram("Text shift", content["shifts"]["text_shift"]),
    ]
    strings = []
    for role in ("visual", "text"):
        shown = [role_string(role, string) for string in content["strings"][role]]
        strings.append([role, join(shown)])
    return join(
        [
            tag("h3", "Right and wrong responses"),
            tag("p", roles_lead(content), class_="lead"),
            table(["", "right", "wrong", "wrong − right, within prompts"], rows),
            tag("div", *charts, class_="charts"),
            tag("h4", "Strings that most often have a role"),
            table([], strings, class_="strings"),
        ]
    )


def roles_lead(content: dict) -> str:
    right, wrong = content["counts"]["correct"], content["counts"]["incorrect"]
    return (
        f"Model {content['model']}, data {content['data']}: {right['responses']} responses to "
        f"{right['prompts']} prompts were right, {wrong['responses']} to {wrong['prompts']} wrong. "
        "Brackets are 95 % bootstrap intervals over prompts. Differences are between right and "
        "wrong responses to the same prompts; one whose interval holds 0 may be chance."
    )


def alignment_by_tenth(tenths: list[dict]) -> Html:
    """Mean score over the course of a response."""
    lines = []
    for outcome, (label, color) in OUTCOMES.items():
        points = [(place, tenth[outcome]) for place, tenth in enumerate(tenths)]
        lines.append(estimates_line(label, color, points))
    names = [str(place + 1) for place in range(len(tenths))]
    return chart("Alignment by tenth", "mean score", lines, x_label="tenth", x_names=names)


def shift_histogram(title: str, histograms: dict) -> Html:
    """How often each shift occurs, as a line through the middles of the bins."""
    lines = []
    width = 0.0
    for outcome, (label, color) in OUTCOMES.items():
        counts = histograms[outcome]["counts"]
        width = math.pi / len(counts)
        middles = [width * (place + 0.5) for place in range(len(counts))]
        total = max(sum(counts), 1)
        percents = [100 * count / total for count in counts]
        lines.append(Line(label, color, xs=middles, ys=percents))
    unit = f"% of tokens, bins of {width:.2f}"
    return chart(title, unit, lines, x_label="radians", values=False)


def role_string(role: str, string: dict) -> Html:
    """A string in its role's colour, and how often it has that role."""
    often = f"{100 * string['share']:.0f} % of {string['occurrences']}"
    text = tag("span", token_text(string["token"]), class_=f"{role[0]} w4 token")
    return join([text, " ", tag("small", often), " "])


# ------------------------------------------------------------------------------- interventions


def intervention_section(content: dict) -> Html:
    """intervene.json: what becomes of answers when the attention of some tokens is changed."""
    arms, settings = content["arms"], content["settings"]
    charts = []
    for role in dict.fromkeys(arm["role"] for arm in arms):
        own = [arm for arm in arms if arm["role"] == role]
        charts.append(arms_chart(f"Accuracy: {role} tokens", "%", own, key="accuracy", factor=100))
        charts.append(
            arms_chart(f"Alignment of {role} tokens", "mean score", own, key="alignment", factor=1)
        )
    lead = (
        f"Model {settings['model']}, data {settings['data']}: at the tokens of a role, every "
        "head's attention mass on the role's own modality is scaled by λ while sampling. Controls: "
        "“random”, as many tokens drawn at random; “other”, the other modality at the role's "
        "tokens. Bands are 95 % intervals."
    )
    return join(
        [
            tag("h3", "Interventions"),
            tag("p", lead, class_="lead"),
            tag("div", *charts, class_="charts two"),
            tag(
                "details",
                tag("summary", "All arms"),
                table(ARM_HEADS, [arm_cells(arm) for arm in arms]),
            ),
        ]
    )


def arms_chart(title: str, unit: str, arms: list[dict], key: str, factor: float) -> Html:
    """One estimate of all arms of a role, over λ."""
    factors = sorted({arm["factor"] for arm in arms})
    lines = []
    for name, (label, color) in ARMS.items():
        points = [(factors.index(arm["factor"]), arm[key]) for arm in arms if arm["arm"] == name]
        lines.append(estimates_line(label, color, points, factor=factor))
    return chart(title, unit, lines, x_label="λ", x_names=[f"{value:g}" for value in factors])


def arm_cells(arm: dict) -> list:
    return [
        arm["role"],
        arm["arm"],
        f"{arm['factor']:g}",
        interval_cell(arm["accuracy"], 100),
        interval_cell(arm["change"], 100),
        interval_cell(arm["against random"], 100),
        interval_cell(arm["alignment"]),
        figure(arm["touched"]),
        figure(100 * arm["capped"]),
    ]
