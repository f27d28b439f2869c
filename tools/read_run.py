"""read_run.py: what the folder of a train.py run holds, read and checked."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from rows import RowError, read_jsonl
from tools.examples import EXAMPLE_CELLS, coarsen

# The keys of each row of starts.jsonl, which train.py writes when a run starts or resumes.
START_KEYS = (
    "step",
    "date",
    "command",
    "device",
    "dtype",
    "processes",
    "python",
    "torch",
    "transformers",
    "commit",
)


class ReportError(RowError):
    """A folder without a run, or a file in it that cannot be read."""


class Run(NamedTuple):
    """A run as its folder tells it. What the folder does not hold is empty."""

    folder: Path
    rows: list[dict]  # of metrics.jsonl, by step
    config: dict  # config.yaml, by section
    starts: list[dict]  # of starts.jsonl, oldest first
    evaluations: list[tuple[int, list[dict]]]  # (step, examples) of the first and the last one

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read_run(run_dir: str | Path) -> Run:
    """Read the folder of a run. Raises ReportError."""
    folder = Path(run_dir)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ReportError(
            f"{folder}: no metrics.jsonl; expected the folder of a train.py run (its run.dir)"
        )
    rows = read_metrics(metrics)
    if not rows:
        raise ReportError(f"{metrics}: no whole row yet")
    config_path = folder / "config.yaml"
    return Run(
        folder=folder,
        rows=rows,
        config=read_file(config_path, check_config) if config_path.exists() else {},
        starts=read_starts(folder / "starts.jsonl"),
        evaluations=read_examples(folder),
    )


def read_file(path: Path, build: Callable):
    """build(content) of a JSON or YAML file.

    Whatever is wrong with the content is a ReportError that names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return build(content)
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        RecursionError,
        yaml.YAMLError,
    ) as error:
        raise ReportError(
            f"{path}: not as train.py or a tool writes it ({type(error).__name__}: {error})"
        ) from error


def check_config(content) -> dict:
    """The config as a dictionary of sections. What is not one raises TypeError or ValueError."""
    return dict(content)


def read_lines(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of each whole line of a file that may be growing."""
    try:
        return read_jsonl(path, growing=True)
    except RowError as error:
        raise ReportError(str(error)) from None


def read_metrics(path: Path) -> list[dict]:
    """Rows of numbers, by step. Lists are left out, such as the prompts of skipped updates."""
    rows = {}
    for line, whole_row in read_lines(path):
        row = {key: value for key, value in whole_row.items() if not isinstance(value, list)}
        for key, value in {"step": None, **row}.items():
            # A truth value is an int to isinstance, so the types are compared.
            expected = (int,) if key == "step" else (int, float)
            if type(value) not in expected or not math.isfinite(value):
                raise ReportError(f"{path}, line {line}: {key} is {value!r:.60}; expected a number")
        rows.setdefault(row["step"], row)
    return [rows[step] for step in sorted(rows)]


def read_starts(path: Path) -> list[dict]:
    """Rows of starts.jsonl, oldest first; none if there is no such file, as in older runs."""
    if not path.exists():
        return []
    starts = []
    for line, row in read_lines(path):
        for key in START_KEYS:
            if key not in row:
                raise ReportError(
                    f"{path}, line {line}: no {key}; expected a start as train.py writes it, "
                    f"with {', '.join(START_KEYS)}"
                )
            expected, words = (str, int, float, type(None)), "text or a number"
            if key == "step":
                expected, words = (int,), "a whole number"
            if type(row[key]) not in expected:
                raise ReportError(
                    f"{path}, line {line}: {key} is {row[key]!r:.60}; expected {words}"
                )
        starts.append(row)
    return starts


def read_examples(folder: Path) -> list[tuple[int, list[dict]]]:
    """(step, examples) of the first and of the last evaluation that left any."""
    paths = sorted((folder / "examples").glob("step-*.json"))
    # dict.fromkeys: the first is the last where there is only one.
    return [read_file(path, build_examples) for path in dict.fromkeys(paths[:1] + paths[-1:])]


def build_examples(content) -> tuple[int, list[dict]]:
    examples = [coarsen(example, EXAMPLE_CELLS) for example in content["examples"]]
    return int(content["step"]), examples
