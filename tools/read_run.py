"""read_run.py: what the folder of a train.py run holds, read and checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from rows import RowError, excerpt, read_jsonl
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

LARGEST = 1e100  # of a number in a report: sums and percents of it are finite, too

# What each example of examples/step-*.json holds: the key, and the type of its value.
EXAMPLE_TYPES = {
    "id": str,
    "question": str,
    "answer": str,
    "correct": bool,
    "truncated": bool,
    "length": int,
    "tokens": list,
    "images": list,
    "heat": str,
}
NUMBERS_OF_TOKENS = (
    "roles",
    "weights",
    "scores",
    "probabilities",
    "visual_mass",
    "text_mass",
    "visual_shift",
    "text_shift",
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
        if path.suffix == ".json":
            content = json.loads(text, parse_float=finite, parse_constant=finite)
        else:
            content = yaml.safe_load(text)
        return build(content)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        StopIteration,
        TypeError,
        ValueError,
        yaml.YAMLError,
    ) as error:
        reason = excerpt(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ReportError(f"{path}: not as train.py or a tool writes it ({reason})") from error


def finite(text: str) -> float:
    """A number of a JSON file. Raises ValueError for one that no curve can show."""
    value = float(text)
    if not abs(value) <= LARGEST:
        raise ValueError(f"found {text:.60}; expected finite numbers")
    return value


def check_config(content) -> dict:
    """The config as a dictionary of sections. What is not one raises TypeError or ValueError."""
    config = dict(content)
    for section, keys in config.items():
        if not isinstance(keys, dict):
            raise ValueError(f"{section} is {keys!r:.60}; expected a section of the config")
    json.dumps(config, default=str)  # what cannot be written cannot be shown, such as a loop
    return config


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
            if type(value) not in expected or not abs(value) <= LARGEST:
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
    if type(content["step"]) is not int:
        raise ValueError(f"step is {content['step']!r:.60}; expected a whole number")
    examples = []
    for number, example in enumerate(content["examples"], start=1):
        check_example(example, f"example {number}")
        examples.append(coarsen(example, EXAMPLE_CELLS))
    return content["step"], examples


def check_example(example: dict, name: str) -> None:
    """Raises ValueError or KeyError where the page could not show the example."""
    for key, expected in EXAMPLE_TYPES.items():
        if type(example[key]) is not expected:
            raise ValueError(f"{name}: {key} is {example[key]!r:.60}; expected {expected.__name__}")
    tokens = example["tokens"]
    if not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{name}: expected texts in tokens")
    for key in NUMBERS_OF_TOKENS:
        check_numbers(example[key], len(tokens), f"{name}: {key}")
    if not set(example["roles"]) <= {-1, 0, 1}:
        raise ValueError(f"{name}: expected roles of -1, 0 and 1")
    check_numbers(example["peaks"], len(tokens) if example["images"] else 0, f"{name}: peaks")
    for image in example["images"]:
        if not str(image["file"]).startswith("data:image/"):
            raise ValueError(f"{name}: expected a data URI as the file of an image")
        for key in ("height", "width", "block"):
            if type(image[key]) is not int or not 1 <= image[key] <= LARGEST:
                raise ValueError(f"{name}: {key} of an image is {image[key]!r:.60}; expected > 0")


def check_numbers(values, count: int, name: str) -> None:
    """Raises ValueError unless the values are a list of `count` numbers."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{name} is {values!r:.60}; expected a list of {count} numbers")
    for value in values:
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise ValueError(f"{name} holds {value!r:.60}; expected a finite number")
