"""dataset_rows.py: what one row of a public data set says, as a row of this project.

    columns = find_columns(["images", "problem", "answer", "id"])
    row, pictures = convert({"problem": "How many?", "answer": r"\\boxed{3}", …}, columns, None)

The cells of a row are what pyarrow makes of them: texts, numbers, bytes, lists and dictionaries.
Nothing in them is trusted. `convert` raises RowProblem for a row that training could not use, which
`rows.parse_row` and `train.reference_of` decide, as they will when training reads the row.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.files import BenchmarkError, read_literal
from rewards import read_reference
from rewards.choices import choice
from rows import (
    IMAGE_FORMATS,
    IMAGE_MARKER,
    ROW_KEYS,
    DataError,
    decode_image,
    nearest,
    open_image,
    parse_row,
    show,
)
from train import reference_of

# Where the sets of the field keep things. The first of these that a file has is taken.
QUESTION_COLUMNS = ("problem", "question", "query", "prompt")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
IMAGE_COLUMNS = ("images", "image")
OPTIONS_COLUMNS = ("options", "choices")
ID_COLUMNS = ("id", "qid", "question_id", "sample_index", "uid")
NO_COLUMN = "none"  # as the name of a column: there is none, whatever the file has

MOST_TEXT = 100_000  # characters of a question or an answer
MOST_BYTES = 2**26  # of the file of one picture
MOST_PICTURES = 64  # of one row
MOST_EXTRA = 1000  # characters, as JSON, of another value that goes along

FILE_ENDINGS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
FILE_ENDINGS |= {"MPO": "jpg", "TIFF": "tif"}


class RowProblem(DataError):
    """A row that cannot be used: `reason` is one of a few sentences, the message says the rest."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """The file of a picture that was decoded once, and may therefore be written."""

    content: bytes = field(repr=False)
    ending: str
    area: int  # pixels

    @property
    def name(self) -> str:
        """The same for the same content, and nothing that the data set could choose."""
        return f"{hashlib.sha256(self.content).hexdigest()[:32]}.{self.ending}"


# ------------------------------------------------------------------------------------------ columns


@dataclass(frozen=True)
class Columns:
    """The column of each thing. A name with a dot may lead into a struct."""

    question: str
    answer: str
    images: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # one column of all options, or a column of each
    id: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def used(self) -> list[str]:
        named = [self.question, self.answer, *self.images, *self.options, self.id]
        return [name for name in named if name is not None]

    @property
    def read(self) -> list[str]:
        """Each of them once."""
        return list(dict.fromkeys([*self.used, *self.extra]))


def find_columns(present: list[str], wanted: dict[str, str | None], keep: str | None) -> Columns:
    """Choose among the columns of a file. Raises ValueError where nothing fits.

    present: the names, also those inside of structs, as "reward_model.ground_truth".
    wanted: "question", "answer", "image", "options", "id" -> the name that the user gave, if any.
    keep: names of other columns, with commas between them; None keeps all that are small.
    """

    def choose(what: str, usual: tuple[str, ...]) -> str | None:
        given = wanted.get(what)
        if given is not None:
            return None if given == NO_COLUMN else _existing(given, present, f"--{what}")
        return next((name for name in usual if name in present), None)

    def choose_needed(what: str, usual: tuple[str, ...]) -> str:
        name = choose(what, usual)
        if name is None:
            raise ValueError(
                f"no column holds the {what}; expected one of {', '.join(usual)}, or its name with "
                f"--{what}; found the columns {', '.join(present[:30]) or 'none'}"
            )
        return name

    def choose_some(what: str, usual: tuple[str, ...]) -> tuple[str, ...]:
        given = wanted.get(what)
        if given is not None and "," in given:
            return tuple(_existing(name, present, f"--{what}") for name in given.split(","))
        name = choose(what, usual)
        return () if name is None else (name,)

    options = choose_some("options", OPTIONS_COLUMNS)
    if not options and wanted.get("options") is None:
        options = lettered(present)
    columns = Columns(
        question=choose_needed("question", QUESTION_COLUMNS),
        answer=choose_needed("answer", ANSWER_COLUMNS),
        images=choose_some("image", IMAGE_COLUMNS),
        options=options,
        id=choose("id", ID_COLUMNS),
    )
    return replace(columns, extra=_others(present, columns, keep))


def lettered(present: Collection[str]) -> tuple[str, ...]:
    """The columns A, B, … of MMBench and others, if there are two or more of them."""
    letters = tuple(itertools.takewhile(present.__contains__, string.ascii_uppercase))
    return letters if len(letters) > 1 else ()


def _existing(name: str, present: list[str], option: str) -> str:
    if name not in present:
        raise ValueError(f"{option}: there is no column {name!r}; {nearest(name, present)}")
    return name


def _others(present: list[str], columns: Columns, keep: str | None) -> tuple[str, ...]:
    """The columns that go along as extra values."""
    if keep is not None:
        names = [name for name in keep.split(",") if name]
        for name in names:
            _existing(name, present, "--keep")
            if name in ROW_KEYS:
                raise ValueError(f"--keep: {name!r} is a key of its own in a row of training data")
        return tuple(names)
    # A struct whose part is the answer would bring the answer along a second time.
    used = {part for name in columns.used for part in (name, name.partition(".")[0])}
    return tuple(
        name for name in present if name not in used | ROW_KEYS and name.partition(".")[0] == name
    )


def cell_of(cells: dict[str, Any], name: str | None) -> Any:
    """What stands in a column, or in a part of a struct; None where there is nothing."""
    if name is None or name in cells:
        return cells.get(name)
    value: Any = cells
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# --------------------------------------------------------------------------------------- whole rows


def convert(
    cells: dict[str, Any], columns: Columns, root: Path | None
) -> tuple[dict[str, Any], list[Picture]]:
    """A row for a JSONL file, and its pictures in the order of their markers. Raises RowProblem.

    root: the folder that paths of pictures are relative to. The row names each picture as
    images/NAME; its id is None where the set has none.
    """
    row_id = _read_id(cell_of(cells, columns.id))
    question = read_question(cell_of(cells, columns.question))
    answer = read_answer(cell_of(cells, columns.answer))
    options = read_options(_options_cell(cells, columns.options))
    if options:
        answer = letter_of(answer, options)
        if not has_options(question, options):
            question = with_options(question, options)
    row = {"id": row_id, "question": question, "answer": str(answer)}
    row |= _extra_values(cells, columns)

    # Pictures come last, under other names until then: only a good row is worth their time.
    image_cells = _image_cells(cells, columns.images)
    row["images"] = [f"images/{number}" for number in range(len(image_cells))]
    row = _checked(row)
    pictures = [
        read_picture(cell, root, f"picture {number}")
        for number, cell in enumerate(image_cells, start=1)
    ]
    row["images"] = [f"images/{picture.name}" for picture in pictures]
    return row, pictures


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row as training will read it. Raises RowProblem where training would refuse it."""
    with _as_problem("training would refuse the row"):
        parsed = parse_row(json.dumps(row).encode(), line=1)
    with _as_problem("the answer cannot be matched"):
        try:
            answer = reference_of(parsed.answer)
        except DataError as error:
            raise DataError(f"found {show(parsed.answer)}; {error}") from error
    # What is nested reaches no reward, so it does not go along.
    return {
        "id": row["id"],
        "images": list(parsed.images),
        "question": parsed.question,
        "answer": answer,
        **parsed.extra,
    }


@contextlib.contextmanager
def _as_problem(reason: str) -> Iterator[None]:
    """Give a DataError the reason under which it is counted."""
    try:
        yield
    except RowProblem:
        raise
    except DataError as error:
        # Pillow names a file in memory by its address, which tells nobody anything.
        said = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))
        raise RowProblem(reason, said) from error


def _read_id(value: Any) -> str | None:
    if value is None or value == "":
        return None
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > MOST_EXTRA:
        raise RowProblem("the id cannot be used", f"found {show(value)}; expected text or a number")
    return str(value)


def _whole(value: Any) -> Any:
    """7 for 7.0: pandas writes whole numbers as fractions where some are missing."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _extra_values(cells: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The values of other columns that JSON can hold and that are small."""
    values = {}
    for name in columns.extra:
        value = cell_of(cells, name)
        try:
            is_small = len(json.dumps(value, allow_nan=False)) <= MOST_EXTRA
        except (TypeError, ValueError, RecursionError):
            continue  # bytes, dates, decimals, NaN
        if value is not None and is_small:
            values[name] = value
    return values


# -------------------------------------------------------------------------- questions and answers


def read_question(value: Any) -> str:
    """The text of a question: a text, or a chat with one turn of the user's."""
    text = _text_of_chat(value) if isinstance(value, list) else value
    if not isinstance(text, str) or not text.replace(IMAGE_MARKER, "").strip():
        raise RowProblem("no question", f"found {show(value)} as the question; expected text")
    return _bounded(text, "question")


def _bounded(text: str, what: str) -> str:
    if len(text) > MOST_TEXT:
        raise RowProblem(
            "text is too long",
            f"the {what} has {len(text)} characters; expected at most {MOST_TEXT}",
        )
    return text


def _text_of_chat(turns: list) -> str:
    """The user's turn. A system text is left out: that of training is data.prompt_template."""
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    asked = [role for role in roles if role != "system"]
    if asked != ["user"]:
        shown = ", ".join(show(role) for role in roles[:5])
        raise RowProblem(
            "the chat has other turns",
            f"found turns of [{shown}]; expected one of 'user', perhaps after 'system'",
        )
    content = turns[roles.index("user")].get("content")
    if not isinstance(content, list):
        return content
    return "".join(_text_of_part(part) for part in content)


def _text_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url"):
        return IMAGE_MARKER
    raise RowProblem(
        "the chat has other parts", f"found a part of type {show(kind)}; expected text or image"
    )


def read_answer(value: Any) -> str | int | float:
    """The reference, out of the tags or the box that a solution ends with; a number stays one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    value = _whole(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value):
        return value
    if not isinstance(value, str) or not value.strip():
        raise RowProblem("no answer", f"found {show(value)} as the answer; expected text")
    return read_reference(_bounded(value, "answer"))


# ------------------------------------------------------------------------------------------ options


def _options_cell(cells: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The cell of all options; of a column each the cells, up to the last that is not empty."""
    if len(names) < 2:
        return cell_of(cells, names[0]) if names else None
    options = [cell_of(cells, name) for name in names]
    while options and _is_empty(options[-1]):
        options.pop()
    return options


def _is_empty(value: Any) -> bool:
    """Whether a cell holds nothing. pandas has NaN where a text is missing."""
    return value is None or value == "" or value != value


def read_options(value: Any) -> dict[str, str]:
    """Letter -> text of each option; {} where there are none.

    The cell is a list, a dictionary of letters, or one of these as text.

    >>> read_options('["12 cm", "13 cm"]'), read_options({"label": ["A"], "text": ["1"]})
    ({'A': '12 cm', 'B': '13 cm'}, {'A': '1'})
    """
    if isinstance(value, str) and value.strip():
        value = _options_in_text(value)
    if isinstance(value, dict):
        value = _options_of_dictionary(value)
    if value is None or value == "" or value == []:
        return {}
    if not isinstance(value, list) or len(value) > len(string.ascii_uppercase):
        raise _bad_options(value)
    options = {}
    for letter, option in zip(string.ascii_uppercase, value, strict=False):
        if isinstance(option, bool) or not isinstance(option, str | int | float):
            raise _bad_options(option)
        if isinstance(option, float) and not math.isfinite(option):
            raise _bad_options(option)
        options[letter] = _bounded(str(_whole(option)).strip(), "option")
    if not all(options.values()):
        raise RowProblem("the options cannot be read", "found an option without text")
    return _without_letters(options)


def _bad_options(value: Any) -> RowProblem:
    return RowProblem(
        "the options cannot be read",
        f"found {show(value)}; expected a list or a dictionary of at most 26 texts",
    )


def _options_in_text(text: str) -> Any:
    """The value of JSON or, as MMMU has it, of a Python literal."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return read_literal(text, "this row", "options")
    except BenchmarkError as error:
        raise RowProblem("the options cannot be read", str(error)) from error


def _options_of_dictionary(value: dict) -> list:
    """The texts in the order of their letters."""
    if value.keys() == {"label", "text"} and isinstance(value["text"], list):
        return value["text"]
    # In a Parquet file all rows have the keys of all; those of other rows are empty.
    present = {key: text for key, text in value.items() if text is not None}
    letters = list(string.ascii_uppercase[: len(present)])
    if sorted(present) != letters:
        raise _bad_options(", ".join(map(str, present)))
    return [present[letter] for letter in letters]


def _without_letters(options: dict[str, str]) -> dict[str, str]:
    """ "(A) 12 cm" is "12 cm", where each option begins with its own letter."""
    plain = {}
    for letter, text in options.items():
        match = re.fullmatch(rf"(?:\({letter}\)|{letter}[.):])\s*(\S.*)", text, re.DOTALL)
        if match is None:
            return options
        plain[letter] = match[1]
    return plain


def has_options(question: str, options: dict[str, str]) -> bool:
    """Whether a question already lists the options, each behind its letter."""
    # Sets differ in the space around letters: "A:145°", "(A) 145°".
    squeezed = "".join(question.split())
    return all(
        any(f"{letter}{mark}{''.join(text.split())}" in squeezed for mark in ".):")
        for letter, text in options.items()
    )


def with_options(question: str, options: dict[str, str]) -> str:
    """The question with its options, as the benchmarks list them (benchmark.option_prompt)."""
    lines = [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([question.rstrip(), "Options:", *lines])


def letter_of(answer: str | int | float, options: dict[str, str]) -> str:
    """The letter of the option that an answer names: by letter, by its text, or as a place from 0.

    Raises RowProblem where it names none, or one option by one reading and another by another.
    """
    # All three readings are tried: options such as "B", "A" or 2, 3, 1 make them disagree.
    text = str(answer).strip()
    letters = {letter for letter, option in options.items() if option == text}
    if isinstance(answer, int) and 0 <= answer < len(options):
        letters.add(list(options)[answer])
    stated = choice(text)
    if stated in options:
        letters.add(stated)
    if len(letters) != 1:
        found = "none" if not letters else f"{len(letters)}, {' and '.join(sorted(letters))}"
        raise RowProblem(
            "the answer is not one of the options",
            f"found {show(answer)}, which names {found} of {len(options)} options; "
            "expected one (--options none asks without options)",
        )
    return letters.pop()


# ----------------------------------------------------------------------------------------- pictures


def _image_cells(cells: dict[str, Any], names: tuple[str, ...]) -> list:
    """The pictures of a row: bytes, structs of bytes and path, or paths."""
    image_cells = []
    for name in names:
        value = cell_of(cells, name)
        image_cells += value if isinstance(value, list) else [value]
    present = [cell for cell in image_cells if cell is not None and cell != ""]
    if len(present) > MOST_PICTURES:
        raise RowProblem(
            "too many pictures", f"found {len(present)}; expected at most {MOST_PICTURES}"
        )
    return present


def read_picture(cell: Any, root: Path | None, what: str) -> Picture:
    """The file of one picture, decoded once. Raises RowProblem."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        cell = _content_of_file(cell, root, what)
    if not isinstance(cell, bytes):
        raise RowProblem(
            "a picture cannot be read",
            f"{what}: found {show(cell)}; expected bytes, a struct with bytes or a path, or a path",
        )
    if len(cell) > MOST_BYTES:
        raise RowProblem(
            "a picture cannot be read",
            f"{what} has {len(cell)} bytes; expected at most {MOST_BYTES}",
        )
    with _as_problem("a picture cannot be read"):
        decoded = decode_image(io.BytesIO(cell), what)
    area = decoded.width * decoded.height
    with Image.open(io.BytesIO(cell), formats=IMAGE_FORMATS) as image:
        ending = FILE_ENDINGS[image.format]
        has_frames = _has_frames(image)
    if not has_frames:
        return Picture(cell, ending, area)
    first_frame = io.BytesIO()
    decoded.save(first_frame, format="PNG")
    return Picture(first_frame.getvalue(), "png", area)


def _has_frames(image: Image.Image) -> bool:
    """Whether a file holds more than its first picture."""
    if image.format == "MPO":
        return False  # the other view of a stereo photograph
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # whatever a broken second frame makes Pillow stumble over
        return True


def _content_of_file(path: str, root: Path | None, what: str) -> bytes:
    """The bytes of a picture in a folder, which its path may not leave."""
    if root is None:
        raise RowProblem(
            "a picture is a path",
            f"{what} is the path {show(path)}; name the folder of the pictures with --images",
        )
    with _as_problem("a picture cannot be read"), open_image(path, root) as file:
        # A picture must be there before anything is copied.
        decode_image(file, what)
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise DataError(f"{what} is a file of more than {MOST_BYTES} bytes")
        file.seek(0)
        return file.read()
