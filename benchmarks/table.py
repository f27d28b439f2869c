"""table.py: several runs side by side, in the layout of the paper's table 1."""

import hashlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from benchmarks.benchmark import Benchmark
from benchmarks.files import BenchmarkError
from benchmarks.responses import RESPONSES, read_settings
from benchmarks.scoring import NO_JUDGE, score_file
from benchmarks.suite import find

# The paper's groups of columns. Its average is over all seven.
GROUPS = {
    "mathematical": ("WeMath", "MathVision", "MathVerse", "LogicVista"),
    "visual-centric": ("HallusionBench", "MME", "MMBench"),
}
SEVEN = tuple(title for titles in GROUPS.values() for title in titles)
AVERAGE = "Avg."
NOTHING = "–"

# A headline: the label of its row, the title of its column, its value in percent.
Headline = tuple[str, str, float]


def table(
    folders: list[str], mode: str, judge: str | None, allow_missing: bool, answer_is: bool
) -> str:
    """The headlines of some runs, as text and as Markdown, and what they were computed from."""
    runs = []
    values = []
    notes = []
    for folder in folders:
        settings = read_settings(folder)
        benchmark = replace(find(settings["benchmark"]), answer_is=answer_is)
        try:
            scores = score_file(
                benchmark,
                settings["data"],
                Path(folder) / RESPONSES,
                mode=mode,
                allow_missing=allow_missing,
                judge=judge,
            )
        except BenchmarkError as error:
            raise BenchmarkError(f"{folder}: {error}") from error
        runs.append((settings, benchmark))
        values.append(scores["headline"]["value"])
        notes.append(describe_scores(folder, scores))
    titles = [benchmark.title for _, benchmark in runs]
    headlines = list(zip(labels_of(runs), titles, values, strict=True))
    heading = f"mode {mode}, judge: {judge or NO_JUDGE}; percent"
    return "\n".join([heading, "", *lay_out(headlines), "", *notes])


def labels_of(runs: list[tuple[dict, Benchmark]]) -> list[str]:
    """The label of each run, given as (its run.json, its benchmark).

    Runs of one label stand on one row of the table. Where what decides the responses differs
    although the label is the same, such as the weights of a folder that was trained on, the
    label says so.
    """
    labels = [describe_model(*run) for run in runs]
    details = [details_of(settings) for settings, _ in runs]
    # (label, name of a detail) -> what the runs of that label have there
    kinds = defaultdict(set)
    for label, mine in zip(labels, details, strict=True):
        for name, detail in mine.items():
            kinds[label, name].add(detail)
    told_apart = []
    for label, mine in zip(labels, details, strict=True):
        differing = [detail for name, detail in mine.items() if len(kinds[label, name]) > 1]
        told_apart.append(", ".join([label, *differing]))
    return told_apart


def describe_model(settings: dict, benchmark: Benchmark) -> str:
    """A run's label: its model, and what is unusual about how it was asked."""
    label = settings["model"]
    if settings["prompt"] != benchmark.prompt_mode:
        label += f", {settings['prompt']} prompt"
    if settings["temperature"]:
        label += f", {settings['sample']} samples at {settings['temperature']}"
    if settings["max_new_tokens"] != benchmark.max_new_tokens:
        label += f", at most {settings['max_new_tokens']} tokens"
    pixels = settings["min_pixels"], settings["max_pixels"]
    if pixels != (benchmark.min_pixels, benchmark.max_pixels):
        label += f", {pixels[0]} to {pixels[1]} pixels"
    return label


def details_of(settings: dict) -> dict[str, str]:
    """What a label leaves out unless it has to tell runs apart, by name."""
    details = {"weights": f"weights {settings['weights'][:8]}"}
    if "dtype" in settings:  # a run that an earlier version began does not say it
        details["dtype"] = settings["dtype"]
    if settings["prompt"] == "train":
        digest = hashlib.sha256(settings["template"].encode()).hexdigest()
        details["template"] = f"template {digest[:8]}"
    return details


def describe_scores(folder: str, scores: dict) -> str:
    counts = scores["counts"]
    text = (
        f"{folder}: {scores['benchmark']}, {scores['headline']['metric']}, {counts['rows']} rows, "
        f"{counts['unmatched']} of {counts['scored']} responses unmatched"
    )
    if counts["missing"]:
        text += f", {counts['missing']} missing"
    return text


# ------------------------------------------------------------------------------------------- layout


def lay_out(headlines: list[Headline]) -> list[str]:
    """Lines of the table, as text, and then as Markdown."""
    groups = {**GROUPS, "average": (AVERAGE,)}
    others = tuple(dict.fromkeys(title for _, title, _ in headlines if title not in SEVEN))
    if others:
        groups["other"] = others
    titles = [title for group in groups.values() for title in group]
    body = [
        [label, *(f"{values[title]:.1f}" if title in values else NOTHING for title in titles)]
        for label, values in collect_rows(headlines)
    ]
    lines = [["model", *titles], *body]
    return [*as_text(groups, lines), "", *as_markdown(groups, lines)]


def collect_rows(headlines: list[Headline]) -> list[tuple[str, dict[str, float]]]:
    """(label, column -> value) of each row: one a label, and more where a column repeats.

    A row that has all seven columns gets their average.
    """
    rows: list[tuple[str, dict[str, float]]] = []
    for label, title, value in headlines:
        for other, values in rows:
            if other == label and title not in values:
                values[title] = value
                break
        else:
            rows.append((label, {title: value}))
    for _, values in rows:
        if all(title in values for title in SEVEN):
            values[AVERAGE] = sum(values[title] for title in SEVEN) / len(SEVEN)
    return rows


def as_text(groups: dict[str, tuple[str, ...]], lines: list[list[str]]) -> list[str]:
    """Aligned columns under the names of their groups. lines[0] holds the columns' titles."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    heading = " " * widths[0]
    starts = []  # the first column of each group
    column = 1
    for name, titles in groups.items():
        starts.append(column)
        after = column + len(titles)
        if len(titles) == 1:
            widths[column] = max(widths[column], len(name))
        # Two spaces stand between the columns of a group.
        span = sum(widths[column:after]) + 2 * (len(titles) - 1)
        heading += " | " + name.ljust(span)
        column = after
    text = [heading]
    for line in lines:
        shown = line[0].ljust(widths[0])
        for column in range(1, len(line)):
            shown += " | " if column in starts else "  "
            shown += line[column].rjust(widths[column])
        text.append(shown)
    return [line.rstrip() for line in text]


def as_markdown(groups: dict[str, tuple[str, ...]], lines: list[list[str]]) -> list[str]:
    names = [""]
    for name, titles in groups.items():
        names += [name, *[""] * (len(titles) - 1)]
    rows = []
    for line in [names, *lines]:
        cells = [cell.replace("|", "\\|") for cell in line]
        rows.append("| " + " | ".join(cells) + " |")
    rule = "|---" * len(names) + "|"
    return [rows[0], rule, *rows[1:]]
