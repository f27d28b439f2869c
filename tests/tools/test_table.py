"""evaluate.py table and score: the layout of the paper's table 1, and what is wrong in one line."""

import functools
import json
from pathlib import Path

import pytest
from benchmark_rows import write_tsv
from benchmark_runs import FILES, lines, run_benchmark, save_tiny_policy

import evaluate
from benchmarks.suite import find
from benchmarks.table import labels_of, lay_out


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer, image_processor):
    """The folder of a tiny random policy."""
    return save_tiny_policy(tmp_path_factory.mktemp("model"), tokenizer, image_processor)


@pytest.fixture
def run(model, tmp_path):
    """run(name, *options, rows=…, out=…) runs the command in this process, returns the folder."""
    return functools.partial(run_benchmark, model, tmp_path)


SEVEN = ("WeMath", "MathVision", "MathVerse", "LogicVista", "HallusionBench", "MME", "MMBench")


LAYOUT = r"""       | mathematical                              | visual-centric                | average | other
model  | WeMath  MathVision  MathVerse  LogicVista | HallusionBench   MME  MMBench |    Avg. |   toy
3B     |   20.0        23.0       33.8        34.5 |           61.3  76.9     62.8 |    44.6 |     –
mine|2 |      –           –          –           – |              –  80.2        – |       – |     –
3B     |      –           –          –           – |              –   1.0        – |       – |     –
toy    |      –           –          –           – |              –     –        – |       – |  98.0

|  | mathematical |  |  |  | visual-centric |  |  | average | other |
|---|---|---|---|---|---|---|---|---|---|
| model | WeMath | MathVision | MathVerse | LogicVista | HallusionBench | MME | MMBench | Avg. | toy |
| 3B | 20.0 | 23.0 | 33.8 | 34.5 | 61.3 | 76.9 | 62.8 | 44.6 | – |
| mine\|2 | – | – | – | – | – | 80.2 | – | – | – |
| 3B | – | – | – | – | – | 1.0 | – | – | – |
| toy | – | – | – | – | – | – | – | – | 98.0 |"""  # noqa: E501


def test_the_table_has_the_papers_layout():
    """The paper's row for the 3B: 312.3 / 7 on average.

    A second figure of a column starts a row; fewer than seven: no average.
    """
    values = (20.0, 23.0, 33.8, 34.5, 61.3, 76.9, 62.8)
    headlines = [
        *(("3B", title, value) for title, value in zip(SEVEN, values, strict=True)),
        ("mine|2", "MME", 80.25),
        ("3B", "MME", 1.0),
        ("toy", "toy", 98.0),
    ]
    assert "\n".join(lay_out(headlines)) == LAYOUT


def test_table_scores_the_runs_it_is_given(run, model, tmp_path, capsys):
    folders = [str(run("LogicVista", out="a")), str(run("MME", "--prompt", "train", out="b"))]
    for folder, texts in ((folders[0], ["A and C"]), (folders[1], ["yes", "perhaps"])):
        rows = [
            row | {"response": text} for row, text in zip(lines(Path(folder)), texts, strict=True)
        ]
        (Path(folder) / "responses.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    capsys.readouterr()
    evaluate.main(["table", *folders])
    printed = capsys.readouterr().out
    assert printed.startswith("mode final, judge: none (rule-based); percent\n")
    unusual = "at most 4 tokens, 3136 to 12845056 pixels"
    assert f"| {model}, {unusual} | – | – | – | 100.0 | – | – | – | – |" in printed
    assert (
        f"| {model}, train prompt, {unusual} | – | – | – | – | – | 1.8 | – | – |" in printed
    )  # 50 points of 2800
    note = "MME, 100 · (perception + reasoning) / 2800, 2 rows, 1 of 2 responses unmatched"
    assert f"{folders[1]}: {note}" in printed
    (tmp_path / "judge.py").write_text(
        "def judge(response, answer, row):\n    return response == 'perhaps'\n"
    )
    evaluate.main(
        ["table", folders[1], "--judge", f"{tmp_path / 'judge.py'}:judge", "--mode", "raw"]
    )
    assert "| 7.1 |" in capsys.readouterr().out  # 200 of 2800
    (Path(folders[0]) / "responses.jsonl").write_text("")
    with pytest.raises(SystemExit, match=f"error: {folders[0]}: 1 of 1 responses are missing: '1'"):
        evaluate.main(["table", folders[0]])
    evaluate.main(["table", folders[0], "--allow-missing"])
    assert "1 rows, 0 of 0 responses unmatched, 1 missing" in capsys.readouterr().out
    for bad, message in (
        (tmp_path, "run.json cannot be read"),
        (tmp_path / "nowhere", "run.json cannot be read"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(["table", str(bad)])


def test_one_row_holds_responses_of_one_kind():
    """Other weights under one path, or another template, are told apart where they meet."""
    usual = find("MME")
    mme = {
        "model": "runs/3b/final",
        "weights": "a" * 64,
        "prompt": "benchmark",
        "template": "{question}",
        "dtype": "bfloat16",
        "temperature": 0.0,
        "max_new_tokens": usual.max_new_tokens,
        "min_pixels": usual.min_pixels,
        "max_pixels": usual.max_pixels,
        "sample": 1,
    }
    trained_on = mme | {"weights": "b" * 64}
    labels = labels_of([(mme, usual), (trained_on, find("WeMath"))])
    assert labels == ["runs/3b/final, weights aaaaaaaa", "runs/3b/final, weights bbbbbbbb"]
    labels = labels_of([(mme, usual), (mme | {"max_new_tokens": 64}, find("WeMath"))])
    assert labels == ["runs/3b/final", "runs/3b/final, at most 64 tokens"]
    asked = [mme | {"prompt": "train", "template": f"{{question}} {end}"} for end in "xy"]
    one, other = labels_of([(settings, usual) for settings in asked])
    assert one != other and one.startswith("runs/3b/final, train prompt, template ")
    toy = find("toy")
    of_toy = mme | {
        "prompt": toy.prompt_mode,
        "template": "{question} Think.",
        "max_new_tokens": toy.max_new_tokens,
        "min_pixels": toy.min_pixels,
        "max_pixels": toy.max_pixels,
    }
    assert labels_of([(mme, usual), (of_toy, toy)]) == ["runs/3b/final"] * 2
    earlier = {key: value for key, value in mme.items() if key != "dtype"}
    assert labels_of([(earlier, find("WeMath")), (mme, usual)]) == ["runs/3b/final"] * 2


def test_responses_are_scored_on_the_rows_that_they_were_written_for(run, tmp_path, capsys):
    folder = run("LogicVista")
    scored = ["score", "--responses", str(folder / "responses.jsonl"), "--data"]
    mme = write_tsv(tmp_path / "other.tsv", FILES["MME"])
    with pytest.raises(SystemExit, match="are responses to LogicVista; expected responses to MME"):
        evaluate.main([*scored, str(mme), "--benchmark", "MME"])
    capsys.readouterr()
    evaluate.main(["table", str(folder)])
    assert "has changed since" not in capsys.readouterr().err
    write_tsv(tmp_path / "LogicVista.tsv", [dict(FILES["LogicVista"][0], answer="B")])
    evaluate.main(["table", str(folder)])
    assert "LogicVista.tsv has changed since" in capsys.readouterr().err
    evaluate.main([*scored, str(tmp_path / "LogicVista.tsv"), "--benchmark", "LogicVista"])
    assert "LogicVista.tsv has changed since" in capsys.readouterr().err
    other = folder / "other.jsonl"  # such as another model's, kept beside
    other.write_text('{"index": "0", "response": "yes"}\n{"index": "1", "response": "no"}\n')
    evaluate.main(["score", "--benchmark", "MME", "--data", str(mme), "--responses", str(other)])
    assert "has changed since" not in capsys.readouterr().err


def test_errors_of_score_are_one_line(tmp_path, capsys):
    data = write_tsv(tmp_path / "x.tsv", FILES["LogicVista"])
    (tmp_path / "r.jsonl").write_text('{"index": 1, "response": "A and C"}\n')
    command = [
        "score",
        "--benchmark",
        "LogicVista",
        "--data",
        str(data),
        "--responses",
        str(tmp_path / "r.jsonl"),
    ]
    evaluate.main([*command, "--mode", "raw"])
    assert json.loads(capsys.readouterr().out)["headline"]["value"] == 100
    for more, message in (
        (("--judge", "nowhere.py:f"), "--judge 'nowhere.py:f': no file"),
        (("--benchmark", "MME"), "no column 'category', 'image_path'"),
        (
            ("--responses", str(tmp_path / "s.jsonl")),
            "s.jsonl cannot be read .*near names: r.jsonl",
        ),
        (("--benchmark", "MMBench_DEV_EN"), "no column 'A', 'B'"),
        (("--benchmark", "toy"), "toy is drawn"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            evaluate.main([*command, *more])
        assert capsys.readouterr().out == ""
