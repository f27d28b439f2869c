"""report.py: a run as one HTML file that needs nothing else: no network, no library, no server.

    report.write("runs/toy")        # also: python analyze.py report runs/toy

It shows what the folder holds: metrics.jsonl as curves beside config.yaml; examples/step-*.json, the held-out samples that
train.py answers at each evaluation, as responses with every token's role, weight, signals and attention over the image; and
analysis/*.json, if analyze.py wrote there. report_template.html is the page: style, script and the places of the parts.

Everything that comes from a file or a model is text here: escaped in HTML and in the data block of the script, and the page's
own policy lets no other script run and nothing be loaded.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import dyco
import rewards
from config import Config, load_config
from data import Sample, encode_prompt
from model import Policy
from rollout import generate
from run_folder import RowError, read_jsonl, write_file

EXAMPLES = 12  # held-out samples that are answered for the report at each evaluation
EXAMPLE_TOKENS = 512  # of a response that are kept
EXAMPLE_CELLS = (
    256  # of all heat-maps of a sample: larger images have several visual tokens to a cell
)
MAX_BYTES = 4_900_000  # of the page
DETAILS = (
    (EXAMPLE_CELLS, EXAMPLES),
    (64, EXAMPLES),
    (64, 6),
    (64, 3),
    (16, 1),
    (0, 0),
)  # (cells, examples) until the page fits
MAX_POINTS = 300  # of a curve; more steps are averaged


class ReportError(RowError):
    """A folder without a run, or a file in it that cannot be read."""


# ---------------------------------------------------------------------------------------- examples, written in training


@torch.no_grad()
def make_examples(policy: Policy, samples: list[Sample], config: Config) -> list[dict]:
    """One response to each sample with all that the token view shows, ready for JSON. It is the response that
    evaluate.held_out draws."""
    prompts = [
        encode_prompt(
            sample,
            place,
            policy.tokenizer,
            policy.image_processor,
            config.data.prompt_template,
            config.data.max_prompt_tokens,
        )
        for place, sample in enumerate(samples)
    ]
    whole = generate(
        policy,
        prompts,
        1,
        config.rollout.max_new_tokens,
        (config.train.seed, "held out"),
        max_cache_tokens=config.rollout.max_cache_tokens,
        temperature=1.0,
    )
    found = []
    for place, (sample, prompt) in enumerate(zip(samples, prompts)):
        rollout = whole.select([place])
        tap = policy.tap(config.dyco, keep_images=True)
        output = policy([prompt], rollout.tokens, rollout.mask, tap)
        signals, mask = output.signals, rollout.mask
        roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, mask, config.dyco.tau)
        scores = dyco.alignment_scores(
            signals.visual_mass, signals.text_mass, roles, mask, config.dyco.ratio
        )
        ids = rollout.tokens[0][mask[0]].tolist()[:EXAMPLE_TOKENS]
        row = lambda x: [round(v, 4) for v in x[0, : len(ids)].tolist()]
        merge = policy.image_processor.merge_size
        grids = (
            []
            if prompt.image_grid_thw is None
            else (prompt.image_grid_thw[:, 1:] // merge).tolist()
        )
        places, heat = heat_maps(tap.images[0][0, : len(ids)].float().cpu(), grids)
        found.append(
            {
                "id": sample.id,
                "question": sample.question,
                "answer": sample.answer,
                "correct": rewards.accuracy(rollout.texts[0], sample.answer) == 1,
                "length": int(mask.sum()),
                "truncated": bool(rollout.truncated[0]),
                "tokens": [policy.tokenizer.decode(token) for token in ids],
                "roles": roles[0, : len(ids)].tolist(),
                "weights": row(dyco.token_weights(scores, mask)),
                "scores": row(scores),
                "probabilities": row(output.logprobs.exp()),
                **{name: row(getattr(signals, name)) for name in signals._fields},
                "images": [
                    {"file": picture(image), **place} for image, place in zip(sample.images, places)
                ],
                "peaks": [round(v, 4) for v in heat.amax(1).tolist()] if places else [],
                "heat": encode_heat(heat),
            }
        )
    return found


def heat_maps(
    attention: Tensor, grids: list[list[int]], cells: int = EXAMPLE_CELLS
) -> tuple[list[dict], Tensor]:
    """Attention [T, visual tokens] over images of height × width visual tokens -> (places, [T, cells]).

    A cell sums block × block visual tokens, with the smallest block that leaves at most `cells` cells in all images (at least
    one an image). A place says how an image's cells lie: {"height", "width", "block"}.
    """
    count = lambda block: sum(math.ceil(h / block) * math.ceil(w / block) for h, w in grids)
    block = 1
    while count(block) > max(cells, len(grids)):
        block += 1
    places, maps, start = [], [], 0
    for height, width in grids:
        part = attention[:, start : start + height * width].view(-1, 1, height, width)
        part = F.pad(part, (0, -width % block, 0, -height % block))
        maps.append(F.avg_pool2d(part, block, divisor_override=1).flatten(1))
        places.append({"height": height, "width": width, "block": block})
        start += height * width
    return places, torch.cat(maps, dim=1) if maps else attention[:, :0]


def encode_heat(heat: Tensor) -> str:
    """[T, cells] -> base64 of T × cells bytes, each row's largest value 255."""
    peak = heat.amax(1, keepdim=True) if heat.shape[1] else heat
    return base64.b64encode(
        (255 * heat / peak.clamp(min=1e-12)).round().byte().numpy().tobytes()
    ).decode()


def picture(image, side: int = 448) -> str:
    """A data URI of the image, at most `side` pixels: PNG where that is small, else JPEG."""
    image = image.copy()
    image.thumbnail((side, side))
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if buffer.tell() < 60_000:
            break
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------------------ HTML


class Html(str):
    """Text that is HTML already. Whatever else meets `tag` is escaped there."""


def esc(value) -> Html:
    """Any value as HTML text or attribute: control characters become visible, halves of surrogate pairs U+FFFD."""
    if isinstance(value, Html):
        return value
    text = re.sub("[\ud800-\udfff]", "\ufffd", str(value))
    text = re.sub("[\\x00-\\x08\\x0b-\\x1f]", lambda m: chr(0x2400 + ord(m[0])), text).replace(
        "\x7f", "\u2421"
    )
    return Html(html.escape(text))


def tag(name: str, *content, **attributes) -> Html:
    """An element. `class_` is class, `aria_label` aria-label; an attribute that is None or False is left out.

    >>> tag("td", "1 < 2", tag("b", "!"), class_="good")
    '<td class="good">1 &lt; 2<b>!</b></td>'
    """
    attributes = {
        key.rstrip("_").replace("_", "-"): "" if value is True else value
        for key, value in attributes.items()
    }
    start = "".join(
        f' {key}="{esc(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    end = "" if name == "img" else f"</{name}>"
    return Html(f"<{name}{start}>{join(content)}{end}")


def join(parts) -> Html:
    return Html("".join(map(esc, parts)))


def table(heads, rows, **attributes) -> Html:
    """heads: of the columns, or none; rows: cells, the first of each its head. Scrolls sideways where it is too wide."""
    head = (
        tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))) if heads else ""
    )
    body = tag(
        "tbody",
        *(
            tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in cells))
            for first, *cells in rows
        ),
    )
    return tag("div", tag("table", head, body, **attributes), class_="scroll")


def data_block(value) -> Html:
    """JSON that can stand in a script element: pure ASCII, without the characters that could end it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def figure(value: float | None) -> str:
    """A number with about three figures."""
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(power)}".replace("-", "−")
    if value == int(value):
        return f"{int(value)}".replace("-", "−")
    digits = min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}".replace("-", "−")


def interval(values: list[float | None], factor: float = 1) -> str:
    """[value, low, high] as "0.382 [0.370, 0.393]", with three figures of the largest."""
    value, low, high = (None if v is None else factor * v for v in values)
    if value is None:
        return "–"
    digits = max(
        0,
        min(
            3,
            2
            - math.floor(math.log10(max(abs(v) for v in (value, low, high) if v is not None) or 1)),
        ),
    )
    text = lambda x: f"{round(x, digits) + 0.0:.{digits}f}".replace(
        "-", "−"
    )  # + 0.0: no negative zero
    return text(value) + ("" if low is None else f" [{text(low)}, {text(high)}]")


def interval_cell(values: list[float | None], factor: float = 1) -> Html:
    value, bracket, rest = interval(values, factor).partition(" [")
    return join([value, tag("small", bracket, rest)])


# ---------------------------------------------------------------------------------------------------------- charts


class Line(NamedTuple):
    """One curve of a chart. `low` and `high` are the ends of its intervals; a `noisy` one is drawn thin with its running mean."""

    label: str
    color: (
        str  # a custom property of the page: visual, text, neutral, good, bad, first, second, third
    )
    xs: list[float]
    ys: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    noisy: bool = False


def thin(line: Line) -> Line:
    """At most MAX_POINTS points, means of neighbours."""
    size = math.ceil(len(line.xs) / MAX_POINTS)
    if size <= 1:
        return line
    mean = lambda values: [
        sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)
    ]
    return line._replace(xs=mean(line.xs), ys=mean(line.ys))


def running_mean(values: list[float]) -> list[float]:
    """Centred, over about a twelfth of the curve, fewer at its ends."""
    half = max(1, len(values) // 24)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [
        step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = (
    384,
    178,
    34,
    98,
    10,
    28,
)  # of a chart and its margins, in its own units


def chart(
    title: str,
    unit: str,
    lines: list[Line],
    x_label: str = "step",
    x_names: list[str] | None = None,
    top: float | None = None,
    values: bool = True,
) -> Html:
    """A line chart as an HTML figure with inline SVG, labels at the lines' ends, and its figures as a table.

    x_names: names of the places 0, 1, … on the x axis. top: where the y axis ends, by default at the largest value. values: with
    the last value beside the label. Empty if there is nothing to draw.
    """
    lines = [thin(line) for line in lines if line.xs]
    if not lines:
        return Html()
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys + (line.low or []) + (line.high or [])]
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    low, high = min(0, min(ys)), max(ys) if top is None else top
    high = high if high > low else low + 1
    marks = ticks(low, high)
    step, high = marks[1] - marks[0], max(high, marks[-1])
    digits = next(d for d in range(12) if d == 11 or abs(round(step, d) / step - 1) < 1e-6)
    across = lambda x: LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
    down = lambda y: TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
    path = lambda xs, ys: "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in zip(xs, ys))
    text = lambda x, y, *content, **attributes: tag(
        "text", *content, x=f"{x:.1f}", y=f"{y:.1f}", **attributes
    )

    parts = []
    for mark in marks:
        parts += [
            tag("path", class_="grid", d=f"M{LEFT} {down(mark):.1f}H{WIDTH - RIGHT}"),
            text(LEFT - 8, down(mark) + 4, f"{mark:.{digits}f}", class_="tick", text_anchor="end"),
        ]
    for x in range(len(x_names)) if x_names else [x for x in ticks(left, right) if x == int(x)]:
        parts.append(
            text(
                across(x),
                HEIGHT - 10,
                x_names[x] if x_names else int(x),
                class_="tick",
                text_anchor="middle",
            )
        )
    parts.append(text(WIDTH - RIGHT + 12, HEIGHT - 10, x_label, class_="tick"))
    ends = []
    for line in lines:
        style = f"--stroke:var(--{line.color})"
        drawn = running_mean(line.ys) if line.noisy and len(line.ys) >= 12 else line.ys
        if line.low:
            parts.append(
                tag(
                    "path",
                    class_="band",
                    style=style,
                    d=path(line.xs + line.xs[::-1], line.high + line.low[::-1]) + "Z",
                )
            )
        if drawn is not line.ys:
            parts.append(tag("path", class_="raw", style=style, d=path(line.xs, line.ys)))
        parts.append(tag("path", class_="line", style=style, d=path(line.xs, drawn)))
        if len(line.xs) <= 16:
            parts += [
                tag("circle", style=style, cx=f"{across(x):.1f}", cy=f"{down(y):.1f}", r=2.6)
                for x, y in zip(line.xs, drawn)
            ]
        value = tag("tspan", " ", figure(drawn[-1]), class_="value") if values else ""
        ends.append([down(drawn[-1]), style, join([line.label, value])])
    ends.sort(key=lambda end: end[0])
    for before, end in zip(
        ends, ends[1:]
    ):  # labels that would overlap move apart, down and then back up from the bottom
        end[0] = max(end[0], before[0] + 15)
    floor = HEIGHT - BOTTOM - 1
    for end in reversed(ends):
        end[0] = min(end[0], floor)
        floor = end[0] - 15
    parts += [
        text(WIDTH - RIGHT + 8, y + 4, label, class_="label", style=style)
        for y, style, label in ends
    ]
    parts.append(tag("path", class_="rule", d=f"M0 {TOP}V{HEIGHT - BOTTOM}"))

    spoken = "; ".join(
        f"{line.label} from {figure(line.ys[0])} to {figure(line.ys[-1])}" for line in lines
    )
    hover = {
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "from": left,
        "to": right,
        "names": x_names,
        "x": x_label,
        "lines": [[line.label, line.xs, [float(f"{y:.4g}") for y in line.ys]] for line in lines],
    }
    return tag(
        "figure",
        tag("figcaption", tag("b", title), " ", tag("span", unit, class_="unit"), tag("output")),
        tag(
            "svg",
            *parts,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=f"{title}, {unit}: {spoken}",
            data_chart=json.dumps(hover),
        ),
        figures(lines, x_label, x_names),
        class_="chart",
    )


def figures(lines: list[Line], x_label: str, x_names: list[str] | None, rows: int = 40) -> Html:
    """The chart's figures as a table, evenly chosen where there are many."""
    by_x: dict[float, dict[str, str]] = {}
    for line in lines:
        ends = zip(line.low, line.high) if line.low else [(None, None)] * len(line.xs)
        for x, y, (low, high) in zip(line.xs, line.ys, ends):
            by_x.setdefault(x, {})[line.label] = (
                figure(y) if low is None else interval([y, low, high])
            )
    xs = sorted(by_x)
    shown = (
        xs if len(xs) <= rows else [xs[round(i * (len(xs) - 1) / (rows - 1))] for i in range(rows)]
    )
    note = "" if len(shown) == len(xs) else f" ({len(shown)} of {len(xs)} points)"
    body = [
        (
            x_names[int(x)] if x_names else figure(x),
            *(by_x[x].get(line.label, "") for line in lines),
        )
        for x in shown
    ]
    return tag(
        "details",
        tag("summary", "Figures", note),
        table([x_label, *(line.label for line in lines)], body),
    )


# ----------------------------------------------------------------------------------------------------------- the parts

ACROSS_TRAINING = [  # title, unit, where the y axis ends, (label, key of metrics.jsonl, colour, factor) of each curve
    (
        "Held-out accuracy",
        "%",
        100,
        ("greedy", "eval/accuracy_greedy", "second", 100),
        ("sampled", "eval/accuracy", "first", 100),
        ("swapped", "eval/accuracy_swapped", "neutral", 100),
    ),
    (
        "Rollout: right and well-formed",
        "% of responses",
        100,
        ("right", "reward/accuracy", "first", 100),
        ("format", "reward/format", "neutral", 100),
    ),
    ("Reward", "mean per response", None, ("reward", "reward/mean", "first", 1)),
    (
        "Response length",
        "tokens",
        None,
        ("rollout", "response/length", "first", 1),
        ("held out", "eval/length", "second", 1),
    ),
    (
        "Constant groups, cut responses",
        "%",
        None,
        ("constant", "reward/constant_groups", "first", 100),
        ("cut off", "response/truncated", "third", 100),
    ),
    ("Entropy", "nats per token", None, ("entropy", "policy/entropy", "first", 1)),
    ("KL to the reference", "nats per token, k3", None, ("KL", "policy/kl", "first", 1)),
    (
        "Off policy",
        "%: tokens clipped, mean |ratio − 1|",
        None,
        ("clipped", "policy/clip_fraction", "first", 100),
        ("|ratio − 1|", "policy/ratio_deviation", "neutral", 100),
    ),
    ("Gradient norm", "before clipping", None, ("norm", "policy/grad_norm", "first", 1)),
    (
        "Updates left out",
        "per step that left any out",
        None,
        ("left out", "policy/skipped_updates", "bad", 1),
    ),
    (
        "Time of a step",
        "seconds",
        None,
        ("rollout", "time/rollout", "first", 1),
        ("update", "time/update", "second", 1),
        ("score", "time/score", "neutral", 1),
    ),
]
SIGNALS = [
    (
        "Roles",
        "% of tokens",
        100,
        ("text", "dyco/text_share", "text", 100),
        ("visual", "dyco/visual_share", "visual", 100),
        ("neutral", "dyco/neutral_share", "neutral", 100),
    ),
    (
        "Alignment and mass",
        "mean, 0 … 1",
        None,
        ("alignment", "dyco/alignment", "first", 1),
        ("text mass", "dyco/text_mass", "text", 1),
        ("image mass", "dyco/visual_mass", "visual", 1),
    ),
    (
        "Shift",
        "mean, radians, 0 … π",
        None,
        ("text", "dyco/text_shift", "text", 1),
        ("visual", "dyco/visual_shift", "visual", 1),
    ),
]


def curves(rows: list[dict], specs: list[tuple]) -> Html:
    """Charts of what metrics.jsonl holds of ACROSS_TRAINING or SIGNALS."""

    def line(label: str, key: str, color: str, factor: float) -> Line:
        points = [(row["step"], factor * row[key]) for row in rows if key in row]
        return Line(
            label,
            color,
            [x for x, _ in points],
            [y for _, y in points],
            noisy=not key.startswith("eval/"),
        )

    return join(
        chart(title, unit, [line(*spec) for spec in lines], top=top)
        for title, unit, top, *lines in specs
    )


def settings(tree: dict) -> Html:
    """The config, section by section; what differs from config.yaml is marked."""
    try:
        usual = asdict(load_config(overrides=[f"algo.name={tree['algo']['name']}"]))
    except (ValueError, KeyError, TypeError):  # a run of another version, say
        usual = asdict(load_config())
    sections = []
    for section, keys in tree.items():
        rows = []
        for key, value in keys.items() if isinstance(keys, dict) else ():
            changed = section != "run" and usual.get(section, {}).get(key, ...) != value
            shown = (
                "–"
                if value is None
                else json.dumps(value)
                if isinstance(value, (bool, list, dict))
                else value
            )
            rows.append(
                tag(
                    "tr",
                    tag("th", key, scope="row"),
                    tag("td", shown),
                    class_="changed" if changed else None,
                )
            )
        sections.append(tag("table", tag("caption", section), tag("tbody", *rows)))
    title = tag("h3", "Settings ", tag("span", "marked: not as in config.yaml", class_="unit"))
    return tag("aside", title, *sections, class_="settings") if sections else Html()


def tiles(rows: list[dict]) -> Html:
    """The run in a few numbers: first → last."""
    found = []
    for label, key, form in (
        ("Held-out accuracy, sampled", "eval/accuracy", ".0%"),
        ("Held-out accuracy, greedy", "eval/accuracy_greedy", ".0%"),
        ("With images swapped", "eval/accuracy_swapped", ".0%"),
        ("Rollout accuracy", "reward/accuracy", ".0%"),
        ("Alignment", "dyco/alignment", ".3f"),
        ("Tokens per response", "response/length", ".0f"),
    ):
        values = [f"{row[key]:{form}}".replace("%", "\u202f%") for row in rows if key in row]
        if values:
            first = tag("small", values[0], " → ") if len(values) > 1 else ""
            found.append(tag("div", tag("dt", label), tag("dd", first, values[-1])))
    return tag("dl", *found[:5], class_="tiles")


# ------------------------------------------------------------------------------------------------------- the token view


def coarsen(example: dict, cells: int) -> dict:
    """The example with at most `cells` heat-map cells."""
    images, tokens = example["images"], len(example["tokens"])
    grids = [
        [math.ceil(image["height"] / image["block"]), math.ceil(image["width"] / image["block"])]
        for image in images
    ]
    heat, expected = (
        base64.b64decode(example["heat"], validate=True),
        tokens * sum(h * w for h, w in grids),
    )
    if len(heat) != expected:
        raise ValueError(f"a heat-map has {len(heat)} cells; expected {expected}")
    if not heat:
        return example
    places, pooled = heat_maps(
        torch.frombuffer(bytearray(heat), dtype=torch.uint8).float().view(tokens, -1), grids, cells
    )
    images = [
        {**image, "block": image["block"] * place["block"]} for image, place in zip(images, places)
    ]
    return {**example, "images": images, "heat": encode_heat(pooled)}


def pairs(runs: list[tuple[int, list[dict]]], count: int) -> list[list[tuple[int, dict]]]:
    """[(step, example)] of the same sample at the first and the last evaluation, `count` of them: by turns one that changed, one
    wrong to the end, one right throughout."""
    by_id = [(step, {example["id"]: example for example in found}) for step, found in runs]
    together = [
        [(step, found[name]) for step, found in by_id if name in found] for name in by_id[-1][1]
    ]
    kind = lambda pair: (
        0
        if pair[0][1]["correct"] != pair[-1][1]["correct"]
        else 1
        if not pair[-1][1]["correct"]
        else 2
    )
    ranked = [
        [(place, i) for place, pair in enumerate(pair for pair in together if kind(pair) == i)]
        for i in range(3)
    ]
    kinds = [[pair for pair in together if kind(pair) == i] for i in range(3)]
    return [kinds[i][place] for place, i in sorted(sum(ranked, []))][:count]


def token_text(text: str) -> Html:
    """A token as it reads; a line break, or nothing at all, shows as a sign."""
    sign = lambda character: tag("i", character, class_="sign")
    return Html(esc(text).replace("\n", sign("↵") + "\n")) if text else sign("∅")


def verdict(example: dict, *more) -> Html:
    return tag(
        "b",
        "✓" if example["correct"] else "✗",
        *more,
        class_="good" if example["correct"] else "bad",
    )


def response(name: str, run: int, step: int, example: dict) -> Html:
    """One response, its tokens coloured by role and shaded by weight."""
    weights = example["weights"]
    low, high = min(weights, default=0), max(weights, default=0)
    shade = lambda weight: round(9 * (weight - low) / (high - low)) if high > low else 4
    spans = [
        tag(
            "span",
            token_text(text),
            role="option",
            id=f"{name}-{run}-{i}",
            aria_selected="false",
            class_=f"{'nvt'[role]} w{shade(weight)}",
        )
        for i, (text, role, weight) in enumerate(zip(example["tokens"], example["roles"], weights))
    ]
    hidden = example["length"] - len(example["tokens"])
    rest = f"… {hidden} more tokens" if hidden else "(cut off)" if example["truncated"] else None
    return tag(
        "div",
        tag(
            "h4",
            f"Step {step} ",
            verdict(example, " right" if example["correct"] else " wrong"),
            tag("span", f"weights of eq. 7: {low:.2f} … {high:.2f}", class_="unit"),
        ),
        tag(
            "div",
            *spans,
            class_="tokens",
            role="listbox",
            tabindex=0,
            data_run=run,
            aria_label=f"Tokens of the response at step {step}",
        ),
        tag("span", rest, class_="unit") if rest else "",
        class_="response",
    )


def token_view(found: list[list[tuple[int, dict]]]) -> tuple[Html, list]:
    """(HTML, data for the script) of the examples."""
    tabs, panels, data = [], [], []
    for n, pair in enumerate(found):
        last = pair[-1][1]
        spoken = ", then ".join(
            f"{'right' if example['correct'] else 'wrong'} at step {step}" for step, example in pair
        )
        marks = Html(" → ".join(verdict(example) for _, example in pair))
        tabs.append(
            tag(
                "button",
                tag("span", class_="thumb"),
                tag("span", marks),
                role="tab",
                id=f"tab-{n}",
                aria_controls=f"example-{n}",
                aria_selected="false" if n else "true",
                tabindex=-1 if n else 0,
                aria_label=f"Example {n + 1}: {spoken}",
            )
        )
        frames = [
            tag(
                "div",
                tag("img", src=image["file"], alt=f"Image {i + 1} of the question"),
                tag("canvas"),
                class_="frame",
            )
            for i, image in enumerate(last["images"])
        ]
        question = Html(
            esc(last["question"]).replace(
                "&lt;image&gt;", tag("span", "image", class_="mark") + " "
            )
        )
        panels.append(
            tag(
                "article",
                tag(
                    "div",
                    tag("div", *frames, class_="frames") if frames else "",
                    tag("div", class_="readout"),
                    class_="look",
                ),
                tag(
                    "div",
                    tag("p", question, class_="question"),
                    tag(
                        "p",
                        "Reference answer ",
                        tag("b", last["answer"]),
                        " · sample ",
                        last["id"],
                        class_="unit",
                    ),
                    tag(
                        "div",
                        *(
                            response(f"t{n}", run, step, example)
                            for run, (step, example) in enumerate(pair)
                        ),
                        class_="responses",
                    ),
                ),
                class_="example",
                id=f"example-{n}",
                role="tabpanel",
                aria_labelledby=f"tab-{n}",
                hidden=n > 0,
            )
        )
        data.append(
            {
                "images": [
                    [image["height"], image["width"], image["block"]] for image in last["images"]
                ],
                "runs": [
                    {
                        "step": step,
                        **{
                            key: example[key]
                            for key in (
                                "tokens",
                                "roles",
                                "weights",
                                "scores",
                                "probabilities",
                                "heat",
                                "peaks",
                            )
                        },
                        "signals": [
                            example[key]
                            for key in ("visual_mass", "text_mass", "visual_shift", "text_shift")
                        ],
                    }
                    for step, example in pair
                ],
            }
        )
    return join(
        [tag("div", *tabs, class_="picker", role="tablist", aria_label="Examples"), *panels]
    ), data


# ------------------------------------------------------------------------------------- what analyze.py found, if it did


def band(label: str, color: str, points: list[tuple[float, list]], factor: float = 1) -> Line:
    """A curve of estimates [value, low, high], without those that are undefined."""
    points = [(x, values) for x, values in points if None not in values]
    return Line(
        label,
        color,
        [x for x, _ in points],
        *([factor * values[i] for _, values in points] for i in range(3)),
    )


def roles_section(found: dict) -> Html:
    outcomes = {"correct": ("right", "good"), "incorrect": ("wrong", "bad")}
    statistics, counts = found["statistics"], found["counts"]
    tenths = [name for name in statistics if name.startswith("alignment at ")]
    right, wrong = counts["correct"], counts["incorrect"]
    lead = (
        f"Model {found['model']}, data {found['data']}: {right['responses']} responses to {right['prompts']} prompts were right, "
        f"{wrong['responses']} to {wrong['prompts']} wrong. Brackets are 95 % bootstrap intervals over prompts; differences are between right "
        "and wrong responses to the same prompts, and one whose interval holds 0 may be chance."
    )
    rows = [
        (name, *(interval_cell(row[part]) for part in (*outcomes, "difference")))
        for name, row in statistics.items()
        if name not in tenths
    ]
    charts = [
        chart(
            "Alignment by tenth",
            "mean score",
            [
                band(*outcomes[name], list(enumerate(statistics[tenth][name] for tenth in tenths)))
                for name in outcomes
            ],
            "tenth",
            [str(i + 1) for i in range(len(tenths))],
        )
    ]
    for key, title in (("visual_shift", "Visual shift"), ("text_shift", "Text shift")):
        lines = []
        for name in outcomes:
            bins = found["shifts"][key][name]["counts"]
            middles = [math.pi * (i + 0.5) / len(bins) for i in range(len(bins))]
            lines.append(
                Line(*outcomes[name], middles, [100 * count / max(sum(bins), 1) for count in bins])
            )
        charts.append(
            chart(
                title,
                f"% of tokens, bins of {math.pi / len(bins):.2f}",
                lines,
                "radians",
                values=False,
            )
        )
    token = lambda role, s: join(
        [
            tag("span", token_text(s["token"]), class_=f"{role[0]} w4 token"),
            " ",
            tag("small", f"{100 * s['share']:.0f} % of {s['occurrences']}"),
            " ",
        ]
    )
    strings = [
        (role, join(token(role, s) for s in found["strings"][role])) for role in ("visual", "text")
    ]
    return join(
        [
            tag("h3", "Right and wrong responses"),
            tag("p", lead, class_="lead"),
            table(["", "right", "wrong", "wrong − right, within prompts"], rows),
            tag("div", *charts, class_="charts"),
            tag("h4", "Strings that most often have a role"),
            table([], strings, class_="strings"),
        ]
    )


def intervention_section(found: dict) -> Html:
    arms, settings = found["arms"], found["settings"]
    charts = []
    for role in dict.fromkeys(arm["role"] for arm in arms):
        mine = [arm for arm in arms if arm["role"] == role]
        factors = sorted({arm["factor"] for arm in mine})
        for key, title, unit, scale in (
            ("accuracy", f"Accuracy: {role} tokens", "%", 100),
            ("alignment", f"Alignment of {role} tokens", "mean score", 1),
        ):
            lines = [
                band(
                    name.split()[0],
                    color,
                    [
                        (factors.index(arm["factor"]), arm[key])
                        for arm in mine
                        if arm["arm"] == name
                    ],
                    scale,
                )
                for name, color in (
                    ("role tokens", "first"),
                    ("random tokens", "neutral"),
                    ("other modality", "third"),
                )
            ]
            charts.append(chart(title, unit, lines, "λ", [f"{factor:g}" for factor in factors]))
    lead = (
        f"Model {settings['model']}, data {settings['data']}: at the tokens of a role, every head's attention mass on the role's own "
        "modality is scaled by λ while sampling. Controls: “random”, as many tokens drawn at random; “other”, the other modality at "
        "the role's tokens. Bands are 95 % intervals."
    )
    rows = [
        (
            arm["role"],
            arm["arm"],
            f"{arm['factor']:g}",
            interval_cell(arm["accuracy"], 100),
            interval_cell(arm["change"], 100),
            interval_cell(arm["against random"], 100),
            interval_cell(arm["alignment"]),
            figure(arm["touched"]),
            figure(100 * arm["capped"]),
        )
        for arm in arms
    ]
    heads = (
        "role",
        "arm",
        "λ",
        "accuracy, %",
        "change, points",
        "against random, points",
        "alignment",
        "tokens touched",
        "capped, %",
    )
    return join(
        [
            tag("h3", "Interventions"),
            tag("p", lead, class_="lead"),
            tag("div", *charts, class_="charts two"),
            tag("details", tag("summary", "All arms"), table(heads, rows)),
        ]
    )


# ------------------------------------------------------------------------------------------------------------ the page


def read(path: Path, build):
    """build(content of a JSON or YAML file); whatever is wrong with the content is a ReportError that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
        return build(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        RecursionError,
        yaml.YAMLError,
    ) as error:
        raise ReportError(
            f"{path}: not as train.py or analyze.py writes it ({type(error).__name__}: {error})"
        ) from error


def read_metrics(path: Path) -> list[dict]:
    """Rows of numbers, by step; lists, such as the prompts of skipped updates, are left out. Raises ReportError."""
    rows = {}
    for line, row in read_jsonl(path, growing=True):
        row = {key: value for key, value in row.items() if not isinstance(value, list)}
        for key, value in {"step": None, **row}.items():
            if type(value) not in ((int,) if key == "step" else (int, float)) or not math.isfinite(
                value
            ):
                raise ReportError(f"{path}, line {line}: {key} is {value!r:.60}; expected a number")
        rows.setdefault(row["step"], row)
    return [rows[step] for step in sorted(rows)]


def read_examples(folder: Path) -> list[tuple[int, list[dict]]]:
    """[(step, examples)] of the first and the last evaluation."""
    paths = sorted((folder / "examples").glob("step-*.json"))
    build = lambda found: (
        int(found["step"]),
        [coarsen(example, EXAMPLE_CELLS) for example in found["examples"]],
    )
    return [read(path, build) for path in dict.fromkeys(paths[:1] + paths[-1:])]


def subtitle(rows: list[dict], config: dict) -> str:
    if not config:
        return f"step {rows[-1]['step']}; the folder holds no config.yaml"
    get = lambda section, key: (config.get(section) or {}).get(key, "?")
    method = (
        f"with DyCo token advantages, rule {get('dyco', 'rule')}"
        if get("dyco", "enabled") is True
        else "alone, without DyCo"
    )
    return (
        f"{str(get('algo', 'name')).upper()} {method} · model {get('model', 'path')} · data {get('data', 'path')} · "
        f"step {rows[-1]['step']} of {get('train', 'steps')}"
    )


def page(folder: Path, rows: list[dict], config: dict, runs: list, cells: int, count: int) -> str:
    """The whole page with at most `count` examples of `cells` heat-map cells."""
    shown = (
        pairs(
            [(step, [coarsen(example, cells) for example in found]) for step, found in runs], count
        )
        if runs and count
        else []
    )
    view, data = token_view(shown)
    sections = {"roles.json": roles_section, "intervene.json": intervention_section}
    analysis = [
        read(folder / "analysis" / name, build)
        for name, build in sections.items()
        if (folder / "analysis" / name).exists()
    ]
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.DOTALL)[1]
    note = lambda text: tag("p", text, class_="lead")
    parts = {
        "title": esc(folder.resolve().name),
        "subtitle": esc(subtitle(rows, config)),
        "tiles": tiles(rows),
        "learning": curves(rows, ACROSS_TRAINING),
        "settings": settings(config),
        "tokens": view if shown else note("No evaluation of this run has left examples."),
        "data": data_block(data),
        "signals": curves(rows, SIGNALS)
        or note(
            "This run did not read attention while training, so there are no curves here; the "
            "tokens above were read at its evaluations."
        ),
        "tau": esc((config.get("dyco") or {}).get("tau", "τ")),
        "analysis": tag("section", tag("h2", "Analysis"), *analysis, id="analysis")
        if analysis
        else "",
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template
    )  # one pass: what is put in is not searched again


def write(run_dir: str | Path) -> Path:
    """Write run_dir/report.html, at most MAX_BYTES: heat-maps get coarser and examples fewer until it fits. Raises ReportError."""
    folder = Path(run_dir)
    if not (folder / "metrics.jsonl").is_file():
        raise ReportError(
            f"{folder}: no metrics.jsonl; expected the folder of a train.py run (its run.dir)"
        )
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise ReportError(f"{folder / 'metrics.jsonl'}: no whole row yet")
    config = read(folder / "config.yaml", dict) if (folder / "config.yaml").exists() else {}
    runs = read_examples(folder)
    for cells, count in DETAILS:
        text = page(folder, rows, config, runs, cells, count)
        if len(text.encode()) <= MAX_BYTES:
            break
    write_file(folder / "report.html", text.encode())
    return folder / "report.html"
