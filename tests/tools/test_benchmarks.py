"""The seven benchmarks on hand-made files whose scores are worked out by hand, and their prompts.

The expectations were written from the description of VLMEvalKit's behaviour, not from its code or
ours.
"""

import functools
from dataclasses import replace

import pytest
from benchmark_rows import (
    HALLUSION,
    LOGICVISTA,
    MATHVERSE,
    MATHVISION,
    MMBENCH,
    RED,
    WEMATH,
    mathverse,
    mmbench,
    mme,
    score_rows,
    wemath,
    write_tsv,
)

from benchmarks import BENCHMARKS, Benchmark, BenchmarkError, Row, find, is_equal, score
from benchmarks.visual import MME
from benchmarks.wemath import WEMATH_DOMAINS

pytestmark = pytest.mark.filterwarnings("ignore:.*rows; the released.*")


@pytest.fixture
def scored(tmp_path):
    """scored(name, rows with the key "response", mode) -> what `score` returns."""
    return functools.partial(score_rows, tmp_path)


def test_wemath(scored):
    """Five problems: CM 1 strict, 2 loose; RM 2 strict, 1 loose; IG 1; IK 1.

    Strict (1 + 0.5) / 5 = 30, loose (2 + 0.5) / 5 = 50.

    RM strict 2 / (1 + 2), loose 1 / (2 + 1). One-step hits 2 + 1 + 2 + 0 + 2 of 11. Two-step 3 of
    4, three-step 0 of 1. Translation 3 of 4 and Rotation 2 of 2: their domain is (75 + 100) / 2.
    Circles 2 of 4, Squares 0 of 1: (50 + 0) / 2.
    """
    found = scored("WeMath", WEMATH)
    assert found["headline"] == {"metric": "Score (Strict)", "value": pytest.approx(30)}
    scores = found["scores"]
    domains, by_letter = scores.pop("domain"), scores.pop('letter after "Answer"')
    assert scores == pytest.approx(
        {
            "Score (Strict)": 30,
            "InsufficientKnowledge (Strict)": 20,
            "InadequateGeneralization (Strict)": 20,
            "CompleteMastery (Strict)": 20,
            "RoteMemorization (Strict)": 200 / 3,
            "Score (Loose)": 50,
            "InsufficientKnowledge (Loose)": 20,
            "InadequateGeneralization (Loose)": 20,
            "CompleteMastery (Loose)": 40,
            "RoteMemorization (Loose)": 100 / 3,
            "One-step(S1)": 700 / 11,
            "Two-step(S2)": 75,
            "Three-step(S3)": 0,
        }
    )
    assert {name: value for name, value in domains.items() if value is not None} == {
        "Basic Transformations of Figures": 87.5,
        "Calculation of Plane Figures": 25,
    }
    assert len(domains) == 12
    # By its own rule "It is \boxed{B}" is no answer: problem 1 turns into insufficient knowledge,
    # which makes (0 + 0.5) / 5 and (1 + 0.5) / 5.
    assert by_letter["Score (Strict)"] == pytest.approx(10)
    assert by_letter["Score (Loose)"] == pytest.approx(30)
    assert by_letter["InsufficientKnowledge (Strict)"] == pytest.approx(40)
    assert by_letter["RoteMemorization (Strict)"] == pytest.approx(100)
    assert found["counts"] == {"rows": 16, "scored": 16, "unmatched": 2, "missing": 0}


def test_wemath_counts_problems_not_525(scored):
    """Nothing answered and nothing to divide by: no rote rate, no error.

    A problem that lacks a row is left out, and said so.
    """
    nothing = scored("WeMath", wemath(2, 1, (0, 0, 0)))
    assert nothing["headline"]["value"] == 0
    assert nothing["scores"]["RoteMemorization (Strict)"] is None
    assert nothing["scores"]["Three-step(S3)"] is None
    with pytest.warns(UserWarning, match="WeMath: 1 of 2 problems lack a row"):
        part = scored("WeMath", [*wemath(2, 1, (1, 1, 1)), *wemath(2, 2, (0, 0, 0))[1:]])
    assert part["headline"]["value"] == 100
    assert part["scores"]["One-step(S1)"] == pytest.approx(200 / 3)
    with pytest.raises(BenchmarkError, match="no problem has all its rows"):
        scored("WeMath", wemath(2, 1, (1, 1, 1))[1:])
    with pytest.raises(
        BenchmarkError, match="line 2: 'key' is '2steps_3'; expected such as '2steps_1'"
    ):
        scored("WeMath", [dict(row, key="2steps_3") for row in wemath(2, 1, (1, 1, 1))[:1]])
    with pytest.raises(
        BenchmarkError, match="line 5: 2steps_1 of problem '1' stands at .*line 2, too"
    ):
        scored("WeMath", [*wemath(2, 1, (1, 1, 1)), dict(wemath(2, 1, (1,))[0], index="again")])
    with pytest.warns(UserWarning, match="1 knowledge concepts are in no domain, 'Alchemy'"):
        scored("WeMath", wemath(2, 1, (1, 1, 1), concepts=("Alchemy", "Rotation")))


def test_wemaths_tree_has_67_concepts_in_12_domains():
    leaves = [leaf for leaves in WEMATH_DOMAINS.values() for leaf in leaves]
    assert len(WEMATH_DOMAINS) == 12
    assert len(leaves) == len(set(leaves)) == 67
    assert all(leaf == leaf.strip() for leaf in leaves)


def test_mathvision(scored):
    """Row 1 is right, and 4 and 5 are, 4 in its box; 2 is settled as none of them, 3 names two.

    So 3 of 5 are right and 4 of 5 settled, in either mode.
    """
    raw, final = scored("MathVision", MATHVISION), scored("MathVision", MATHVISION, "final")
    assert raw["headline"] == {"metric": "accuracy", "value": 60}
    assert raw["counts"]["unmatched"] == 1
    assert raw["scores"] == {
        "Overall": 60,
        "category": {"algebra": pytest.approx(100 / 3), "counting": 100},
        "prefetch rate": {"Overall": 80, "algebra": pytest.approx(200 / 3), "counting": 100},
    }
    assert final["headline"]["value"] == 60
    assert final["scores"]["category"]["counting"] == 100
    assert final["scores"]["prefetch rate"]["Overall"] == 80
    for choices, message in (
        ("None", "'choices' is empty"),
        ("{}", "expected a list of at most 26"),
        ("[" * 300, "cannot be read"),
        (str([1] * 27), "at most 26"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            scored("MathVision", [dict(MATHVISION[0], choices=choices)])


@pytest.mark.parametrize(
    "text, answer, listed, hit",
    [
        ("140°", "D", "A:40°\nB:60°\nC:120°\nD:140°", True),
        ("140", "D", "A:40°\nB:60°\nC:120°\nD:140°", True),
        ("3 cm", "C", "A:1cm\nB:2cm\nC:3cm\nD:4cm", True),
        ("13cm", "C", "A:1cm\nB:2cm\nC:3cm\nD:4cm", None),
        ("150°", "A", "A:50°\nB:80°\nC:100°", None),
        ("It is 50 °.", "A", "A:50°\nB:80°\nC:100°", True),
        ("3.5", "A", "A:3\nB:4", None),
        ("12 cm", "C", None, None),
        ("C", "C", None, True),
    ],
)
def test_mathverse_reads_options_as_a_whole(text, answer, listed, hit):
    row = mathverse(
        1, "Text Lite", answer, text, listed=f"Find x.\nChoices:\n{listed}" if listed else "Find x."
    )
    assert find("MathVerse_MINI").check(Row("row", "1", row), text) is hit


def test_a_letter_beside_a_boxed_value_is_found(scored):
    rows = [
        mathverse(
            1, "Text Lite", "C", r"<think>B?</think>The area is \boxed{24}. So the answer is C."
        ),
        mathverse(2, "Text Lite", "C", r"The answer is C, not \boxed{A}"),
    ]  # a box that settles it is not asked about
    found = scored("MathVerse_MINI", rows, "final")
    assert found["scores"]["Overall"] == 50
    assert found["counts"]["unmatched"] == 0


def test_mathverse(scored):
    """Vision Only 1 of 1, Text Lite 3 of 4: the versions' mean is 87.5, the rows' 4 of 5.

    The equality of free-form answers reads the box in either mode. An apostrophe in the metadata is
    no trouble.
    """
    raw, final = scored("MathVerse_MINI", MATHVERSE), scored("MathVerse_MINI", MATHVERSE, "final")
    assert raw["headline"] == {"metric": "mean over problem versions", "value": 87.5}
    assert raw["scores"]["Overall"] == 80
    assert raw["scores"]["problem_version"] == {
        "Text Lite": {
            "Overall": 75,
            "subject": {"Functions": 100, "Plane Geometry": 50},
            "subfield": {"Euler's line": 75},
        },
        "Vision Only": {
            "Overall": 100,
            "subject": {"Plane Geometry": 100},
            "subfield": {"Euler's line": 100},
        },
    }
    assert final["headline"]["value"] == 87.5
    assert final["scores"]["Overall"] == 80
    assert raw["counts"]["unmatched"] == 0
    with pytest.raises(BenchmarkError, match="'question_type' is 'essay'; expected"):
        scored("MathVerse_MINI", [dict(MATHVERSE[0], question_type="essay")])
    for bad, message in (
        ("subject: x", "'metadata' is .*cannot be read"),
        ("{'subject': 'x'}", "expected a dict with 'subject' and 'subfield'"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            scored("MathVerse_MINI", [dict(MATHVERSE[0], metadata=bad)])


def test_logicvista(scored):
    """Raw: rows 1, 4 and 6 of 6; row 3 names B, C and E.

    Final: 3, too. Skills are looked for in the text; one has no rows.
    """
    raw, final = scored("LogicVista", LOGICVISTA), scored("LogicVista", LOGICVISTA, "final")
    assert raw["headline"]["value"] == raw["scores"].pop("Overall") == 50
    assert raw["scores"] == {
        "inductive": 50,
        "deductive": 50,
        "numerical": None,
        "spatial": 50,
        "mechanical": 0,
    }
    assert final["headline"]["value"] == pytest.approx(200 / 3)
    assert final["scores"]["deductive"] == 100
    assert raw["counts"]["unmatched"] == 1
    assert final["counts"]["unmatched"] == 0


def test_hallusionbench(scored):
    """Seven rows.

    Final: 5 right. Figures: illusion 0 yes, 1 no; figure 1 yes; chart 0 and 1 yes: 4 of 5.
    Questions: illusion 0 (yes, no) no, 1 (yes, unknown) no; figure 0 yes; chart 0 yes: 2 of 4. The
    same set and figure numbers of two l2-categories are different figures. VD alone: 3 of 5, 2 of
    3, 1 of 3.

    Raw: the stars keep chart 1 unknown: 4 of 7, figures 3 of 5, questions 1 of 4.
    """
    final, raw = scored("HallusionBench", HALLUSION, "final"), scored("HallusionBench", HALLUSION)
    assert final["headline"] == {"metric": "aAcc", "value": pytest.approx(500 / 7)}
    assert final["scores"]["Overall"] == pytest.approx({"aAcc": 500 / 7, "fAcc": 80, "qAcc": 50})
    assert final["scores"]["mean of aAcc, fAcc, qAcc"] == pytest.approx((500 / 7 + 80 + 50) / 3)
    assert final["scores"]["category"]["VD"] == pytest.approx(
        {"aAcc": 60, "fAcc": 200 / 3, "qAcc": 100 / 3}
    )
    assert final["scores"]["category"]["VS"] == {"aAcc": 100, "fAcc": 100, "qAcc": 100}
    assert final["scores"]["l2-category"]["chart"] == {"aAcc": 100, "fAcc": 100, "qAcc": 100}
    assert raw["scores"]["Overall"] == pytest.approx({"aAcc": 400 / 7, "fAcc": 60, "qAcc": 25})
    assert final["counts"] == {"rows": 7, "scored": 7, "unmatched": 1, "missing": 0}
    assert raw["counts"]["unmatched"] == 2
    with pytest.raises(BenchmarkError, match="the index is 'hb_1'; expected six parts"):
        scored("HallusionBench", [dict(HALLUSION[0], index="hb_1")])
    with pytest.raises(BenchmarkError, match="'answer' is 'yes'; expected 'Yes' or 'No'"):
        scored("HallusionBench", [dict(HALLUSION[0], answer="yes")])


def test_mme(scored):
    """color: 3 of 4 answers, 1 of 2 pairs: 75 + 50.

    OCR, whose picture has the same name: 1 of 2, no pair: 50 + 0. existence: 2 of 3 answers, the
    first two of the picture right: 66.7 + 100. count: 2 of 3, and but for the picture with one
    question 1 of 1 pairs. scene: one question alone, no pairs, no points. code_reasoning: 100 +
    100. total = 125 + 50 + 2 · 166.7 + 200.
    """
    rows = [
        *mme("color", "1.png", (1, 1)),
        *mme("color", "2.png", (1, 0)),
        *mme("OCR", "1.png", (0, 1)),
        *mme("existence", "1.png", (1, 1, 0)),
        *mme("count", "1.png", (1, 1)),
        *mme("count", "2.png", (0,)),
        *mme("scene", "1.png", (1,)),
        *mme("code_reasoning", "1.png", (1, 1)),
    ]
    with pytest.warns(UserWarning) as said:
        found = scored("MME", rows)
    perception = 125 + 50 + 2 * (200 / 3 + 100)
    assert found["headline"] == {
        "metric": "100 · (perception + reasoning) / 2800",
        "value": pytest.approx((perception + 200) / 28),
    }
    categories = found["scores"].pop("category")
    assert found["scores"] == pytest.approx(
        {"perception": perception, "reasoning": 200, "total": perception + 200}
    )
    assert {
        name: points for name, points in categories.items() if points is not None
    } == pytest.approx(
        {"color": 125, "OCR": 50, "existence": 500 / 3, "count": 500 / 3, "code_reasoning": 200}
    )
    assert len(categories) == 14
    texts = [str(warning.message) for warning in said]
    assert any("count: 1 pictures have one question" in text for text in texts)
    assert any("no pairs of questions in artwork, " in text for text in texts)
    with pytest.raises(BenchmarkError, match="'category' is 'ocr'; expected one of OCR, artwork"):
        scored("MME", mme("ocr", "1.png", (1, 1)))


@pytest.mark.filterwarnings("error")
def test_a_whole_mme_reaches_2800(scored, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "MME", replace(find("MME"), rows=28))
    found = scored(
        "MME",
        [
            row
            for category in sum(MME.CATEGORIES.values(), ())
            for row in mme(category, "1.png", (1, 1))
        ],
    )
    assert found["headline"]["value"] == 100
    assert found["scores"]["perception"] == 2000
    assert found["scores"]["reasoning"] == 800


def test_mmbench(scored):
    """Questions 5, 7, 100005, 12 of which 5 and 100005 pass all rows: 50.

    First rows 4 of 4. All rows 3 + 1 + 1 + 1 + 1 of 9.
    """
    found = scored("MMBench_DEV_EN_V11", MMBENCH)
    assert found["headline"] == {"metric": "circular accuracy", "value": 50}
    assert found["counts"]["unmatched"] == 1
    assert found["scores"]["circular"] == {
        "Overall": 50,
        "l2-category": {"CP": 50, "LR": 50},
        "category": {"image_scene": 50, "future_prediction": 50},
    }
    assert found["scores"]["vanilla circ0"]["Overall"] == 100
    assert found["scores"]["vanilla all"] == {
        "Overall": pytest.approx(700 / 9),
        "l2-category": {"CP": 80, "LR": 75},
        "category": {"image_scene": 80, "future_prediction": 75},
    }


def test_mmbench_groups_and_splits(scored):
    """g_index wins over the remainder of the index; several splits are reported each."""
    rows = [
        mmbench(5, 0, 1) | {"g_index": 5},
        mmbench(6, 0, 0) | {"g_index": 5},
        mmbench(8, 0, 1) | {"g_index": 8, "split": "test"},
    ]
    found = scored("MMBench", rows)
    assert found["scores"]["circular"]["Overall"] == 50
    assert {
        split: part["Overall"] for split, part in found["scores"]["circular"]["split"].items()
    } == {"dev": 0, "test": 100}
    with pytest.raises(BenchmarkError, match="no row is the first of its rotations"):
        scored("MMBench", [mmbench(5, 1, 1)])
    with pytest.raises(BenchmarkError, match="'index' is 'five'; expected a whole number"):
        scored("MMBench", [mmbench(5, 0, 1) | {"index": "five"}])


def test_an_option_called_none_can_be_neither_shown_nor_matched(scored, tmp_path):
    row = mmbench(5, 0, 1) | {"B": "None", "C": "blue", "answer": "B", "response": "B"}
    found = scored("MMBench", [row])
    assert found["headline"]["value"] == 0
    assert found["counts"]["unmatched"] == 1
    rows, _ = find("MMBench").load(tmp_path / "MMBench.tsv")
    assert "Options:\nA. red\nC. blue\nPlease" in find("MMBench").prompt(rows[0])


def test_prompts_are_the_datasets_own():
    def row(**cells):
        return Row("x.tsv, line 2", "1", cells)

    question = row(
        question="How many?",
        hint="Look.",
        A="one",
        B="two",
        requirement="Regarding the format …",
        query_cot="Reason. How many?",
    )
    select = "Please select the correct answer from the options above. \n"
    assert find("MMBench_DEV_EN").prompt(question) == (
        f"Hint: Look.\nQuestion: How many?\nOptions:\nA. one\nB. two\n{select}"
    )
    assert (
        find("WeMath").prompt(question)
        == "Hint: Look.\nQuestion: How many?\nOptions:\nA. one\nB. two\n"
    )
    assert (
        find("WeMath_COT").prompt(question)
        == find("WeMath").prompt(question) + "\nRegarding the format …"
    )
    assert find("MMBench_DEV_EN").prompt(row(question=" ?", B="b", D="d")) == (
        f"Question:  ?\nOptions:\nB. b\nD. d\n{select}"
    )
    for name in (
        "MathVision_MINI",
        "MathVerse_MINI",
        "MathVerse_MINI_Vision_Only",
        "LogicVista",
        "HallusionBench",
        "MME",
    ):
        assert find(name).prompt(question) == "How many?"
    assert find("MathVerse_MINI_Vision_Only_cot").prompt(question) == "Reason. How many?"


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if not name.startswith("toy")])
def test_a_missing_column_is_named_and_the_row_count_compared(tmp_path, name):
    benchmark = find(name)
    columns = ["index", "image", *benchmark.columns]
    cells = dict.fromkeys(columns, "x") | {"index": "1", "image": RED}
    for absent in columns[2:]:
        path = write_tsv(tmp_path / "x.tsv", [cells], [c for c in columns if c != absent])
        with pytest.raises(
            BenchmarkError, match=f"x.tsv: no column '{absent}'; found the columns index, image"
        ):
            benchmark.load(path)
    path = write_tsv(tmp_path / "x.tsv", [cells], columns)
    if benchmark.rows is None:
        return
    with pytest.warns(
        UserWarning, match=f"x.tsv: 1 rows; the released {name} has .*{benchmark.rows}"
    ):
        assert len(benchmark.load(path)[0]) == 1


def test_names_are_vlmevalkits_and_others_get_the_nearest():
    assert {
        "WeMath",
        "WeMath_COT",
        "MathVision",
        "MathVision_MINI",
        "MathVerse_MINI",
        "MathVerse_MINI_Vision_Only",
        "MathVerse_MINI_Vision_Only_cot",
        "LogicVista",
        "HallusionBench",
        "MME",
        "MMBench_DEV_EN",
        "MMBench_DEV_EN_V11",
    } <= BENCHMARKS.keys()
    with pytest.raises(
        BenchmarkError, match="no benchmark 'MMBench_EN_DEV'; did you mean 'MMBench_DEV_EN'"
    ):
        find("MMBench_EN_DEV")
    with pytest.raises(BenchmarkError, match="MME is read from a file; expected --data"):
        find("MME").load(None)


def test_another_benchmark_is_one_entry(scored, monkeypatch):
    class Counting(Benchmark):
        """Free-form numbers."""

        def check(self, row, text):
            return is_equal(text, row["answer"]) or None

    monkeypatch.setitem(BENCHMARKS, "Counting", Counting("Counting", 1200))
    found = scored(
        "Counting",
        [
            dict(index=1, answer="3", response=r"So \boxed{3}"),
            dict(index=2, answer="4", response="5"),
        ],
        "final",
    )
    assert found["headline"] == {"metric": "accuracy", "value": 50}


def test_the_toy_is_a_benchmark_too():
    benchmark = find("toy")
    rows, dropped = benchmark.load(None)
    assert len(rows) == 200
    assert not dropped
    assert benchmark.pictures(rows[3], ".")[0].size == (112, 112)
    right = {row.index: {0: f"<think>x</think><answer>{row['answer']}</answer>"} for row in rows}
    assert score(benchmark, rows, right, "final")["headline"] == {
        "metric": "accuracy",
        "value": 100,
    }
    assert score(benchmark, rows, right, "raw")["headline"]["value"] == 0
    with pytest.raises(BenchmarkError, match="toy is drawn, not read from a file"):
        benchmark.load("x.tsv")
