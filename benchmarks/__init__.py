r"""benchmarks.py: the seven benchmarks of the paper's table, and the toy: prompt, answer rule and metric of each.

    rows, dropped = find("MMBench_DEV_EN_V11").load("MMBench_DEV_EN_V11.tsv")
    responses = read_responses("responses.jsonl")                # {index: {sample: text}}
    score(find("MMBench_DEV_EN_V11"), rows, responses, mode="final")

The files are VLMEvalKit's TSV files, the names are its dataset names, and prompts, answer rules and metrics are those of
its rule-based path, described here and written anew (github.com/open-compass/VLMEvalKit, as of June 2026). Each rule reads
either the whole response (mode "raw") or what `final_answer` finds in it (mode "final"). A row whose answer the rule
cannot settle is *unmatched* and counts as wrong; that is where VLMEvalKit asks a judge model, and where a function of
yours may be asked.

One more benchmark is one more subclass of `Benchmark` and its line in BENCHMARKS. Scoring needs no model, no torch and
decodes no image. Files and responses are hostile input: nothing in them is evaluated, every rule takes linear time, and
what is wrong is a BenchmarkError that names the place.
"""

from __future__ import annotations

import ast
import base64
import csv
import difflib
import functools
import hashlib
import io
import json
import math
import re
import string
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import rewards

# what pandas.read_csv takes for a missing cell: an option called "None" does not exist for VLMEvalKit
MISSING = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    )
)
MAX_FIELD = 2**28  # characters of one cell; an unclosed quote swallows the rest of a file
MAX_LITERAL = 10**5  # characters of a cell that holds a Python literal, images apart
MAX_POINTER = 64  # characters: a longer image cell is a picture
MAX_LISTED = 20  # rows named in one error
NO_JUDGE = "none (rule-based)"


class BenchmarkError(ValueError):
    """Anything wrong with a benchmark's file or responses. The message names the place, what was found and what was expected."""


# ---- 1. Rows of a TSV file -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One question. `row[column]` is the text of a cell; missing cells are no keys of `cells`."""

    where: str  # "FILE, line 7"
    index: str
    cells: dict[str, str]  # without the pictures
    images: tuple[str, ...] = ()  # base64, or paths
    encoded: bool = True  # base64

    def __getitem__(self, column: str) -> str:
        if column not in self.cells:
            raise BenchmarkError(f"{self.where}: {column!r} is empty; expected a value")
        return self.cells[column]

    def options(self) -> dict[str, str]:
        """Letter -> text of the options that exist."""
        return {
            letter: self.cells[letter] for letter in string.ascii_uppercase if letter in self.cells
        }


def read_tsv(
    path: str | Path, columns: Iterable[str], pictures: bool
) -> tuple[list[Row], set[str]]:
    """The rows of a VLMEvalKit TSV file, and the indices of those it drops: rows whose `image` is empty.

    An image cell of at most 64 characters is the index of the row that holds the picture. `pictures` False leaves the
    images out, and unchecked. Raises BenchmarkError.
    """
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t", strict=True)
            try:
                header = next(reader, [])
                _check_header(path, header, columns, pictures)
                records = list(_records(path, reader, header, pictures))
            except csv.Error as error:
                raise BenchmarkError(
                    f"{path}, line {reader.line_num}: {error}; expected tab-separated cells, quoted as pandas "
                    f"writes them, of at most {MAX_FIELD} characters"
                ) from error
    except OSError as error:
        raise BenchmarkError(
            f"{path} cannot be read ({error.strerror or error}); expected a TSV file{_near_file(path)}"
        ) from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(
            f"{path} is not UTF-8 ({error.reason}); expected a TSV file in UTF-8"
        ) from error
    finally:
        csv.field_size_limit(limit)

    kept = [row for row in records if "image" in row.cells or "image" not in header]
    if not kept:
        raise BenchmarkError(
            f"{path} has {'no row with an image' if records else 'no rows'}; expected at least one"
        )
    dropped = {row.index for row in records} - {row.index for row in kept}
    if not pictures:
        for row in kept:
            row.cells.pop("image", None)
    else:
        held = {
            row.index: row.cells["image"]
            for row in kept
            if len(row.cells.get("image", "")) > MAX_POINTER
        }
        kept = [_with_images(row, held) for row in kept]
    return kept, dropped


def _records(
    path: str | Path, reader: Iterator[list[str]], header: list[str], pictures: bool
) -> Iterator[Row]:
    lines: dict[str, int] = {}
    for values in reader:
        if not values:  # a blank line
            continue
        where = f"{path}, line {reader.line_num}"
        if len(values) != len(header):
            raise BenchmarkError(
                f"{where}: found {len(values)} cells; expected {len(header)}, as many as the header has"
            )
        for name, value in zip(header, values):
            if "\0" in value:
                raise BenchmarkError(f"{where}: {name!r} holds a NUL character; expected text")
        cells = {name: value for name, value in zip(header, values) if value not in MISSING}
        if "image" in cells and not pictures:
            cells["image"] = ""  # what remains of gigabytes that scoring does not need
        if "index" not in cells:
            raise BenchmarkError(f"{where}: 'index' is empty; expected a value")
        index = cells["index"]
        if index in lines:
            raise BenchmarkError(
                f"{where}: the index {_show(index)} stands on line {lines[index]}, too; expected each once"
            )
        lines[index] = reader.line_num
        yield Row(where, index, cells)


def _with_images(row: Row, held: dict[str, str]) -> Row:
    """The row with its pictures; held: index -> picture."""
    column = "image" if "image" in row.cells else "image_path"
    cell = row[column]
    if column == "image" and len(cell) <= MAX_POINTER:
        if cell not in held:
            raise BenchmarkError(
                f"{row.where}: the image is {cell!r}, too short for a picture and not the index of a row that holds "
                "one; expected base64 or such an index"
            )
        cell = held[cell]
    cells = {name: value for name, value in row.cells.items() if name != "image"}
    return Row(
        row.where,
        row.index,
        cells,
        tuple(_list_of_texts(cell, row.where, column)),
        encoded=column == "image",
    )


def _check_header(
    path: str | Path, header: list[str], columns: Iterable[str], pictures: bool
) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise BenchmarkError(
            f"{path}: the column {_show(twice[0])} stands twice in the header; expected each once"
        )
    wanted = ["index", *columns]
    if pictures and "image" not in header and "image_path" not in header:
        wanted.append("image")
    missing = [name for name in wanted if name not in header]
    if missing:
        near = ", ".join(difflib.get_close_matches(missing[0], header[:100])) or "none"
        found = ", ".join(header[:30]) or "nothing"
        raise BenchmarkError(
            f"{path}: no column {', '.join(map(repr, missing))}; found the columns {found[:400]}; nearest: {near}"
        )


def _literal(text: str, where: str, column: str, limit: int = MAX_LITERAL) -> Any:
    """The value of a Python literal, such as "['a', 'b']"; nothing is executed."""
    try:
        if len(text) > limit:
            raise ValueError(f"{len(text)} characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as \d
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        raise BenchmarkError(
            f"{where}: {column!r} is {_show(text)}, which cannot be read ({reason[:100]}); "
            "expected a Python literal"
        ) from error


def _list_of_texts(cell: str, where: str, column: str) -> list[str]:
    """ "a" -> ["a"], "['a', 'b']" -> ["a", "b"]."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    value = _literal(cell, where, column, limit=MAX_FIELD)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise BenchmarkError(
            f"{where}: {column!r} is {_show(cell)}; expected one value, or a list of texts"
        )
    return value


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "…"


def _near_file(path: str | Path) -> str:
    try:
        near = difflib.get_close_matches(
            Path(path).name, [other.name for other in Path(path).parent.iterdir()]
        )
    except OSError:
        near = []
    return f"; near names: {', '.join(near)}" if near else ""


# ---- 2. Rules that read an answer out of a text --------------------------------------------------------------------


def final_answer(response: str, unbox: bool = True) -> str:
    r"""What a response that reasons first gives as its answer: the text after the last </think>, in it the last
    <answer>…</answer>, in that with `unbox` the last \boxed{…} with balanced braces; each step only where there is such a part.

    final_answer(r"<think>So 3+2.</think><answer>\boxed{\text{B}}</answer>") -> "B"
    """
    text = response.rpartition("</think>")[2]
    block = rewards.extract_answer(text)
    text = text if block is None else block
    boxed = _last_boxed(text) if unbox else None
    if boxed is not None:
        boxed = boxed.strip()
        for command in (r"\text{", r"\mathrm{"):
            if (
                boxed.startswith(command)
                and _closing_brace(boxed, len(command) - 1) == len(boxed) - 1
            ):
                boxed = boxed[len(command) : -1]
                break
        text = boxed
    return text.strip()


def _last_boxed(text: str) -> str | None:
    open_braces, last = [], None
    for match in re.finditer("[{}]", text):
        if match[0] == "{":
            open_braces.append(match.end())
        elif open_braces:
            start = open_braces.pop()
            if text.endswith(r"\boxed{", 0, start) and (last is None or start > last[0]):
                last = start, match.start()
    return None if last is None else text[last[0] : last[1]]


def _closing_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer("[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    return -1


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def match_option(
    text: str, options: dict[str, str], answer_is: bool = False, whole: bool = False
) -> str | None:
    """VLMEvalKit's matcher: the letter of an option, "Z" for "none of them", or None.

    Exactly one option letter stands alone in the text, for the first time among its last four words; else exactly one
    option's words stand in a short text. `answer_is` adds its rule of 2026-06-17: "answer is", then a letter a-d. `whole`, which is
    ours: options are not looked for inside longer words and numbers, 40° in 140°, and °, and a space before a unit, may be missing.

    match_option("The answer is (B).", {"A": "red", "B": "blue"}) -> "B"      match_option("It is blue", …) -> "B"
    """
    if "Failed to obtain answer via API" not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return "Z"
        words = text.translate(_TO_SPACES).split()
        present = set(words)
        letters = [letter for letter in options if letter in present]
        if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:
            return letters[0]
        if not letters and "Z" in present:
            return "Z"
        found = re.search(r"(?i)answer is\s*+\**+([a-d])", text) if answer_is else None
        if found and found[1].upper() in options:
            return found[1].upper()
    text = text.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    stands = _stands_whole if whole else str.__contains__
    letters = [letter for letter, option in options.items() if stands(text, option.lower())]
    return letters[0] if len(letters) == 1 else None


def _stands_whole(text: str, option: str) -> bool:
    bare = lambda x: re.sub(r"(?<=\d)\s+(?=[^\W\d])", "", x.replace("°", ""))
    return re.search(rf"(?<![\w.,]){re.escape(bare(option))}(?!\w|[.,]\d)", bare(text)) is not None


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def yes_or_no(text: str) -> str | None:
    """ "Yes" or "No" if exactly one of the two is a word of the text, after VLMEvalKit's cleaning of punctuation.

    yes_or_no("Yes, it is.") -> "Yes"      yes_or_no("**Yes**") -> None      yes_or_no("A: yes or no? No.") -> None
    """
    original = text = text.lower()
    comma = re.search(r"\d,\d", original) is not None
    for mark in _PUNCTUATION:
        beside_space = mark + " " in original or " " + mark in original
        text = text.replace(mark, "" if comma or beside_space else " ")
    words = set(re.sub(r"\.(?!\d)", "", text, count=32).split())
    return (
        "Yes"
        if "yes" in words and "no" not in words
        else "No"
        if "no" in words and "yes" not in words
        else None
    )


def letter_after_answer(text: str) -> str | None:
    """WeMath's own rule: the first character after the last "Answer", of the letters A-H, once > < : . are gone.

    letter_after_answer("<Answer>: <<B>>") -> "B"      letter_after_answer("The answer is B") -> None
    """
    text = re.sub("[<>:.]", "", text.rpartition("Answer")[2].strip()).strip()
    return text[0] if text and text[0] in "ABCDEFGH" else None


_SEPARATORS = r"(?:[\s,;/&]|\band\b)"
_LETTERS = rf"[A-I](?!\w)(?:{_SEPARATORS}++[A-I](?!\w))*+"
_ANSWER_LETTERS = re.compile(
    rf"(?i:\b(?:answer|option|choice)s?\s*+(?:is\b|are\b|:)[\s:*]*+(?:(?:option|choice)s?\b)?+)[\s:*(\[$]*+({_LETTERS})"
)


def answer_letters(text: str) -> set[str] | None:
    """LogicVista's letters A-I. The whole text is a list of letters, or one letter as a label and the option's text; else the last
    list directly after "answer is", "options are", "choice:" …; else the one stand-alone letter B-H of the text ("A" and "I" are words).

    answer_letters("A, C") -> {"A", "C"}      answer_letters("A hard one. The answer is B and D.") -> {"B", "D"}
    """
    whole = re.sub(
        r"^(?i:option|choice)s?\s+", "", text.strip(string.whitespace + "*()[].$")
    ).lstrip("*([")
    if re.fullmatch(rf"{_LETTERS}|[A-I]{{2,9}}", whole):
        return set(re.findall("[A-I]", whole))
    label = re.match(r"([A-I])[.:)\]*]+\s", whole)
    if label and not re.search(r"\b[A-I][.:)\]]", whole[label.end() :]):
        return {label[1]}
    after = [match[1] for match in _ANSWER_LETTERS.finditer(text)]
    if after:
        return set(re.findall("[A-I]", after[-1]))
    alone = set(re.findall(r"\b[B-H]\b", text))
    return alone if len(alone) == 1 else None


def is_equal(answer: str, reference: str) -> bool:
    r"""MathVision's equality: the same text without case, or rational numbers closer than 1e-6.

    is_equal(r"\frac{1}{2}", "0.5") -> True      is_equal("5 cm", "5") -> False, no units; no surds, π or variables either
    """
    answer, reference = answer.lower().strip(), reference.lower().strip()
    if answer == reference:
        return True
    a, b = rewards.rational(answer), rewards.rational(reference)
    return a is not None and b is not None and abs(a - b) < 1e-6


# ---- 3. Benchmarks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a rule made of one response."""

    row: Row
    text: str  # what the rule read: the response, or its final answer
    hit: bool | None  # None: the rule could not settle it


@dataclass(frozen=True)
class Benchmark:
    """One dataset name. Subclasses say what the file must hold, what is asked, when an answer is right, and what is reported."""

    name: str
    rows: int | None = None  # how many the released file has, after dropping; None: not known
    about: bool = False  # `rows` is known to 5 % only
    answers: bool = True  # the file holds them
    answer_is: bool = False  # match_option's

    columns = (
        "question",
        "answer",
    )  # that the file must have, besides index and image or image_path
    title = ""  # column of the paper's table
    metric = "accuracy"  # name of the headline
    min_pixels, max_pixels = (
        1280 * 28 * 28,
        16384 * 28 * 28,
    )  # of an image, as VLMEvalKit sets them for Qwen2.5-VL-Instruct
    max_new_tokens = 2048
    prompt_mode = "benchmark"  # by default: the dataset's own prompt

    def load(self, path: str | Path | None, pictures: bool = False) -> tuple[list[Row], set[str]]:
        """The rows of the file, and the indices of rows without an image, which are no part of the benchmark."""
        if path is None:
            raise BenchmarkError(
                f"{self.name} is read from a file; expected --data, VLMEvalKit's TSV file of it"
            )
        rows, dropped = read_tsv(
            path, [c for c in self.columns if self.answers or c != "answer"], pictures
        )
        if self.rows is not None and abs(len(rows) - self.rows) > (
            0.05 * self.rows if self.about else 0
        ):
            warnings.warn(
                f"{path}: {len(rows)} rows; the released {self.name} has {'about ' * self.about}{self.rows}",
                stacklevel=2,
            )
        return rows, dropped

    def fingerprint(self, path: str | Path | None) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def pictures(self, row: Row, root: str | Path) -> tuple:
        """The row's pictures as upright RGB; paths are relative to `root` and may not leave it. Raises BenchmarkError."""
        from data import DataError, decode_image, load_image

        images = []
        for number, image in enumerate(row.images, start=1):
            what = f"image {number} of {len(row.images)}"
            try:
                content = (
                    base64.b64decode("".join(image.split()), validate=True) if row.encoded else b""
                )
            except ValueError as error:
                raise BenchmarkError(
                    f"{row.where}: {what} is {_show(image)} ({error}); expected a picture in base64"
                ) from error
            try:
                images.append(
                    decode_image(io.BytesIO(content), what)
                    if row.encoded
                    else load_image(image, root)
                )
            except DataError as error:
                raise BenchmarkError(f"{row.where}: {error}") from error
        return tuple(images)

    def prompt(self, row: Row) -> str:
        """The text after the pictures."""
        return row["question"]

    def final(self, response: str, unbox: bool = True) -> str:
        return final_answer(response, unbox)

    def check(self, row: Row, text: str) -> bool | None:
        """Whether the text answers the row rightly; None if the rule cannot settle it."""
        raise NotImplementedError

    def report(self, results: list[Result]) -> tuple[float, dict]:
        """(headline, all scores), in percent, of results in the order of the file. Undefined ones are None."""
        return _accuracy(results), {"Overall": _accuracy(results)}


def _percent(hits: Iterable[bool | None]) -> float | None:
    hits = list(hits)
    return 100 * sum(map(bool, hits)) / len(hits) if hits else None


def _accuracy(results: Iterable[Result]) -> float | None:
    return _percent(result.hit for result in results)


def _all_hit(results: Iterable[Result]) -> bool:
    return all(result.hit for result in results)


def _groups(results: Iterable[Result], key: Callable[[Row], Any]) -> dict[Any, list[Result]]:
    groups = defaultdict(list)
    for result in results:
        groups[key(result.row)].append(result)
    return dict(groups)


def _accuracies(results: Iterable[Result], column: str) -> dict[str, float]:
    return {
        name: _accuracy(group)
        for name, group in sorted(_groups(results, lambda row: row[column]).items())
    }


def _option_prompt(row: Row, ending: str = "") -> str:
    options = "".join(f"{letter}. {text}\n" for letter, text in row.options().items())
    hint = f"Hint: {row['hint']}\n" if "hint" in row.cells else ""
    return f"{hint}Question: {row['question']}\n" + (
        f"Options:\n{options}{ending}" if options else ""
    )


class WeMath(Benchmark):
    """Composite problems and the one-step problems they are made of (arXiv 2407.01284)."""

    title, metric = "WeMath", "Score (Strict)"
    columns = ("ID", "key", "knowledge concept", "question", "A", "B", "answer")

    def prompt(self, row):
        requirement = (
            f"\n{row['requirement']}"
            if self.name == "WeMath_COT" and "requirement" in row.cells
            else ""
        )
        return _option_prompt(row) + requirement

    def check(self, row, text):
        letter = match_option(text, row.options(), self.answer_is)
        return None if letter is None else letter == row["answer"]

    def report(self, results):
        problems: dict[tuple[str, str], dict[str, int]] = defaultdict(
            dict
        )  # (steps, ID) -> part -> place in results
        for place, result in enumerate(results):
            row = result.row
            match = re.fullmatch(r"([23])steps_([123]|multi)", row["key"])
            if not match or match[2] == "3" and match[1] == "2":
                raise BenchmarkError(
                    f"{row.where}: 'key' is {_show(row['key'])}; expected such as '2steps_1' or '3steps_multi'"
                )
            parts = problems[match[1], row["ID"]]
            if match[2] in parts:
                raise BenchmarkError(
                    f"{row.where}: {row['key']} of problem {_show(row['ID'])} stands at "
                    f"{results[parts[match[2]]].row.where}, too; expected each once"
                )
            parts[match[2]] = place
        whole = [parts for (steps, _), parts in problems.items() if len(parts) == int(steps) + 1]
        if not whole:
            raise BenchmarkError(
                "no problem has all its rows: each step and the composite problem; expected at least one"
            )
        if len(whole) < len(problems):
            lacking = len(problems) - len(whole)
            warnings.warn(
                f"WeMath: {lacking} of {len(problems)} problems lack a row and do not count",
                stacklevel=2,
            )

        hits = [bool(result.hit) for result in results]
        by_letter = [letter_after_answer(result.text) == result.row["answer"] for result in results]
        one_step = [result for result in results if not result.row["key"].endswith("multi")]
        scores = self._mastery(whole, hits)
        scores["One-step(S1)"] = _accuracy(one_step)
        for key, name in (("2steps_multi", "Two-step(S2)"), ("3steps_multi", "Three-step(S3)")):
            scores[name] = _accuracy(result for result in results if result.row["key"] == key)
        concepts = _accuracies(one_step, "knowledge concept")
        unknown = sorted(
            set(concepts) - {leaf for leaves in WEMATH_DOMAINS.values() for leaf in leaves}
        )
        if unknown:
            warnings.warn(
                f"WeMath: {len(unknown)} knowledge concepts are in no domain, {_show(unknown[0])} for one",
                stacklevel=2,
            )
        scores["domain"] = {
            domain: _mean(concepts[leaf] for leaf in leaves if leaf in concepts)
            for domain, leaves in WEMATH_DOMAINS.items()
        }
        scores['letter after "Answer"'] = self._mastery(whole, by_letter)
        return scores["Score (Strict)"], scores

    @staticmethod
    def _mastery(problems: list[dict[str, int]], hits: list[bool]) -> dict[str, float | None]:
        """Shares of the problems, and RoteMemorization of those whose composite question is answered."""
        count = defaultdict(int)
        for parts in problems:
            multi = hits[parts["multi"]]
            steps = [hits[place] for part, place in parts.items() if part != "multi"]
            count["IK"] += not multi and not all(steps)
            count["IG"] += not multi and all(steps)
            count["CM", "Strict"] += multi and all(steps)
            count["CM", "Loose"] += multi and any(steps)
            count["multi"] += multi
        share, scores = lambda n: 100 * n / len(problems), {}
        for rule in ("Strict", "Loose"):
            mastered, answered = count["CM", rule], count["multi"]
            scores |= {
                f"Score ({rule})": share(mastered + 0.5 * count["IG"]),
                f"InsufficientKnowledge ({rule})": share(count["IK"]),
                f"InadequateGeneralization ({rule})": share(count["IG"]),
                f"CompleteMastery ({rule})": share(mastered),
                f"RoteMemorization ({rule})": 100 * (answered - mastered) / answered
                if answered
                else None,
            }
        return scores


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


# the leaves of We-Math's knowledge tree under its twelve second-level domains
WEMATH_DOMAINS = {
    domain: tuple(leaves.split(" | "))
    for domain, leaves in {
        "Understanding and Conversion of Units": "Conversion Rates and Calculations Between Area Units | Conversion Rates and Calculations Between Length Units | "
        "Conversion Rates and Calculations Between Volume Units (Including Liters and Milliliters)",
        "Angles and Length": "Understanding Angles (Using a Protractor) | Understanding Length (Using a Ruler)",
        "Calculation of Plane Figures": "Sum of Interior Angles of Triangles | Sum of Interior Angles of Other Polygons | Calculation and Comparison of Angles | "
        "Area of Triangles | Area of Parallelograms | Area of Trapezoids | Area of Rectangles | Area of Squares | Area of Circles | "
        "Area of Sectors | Perimeter of Triangles | Perimeter of Parallelograms | Perimeter of Trapezoids | "
        "Perimeter of Rectangles | Perimeter of Squares | Circumference of Circles",
        "Understanding of Plane Figures": "Properties and Understanding of Triangles | Properties and Understanding of Parallelograms | "
        "Properties and Understanding of Trapezoids | Properties and Understanding of Rectangles | "
        "Properties and Understanding of Squares | Understanding Triangular Rulers | Understanding and Representing Angles | "
        "Distance Between Two Points | Understanding Line Segments, Lines, and Rays | perpendicularity | Parallel | "
        "Understanding Circles | Understanding Sectors | Observing Figures",
        "Calculation of Solid Figures": "Surface Area of Cylinders | Surface Area of Rectangular Cuboids | Surface Area of Cubes | Volume and Capacity of Cones | "
        "Volume and Capacity of Cylinders | Volume and Capacity of Rectangular Cuboids | Volume and Capacity of Cubes",
        "Understanding of Solid Figures": "Expanded View of Cylinders | Expanded View of Rectangular Cuboids | Expanded View of Cubes | Properties of Cylinders | "
        "Properties of Cones | Properties and Understanding of Rectangular Cuboids | Properties and Understanding of Cubes | "
        "Observing Objects",
        "Basic Transformations of Figures": "Axial Symmetry | Translation | Rotation",
        "Cutting and Combining of Figures": "Combining and Dividing Solids | Division of Plane Figures | Combining Plane Figures | Tessellation of Figures | "
        "Folding Problems of Figures",
        "Direction": "Southeast, Southwest, Northeast, Northwest Directions | Cardinal Directions (East, South, West, North)",
        "Position": "Front-Back Position | Up-Down Position | Left-Right Position",
        "Route Map": "Determining the Positions of Objects Based on Direction, Angle, and Distance | "
        "Describing Simple Routes Based on Direction and Distance",
        "Correspondence of Coordinates and Positions": "Representing Positions Using Ordered Pairs | Finding Positions Based on Ordered Pairs",
    }.items()
}


class MathVision(Benchmark):
    """Competition mathematics with pictures, options or a free answer (arXiv 2402.14804)."""

    title = "MathVision"
    columns = ("question", "choices", "answer", "category")

    def check(self, row, text):
        choices = _literal(row["choices"], row.where, "choices")
        if not isinstance(choices, list) or len(choices) > 26:
            raise BenchmarkError(
                f"{row.where}: 'choices' is {_show(row['choices'])}; expected a list of at most 26 options"
            )
        if not choices:
            return is_equal(text, row["answer"]) or None
        letter = match_option(
            text, dict(zip(string.ascii_uppercase, map(str, choices))), self.answer_is
        )
        return None if letter is None else letter == row["answer"]

    def report(self, results):
        overall, groups = (
            _accuracy(results),
            sorted(_groups(results, lambda row: row["category"]).items()),
        )
        settled = lambda some: _percent(result.hit is not None for result in some)
        return overall, {
            "Overall": overall,
            "category": {name: _accuracy(group) for name, group in groups},
            "prefetch rate": {
                "Overall": settled(results),
                **{name: settled(group) for name, group in groups},
            },
        }


class MathVerse(Benchmark):
    """The same geometry problems with less and less of the text (arXiv 2403.14624)."""

    title, metric = "MathVerse", "mean over problem versions"

    @property
    def columns(self):
        asked = "query_cot" if "cot" in self.name else "question"
        return (
            asked,
            "question_for_eval",
            "question_type",
            "problem_version",
            "metadata",
            "answer",
        )

    def prompt(self, row):
        return row[self.columns[0]]

    def check(self, row, text):
        kind = row["question_type"]
        if kind == "free-form":
            return text.strip() == row["answer"].strip() or is_equal(text, row["answer"]) or None
        if kind != "multi-choice":
            raise BenchmarkError(
                f"{row.where}: 'question_type' is {_show(kind)}; expected 'multi-choice' or 'free-form'"
            )
        listed = row["question_for_eval"].rpartition("Choices:")[2]
        options = {
            letter: option.strip() or letter
            for letter, option in re.findall(r"(?m)^[ \t]*+([A-Z]):(.*)$", listed)
        }
        options = options or dict.fromkeys(
            "ABCD", ""
        )  # of some rows they stand in the picture alone
        letter = match_option(text, options, self.answer_is, whole=True)
        return None if letter is None else letter == row["answer"].strip()

    def report(self, results):
        facts = {}
        for result in results:
            row = result.row
            value = _literal(row["metadata"], row.where, "metadata")
            if not isinstance(value, dict) or not {"subject", "subfield"} <= value.keys():
                raise BenchmarkError(
                    f"{row.where}: 'metadata' is {_show(row['metadata'])}; expected a dict with 'subject' and "
                    "'subfield'"
                )
            facts[row.index] = value
        versions = {}
        for version, group in sorted(_groups(results, lambda row: row["problem_version"]).items()):
            versions[version] = {"Overall": _accuracy(group)}
            for kind in ("subject", "subfield"):
                parts = sorted(_groups(group, lambda row: str(facts[row.index][kind])).items())
                versions[version][kind] = {name: _accuracy(part) for name, part in parts}
        mean = _mean(scores["Overall"] for scores in versions.values())
        return mean, {self.metric: mean, "Overall": _accuracy(results), "problem_version": versions}


class LogicVista(Benchmark):
    """Logical puzzles whose options stand in the picture (arXiv 2407.04973)."""

    title = "LogicVista"
    columns = ("question", "answer", "skill")

    def check(self, row, text):
        if row["answer"].isdigit():  # of a few rows, whose options are numbered
            found = text.strip(string.whitespace + "*()[].$")
            return found == row["answer"] if found.isdigit() else None
        letters = answer_letters(text)
        return (
            None
            if letters is None
            else sorted(map(str.lower, letters)) == sorted(row["answer"].lower().split(", "))
        )

    def report(self, results):
        overall = _accuracy(results)
        skills = ("inductive", "deductive", "numerical", "spatial", "mechanical")
        return overall, {"Overall": overall} | {
            skill: _accuracy(r for r in results if skill in r.row["skill"]) for skill in skills
        }


class YesNo(Benchmark):
    """Questions to be answered by yes or no."""

    def final(self, response, unbox=True):
        return final_answer(response, unbox).replace("*", "")

    def check(self, row, text):
        if row["answer"] not in ("Yes", "No"):
            raise BenchmarkError(
                f"{row.where}: 'answer' is {_show(row['answer'])}; expected 'Yes' or 'No'"
            )
        found = yes_or_no(text)
        return None if found is None else found == row["answer"]


class HallusionBench(YesNo):
    """Illusions and edited figures, each figure under several questions (arXiv 2310.14566)."""

    title, metric = "HallusionBench", "aAcc"
    columns = ("question", "answer", "category", "l2-category")

    def report(self, results):
        def part(row: Row, number: int) -> tuple[str, str, str]:
            parts = row.index.split("_")
            if len(parts) < 6:
                raise BenchmarkError(
                    f"{row.where}: the index is {_show(row.index)}; expected six parts joined by '_', the fourth "
                    "to sixth being set, figure and question"
                )
            return row["l2-category"], parts[3], parts[number]

        def accuracies(some: list[Result]) -> dict[str, float]:
            whole = lambda number: _percent(
                map(_all_hit, _groups(some, lambda row: part(row, number)).values())
            )
            return {"aAcc": _accuracy(some), "fAcc": whole(4), "qAcc": whole(5)}

        overall = accuracies(results)
        scores = {"Overall": overall, "mean of aAcc, fAcc, qAcc": _mean(overall.values())}
        for column in ("category", "l2-category"):
            groups = sorted(_groups(results, lambda row: row[column]).items())
            scores[column] = {name: accuracies(group) for name, group in groups}
        return overall["aAcc"], scores


class MME(YesNo):
    """Two questions to each picture, points for answers and for pairs of them (arXiv 2306.13394)."""

    title, metric = "MME", "100 · (perception + reasoning) / 2800"
    columns = ("question", "answer", "category", "image_path")
    CATEGORIES = {
        "perception": (
            "OCR",
            "artwork",
            "celebrity",
            "color",
            "count",
            "existence",
            "landmark",
            "position",
            "posters",
            "scene",
        ),
        "reasoning": (
            "code_reasoning",
            "commonsense_reasoning",
            "numerical_calculation",
            "text_translation",
        ),
    }

    def report(self, results):
        known, points = sum(self.CATEGORIES.values(), ()), {}
        for category, group in _groups(results, lambda row: row["category"]).items():
            if category not in known:
                raise BenchmarkError(
                    f"{group[0].row.where}: 'category' is {_show(category)}; expected one of {', '.join(known)}"
                )
            pairs = [
                some[:2]
                for some in _groups(group, lambda row: row["image_path"]).values()
                if len(some) > 1
            ]
            single = len({r.row["image_path"] for r in group}) - len(pairs)
            if single:
                warnings.warn(
                    f"MME, {category}: {single} pictures have one question instead of two and enter no pair",
                    stacklevel=2,
                )
            if pairs:
                points[category] = _accuracy(group) + _percent(map(_all_hit, pairs))
        absent = [category for category in known if category not in points]
        if absent:
            warnings.warn(
                f"MME: no pairs of questions in {', '.join(absent)}, which add nothing to the total",
                stacklevel=2,
            )
        scores = {
            name: sum(points.get(category, 0.0) for category in group)
            for name, group in self.CATEGORIES.items()
        }
        total = scores["perception"] + scores["reasoning"]
        return total / 28, scores | {
            "total": total,
            "category": {category: points.get(category) for category in known},
        }


class MMBench(Benchmark):
    """Multiple choice, each question once per rotation of its options (arXiv 2307.06281)."""

    title, metric = "MMBench", "circular accuracy"
    columns = ("question", "A", "B", "answer", "category", "l2-category")
    SHORT = {
        "coarse_perception": "CP",
        "finegrained_perception (instance-level)": "FP-S",
        "finegrained_perception (cross-instance)": "FP-C",
        "logic_reasoning": "LR",
        "relation_reasoning": "RR",
        "attribute_reasoning": "AR",
    }

    def prompt(self, row):
        return _option_prompt(row, "Please select the correct answer from the options above. \n")

    check = WeMath.check

    def report(self, results):
        def group(row: Row) -> int:
            return (
                self._integer(row, row["g_index"], "g_index")
                if "g_index" in row.cells
                else self._integer(row, row.index) % 10**6
            )

        base = [
            result
            for result in results
            if self._integer(result.row, result.row.index) == group(result.row)
        ]
        if not base:
            raise BenchmarkError(
                "no row is the first of its rotations; expected indices below 1,000,000"
            )
        groups = _groups(results, group)
        circular = [Result(first.row, "", _all_hit(groups[group(first.row)])) for first in base]

        def accuracies(some: list[Result]) -> dict:
            abilities = {
                self.SHORT.get(name, name): value
                for name, value in _accuracies(some, "l2-category").items()
            }
            return {
                "Overall": _accuracy(some),
                "l2-category": abilities,
                "category": _accuracies(some, "category"),
            }

        scores = {}
        for name, some in (
            ("circular", circular),
            ("vanilla circ0", base),
            ("vanilla all", results),
        ):
            scores[name] = accuracies(some)
            splits = _groups(some, lambda row: row.cells.get("split", "none"))
            if len(splits) > 1:
                scores[name]["split"] = {
                    split: accuracies(part) for split, part in sorted(splits.items())
                }
        return scores["circular"]["Overall"], scores

    @staticmethod
    def _integer(row: Row, text: str, what: str = "index") -> int:
        if not re.fullmatch("[0-9]{1,18}", text):
            raise BenchmarkError(f"{row.where}: {what!r} is {_show(text)}; expected a whole number")
        return int(text)


@dataclass(frozen=True)
class Toy(Benchmark):
    """The embedded default's held-out split."""

    level: int = 1
    title = "toy"
    min_pixels = max_pixels = None  # the model's own
    max_new_tokens = 128
    prompt_mode = "train"

    @functools.cached_property
    def samples(self):
        import toy
        from config import load_config

        settings = load_config().toy
        return toy.ToyDataset(toy.LEVELS[self.level], settings.seed, "test", settings.eval_size)

    def load(self, path, pictures=False):
        if path is not None:
            raise BenchmarkError(
                f"{self.name} is drawn, not read from a file; found --data {path}, expected none"
            )
        cells = lambda sample: {
            "question": sample.question.replace("<image>", ""),
            "answer": sample.answer,
        }
        return [
            Row(f"{self.name}, sample {i}", str(i), cells(sample))
            for i, sample in enumerate(self.samples)
        ], set()

    def fingerprint(self, path):
        return self.samples.fingerprint

    def pictures(self, row, root):
        return self.samples[int(row.index)].images

    def check(self, row, text):
        return rewards.equivalent(text, row["answer"])


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        WeMath("WeMath", 1740),
        WeMath("WeMath_COT", 1740),
        MathVision("MathVision", 3040),
        MathVision("MathVision_MINI", 304),
        MathVerse("MathVerse_MINI", 3940),
        *(
            MathVerse(f"MathVerse_MINI_{version}", 788)
            for version in (
                "Vision_Only",
                "Vision_Only_cot",
                "Vision_Dominant",
                "Vision_Intensive",
                "Text_Lite",
                "Text_Dominant",
            )
        ),
        LogicVista("LogicVista", 447),
        HallusionBench("HallusionBench", 951),
        MME("MME", 2374),
        *(MMBench(f"MMBench_DEV_{language}", 4300, about=True) for language in ("EN", "CN")),
        *(MMBench(f"MMBench_DEV_{language}_V11", 4900, about=True) for language in ("EN", "CN")),
        *(MMBench(f"MMBench_TEST_{language}", 6666, answers=False) for language in ("EN", "CN")),
        *(
            MMBench(f"MMBench_TEST_{language}_V11", 7000, about=True, answers=False)
            for language in ("EN", "CN")
        ),
        MMBench("MMBench"),
        MMBench("MMBench_V11"),
        Toy("toy", 200),
        Toy("toy_level2", 200, level=2),
        Toy("toy_level3", 200, level=3),
    )
}
# the paper's table 1, with its average over all seven
TABLE = {
    "mathematical": ("WeMath", "MathVision", "MathVerse", "LogicVista"),
    "visual-centric": ("HallusionBench", "MME", "MMBench"),
}


def find(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, cutoff=0.3) or BENCHMARKS
        raise BenchmarkError(f"no benchmark {name!r}; nearest: {', '.join(near)}")
    return BENCHMARKS[name]


# ---- 4. Scoring ----------------------------------------------------------------------------------------------------


def read_responses(path: str | Path) -> dict[str, dict[int, str]]:
    """{index: {sample: response}} of a file with lines {"index": …, "response": …}, or {"index": …, "sample": 0, "response": …}
    where there are several to a row. Raises BenchmarkError for a broken line and for a response that stands twice."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise BenchmarkError(
            f"{path} cannot be read ({reason}); expected responses as JSONL{_near_file(path)}"
        ) from error
    responses: dict[str, dict[int, str]] = defaultdict(dict)
    twice = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        index, sample, response = _parse_response(line, f"{path}, line {number}")
        if sample in responses[index]:
            twice[_name(index, sample)] = None
        responses[index][sample] = response
    if twice:
        raise BenchmarkError(
            f"{path}: {len(twice)} responses stand more than once: {_listed(twice)}; expected each once"
        )
    return dict(responses)


def _parse_response(line: bytes, where: str) -> tuple[str, int, str]:
    try:
        row = json.loads(line)
        index, sample, response = row["index"], row.get("sample", 0), row["response"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {str(error)[:100]}"
        raise BenchmarkError(
            f'{where}: {found}; expected {{"index": …, "response": "…"}}'
        ) from error
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(index, (str, int)) or isinstance(index, bool):
        raise BenchmarkError(f'{where}: "index" is {_show(index)}; expected text or a whole number')
    if type(sample) is not int or not 0 <= sample < 10**6:
        raise BenchmarkError(
            f'{where}: "sample" is {_show(sample)}; expected a whole number from 0'
        )
    if not isinstance(response, str) and not number(response):
        raise BenchmarkError(f'{where}: "response" is {_show(response)}; expected text')
    return str(index), sample, str(response)


def _name(index: str, sample: int) -> str:
    return _show(index) if sample == 0 else f"{_show(index)} (sample {sample})"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_LISTED]) + (
        f", … and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    )


def score(
    benchmark: Benchmark,
    rows: list[Row],
    responses: dict[str, dict[int, str]],
    mode: str,
    dropped: Iterable[str] = (),
    allow_missing: bool = False,
    judge: Callable[[str, str, dict], str | bool] | None = None,
    judge_name: str = "custom",
) -> dict:
    """Score responses {index: {sample: text}} to the rows by the benchmark's rule, on the whole response (mode "raw") or its
    final answer ("final"). Returns what `evaluate.py score` prints; with n samples to a row, all scores are means over the
    samples, and pass@k for k = 1, 2, 4 … n is added.

    judge(response, answer, row's cells) is asked about rows that the rule could not settle; it returns what the response
    answers, which goes through the same rule, or True or False. dropped: indices that need no response.
    Raises BenchmarkError for missing responses, unless `allow_missing`: then they are wrong.
    """
    if not benchmark.answers:
        raise BenchmarkError(
            f"the answers of {benchmark.name} are not public; submit the responses to its server"
        )
    unknown = sorted(responses.keys() - {row.index for row in rows} - set(dropped))
    if unknown:
        names = _listed(map(_show, unknown))
        raise BenchmarkError(
            f"{len(unknown)} responses are to rows that {benchmark.name}'s file does not have: {names}"
        )
    samples = 1 + max((sample for found in responses.values() for sample in found), default=0)
    missing = [
        (row.index, sample)
        for row in rows
        for sample in range(samples)
        if sample not in responses.get(row.index, ())
    ]
    if missing:
        text = f"{len(missing)} of {len(rows) * samples} responses are missing: {_listed(_name(*pair) for pair in missing)}"
        if not allow_missing:
            raise BenchmarkError(f"{text}; --allow-missing scores them as wrong")
        warnings.warn(f"{text}; scored as wrong", stacklevel=2)

    headlines, reports, hits, unmatched = [], [], defaultdict(int), 0
    for sample in range(samples):
        results = []
        for row in tqdm(rows, benchmark.name, disable=judge is None):
            response = responses.get(row.index, {}).get(sample)
            result = (
                Result(row, "", False)
                if response is None
                else _check(benchmark, row, response, mode, judge)
            )
            unmatched += result.hit is None
            hits[row.index] += bool(result.hit)
            results.append(result)
        headline, scores = benchmark.report(results)
        headlines.append(headline)
        reports.append(scores)
    scores = _average(reports)
    if samples > 1:
        for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):
            scores[f"pass@{k}"] = 100 * _mean(
                pass_at_k(samples, hits[row.index], k) for row in rows
            )
    counts = {
        "rows": len(rows),
        "scored": len(rows) * samples - len(missing),
        "unmatched": unmatched,
        "missing": len(missing),
    }
    return {
        "benchmark": benchmark.name,
        "mode": mode,
        "headline": {"metric": benchmark.metric, "value": _mean(headlines)},
        "scores": scores,
        "counts": counts,
        "judge": NO_JUDGE if judge is None else judge_name,
    }


def _check(
    benchmark: Benchmark, row: Row, response: str, mode: str, judge: Callable | None
) -> Result:
    text = benchmark.final(response) if mode == "final" else response
    # VLMEvalKit keeps predictions in a spreadsheet, out of which these come as "nan"
    hit = None if text in MISSING and mode == "raw" else benchmark.check(row, text)
    if (
        hit is None
        and mode == "final"
        and (around := benchmark.final(response, unbox=False)) != text
    ):
        hit = benchmark.check(row, around)  # "The area is \boxed{24}. So the answer is C."
        text = text if hit is None else around
    if hit is None and judge is not None:
        try:
            verdict = judge(response, row["answer"], dict(row.cells))
        except Exception as error:
            raise BenchmarkError(
                f"{row.where}: the judge failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(verdict, (str, bool)):
            raise BenchmarkError(
                f"{row.where}: the judge returned {type(verdict).__name__}; expected text, True or False"
            )
        hit = verdict if isinstance(verdict, bool) else benchmark.check(row, verdict)
    return Result(row, text, hit)


def _average(trees: list[Any]) -> Any:
    """The mean of dicts of dicts of numbers, entry by entry; None where one is None."""
    if isinstance(trees[0], dict):
        return {key: _average([tree[key] for tree in trees]) for key in trees[0]}
    return None if None in trees else _mean(trees)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k responses is right, estimated without bias from n of which c are: 1 − C(n−c, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)
