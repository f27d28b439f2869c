"""ablate.py: does it work? The paper's Table 1 in miniature on the embedded default, with the controls that the paper lacks.

    python ablate.py                     # runs what is missing, in part after part, then writes results/table.md and figure.svg
    python ablate.py table --seeds 4     # some cells, first seeds first
    python ablate.py --report            # only writes the tables of what is there

A *cell* is a set of config overrides; every cell is run with the same seeds, so differences are paired. A finished run is
one line of results/runs.jsonl, appended; what was computed is never computed again. Each run has one thread.

The regime was chosen on the hosts' curves alone, before any run with DyCo (seed 1000; the table's seeds are 0, 1, …): see REGIME.
"""
import argparse
import html
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from tqdm import tqdm

from report import append_jsonl, read_jsonl

RESULTS = Path(__file__).with_name("results")
HOSTS = ("grpo", "dapo", "gspo", "sapo")
# The default level with four optimizer steps per rollout, so that ratios leave 1, stopped while the hosts still rise. Chosen on these
# curves, of the hosts alone with seed 1000, before any run with DyCo in this regime. Percent right at temperature 1 every 8 steps:
#   grpo 31 42 56 60 76 87, dapo 31 46 60 73 75 88, gspo 31 35 49 57 67 78, sapo 31 27 32 44 57 81
# Greedy 52 -> 100, 92, 89, 95; responses of 40 tokens; 15 to 28 % of the groups are all right or all wrong.
REGIME = ["train.steps=40", "train.updates_per_rollout=4", "eval.every=8", "eval.samples=300", "toy.eval_size=300", "eval.swapped=false",
          "checkpoint.every=20", "checkpoint.keep_last=1", "log.samples_per_step=0"]
OFF, RULE = ["dyco.enabled=false"], lambda name, ratio="relative": [f"dyco.rule={name}", f"dyco.ratio={ratio}"]


def cells_of(algorithm: str, rules: dict[str, list[str]], prefix: str = "", extra: list[str] = ()) -> dict[str, list[str]]:
    return {f"{prefix}{algorithm}/{name}": [f"algo.name={algorithm}", *rule, *extra] for name, rule in rules.items()}


TABLE = {"host": OFF, "paper": RULE("paper"), "paper minmax": RULE("paper", "minmax"), "signed minmax": RULE("signed", "minmax")}
CONTROLS = {"uniform": RULE("uniform"), "shuffled": RULE("shuffled"), "signed uniform": RULE("signed_uniform", "minmax"),
            "signed shuffled": RULE("signed_shuffled", "minmax"), "response": RULE("response")}
SMALL = {"host": OFF, "paper": RULE("paper"), "uniform": RULE("uniform"), "shuffled": RULE("shuffled")}
VARIANTS = {"tau 0": ["dyco.tau=0"], "tau 0.2": ["dyco.tau=0.2"], "alpha 0.05": ["dyco.alpha=0.05"], "alpha 0.8": ["dyco.alpha=0.8"],
            "hellinger": ["dyco.shift=hellinger"], "js": ["dyco.shift=js"], "l1": ["dyco.shift=l1"], "text scope all": ["dyco.text_scope=all"],
            "first layer": ["dyco.layers=[0]"], "all layers": ["dyco.layers=[0,1,2,3]"]}
PARTS = {  # in the order in which they are run
    "table": {k: v for host in HOSTS for k, v in cells_of(host, TABLE).items()},
    "controls": {k: v for host in HOSTS for k, v in cells_of(host, CONTROLS).items()},
    "rate": {k: v for factor, lr in (("half", 5e-5), ("twice", 2e-4)) for k, v in cells_of("grpo", SMALL, f"{factor} rate: ", [f"optim.lr={lr}"]).items()},
    "ablations": cells_of("grpo", VARIANTS),
    "level2": cells_of("grpo", SMALL, "level 2: ", ["toy.level=2", "rollout.max_new_tokens=96"]),
}
MEASURES = {"final": "at the end, temperature 1", "greedy": "at the end, greedy", "area": "mean over the curve"}


# ------------------------------------------------------------------------------------------------------------ running


def read_runs() -> dict[tuple[str, int], dict]:
    path = RESULTS / "runs.jsonl"
    rows = read_jsonl(path, growing=True) if path.exists() else []
    return {(row["cell"], row["seed"]): row for _, row in rows}


def run_one(cell: str, overrides: list[str], seed: int, scratch: Path) -> dict:
    """Train once, in a process of its own with one thread; returns the run's line."""
    folder = scratch / f"{cell}-{seed}".replace("/", "-").replace(" ", "_").replace(":", "")
    started = time.perf_counter()
    command = [sys.executable, "train.py", "config.yaml", *REGIME, *overrides, f"train.seed={seed}", f"run.dir={folder}"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{cell}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/accuracy" in row]
    mean = lambda key: statistics.fmean(row[key] for row in rows[1:] if key in row) if any(key in row for row in rows) else None
    shutil.rmtree(folder)
    return {"cell": cell, "seed": seed, "overrides": overrides, "steps": [row["step"] for row in evaluations],
            "accuracy": [row["eval/accuracy"] for row in evaluations], "greedy": [row["eval/accuracy_greedy"] for row in evaluations],
            "entropy": mean("policy/entropy"), "clip_fraction": mean("policy/clip_fraction"), "alignment": mean("dyco/alignment"),
            "length": mean("response/length"), "seconds": round(time.perf_counter() - started, 1)}


def run_missing(parts: list[str], seeds: int, jobs: int, scratch: Path) -> None:
    """Seed after seed, so that a table of few seeds is complete early."""
    have, lock = read_runs(), Lock()
    wanted = [(cell, overrides, seed) for part in parts for seed in range(seeds) for cell, overrides in PARTS[part].items()
              if (cell, seed) not in have]
    with tqdm(total=len(wanted), desc="runs") as bar, ThreadPoolExecutor(jobs) as pool:
        def work(item) -> None:
            row = run_one(*item, scratch)
            with lock:
                append_jsonl(RESULTS / "runs.jsonl", [row])
                bar.update()
                tqdm.write(f"{row['cell']}, seed {row['seed']}: {100 * row['accuracy'][-1]:.0f} % in {row['seconds']:.0f} s")
        for _ in pool.map(work, wanted):
            pass


# ---------------------------------------------------------------------------------------------------------- statistics


def measure(row: dict, name: str) -> float:
    """In percent: accuracy at the end, greedy at the end, or the mean height of the curve (trapezoids)."""
    if name == "greedy":
        return 100 * row["greedy"][-1]
    if name == "final":
        return 100 * row["accuracy"][-1]
    curve, steps = row["accuracy"], row["steps"]
    area = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(steps, steps[1:], curve, curve[1:]))
    return 100 * area / (steps[-1] - steps[0])


def bootstrap(values: list[float], draws: int = 10000) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval, resampling the values; seeded."""
    x = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(x[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(x.mean()), low, high


def differences(runs: dict, cell: str, baseline: str, name: str) -> list[float]:
    """Paired by seed."""
    seeds = sorted(seed for other, seed in runs if other == cell and (baseline, seed) in runs)
    return [measure(runs[cell, seed], name) - measure(runs[baseline, seed], name) for seed in seeds]


def tabulate() -> str:
    """results/table.md and table.json of what has been run; returns the Markdown."""
    runs = read_runs()
    lines, found = ["# What DyCo-RL adds on the embedded default", "",
                    "Accuracy on held-out samples in percent, means over seeds; gain over the host, paired by seed, with the 95 % bootstrap interval.", ""], {}
    for part, cells in PARTS.items():
        present = [cell for cell in cells if any(other == cell for other, _ in runs)]
        if not present:
            continue
        lines += [f"## {part}", "", "| cell | seeds | " + " | ".join(f"{label} | gain" for label in MEASURES.values()) + " |",
                  "|---|---|" + "---|---|" * len(MEASURES)]
        pooled: dict[str, dict[str, list[list[float]]]] = {}
        for cell in present:
            prefix, rule = cell.rsplit("/", 1)
            baseline = f"{prefix}/host"
            fields = []
            for name in MEASURES:
                mean, low, high = bootstrap([measure(row, name) for (other, _), row in runs.items() if other == cell])
                gains = [] if rule == "host" else differences(runs, cell, baseline, name)
                entry = found.setdefault(cell, {})[name] = {"mean": mean, "low": low, "high": high}  # gain: the same triple
                fields += [f"{mean:.1f}", "–"]
                if gains:
                    pooled.setdefault(rule, {}).setdefault(name, []).append(gains)
                    entry["gain"] = bootstrap(gains)
                    fields[-1] = "{:+.1f} ({:+.1f} … {:+.1f})".format(*entry["gain"])
            lines.append(f"| {cell} | {sum(other == cell for other, _ in runs)} | " + " | ".join(fields) + " |")
        if len({cell.rsplit("/", 1)[0] for cell in present}) == len(HOSTS):
            for rule, gains in pooled.items():
                entry = found[f"all/{rule}"] = {name: {"gain": bootstrap([x for host in gains[name] for x in host])} for name in MEASURES}
                lines.append(f"| **all/{rule}** | | " + " | ".join("| {:+.1f} ({:+.1f} … {:+.1f})".format(*entry[name]["gain"])
                                                              for name in MEASURES) + " |")
        lines.append("")
    text = "\n".join(lines)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "table.md").write_text(text)
    (RESULTS / "table.json").write_text(json.dumps(found, indent=1))
    (RESULTS / "figure.svg").write_text(figure({cell: entry["area"].get("gain") for cell, entry in found.items()}))
    return text


def figure(gains: dict[str, tuple[float, float, float] | None]) -> str:
    """The gains in the mean height of the curve, with their intervals, as an SVG of its own."""
    gains = {cell: gain for cell, gain in gains.items() if gain is not None}
    left, right, row = 190, 620, 20
    bound = max([1.0, *(abs(x) for gain in gains.values() for x in gain)]) * 1.05
    x = lambda value: (left + right) / 2 + value / bound * (right - left) / 2
    height = row * (len(gains) + 3)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="700" height="{height}" fill="white"/>',
           f'<text x="{left}" y="16" font-weight="bold">Gain over the host, mean over the curve, percentage points</text>',
           f'<line x1="{x(0)}" x2="{x(0)}" y1="{row}" y2="{height - row}" stroke="#999"/>']
    for place, (cell, (mean, low, high)) in enumerate(gains.items()):
        y, pooled = row * (place + 2), cell.startswith("all/")
        color = "#999" if low <= 0 <= high else "#0a6b4f" if mean > 0 else "#b3261e"
        out.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end" font-weight="{"bold" if pooled else "normal"}">{html.escape(cell)}</text>'
                   f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>'
                   f'<circle cx="{x(mean):.1f}" cy="{y}" r="4" fill="{color}"/>'
                   f'<text x="{right + 10}" y="{y + 4}">{mean:+.1f}</text>')
    ticks = [round(bound / 1.05 * part, 1) for part in (-1, -0.5, 0, 0.5, 1)]
    out += [f'<text x="{x(tick):.1f}" y="{height - 4}" text-anchor="middle" fill="#555">{tick:+g}</text>' for tick in ticks]
    return "\n".join([*out, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the grid of cells × seeds, and tabulate it.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--scratch", type=Path, default=Path("runs/ablate"), help="where unfinished runs are")
    parser.add_argument("--report", action="store_true", help="write the tables and run nothing")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        sys.exit(f"error: no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    RESULTS.mkdir(exist_ok=True)
    if not arguments.report:
        run_missing(arguments.parts or list(PARTS), arguments.seeds, arguments.jobs, arguments.scratch.resolve())
    print(tabulate())


if __name__ == "__main__":
    main()
