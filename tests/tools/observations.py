"""observations.py: what tests of several tools share: responses, a toy scene, a command to run."""

import json
from types import SimpleNamespace

import torch
from conftest import picture

import rewards
from data import Sample
from dyco import Signals
from model import save_policy
from tools.observed import Observed

DYCO = SimpleNamespace(
    layers=[-1], shift="fisher_rao", text_scope="after_image", tau=0.05, ratio="relative"
)
SCENE = Sample(
    "0",
    (),
    "",
    "",
    {
        "asked": [],
        "colors": {"cross": "blue", "circle": "green", "square": "green"},
        "values": {"red": 1, "green": 2, "blue": 3},
    },
)


def observed(roles, scores=None, correct=(True,), prompt=None, **given) -> Observed:
    """Responses with some roles [B][T]; what is not given (mask, or a signal) is plain."""
    roles = torch.tensor(roles)
    blank = torch.zeros(roles.shape)

    def signal(name: str) -> torch.Tensor:
        return torch.tensor(given[name]) if name in given else blank

    return Observed(
        prompt=torch.arange(len(roles)) if prompt is None else torch.tensor(prompt),
        correct=torch.tensor(correct),
        tokens=roles + 5,
        mask=torch.tensor(given["mask"]) if "mask" in given else torch.ones(roles.shape).bool(),
        signals=Signals(*map(signal, Signals._fields)),
        roles=roles,
        scores=blank if scores is None else torch.tensor(scores),
    )


def prepare(main, policy, folder, monkeypatch):
    """start(*options) runs the command `main` on a policy and six rows with one, two and no images.

    Every other response counts as right, because a random policy is never right. Returns the
    folder that the command writes to.
    """
    save_policy(policy, folder / "model")
    for seed in range(3):
        picture(84, 56 + 28 * seed, seed).save(folder / f"{seed}.png")
    rows = [
        {
            "id": f"row {i}",
            "images": [f"{i % 3}.png"],
            "question": f"<image>Sum circle, cross {i}.",
            "answer": "4",
        }
        for i in range(4)
    ]
    two = ["0.png", "1.png"]
    rows.append({"id": "two", "images": two, "question": "<image>And <image>?", "answer": "yes"})
    rows.append({"id": 5, "question": "Sum.", "answer": 2})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turn = iter(range(10**6))
    monkeypatch.setattr(rewards, "accuracy", lambda text, answer: float(next(turn) % 2))

    def start(*options, out="out", data="rows.jsonl"):
        files = ["--model", folder / "model", "--data", folder / data, "--out", folder / out]
        sizes = ["rollout.group_size=4", "rollout.max_new_tokens=10", "train.threads=0"]
        main([*map(str, files), *options, *sizes])
        return folder / out

    return start
