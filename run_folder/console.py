"""console.py: what a run says: what it is, how each step went, and what is not healthy."""

import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import dyco
from config import Config
from rows import excerpt, printable, read_jsonl


def say(text: str) -> None:
    """A line on standard output, above the progress bar. A terminal that has gone ends no run."""
    try:
        tqdm.write(printable(text), file=sys.stdout)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open until the end)


def python_command() -> str:
    """How to call this Python from the present folder, as a person would type it."""
    return _typed(Path(sys.executable), "python")


def _typed(executable: Path, name: str) -> str:
    """How to call a program from the present folder: by its name alone if that finds it."""
    if executable.is_relative_to(Path.cwd()):
        return shlex.quote(str(executable.relative_to(Path.cwd())))
    on_path = shutil.which(name)
    if on_path and Path(on_path) == executable:
        return name
    return shlex.quote(str(executable))


def launch_command() -> str:
    """The command that started this process or its launcher, as a person would type it again.

    Of several machines it leaves out how they find each other, which their launchers know.
    """
    arguments = shlex.join(sys.argv)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"{python_command()} {arguments}"
    torchrun = _typed(Path(sys.executable).with_name("torchrun"), "torchrun")
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    nodes = f"--nnodes {machines} " if machines > 1 else ""
    return f"{torchrun} {nodes}--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} {arguments}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


def describe_start(training, step: int) -> dict:
    """A row of starts.jsonl."""
    import transformers

    return {
        "step": step,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": launch_command(),
        "device": device_name(training.world.device),
        "dtype": str(training.policy.dtype).removeprefix("torch."),
        "processes": training.world.size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": describe_commit(),
    }


def describe_commit() -> str | None:
    """The commit of this code, with "+changes" where the tree was modified; None without git."""
    here = Path(__file__).parent.parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+changes", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def header(training) -> str:
    """What a train.Training is, in a few lines."""
    config, policy, world = training.config, training.policy, training.world
    held_out = training.held_out
    parameters = list(policy.parameters())
    size = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    part = "all trained" if trained == size else f"{trained / size:.0%} of them trained"
    if config.lora.rank:
        size -= trained
        part = f"frozen, LoRA of rank {config.lora.rank}: {trained:,} numbers trained"
    d = config.dyco
    rule = "DyCo off"
    if d.enabled:
        rule = f"DyCo rule {d.rule}: {dyco.RULES[d.rule].what}; ratio {d.ratio}, α {d.alpha:g}"
        if d.control != "none":
            rule += f"; control {d.control}"
    if held_out is None:
        held_out_rows = "none held out: there will be no held-out accuracy (see data.eval_path)"
    else:
        held_out_rows = f"{len(held_out):,} held out"
    dtype = str(policy.dtype).removeprefix("torch.")
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    lines = [
        f"method  {config.algo.name}, {rule}",
        f"model   {config.model.path}, {size / 1e6:,.1f} M weights, {part}; "
        f"{dtype} on {device_name(world.device)}, {processes}",
        f"data    {config.data.path}, {len(training.dataset):,} rows, {held_out_rows}",
        f"step    {config.rollout.prompts_per_step} prompts × {config.rollout.group_size} "
        f"responses, {config.train.updates_per_rollout} updates; {config.train.steps} steps",
        f"run     {config.run.dir}; open {Path(config.run.dir) / 'report.html'} any time; "
        "Ctrl-C saves and stops",
    ]
    return "\n".join(lines)


LEGEND = (
    "A line per step: mean reward; right, format: shares of its responses; len: their tokens;\n"
    "ent: entropy, nats; kl to the reference; clip: share of clipped tokens; grad: its norm;\n"
    "vis/txt: shares of visual and text tokens; align: their mean score (docs/metrics.md)."
)


def step_lines(row: dict, steps: int) -> list[str]:
    """A step for people, within the width of the terminal and 120 columns; an evaluation below
    it."""
    lines = []
    if "reward/mean" in row:
        width = min(shutil.get_terminal_size((120, 24)).columns, 120)
        lines.append(_fit(_step_fields(row, steps), width))
    if "policy/skipped_prompts" in row:
        ids = excerpt(", ".join(row["policy/skipped_prompts"]))
        lines.append(f"  update skipped, loss or gradient not finite, prompts {ids}")
    elif "policy/skipped_updates" in row:
        lines.append("  no update: in every group the answers were all right or all wrong")
    if "eval/accuracy" in row:
        line = f"held out at step {row['step']}: {row['eval/accuracy']:.1%} right sampled"
        line += f", {row['eval/accuracy_greedy']:.1%} greedy"
        if "eval/accuracy_swapped" in row:
            line += f", {row['eval/accuracy_swapped']:.1%} images swapped"
        lines.append(line)
    return lines


def _step_fields(row: dict, steps: int) -> list[tuple[int, str]]:
    """(importance, text) of what a step line shows, from left to right; 0 is the most important."""

    def field(importance: int, label: str, key: str, form: str) -> list[tuple[int, str]]:
        return [(importance, f"{label} {row[key]:{form}}")] if key in row else []

    fields = [(0, f"step {row['step']:>{len(str(steps))}}/{steps}")]
    fields += field(0, "reward", "reward/mean", ".3f")
    fields += field(0, "right", "reward/accuracy", ".0%")
    fields += field(1, "format", "reward/format", ".0%")
    fields += field(1, "custom", "reward/custom", ".3f")
    fields += field(1, "len", "response/length", ".0f")
    if row.get("response/truncated"):
        fields += field(2, "cut", "response/truncated", ".0%")
    fields += field(3, "ent", "policy/entropy", ".3f")
    fields += field(4, "kl", "policy/kl", ".4f")
    fields += field(7, "clip", "policy/clip_fraction", ".3f")
    fields += field(5, "grad", "policy/grad_norm", ".2f")
    if "dyco/visual_share" in row:
        roles = f"{100 * row['dyco/visual_share']:.0f}/{100 * row['dyco/text_share']:.0f}"
        fields.append((6, f"vis/txt {roles}%"))
    fields += field(6, "align", "dyco/alignment", ".2f")
    if "time/update" in row:
        stages = ("rollout", "logprobs", "update")
        fields.append((2, f"{sum(row[f'time/{stage}'] for stage in stages):.1f} s"))
    return fields


def _fit(fields: list[tuple[int, str]], width: int) -> str:
    """The fields in one line; the least important go until it is no longer than `width`."""
    fields = list(fields)
    while True:
        line = "  ".join(text for _, text in fields)
        least = max(importance for importance, _ in fields)
        if len(line) <= width or least == 0:
            return line
        fields.remove(next(f for f in reversed(fields) if f[0] == least))


class Watch:
    """Warns once where a figure has been out of its healthy range for 20 steps in a row."""

    STEPS = 20

    def __init__(self, config: Config):
        cut = f"rollout.max_new_tokens ({config.rollout.max_new_tokens}) is too small"
        # What is wrong -> (is it so in this row of metrics.jsonl?, likely causes)
        self.unhealthy: dict[str, tuple[Callable[[dict], bool], str]] = {
            "no group had rewards that differ": (
                lambda row: row.get("reward/constant_groups", 0) >= 1,
                "the questions are too hard or too easy for this model, the references match no "
                "answer, or rollout.temperature is too low",
            ),
            "every response was cut": (
                lambda row: row.get("response/truncated", 0) >= 0.999,
                f"{cut}, or the model never writes its end token",
            ),
            "the entropy was nearly 0": (
                lambda row: row.get("policy/entropy", 1) < 1e-3,
                "the policy has collapsed to one response: lower optim.lr, or raise algo.kl or "
                "rollout.temperature",
            ),
            "the entropy was that of noise": (
                lambda row: row.get("policy/entropy", 0) > 5,
                "the weights are damaged, or optim.lr or rollout.temperature is too high",
            ),
            "the policy was far from its reference (KL above 1)": (
                lambda row: row.get("policy/kl", 0) > 1,
                "optim.lr is too high, or algo.kl too low",
            ),
        }
        self.count = dict.fromkeys(self.unhealthy, 0)

    def warnings(self, row: dict) -> list[str]:
        """What to say after a step."""
        said = []
        for what, (is_so, causes) in self.unhealthy.items():
            self.count[what] = self.count[what] + 1 if is_so(row) else 0
            if self.count[what] == self.STEPS:
                said.append(f"warning: for {self.STEPS} steps {what}; likely causes: {causes}")
        return said


def held_out_curve(path: Path) -> str:
    """The evaluations of a run, a line for each figure."""
    rows = [row for _, row in read_jsonl(path) if "eval/accuracy" in row]
    label_of_steps = "held out, %, at step"
    width = max(4, len(str(rows[-1]["step"])))
    most = (80 - len(label_of_steps)) // (width + 2)  # evaluations in a line of 80 columns
    shown = rows
    if len(rows) > most:
        shown = [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)]
    steps = [f"{row['step']:>{width}}" for row in shown]
    lines = [label_of_steps + "  " + "  ".join(steps)]
    figures = {
        "temperature 1": "eval/accuracy",
        "greedy": "eval/accuracy_greedy",
        "images swapped": "eval/accuracy_swapped",
    }
    for label, key in figures.items():
        if any(key in row for row in shown):
            values = [f"{100 * row.get(key, math.nan):{width}.0f}" for row in shown]
            lines.append(f"{label:>{len(label_of_steps)}}  " + "  ".join(values))
    return "\n".join(lines)
