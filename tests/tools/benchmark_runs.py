"""benchmark_runs.py: a small file of each benchmark, and the command that answers it."""

import base64
import io
import json

from benchmark_rows import write_tsv
from conftest import picture

import evaluate
import toy
from model import Policy, save_policy


def image(size: tuple[int, int], seed: int) -> str:
    stream = io.BytesIO()
    picture(*size, seed).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


A = image((56, 56), 0)
B = image((84, 140), 1)


META = "{'subject': 'Functions', 'subfield': 'Lines'}"


FILES = {
    "WeMath": [
        dict(
            index=i,
            image=A,
            ID="1",
            key=key,
            question="Which?",
            A="1",
            B="2",
            answer="A",
            **{"knowledge concept": "Rotation"},
        )
        for i, key in enumerate(("2steps_1", "2steps_2", "2steps_multi"))
    ],
    "MathVision_MINI": [
        dict(index=1, image=A, question="Which?", choices="['A', 'B']", answer="A", category="x"),
        dict(
            index=2,
            image=B,
            question="How many of them are there in the whole picture?",
            choices="[]",
            answer="5",
            category="x",
        ),
    ],
    "MathVerse_MINI": [
        dict(
            index=1,
            image=A,
            question="Which?",
            question_for_eval="Choices:\nA:1\nB:2",
            question_type="multi-choice",
            problem_version="Vision Only",
            answer="A",
            metadata=META,
        )
    ],
    "LogicVista": [
        dict(index=1, image=A, question="Select from A-E", answer="A, C", skill="spatial")
    ],
    "HallusionBench": [
        dict(
            index="hb_a_b_0_1_0",
            image=A,
            question="Is it?",
            answer="Yes",
            category="VD",
            **{"l2-category": "b"},
        ),
        dict(
            index="hb_a_b_0_0_0",
            image="",
            question="Is it?",
            answer="Yes",
            category="VD",
            **{"l2-category": "b"},
        ),
    ],
    "MME": [
        dict(
            index=i,
            image=(A, "0")[i],
            question="Is it?",
            answer="Yes",
            category="color",
            image_path="1.png",
        )
        for i in range(2)
    ],
    "MMBench_DEV_EN_V11": [
        dict(
            index=i,
            image=cell,
            question=question,
            A="red",
            B="blue",
            answer="A",
            category="x",
            **{"l2-category": "y"},
        )
        for i, cell, question in (
            (3, A, "What?"),
            (4, str([A, B]), "Are they the same?"),
            (1000003, "3", "What?"),
            (5, B, "Sum?"),
        )
    ],
}


QUICK = ("--min-pixels", "3136", "--max-new-tokens", "4")


def save_tiny_policy(folder, tokenizer, image_processor):
    """Save a random policy, smaller than conftest's. Returns the folder."""
    hf = toy.build_model(tokenizer, hidden=64, layers=2)
    save_policy(Policy(hf, tokenizer, image_processor), folder)
    return folder


def run_benchmark(model, folder, name, *options, rows=None, out="out"):
    """`evaluate.py run` in this process, on rows in a file of this folder. Returns the run's."""
    data = write_tsv(folder / f"{name}.tsv", rows or FILES[name])
    files = ["--model", model, "--data", data, "--out", folder / out]
    evaluate.main(["run", "--benchmark", name, *map(str, files), *QUICK, *options])
    return folder / out


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
