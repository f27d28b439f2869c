"""tools/agreement.py: our verdicts on its pairs, and the table."""

import time

import pytest

from tools import agreement
from tools.answer_pairs import PAIRS


@pytest.mark.parametrize("kind", PAIRS)
def test_our_verdicts_are_as_expected(kind):
    assert agreement.mistakes(agreement.ours(), PAIRS[kind]) == []


def test_there_are_enough_pairs_and_half_of_them_are_unequal():
    pairs = [pair for pairs in PAIRS.values() for pair in pairs]
    assert len(set(pairs)) == len(pairs) >= 150
    assert sum(not equal for *_, equal in pairs) >= len(pairs) / 2


def test_the_table_counts_right_verdicts_and_wrong_answers_accepted():
    everything = {kind: [pair for pair in pairs if not pair[2]] for kind, pairs in PAIRS.items()}
    nothing = {kind: [] for kind in PAIRS}
    lines = agreement.table({"ours": nothing, "yes": everything}).splitlines()
    words = PAIRS["words"]
    equal = sum(pair[2] for pair in words)
    assert lines[0] == "| kind | pairs | ours | yes |"
    assert lines[-3] == f"| words | {len(words)} | {len(words)} | {equal} |"
    assert "(100%)" in lines[-2]
    unequal = sum(len(pairs) for pairs in everything.values())
    assert lines[-1] == f"| **wrong answers accepted** | of {unequal} | 0 | {unequal} |"


def test_a_verifier_that_raises_or_hangs_refuses(monkeypatch):
    monkeypatch.setattr(agreement, "LIMIT", 1)

    def breaks(answer, reference):
        raise RuntimeError("no parser")

    def hangs(answer, reference):
        time.sleep(60)

    begin = time.monotonic()
    assert agreement.ask(breaks, "5", "5") is False
    assert agreement.ask(hangs, "5", "5") is False
    assert time.monotonic() - begin < 5


def test_a_verifier_that_is_not_installed_is_left_out(monkeypatch, capsys):
    def absent():
        raise ImportError("No module named 'nowhere'")

    monkeypatch.setattr(agreement, "VERIFIERS", {"ours": agreement.ours, "nowhere": absent})
    assert list(agreement.installed()) == ["ours"]
    assert "nowhere is left out: No module named 'nowhere'" in capsys.readouterr().out
