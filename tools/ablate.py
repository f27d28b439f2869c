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
seeds are 0, 1, …): see ablation_cells.REGIME.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
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
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

from tqdm import tqdm

import dyco
from config import DEFAULTS, Config, load_config
from rows import append_jsonl, read_jsonl, show
from run_folder import exclusive
from tools.ablation_cells import CELLS, DEFAULT_PARTS, KEPT, PARTS, cells_of_parts
from tools.ablation_tables import Runs, tabulate
from tools.command import command

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"  # came with the project
CREDIT_RESULTS = RESULTS / "credit"  # so did these, of the part "credit"
OUT = Path("runs/ablation")
UNFINISHED = ".unfinished-runs"  # of OUT, where runs are until they end; emptied at each start


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
    settings = row.get("settings")
    if not isinstance(settings, list) or not all(isinstance(text, str) for text in settings):
        return '"settings" is not a list of overrides'
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
        check_run(folder, line, row)
        if in_present_spelling(row["settings"]) != sorted(CELLS.get(row["cell"], [])):
            raise ValueError(
                f"{folder / 'runs.jsonl'}, line {line}: {row['cell']}, seed {row['seed']}, was "
                f"run with {' '.join(row['settings'])}, which is not what that cell is now; "
                "move the file away, or take the line out"
            )
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
        shipped = shipped_folder(parts)
        for line, row in read_lines(shipped):
            # Only their time is asked for: it does not matter what their cells are today.
            check_run(shipped, line, row)
            seconds.append(row["seconds"])
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
