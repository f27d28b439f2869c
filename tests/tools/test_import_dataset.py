"""tools/import_dataset.py: Parquet files in the forms of public sets become files to train on.

The files are written here, a few rows each, with the columns and the types of the sets they are
named after, and with rows that are broken in the ways that such files are.
"""

import doctest
import io
import json
import math
import os
import sys
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers import rows_of
from PIL import Image

from data import JsonlDataset
from rows import MAX_ASPECT_RATIO
from tools import dataset_rows, import_dataset
from tools.dataset_rows import RowProblem, letter_of, read_options, read_question
from train import reference_of

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def picture(color="red", size=(40, 30), kind="PNG", **more) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, format=kind, **more)
    return stream.getvalue()


def write_table(path: Path, rows: list[dict], group: int = 2, **types) -> str:
    """A Parquet file of rows with `group` rows in each row group. types: of its columns, if odd."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        columns[name] = pyarrow.array(values, types.get(name))
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return str(path)


def run_tool(folder: Path, *arguments: str) -> list[dict]:
    """The rows of train.jsonl that the command writes. Training must read them without a word."""
    import_dataset.main([*arguments, "--out", str(folder)])
    return read(folder)


def read(folder: Path, name: str = "train.jsonl") -> list[dict]:
    path = folder / name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = JsonlDataset(path, folder, progress=False, check_answer=reference_of)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == dataset.ids
    assert len(set(dataset.ids)) == len(rows)
    assert [row["question"] for row in rows] == [row.question for row in dataset.rows]
    return rows


def skipped(folder: Path) -> list[tuple[int, str]]:
    """(row, reason) of each line of skipped.jsonl."""
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return [(row["row"], row["reason"]) for row in map(json.loads, lines)]


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        import_dataset.main(list(arguments))
    return str(caught.value)


# ------------------------------------------------------------------------------------- the sets


def geometry3k(path: Path) -> str:
    """hiyouga/geometry3k: a list of pictures, the value as answer, four choices, the letter."""

    def row(number, images, problem, answer, **more):
        images = [{"bytes": content, "path": None} for content in images]
        choices = ["3", "5", "2 \\sqrt { 221 }", "9"]
        return {
            "images": images,
            "problem": problem,
            "answer": answer,
            "id": number,
            "choices": choices,
            "ground_truth": "C",
            **more,
        }

    rows = [
        row(1, [picture("red")], "<image>Find $x$.", "2 \\sqrt { 221 }"),
        row(2, [picture("blue")], "Find $y$.", "9"),
        row(2, [picture("red"), picture("green")], "<image>Which of <image>?", "5"),
        row(4, [picture("red")], "<image><image>Find $z$.", "5"),
        row(5, [picture("red")], "<image>Find $w$.", "7"),
        row(6, [b"no picture"], "<image>Find $w$.", "5"),
        row(7, [picture("red")], "<image>", "5"),
    ]
    return write_table(path, rows, images=pyarrow.list_(IMAGE))


def test_geometry3k(tmp_path):
    rows = run_tool(tmp_path / "out", geometry3k(tmp_path / "train.parquet"))
    assert [row["id"] for row in rows] == ["1", "2", "2#2"]
    assert [row["answer"] for row in rows] == ["C", "D", "B"]
    options = "\nOptions:\nA. 3\nB. 5\nC. 2 \\sqrt { 221 }\nD. 9"
    assert rows[0]["question"] == "<image>Find $x$." + options
    assert rows[1]["question"] == "<image>Find $y$." + options
    assert len(rows[2]["images"]) == 2
    assert rows[2]["images"][0] == rows[0]["images"][0]
    assert len(os.listdir(tmp_path / "out" / "images")) == 3
    assert rows[0]["ground_truth"] == "C"
    assert skipped(tmp_path / "out") == [
        (4, "training would refuse the row"),
        (5, "the answer is not one of the options"),
        (6, "a picture cannot be read"),
        (7, "no question"),
    ]


def test_geometry3k_without_its_options(tmp_path):
    source = geometry3k(tmp_path / "train.parquet")
    rows = run_tool(tmp_path / "out", source, "--options", "none", "--keep", "")
    assert [row["answer"] for row in rows] == ["2 \\sqrt { 221 }", "9", "5", "7"]
    assert rows[0].keys() == {"id", "images", "question", "answer"}
    assert rows[0]["question"] == "<image>Find $x$."


def test_mmk12(tmp_path):
    """FanqingM/MMK12: one picture, ids, a subject; in its test split the options in the text."""
    image = {"bytes": picture(), "path": "1.png"}
    inline = "As shown. <image>\nA. one\nB. two"
    rows = [
        {"id": "a", "image": image, "question": "Find <image> x.", "answer": "$5$ cm"},
        {"id": "b", "image": image, "question": inline, "answer": "B"},
        {"id": "c", "image": None, "question": "One and one?", "answer": "2"},
        {"id": "d", "image": None, "question": "<image>?", "answer": "2"},
        {"id": "e", "image": {"bytes": picture()[:50], "path": "x"}, "question": "?", "answer": ""},
        {"id": None, "image": image, "question": None, "answer": "1"},
        {"id": None, "image": image, "question": "How many?", "answer": "1"},
    ]
    rows = [{**row, "subject": "math"} for row in rows]
    source = write_table(tmp_path / "test.parquet", rows, image=IMAGE)
    with pytest.warns(UserWarning, match="text stands before the first image"):
        import_dataset.main([source, "--out", str(tmp_path / "out")])
        dataset = JsonlDataset(tmp_path / "out" / "train.jsonl", progress=False)
    assert dataset.ids == ["a", "b", "c", "4"]
    assert [row.question for row in dataset.rows][1:3] == [inline, "One and one?"]
    assert [row.answer for row in dataset.rows] == ["$5$ cm", "B", "2", "1"]
    assert dataset[0].extra == {"subject": "math"}
    assert skipped(tmp_path / "out") == [
        (4, "training would refuse the row"),
        (5, "no answer"),
        (6, "no question"),
    ]


def virl39k(folder: Path) -> str:
    """TIGER-Lab/ViRL39K: paths of pictures, boxed answers, pass rates of models."""
    (folder / "pictures" / "images").mkdir(parents=True)
    (folder / "pictures" / "images" / "a.png").write_bytes(picture("red"))
    (folder / "pictures" / "images" / "b.png").write_bytes(picture("blue", kind="JPEG"))
    (folder / "secret.png").write_bytes(picture("black"))
    pictures = [
        ["images/a.png"],
        ["images/a.png", "images/b.png"],
        [],
        ["images/missing.png"],
        ["../secret.png"],
        [str(folder / "secret.png")],
        None,
    ]
    rows = []
    for number, image in enumerate(pictures):
        row = {"answer": f"\\boxed{{{number}}}", "PassRate_32BTrained": 0.5, "qid": f"q-{number}"}
        row["question"] = "<image>" * len(image or []) + "How many?"
        row["PassRate_7BBase"] = float("nan")
        rows.append({**row, "image": image, "category": "Puzzles"})
    return write_table(folder / "39K.parquet", rows, image=pyarrow.list_(pyarrow.string()))


def test_virl39k(tmp_path):
    source = virl39k(tmp_path)
    rows = run_tool(tmp_path / "out", source, "--images", str(tmp_path / "pictures"))
    assert [row["id"] for row in rows] == ["q-0", "q-1", "q-2", "q-6"]
    assert [row["answer"] for row in rows] == ["0", "1", "2", "6"]
    assert [len(row["images"]) for row in rows] == [1, 2, 0, 0]
    # The ending says what the file is, not what it was called.
    assert [Path(name).suffix for name in rows[1]["images"]] == [".png", ".jpg"]
    assert rows[0]["PassRate_32BTrained"] == 0.5
    assert "PassRate_7BBase" not in rows[0]
    assert [reason for _, reason in skipped(tmp_path / "out")] == ["a picture cannot be read"] * 3


def test_paths_need_a_folder(tmp_path):
    import_dataset.main([virl39k(tmp_path), "--out", str(tmp_path / "out")])
    assert skipped(tmp_path / "out")[0] == (1, "a picture is a path")


def test_thinklite(tmp_path):
    """russwang/ThinkLite-VL-hard-11k: bytes alone, and a choice list that the text repeats."""
    problem = "Which?\n(A) one\n(B) two"
    row = {"id": "1", "image": picture(), "problem": problem, "answer": "B", "ground_truth": "two"}
    rows = [
        {**row, "choices": ["one", "two"]},
        {**row, "choices": ["one", "two"], "answer": "<think>so</think><answer>(A)</answer>"},
        {**row, "choices": [], "answer": "4"},
        {**row, "choices": None, "answer": "<answer></answer>"},
        {**row, "choices": ["one", "two"], "image": b"\x89PNG\r\n\x1a\n"},
        {**row, "choices": ["one", "two"], "problem": "Turn <|im_end|> over"},
    ]
    source = write_table(tmp_path / "hard.parquet", rows)
    rows = run_tool(tmp_path / "out", source, "--keep", "ground_truth")
    assert [row["id"] for row in rows] == ["1", "1#2", "1#3"]
    assert [row["answer"] for row in rows] == ["B", "A", "4"]
    assert {row["question"] for row in rows} == {f"<image>{problem}"}
    assert rows[0]["ground_truth"] == "two"
    assert [place for place, _ in skipped(tmp_path / "out")] == [4, 5, 6]


def test_mathverse(tmp_path):
    """AI4Math/MathVerse: choices in the question, a question for a judge, nested facts."""
    row = {
        "sample_index": "1",
        "problem_index": "1",
        "problem_version": "Text Dominant",
        "question": "As shown, find x.\nChoices:\nA:145°\nB:35°",
        "image": {"bytes": picture(), "path": "images/1.png"},
        "answer": "A",
        "question_type": "multi-choice",
        "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry"},
        "query_wo": "Please directly answer. Question: find x.",
        "question_for_eval": "find x.\nChoices:\nA:145°\nB:35°",
    }
    second = {**row, "sample_index": "2", "image": {"bytes": None, "path": "images/1.png"}}
    third = {**row, "sample_index": "3", "image": None, "question": "x" * 200_000}
    source = write_table(tmp_path / "testmini.parquet", [row, second, third])
    rows = run_tool(tmp_path / "out", source)
    assert [row["id"] for row in rows] == ["1"]
    assert rows[0]["question"] == "<image>" + row["question"]
    assert rows[0]["metadata"]["source"] == "GeoQA"
    assert rows[0]["question_for_eval"] == row["question_for_eval"]
    assert skipped(tmp_path / "out") == [(2, "a picture is a path"), (3, "text is too long")]


def test_the_form_of_verl(tmp_path):
    """A chat as the prompt, and the answer inside of a struct."""
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "<image>\nx?"}]
    rows = [
        {
            "data_source": "geo",
            "prompt": chat,
            "images": [{"bytes": picture(), "path": ""}],
            "reward_model": {"style": "rule", "ground_truth": "3"},
            "extra_info": {"index": 0, "split": "train"},
        }
    ]
    (row,) = run_tool(tmp_path / "out", write_table(tmp_path / "train.parquet", rows))
    assert (row["question"], row["answer"], row["id"]) == ("<image>\nx?", "3", "1")
    assert row["extra_info"] == {"index": 0, "split": "train"}
    assert "reward_model" not in row


# ----------------------------------------------------------------------------------- single cells


def test_examples_in_the_docstrings_are_true():
    assert doctest.testmod(dataset_rows).failed == 0


@pytest.mark.parametrize(
    "turns, expected",
    [
        ([{"role": "user", "content": "Hi"}], "Hi"),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": "How many?"},
                    ],
                }
            ],
            "<image>How many?",
        ),
    ],
)
def test_chats(turns, expected):
    assert read_question(turns) == expected


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([], "other turns"),
        (["Hi"], "other turns"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "other turns"),
        ([{"role": "user", "content": [{"type": "video"}]}], "other parts"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "other parts"),
        ([{"role": "user", "content": None}], "no question"),
    ],
)
def test_chats_that_cannot_be_asked(turns, reason):
    with pytest.raises(RowProblem) as caught:
        read_question(turns)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "cell, texts",
    [
        (["one", "two"], ["one", "two"]),
        (["(A) one", "(B) two"], ["one", "two"]),
        (["A. one", "two"], ["A. one", "two"]),
        ({"B": "two", "A": "one", "C": None}, ["one", "two"]),
        ({"label": ["A", "B"], "text": ["one", "two"]}, ["one", "two"]),
        ('["one", "two"]', ["one", "two"]),
        ('{"A": "one", "B": "two"}', ["one", "two"]),
        ("['one', 'two']", ["one", "two"]),
        ([1, 2.5], ["1", "2.5"]),
        (None, []),
        ("", []),
        ([], []),
        ("[]", []),
    ],
)
def test_options(cell, texts):
    assert read_options(cell) == dict(zip("ABCD", texts, strict=False))


@pytest.mark.parametrize(
    "cell",
    [
        ["one", ""],
        ["one", None],
        {"A": "1", "C": "2"},
        "one, two",
        ["x"] * 27,
        5,
        [b"x"],
        [math.nan],
    ],
)
def test_options_that_cannot_be_read(cell):
    with pytest.raises(RowProblem, match=r"found|cannot be read"):
        read_options(cell)


@pytest.mark.parametrize(
    "answer, options, letter",
    [
        ("B", ["one", "two"], "B"),
        ("(b)", ["one", "two"], "B"),
        ("two", ["one", "two"], "B"),
        (1, ["one", "two"], "B"),
        (7, ["7", "9"], "A"),
        ("A", ["B", "A"], None),  # the first by its letter, the second by its text
        (1, ["2", "3", "1"], None),
        ("three", ["one", "two"], None),
        ("C", ["one", "two"], None),
        (2, ["one", "two"], None),
        ("one", ["one", "one"], None),
    ],
)
def test_the_letter_of_an_answer(answer, options, letter):
    options = dict(zip("ABCD", options, strict=False))
    if letter is not None:
        assert letter_of(answer, options) == letter
        return
    with pytest.raises(RowProblem, match="which names"):
        letter_of(answer, options)


def test_whole_numbers_among_missing_ones_stay_places(tmp_path):
    """pandas writes them as fractions."""
    rows = [
        {"id": 8.0, "question": "?", "choices": ["one", "two"], "answer": 1.0},
        {"question": "?", "choices": [], "answer": 2.5},
        {"question": "?", "choices": [], "answer": float("nan")},
    ]
    rows = run_tool(tmp_path / "out", write_table(tmp_path / "train.parquet", rows))
    assert [(row["id"], row["answer"]) for row in rows] == [("8", "B"), ("2", "2.5")]


# ------------------------------------------------------------------------------------ hostile input


def bomb() -> bytes:
    """A picture whose head says that it is of 60000 x 60000 pixels."""
    content = bytearray(picture(kind="BMP"))
    content[18:26] = (60000).to_bytes(4, "little") * 2
    return bytes(content)


@pytest.mark.parametrize(
    "content, why",
    [
        (picture()[:-30], "cannot be decoded"),
        (bomb(), "pixels"),
        (picture(size=(MAX_ASPECT_RATIO + 1, 1)), "aspect ratio"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be decoded"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be decoded"),
    ],
)
def test_pictures_that_are_refused(tmp_path, content, why):
    rows = [{"image": content, "problem": "How many?", "answer": "1"}]
    message = refusal(write_table(tmp_path / "a.parquet", rows), "--out", str(tmp_path / "out"))
    assert "1 row: a picture cannot be read" in message
    assert why in message
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_a_picture_of_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_rows, "MOST_BYTES", 10)
    rows = [{"image": picture(), "problem": "How many?", "answer": "1"}]
    message = refusal(write_table(tmp_path / "a.parquet", rows), "--out", str(tmp_path / "out"))
    assert "expected at most 10" in message


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, format="GIF", save_all=True, append_images=frames[1:])
    image = {"bytes": stream.getvalue(), "path": "../../a.jpg"}
    rows = [{"image": image, "problem": "How many?", "answer": "1"}]
    (row,) = run_tool(tmp_path / "out", write_table(tmp_path / "a.parquet", rows))
    with Image.open(tmp_path / "out" / row["images"][0]) as stored:
        assert (stored.format, getattr(stored, "is_animated", False)) == ("PNG", False)
        assert stored.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_nothing_of_the_files_is_obeyed_by_the_terminal(tmp_path, capsys):
    rows = [
        {"problem": "How many?", "answer": "1", "videos": None},
        {"problem": "How many?", "answer": "1", "videos": ["\x1b[31m\u202e.mp4"]},
    ]
    run_tool(tmp_path / "out", write_table(tmp_path / "a.parquet", rows))
    said = capsys.readouterr().out
    assert "names a video" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_text_that_is_no_utf8(tmp_path):
    texts = pyarrow.array([b"How many?", b"\xff\xfe"], pyarrow.binary())
    problems = pyarrow.StringArray.from_buffers(2, *texts.buffers()[1:])
    table = pyarrow.table({"problem": problems, "answer": ["1", "2"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(run_tool(tmp_path / "out", str(tmp_path / "a.parquet"))) == 1
    assert skipped(tmp_path / "out") == [(2, "a cell cannot be read")]


# ------------------------------------------------------------------------------------- the command


def test_a_second_call_goes_on(tmp_path, monkeypatch, capsys):
    source = geometry3k(tmp_path / "train.parquet")
    run_tool(tmp_path / "whole", source)
    write_part = import_dataset.write_part
    written = []

    def interrupted(target, *arguments, **more):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(target.name)
        write_part(target, *arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(import_dataset, "write_part", interrupted)
        run_tool(tmp_path / "out", source)
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.jsonl").exists()

    def noted(target, *arguments, **more):
        written.append(target.name)
        write_part(target, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(import_dataset, "write_part", noted)
        run_tool(tmp_path / "out", source)
    assert written == [f"00000-0000{group}.jsonl" for group in range(4)]
    for name in ("train.jsonl", "skipped.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not (tmp_path / "out" / "parts").exists()


def test_a_finished_folder_stays_as_it_is(tmp_path, capsys):
    source = geometry3k(tmp_path / "train.parquet")
    run_tool(tmp_path / "out", source)
    first = capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    run_tool(tmp_path / "out", source)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = capsys.readouterr().out
    assert again == f"{tmp_path / 'out'} is finished; there is nothing to do\n{first}"
    out = ["--out", str(tmp_path / "out")]
    assert "another value of columns" in refusal(source, *out, "--options", "none")
    assert "another value of validation" in refusal(source, *out, "--validation", "1")
    geometry3k(tmp_path / "train.parquet")
    other = write_table(tmp_path / "other.parquet", [{"problem": "?", "answer": "1"}])
    assert "another value of" in refusal(other, *out)


def test_a_folder_with_something_else_is_refused(tmp_path):
    source = write_table(tmp_path / "a.parquet", [{"problem": "?", "answer": "1"}])
    assert "holds something else ('a.parquet')" in refusal(source, "--out", str(tmp_path))
    assert "is a file" in refusal(source, "--out", source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "import.json").write_text("[")
    assert "what an earlier call wrote" in refusal(source, "--out", str(tmp_path / "out"))


def test_held_out_rows_do_not_depend_on_the_order(tmp_path):
    rows = []
    for number in range(12):
        image = {"bytes": picture((number // 2, 0, 0)), "path": None}
        rows.append({"image": image, "problem": f"{number}?", "answer": str(number)})
    forth = write_table(tmp_path / "forth.parquet", rows)
    back = write_table(tmp_path / "back.parquet", rows[::-1])
    run_tool(tmp_path / "1", forth, "--validation", "4")
    run_tool(tmp_path / "2", back, "--validation", "4")
    held_out = [read(tmp_path / name, "validation.jsonl") for name in "12"]
    first, second = [{row["answer"] for row in rows} for rows in held_out]
    assert first == second
    assert len(first) == 4
    # The two rows about a picture are on the same side.
    seen = {image for row in read(tmp_path / "1") for image in row["images"]}
    assert not seen & {image for row in held_out[0] for image in row["images"]}
    out = ["--out", str(tmp_path / "3")]
    assert "expected fewer" in refusal(forth, "--validation", "12", *out)
    assert len(run_tool(tmp_path / "3", forth, "--validation", "2")) == 10


def test_rows_about_one_picture_are_never_split(tmp_path, capsys):
    rows = [{"image": picture(), "problem": f"{n}?", "answer": "1"} for n in range(3)]
    source = write_table(tmp_path / "a.parquet", rows)
    assert len(run_tool(tmp_path / "out", source, "--validation", "2")) == 3
    assert "not 2, since rows about one picture stay together" in capsys.readouterr().out
    assert not (tmp_path / "out" / "validation.jsonl").exists()


def test_columns_can_be_named(tmp_path):
    rows = [
        {
            "text": "<image><image>?",
            "label": {"final": "3"},
            "left": picture("red"),
            "right": picture("blue"),
            "key": 7,
            "note": "x",
        }
    ]
    source = write_table(tmp_path / "a.parquet", rows)
    out = ["--out", str(tmp_path / "out")]
    assert "no column holds the question" in refusal(source, *out)
    named = ["--question", "text", "--answer", "label.final", "--id", "key"]
    assert "'left', 'right' hold bytes" in refusal(source, *out, *named)
    assert "did you mean 'right'?" in refusal(source, *out, *named, "--image", "rigth")
    assert "no column 'nothing'" in refusal(source, *out, *named, "--keep", "nothing")
    (row,) = run_tool(tmp_path / "out", source, *named, "--image", "left,right", "--keep", "note")
    assert (row["id"], row["answer"], row["note"], len(row["images"])) == ("7", "3", "x", 2)


def test_options_in_columns_of_their_own(tmp_path):
    """MMBench's way."""
    rows = [
        {"question": "Which?", "answer": "C", "A": "one", "B": "two", "C": "three", "D": None},
        {"question": "Is it?", "answer": "yes", "A": "yes", "B": "no", "C": None, "D": None},
        {"question": "Gap?", "answer": "A", "A": "x", "B": None, "C": "y", "D": None},
    ]
    source = write_table(tmp_path / "a.parquet", rows)
    first, second = run_tool(tmp_path / "out", source)
    assert first["question"] == "Which?\nOptions:\nA. one\nB. two\nC. three"
    assert (second["answer"], first.keys() & set("ABCD")) == ("A", set())
    assert skipped(tmp_path / "out") == [(3, "the options cannot be read")]
    (row,) = run_tool(tmp_path / "named", source, "--options", "B,A", "--keep", "")
    assert row["question"] == "Is it?\nOptions:\nA. no\nB. yes"


def test_numbers_as_options_with_gaps_that_pandas_left(tmp_path):
    """They are 2.0 and NaN in the file; the answer 2 is the text of B, and not the third option."""
    row = {"question": "How many?", "answer": "2", "A": 1.0, "B": 2.0, "C": 3.5, "D": math.nan}
    source = write_table(tmp_path / "a.parquet", [row])
    (row,) = run_tool(tmp_path / "out", source)
    assert row["question"] == "How many?\nOptions:\nA. 1\nB. 2\nC. 3.5"
    assert row["answer"] == "B"
    assert read_options([10**400, "x"])["A"] == str(10**400)


def test_a_file_may_lack_the_last_letters_of_another(tmp_path):
    few = {"question": "Is it?", "answer": "A", "A": "yes", "B": "no"}
    more = {"question": "Which?", "answer": "C", "A": "one", "B": "two", "C": "three"}
    sources = [write_table(tmp_path / f"{n}.parquet", [row]) for n, row in enumerate((few, more))]
    first, second = run_tool(tmp_path / "out", *sources)
    assert (first["answer"], second["answer"]) == ("A", "C")
    assert "C. three" in second["question"]
    # Letters that were asked for by name must be there, and so must all where the first file has
    # none: then they are no options.
    out = ["--out", str(tmp_path / "named")]
    said = refusal(sources[1], sources[0], *out, "--options", "A,B,C")
    assert f"{sources[0]} has no column 'C', as {sources[1]} has" in said
    plain = write_table(tmp_path / "plain.parquet", [{"question": "How many?", "answer": "3"}])
    rows = run_tool(tmp_path / "plain", plain, sources[1])
    assert [row["question"] for row in rows] == ["How many?", "Which?"]


def test_a_folder_of_the_version_before_is_known(tmp_path, capsys):
    rows = [{"question": "Is it?", "answer": "yes", "options": ["yes", "no"]}]
    source = write_table(tmp_path / "a.parquet", rows)
    run_tool(tmp_path / "out", source)
    record = tmp_path / "out" / "import.json"
    content = json.loads(record.read_text())
    assert content["columns"]["options"] == ["options"]
    content["columns"]["options"] = "options"
    record.write_text(json.dumps(content))
    capsys.readouterr()
    run_tool(tmp_path / "out", source)
    assert "is finished; there is nothing to do" in capsys.readouterr().out


def test_a_picture_behind_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture())
    rows = [{"image": "nowhere/../a.png", "problem": "?", "answer": "1"}]
    source = write_table(tmp_path / "a.parquet", rows)
    (row,) = run_tool(tmp_path / "out", source, "--images", str(tmp_path / "pictures"))
    assert len(row["images"]) == 1


@pytest.mark.parametrize("kind", ["dictionary", "fixed-size list", "fixed-size bytes", "map"])
def test_bytes_are_seen_in_every_kind_of_column(tmp_path, kind):
    picture_bytes = picture()
    if kind == "dictionary":
        column = pyarrow.array([picture_bytes]).dictionary_encode()
    elif kind == "fixed-size list":
        column = pyarrow.array([[picture_bytes]], pyarrow.list_(pyarrow.binary(), 1))
    elif kind == "fixed-size bytes":
        column = pyarrow.array([picture_bytes], pyarrow.binary(len(picture_bytes)))
    else:
        column = pyarrow.array(
            [[("a", picture_bytes)]], pyarrow.map_(pyarrow.string(), pyarrow.binary())
        )
    table = pyarrow.table({"question": ["How many?"], "answer": ["3"], "drawing": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    said = refusal(str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out"))
    assert "'drawing' hold bytes" in said
    if kind.startswith("map"):
        return
    named = ["--image", "drawing"]
    (row,) = run_tool(tmp_path / "out", str(tmp_path / "a.parquet"), *named)
    assert len(row["images"]) == 1


def test_several_files_count_as_one(tmp_path):
    one = write_table(tmp_path / "1.parquet", [{"problem": "a?", "answer": "1"}] * 3)
    two = write_table(tmp_path / "2.parquet", [{"problem": "b?", "answer": ""}] * 3)
    assert len(run_tool(tmp_path / "out", one, two)) == 3
    assert [place for place, _ in skipped(tmp_path / "out")] == [1, 2, 3]
    other = write_table(tmp_path / "3.parquet", [{"question": "b?", "answer": "1"}])
    out = ["--out", str(tmp_path / "other")]
    assert "3.parquet has no column 'problem'" in refusal(one, other, *out)
    assert "is named twice" in refusal(one, one, *out)


def test_files_that_are_broken(tmp_path):
    source = Path(geometry3k(tmp_path / "a.parquet"))
    out = ["--out", str(tmp_path / "out")]
    assert "no.parquet cannot be read" in refusal(str(tmp_path / "no.parquet"), *out)
    whole = source.read_bytes()
    source.write_bytes(whole[:-100])
    assert "expected a Parquet file" in refusal(str(source), *out)
    source.write_bytes(whole[:4] + b"\xff" * 300 + whole[304:])
    assert "row group 0" in refusal(str(source), *out)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal("a.parquet", "--out", str(tmp_path / "out"))
    assert f"pip install pyarrow=={pyarrow.__version__}" in message
    assert "\n" not in message


def test_a_parquet_file_given_to_training_leads_here(tmp_path):
    with pytest.raises(ValueError, match="python -m tools.import_dataset"):
        JsonlDataset(write_table(tmp_path / "a.parquet", [{"question": "?"}]), progress=False)


def test_the_command_for_training_has_room_for_the_longest_prompt(tmp_path, capsys):
    image = {"bytes": picture(size=(1600, 1200)), "path": None}
    rows = [{"images": [image] * 3, "problem": "?", "answer": "1"}] * 2
    out = tmp_path / "a b"
    run_tool(out, write_table(tmp_path / "a.parquet", rows))
    said = capsys.readouterr().out
    assert "6 pictures have more than data.max_pixels=802816 pixels" in said
    assert "data.max_prompt_tokens=3328 train.steps=1 'run.dir=runs/a b'" in said
    assert f"'data.path={out / 'train.jsonl'}' 'data.image_root={out}'" in said


def test_training_runs_on_the_result(tmp_path, start):
    rows = [
        {"image": picture(color, size=(56, 56)), "problem": "Sum circle.", "answer": str(number)}
        for number, color in enumerate(("red", "green", "blue", "white", "black", "gray"))
    ]
    source = write_table(tmp_path / "a.parquet", rows)
    run_tool(tmp_path / "set", source, "--validation", "2")
    folder = start(
        f"data.path={tmp_path / 'set' / 'train.jsonl'}",
        f"data.eval_path={tmp_path / 'set' / 'validation.jsonl'}",
        "eval.samples=2",
    )
    assert [row["step"] for row in rows_of(folder)] == [0, 1, 2]
