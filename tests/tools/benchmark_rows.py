"""benchmark_rows.py: rows of the benchmarks with responses, and the files that hold them."""

import base64
import csv
import io
from pathlib import Path

from PIL import Image

from benchmarks import find, score


def encode(color, size=(56, 56), form="PNG", mode="RGB") -> str:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, form)
    return base64.b64encode(stream.getvalue()).decode()


RED = encode("red")
BLUE = encode("blue")


def write_tsv(path: Path, rows: list[dict], columns: list[str] | None = None) -> Path:
    """As pandas writes it: quoted where needed, nothing where a cell is missing."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([columns, *([row.get(name, "") for name in columns] for row in rows)])
    return path


def score_rows(folder, name, rows, mode="raw", **options):
    """What `score` returns for rows with the key "response"; a row without it has no response."""
    plain = {"image": RED, "question": "?"}
    cells = [{**plain, **{k: v for k, v in row.items() if k != "response"}} for row in rows]
    loaded, dropped = find(name).load(write_tsv(folder / f"{name}.tsv", cells))
    responses = {str(row["index"]): {0: row["response"]} for row in rows if "response" in row}
    return score(find(name), loaded, responses, mode=mode, dropped=dropped, **options)


def wemath(
    steps,
    number,
    hits,
    response="B",
    wrong="A",
    concepts=("Translation", "Area of Circles", "Area of Squares"),
):
    """The rows of one composite problem; hits of the steps and then of the whole.

    The right answer is B. With fewer hits than parts there are fewer rows.
    """
    parts = [*range(1, steps + 1), "multi"]
    return [
        dict(
            index=f"{steps}-{number}-{part}",
            ID=str(number),
            key=f"{steps}steps_{part}",
            A="one",
            B="two",
            answer="B",
            response=response if hit else wrong,
            **{"knowledge concept": "['a', 'b']" if part == "multi" else concepts[part - 1]},
        )
        for part, hit in zip(parts, hits, strict=False)
    ]


WEMATH = [
    *wemath(2, 1, (1, 1, 1), r"It is \boxed{B}"),  # complete mastery
    *wemath(2, 2, (1, 0, 1)),  # by rote, mastered if one is loose
    *wemath(2, 3, (1, 1, 0)),  # does not generalise
    *wemath(2, 4, (0, 0, 1), wrong="I do not know"),  # by rote
    *wemath(3, 1, (1, 1, 0, 0), concepts=("Rotation", "Rotation", "Area of Squares")),
]  # knows too little; ID 1 is used twice


MATHVISION = [
    dict(
        index=1, choices="['3', '4']", answer="B", category="algebra", response="The answer is (B)."
    ),
    dict(
        index=2, choices="['A', 'B', 'C', 'D', 'E']", answer="C", category="algebra", response="Z"
    ),
    dict(index=3, choices="['A', 'B', 'C']", answer="C", category="algebra", response="A or C"),
    dict(
        index=4,
        choices="[]",
        answer=r"\frac{1}{2}",
        category="counting",
        response=r"<think>Half.</think>So it is \boxed{0.5}.",
    ),
    dict(index=5, choices="[]", answer="1000", category="counting", response="1,000"),
]


def mathverse(
    index,
    version,
    answer,
    response,
    kind="multi-choice",
    listed="Find x.\nChoices:\nA:2\nB:2\u221a{{3}}\nC:5",
    subject="Plane Geometry",
):
    facts = repr(
        {"split": "testmini", "source": "GeoQA", "subject": subject, "subfield": "Euler's line"}
    )
    return dict(
        index=index,
        problem_version=version,
        question_type=kind,
        question_for_eval=listed,
        query_cot="Reason. ?",
        answer=answer,
        metadata=facts,
        response=response,
    )


MATHVERSE = [
    mathverse(1, "Vision Only", "B", "B"),
    mathverse(2, "Text Lite", "B", "A"),
    mathverse(3, "Text Lite", "C", "it is 5"),  # by the option's text
    mathverse(4, "Text Lite", "C", r"So \boxed{12.0}", kind="free-form", subject="Functions")
    | {"answer": "12"},
    mathverse(5, "Text Lite", "D", "D", listed="Find x.", subject="Functions"),
]  # options in the picture only


LOGICVISTA = [
    dict(index=1, answer="A, C", skill="['inductive']", response="C and A"),
    dict(
        index=2, answer="A, C", skill="['inductive', 'spatial']", response="A"
    ),  # no partial credit
    dict(index=3, answer="E", skill="deductive", response="<think>B? C?</think><answer>E</answer>"),
    dict(index=4, answer="3", skill="deductive", response="3"),  # a numeric label
    dict(
        index=5, answer="A,C", skill="mechanical", response="A, C"
    ),  # without spaces it is no list
    dict(index=6, answer="I", skill="spatial", response="I"),
]


def hallusion(l2, figure, question, answer, response, **more):
    category = "VS" if l2 == "chart" else "VD"
    return dict(
        index=f"hb_{category}_{l2}_0_{figure}_{question}",
        answer=answer,
        category=category,
        response=response,
        **{"l2-category": l2},
        **more,
    )


HALLUSION = [
    hallusion("illusion", 0, 0, "Yes", "Yes, it is."),
    hallusion("illusion", 0, 1, "No", "No."),
    hallusion("illusion", 1, 0, "Yes", "No"),
    hallusion("illusion", 1, 1, "Yes", "It seems so."),
    hallusion("figure", 1, 0, "No", "No!"),
    hallusion("chart", 0, 0, "No", "no"),
    hallusion("chart", 1, 0, "Yes", "<answer>**Yes**</answer>"),
    hallusion("chart", 2, 0, "Yes", "Yes", image=""),
]  # no picture: not scored, and its response is not looked at


def mme(category, picture, hits):
    return [
        dict(
            index=f"{category}{picture}{i}",
            category=category,
            image_path=picture,
            answer=("Yes", "No")[i % 2],
            response=(("Yes", "No")[i % 2]) if hit else "perhaps",
        )
        for i, hit in enumerate(hits)
    ]


def mmbench(question, rotation, hit, ability=("coarse_perception", "image_scene"), **more):
    return (
        dict(
            index=question + 10**6 * rotation,
            A=("red", "blue")[rotation % 2],
            B=("blue", "red")[rotation % 2],
            answer=("A", "B")[rotation % 2],
            response=("A", "B")[(rotation + (not hit)) % 2],
            split="dev",
            category=ability[1],
            **{"l2-category": ability[0]},
        )
        | more
    )


LOGIC = ("logic_reasoning", "future_prediction")


MMBENCH = [
    mmbench(5, 0, 1),
    mmbench(5, 1, 1),
    mmbench(5, 2, 1),  # all three rotations
    mmbench(7, 0, 1),
    mmbench(7, 1, 0),  # one rotation fails the question
    mmbench(100005, 0, 1, LOGIC),  # alone: judged on what is there
    mmbench(11, 1, 1, LOGIC),  # no first row: not a question, but a row
    mmbench(12, 0, 1, LOGIC),
    mmbench(12, 1, 0, LOGIC, response="Hard to say."),
]
