"""ablation_tables.py: what the runs of a grid say: gains over the host, the table, the test.

All differences are paired by seed. Figures are in percentage points of accuracy.
"""

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from run_folder import write_file
from tools.ablation_cells import (
    AGAINST,
    CONTROLS,
    CREDIT_RULES,
    DEFAULT_PARTS,
    HOSTS,
    LEVELS,
    MEASURES,
    PARTS,
    POOLS,
    RULE_PARTS,
    TABLE,
    VARIANTS,
    cells_of_parts,
    control_name,
)
from tools.ablation_figures import Column, Gains, Panel, curves_figure, gains_figure
from tools.estimates import bootstrap_mean
from tools.rule_table import SEEDS, Answer, answer_of, gain_text, rule_lines

Runs = dict[tuple[str, int], dict]  # (cell, seed) -> line of runs.jsonl
GAINS_TITLE = "Gains in accuracy, mean over the held-out curve"
CURVES = ("host", "paper", "shuffled", "signed minmax")  # of each host, where they have run

# ------------------------------------------------------------------------------------- statistics


def measure(row: dict, name: str) -> float:
    """One of MEASURES of a run, in percent.

    "final" is accuracy at the end, "greedy" the same for greedy decoding, "area" the mean height of
    the curve (by trapezoids). "online" is the accuracy of all responses sampled in training, each
    before the update that learns from it and on a prompt not seen before.
    """
    if name == "greedy":
        return 100 * row["greedy"][-1]
    if name == "online":
        return 100 * statistics.fmean(row["online"])
    if name == "final":
        return 100 * row["accuracy"][-1]
    steps = row["steps"]
    curve = row["accuracy"]
    areas = [
        (end - start) * (left + right) / 2
        for (start, end), (left, right) in zip(pairwise(steps), pairwise(curve), strict=True)
    ]
    return 100 * sum(areas) / (steps[-1] - steps[0])


def shared_seeds(runs: dict, cells: list[str]) -> list[int]:
    """The seeds that all of some cells have been run with."""
    seeds_of = ({seed for other, seed in runs if other == cell} for cell in cells)
    return sorted(set.intersection(*seeds_of))


def differences(runs: dict, cells: list[str], baselines: list[str], name: str) -> list[float]:
    """Cells minus the baselines at their places, averaged over the cells: one number per seed."""
    gains = []
    for seed in shared_seeds(runs, [*cells, *baselines]):
        gains_of_cells = [
            measure(runs[cell, seed], name) - measure(runs[baseline, seed], name)
            for cell, baseline in zip(cells, baselines, strict=True)
        ]
        gains.append(statistics.fmean(gains_of_cells))
    return gains


class Comparison(NamedTuple):
    """A line of the table: some cells, each against the baseline at its place."""

    label: str
    cells: list[str]
    baselines: list[str]


def describe(runs: dict, comparison: Comparison) -> dict:
    """What table.json holds of a comparison: the cells' mean and (gain, low, high) per measure."""
    _, cells, baselines = comparison
    seeds = shared_seeds(runs, [*cells, *baselines]) or shared_seeds(runs, cells)
    described: dict = {"seeds": len(seeds)}
    for name in MEASURES:
        values = [measure(runs[cell, seed], name) for cell in cells for seed in seeds]
        gains = [] if cells == baselines else differences(runs, cells, baselines, name)
        described[name] = {
            "mean": statistics.fmean(values),
            "gain": bootstrap_mean(gains) if gains else None,
        }
    return described


# ------------------------------------------------------------------------------------- the tables


def host_of(cell: str) -> str:
    return cell.split("/")[0] + "/host"


def against_hosts(runs: dict, cells: list[str]) -> list[Comparison]:
    """Each of some cells against its host, then each rule over all hosts of a pool."""
    comparisons = [Comparison(cell, [cell], [host_of(cell)]) for cell in cells]
    for rule in dict.fromkeys(cell.split("/")[1] for cell in cells):
        if rule == "host":
            continue
        for pool, hosts in POOLS.items():
            pooled = [f"{host}/{rule}" for host in hosts]
            baselines = [f"{host}/host" for host in hosts]
            complete = all(cell in cells for cell in pooled)
            if complete and shared_seeds(runs, [*pooled, *baselines]):
                comparisons.append(Comparison(f"{pool}/{rule}", pooled, baselines))
    return comparisons


def questions_of(parts: list[str]) -> list[dict[str, str]]:
    """Which rules are asked about together, {cell: rule} each: Holm's correction is for a question.

    Those of credit are one, and each rule that is a part of its own is another one.
    """
    credit = {cell: rule for cell, (rule, _) in CREDIT_RULES.items()}
    questions = [credit] if "credit" in parts else []
    return questions + [{rule: rule} for rule in parts if rule in RULE_PARTS]


def answers_of(runs: Runs, rules: dict[str, str]) -> list[Answer]:
    """Some rules, {cell: rule}, against their own shuffled controls and the host, of the seeds that
    were planned and the runs that are there."""
    runs = {(cell, seed): row for (cell, seed), row in runs.items() if seed < SEEDS}
    answers = []
    for cell, rule in rules.items():
        over_control, over_host = {}, {}
        for level, (prefix, _) in LEVELS.items():
            mine, host = f"{prefix}grpo/{cell}", f"{prefix}grpo/host"
            control = f"{prefix}grpo/{control_name(rule, 'shuffled')}"
            over_control[level] = differences(runs, [mine], [control], "area")
            over_host[level] = differences(runs, [mine], [host], "area")
        if all(over_control.values()) and all(over_host.values()):
            answers.append(answer_of(cell, over_control, over_host))
    return answers


def against_each_other(runs: dict, ran: set[str], parts: list[str]) -> list[Comparison]:
    """The comparisons of AGAINST, and the variants of the ablations against `paper`."""
    prefixes = dict.fromkeys(cell.split("/")[0] for cell in cells_of_parts(parts) if cell in ran)
    comparisons = []
    for rule, others in AGAINST.items():
        for other in others:
            # "grpo", "level 2: grpo", …: where both have been run with the same seeds
            both = [
                prefix
                for prefix in prefixes
                if shared_seeds(runs, [f"{prefix}/{rule}", f"{prefix}/{other}"])
            ]
            groups = [(prefix, [prefix]) for prefix in both]
            groups += [
                (pool, list(hosts))
                for pool, hosts in POOLS.items()
                if all(host in both for host in hosts)
            ]
            for name, members in groups:
                cells = [f"{member}/{rule}" for member in members]
                baselines = [f"{member}/{other}" for member in members]
                if shared_seeds(runs, [*cells, *baselines]):
                    comparisons.append(Comparison(f"{name}/{rule} − {other}", cells, baselines))
    for variant in VARIANTS:
        cell = f"grpo/{variant}"
        if cell in ran:
            comparisons.append(Comparison(f"{cell} − paper", [cell], ["grpo/paper"]))
    return comparisons


def table_line(comparison: Comparison, described: dict, means: bool) -> str:
    """A line of Markdown, bold where several hosts are averaged; with or without the means."""
    label = comparison.label
    if len(comparison.cells) > 1:
        label = f"**{label}**"
    fields = [label, str(described["seeds"])]
    for name in MEASURES:
        if means:
            fields.append(f"{described[name]['mean']:.1f}")
        fields.append(gain_text(described[name]["gain"]))
    return f"| {' | '.join(fields)} |"


def parts_to_show(runs: Runs, asked: list[str]) -> list[str]:
    """The parts that were asked for, and those of which cells that no other part has were run."""
    ran = {cell for cell, _ in runs}

    def was_run(part: str) -> bool:
        others = cells_of_parts([other for other in PARTS if other != part])
        return bool(ran & (set(PARTS[part]) - set(others)))

    return [part for part in PARTS if part in asked or was_run(part)]


def tabulate(runs: Runs, folder: Path, parts: list[str] = DEFAULT_PARTS) -> str:
    """Write table.md, table.json, gains.svg and curves.svg of the runs of some parts.

    Returns the Markdown.
    """
    parts = parts_to_show(runs, parts)
    wanted = set(cells_of_parts(parts))
    runs = {run: row for run, row in runs.items() if run[0] in wanted}
    ran = {cell for cell, _ in runs}
    described: dict[str, dict] = {}

    def table_lines(comparisons: list[Comparison], means: bool) -> list[str]:
        lines = []
        for comparison in comparisons:
            described[comparison.label] = describe(runs, comparison)
            lines.append(table_line(comparison, described[comparison.label], means))
        return lines

    lines = [
        "# What DyCo-RL adds on the embedded default",
        "",
        "Accuracy in percent, means over seeds, and gains over the host, paired by seed, with 95 % "
        "bootstrap intervals (expanded percentile, as long as Student's; not corrected for their "
        "number). First three: on held-out samples; last: of the responses sampled in training. "
        "Bold: mean over the hosts of each seed, all four or those without SAPO.",
    ]
    for part in parts:
        cells = [cell for cell in PARTS[part] if cell in ran]
        if cells:
            heads = " | ".join(f"{label} | gain" for label in MEASURES.values())
            lines += ["", f"## {part}", "", f"| cell | seeds | {heads} |"]
            lines.append("|---|---|" + "---|---|" * len(MEASURES))
            lines += table_lines(against_hosts(runs, cells), means=True)
    lines += ["", "## against each other", "", "Differences, paired by seed.", ""]
    lines.append("| | seeds | " + " | ".join(MEASURES.values()) + " |")
    lines.append("|---|---|" + "---|" * len(MEASURES))
    lines += table_lines(against_each_other(runs, ran, parts), means=False)
    asked = [(rules, answers_of(runs, rules)) for rules in questions_of(parts)]
    answers = [answer for _, of_question in asked for answer in of_question]
    if answers:
        lines += [
            "",
            "## each rule against its own shuffled control",
            "",
            "Mean over the curve, rule − control, paired by seed; an exact sign-flip test over all "
            "pairs, once they are complete, corrected by Holm.",
        ]
    for rules, of_question in asked:
        if of_question:
            lines += ["", *rule_lines(of_question, planned=len(rules))]

    write_file(folder / "table.md", "\n".join([*lines, ""]).encode())
    write_file(folder / "table.json", json.dumps(described, indent=1).encode())
    columns = columns_of_rules(answers) if answers else columns_of_hosts(described)
    write_file(folder / "gains.svg", gains_figure(GAINS_TITLE, columns).encode())
    write_file(folder / "curves.svg", curves_figure(panels_of(runs, parts)).encode())
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the figures


def gains_of(described: dict, rule: str, other: str) -> Gains:
    """{host, or "all": (gain, low, high)} of a rule against another, where there is an interval."""
    gains = {}
    for host in (*HOSTS, "all"):
        label = f"{host}/{rule}" if other == "host" else f"{host}/{rule} − {other}"
        gain = described[label]["area"]["gain"] if label in described else None
        if gain and gain[1] is not None:
            gains[host] = gain
    return gains


def columns_of_hosts(described: dict) -> list[Column]:
    """What rules gain over their hosts and over their controls, a group for each "rule − other"."""
    groups = {
        f"{rule} − {other}": gains_of(described, rule, other)
        for rule in (*TABLE, *CONTROLS)
        if rule != "host"
        for other in ("host", *AGAINST.get(rule, ()))
    }
    return [Column("percentage points, 95 % intervals", groups)]


def columns_of_rules(answers: list[Answer]) -> list[Column]:
    """What rules of token credit gain over their shuffled controls, and beside it over the host."""
    return [
        Column(
            "rule − its own shuffled control, percentage points, 95 % intervals",
            {answer.rule: answer.gains for answer in answers},
        ),
        Column(
            "rule − host, percentage points, 95 % intervals",
            {answer.rule: answer.over_host for answer in answers},
        ),
    ]


def panel_of(runs: Runs, host: str, rules: Sequence[str]) -> Panel | None:
    """The curves of those rules that have run with a host; None where there is no seed of all."""
    ran = {cell for cell, _ in runs}
    rules = [rule for rule in rules if f"{host}/{rule}" in ran]
    seeds = shared_seeds(runs, [f"{host}/{rule}" for rule in rules]) if rules else []
    if not seeds:
        return None
    curves = {}
    for rule in rules:
        of_seeds = [runs[f"{host}/{rule}", seed]["accuracy"] for seed in seeds]
        curves[rule] = [statistics.fmean(column) for column in zip(*of_seeds, strict=True)]
    return Panel(host, runs[f"{host}/{rules[0]}", seeds[0]]["steps"], curves)


def panels_of(runs: Runs, parts: list[str]) -> list[Panel]:
    """Which curves stand together: CURVES of each host; each rule of token credit, its controls and
    the host, a row of panels with all levels."""
    panels = []
    if set(parts) & set(DEFAULT_PARTS):
        hosts = dict.fromkeys(cell.split("/")[0] for cell, _ in runs)
        panels += [panel_of(runs, host, CURVES) for host in hosts]
    for rules in questions_of(parts):
        for cell, rule in rules.items():
            controls = (control_name(rule, "shuffled"), control_name(rule, "uniform"))
            together = ["host", cell, *controls]
            for prefix, _ in LEVELS.values():
                panels.append(panel_of(runs, f"{prefix}grpo", together))
    return [panel for panel in panels if panel is not None]
