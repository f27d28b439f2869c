"""benchmarks/scoring.py: what responses are needed, several samples, the judge; and the command."""

import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_rows import (
    HALLUSION,
    LOGICVISTA,
    MATHVERSE,
    MATHVISION,
    MMBENCH,
    RED,
    WEMATH,
    mmbench,
    score_rows,
    write_tsv,
)

import evaluate
from benchmarks import BenchmarkError, Row, find, pass_at_k, score, score_file
from benchmarks.scoring import check_references
from rows import append_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:.*rows; the released.*")


@pytest.fixture
def scored(tmp_path):
    """scored(name, rows with the key "response", mode) -> what `score` returns."""
    return functools.partial(score_rows, tmp_path)


def test_responses_are_missing_or_unknown(scored, tmp_path):
    with pytest.raises(
        BenchmarkError,
        match=r"2 of 6 responses are missing: '1', '3'; --allow-missing scores them as wrong",
    ):
        scored(
            "LogicVista",
            [
                {k: v for k, v in row.items() if k != "response"} if row["index"] in (1, 3) else row
                for row in LOGICVISTA
            ],
        )
    with pytest.warns(UserWarning, match="1 of 6 responses are missing: '1'; scored as wrong"):
        found = scored(
            "LogicVista",
            [{k: v for k, v in LOGICVISTA[0].items() if k != "response"}, *LOGICVISTA[1:]],
            allow_missing=True,
        )
    assert found["headline"]["value"] == pytest.approx(100 / 3)
    assert found["counts"] == {"rows": 6, "scored": 5, "unmatched": 1, "missing": 1}
    rows, _ = find("LogicVista").load(tmp_path / "LogicVista.tsv")
    with pytest.raises(
        BenchmarkError, match="1 responses are to rows that LogicVista's file does not have: '77'"
    ):
        score(find("LogicVista"), rows, {"77": {0: "A"}}, "raw")
    with pytest.raises(BenchmarkError, match=r"missing: '1', '2', .*\(sample 1\)"):
        score(find("LogicVista"), rows[:2], {"1": {1: "A"}}, "raw")


def test_an_empty_prediction_matches_nothing(scored):
    """VLMEvalKit reads "None" back from its spreadsheet as a missing value.

    That holds even where an option's text is in the word.
    """
    for response in ("", "None", "NA", "nan"):
        found = scored("MMBench", [mmbench(5, 0, 1) | {"A": "n", "response": response}])
        assert found["headline"]["value"] == 0
        assert found["counts"]["unmatched"] == 1
    assert (
        scored("MMBench", [mmbench(5, 0, 1) | {"A": "Nan bread", "response": "nan bread"}])[
            "headline"
        ]["value"]
        == 100
    )


def test_pass_at_k_is_the_unbiased_estimator():
    """Against counting all pairs of 5 responses of which 2 are right: 7 of 10 hold a right one."""
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 0, 5) == 0
    assert pass_at_k(5, 1, 5) == 1
    assert pass_at_k(3, 1, 1) == pytest.approx(1 / 3)


def test_scores_of_several_samples_are_means(tmp_path):
    """Row 1 is right in samples 0 and 1, row 2 in sample 2: accuracies 50, 50, 50.

    Pass@2 = (1 + 2/3) / 2; pass@3 = 1.
    """
    path = write_tsv(
        tmp_path / "x.tsv",
        [
            dict(index=1, image=RED, question="?", answer="B", skill="spatial"),
            dict(index=2, image=RED, question="?", answer="C", skill="inductive"),
        ],
    )
    rows, _ = find("LogicVista").load(path)
    found = score(
        find("LogicVista"),
        rows,
        {"1": {0: "B", 1: "B", 2: "C"}, "2": {0: "B", 1: "?", 2: "C"}},
        "raw",
    )
    assert found["headline"]["value"] == pytest.approx(50)
    assert found["scores"]["spatial"] == pytest.approx(200 / 3)
    assert found["scores"]["numerical"] is None
    assert found["scores"]["pass@1"] == pytest.approx(50)
    assert found["scores"]["pass@2"] == pytest.approx(250 / 3)
    assert found["scores"]["pass@3"] == 100
    assert found["counts"] == {"rows": 2, "scored": 6, "unmatched": 1, "missing": 0}
    assert "pass@4" not in found["scores"]


def test_a_judge_is_asked_about_what_the_rule_cannot_settle(scored):
    """Its answer goes through the same rule; True and False are verdicts."""
    asked = []

    def judge(response, answer, row):
        asked.append((response, answer, row["question"], "image" in row))
        return {"A or C": "C", "1,00": True}.get(response, "no idea")

    half = dict(MATHVISION[3], response="One half.")
    rows = [*MATHVISION[:3], half, dict(MATHVISION[4], response="1,00")]
    found = scored("MathVision", rows, judge=judge, judge_name="judge.py:judge")
    assert asked == [
        ("A or C", "C", "?", False),
        ("One half.", r"\frac{1}{2}", "?", False),
        ("1,00", "1000", "?", False),
    ]
    assert found["headline"]["value"] == 60
    assert found["counts"]["unmatched"] == 1
    assert found["judge"] == "judge.py:judge"
    with pytest.raises(
        BenchmarkError, match="the judge returned NoneType; expected text, True or False"
    ):
        scored("MathVision", rows, judge=lambda *_: None)
    with pytest.raises(BenchmarkError, match="line 4: the judge failed: ZeroDivisionError"):
        scored("MathVision", rows, judge=lambda *_: 1 / 0)


def test_what_score_returns_is_the_contract(scored):
    for name, rows in (
        ("WeMath", WEMATH),
        ("MathVision", MATHVISION),
        ("MathVerse_MINI", MATHVERSE),
        ("LogicVista", LOGICVISTA),
        ("HallusionBench", HALLUSION),
        ("MMBench", MMBENCH),
    ):
        for mode in ("raw", "final"):
            found = scored(name, rows, mode)
            assert list(found) == ["benchmark", "mode", "headline", "scores", "counts", "judge"]
            assert found["benchmark"] == name
            assert found["mode"] == mode
            assert list(found["headline"]) == ["metric", "value"]
            assert type(found["headline"]["value"]) is float
            assert list(found["counts"]) == ["rows", "scored", "unmatched", "missing"]
            assert found["judge"] == "none (rule-based)"
            json.dumps(found, allow_nan=False)


def processor_seconds_of_children() -> float:
    """Of processes that have ended: time that other work on the machine does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_scoring_4000_rows_takes_less_than_five_seconds_and_no_torch(tmp_path):
    """The command, with start-up, on a file of 80 MB whose pictures are none.

    Stdout holds one JSON object and nothing else.
    """
    picture = "/" * 20000
    path = write_tsv(
        tmp_path / "x.tsv",
        [
            mmbench(i % 1000, i // 1000, i % 3) | {"image": picture, "question": "?", "hint": "h"}
            for i in range(4000)
        ],
    )
    responses = [
        {"index": i % 1000 + i // 1000 * 10**6, "response": f"I think it must be ({'AB'[i % 2]})."}
        for i in range(4000)
    ]
    append_jsonl(tmp_path / "r.jsonl", responses)
    begin = processor_seconds_of_children()
    files = ["--data", path, "--responses", tmp_path / "r.jsonl"]
    command = ["evaluate.py", "score", "--benchmark", "MMBench_DEV_EN", *files, "--mode", "raw"]
    root = Path(evaluate.__file__).parent
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert processor_seconds_of_children() - begin < 5
    found = json.loads(done.stdout)
    assert found["counts"] == {"rows": 4000, "scored": 4000, "unmatched": 0, "missing": 0}
    assert found["scores"]["vanilla all"]["Overall"] == 50
    assert "warning: " in done.stderr
    assert "has about 4300" in done.stderr
    check = (
        "import sys, evaluate\n"
        "evaluate.parse(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)\n"
        "evaluate.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, *command[1:]], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def plain_row(index, answer):
    return dict(index=index, image=RED, question="?", answer=answer, skill="spatial")


def test_small_letters_of_a_reference_are_read(tmp_path, recwarn):
    references = ["b", "a, c", "D", r"\boxed{A, C}"]
    rows = [plain_row(i, reference) for i, reference in enumerate(references)]
    path = write_tsv(tmp_path / "x.tsv", rows)
    append_jsonl(tmp_path / "r.jsonl", [{"index": i, "response": "A, C"} for i in range(4)])
    found = score_file(find("LogicVista"), path, tmp_path / "r.jsonl", "final")
    assert found["headline"]["value"] == 50
    assert not [warning for warning in recwarn if "own text" in str(warning.message)]


def test_references_are_held_against_themselves(tmp_path):
    """One line for all of them, with the first three; the rows are scored, as wrong."""
    answers = ["B", "", "A,C", "Z", "nan", "A, C", "3"]
    rows = [plain_row(i, answer) for i, answer in enumerate(answers)]
    path = write_tsv(tmp_path / "x.tsv", rows)
    append_jsonl(tmp_path / "r.jsonl", [{"index": i, "response": "B"} for i in range(len(rows))])
    with pytest.warns(UserWarning) as said:
        found = score_file(find("LogicVista"), path, tmp_path / "r.jsonl", "final")
    texts = [str(warning.message) for warning in said if "own text" in str(warning.message)]
    assert len(texts) == 1
    assert texts[0].startswith("4 of 7 rows have an answer that not even its own text matches; ")
    assert "x.tsv, line 3: 'answer' is ''; " in texts[0]
    assert "x.tsv, line 4: 'answer' is 'A,C'; " in texts[0]
    assert texts[0].endswith("; … and 1 more; scored as wrong")
    assert found["headline"]["value"] == pytest.approx(100 / 7)
    assert found["counts"]["rows"] == 7


def test_a_file_whose_references_nothing_matches_is_an_error(tmp_path):
    row = dict(index=1, A="red", B="blue", answer="", category="x", **{"l2-category": "y"})
    rows = [row | {"image": RED, "question": "?"}]
    path = write_tsv(tmp_path / "x.tsv", rows)
    append_jsonl(tmp_path / "r.jsonl", [{"index": 1, "response": "A"}])
    with pytest.raises(BenchmarkError, match="1 of 1 rows have .*expected the letter of an option"):
        score_file(find("MMBench"), path, tmp_path / "r.jsonl", "raw")


def test_ten_thousand_references_are_checked_in_seconds(tmp_path):
    cells = {"choices": "[]", "category": "x", "question": "?"}
    answers = [str(i) if i % 2 else rf"\boxed{{\frac{{{i}}}{{7}}}}" for i in range(10_000)]
    rows = [Row("x", str(i), cells | {"answer": answer}) for i, answer in enumerate(answers)]
    begin = time.process_time()
    check_references(find("MathVision"), rows)
    assert time.process_time() - begin < 5
