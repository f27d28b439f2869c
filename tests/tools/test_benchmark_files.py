"""benchmarks/files.py, responses.py: a hostile file is read, or is one error with its place."""

import base64
import csv
import struct
import time
import zlib

import pytest
from benchmark_rows import BLUE, RED, encode, write_tsv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import BenchmarkError, Row, find, read_responses, read_tsv


def load(tmp_path, rows, pictures=True, columns=None, needed=()):
    return read_tsv(write_tsv(tmp_path / "x.tsv", rows, columns), needed, pictures)


def test_exactly_what_pandas_takes_for_missing_is_missing(tmp_path):
    """An option called "None" does not exist; " None", "none" and "-" do."""
    texts = [
        "",
        "None",
        "NA",
        "N/A",
        "n/a",
        "null",
        "NULL",
        "nan",
        "NaN",
        "-nan",
        "-NaN",
        "#N/A",
        "#NA",
        "#N/A N/A",
        "<NA>",
        "1.#IND",
        "-1.#IND",
        "1.#QNAN",
        "-1.#QNAN",
    ]
    others = ["none", " None", "Nan", "-", "0"]
    rows, _ = load(
        tmp_path, [dict(index=i, image=RED, A=text, B="b") for i, text in enumerate(texts + others)]
    )
    assert [row.options() for row in rows] == [{"B": "b"}] * len(texts) + [
        {"A": text, "B": "b"} for text in others
    ]
    with pytest.raises(BenchmarkError, match="x.tsv, line 2: 'A' is empty"):
        rows[0]["A"]


def test_rows_without_image_are_dropped_and_pointers_are_followed_once(tmp_path):
    """A cell of 1 to 64 characters is the index of a row with a picture.

    A pointer to several pictures gets them all.
    """
    rows, dropped = load(
        tmp_path,
        [
            dict(index="a_1", image=RED),
            dict(index="7", image="a_1"),
            dict(index="8", image=""),
            dict(index="9", image=str([RED, BLUE])),
            dict(index="10", image="9"),
            dict(index="11", image=str([BLUE])),
            dict(index="12", image="NA"),
        ],
    )
    assert dropped == {"8", "12"}
    assert {row.index: row.images for row in rows} == {
        "a_1": (RED,),
        "7": (RED,),
        "9": (RED, BLUE),
        "10": (RED, BLUE),
        "11": (BLUE,),
    }
    rows, _ = load(tmp_path, [dict(index="i" * 64, image="A" * 65), dict(index=2, image="i" * 64)])
    assert rows[1].images == ("A" * 65,)
    assert [
        row.index
        for row in load(
            tmp_path, [dict(index=1, image="zz"), dict(index=2, image="")], pictures=False
        )[0]
    ] == ["1"]
    for cells, message in (
        (
            [("1", "2"), ("2", "3"), ("3", RED)],
            "line 2: the image is '2'.*not the index of a row that holds one",
        ),
        ([("1", "2"), ("2", "3" * 64), ("3" * 64, RED)], "line 2: the image is '2'"),
        ([("1", "2"), ("2", ""), ("3", RED)], "line 2: the image is '2'"),
        ([("1", "4"), ("3", RED)], "'4'"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            load(tmp_path, [dict(index=index, image=image) for index, image in cells])


def test_image_paths_serve_where_there_is_no_image_column(tmp_path):
    Image.new("RGB", (40, 50)).save(tmp_path / "a.png")
    Image.new("RGB", (60, 50)).save(tmp_path / "b.png")
    path = write_tsv(
        tmp_path / "x.tsv",
        [
            dict(index=1, image_path="['a.png', 'b.png']"),
            dict(index=2, image_path=tmp_path / "a.png"),
            dict(index=3, image_path="../a.png"),
        ],
    )
    rows, _ = read_tsv(path, (), True)

    def size(row):
        return [image.size for image in find("MME").pictures(row, tmp_path)]

    assert size(rows[0]) == [(40, 50), (60, 50)]
    assert size(rows[1]) == [(40, 50)]
    with pytest.raises(
        BenchmarkError, match="line 4: image '../a.png' lies outside the image root"
    ):
        size(rows[2])


def test_cells_with_tabs_quotes_lines_and_megabytes(tmp_path):
    """Python's csv module stops at 131072 characters by default. That limit is left as it was."""
    limit = csv.field_size_limit()
    question = 'a "quoted"\ttab,\r\nline — 圖 \U0001f600'
    rows, _ = load(
        tmp_path,
        [
            dict(index=1, image="A" * 3_000_000, question=question),
            dict(index=2, image="B" * 65, question='"'),
        ],
    )
    assert rows[0]["question"] == question
    assert rows[1]["question"] == '"'
    assert len(rows[0].images[0]) == 3_000_000
    assert csv.field_size_limit() == limit
    text = "\ufeffindex\timage\tquestion\r\n\r\n1\t" + RED + '\ta "b" c\r\n'
    (tmp_path / "y.tsv").write_bytes(text.encode())
    rows, _ = read_tsv(tmp_path / "y.tsv", ("question",), True)
    assert rows[0]["question"] == 'a "b" c'
    assert len(rows) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no column 'index', 'question', 'image'; found the columns nothing"),
        (b"index\timage\tquestion\n", "has no rows"),
        (
            b"index,image,question\n1,2,3\n",
            "no column 'index', 'question', 'image'; found the columns index,image,question",
        ),
        (
            b"index\timage\tqeustion\n",
            "no column 'question'; found the columns index, image, qeustion; nearest: qeustion",
        ),
        (b"index\tquestion\n1\t2\n", "no column 'image'"),
        (b"index\tindex\timage\tquestion\n", "the column 'index' stands twice"),
        (b"index\timage\tquestion\n1\t\t?\n", "has no row with an image"),
        (
            b"index\timage\tquestion\n1\t%s\t?\n1\t1\t?\n",
            "line 3: the index '1' stands on line 2, too",
        ),
        (b"index\timage\tquestion\n\t%s\t?\n", "line 2: 'index' is empty"),
        (b"index\timage\tquestion\n1\t%s\n", "line 2: found 2 cells; expected 3"),
        (b"index\timage\tquestion\n1\t%s\t?\t?\n", "line 2: found 4 cells; expected 3"),
        (b"index\timage\tquestion\n1\t%s\ta\0b\n", "line 2: 'question' holds a NUL"),
        (b'index\timage\tquestion\n1\t%s\t"a\n2\tb', "line 3: unexpected end of data"),
        (b'index\timage\tquestion\n1\t%s\t"a"b\n', "line 2: '\t' expected after '\"'"),
        (b"index\timage\tquestion\n1\t%s\t\xff\n", "is not UTF-8"),
        (
            b"index\timage\tquestion\n1\t['%s', 3]\t?\n",
            "line 2: 'image' is .*expected one value, or a list of texts",
        ),
        (b"index\timage\tquestion\n1\t[%s]\t?\n", "line 2: 'image' is .*cannot be read"),
        (
            b"index\timage\tquestion\n1\t" + b"[" * 500 + b"]" * 500 + b"\t?\n",
            "line 2: 'image' is .*cannot be read .too many nested",
        ),
        (
            b"index\timage\tquestion\n1\t[" + b"-" * 100000 + b"1]\t?\n",
            "line 2: 'image' is .*cannot be read",
        ),
    ],
)
def test_a_malformed_file_is_one_error_that_names_the_place(tmp_path, content, message):
    (tmp_path / "x.tsv").write_bytes(content.replace(b"%s", RED.encode()))
    with pytest.raises(BenchmarkError, match=f"x.tsv.*{message}"):
        read_tsv(tmp_path / "x.tsv", ("question",), True)


def test_a_file_that_is_not_there_is_named_with_its_neighbours(tmp_path):
    (tmp_path / "MME.tsv").write_text("x")
    for path in (tmp_path / "MMe.tsv", tmp_path):
        with pytest.raises(BenchmarkError, match=r"cannot be read"):
            read_tsv(path, (), True)
    with pytest.raises(BenchmarkError, match=r"near names: MME.tsv"):
        read_tsv(tmp_path / "MMe.tsv", (), True)


def bomb(size) -> str:
    """A PNG of many pixels in a few hundred bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100000))
        + chunk(b"IEND", b"")
    ).decode()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "image, message",
    [
        ("é" * 80, "image 1 of 1 is .*expected a picture in base64"),
        ("A" * 81, "image 1 of 1 is 'AAA.*expected a picture in base64"),
        ("<script>" * 10, "expected a picture in base64"),
        (base64.b64encode(b"not a picture" * 9).decode(), "line 2: image 1 of 1 cannot be decoded"),
        (RED[: len(RED) // 8 * 4], "line 2: image 1 of 1 cannot be decoded"),
        (bomb(60000), "line 2: image 1 of 1 cannot be decoded .DecompressionBombError"),
        (bomb(12000), "line 2: image 1 of 1 has 12000 x 12000 pixels; expected at most"),
        (
            encode("red", (1, 900)),
            "line 2: image 1 of 1 has 1 x 900 pixels; expected an aspect ratio",
        ),
        (str([RED, "A" * 81]), "line 2: image 2 of 2 is 'AAA"),
    ],
)
def test_a_bad_picture_is_an_error_that_names_the_row(tmp_path, image, message):
    rows, _ = load(tmp_path, [dict(index=1, image=image)])
    with pytest.raises(BenchmarkError, match=message):
        find("MME").pictures(rows[0], tmp_path)


def test_pictures_become_rgb_in_order(tmp_path):
    cell = str(
        [
            encode(3, mode="P"),
            encode((255, 0, 0, 255), mode="RGBA"),
            encode((7, 255), mode="LA"),
            "\n".join([RED[:40], RED[40:]]),
        ]
    )
    rows, _ = load(tmp_path, [dict(index=1, image=cell)])
    images = find("MMBench").pictures(rows[0], tmp_path)
    assert [image.mode for image in images] == ["RGB"] * 4
    assert images[1].getpixel((5, 5)) == (
        255,
        0,
        0,
    )


cells = st.sampled_from(
    [
        RED,
        "1",
        "2",
        "x",
        "[",
        "]",
        "['a','b']",
        "None",
        "",
        '"',
        "\r",
        "\n",
        "\0",
        "\t",
        "{}",
        "Yes",
        "\ufeff",
    ]
)


lines = st.lists(cells | st.text(max_size=5), min_size=1, max_size=4).map("\t".join) | st.text(
    max_size=30
)


@settings(max_examples=200, deadline=None)
@given(st.lists(lines, max_size=6), st.binary(max_size=8), st.booleans())
def test_no_file_breaks_the_reader(tmp_path_factory, lines, tail, pictures):
    path = tmp_path_factory.getbasetemp() / "fuzz.tsv"
    path.write_bytes(
        "\n".join(["index\timage\tquestion", *lines]).encode("utf-8", "replace") + tail
    )
    try:
        rows, dropped = read_tsv(path, ("question",), pictures)
        assert rows
        assert not {row.index for row in rows} & dropped
        assert all(not pictures or row.images for row in rows)
    except BenchmarkError as error:
        assert str(error).startswith(str(path))


parts = st.sampled_from(
    [
        b'{"index": 1, "response": "B"}',
        b'{"index": "1"',
        b"\n",
        b"null",
        b"[]",
        b'{"index": [], "response": 1}',
        b'{"index": 1e999, "response": NaN}',
        b'{"index": 2, "response": "\\ud800", "sample": 1}',
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.lists(parts, max_size=5).map(b"".join))
def test_no_file_breaks_the_reader_of_responses(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        found = read_responses(path)
        assert all(isinstance(text, str) for texts in found.values() for text in texts.values())
    except BenchmarkError as error:
        assert str(error).startswith(str(path))


def test_responses_stand_once_and_may_be_numbers(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text(
        '{"index": 1, "response": "A"}\n\n{"index": "1", "response": "B"}\n'
        '{"index": 2, "response": 5}\n{"index": 2, "response": "x"}\n'
    )
    with pytest.raises(
        BenchmarkError, match="2 responses stand more than once: '1', '2'; expected each once"
    ):
        read_responses(path)
    path.write_text('{"index": 1, "response": "A", "sample": 1}\n{"index": "hb_1", "response": 5}')
    assert read_responses(path) == {"1": {1: "A"}, "hb_1": {0: "5"}}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "Expecting property name"),
        ("[1]", r"found \[1\]; expected a JSON object"),
        ('{"index": 1}', "no key 'response'"),
        ('{"index": null, "response": ""}', '"index" is None'),
        ('{"index": 1, "response": null}', '"response" is None; expected text'),
        ('{"index": 1, "response": "", "sample": -1}', '"sample" is -1'),
        ('{"index": true, "response": ""}', '"index" is True'),
        ("[" * 100000, "expected a JSON object"),
    ],
)
def test_a_broken_line_of_responses_is_named(tmp_path, line, message):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"index": 0, "response": ""}\n' + line + "\n")
    with pytest.raises(BenchmarkError, match=f"responses.jsonl, line 2: .*{message}"):
        read_responses(path)


@pytest.mark.parametrize("cell", ["[" + "1," * 600_000 + "1]", "[" + "''," * 400_000 + "'']"])
@pytest.mark.parametrize("column", ["image", "image_path"])
def test_a_literal_of_many_values_is_refused_before_it_is_parsed(tmp_path, cell, column):
    """A list of 48 MB would take minutes and gigabytes."""
    begin = time.process_time()
    with pytest.raises(
        BenchmarkError, match=f"x.tsv, line 2: '{column}' is .*characters; at most 100000 are read"
    ):
        load(tmp_path, [{"index": 1, column: cell}])
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    "name, column", [("MathVision", "choices"), ("MathVerse_MINI", "metadata")]
)
@pytest.mark.parametrize("cell", ["[" + "1," * 600_000 + "1]", "[" * 10**6 + "]" * 10**6])
def test_no_other_cell_is_parsed_when_it_is_huge(name, column, cell):
    row = Row("x.tsv, line 2", "1", {column: cell})
    parse = find(name)._choices if column == "choices" else find(name)._metadata
    with pytest.raises(
        BenchmarkError, match=f"x.tsv, line 2: '{column}' is .*at most 100000 are read"
    ):
        parse(row)


def test_a_list_of_large_pictures_is_read(tmp_path):
    picture = "A" * 300_000
    rows, _ = load(tmp_path, [dict(index=1, image=str([picture, picture]))])
    assert rows[0].images == (picture, picture)
