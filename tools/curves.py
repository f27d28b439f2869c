"""curves.py: which charts the report draws from metrics.jsonl, and how to read each of them."""

from typing import NamedTuple

from tools.charts import Line, chart
from tools.markup import Html, join


class Curve(NamedTuple):
    """One key of metrics.jsonl as a curve; its values are multiplied by `factor`."""

    label: str
    key: str
    color: str
    factor: float = 1


class ChartOf(NamedTuple):
    """A chart of some keys. top: where its y axis ends, None for the largest value."""

    title: str
    unit: str
    note: str  # which direction is good, and what is healthy
    curves: list[Curve]
    top: float | None = None


HELD_OUT = [
    ChartOf(
        "Held-out accuracy",
        "%",
        "Higher is better. “swapped” answers with the picture of another question: it should stay "
        "at chance, since more means that the picture is not needed.",
        [
            Curve("greedy", "eval/accuracy_greedy", "second", 100),
            Curve("sampled", "eval/accuracy", "first", 100),
            Curve("swapped", "eval/accuracy_swapped", "neutral", 100),
        ],
        top=100,
    ),
]

TRAINING = [
    ChartOf(
        "Rollout responses",
        "%",
        "Higher is better.",
        [
            Curve("right", "reward/accuracy", "first", 100),
            Curve("well-formed", "reward/format", "neutral", 100),
        ],
        top=100,
    ),
    ChartOf(
        "Reward",
        "mean per response",
        "Higher is better.",
        [Curve("reward", "reward/mean", "first")],
    ),
    ChartOf(
        "Your own reward",
        "mean per response, before its weight",
        "Higher is better.",
        [Curve("custom", "reward/custom", "first")],
    ),
    ChartOf(
        "Response length",
        "tokens",
        "Neither direction is better; a jump is worth a look at the responses.",
        [
            Curve("rollout", "response/length", "first"),
            Curve("held out", "eval/length", "second"),
        ],
    ),
    ChartOf(
        "Constant groups, cut responses",
        "%",
        "Lower is better. Healthy: constant below 80 (such a group teaches nothing), cut off near "
        "0.",
        [
            Curve("constant", "reward/constant_groups", "first", 100),
            Curve("cut off", "response/truncated", "third", 100),
        ],
    ),
    ChartOf(
        "Entropy",
        "nats per token",
        "Healthy: falls slowly, not to 0 at once.",
        [Curve("entropy", "policy/entropy", "first")],
    ),
    ChartOf(
        "KL to the reference",
        "nats per token, k3",
        "Healthy: below 0.1.",
        [Curve("KL", "policy/kl", "first")],
    ),
    ChartOf(
        "Off policy",
        "%: tokens clipped, mean |ratio − 1|",
        "Healthy: clipped below 20 (GSPO clips more, by design), |ratio − 1| below 10.",
        [
            Curve("clipped", "policy/clip_fraction", "first", 100),
            Curve("|ratio − 1|", "policy/ratio_deviation", "neutral", 100),
        ],
    ),
    ChartOf(
        "Gradient norm",
        "before clipping",
        "Healthy: no spikes.",
        [Curve("norm", "policy/grad_norm", "first")],
    ),
    ChartOf(
        "Updates left out",
        "per step that left any out",
        "Healthy: this chart is absent.",
        [Curve("left out", "policy/skipped_updates", "bad")],
    ),
    ChartOf(
        "Time of a step",
        "seconds",
        "Lower is faster.",
        [
            Curve("rollout", "time/rollout", "first"),
            Curve("update", "time/update", "second"),
            Curve("logprobs", "time/logprobs", "neutral"),
        ],
    ),
]

SIGNALS = [
    ChartOf(
        "Roles",
        "% of tokens",
        "Healthy: no role has all the tokens.",
        [
            Curve("text", "dyco/text_share", "text", 100),
            Curve("visual", "dyco/visual_share", "visual", 100),
            Curve("neutral", "dyco/neutral_share", "neutral", 100),
        ],
        top=100,
    ),
    ChartOf(
        "Alignment and mass",
        "mean, 0 … 1",
        "Alignment is higher where tokens attend to the modality that their role names.",
        [
            Curve("alignment", "dyco/alignment", "first"),
            Curve("text mass", "dyco/text_mass", "text"),
            Curve("image mass", "dyco/visual_mass", "visual"),
        ],
    ),
    ChartOf(
        "Shift",
        "mean, radians, 0 … π",
        "How far attention moves from one token to the next; neither direction is better.",
        [
            Curve("text", "dyco/text_shift", "text"),
            Curve("visual", "dyco/visual_shift", "visual"),
        ],
    ),
]


def metric_line(rows: list[dict], curve: Curve) -> Line:
    """The curve's values in the rows that have its key. Only evaluations are drawn without mean."""
    points = [(row["step"], curve.factor * row[curve.key]) for row in rows if curve.key in row]
    return Line(
        curve.label,
        curve.color,
        xs=[step for step, _ in points],
        ys=[value for _, value in points],
        noisy=not curve.key.startswith("eval/"),
    )


def run_charts(rows: list[dict], wanted: list[ChartOf]) -> Html:
    """The charts of one run; empty for keys that its metrics.jsonl does not hold."""
    charts = []
    for spec in wanted:
        lines = [metric_line(rows, curve) for curve in spec.curves]
        charts.append(chart(spec.title, spec.unit, lines, top=spec.top, note=spec.note))
    return join(charts)


def comparison_charts(runs: dict[str, list[dict]], wanted: list[ChartOf]) -> Html:
    """A chart for each curve, with one line per run. runs: their names and rows of metrics."""
    charts = []
    for spec in wanted:
        for curve in spec.curves:
            lines = []
            for place, (name, rows) in enumerate(runs.items()):
                line = metric_line(rows, curve)
                lines.append(line._replace(label=name, color=f"run-{place}"))
            title = spec.title if len(spec.curves) == 1 else f"{spec.title}: {curve.label}"
            charts.append(
                chart(title, spec.unit, lines, top=spec.top, end_names=False, note=spec.note)
            )
    return join(charts)
