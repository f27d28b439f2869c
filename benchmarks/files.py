"""files.py: the rows of a VLMEvalKit TSV file, which may hold anything.

`read_tsv` checks a whole file before anything is scored or generated. No cell is ever executed, no
picture is decoded here, and everything wrong is a BenchmarkError that names the file, the line and
the column.
"""

import ast
import csv
import difflib
import re
import string
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What pandas.read_csv takes for a missing cell. VLMEvalKit reads its files with it, so that an
# option called "None" does not exist there.
MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"]
    + ["<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
)
MAX_FIELD = 2**28  # characters of one cell; an unclosed quote swallows the rest of a file
MAX_LITERAL = 10**5  # characters of a cell that holds a Python literal, images apart
MAX_PICTURES = 1000  # of one row
MAX_POINTER = 64  # characters: a longer image cell is a picture


class BenchmarkError(ValueError):
    """Anything wrong with a benchmark's file or with responses to it.

    The message names the place, what was found and what was expected.
    """


@dataclass(frozen=True)
class Row:
    """One question. `row[column]` is the text of a cell; missing cells are no keys of `cells`."""

    where: str  # "FILE, line 7"
    index: str
    cells: dict[str, str]  # without the pictures
    images: tuple[str, ...] = ()  # pictures in base64, or paths of pictures
    encoded: bool = True  # whether `images` are base64

    def __getitem__(self, column: str) -> str:
        if column not in self.cells:
            raise BenchmarkError(f"{self.where}: {column!r} is empty; expected a value")
        return self.cells[column]

    def options(self) -> dict[str, str]:
        """Letter -> text of the options that exist."""
        return {
            letter: self.cells[letter] for letter in string.ascii_uppercase if letter in self.cells
        }


# --------------------------------------------------------------------------------------------- rows


def read_tsv(
    path: str | Path, columns: Iterable[str], pictures: bool
) -> tuple[list[Row], set[str]]:
    """The rows of a VLMEvalKit TSV file, and the indices of the rows that it drops.

    columns: those that the file must have, besides `index`. pictures: whether the rows get their
    images; without, images are neither kept nor checked.

    A row whose `image` is empty is dropped. An image cell of at most 64 characters is the index of
    the row that holds the picture. Raises BenchmarkError.
    """
    header, records = _read_records(path, columns, pictures)
    kept = [row for row in records if "image" in row.cells or "image" not in header]
    if not kept:
        found = "no row with an image" if records else "no rows"
        raise BenchmarkError(f"{path} has {found}; expected at least one")
    dropped = {row.index for row in records} - {row.index for row in kept}
    if pictures:
        held = {
            row.index: row.cells["image"]
            for row in kept
            if len(row.cells.get("image", "")) > MAX_POINTER
        }
        kept = [_with_images(row, held) for row in kept]
    else:
        for row in kept:
            row.cells.pop("image", None)
    return kept, dropped


def _read_records(
    path: str | Path, columns: Iterable[str], pictures: bool
) -> tuple[list[str], list[Row]]:
    """The header, and all rows with the image cell among their cells."""
    # The limit belongs to the whole process, so it is put back.
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t", strict=True)
            try:
                header = next(reader, [])
                _check_header(path, header, columns, pictures)
                return header, list(_records(path, reader, header, pictures))
            except csv.Error as error:
                raise BenchmarkError(
                    f"{path}, line {reader.line_num}: {error}; expected tab-separated cells, "
                    f"quoted as pandas writes them, of at most {MAX_FIELD} characters"
                ) from error
    except OSError as error:
        reason = error.strerror or error
        raise BenchmarkError(
            f"{path} cannot be read ({reason}); expected a TSV file{names_near(path)}"
        ) from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(
            f"{path} is not UTF-8 ({error.reason}); expected a TSV file in UTF-8"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_header(
    path: str | Path, header: list[str], columns: Iterable[str], pictures: bool
) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise BenchmarkError(
            f"{path}: the column {show(twice[0])} stands twice in the header; expected each once"
        )
    wanted = ["index", *columns]
    if pictures and "image" not in header and "image_path" not in header:
        wanted.append("image")
    missing = [name for name in wanted if name not in header]
    if missing:
        near = ", ".join(difflib.get_close_matches(missing[0], header[:100])) or "none"
        present = ", ".join(header[:30]) or "nothing"
        raise BenchmarkError(
            f"{path}: no column {', '.join(map(repr, missing))}; "
            f"found the columns {present[:400]}; nearest: {near}"
        )


def _records(
    path: str | Path, reader: Iterator[list[str]], header: list[str], pictures: bool
) -> Iterator[Row]:
    lines: dict[str, int] = {}
    for values in reader:
        if not values:  # a blank line
            continue
        row = _record(f"{path}, line {reader.line_num}", values, header, pictures=pictures)
        if row.index in lines:
            raise BenchmarkError(
                f"{row.where}: the index {show(row.index)} stands on line {lines[row.index]}, too; "
                "expected each once"
            )
        lines[row.index] = reader.line_num
        yield row


def _record(where: str, values: list[str], header: list[str], pictures: bool) -> Row:
    """One line of the file, whose image cell still stands among its cells."""
    if len(values) != len(header):
        raise BenchmarkError(
            f"{where}: found {len(values)} cells; expected {len(header)}, as many as the header has"
        )
    cells = {}
    for name, value in zip(header, values, strict=True):
        if "\0" in value:
            raise BenchmarkError(f"{where}: {name!r} holds a NUL character; expected text")
        if value not in MISSING:
            cells[name] = value
    if "image" in cells and not pictures:
        # The pictures of a file can be gigabytes. Only whether there is one matters now.
        cells["image"] = ""
    if "index" not in cells:
        raise BenchmarkError(f"{where}: 'index' is empty; expected a value")
    return Row(where, cells["index"], cells)


def _with_images(row: Row, held: dict[str, str]) -> Row:
    """The row with its pictures. held: index -> image cell of the rows that hold a picture."""
    column = "image" if "image" in row.cells else "image_path"
    cell = row[column]
    if column == "image" and len(cell) <= MAX_POINTER:
        if cell not in held:
            raise BenchmarkError(
                f"{row.where}: the image is {cell!r}, too short for a picture and not the index of "
                "a row that holds one; expected base64 or such an index"
            )
        cell = held[cell]
    return Row(
        where=row.where,
        index=row.index,
        cells={name: value for name, value in row.cells.items() if name != "image"},
        images=tuple(_list_of_texts(cell, row.where, column)),
        encoded=column == "image",
    )


# -------------------------------------------------------------------------------------------- cells


def read_literal(text: str, where: str, column: str, limit: int = MAX_LITERAL) -> Any:
    """The value of a Python literal, such as "['a', 'b']". Nothing is executed.

    Raises BenchmarkError.
    """
    try:
        if len(text) > limit:
            raise ValueError(f"{len(text)} characters; at most {limit} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of escapes such as \d
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        raise BenchmarkError(
            f"{where}: {column!r} is {show(text)}, which cannot be read ({reason[:100]}); "
            "expected a Python literal"
        ) from error


_TEXT = re.compile(r"\s*+('[^'\\]*+(?:\\.[^'\\]*+)*+'|\"[^\"\\]*+(?:\\.[^\"\\]*+)*+\")\s*+,?", re.S)


def _is_short_list_of_texts(cell: str) -> bool:
    """Whether a cell is a list of at most MAX_PICTURES quoted texts, and nothing else."""
    place = 1  # after the opening bracket
    for _ in range(MAX_PICTURES):
        match = _TEXT.match(cell, place)
        if match is None:
            break
        place = match.end()
    return not cell[place:-1].strip()


def _list_of_texts(cell: str, where: str, column: str) -> list[str]:
    """ "a" -> ["a"], "['a', 'b']" -> ["a", "b"]."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    limit = MAX_LITERAL
    if column == "image" and _is_short_list_of_texts(cell):
        limit = MAX_FIELD  # of a few long texts: parsing takes no more memory than they do
    value = read_literal(cell, where, column, limit)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise BenchmarkError(
            f"{where}: {column!r} is {show(cell)}; expected one value, or a list of texts"
        )
    return value


# ----------------------------------------------------------------------------------- error messages


def show(value: Any) -> str:
    """`value` for an error message: at most 100 characters."""
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "…"


def names_near(path: str | Path) -> str:
    """A hint for a file that cannot be read: names like its own in its folder."""
    try:
        names = [other.name for other in Path(path).parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(Path(path).name, names)
    return f"; near names: {', '.join(near)}" if near else ""
