"""run_folder: what a run leaves on the disk and says on the terminal.

A run's folder (run.dir) holds

    config.yaml            the resolved settings
    starts.jsonl           a row for each time the run was started or resumed
    metrics.jsonl          a row for each step, and one for step 0
    samples.jsonl          some responses of each step, with the role and score of each token
    examples/              the held-out responses that the report shows
    report.html            curves and token view
    checkpoints/step-N/    tensors.pt (weights, optimizer), facts.json, checksums.json
    final/                 a Hugging Face directory
    final/adapter/         with LoRA, the adapter alone, as PEFT writes it

Files and folders are whole or absent, also after a kill or a loss of power. Rows of steps that are
computed again after a resume move to NAME.superseded.jsonl.

The class RunFolder stands here. files.py writes whole files, saving.py saves and checks, and
console.py says how it goes.
"""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import distributed
import dyco
import lora
from config import Config, ConfigError, load_run_config
from distributed import World
from rows import RowError, append_jsonl, read_jsonl
from run_folder.console import (
    LEGEND,
    Watch,
    describe_start,
    header,
    held_out_curve,
    python_command,
    say,
    step_lines,
)
from run_folder.files import (
    FolderError,
    RunError,
    append_finite,
    check_place,
    drop_examples,
    exclusive,
    last_step,
    make_folder,
    remove_folder,
    remove_partial,
    save_examples,
    supersede,
    sync,
    write_file,
    write_folder,
)
from run_folder.saving import (
    check_checkpoint,
    check_folder,
    checkpoints,
    load_tensors,
    read_facts,
    read_tensors,
    save_checkpoint,
    save_final,
    write_checksums,
)

__all__ = [
    "FolderError",
    "RunError",
    "RunFolder",
    "Watch",
    "check_checkpoint",
    "check_folder",
    "check_place",
    "checkpoints",
    "drop_examples",
    "exclusive",
    "make_folder",
    "python_command",
    "read_facts",
    "read_tensors",
    "remove_folder",
    "remove_partial",
    "save_checkpoint",
    "save_examples",
    "save_final",
    "supersede",
    "sync",
    "write_checksums",
    "write_file",
    "write_folder",
]

# Config keys that decide what a run *is*: a checkpoint of another value cannot be continued.
FIXED_ON_RESUME = (
    "model.path",
    "model.freeze_vision",
    "lora",
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


# Names in run.dir that a new run writes, and would otherwise overwrite.
WRITTEN_BY_A_RUN = (
    "config.yaml",
    "samples.jsonl",
    "report.html",
    "examples",
    "checkpoints",
    "final",
)


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
        self._on_main(self._tidy)
        saved = checkpoints(self.path / "checkpoints")
        self.checkpoint = saved[-1] if saved else None
        names = {path and path.name for path in world.gather(self.checkpoint)}
        if len(names) > 1:
            listed = ", ".join(sorted(name or "none" for name in names))
            raise RunError(
                f"{self.path}: processes find different checkpoints there ({listed}); expected a "
                "folder that all nodes share"
            )
        self.facts = {"step": 0}
        if self.checkpoint:
            self._on_main(self._check_newest)
            self.facts = read_facts(self.checkpoint)
            self._refuse_changes(self.facts["config"])
        elif self.final.exists():
            raise RunError(
                f"{self.path} holds final/ but no checkpoint, so the run would begin anew and "
                "replace it; bring the checkpoints back, or set run.dir to a new folder"
            )
        elif self.metrics.exists():  # a run that ended before its first checkpoint begins again
            self._refuse_changes(asdict(load_run_config(self.path / "config.yaml")))

    def _on_main(self, action: Callable[[], None]) -> None:
        """Do something on the main process. If that fails, all raise an error. Collective."""
        distributed.on_main(self.world, action, expected=(RunError, RowError, OSError))

    def _tidy(self) -> None:
        """Remove what was cut short. Raises RunError where the folder holds what no run wrote."""
        ours = (self.path / "starts.jsonl").exists() or self.metrics.exists()
        foreign = [name for name in WRITTEN_BY_A_RUN if (self.path / name).exists()]
        if foreign and not ours:
            raise RunError(
                f"{self.path} holds {', '.join(foreign)} but no metrics.jsonl: no run wrote that, "
                "and a run would overwrite it; set run.dir to a new folder"
            )
        if ours:  # else a name like that is a file of the user's
            remove_partial(self.path)
            remove_partial(self.path / "checkpoints")

    def _check_newest(self) -> None:
        """Put a damaged checkpoint aside, and say so. Raises RunError then.

        It is an error, and not a line among others, since steps are lost that the user may be able
        to bring back from a copy. The same command goes on without it.
        """
        newest = self.checkpoint
        try:
            check_checkpoint(newest)
        except RunError as error:
            aside = newest.with_name(f"{newest.name}.damaged")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}+")
            os.rename(newest, aside)
            older = checkpoints(self.path / "checkpoints")
            if older:
                otherwise = f"give the same command again, which goes on from {older[-1].name}"
            elif self.final.exists():
                otherwise = "set run.dir to a new folder, since final/ is not trained away"
            else:
                otherwise = "give the same command again, which begins anew at step 0"
            raise RunError(
                f"{error}; it now stands aside as {aside.name}. Put a good copy in its place "
                f"({newest.name}), or {otherwise}"
            ) from None
        last = last_step(self.metrics)
        step = read_facts(newest)["step"]
        if last is not None and last < step:
            raise RunError(
                f"{self.metrics} ends at step {last}, and the checkpoint is of step {step}: rows "
                "are missing; restore the file, or set run.dir to a new folder"
            )

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
            say(text)

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

        after = flat(asdict(self.config))
        # Runs that know of no adapters have trained the weights themselves, and runs that know of
        # no control had a name for rule and control together.
        before = {"lora.rank": 0, "dyco.control": "none", **flat(old)}
        former = dyco.FORMER_NAMES.get(before.get("dyco.rule"))
        if former is not None:
            before["dyco.rule"], before["dyco.control"] = former
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
            before = self.facts["inputs"].get(key)
            if fingerprint == before:
                continue
            # A held-out set may be added to a run; _refuse_changes has said so.
            if key == "data.eval_path" and before is None:
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
        # First of all: it tells that the folder is a run's own.
        append_jsonl(self.path / "starts.jsonl", [describe_start(training, self.step)])
        write_file(self.path / "config.yaml", self.config.to_yaml().encode())
        self._warn_of_space(training)
        self.say(f"{header(training)}\n{LEGEND}\n")

    def _warn_of_space(self, training) -> None:
        """Say so now, if the disk cannot hold what the run will write."""
        weights = list(training.policy.parameters())
        count = sum(p.numel() for p in weights)
        trained = sum(p.numel() for p in weights if p.requires_grad)
        saved = sum(p.numel() for p in lora.state(training.policy).values())
        # float32 weights, and of AdamW two numbers for each that is trained. One checkpoint more
        # than are kept exists while it is written; final/ holds the weights alone.
        a_checkpoint = 4 * saved + 8 * trained
        needed = a_checkpoint * (self.config.checkpoint.keep_last + 1) + 4 * count
        kept = len(checkpoints(self.path / "checkpoints")) * a_checkpoint
        free = shutil.disk_usage(self.path).free
        if free < needed - kept:
            self.say(
                f"warning: checkpoints and final/ will need {(needed - kept) / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free at {self.path}; lower checkpoint.keep_last or make "
                "room"
            )

    def record(self, row: dict) -> None:
        """Add a step to metrics.jsonl, and say how it went."""
        if self.world.is_main:
            append_finite(self.metrics, [row])
            for line in step_lines(row, self.config.train.steps):
                self.say(line)

    def has_evaluation(self) -> bool:
        """Whether the last row of metrics.jsonl, that of the newest checkpoint, has one."""
        rows = [row for _, row in read_jsonl(self.metrics)]
        return "eval/accuracy" in rows[-1]

    def amend(self, figures: dict) -> None:
        """Add the figures of an evaluation to the last row of metrics.jsonl, and say them."""
        if self.world.is_main:
            *before, last = self.metrics.read_bytes().splitlines(keepends=True)
            row = json.loads(last) | figures
            # Whole or not at all: the row must not be missing if the run is killed now.
            write_file(self.metrics, b"".join(before) + json.dumps(row).encode() + b"\n")
            for line in step_lines({"step": row["step"], **figures}, self.config.train.steps):
                self.say(line)

    def record_samples(self, rows: Iterable[dict]) -> None:
        if self.world.is_main:
            append_finite(self.samples, rows)

    def save(self, training, step: int) -> None:
        """Write a checkpoint of a train.Training. Collective."""
        tensors = distributed.whole(
            {
                "policy": lora.state(training.policy),
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
                # A key that a run leaves out for a while is compared when it is back.
                "inputs": self.facts.get("inputs", {}) | training.inputs,
                "config": asdict(self.config),
            }
            try:
                save_checkpoint(
                    self.path / "checkpoints",
                    step,
                    tensors,
                    facts=facts,
                    keep_last=self.config.checkpoint.keep_last,
                )
            except (OSError, RuntimeError) as error:  # the latter from torch.save
                saved = checkpoints(self.path / "checkpoints")
                goes_on = f"goes on from {saved[-1].name}" if saved else "begins anew"
                raise RunError(
                    f"step {step}: no checkpoint could be written to "
                    f"{self.path / 'checkpoints'} ({error}); nothing that was saved is lost, and "
                    f"the same command {goes_on}"
                ) from error
        self.world.barrier()

    def finish(self, training) -> None:
        """Write final/, and say what came out. Collective."""
        policy = training.policy
        weights = distributed.whole(dict(policy.hf.named_parameters()), keep=self.world.is_main)
        if self.world.is_main:
            write_folder(
                self.final, lambda path: save_final(policy, path, weights, config=self.config)
            )
            if training.held_out is not None:
                self.say(held_out_curve(self.metrics))
            self.say(
                f"done: open {self.path / 'report.html'}\n"
                f"{self.final} is a Hugging Face directory; to ask it something:\n"
                f"  {python_command()} evaluate.py ask --model {shlex.quote(str(self.final))} "
                "--image FILE QUESTION"
            )
        self.world.barrier()
