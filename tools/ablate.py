"""ablate.py: does it work? The paper's Table 1 in miniature on the embedded default, with the controls that the paper lacks.

    python ablate.py                     # runs what is missing, seed after seed, then writes results/table.md, gains.svg and curves.svg
    python ablate.py table --seeds 4     # some cells, first seeds first
    python ablate.py --report            # only writes the tables of what is there

A *cell* is a set of config overrides; every cell is run with the same seeds, so differences are paired. A finished run is
one line of results/runs.jsonl, appended; what was computed is never computed again. Each run has one thread.

What was asked, before any result: the *primary* figure is paper − shuffled over all four hosts, mean over the held-out curve at
temperature 1: the same weights on the right and on the wrong tokens. Next are paper − uniform and paper − host. AdamW does not see
a common factor (KL and the clipping of a gradient's norm do), so `uniform` is nearly the host once more: its gain shows the noise. All
other figures are exploratory.

The arithmetic: 58 cells × 8 seeds × 104 s (mean of all 464, two at a time) / 2 = 6.7 hours.

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

from run_folder import FolderError, append_jsonl, exclusive, read_jsonl

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
HOSTS = ("grpo", "dapo", "gspo", "sapo")
POOLS = {
    "all": HOSTS,
    "without sapo": HOSTS[:3],
}  # the second after the results: most of the variance between seeds is SAPO's
# The default level with four optimizer steps per rollout, so that ratios leave 1, stopped while the hosts still rise. Chosen on these
# curves, of the hosts alone with seed 1000, before any run with DyCo in this regime. Percent right at temperature 1 every 8 steps:
#   grpo 31 42 56 60 76 87, dapo 31 46 60 73 75 88, gspo 31 35 49 57 67 78, sapo 31 27 32 44 57 81
# Greedy 52 -> 100, 92, 89, 95; responses of 40 tokens; 15 to 28 % of the groups are all right or all wrong.
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
OFF, RULE = (
    ["dyco.enabled=false"],
    lambda name, ratio="relative": [f"dyco.rule={name}", f"dyco.ratio={ratio}"],
)


def cells_of(
    algorithm: str, rules: dict[str, list[str]], prefix: str = "", extra: list[str] = ()
) -> dict[str, list[str]]:
    return {
        f"{prefix}{algorithm}/{name}": [f"algo.name={algorithm}", *rule, *extra]
        for name, rule in rules.items()
    }


TABLE = {
    "host": OFF,
    "paper": RULE("paper"),
    "paper minmax": RULE("paper", "minmax"),
    "signed minmax": RULE("signed", "minmax"),
}
CONTROLS = {
    "uniform": RULE("uniform"),
    "shuffled": RULE("shuffled"),
    "signed uniform": RULE("signed_uniform", "minmax"),
    "signed shuffled": RULE("signed_shuffled", "minmax"),
    "response": RULE("response"),
}
SMALL = {
    "host": OFF,
    "paper": RULE("paper"),
    "uniform": RULE("uniform"),
    "shuffled": RULE("shuffled"),
}
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
PARTS = {  # of each seed, in the order in which they are run
    "table": {k: v for host in HOSTS for k, v in cells_of(host, TABLE).items()},
    "controls": {k: v for host in HOSTS for k, v in cells_of(host, CONTROLS).items()},
    "rate": {
        k: v
        for factor, lr in (("half", 5e-5), ("twice", 2e-4))
        for k, v in cells_of("grpo", SMALL, f"{factor} rate: ", [f"optim.lr={lr}"]).items()
    },
    "ablations": cells_of("grpo", VARIANTS),
    "level2": cells_of("grpo", SMALL, "level 2: ", ["toy.level=2", "rollout.max_new_tokens=96"]),
}
# rule: what it is set against besides the host
AGAINST = {
    "paper": ("uniform", "shuffled", "response"),
    "paper minmax": ("uniform", "paper"),
    "signed minmax": ("signed uniform", "signed shuffled"),
}
MEASURES = {
    "final": "at the end, temperature 1",
    "greedy": "at the end, greedy",
    "area": "mean over the curve",
    "online": "mean in training",
}
KEPT = {
    "online": "reward/accuracy",
    "entropy": "policy/entropy",
    "clip_fraction": "policy/clip_fraction",
    "grad_norm": "policy/grad_norm",
    "length": "response/length",
    "alignment": "dyco/alignment",
}
COLORS = {
    "grpo": "#0072b2",
    "dapo": "#d55e00",
    "gspo": "#009e73",
    "sapo": "#aa4499",
    "all": "#111111",
}
CURVES = {"host": "#888888", "paper": "#0072b2", "shuffled": "#d55e00", "signed minmax": "#009e73"}


# ------------------------------------------------------------------------------------------------------------ running


def read_runs() -> dict[tuple[str, int], dict]:
    """{(cell, seed): line}. Raises ValueError for a line that was made with other overrides than its cell has now; what config.yaml says
    besides, and the code, are not compared."""
    path = RESULTS / "runs.jsonl"
    settings = {
        cell: [*REGIME, *overrides] for part in PARTS.values() for cell, overrides in part.items()
    }
    found = {}
    for line, row in read_jsonl(path, growing=True) if path.exists() else []:
        if row["settings"] != settings.get(row["cell"]):
            raise ValueError(
                f"{path}, line {line}: {row['cell']}, seed {row['seed']}, was run with {' '.join(row['settings'])}, which is not what "
                "that cell is now; move the file away, or take the line out"
            )
        found[row["cell"], row["seed"]] = row
    return found


def run_one(cell: str, overrides: list[str], seed: int, scratch: Path) -> dict:
    """Train once, in a process of its own with one thread; returns the run's line."""
    folder = scratch / f"{cell}-{seed}".replace("/", "-").replace(" ", "_").replace(":", "")
    shutil.rmtree(folder, ignore_errors=True)  # a run that was cut off begins anew
    started = time.perf_counter()
    command = [
        sys.executable,
        "train.py",
        "config.yaml",
        *REGIME,
        *overrides,
        f"train.seed={seed}",
        f"run.dir={folder}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if (
        done.returncode or not (folder / "final").exists()
    ):  # a run that was asked to stop has none, and exits with 0
        raise RuntimeError(
            f"{cell}, seed {seed}, did not end: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}"
        )
    rows = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    evaluations = [row for row in rows if "eval/accuracy" in row]
    found = {
        "cell": cell,
        "seed": seed,
        "settings": [*REGIME, *overrides],
        "steps": [row["step"] for row in evaluations],
        "accuracy": [row["eval/accuracy"] for row in evaluations],
        "greedy": [row["eval/accuracy_greedy"] for row in evaluations],
    }
    for name, key in KEPT.items():  # of every step
        if values := [round(row[key], 5) for row in rows[1:] if key in row]:
            found[name] = values
    shutil.rmtree(folder)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def run_missing(parts: list[str], seeds: int, jobs: int, scratch: Path) -> None:
    """Seed after seed, so that tables of few seeds are complete early. Raises RuntimeError, at the end, if any run failed."""
    have, lock = read_runs(), Lock()
    wanted = [
        (cell, overrides, seed)
        for seed in range(seeds)
        for part in parts
        for cell, overrides in PARTS[part].items()
        if (cell, seed) not in have
    ]
    failed = []
    with (
        exclusive(scratch, "--scratch"),
        tqdm(total=len(wanted), desc="runs") as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):

        def work(item) -> None:
            try:
                row = run_one(*item, scratch)
            except RuntimeError as error:  # the others go on
                failed.append(str(error))
                tqdm.write(f"error: {error}")
                return
            with lock:
                append_jsonl(RESULTS / "runs.jsonl", [row])
                bar.update()
                tqdm.write(
                    f"{row['cell']}, seed {row['seed']}: {100 * row['accuracy'][-1]:.0f} % in {row['seconds']:.0f} s"
                )

        for _ in pool.map(work, wanted):
            pass
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(wanted)} runs did not end, the first: {failed[0]}"
        )


# ---------------------------------------------------------------------------------------------------------- statistics


def measure(row: dict, name: str) -> float:
    """In percent: accuracy at the end, greedy at the end, mean height of the curve (trapezoids), or accuracy of all responses sampled in
    training, each before the update that learns from it and on a prompt not seen before."""
    if name == "greedy":
        return 100 * row["greedy"][-1]
    if name == "online":
        return 100 * statistics.fmean(row["online"])
    if name == "final":
        return 100 * row["accuracy"][-1]
    curve, steps = row["accuracy"], row["steps"]
    area = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(steps, steps[1:], curve, curve[1:]))
    return 100 * area / (steps[-1] - steps[0])


def expanded_percentile(n: int) -> float:
    """The lower quantile of bootstrap means of n values that a 95 % interval begins at; the upper one is 1 minus that.

    2.5 % makes intervals of few values too short (8 normals: 89 %). This makes the interval of normal values Student's:
    Φ(−t √(n/(n−1))), "expanded percentile" in Hesterberg, What Teachers Should Know About the Bootstrap, 2015.
    """
    normal, v = statistics.NormalDist(), n - 1
    z = normal.inv_cdf(0.975)
    t = (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
    return normal.cdf(-t * (n / v) ** 0.5)


def bootstrap(values: list[float], draws: int = 10000) -> tuple[float, float | None, float | None]:
    """(mean, low, high): the 95 % bootstrap interval of a mean, resampling the values; seeded; none for fewer than four."""
    x, n = torch.tensor(values, dtype=torch.float64), len(values)
    if n < 4:
        return float(x.mean()), None, None
    low = expanded_percentile(n)
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    return float(x.mean()), *torch.quantile(
        x[picks].mean(1), torch.tensor([low, 1 - low], dtype=torch.float64)
    ).tolist()


def shared_seeds(runs: dict, cells: list[str]) -> list[int]:
    return sorted(
        set.intersection(*({seed for other, seed in runs if other == cell} for cell in cells))
    )


def differences(runs: dict, cells: list[str], baselines: list[str], name: str) -> list[float]:
    """Of cells and the baselines at their places, for each seed that all of them have, the mean over the cells."""
    return [
        statistics.fmean(
            measure(runs[cell, seed], name) - measure(runs[baseline, seed], name)
            for cell, baseline in zip(cells, baselines)
        )
        for seed in shared_seeds(runs, [*cells, *baselines])
    ]


def tabulate() -> str:
    """results/table.md, table.json, gains.svg and curves.svg of what has been run; returns the Markdown."""
    runs, found = read_runs(), {}
    ran = {cell for cell, _ in runs}

    def text(gain: tuple | None) -> str:
        return (
            "–"
            if gain is None
            else ("{:+.1f}" if gain[1] is None else "{:+.1f} ({:+.1f} … {:+.1f})")
            .format(*gain)
            .replace("-", "−")
        )

    def row(label: str, cells: list[str], baselines: list[str], means: bool) -> str:
        seeds = shared_seeds(runs, [*cells, *baselines]) or shared_seeds(runs, cells)
        entry = found[label] = {"seeds": len(seeds)}
        fields = []
        for name in MEASURES:
            gains = [] if cells == baselines else differences(runs, cells, baselines, name)
            entry[name] = {
                "mean": statistics.fmean(
                    measure(runs[cell, seed], name) for cell in cells for seed in seeds
                ),
                "gain": bootstrap(gains) if gains else None,
            }
            fields += ([f"{entry[name]['mean']:.1f}"] if means else []) + [
                text(entry[name]["gain"])
            ]
        bold = "**" if len(cells) > 1 else ""
        return f"| {bold}{label}{bold} | {len(seeds)} | " + " | ".join(fields) + " |"

    lines = [
        "# What DyCo-RL adds on the embedded default",
        "",
        "Accuracy in percent, means over seeds, and gains over the host, paired by seed, with 95 % bootstrap intervals (expanded "
        "percentile, as long as Student's; not corrected for their number). First three: on held-out samples; last: of the responses "
        "sampled in training. Bold: mean over the hosts of each seed, all four or those without SAPO.",
    ]
    for part, cells in PARTS.items():
        cells = [cell for cell in cells if cell in ran]
        if cells:
            lines += [
                "",
                f"## {part}",
                "",
                "| cell | seeds | "
                + " | ".join(f"{label} | gain" for label in MEASURES.values())
                + " |",
                "|---|---|" + "---|---|" * len(MEASURES),
            ]
        lines += [row(cell, [cell], [host_of(cell)], True) for cell in cells]
        for rule in dict.fromkeys(cell.split("/")[1] for cell in cells):
            for pool, hosts in POOLS.items():
                same = [f"{host}/{rule}" for host in hosts if f"{host}/{rule}" in cells]
                if (
                    len(same) == len(hosts)
                    and rule != "host"
                    and shared_seeds(runs, [*same, *map(host_of, same)])
                ):
                    lines.append(row(f"{pool}/{rule}", same, list(map(host_of, same)), True))
    lines += [
        "",
        "## against each other",
        "",
        "Differences, paired by seed.",
        "",
        "| | seeds | " + " | ".join(MEASURES.values()) + " |",
        "|---|---|" + "---|" * len(MEASURES),
    ]
    prefixes = dict.fromkeys(
        cell.split("/")[0] for cells in PARTS.values() for cell in cells if cell in ran
    )
    for rule, others in AGAINST.items():
        for other in others:
            pairs = [
                pair
                for prefix in prefixes
                if shared_seeds(runs, pair := [f"{prefix}/{rule}", f"{prefix}/{other}"])
            ]
            lines += [
                row(f"{cell} − {other}", [cell], [baseline], False) for cell, baseline in pairs
            ]
            for pool, hosts in POOLS.items():
                pooled = [pair for pair in pairs if pair[0].split("/")[0] in hosts]
                if len(pooled) == len(hosts) and shared_seeds(
                    runs, [cell for pair in pooled for cell in pair]
                ):
                    lines.append(row(f"{pool}/{rule} − {other}", *map(list, zip(*pooled)), False))
    lines += [
        row(f"grpo/{variant} − paper", [f"grpo/{variant}"], ["grpo/paper"], False)
        for variant in VARIANTS
        if f"grpo/{variant}" in ran
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "table.md").write_text("\n".join([*lines, ""]))
    (RESULTS / "table.json").write_text(json.dumps(found, indent=1))
    (RESULTS / "gains.svg").write_text(gains_figure(found))
    (RESULTS / "curves.svg").write_text(curves_figure(runs))
    return "\n".join(lines)


def host_of(cell: str) -> str:
    return cell.split("/")[0] + "/host"


# ------------------------------------------------------------------------------------------------------------- figures


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" '
            f'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="14" y="20" font-weight="bold" font-size="14">{html.escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def gains_figure(found: dict) -> str:
    """What the rules gain over the host and over their controls in the mean height of the curve: for each host and, bold, for all."""
    pairs = [
        (rule, other)
        for rule in (*TABLE, *CONTROLS)
        for other in ("host", *AGAINST.get(rule, ()))
        if rule != "host"
    ]
    groups = []
    for rule, other in pairs:
        labels = {
            host: f"{host}/{rule}" + (f" − {other}" if other != "host" else "") for host in COLORS
        }
        gains = {
            host: found[label]["area"]["gain"] for host, label in labels.items() if label in found
        }
        groups.append(
            (
                f"{rule} − {other}",
                {host: gain for host, gain in gains.items() if gain and gain[1] is not None},
            )
        )
    bound = max([2.0, *(abs(x) for _, gains in groups for gain in gains.values() for x in gain)])
    x = lambda value: 436 + value / bound * 190
    parts, y = [], 34
    for title, gains in groups:
        if gains:
            y += 8
            parts.append(f'<text x="14" y="{y + 7 * len(gains) + 4}">{html.escape(title)}</text>')
        for host, (mean, low, high) in gains.items():
            y, wide = y + 14, 3 if host == "all" else 1.5
            parts.append(
                f'<g stroke="{COLORS[host]}" fill="{COLORS[host]}"><title>{html.escape(f"{host}: {title}")} {mean:+.2f} ({low:+.2f} … {high:+.2f})</title>'
                f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" stroke-width="{wide}"/>'
                f'<circle cx="{x(mean):.1f}" cy="{y}" r="{1.3 * wide:.1f}"/></g>'
                f'<text x="234" y="{y + 4}" text-anchor="end" font-size="11" fill="{COLORS[host]}">{host}</text>'
            )
    axis = [
        f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="38" y2="{y + 14}" stroke="{"#888" if v == 0 else "#e4e4e4"}"/>'
        f'<text x="{x(v):.1f}" y="{y + 30}" text-anchor="middle" fill="#555">{f"{v:+g}".replace("-", "−") if v else 0}</text>'
        for v in ticks(bound)
    ]
    return svg(
        640,
        y + 40,
        "Gain, mean over the held-out curve, percentage points (95 % intervals)",
        axis + parts,
    )


def curves_figure(runs: dict) -> str:
    """Accuracy at temperature 1 over steps, means over seeds: one panel per host, one curve per rule of CURVES."""
    parts = []
    for place, host in enumerate(HOSTS):
        left, top, wide, high = 44 + 320 * (place % 2), 52 + 226 * (place // 2), 250, 160
        parts.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{host}</text>')
        for share in (0, 25, 50, 75, 100):
            y = top + high * (1 - share / 100)
            parts.append(
                f'<line x1="{left}" x2="{left + wide}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>'
                f'<text x="{left - 6}" y="{y + 4}" text-anchor="end" fill="#555">{share}</text>'
            )
        curves = {
            rule: color
            for rule, color in CURVES.items()
            if any(cell == f"{host}/{rule}" for cell, _ in runs)
        }
        seeds = shared_seeds(runs, [f"{host}/{rule}" for rule in curves]) if curves else []
        if not seeds:
            continue
        steps = runs[f"{host}/{next(iter(curves))}", seeds[0]]["steps"]
        x = lambda step: f"{left + wide * step / steps[-1]:.1f}"
        for rule, color in curves.items():
            heights = [
                statistics.fmean(column)
                for column in zip(*(runs[f"{host}/{rule}", seed]["accuracy"] for seed in seeds))
            ]
            path = " ".join(
                f"{x(step)},{top + high * (1 - height):.1f}" for step, height in zip(steps, heights)
            )
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
            )
        parts += [
            f'<text x="{x(step)}" y="{top + high + 16}" text-anchor="middle" fill="#555">{step}</text>'
            for step in steps
        ]
        names = " · ".join(
            f'<tspan fill="{color}">{rule}</tspan>' for rule, color in curves.items()
        )
        parts.append(f'<text x="{left + 50}" y="{top - 8}">{names}</text>')
    return svg(
        640, 490, "Accuracy at temperature 1 on held-out samples, percent, over steps", parts
    )


def ticks(bound: float) -> list[float]:
    """Round values from −bound to bound."""
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50) if bound / step < 6)
    return [i * step for i in range(-int(bound / step), int(bound / step) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the grid of cells × seeds, and tabulate it.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/ablate"), help="where unfinished runs are"
    )
    parser.add_argument("--report", action="store_true", help="write the tables and run nothing")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        sys.exit(f"error: no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    RESULTS.mkdir(exist_ok=True)
    try:
        if not arguments.report:
            run_missing(
                arguments.parts or list(PARTS),
                arguments.seeds,
                arguments.jobs,
                arguments.scratch.resolve(),
            )
        print(tabulate())
    except (RuntimeError, ValueError, FolderError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
