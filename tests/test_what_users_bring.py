"""Rows and references as other projects write them: read, or refused with what to do."""

import doctest
import json

import pytest
from row_files import save_image

import rewards
import rows
from data import DataError, JsonlDataset


def dataset(tmp_path, *content: dict) -> JsonlDataset:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return JsonlDataset(file, tmp_path, progress=False)


QUESTION = {"question": "How many circles?", "answer": "1"}


@pytest.mark.parametrize(
    "key",
    [
        *("image_path", "image_paths", "img", "imgs", "Image", "IMAGE", "image_file", "imageUrl"),
        *("picture", "photo", "pic", "image_url", "path", "file_name", "images_path"),
    ],
)
def test_a_picture_under_another_key_is_no_question_without_one(tmp_path, key):
    with pytest.raises(DataError, match=rf"line 1: found the key '{key}', .*under \"image\""):
        dataset(tmp_path, QUESTION | {key: "ok.png"})


@pytest.mark.parametrize("value", ["shots/a.JPG", ["a.webp"], "data:image/png;base64,AAAA"])
def test_a_key_whose_value_is_a_picture_is_refused(tmp_path, value):
    with pytest.raises(DataError, match="found the key 'shown', which looks like a picture"):
        dataset(tmp_path, QUESTION | {"shown": value})


@pytest.mark.parametrize("key", ["video", "videos", "video_path", "audio"])
def test_video_and_audio_are_not_supported(tmp_path, key):
    with pytest.raises(DataError, match=f"found the key '{key}'; expected images only"):
        dataset(tmp_path, QUESTION | {key: "a.mp4"})


def test_other_keys_are_harmless(tmp_path):
    harmless = {
        "source": "geo3k",
        "url": "https://example.org/page",
        "difficulty": 3,
        "pathology": "none",
        "solution": "See a.png. Then add.",
        "imagery": True,
    }
    assert dataset(tmp_path, QUESTION | harmless)[0].extra == harmless


def test_a_json_array_is_said_once(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([QUESTION] * 12, indent=2))
    with pytest.raises(DataError, match="is one JSON array over several lines") as caught:
        JsonlDataset(tmp_path / "rows.json", progress=False)
    assert "broken JSON" not in str(caught.value)
    (tmp_path / "row.json").write_text(json.dumps(QUESTION, indent=2))
    with pytest.raises(DataError, match="is one JSON object over several lines"):
        JsonlDataset(tmp_path / "row.json", progress=False)


@pytest.mark.parametrize(
    "content, what", [(b"PAR1\x15\x04", "a Parquet file"), (b"\x1f\x8b\x08\x00", "a gzip file")]
)
def test_another_kind_of_file_is_named(tmp_path, content, what):
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(DataError, match=f"is {what}; expected JSONL"):
        JsonlDataset(tmp_path / "rows", progress=False)


def test_ids_are_made_distinct(tmp_path):
    """Several questions about one picture; an id that is another row's line number; one taken."""
    ids = [{"id": "7"}, {"id": "7"}, {"id": "4"}, {}, {"id": "7"}, {"id": "7#3"}]
    with pytest.warns(UserWarning, match=r"3 rows have the id of an earlier one \(first: line 2"):
        found = dataset(tmp_path, *(QUESTION | row for row in ids))
    assert found.ids == ["7", "7#2", "4", "4#2", "7#4", "7#3"]


@pytest.mark.parametrize(
    "answer, inside",
    [
        ("<answer> 3 </answer>", "3"),
        ("<answer>D</answer>", "D"),
        ("<think>I count twelve.</think><answer>12</answer>", "12"),
        ("<think>no <answer>3</answer></think>\n<answer>4</answer>", "4"),
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        (r"The total is \boxed{\frac{1}{2}} meters.", r"\frac{1}{2}"),
        (r"\boxed{[0, 1)}", "[0, 1)"),
        (12, "12"),
        ("x = 5", "x = 5"),
        ("#4", "#4"),
    ],
)
def test_a_wrapped_reference_is_what_is_inside(tmp_path, answer, inside):
    (sample,) = dataset(tmp_path, QUESTION | {"answer": answer})
    assert sample.answer == inside
    assert rewards.accuracy(f"<think>t</think><answer>{inside}</answer>", sample.answer) == 1


def test_an_empty_wrapping_is_refused(tmp_path):
    with pytest.raises(DataError, match="as the answer; expected text that is not empty"):
        dataset(tmp_path, QUESTION | {"answer": "<answer> </answer>"})


def test_a_reference_that_nothing_matches_is_an_error_of_its_row(tmp_path):
    found = dataset(tmp_path, QUESTION, QUESTION | {"answer": "never"})
    with pytest.raises(DataError, match="line 2: the answer 'never' is not matched by itself"):
        found.check_answers(lambda answer: answer != "never")
    found.check_answers(rewards.is_satisfiable)


def test_another_image_under_the_same_name_is_another_data_set(tmp_path):
    save_image(tmp_path / "a.png", color="red")
    before = dataset(tmp_path, QUESTION | {"image": "a.png"}).fingerprint
    assert dataset(tmp_path, QUESTION | {"image": "a.png"}).fingerprint == before
    save_image(tmp_path / "a.png", color="blue")
    assert dataset(tmp_path, QUESTION | {"image": "a.png"}).fingerprint != before


def test_the_examples_of_rows_run():
    assert doctest.testmod(rows).failed == 0
