"""responses.py: what a run leaves behind: responses.jsonl, and run.json, which says of what.

responses.jsonl has one JSON object a line:

    {"index": "12", "response": "B"}
    {"index": "12", "sample": 1, "response": "C"}      where there are several responses to a row

In memory, responses are {index: {sample: text}}.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.files import BenchmarkError, names_near, show

RESPONSES = "responses.jsonl"
# Keys of run.json that a table needs.
SETTINGS = (
    "benchmark",
    "model",
    "weights",
    "data",
    "rows",
    "prompt",
    "template",
    "max_new_tokens",
    "min_pixels",
    "max_pixels",
    "sample",
    "temperature",
)
MAX_LISTED = 20  # rows named in one error
MAX_SAMPLES = 10**6  # to a row

Responses = dict[str, dict[int, str]]


def read_responses(path: str | Path, growing: bool = False) -> Responses:
    """All responses of a file, {index: {sample: text}}.

    growing: the last line may be half-written, and is left out then. Raises BenchmarkError for a
    broken line, and for a response that stands twice.
    """
    # rows imports the reader of images, which building the command line does not need.
    from rows import RowError, read_jsonl

    try:
        lines = read_jsonl(path, growing)
    except OSError as error:
        reason = error.strerror or error
        raise BenchmarkError(
            f"{path} cannot be read ({reason}); expected responses as JSONL{names_near(path)}"
        ) from error
    except RowError as error:
        raise BenchmarkError(f'{error} {{"index": …, "response": "…"}}') from error
    responses: Responses = defaultdict(dict)
    twice = {}
    for number, line in lines:
        index, sample, text = _parse_response(line, f"{path}, line {number}")
        if sample in responses[index]:
            twice[name_of(index, sample)] = None
        responses[index][sample] = text
    if twice:
        raise BenchmarkError(
            f"{path}: {len(twice)} responses stand more than once: {listed(twice)}; "
            "expected each once"
        )
    return dict(responses)


def _parse_response(line: dict, where: str) -> tuple[str, int, str]:
    """(index, sample, text) of one line. Numbers become texts."""
    for key in ("index", "response"):
        if key not in line:
            raise BenchmarkError(
                f'{where}: no key {key!r}; expected {{"index": …, "response": "…"}}'
            )
    index, sample, response = line["index"], line.get("sample", 0), line["response"]
    # To Python True is a number, too.
    if not isinstance(index, str | int) or isinstance(index, bool):
        raise BenchmarkError(f'{where}: "index" is {show(index)}; expected text or a whole number')
    if type(sample) is not int or not 0 <= sample < MAX_SAMPLES:
        raise BenchmarkError(f'{where}: "sample" is {show(sample)}; expected a whole number from 0')
    if not isinstance(response, str | int | float) or isinstance(response, bool):
        raise BenchmarkError(f'{where}: "response" is {show(response)}; expected text')
    return str(index), sample, str(response)


def response_row(index: str, sample: int, text: str, count: int) -> dict:
    """The line of one response. count: responses to each row; a single one needs no "sample"."""
    if count > 1:
        return {"index": index, "sample": sample, "response": text}
    return {"index": index, "response": text}


def read_settings(folder: str | Path) -> dict:
    """The run.json of a run's folder. Raises BenchmarkError."""
    path = Path(folder) / "run.json"
    try:
        settings = json.loads(path.read_text())
        return {key: settings[key] for key in SETTINGS} | settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} cannot be read ({type(error).__name__}: {error}); "
            "expected that of evaluate.py run"
        ) from error


def name_of(index: str, sample: int) -> str:
    """A response's name in an error message."""
    return show(index) if sample == 0 else f"{show(index)} (sample {sample})"


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    text = ", ".join(names[:MAX_LISTED])
    if len(names) > MAX_LISTED:
        text += f", … and {len(names) - MAX_LISTED} more"
    return text
