"""benchmark.py: what a benchmark is: a file to read, a prompt, a rule, and the figures it reports.

One more benchmark is one more subclass of `Benchmark`, which overrides what is its own, and an
entry of BENCHMARKS in suite.py.
"""

import base64
import hashlib
import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.answers import final_answer, half_width, hide_letters, stated_letters
from benchmarks.files import BenchmarkError, Row, read_tsv, show


@dataclass(frozen=True)
class Result:
    """What a rule made of one response."""

    row: Row
    text: str  # what the rule read: the response, or its final answer
    hit: bool | None  # None: the rule could not settle it


@dataclass(frozen=True)
class Benchmark:
    """One dataset name.

    A subclass says what the file must hold, what is asked, when an answer is right, and what is
    reported.
    """

    name: str
    rows: int | None = None  # how many the released file has, after dropping; None: not known
    about: bool = False  # whether `rows` is known to 5 % only
    answer_is: bool = False  # match_option's

    # Columns that the file must have, besides index and image or image_path.
    columns = ("question", "answer")
    reference = "an answer that its rule can read"  # what its column `answer` should hold
    title = ""  # the column of the paper's table
    metric = "accuracy"  # the name of the headline
    # Pixels of an image, as VLMEvalKit sets them for Qwen2.5-VL-Instruct.
    min_pixels = 1280 * 28 * 28
    max_pixels = 16384 * 28 * 28
    max_new_tokens = 2048
    prompt_mode = "benchmark"  # by default: the dataset's own prompt

    def load(self, path: str | Path | None, pictures: bool = False) -> tuple[list[Row], set[str]]:
        """The rows of the file, and the indices of rows without an image.

        The latter are no part of the benchmark. Raises BenchmarkError.
        """
        if path is None:
            raise BenchmarkError(
                f"{self.name} is read from a file; expected --data, VLMEvalKit's TSV file of it"
            )
        rows, dropped = read_tsv(path, self.columns, pictures)
        self._compare_count(path, len(rows))
        return rows, dropped

    def _compare_count(self, path: str | Path, count: int) -> None:
        if self.rows is None:
            return
        tolerance = 0.05 * self.rows if self.about else 0
        if abs(count - self.rows) > tolerance:
            released = f"about {self.rows}" if self.about else f"{self.rows}"
            warnings.warn(
                f"{path}: {count} rows; the released {self.name} has {released}", stacklevel=3
            )

    def fingerprint(self, path: str | Path | None) -> str:
        """What tells one version of the file from another."""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def pictures(self, row: Row, root: str | Path) -> tuple:
        """The row's pictures as upright RGB.

        Paths are relative to the folder `root` and may not leave it. Raises BenchmarkError.
        """
        # Scoring looks at no picture, so it needs no Pillow.
        from rows import DataError, decode_image, load_image

        images = []
        for number, image in enumerate(row.images, start=1):
            what = f"image {number} of {len(row.images)}"
            try:
                if row.encoded:
                    content = _decode_base64(image, f"{row.where}: {what}")
                    images.append(decode_image(io.BytesIO(content), what))
                else:
                    images.append(load_image(image, root))
            except DataError as error:
                raise BenchmarkError(f"{row.where}: {error}") from error
        return tuple(images)

    def prompt(self, row: Row) -> str:
        """The text after the pictures."""
        return row["question"]

    def final(self, response: str, unbox: bool = True) -> str:
        """What the rule reads in mode "final"."""
        text = final_answer(response, unbox)
        return hide_letters(text, whole=unbox and final_answer(response, False) != text)

    def readings(self, response: str) -> list[str]:
        r"""What the rule reads in mode "final", one after the other until it settles one.

        What is boxed; the letters that are stated explicitly; the text around the box: "The area is
        \boxed{24}. So the answer is C." At last the same without full-width letters and marks.
        """
        boxed = self.final(response)
        around = self.final(response, unbox=False)
        texts = [around] if boxed == around else [boxed, around]
        stated = stated_letters(around)
        if stated is not None:
            texts.insert(len(texts) - 1, f"({stated})")  # in brackets no option's words are found
        texts += [half_width(text) for text in (boxed, around)]
        return list(dict.fromkeys(texts))

    def check(self, row: Row, text: str) -> bool | None:
        """Whether the text answers the row rightly; None if the rule cannot settle it."""
        raise NotImplementedError

    def report(self, results: list[Result]) -> tuple[float, dict]:
        """(headline, all scores), in percent, of results in the order of the file.

        A score that is undefined is None.
        """
        overall = accuracy(results)
        return overall, {"Overall": overall}


def _decode_base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise BenchmarkError(
            f"{what} is {show(text)} ({error}); expected a picture in base64"
        ) from error


# ------------------------------------------------------------------------- what reports are made of


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def percent(hits: Iterable[bool | None]) -> float | None:
    """The share of hits that are true; None, which is unsettled, is no hit."""
    hits = list(hits)
    return 100 * sum(map(bool, hits)) / len(hits) if hits else None


def accuracy(results: Iterable[Result]) -> float | None:
    return percent(result.hit for result in results)


def all_hit(results: Iterable[Result]) -> bool:
    return all(result.hit for result in results)


def group_by(results: Iterable[Result], key: Callable[[Row], Any]) -> dict[Any, list[Result]]:
    """Results by what `key` says of their row, in the order of the file."""
    groups = defaultdict(list)
    for result in results:
        groups[key(result.row)].append(result)
    return dict(groups)


def group_by_column(results: Iterable[Result], column: str) -> dict[str, list[Result]]:
    """Results by a column's value, in alphabetical order."""
    return dict(sorted(group_by(results, lambda row: row[column]).items()))


def accuracies(results: Iterable[Result], column: str) -> dict[str, float]:
    """The accuracy for each value of a column."""
    return {name: accuracy(group) for name, group in group_by_column(results, column).items()}


# ---------------------------------------------------------------------------------- multiple choice


def option_prompt(row: Row, ending: str = "") -> str:
    """VLMEvalKit's prompt of a multiple-choice question. `ending` follows the options, if any."""
    text = f"Question: {row['question']}\n"
    if "hint" in row.cells:
        text = f"Hint: {row['hint']}\n" + text
    options = row.options()
    if options:
        lines = [f"{letter}. {option}\n" for letter, option in options.items()]
        text += "Options:\n" + "".join(lines) + ending
    return text
