"""ablate.py: does it work? The paper's Table 1 in miniature on the embedded default, with controls.

    python -m tools.ablate                     # runs what is missing, seed after seed; tabulates
    python -m tools.ablate table --seeds 4     # some parts of the grid, first seeds first
    python -m tools.ablate --dry-run           # only says how many runs that is, and how long
    python -m tools.ablate credit              # the rules of token credit (docs/credit.md)
    python -m tools.ablate mine                # a rule of yours, with its host and its controls
    python -m tools.ablate --report            # only tabulates the runs that came with the project
    python -m tools.ablate --report --out DIR  # only tabulates the runs of yours in DIR

A *cell* is a set of config overrides. Every cell is run with the same seeds, so differences are
paired. A finished run is one line of OUT/runs.jsonl, appended, and is never computed again. The
tables and figures, table.md, table.json, gains.svg and curves.svg, stand beside it. Each run has
one thread.

A run belongs to its resolved config, its seed and the code that decides its outcome. Each line
keeps hashes of them, and a line counts only where they are what they are now. So whoever changes a
rule gets runs of that rule. The machine and the versions of the libraries are not compared. The 464
runs in results/ were made by earlier code: only --report shows them, and they stand in for no run.

What was asked, before any result: the *primary* figure is paper − shuffled over all four hosts,
mean over the held-out curve at temperature 1. It compares the same weights on the right and on the
wrong tokens. Next are paper − uniform and paper − host. AdamW does not see a common factor of all
advantages (only the KL term and the clipping of a gradient's norm do), so `uniform` is nearly the
host once more: its gain shows the noise. All other figures are exploratory.

The arithmetic: 58 cells × 8 seeds × 104.6 s (mean of all 464, two at a time) / 2 = 6.7 hours.

The regime was chosen on the hosts' curves alone, before any run with DyCo (seed 1000; the table's
seeds are 0, 1, …): see REGIME.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import html
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

from tqdm import tqdm

import dyco
from config import DEFAULTS, Config, load_config
from rows import append_jsonl, read_jsonl, show
from run_folder import exclusive, write_file
from tools.charts import ticks
from tools.command import command
from tools.estimates import bootstrap_mean
from tools.rule_table import SEEDS, Answer, answer_of, gain_text, rule_lines

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"  # came with the project
CREDIT_RESULTS = RESULTS / "credit"  # so did these, of the part "credit"
OUT = Path("runs/ablation")
UNFINISHED = ".unfinished-runs"  # of OUT, where runs are until they end; emptied at each start


# --------------------------------------------------------------------------------------- the grid

HOSTS = ("grpo", "dapo", "gspo", "sapo")  # the paper's four, not all of rl_algos.ALGORITHMS
# The second pool was added after the results: most of the variance between seeds is SAPO's.
POOLS = {"all": HOSTS, "without sapo": HOSTS[:3]}

# The default level with four optimizer steps per rollout, so that ratios leave 1, stopped while the
# hosts still rise. It was chosen on these curves, of the hosts alone with seed 1000, before any run
# with DyCo in this regime. Percent right at temperature 1 every 8 steps:
#   grpo 31 42 56 60 76 87, dapo 31 46 60 73 75 88, gspo 31 35 49 57 67 78, sapo 31 27 32 44 57 81
# Greedy 52 -> 100, 92, 89, 95; responses of 40 tokens; 15 to 28 % of the groups are all right or
# all wrong.
REGIME = [
    "train.steps=40",
    "train.updates_per_rollout=4",
    "eval.every=8",
    "eval.samples=300",
    "toy.eval_size=300",
    "eval.swapped=false",
    "checkpoint.every=20",
    "checkpoint.keep_last=1",
    "log.samples_per_step=0",
]


def rule_settings(rule: str, ratio: str = "relative", control: str = "none") -> list[str]:
    settings = [f"dyco.rule={rule}", f"dyco.ratio={ratio}"]
    if control != "none":
        settings.append(f"dyco.control={control}")
    return settings


def control_name(rule: str, control: str) -> str:
    """
    >>> control_name("paper", "shuffled"), control_name("signed", "shuffled")
    ('shuffled', 'signed shuffled')
    """
    return control if rule == "paper" else f"{rule} {control}"


def controls_of(rule: str, ratio: str = "relative") -> dict[str, list[str]]:
    """What a rule must be compared with: equal weights, then the same weights on other tokens."""
    return {
        control_name(rule, control): rule_settings(rule, ratio, control)
        for control in ("uniform", "shuffled")
    }


def cells_of(
    algorithm: str, rules: dict[str, list[str]], prefix: str = "", extra: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """{cell: its overrides} of one host; a cell is called "[prefix]algorithm/rule"."""
    return {
        f"{prefix}{algorithm}/{name}": [f"algo.name={algorithm}", *settings, *extra]
        for name, settings in rules.items()
    }


def cells_of_hosts(rules: dict[str, list[str]]) -> dict[str, list[str]]:
    cells = {}
    for host in HOSTS:
        cells |= cells_of(host, rules)
    return cells


OFF = ["dyco.enabled=false"]
TABLE = {
    "host": OFF,
    "paper": rule_settings("paper"),
    "paper minmax": rule_settings("paper", "minmax"),
    "signed minmax": rule_settings("signed", "minmax"),
}
CONTROLS = {
    **controls_of("paper"),
    **controls_of("signed", "minmax"),
    "response": rule_settings("response"),
}
SMALL = {"host": OFF, "paper": rule_settings("paper"), **controls_of("paper")}
VARIANTS = {
    "tau 0": ["dyco.tau=0"],
    "tau 0.2": ["dyco.tau=0.2"],
    "alpha 0.05": ["dyco.alpha=0.05"],
    "alpha 0.8": ["dyco.alpha=0.8"],
    "hellinger": ["dyco.shift=hellinger"],
    "js": ["dyco.shift=js"],
    "l1": ["dyco.shift=l1"],
    "text scope all": ["dyco.text_scope=all"],
    "first layer": ["dyco.layers=[0]"],
    "all layers": ["dyco.layers=[0,1,2,3]"],
}
LEVELS = {  # of the toy, on which rules of token credit are compared: prefix and settings of cells
    "level 1": ("", ()),
    "level 3": ("level 3: ", ("toy.level=3",)),
}
# Rules of token credit, each with its own shuffled control: cell -> (rule, ratio).
CREDIT_RULES = {
    "paper": ("paper", "relative"),
    "signed minmax": ("signed", "minmax"),
    "entropy": ("entropy", "relative"),
    "vppo": ("vppo", "relative"),
    "pgpo": ("pgpo", "relative"),
    "tor": ("tor", "relative"),
    "vgpo": ("vgpo", "relative"),
    "surprise": ("surprise", "relative"),
    "siblings": ("siblings", "relative"),
    "phrases": ("phrases", "relative"),
}
OWN_RULE = "phrases"  # must also beat its uniform control


def credit_cells() -> dict[str, list[str]]:
    cells = {"host": OFF}
    for cell, (rule, ratio) in CREDIT_RULES.items():
        cells[cell] = rule_settings(rule, ratio)
        cells[control_name(rule, "shuffled")] = rule_settings(rule, ratio, "shuffled")
    cells[f"{OWN_RULE} uniform"] = rule_settings(OWN_RULE, control="uniform")
    return cells


def cells_on_levels(rules: dict[str, list[str]]) -> dict[str, list[str]]:
    """With GRPO on the levels of LEVELS."""
    cells = {}
    for prefix, extra in LEVELS.values():
        cells |= cells_of("grpo", rules, prefix, extra=extra)
    return cells


def cells_of_rule(rule: str) -> dict[str, list[str]]:
    """A rule with its host and its controls."""
    rules = {"host": OFF, rule: rule_settings(rule), **controls_of(rule)}
    return cells_on_levels(rules)


# Each rule that is in none of the other parts is a part by its own name. So whoever adds a rule to
# dyco.RULES can ask for it. Where a response has one factor, no control would change it.
KNOWN_RULES = {rule for rule, _ in CREDIT_RULES.values()}
RULE_PARTS = [
    rule for rule, entry in dyco.RULES.items() if rule not in KNOWN_RULES and not entry.per_response
]


PARTS = {  # of each seed, in the order in which they are run
    "table": cells_of_hosts(TABLE),
    "controls": cells_of_hosts(CONTROLS),
    "rate": {
        **cells_of("grpo", SMALL, "half rate: ", extra=("optim.lr=5e-05",)),
        **cells_of("grpo", SMALL, "twice rate: ", extra=("optim.lr=0.0002",)),
    },
    "ablations": cells_of("grpo", VARIANTS),
    "level2": cells_of(
        "grpo", SMALL, "level 2: ", extra=("toy.level=2", "rollout.max_new_tokens=96")
    ),
    "credit": cells_on_levels(credit_cells()),
}
DEFAULT_PARTS = [part for part in PARTS if part != "credit"]
PARTS |= {rule: cells_of_rule(rule) for rule in RULE_PARTS}
CELLS = {  # cell -> all its overrides
    cell: [*REGIME, *overrides] for cells in PARTS.values() for cell, overrides in cells.items()
}
AGAINST = {  # what a cell is set against besides its host
    "paper": (*controls_of("paper"), "response"),
    "paper minmax": ("uniform", "paper"),
    "signed minmax": tuple(controls_of("signed")),
    **{rule: tuple(controls_of(rule)) for rule in RULE_PARTS},
}

MEASURES = {
    "final": "at the end, temperature 1",
    "greedy": "at the end, greedy",
    "area": "mean over the curve",
    "online": "mean in training",
}
KEPT = {  # of metrics.jsonl, every step
    "online": "reward/accuracy",
    "entropy": "policy/entropy",
    "clip_fraction": "policy/clip_fraction",
    "grad_norm": "policy/grad_norm",
    "length": "response/length",
    "alignment": "dyco/alignment",
}


# ---------------------------------------------------------- the config and the code that made a run

# Modules of ours that train.py imports and that cannot change what a run learns.
NOT_DECIDING = {
    "config",  # all that it decides is the resolved config, which is compared by itself
    "run_folder",  # saves, resumes and prints; a run of the grid is never resumed
    "tools",  # draw the report of a run
    "benchmarks",  # are commands of evaluate.py, which train.py does not call
}
# Keys of the config that cannot, either.
NOT_DECIDING_KEYS = (
    "run.dir",  # where the run is written
    "toy.cache_dir",  # where the warm start is kept, under a hash of what it is made of
    "checkpoint.*",  # when the state is saved; a run of the grid begins anew, never from there
    "log.*",  # how many responses are written down
    "train.profile_steps",  # a trace of where the time goes
)


class Origin(NamedTuple):
    """Hashes of what decides a run's outcome: its resolved config, with its seed, and the code."""

    config: str
    code: str


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Code(NamedTuple):
    """What a source does."""

    dump: str  # without what does not run: comments, formatting and docstrings
    imports: list[str]  # top-level names of all that it imports, inside its functions, too


def read_code(path: Path) -> Code:
    """Raises ValueError for a file that is no Python."""
    return parse_code(path.read_bytes(), path)


@functools.cache
def parse_code(source: bytes, path: Path) -> Code:
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, with_docstrings) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        elif isinstance(node, ast.Import):
            imports += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports.append(node.module.split(".")[0])
    return Code(ast.dump(tree), imports)


def deciding_sources() -> dict[str, str]:
    """{file: its dump} of train.py and of all modules of ours that it imports, directly or not.

    Imports are followed, so that a file which a fork adds is not forgotten.
    """
    sources = {}
    waiting = ["train"]
    passed = set(NOT_DECIDING)
    while waiting:
        module = waiting.pop()
        if module in passed:
            continue
        passed.add(module)
        for path in [ROOT / f"{module}.py", *(ROOT / module).rglob("*.py")]:
            if path.is_file():  # otherwise a library
                code = read_code(path)
                sources[str(path.relative_to(ROOT))] = code.dump
                waiting += code.imports
    return sources


def code_fingerprint() -> str:
    """A hash of the code that decides a run's outcome.

    Another version of Python may dump the same code otherwise. Then earlier runs do not count.
    """
    sources = sorted(deciding_sources().items())
    return short_hash("\n".join(f"{file}: {dump}" for file, dump in sources))


def cell_config(cell: str) -> Config:
    return load_config(DEFAULTS, CELLS[cell])


def config_fingerprint(config: Config, seed: int) -> str:
    """A hash of a resolved config with this seed, without the keys that do not matter."""
    config = replace(config, train=replace(config.train, seed=seed))
    deciding = {}
    for section, values in asdict(config).items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if not any(fnmatch(key, pattern) for pattern in NOT_DECIDING_KEYS):
                deciding[key] = value
    if config.reward.custom:
        # This is code, too, though no import leads to it. Without the file, train.py refuses.
        path = ROOT / config.reward.custom.rpartition(":")[0]
        if path.is_file():
            deciding["source of reward.custom"] = read_code(path).dump
    return short_hash(json.dumps(deciding, sort_keys=True))


def present_origin(cell: str, seed: int) -> Origin:
    """What a run would be made with if it began now."""
    return Origin(config_fingerprint(cell_config(cell), seed), code_fingerprint())


# ---------------------------------------------------------------------------------------- the runs

Runs = dict[tuple[str, int], dict]  # (cell, seed) -> line of runs.jsonl


def read_lines(folder: Path) -> list[tuple[int, dict]]:
    """(line number, object) of each line of a runs.jsonl; none where there is no such file."""
    path = folder / "runs.jsonl"
    return read_jsonl(path, growing=True) if path.exists() else []


def check_run(folder: Path, line: int, row: dict) -> None:
    """Raise ValueError for a line of runs.jsonl that has not what the tables need."""
    problem = problem_of(row)
    if problem:
        raise ValueError(
            f"{folder / 'runs.jsonl'}, line {line}: {problem}; mend the line, or take it out"
        )


def problem_of(row: dict) -> str | None:
    """What keeps a line from being a run, if anything does."""
    if type(row.get("seed")) is not int:
        return f'"seed" is {show(row.get("seed"))}; expected an integer'
    if not (are_numbers([row.get("seconds")]) and row["seconds"] > 0):
        return f'"seconds" is {show(row.get("seconds"))}; expected a number above 0'
    steps = row.get("steps")
    if not are_numbers(steps) or len(steps) < 2 or steps != sorted(set(steps)):
        return '"steps" is not two numbers or more that rise'
    for name in ("accuracy", "greedy", "online"):
        curve = row.get(name)
        if not are_numbers(curve) or not curve or not all(0 <= share <= 1 for share in curve):
            return f'"{name}" is not a list of numbers from 0 to 1'
    if len(row["accuracy"]) != len(steps):
        return f'"accuracy" has {len(row["accuracy"])} numbers, and "steps" {len(steps)}'
    return None


def are_numbers(values) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )


def in_present_spelling(settings: list[str]) -> list[str]:
    """Sorted; earlier code had names for a rule and its control together.

    >>> in_present_spelling(["dyco.rule=shuffled", "dyco.ratio=relative"])
    ['dyco.control=shuffled', 'dyco.ratio=relative', 'dyco.rule=paper']
    """
    spelled = []
    for setting in settings:
        name = setting.removeprefix("dyco.rule=")
        if name != setting and name in dyco.FORMER_NAMES:
            rule, control = dyco.FORMER_NAMES[name]
            spelled += [f"dyco.rule={rule}", f"dyco.control={control}"]
        else:
            spelled.append(setting)
    return sorted(spelled)


def read_shipped(folder: Path) -> Runs:
    """The runs in a folder of results/, which were made by earlier code.

    Raises ValueError for a line that was made with other overrides than its cell has now: it would
    stand in the tables under a name that means something else.
    """
    runs = {}
    for line, row in read_lines(folder):
        if in_present_spelling(row["settings"]) != sorted(CELLS.get(row["cell"], [])):
            raise ValueError(
                f"{folder / 'runs.jsonl'}, line {line}: {row['cell']}, seed {row['seed']}, was "
                f"run with {' '.join(row['settings'])}, which is not what that cell is now; "
                "move the file away, or take the line out"
            )
        check_run(folder, line, row)
        runs[row["cell"], row["seed"]] = row
    return runs


def read_runs(folder: Path) -> tuple[Runs, int]:
    """The runs of a folder that the present code and config made, and how many others made."""
    code = code_fingerprint()
    configs: dict[str, Config] = {}
    runs: Runs = {}
    others = 0
    for line, row in read_lines(folder):
        cell, seed = row.get("cell"), row.get("seed")
        if row.get("code") != code or not isinstance(cell, str) or cell not in CELLS:
            others += 1
            continue
        check_run(folder, line, row)
        if cell not in configs:
            configs[cell] = cell_config(cell)
        if row.get("config") == config_fingerprint(configs[cell], seed):
            if runs.get((cell, seed), row) != row:
                raise ValueError(
                    f"{folder / 'runs.jsonl'}, line {line}: another line has other numbers of "
                    f"{cell}, seed {seed}; take one of them out"
                )
            runs[cell, seed] = row
        else:
            others += 1
    return runs, others


class Plan(NamedTuple):
    """What a call has to do."""

    cells: int
    seeds: int
    missing: list[tuple[str, int]]  # (cell, seed), in the order in which they are run
    there: int  # of the wanted runs
    others: int  # runs in the folder that do not count
    seconds: float | None  # of a run, where there is one to go by
    shipped_seconds: bool  # whether they are of the shipped runs


def plan_runs(parts: list[str], seeds: int, folder: Path) -> Plan:
    """Seed after seed, so that tables of few seeds are complete early."""
    runs, others = read_runs(folder)
    cells = cells_of_parts(parts)
    wanted = [(cell, seed) for seed in range(seeds) for cell in cells]
    missing = [run for run in wanted if run not in runs]
    seconds = [row["seconds"] for row in runs.values()]
    if not runs:
        seconds = [row["seconds"] for _, row in read_lines(shipped_folder(parts))]
    return Plan(
        cells=len(cells),
        seeds=seeds,
        missing=missing,
        there=len(wanted) - len(missing),
        others=others,
        seconds=statistics.fmean(seconds) if seconds else None,
        shipped_seconds=not runs,
    )


def duration_text(seconds: float) -> str:
    """
    >>> duration_text(24128), duration_text(90), duration_text(12)
    ('6.7 hours', '2 minutes', '12 seconds')
    """
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 90:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.0f} seconds"


def describe_plan(plan: Plan, jobs: int, folder: Path) -> str:
    """How many runs are wanted, how many are there, and how long the rest takes."""
    lines = []
    if plan.others:
        lines.append(
            f"{plan.others} runs there were made with other code or another config and do not count"
        )
    text = (
        f"{plan.cells * plan.seeds} runs wanted ({plan.cells} cells × {plan.seeds} seeds), "
        f"{plan.there} of them in {folder}, {len(plan.missing)} to run"
    )
    if plan.missing and plan.seconds is None:
        text += "; no run is there to tell how long that takes"
    elif plan.missing:
        rounds = math.ceil(len(plan.missing) / jobs)
        whose = "of the shipped runs" if plan.shipped_seconds else "of those there"
        text += (
            f": about {duration_text(rounds * plan.seconds)}, {jobs} at a time "
            f"(the mean {whose} is {plan.seconds:.0f} s)"
        )
    return "\n".join([text, *lines])


# ---------------------------------------------------------------------------------------- running


def run_one(cell: str, seed: int, place: Path) -> dict:
    """Train once, in a process of its own with one thread; returns the run's line.

    place: an empty folder for the run. Raises RuntimeError for a run that did not end, or during
    which the code or config changed.
    """
    folder = place / "run"
    origin = present_origin(cell, seed)
    started = time.perf_counter()
    settings = [*CELLS[cell], f"train.seed={seed}", f"run.dir={folder}"]
    process = subprocess.run(
        [sys.executable, "train.py", "config.yaml", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    # A run that was asked to stop exits with 0, too, but has no final/.
    if process.returncode or not (folder / "final").exists():
        errors = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise RuntimeError(f"{cell}, seed {seed}, did not end: {errors[-1]}")
    if present_origin(cell, seed) != origin:
        raise RuntimeError(f"{cell}, seed {seed}: the code or the config changed while it ran")
    line = {
        "cell": cell,
        "seed": seed,
        **origin._asdict(),
        "settings": CELLS[cell],
        **read_curves(folder / "metrics.jsonl"),
    }
    line["seconds"] = round(time.perf_counter() - started, 1)
    return line


def read_curves(path: Path) -> dict[str, list]:
    """What is kept of a run's metrics.jsonl."""
    rows = [row for _, row in read_jsonl(path)]
    evaluations = [row for row in rows if "eval/accuracy" in row]
    if [row["step"] for row in rows] != list(range(len(rows))):
        raise RuntimeError(f"{path}: the steps are not 0, 1, 2, …: not of one run from its start")
    curves = {
        "steps": [row["step"] for row in evaluations],
        "accuracy": [row["eval/accuracy"] for row in evaluations],
        "greedy": [row["eval/accuracy_greedy"] for row in evaluations],
    }
    for name, key in KEPT.items():
        # The first row is the evaluation before any step.
        values = [round(row[key], 5) for row in rows[1:] if key in row]
        if values:
            curves[name] = values
    return curves


def folder_for(cell: str, seed: int, scratch: Path) -> Path:
    """A new folder for a run: where the grid was killed, what it had started may still write."""
    scratch.mkdir(parents=True, exist_ok=True)
    name = f"{cell}-{seed}-".replace("/", "-").replace(" ", "_").replace(":", "")
    return Path(tempfile.mkdtemp(prefix=name, dir=scratch))


def run_missing(missing: list[tuple[str, int]], jobs: int, out: Path) -> None:
    """Run these (cell, seed), and append each to OUT/runs.jsonl when it ends.

    Raises RuntimeError, at the end, if any run failed.
    """
    failures = []
    lock = Lock()
    stopping = Event()
    scratch = out.resolve() / UNFINISHED
    shutil.rmtree(scratch, ignore_errors=True)  # a run that was cut off begins anew
    with tqdm(total=len(missing), desc="runs") as bar, ThreadPoolExecutor(jobs) as pool:

        def work(one: tuple[str, int]) -> None:
            place = folder_for(*one, scratch)
            try:
                row = run_one(*one, place)
            except (RuntimeError, ValueError) as error:  # the others go on
                if not stopping.is_set():  # Ctrl-C reaches the runs, too
                    fail(str(error))
                return
            with lock:
                keep(row, place)

        def keep(row: dict, place: Path) -> None:
            try:
                append_jsonl(out / "runs.jsonl", [row])
            except OSError as error:
                fail(f"{out / 'runs.jsonl'}: {error}", f"; its line would be {json.dumps(row)}")
                return
            shutil.rmtree(place)
            bar.update()
            cell, seed, accuracy = row["cell"], row["seed"], 100 * row["accuracy"][-1]
            tqdm.write(f"{cell}, seed {seed}: {accuracy:.0f} % in {row['seconds']:.0f} s")

        def fail(message: str, more: str = "") -> None:
            failures.append(message)
            tqdm.write(f"error: {message}{more}")

        try:
            for _ in pool.map(work, missing):  # an interrupt takes back what has not begun
                pass
        except KeyboardInterrupt:
            stopping.set()
            raise
    with contextlib.suppress(OSError):
        scratch.rmdir()  # where nothing is left in it
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(missing)} runs did not end, the first: {failures[0]}"
        )


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


def against_own_controls(runs: dict, rules: dict[str, str]) -> list[Answer]:
    """Some rules, {cell: rule}, against their own shuffled controls, of the seeds that were planned
    and the runs that are there."""
    runs = {(cell, seed): row for (cell, seed), row in runs.items() if seed < SEEDS}
    answers = []
    for cell, rule in rules.items():
        pairs = {
            level: (f"{prefix}grpo/{cell}", f"{prefix}grpo/{control_name(rule, 'shuffled')}")
            for level, (prefix, _) in LEVELS.items()
        }
        if all(shared_seeds(runs, list(pair)) for pair in pairs.values()):
            of_levels = {
                level: differences(runs, [mine], [control], "area")
                for level, (mine, control) in pairs.items()
            }
            answers.append(answer_of(cell, of_levels))
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


def cells_of_parts(parts: list[str]) -> list[str]:
    return [cell for part in dict.fromkeys(parts) for cell in PARTS[part]]


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
    asked = [(rules, against_own_controls(runs, rules)) for rules in questions_of(parts)]
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
    groups, title = groups_of(described), "Gain"
    if answers:
        groups = {f"{answer.rule} − shuffled": answer.gains for answer in answers}
        title = "Rule − its own shuffled control"
    write_file(folder / "gains.svg", gains_figure(groups, title).encode())
    write_file(folder / "curves.svg", curves_figure(runs).encode())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- figures

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
CURVES = {"host": "#888888", "paper": "#0072b2", "shuffled": "#d55e00", "signed minmax": "#009e73"}
GAIN_STEPS = 8  # between the ticks of the gains' axis, about


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


def gains_of(described: dict, rule: str, other: str) -> dict[str, tuple]:
    """{host, or "all": (gain, low, high)} of a rule against another, where there is an interval."""
    gains = {}
    for host in COLORS:
        label = f"{host}/{rule}" if other == "host" else f"{host}/{rule} − {other}"
        gain = described[label]["area"]["gain"] if label in described else None
        if gain and gain[1] is not None:
            gains[host] = gain
    return gains


def groups_of(described: dict) -> dict[str, dict[str, tuple]]:
    """{"rule − other": gains_of it}: what rules gain over the host and over their controls."""
    return {
        f"{rule} − {other}": gains_of(described, rule, other)
        for rule in (*TABLE, *CONTROLS)
        if rule != "host"
        for other in ("host", *AGAINST.get(rule, ()))
    }


def gains_figure(groups: dict[str, dict[str, tuple]], title: str) -> str:
    """Gains in the mean height of the curve, {group: {name: (mean, low, high)}}.

    One line for each name and, bold, one for all. Without an interval there is a dot alone.
    """
    ends = [end for gains in groups.values() for gain in gains.values() for end in gain]
    bound = max([2.0, *(abs(end) for end in ends if end is not None)])

    def x(value: float) -> float:
        return 436 + value / bound * 190

    marks = []
    y = 34
    for group, gains in groups.items():
        if gains:
            y += 8
            middle = y + 7 * len(gains) + 4
            marks.append(f'<text x="14" y="{middle}">{html.escape(group)}</text>')
        for host, (mean, low, high) in gains.items():
            y += 14
            color = COLORS[host]
            width = 3 if host in BOLD else 1.5
            low, high = (mean if end is None else end for end in (low, high))
            hint = html.escape(f"{host}: {group}") + f" {mean:+.2f} ({low:+.2f} … {high:+.2f})"
            marks.append(
                f'<g stroke="{color}" fill="{color}"><title>{hint}</title>'
                f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" '
                f'stroke-width="{width}"/>'
                f'<circle cx="{x(mean):.1f}" cy="{y}" r="{1.3 * width:.1f}"/></g>'
                f'<text x="234" y="{y + 4}" text-anchor="end" font-size="11" '
                f'fill="{color}">{host}</text>'
            )
    axis = []
    for value in ticks(-bound, bound, GAIN_STEPS):
        color = "#888" if value == 0 else "#e4e4e4"
        name = f"{value:+g}".replace("-", "−") if value else "0"
        axis.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="38" y2="{y + 14}" '
            f'stroke="{color}"/>'
            f'<text x="{x(value):.1f}" y="{y + 30}" text-anchor="middle" fill="#555">{name}</text>'
        )
    heading = f"{title}, mean over the held-out curve, percentage points (95 % intervals)"
    return svg(640, y + 40, heading, [*axis, *marks])


def curves_panel(runs: dict, host: str, left: int, top: int) -> list[str]:
    """The curves of one host, means over the seeds that all of them have."""
    width = 250
    height = 160
    parts = [f'<text x="{left}" y="{top - 8}" font-weight="bold">{host}</text>']
    for percent in (0, 25, 50, 75, 100):
        y = top + height * (1 - percent / 100)
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>'
            f'<text x="{left - 6}" y="{y + 4}" text-anchor="end" fill="#555">{percent}</text>'
        )
    ran = {cell for cell, _ in runs}
    colors = {rule: color for rule, color in CURVES.items() if f"{host}/{rule}" in ran}
    seeds = shared_seeds(runs, [f"{host}/{rule}" for rule in colors]) if colors else []
    if not seeds:
        return parts
    steps = runs[f"{host}/{next(iter(colors))}", seeds[0]]["steps"]

    def x(step: int) -> str:
        return f"{left + width * step / steps[-1]:.1f}"

    for rule, color in colors.items():
        of_seeds = [runs[f"{host}/{rule}", seed]["accuracy"] for seed in seeds]
        heights = [statistics.fmean(column) for column in zip(*of_seeds, strict=True)]
        points = [
            f"{x(step)},{top + height * (1 - share):.1f}"
            for step, share in zip(steps, heights, strict=True)
        ]
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
    for step in steps:
        parts.append(
            f'<text x="{x(step)}" y="{top + height + 16}" text-anchor="middle" '
            f'fill="#555">{step}</text>'
        )
    names = " · ".join(f'<tspan fill="{color}">{rule}</tspan>' for rule, color in colors.items())
    parts.append(f'<text x="{left + 50}" y="{top - 8}">{names}</text>')
    return parts


def curves_figure(runs: dict) -> str:
    """Accuracy at temperature 1 over steps: one panel per host, one curve per rule of CURVES."""
    parts = []
    for place, host in enumerate(HOSTS):
        row, column = divmod(place, 2)
        parts += curves_panel(runs, host, left=44 + 320 * column, top=52 + 226 * row)
    title = "Accuracy at temperature 1 on held-out samples, percent, over steps"
    return svg(640, 490, title, parts)


# ------------------------------------------------------------------------------------ the command


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}; expected at least 1")
    return number


def shipped_folder(parts: list[str]) -> Path:
    """Where runs came with the project: of these parts, or of what is most like them."""
    return RESULTS if set(parts) <= set(DEFAULT_PARTS) else CREDIT_RESULTS


def is_shipped(folder: Path) -> bool:
    return folder.resolve() in (RESULTS.resolve(), CREDIT_RESULTS.resolve())


def check_out(out: Path) -> None:
    """Raise ValueError for a folder whose files would be written over, though they are not ours."""
    if is_shipped(out):
        raise ValueError(f"--out {out}: these are the shipped runs; give a folder of your own")
    if not (out / "runs.jsonl").exists():
        for name in ("table.md", "table.json", "gains.svg", "curves.svg"):
            if (out / name).exists():
                raise ValueError(
                    f"--out {out}: found {name} without a runs.jsonl, so it is not of a grid, and "
                    "it would be written over; give another folder"
                )


def report_shipped(folder: Path, asked: list[str]) -> None:
    """All parts that came with the project in this folder: a table of some would replace it.

    Raises ValueError where a part that was asked for is not among them.
    """
    parts = DEFAULT_PARTS if folder.resolve() == RESULTS.resolve() else ["credit"]
    elsewhere = [part for part in asked if part not in parts]
    if elsewhere:
        raise ValueError(
            f"--report: {folder} has no runs of {', '.join(elsewhere)}; expected some of "
            f"{', '.join(parts)}, or --out with runs of yours"
        )
    runs = read_shipped(folder)
    print(tabulate(runs, folder, parts))
    print(
        f"\nThese are the {len(runs)} runs that came with the project. Earlier code made them: "
        "they say nothing of your changes."
    )


def report_folder(out: Path, parts: list[str]) -> None:
    """Tabulate the runs of a folder. Raises ValueError if none of them counts."""
    check_out(out)
    runs, others = read_runs(out)
    if not runs:
        raise ValueError(
            f"--out {out}: no run there was made with the present code and config "
            f"({others} with others)"
        )
    print(tabulate(runs, out, parts))
    if others:
        print(f"\n{others} runs there were made with other code or another config: left out")


def run_grid(parts: list[str], seeds: int, jobs: int, out: Path, dry: bool = False) -> None:
    """Say what there is to do, do it, and tabulate; dry: only say it."""
    check_out(out)
    if dry:
        print(describe_plan(plan_runs(parts, seeds, out), jobs, out))
        return
    with exclusive(out, "--out"):
        plan = plan_runs(parts, seeds, out)
        print(describe_plan(plan, jobs, out), flush=True)
        run_missing(plan.missing, jobs, out)
        runs, others = read_runs(out)
        if others > plan.others:
            raise RuntimeError(
                f"the code or the config changed after the grid began: {others - plan.others} more "
                f"runs in {out} do not count; the same command makes them again"
            )
        print(tabulate(runs, out, parts))


@command(RuntimeError, ValueError, OSError, advice="; the same command goes on")
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ablate", description="Run the grid of cells × seeds, and tabulate it."
    )
    parser.add_argument(
        "parts",
        nargs="*",
        help=f"of {', '.join(PARTS)}; by default {', '.join(DEFAULT_PARTS)}; a rule that you add "
        "to dyco.RULES is a part, too",
    )
    parser.add_argument("--seeds", type=positive, default=8)
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the runs and of their tables; default: {OUT}"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--dry-run", action="store_true", help="only say how many runs there are to make"
    )
    only.add_argument(
        "--report",
        action="store_true",
        help="run nothing, and tabulate the runs of --out; without it, those in results/",
    )
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        sys.exit(f"error: no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    parts = list(dict.fromkeys(options.parts)) or DEFAULT_PARTS
    shipped = shipped_folder(parts)
    if options.report and is_shipped(options.out or shipped):
        report_shipped(options.out or shipped, options.parts)
    elif options.report:
        report_folder(options.out, parts)
    else:
        out = options.out or OUT
        run_grid(parts, options.seeds, jobs=options.jobs, out=out, dry=options.dry_run)


if __name__ == "__main__":
    main()
