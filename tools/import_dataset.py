"""import_dataset.py: a public data set of Parquet files as a file to train on.

    python -m tools.import_dataset train-*.parquet --out data/geometry3k --validation 200

writes FOLDER/train.jsonl, FOLDER/validation.jsonl and FOLDER/images/, which train.py reads, and
FOLDER/skipped.jsonl with the rows that cannot be used and why. At the end it prints the command
that trains on them. Interrupted, the same command goes on where it was. Needs pyarrow.

The columns of the usual sets are found by their names; options name others. dataset_rows.py reads
a single row.
"""

import argparse
import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import DEFAULTS, Config, load_config
from rows import excerpt, read_jsonl
from run_folder import exclusive, python_command, remove_folder, remove_partial, write_file
from tools.command import command
from tools.dataset_rows import (
    ANSWER_COLUMNS,
    ID_COLUMNS,
    IMAGE_COLUMNS,
    OPTIONS_COLUMNS,
    QUESTION_COLUMNS,
    Columns,
    RowProblem,
    convert,
    find_columns,
    lettered,
)

READ_AT_ONCE = 2**20  # bytes of a column
ROWS_AT_ONCE = 16  # in memory, with their pictures
FOOTER = 2**16  # bytes at the end of a Parquet file, which say where its content is and what
RECORD = "import.json"  # what the folder is made from; with "result" once it is finished
LISTED = 3  # rows of each reason

# What a prompt takes, roughly: the tokenizer is not at hand.
TOKEN_AREA = 28 * 28  # pixels of an image token of Qwen2.5-VL
CHARACTERS_OF_A_TOKEN = 2  # English has four, LaTeX and Chinese have fewer
TEMPLATE_TOKENS = 64


@dataclass(frozen=True)
class Source:
    """A Parquet file, opened."""

    path: Path
    file: Any  # pyarrow.parquet.ParquetFile
    present: tuple[str, ...]  # its columns, and the parts of those that are structs

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from another file, wherever it lies."""
        size = self.path.stat().st_size
        with open(self.path, "rb") as stream:
            stream.seek(max(0, size - FOOTER))
            footer = hashlib.sha256(stream.read()).hexdigest()
        return {"name": self.path.name, "bytes": size, "footer": footer}


# ------------------------------------------------------------------------------------------ reading


def open_sources(paths: list[Path]) -> list[Source]:
    """All files, with their heads checked. Raises ValueError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        needed = next(line for line in _requirements() if line.startswith("pyarrow"))
        raise ValueError(
            f"this tool needs pyarrow ({error}): {python_command()} -m pip install {needed}"
        ) from None
    twice = [path for path, count in Counter(map(Path.resolve, paths)).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice; expected each file once")
    sources = []
    for path in paths:
        try:
            # Without a buffer, pyarrow would read a whole row group at once, often the whole file.
            file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_AT_ONCE)
            schema = file.schema_arrow
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} cannot be read ({excerpt(str(error), 200)}); expected a Parquet file"
            ) from error
        if len(set(schema.names)) < len(schema.names):
            raise ValueError(f"{path} has two columns of one name; expected each once")
        sources.append(Source(path, file, tuple(_names_in(schema))))
    return sources


def _requirements() -> list[str]:
    return DEFAULTS.with_name("requirements-dev.txt").read_text(encoding="utf-8").splitlines()


def _names_in(schema) -> Iterator[str]:
    import pyarrow

    for column in schema:
        yield column.name
        if pyarrow.types.is_struct(column.type):
            yield from (f"{column.name}.{part.name}" for part in column.type)


def check_pictures(source: Source, columns: Columns) -> None:
    """Raise ValueError where a column holds files, but nobody said whether they are its pictures.

    A row without them would become a question about nothing.
    """
    top = {name.partition(".")[0] for name in columns.used} | set(columns.images)
    others = [
        column.name
        for column in source.file.schema_arrow
        if _holds_bytes(column.type) and column.name not in top
    ]
    if others:
        raise ValueError(
            f"{source.path}: the columns {', '.join(map(repr, others))} hold bytes, which may be "
            "pictures; name the columns of the pictures: --image COLUMN or --image COLUMN,COLUMN"
        )


def _holds_bytes(kind) -> bool:
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return True
    if types.is_fixed_size_binary(kind):
        return True
    if types.is_dictionary(kind):  # each value once, and its place wherever it stands
        return _holds_bytes(kind.value_type)
    # What lists, structs and maps are made of.
    return any(_holds_bytes(kind.field(place).type) for place in range(kind.num_fields))


def rows_of(source: Source, group: int, names: list[str]) -> Iterator[dict[str, Any] | RowProblem]:
    """The cells of each row of a row group, or what is wrong with them, a few rows in memory.

    Raises ValueError where the file is broken.
    """
    import pyarrow

    try:
        batches = source.file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names)
        for batch in batches:
            for place in range(batch.num_rows):
                yield _cells(batch, place)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{source.path}, row group {group}: {excerpt(str(error), 200)}; the file is broken, "
            "so fetch it once more"
        ) from error


def _cells(batch, place: int) -> dict[str, Any] | RowProblem:
    cells = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            cells[name] = column[place].as_py()
        # Text that is no UTF-8, a date before the year 1, a struct with a key twice.
        except (ValueError, OverflowError) as error:
            return RowProblem("a cell cannot be read", f"column {name!r}: {error}")
    return cells


# ------------------------------------------------------------------------------------------ writing


def write_part(
    target: Path, rows: Iterable[dict[str, Any] | RowProblem], columns: Columns, root: Path | None
) -> None:
    """Write what becomes of each row, a line each. Their pictures are written before that.

    So a part that is there stands for pictures that are there, too.
    """
    images = target.parent.parent / "images"
    lines = []
    for number, cells in enumerate(rows, start=1):
        try:
            if isinstance(cells, RowProblem):
                raise cells
            row, pictures = convert(cells, columns, root)
        except RowProblem as error:
            lines.append({"row": number, "reason": error.reason, "why": str(error)})
            continue
        for picture in pictures:
            file = images / picture.name
            if not file.exists():
                write_file(file, picture.content)
        lines.append({"row": number, "made": row, "areas": [p.area for p in pictures]})
    write_file(target, as_jsonl(lines))


def as_jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_parts(
    folder: Path, sources: list[Source], columns: Columns, root: Path | None
) -> list[dict]:
    """Write the parts that are not there yet, one for each row group, then read them all.

    Returns their lines in the order of the files, with the file of each row and its place in that.
    """
    # A part is a row group, so what an interruption costs is at most one of those.
    parts = folder / "parts"
    for inner in (parts, folder / "images"):
        inner.mkdir(exist_ok=True)
        remove_partial(inner)
    total = sum(source.file.metadata.num_rows for source in sources)
    lines = []
    with tqdm(total=total, desc=folder.name, unit="row") as bar:
        for number, source in enumerate(sources):
            # A file may lack a column that goes along; the others were looked for.
            names = [name for name in columns.read if name in source.present]
            before = 0  # rows of the file in earlier groups
            for group in range(source.file.num_row_groups):
                part = parts / f"{number:05}-{group:05}.jsonl"
                size = source.file.metadata.row_group(group).num_rows
                if part.exists():
                    bar.update(size)
                else:
                    rows = _counted(rows_of(source, group, names), bar)
                    write_part(part, rows, columns, root=root)
                for _, line in read_jsonl(part):
                    lines.append({"file": source.path.name, **line, "row": before + line["row"]})
                before += size
    return lines


def _counted(rows: Iterable, bar: tqdm) -> Iterator:
    for row in rows:
        yield row
        bar.update()


def tell_ids_apart(rows: list[dict]) -> None:
    """Give each row an id of its own: its number where it has none, "7#2" to the second "7"."""
    given = {row["id"] for row in rows}  # "7#2" may be the id of a row of the set
    taken = set()
    copies = Counter()  # how many ids were tried for each name, so that many copies cost no more
    for number, row in enumerate(rows, start=1):
        name = str(number) if row["id"] is None else row["id"]
        unique = name
        while unique in taken or (unique != name and unique in given):
            copies[name] += 1
            unique = f"{name}#{copies[name] + 1}"
        taken.add(unique)
        row["id"] = unique


def split(rows: list[dict], validation: int) -> tuple[list[dict], list[dict]]:
    """(rows to train on, `validation` rows to hold out), both in the order of `rows`.

    Which they are depends on their content alone. Rows about the same picture stay together, so
    that nothing held out was seen in training. Where they do not fit, fewer rows are held out.
    """
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        about = row["images"][0] if row["images"] else row["question"]
        groups.setdefault(hashlib.sha256(about.encode()).hexdigest(), []).append(place)
    held_out: set[int] = set()
    # In the order of the hashes, which is a random one that every machine and every call agrees on.
    for _, places in sorted(groups.items()):
        if len(held_out) + len(places) <= validation:
            held_out.update(places)
    train_rows = [row for place, row in enumerate(rows) if place not in held_out]
    return train_rows, [row for place, row in enumerate(rows) if place in held_out]


def finish(folder: Path, lines: list[dict], validation: int) -> dict[str, Any]:
    """Write the files that training reads. Returns what is to be said about them.

    Raises ValueError where no row can be used, or too few; no folder stays behind where none can.
    """
    made = [line for line in lines if "made" in line]
    skipped = [line for line in lines if "made" not in line]
    if not made:
        # Most likely a column is the wrong one. Another command may then use the same folder.
        remove_folder(folder / "parts")
        (folder / "images").rmdir()
        (folder / RECORD).unlink()
        raise ValueError("\n".join(["no row can be used", *summary_of(skipped)]))
    if validation >= len(made):
        raise ValueError(
            f"--validation {validation}: {len(made)} rows can be used; expected fewer, so that "
            "some are left to train on"
        )
    rows = [line["made"] for line in made]
    tell_ids_apart(rows)
    train_rows, validation_rows = split(rows, validation)
    write_file(folder / "train.jsonl", as_jsonl(train_rows))
    if validation_rows:
        write_file(folder / "validation.jsonl", as_jsonl(validation_rows))
    else:  # a call that was cut off may have held rows out
        (folder / "validation.jsonl").unlink(missing_ok=True)
    write_file(folder / "skipped.jsonl", as_jsonl(skipped))
    return {
        "train": len(train_rows),
        "validation": len(validation_rows),
        "validation_asked": validation,
        "skipped": len(skipped),
        "reasons": summary_of(skipped),
        **measure(made),
    }


# ------------------------------------------------------------------------------- what is said of it


def summary_of(skipped: list[dict]) -> list[str]:
    """Lines: how many rows are skipped for each reason, and the first of them."""
    by_reason: dict[str, list[dict]] = {}
    for line in skipped:
        by_reason.setdefault(line["reason"], []).append(line)
    said = []
    for reason, lines in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        said.append(f"  {len(lines)} {'row' if len(lines) == 1 else 'rows'}: {reason}")
        for line in lines[:LISTED]:
            said.append(f"      {excerpt(line['file'], 80)}, row {line['row']}: {line['why']}")
    return [excerpt(line) for line in said]


def measure(made: list[dict]) -> dict[str, Any]:
    """What decides about settings: how large the pictures are, and how long the longest prompt."""
    limit = model_config().data.max_pixels
    areas = [area for line in made for area in line["areas"]]
    longest = 0
    for line in made:
        image_tokens = sum(math.ceil(min(area, limit) / TOKEN_AREA) for area in line["areas"])
        text_tokens = len(line["made"]["question"]) // CHARACTERS_OF_A_TOKEN
        longest = max(longest, image_tokens + text_tokens + TEMPLATE_TOKENS)
    large = sum(area > limit for area in areas)
    return {"pictures": len(areas), "large_pictures": large, "longest_prompt": longest}


def model_config() -> Config:
    """The settings of the 3B model, which the printed command begins with."""
    return load_config(DEFAULTS.with_name("config_3b.yaml"))


def describe(folder: Path, result: dict[str, Any]) -> None:
    """Print what the folder holds and how to train on it."""
    print(f"{result['train']} rows in {folder / 'train.jsonl'}, with {result['pictures']} pictures")
    if result["validation"]:
        print(f"{result['validation']} rows in {folder / 'validation.jsonl'}")
    if result["validation"] < result["validation_asked"]:
        print(f"not {result['validation_asked']}, since rows about one picture stay together")
    if result["skipped"]:
        print(f"{result['skipped']} rows cannot be used, see {folder / 'skipped.jsonl'}:")
        print("\n".join(result["reasons"]))
    config = model_config()
    if result["large_pictures"]:
        print(
            f"{result['large_pictures']} pictures have more than data.max_pixels="
            f"{config.data.max_pixels} pixels and will be shrunk; a smaller number saves memory"
        )
    print("to train on it:")
    print(f"  {training_command(folder, result, config)}")


def training_command(folder: Path, result: dict[str, Any], config: Config) -> str:
    """One epoch of the 3B model. The image root is the folder, which the pictures' paths begin in.

    Prompts that are too long would be refused, so the limit grows with the longest, as estimated.
    """
    settings = {"data.path": folder / "train.jsonl", "data.image_root": folder}
    if result["validation"]:
        settings |= {"data.eval_path": folder / "validation.jsonl", "data.eval_image_root": folder}
    if result["longest_prompt"] > config.data.max_prompt_tokens:
        settings["data.max_prompt_tokens"] = 256 * math.ceil(result["longest_prompt"] / 256)
    settings["train.steps"] = math.ceil(result["train"] / config.rollout.prompts_per_step)
    settings["run.dir"] = Path("runs") / folder.resolve().name
    overrides = [shlex.quote(f"{key}={value}") for key, value in settings.items()]
    return " ".join([python_command(), "train.py", "config_3b.yaml", *overrides])


# --------------------------------------------------------------------------------------- the folder


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the folder is made from; None for a folder that is new or empty. Raises ValueError."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; expected a new folder")
    record = folder / RECORD
    if record.exists():
        try:
            return _as_today(dict(json.loads(record.read_bytes())))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{record}: {error}; expected what an earlier call wrote; remove {folder}"
            ) from error
    # A call that was cut off at its very beginning leaves its lock.
    others = sorted({path.name for path in folder.glob("*")} - {".lock", f"{RECORD}.partial-file"})
    if others:
        raise ValueError(
            f"--out {folder} holds something else ({others[0]!r}); expected a new folder"
        )
    return None


def _as_today(record: dict[str, Any]) -> dict[str, Any]:
    """A record of the version that knew one column of options, or none."""
    options = record["columns"]["options"]
    if not isinstance(options, list):
        record["columns"]["options"] = [] if options is None else [options]
    return record


def compare(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError where a folder was made, or begun, in another way than is asked for now."""
    for key, value in now.items():
        if before.get(key) != value:
            raise ValueError(
                f"--out {folder} was made with another value of {key} ({before.get(key)!r:.200}); "
                f"expected the same, {value!r:.200}, or a new folder"
            )


def import_files(options: argparse.Namespace) -> dict[str, Any]:
    """Make the folder, or what it still lacks. Returns what is to be said of it."""
    before = read_record(options.out)
    sources = open_sources(options.files)
    columns = find_columns(list(sources[0].present), vars(options), options.keep)
    optional = ()
    are_letters = columns.options and columns.options == lettered(sources[0].present)
    if are_letters and options.options is None:
        # A file whose questions have few options may lack the last letters.
        present = {name for source in sources for name in source.present}
        columns = replace(columns, options=lettered(present))
        optional = columns.options[2:]
    for source in sources:
        missing = [name for name in columns.used if name not in {*source.present, *optional}]
        if missing:
            raise ValueError(
                f"{source.path} has no column {missing[0]!r}, as {sources[0].path} has"
            )
        if options.image is None:
            check_pictures(source, columns)
    record = {
        "files": [source.facts for source in sources],
        "columns": json.loads(json.dumps(asdict(columns))),  # with lists, as it will be read again
        "images": None if options.images is None else str(options.images.resolve()),
    }
    if before is not None:
        compare(options.out, before, record)
        if "result" in before:
            compare(options.out, before, {"validation": options.validation})
            print(f"{options.out} is finished; there is nothing to do")
            return before["result"]
    with exclusive(options.out, "--out"):
        write_record(options.out, record)
        lines = write_parts(options.out, sources, columns, root=options.images)
        result = finish(options.out, lines, options.validation)
        # Only now is the folder finished: before, the same command would make these files again.
        record |= {"validation": options.validation, "result": result}
        write_record(options.out, record)
        remove_folder(options.out / "parts")
    return result


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_file(folder / RECORD, json.dumps(record, indent=1).encode())


# -------------------------------------------------------------------------------------- the command


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"found {text}; expected 0 or more")
    return number


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_dataset",
        description="Turn Parquet files of a public data set into a file to train on. The same "
        "command goes on where it was interrupted. COLUMN may be a part of a struct, as in "
        "reward_model.ground_truth; for --image and --options it may be several with commas "
        "between them, and for --image, --options and --id it may be none.",
    )
    option = parser.add_argument
    option("files", nargs="+", type=Path, metavar="FILE.parquet")
    option("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    option(
        "--images", type=Path, metavar="DIR", help="where pictures lie that are paths in the files"
    )
    option(
        "--validation",
        type=_count,
        default=0,
        metavar="N",
        help="rows to hold out, for data.eval_path",
    )
    usual = {"question": QUESTION_COLUMNS, "answer": ANSWER_COLUMNS, "image": IMAGE_COLUMNS}
    usual |= {"options": OPTIONS_COLUMNS, "id": ID_COLUMNS}
    for name, columns in usual.items():
        text = f"by default the first of {', '.join(columns)}"
        if name == "options":
            text += ", or the columns A, B, …"
        option(f"--{name}", metavar="COLUMN", help=text)
    option(
        "--keep",
        metavar="COLUMN,…",
        help="other columns that go along for your own reward; by default all that are small",
    )
    return parser.parse_args(arguments)


@command(ValueError, OSError, advice="; the same command goes on")
def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"--images {options.images} is not a folder")
    describe(options.out, import_files(options))


if __name__ == "__main__":
    main()
