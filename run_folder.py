"""run_folder.py: what a run leaves on the disk and says on the terminal.

A run's folder (run.dir) holds

    config.yaml            the resolved settings starts.jsonl           a row for each time the run
    was started or resumed: date, device, versions metrics.jsonl          a row for each step, and
    one for step 0 samples.jsonl          some responses of each step, with the role and score of
    their tokens examples/              the held-out responses that the report shows report.html
    curves and token view checkpoints/step-N/    tensors.pt (weights, optimizer) and facts.json
    (step, sampler, config) final/                 a Hugging Face directory

Files and folders are whole or absent, also after a kill or a loss of power. Rows of steps that are
computed again after a resume move to NAME.superseded.jsonl.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
import dyco
from config import Config, ConfigError, load_config
from distributed import World
from model import Policy, save_policy
from rows import append_jsonl, read_jsonl

# Config keys that decide what a run *is*: a checkpoint of another value cannot be continued.
FIXED_ON_RESUME = (
    "model.path",
    "model.freeze_vision",
    "data.path",
    "data.image_root",
    "data.prompt_template",
    "toy",
    "train.seed",
    "algo",
    "dyco",
    "reward.accuracy_weight",
    "reward.format_weight",
    "reward.custom",
    "reward.custom_weight",
)


class RunError(RuntimeError):
    """A run that cannot start or go on."""


class FolderError(OSError):
    """A folder that cannot be written to, or that another process writes to."""


# ------------------------------------------------------------------- files that are whole or absent


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(target: Path, content: bytes) -> None:
    """Replace a file in one step."""
    beside = target.with_name(f"{target.name}.partial-file")
    beside.write_bytes(content)
    sync(beside)
    os.replace(beside, target)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` in one step.

    fill(path) writes a folder beside it, which is flushed to the disk and then renamed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
    beside.chmod(0o755)
    fill(beside)
    for path in sorted(beside.rglob("*")):
        sync(path)
    sync(beside)
    if target.exists():
        remove_folder(target)
    os.rename(beside, target)
    sync(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder such that, cut short, it is no longer taken for a whole one."""
    doomed = path.with_name(f"{path.name}.partial-removed")
    os.rename(path, doomed)
    _remove(doomed)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # On a network file system some process may have a file of it open: no reason to end a run.
        message = f"{folder} cannot be removed now ({error}); the next start tries again"
        warnings.warn(message, stacklevel=3)


def remove_partial(folder: Path) -> None:
    """Remove what writes that were cut short left behind."""
    for path in folder.glob("*.partial-*"):
        if path.is_dir():
            _remove(path)
        else:
            path.unlink()


@contextlib.contextmanager
def exclusive(folder: Path, option: str):
    """Have a folder to oneself, until the block or the process ends.

    Raises FolderError, which names the option that sets the folder.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / ".lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(
                f"{folder}: another process is writing there; set {option} to a new folder"
            ) from None
        except OSError as error:
            raise FolderError(
                f"{option}: expected a folder that can be written to and locked, "
                f"found {str(folder)!r} ({error})"
            ) from error
        yield


# --------------------------------------------------------------------------------------------- rows


def append_finite(path: Path, rows: Iterable[dict]) -> None:
    """`append_jsonl`, without figures that are not finite."""

    def is_finite(value) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    append_jsonl(
        path, [{key: value for key, value in row.items() if is_finite(value)} for row in rows]
    )


def supersede(path: Path, step: int) -> None:
    """Before the steps after `step` are computed again: move their rows to NAME.superseded.jsonl.

    Half a line at the end goes. Raises RunError for a line that is no row of a step.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, superseded = [], []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            is_later = json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError):
            raise RunError(
                f"{path}, line {number}: expected an object with a step, found {line[:60]!r}; "
                "take the line out"
            ) from None
        if is_later:
            superseded.append(line)
        else:
            kept.append(line)
    if superseded:
        with open(path.with_suffix(".superseded.jsonl"), "ab") as file:
            file.writelines(superseded)
    if len(kept) < len(lines):
        write_file(path, b"".join(kept))


def save_examples(folder: str | Path, step: int, examples: list[dict]) -> None:
    """Write the held-out responses of an evaluation, for the report."""
    path = Path(folder) / "examples" / f"step-{step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({"step": step, "examples": examples}).encode())


def drop_examples(folder: str | Path, step: int) -> None:
    """Remove the examples of evaluations after `step`, which will be made again."""
    for path in (Path(folder) / "examples").glob("step-*.json"):
        number = re.fullmatch(r"step-(\d{8})\.json", path.name)
        if number and int(number[1]) > step:
            path.unlink()


# -------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, step: int, tensors: dict, facts: dict, keep_last: int) -> None:
    """Write folder/step-N with tensors.pt and facts.json; remove all but the newest `keep_last`."""

    def fill(path: Path) -> None:
        torch.save(tensors, path / "tensors.pt")
        (path / "facts.json").write_text(json.dumps(facts))

    write_folder(folder / f"step-{step:08d}", fill)
    for old in checkpoints(folder)[:-keep_last]:
        remove_folder(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first.

    What else is there, such as a copy of one under another name, is nobody's business.
    """
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(path for path in found if path.is_dir())


def read_facts(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "facts.json").read_text())


def read_tensors(checkpoint: Path) -> dict:
    """The tensors of a checkpoint, on the CPU. Nothing in it is executed."""
    return torch.load(checkpoint / "tensors.pt", map_location="cpu", weights_only=True, mmap=True)


@torch.no_grad()
def load_tensors(policy: Policy, optimizer, tensors: dict) -> None:
    """Continue from the whole tensors of a checkpoint, whatever number of processes wrote them."""
    parameters = dict(policy.hf.named_parameters())
    for name, parameter in parameters.items():
        parameter.copy_(distributed.share(tensors["policy"][name], parameter))
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    states = tensors["optimizer"]["state"]
    for index, state in states.items():
        states[index] = {
            name: distributed.share(value, trained[index]) if value.dim() else value
            for name, value in state.items()
        }
    optimizer.load_state_dict(tensors["optimizer"])


# ----------------------------------------------------------------------------------- a run's folder


class RunFolder:
    """The folder of one run: begun anew, or resumed from its newest checkpoint."""

    def __init__(self, config: Config, world: World):
        """Find the newest checkpoint. Raises RunError, and ConfigError where it is another
        run's."""
        self.config = config
        self.world = world
        self.path = Path(config.run.dir)
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.final = self.path / "final"
        if world.is_main:
            remove_partial(self.path)
            remove_partial(self.path / "checkpoints")
        world.barrier()
        saved = checkpoints(self.path / "checkpoints")
        self.checkpoint = saved[-1] if saved else None
        names = {path and path.name for path in world.gather(self.checkpoint)}
        if len(names) > 1:
            listed = ", ".join(sorted(name or "none" for name in names))
            raise RunError(
                f"{self.path}: processes find different checkpoints there ({listed}); expected a "
                "folder that all nodes share"
            )
        self.facts = read_facts(self.checkpoint) if self.checkpoint else {"step": 0}
        if self.checkpoint:
            self._refuse_changes(self.facts["config"])
        elif self.metrics.exists():  # a run that ended before its first checkpoint begins again
            self._refuse_changes(asdict(load_config(self.path / "config.yaml")))

    @property
    def step(self) -> int:
        """The step that the newest checkpoint was saved at, else 0."""
        return self.facts["step"]

    @property
    def is_finished(self) -> bool:
        return self.step >= self.config.train.steps and self.final.exists()

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self.world.is_main:
            tqdm.write(text, file=sys.stdout)

    def _refuse_changes(self, old: dict) -> None:
        """Compare the earlier config of this run with the present one.

        Says what changed, and raises ConfigError for what cannot be changed.
        """

        def flat(tree: dict) -> dict:
            return {
                f"{section}.{key}": value
                for section, keys in tree.items()
                for key, value in keys.items()
            }

        before, after = flat(old), flat(asdict(self.config))
        for key, value in after.items():
            if key not in before:  # an option that the code has got since then
                self.say(f"new since the checkpoint: {key} {value!r}")
        changed = [key for key in after if key in before and before[key] != after[key]]
        changed = [key for key in changed if key != "run.dir"]
        fixed = []
        for key in changed:
            section = key.split(".")[0]
            if key in FIXED_ON_RESUME or section in FIXED_ON_RESUME:
                fixed.append(f"{key} ({before[key]!r}, now {after[key]!r})")
        if fixed:
            raise ConfigError(
                f"{self.path} holds a run with another {', '.join(fixed)}; "
                "set run.dir to a new folder"
            )
        for key in changed:
            self.say(f"changed since the checkpoint: {key} {before[key]!r} -> {after[key]!r}")

    def restore(self, training) -> None:
        """Go on from the newest checkpoint, if there is one.

        training: a train.Training. Raises ConfigError where what its config names has changed.
        """
        if self.checkpoint is None:
            return
        for key, fingerprint in training.inputs.items():
            if fingerprint == self.facts["inputs"].get(key):
                continue
            if key == "reward.custom":  # a reward that failed is mended, and the run goes on
                self.say(f"changed since the checkpoint: the file of {key}")
                continue
            raise ConfigError(
                f"{key}: what is there is not what this run's checkpoint was made with; "
                "restore it, or set run.dir to a new folder"
            )
        load_tensors(training.policy, training.optimizer, read_tensors(self.checkpoint))
        training.optimizer.param_groups[0]["weight_decay"] = self.config.optim.weight_decay
        training.sampler.load_state_dict(self.facts["sampler"])
        self.say(f"resumed {self.path} at step {self.step}")

    def begin(self, training) -> None:
        """Put the files in order for the steps from here on, and say what this run is."""
        if not self.world.is_main:
            return
        last_step_that_stands = self.step if self.checkpoint else -1
        supersede(self.metrics, last_step_that_stands)
        supersede(self.samples, last_step_that_stands)
        drop_examples(self.path, last_step_that_stands)
        if self.final.exists():  # of a run that is now extended
            remove_folder(self.final)
        write_file(self.path / "config.yaml", self.config.to_yaml().encode())
        append_jsonl(self.path / "starts.jsonl", [describe_start(training, self.step)])
        self.say(f"{header(training)}\n{LEGEND}\n")

    def record(self, row: dict) -> None:
        """Add a step to metrics.jsonl, and say how it went."""
        if self.world.is_main:
            append_finite(self.metrics, [row])
            for line in step_lines(row, self.config.train.steps):
                self.say(line)

    def record_samples(self, rows: Iterable[dict]) -> None:
        if self.world.is_main:
            append_finite(self.samples, rows)

    def save(self, training, step: int) -> None:
        """Write a checkpoint of a train.Training. Collective."""
        tensors = distributed.whole(
            {
                "policy": dict(training.policy.hf.named_parameters()),
                "optimizer": training.optimizer.state_dict(),
            },
            keep=self.world.is_main,
        )
        if self.world.is_main:
            # The rows that a checkpoint leaves behind must outlive a loss of power, too.
            for path in (self.metrics, self.samples):
                if path.exists():
                    sync(path)
            facts = {
                "step": step,
                "sampler": training.sampler.state_dict(),
                "inputs": training.inputs,
                "config": asdict(self.config),
            }
            save_checkpoint(
                self.path / "checkpoints",
                step,
                tensors,
                facts=facts,
                keep_last=self.config.checkpoint.keep_last,
            )
        self.world.barrier()

    def finish(self, training) -> None:
        """Write final/, and say what came out. Collective."""
        policy = training.policy
        weights = distributed.whole(dict(policy.hf.named_parameters()), keep=self.world.is_main)
        if self.world.is_main:
            write_folder(self.final, lambda path: save_policy(policy, path, weights))
            if training.held_out is not None:
                self.say(held_out_curve(self.metrics))
            self.say(
                f"done: open {self.path / 'report.html'}\n"
                f"{self.final} is a Hugging Face directory; to ask it something:\n"
                f"  {python_command()} evaluate.py ask --model {shlex.quote(str(self.final))} "
                "--image FILE QUESTION"
            )
        self.world.barrier()


# ---------------------------------------------------------------------------------- what a run says


def python_command() -> str:
    """How to call this Python from the present folder, as a person would type it."""
    executable = Path(sys.executable)
    if executable.is_relative_to(Path.cwd()):
        return shlex.quote(str(executable.relative_to(Path.cwd())))
    on_path = shutil.which("python")
    if on_path and Path(on_path) == executable:
        return "python"
    return shlex.quote(str(executable))


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
        "command": shlex.join([python_command(), *sys.argv]),
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
    here = Path(__file__).parent
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
    d = config.dyco
    rule = "DyCo off"
    if d.enabled:
        rule = f"DyCo rule {d.rule}: {dyco.RULES[d.rule].what}; ratio {d.ratio}, α {d.alpha:g}"
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
        ids = ", ".join(row["policy/skipped_prompts"])
        lines.append(f"  update skipped: loss or gradient not finite, prompts {ids}")
    elif "policy/skipped_updates" in row:
        lines.append("  no update: in every group the answers were all right or all wrong")
    if "eval/accuracy" in row:
        line = f"held out at step {row['step']}: {row['eval/accuracy']:.1%} right at temperature 1"
        line += f", {row['eval/accuracy_greedy']:.1%} greedy"
        if "eval/accuracy_swapped" in row:
            line += f", {row['eval/accuracy_swapped']:.1%} with images swapped"
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


def held_out_curve(path: Path) -> str:
    """The evaluations of a run, a line for each figure."""
    rows = [row for _, row in read_jsonl(path) if "eval/accuracy" in row]
    shown = rows if len(rows) <= 12 else [rows[i * (len(rows) - 1) // 11] for i in range(12)]
    lines = ["held out, in percent, at step  " + "  ".join(f"{row['step']:>4}" for row in shown)]
    figures = {
        "temperature 1": "eval/accuracy",
        "greedy": "eval/accuracy_greedy",
        "images swapped": "eval/accuracy_swapped",
    }
    for label, key in figures.items():
        if any(key in row for row in shown):
            values = [f"{100 * row.get(key, math.nan):4.0f}" for row in shown]
            lines.append(f"{label:>29}  " + "  ".join(values))
    return "\n".join(lines)


def state_for_launcher(message: str) -> None:
    """Leave an error where torchrun looks for it, so that the launcher's last lines show it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        error = {"message": message, "timestamp": str(int(datetime.now().timestamp()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(error))


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None where there is no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    pages = int(statm.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
