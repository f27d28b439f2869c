"""evaluate.py: held-out accuracy, single questions, and what importing it brings in."""

import pytest
import torch
from conftest import TEMPLATE, picture

import evaluate
import rewards
import toy
from data import Sample
from distributed import World


def test_images_swap_among_samples_with_as_many():
    pictures = [picture(28, 28, seed) for seed in range(6)]
    samples = [
        Sample("a", (pictures[0],), "<image>?", "1"),
        Sample("b", (), "?", "2"),
        Sample("c", (pictures[1],), "<image>?", "3"),
        Sample("d", (pictures[2], pictures[3]), "<image><image>?", "4"),
        Sample("e", (pictures[4],), "<image>?", "5"),
    ]
    swapped = evaluate.swap_images(samples)
    assert [s.images for s in swapped] == [
        (pictures[1],),
        (),
        (pictures[4],),
        (pictures[2], pictures[3]),
        (pictures[0],),
    ]
    assert [(s.id, s.question, s.answer) for s in swapped] == [
        (s.id, s.question, s.answer) for s in samples
    ]


def test_held_out_counts_every_sample_once_on_any_number_of_processes(make_policy, monkeypatch):
    """The sums of two processes' shares are the whole; waves do not change them."""
    policy = make_policy()
    samples = [toy.make_sample(toy.LEVELS[1], 0, "test", index) for index in range(7)]
    monkeypatch.setattr(rewards, "accuracy", lambda text, answer: float(len(text) % 2))
    measure = lambda world, tokens: evaluate.held_out(
        policy, samples, TEMPLATE, max_new_tokens=6, seed=0, max_cache_tokens=tokens, world=world
    )
    whole = measure(World(0, 1, torch.device("cpu")), 10**6)
    assert whole.keys() == {"accuracy", "format", "length", "accuracy_greedy", "accuracy_swapped"}
    assert measure(World(0, 1, torch.device("cpu")), 120) == pytest.approx(whole)
    monkeypatch.setattr(evaluate, "SAMPLES_AT_ONCE", 3)
    assert measure(World(0, 1, torch.device("cpu")), 10**6) == pytest.approx(whole)

    class Share(World):
        def sum(self, values):
            return values

    parts = [measure(Share(rank, 2, torch.device("cpu")), 10**6) for rank in range(2)]
    assert {name: parts[0][name] + parts[1][name] for name in whole} == pytest.approx(whole)


def test_a_text_only_set_has_no_swapped_accuracy(make_policy):
    found = evaluate.held_out(
        make_policy(), [Sample("a", (), "Sum circle.", "1")], TEMPLATE, max_new_tokens=4, seed=0
    )
    assert "accuracy_swapped" not in found and found["accuracy"] in (0.0, 1.0)
