"""report.py: a run as one HTML file that needs nothing else: no network, no library, no server.

    python -m tools.report runs/toy          # writes runs/toy/report.html
    python -m tools.report runs/a runs/b     # writes comparison.html, their curves over one another
    python -m tools.report runs/a runs/b --out seeds.html

The page of a run shows what its folder holds: metrics.jsonl as curves; examples/step-*.json, the
held-out samples that train.py answers at each evaluation, token by token; analysis/*.json, if a
tool wrote there; starts.jsonl and config.yaml. report_template.html is its style and its script.

Everything that comes from a file or a model is text here: escaped in HTML and in the data block of
the script. The page's own policy lets no other script run and nothing be loaded.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from config import load_config
from rows import printable
from run_folder import write_file
from tools.analysis_view import intervention_section, roles_section
from tools.curves import HELD_OUT, SIGNALS, TRAINING, comparison_charts, run_charts
from tools.examples import EXAMPLE_CELLS, EXAMPLES, coarsen
from tools.markup import Html, data_block, esc, join, table, tag
from tools.read_run import ReportError, Run, read_file, read_run
from tools.token_view import choose_pairs, token_view

MAX_BYTES = 4_900_000  # of a page
MAX_RUNS = 8  # of a comparison: so many colours can be told apart

# (heat-map cells of an example, examples): each is tried until the page fits.
DETAILS = (
    (EXAMPLE_CELLS, EXAMPLES),
    (64, EXAMPLES),
    (64, 6),
    (64, 3),
    (16, 1),
    (0, 0),
)

ANALYSES = {"roles.json": roles_section, "intervene.json": intervention_section}

TILES = [  # label, key of metrics.jsonl, format
    ("Held-out accuracy, sampled", "eval/accuracy", ".0%"),
    ("Held-out accuracy, greedy", "eval/accuracy_greedy", ".0%"),
    ("With images swapped", "eval/accuracy_swapped", ".0%"),
    ("Rollout accuracy", "reward/accuracy", ".0%"),
    ("Alignment", "dyco/alignment", ".3f"),
    ("Tokens per response", "response/length", ".0f"),
]
TILES_SHOWN = 5

FOOTER = (
    "Equations are those of DyCo-RL, arXiv 2606.08035. A token's row is the attention of the "
    "position that predicted it, mean over heads, in the layers that dyco.layers names; heat-maps "
    "show its part on the image. Written by tools/report.py; the file loads nothing."
)


# ------------------------------------------------------------------------------- the page of a run


def write(run_dir: str | Path) -> Path:
    """Write run_dir/report.html and return its path. Raises ReportError.

    The page has at most MAX_BYTES: heat-maps get coarser and examples fewer until it fits.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    for cells, count in DETAILS:
        content = run_page(run, cells, count).encode()
        if len(content) <= MAX_BYTES:
            break
    write_file(path, content)
    return path


def run_page(run: Run, cells: int, count: int) -> str:
    """The whole page with at most `count` examples of `cells` heat-map cells."""
    tau = (run.config.get("dyco") or {}).get("tau")
    pairs = []
    if run.evaluations and count:
        evaluations = [
            (step, [coarsen(example, cells) for example in examples])
            for step, examples in run.evaluations
        ]
        pairs = choose_pairs(evaluations, count)
    view, data = token_view(pairs, tau)
    header = [
        tag("p", "DyCo-RL training report", class_="over"),
        tag("h1", run.name),
        tag("p", subtitle(run), class_="sub"),
        tag("div", tiles(run.rows), run_charts(run.rows, HELD_OUT), class_="overview"),
    ]
    main = [
        token_section(view if pairs else None),
        training_section(run),
        signals_section(run),
        analysis_section(run.folder),
        run_section(run),
    ]
    return fill_template(title=run.name, header=join(header), main=join(main), data=data)


def section(name: str, title: str, lead: str, *content) -> Html:
    return tag("section", tag("h2", title), tag("p", lead, class_="lead"), *content, id=name)


def subtitle(run: Run) -> str:
    """The method, the model, the data and how far the run is, in one line."""
    last_step = run.rows[-1]["step"]
    if not run.config:
        return f"step {last_step}; the folder holds no config.yaml"

    def setting(section_name: str, key: str):
        return (run.config.get(section_name) or {}).get(key, "?")

    method = "alone, without DyCo"
    if setting("dyco", "enabled") is True:
        method = f"with DyCo token advantages, rule {setting('dyco', 'rule')}"
    return (
        f"{str(setting('algo', 'name')).upper()} {method} · model {setting('model', 'path')} · "
        f"data {setting('data', 'path')} · step {last_step} of {setting('train', 'steps')}"
    )


def tiles(rows: list[dict]) -> Html:
    """The run in a few numbers: first → last."""
    shown = []
    for label, key, form in TILES:
        values = [f"{row[key]:{form}}".replace("%", "\u202f%") for row in rows if key in row]
        if values:
            first = tag("small", values[0], " → ") if len(values) > 1 else ""
            shown.append(tag("div", tag("dt", label), tag("dd", first, values[-1])))
    return tag("dl", *shown[:TILES_SHOWN], class_="tiles")


def token_section(view: Html | None) -> Html:
    return section(
        "tokens",
        "Tokens",
        "The same held-out questions at the first and at the last evaluation, answered at "
        "temperature 1. Point at a token, tap it, or move with the arrow keys.",
        view or tag("p", "No evaluation of this run has left examples.", class_="lead"),
    )


def training_section(run: Run) -> Html:
    return section(
        "training",
        "Training",
        "From every step's own rollouts: the step thin, its running mean bold. “held out” is from "
        "the evaluations.",
        tag("div", run_charts(run.rows, TRAINING) or "No step yet.", class_="charts"),
    )


def signals_section(run: Run) -> Html:
    charts = run_charts(run.rows, SIGNALS)
    if not charts:
        charts = tag(
            "p",
            "This run did not read attention while training, so there are no curves here; the "
            "tokens above were read at its evaluations.",
            class_="lead",
        )
    return section(
        "signals",
        "DyCo over training",
        "Means over the response tokens of each rollout: which role they have, how well attention "
        "fits it, and the four signals that decide.",
        tag("div", charts, class_="charts"),
    )


def analysis_section(folder: Path) -> Html:
    """What tools.roles and tools.intervene left in the folder, if they did."""
    parts = []
    for name, build in ANALYSES.items():
        path = folder / "analysis" / name
        if path.exists():
            parts.append(read_file(path, build))
    if not parts:
        return Html()
    return tag("section", tag("h2", "Analysis"), *parts, id="analysis")


# ------------------------------------------------------------------------- how the run was made


def run_section(run: Run) -> Html:
    """The newest start of the run and its settings."""
    if not run.starts and not run.config:
        return Html()
    return tag("section", tag("h2", "This run"), starts(run.starts), settings(run.config), id="run")


def starts(rows: list[dict]) -> Html:
    """What the newest row of starts.jsonl says, and how many starts there were."""
    if not rows:
        return tag("p", "The folder holds no starts.jsonl, so date and machine are unknown.")
    newest = rows[-1]
    facts = [[key, show_value(newest[key])] for key in newest if key != "step"]
    if len(rows) == 1:
        count = "once"
    else:
        steps = ", ".join(str(row["step"]) for row in rows)
        count = f"{len(rows)} times, at steps {steps}; the newest is shown"
    return table([], [["started", count], *facts], class_="facts")


def settings(config: dict) -> Html:
    """The settings that differ from config.yaml, and all the others folded."""
    usual = flat_settings(usual_settings(config))
    changed, others = [], []
    for name, value in flat_settings(config).items():
        # Every run has a folder of its own, so a changed run.dir says nothing.
        if name == "run.dir" or (name in usual and usual[name] == value):
            others.append([name, show_value(value)])
        else:
            shown = show_value(usual[name]) if name in usual else "(no such key)"
            changed.append([name, tag("b", show_value(value), class_="changed"), shown])
    if not changed and not others:
        return Html()
    if changed:
        visible = table(["setting", "this run", "config.yaml"], changed, class_="settings")
        summary = f"The other {len(others)} settings: as in config.yaml, but for run.dir"
    else:
        visible = tag("p", "Every setting is as in config.yaml.")
        summary = f"All {len(others)} settings"
    folded = table([], others, class_="settings")
    return join(
        [
            tag("h3", "Settings that differ from config.yaml"),
            visible,
            tag("details", tag("summary", summary), folded),
        ]
    )


def usual_settings(config: dict) -> dict:
    """config.yaml with the recipe of the run's algorithm, by section."""
    try:
        return asdict(load_config(overrides=[f"algo.name={config['algo']['name']}"]))
    except (ValueError, KeyError, TypeError):  # a run of another version, say
        return asdict(load_config())


def flat_settings(config: dict) -> dict:
    """section.key -> value, of all sections that hold keys."""
    flat = {}
    for section_name, keys in config.items():
        if isinstance(keys, dict):
            flat |= {f"{section_name}.{key}": value for key, value in keys.items()}
    return flat


def show_value(value) -> str:
    """A setting as text, with – for null."""
    if value is None:
        return "–"
    if isinstance(value, bool | list | dict):
        return json.dumps(value, default=str)
    return str(value)


# ------------------------------------------------------------------------------------- several runs


def compare(run_dirs: list[str | Path], out: str | Path) -> Path:
    """Write a page with the curves of several runs over one another. Raises ReportError."""
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise ReportError(f"--out: expected a file in a folder that exists, found {str(path)!r}")
    if len(run_dirs) > MAX_RUNS:
        raise ReportError(f"expected at most {MAX_RUNS} runs to compare, found {len(run_dirs)}")
    runs = name_runs([read_run(run_dir) for run_dir in run_dirs])
    write_file(path, comparison_page(runs).encode())
    return path


def name_runs(runs: list[Run]) -> dict[str, Run]:
    """Each run under its folder's name, or under its path where two folders have one name."""
    names = [run.name for run in runs]
    named = {}
    for run in runs:
        name = run.name if names.count(run.name) == 1 else str(run.folder)
        if name in named:
            raise ReportError(f"{run.folder}: given twice; expected different folders")
        named[name] = run
    return named


def comparison_page(runs: dict[str, Run]) -> str:
    rows = {name: run.rows for name, run in runs.items()}
    keys = [
        tag("span", tag("i"), name, style=f"--stroke:var(--run-{place})")
        for place, name in enumerate(runs)
    ]
    header = [
        tag("p", "DyCo-RL comparison", class_="over"),
        tag("h1", f"{len(runs)} runs"),
        tag("p", *keys, class_="runs"),
    ]
    main = [
        tag("section", tag("h2", "What differs"), differences(runs), id="differences"),
        section(
            "training",
            "Training",
            "Held-out curves come from the evaluations, all others from every step's own rollouts: "
            "the step thin, its running mean bold.",
            tag("div", comparison_charts(rows, [*HELD_OUT, *TRAINING]), class_="charts"),
        ),
    ]
    signals = comparison_charts(rows, SIGNALS)
    if signals:
        main.append(
            section(
                "signals",
                "DyCo over training",
                "Means over the response tokens of each rollout.",
                tag("div", signals, class_="charts"),
            )
        )
    return fill_template(title=f"{len(runs)} runs", header=join(header), main=join(main), data=[])


def differences(runs: dict[str, Run]) -> Html:
    """The settings that are not the same in all runs that hold a config.yaml, as a table."""
    known = {name: flat_settings(run.config) for name, run in runs.items() if run.config}
    keys = dict.fromkeys(key for settings_of_run in known.values() for key in settings_of_run)
    rows = []
    for key in keys:
        shown = []
        for values in known.values():
            shown.append(show_value(values[key]) if key in values else "(no such key)")
        if key != "run.dir" and len(set(shown)) > 1:
            rows.append([key, *shown])
    parts = []
    if rows:
        parts.append(table(["setting", *known], rows, class_="settings"))
    elif len(known) > 1:
        parts.append(tag("p", "No setting but the folder: these are runs of the same config."))
    for name in runs:
        if name not in known:
            parts.append(tag("p", f"{name} holds no config.yaml."))
    return join(parts)


# ------------------------------------------------------------------------- the frame of all pages


def fill_template(title: str, header: Html, main: Html, data: list) -> str:
    """A page of report_template.html. data: what its script draws the token view from."""
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.DOTALL)[1]
    parts = {
        "title": esc(title),
        "header": header,
        "main": main,
        "footer": esc(FOOTER),
        "data": data_block(data),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    # One pass: what is put in is not searched for placeholders again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


# ------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description="One RUN_DIR: writes RUN_DIR/report.html. "
        "Several: one page with their curves, at --out.",
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="folder of a train.py run")
    parser.add_argument("--out", help="page of several runs (default: comparison.html)")
    options = parser.parse_args(arguments)
    try:
        if len(options.folders) > 1:
            path = compare(options.folders, options.out or "comparison.html")
        elif options.out is not None:
            raise ReportError("--out is for several runs; a single one's page goes to its folder")
        else:
            path = write(options.folders[0])
    except (ReportError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    print(path)


if __name__ == "__main__":
    main()
