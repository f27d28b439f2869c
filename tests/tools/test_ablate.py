"""ablate.py: statistics by hand, the grid as configs, a run that is not repeated."""

import json
from xml.etree import ElementTree

import pytest
import torch

from config import DEFAULTS, load_config
from run_folder import FolderError, exclusive
from tools import ablate


def line(cell, seed, curve, greedy=(0.5, 0.5)):
    overrides = next((cells[cell] for cells in ablate.PARTS.values() if cell in cells), [])
    return {
        "cell": cell,
        "seed": seed,
        "settings": [*ablate.REGIME, *overrides],
        "steps": [0, 8, 24],
        "accuracy": curve,
        "greedy": list(greedy),
        "online": curve,
        "seconds": 1.0,
    }


def test_every_cell_is_a_config_and_has_its_host():
    for part, cells in ablate.PARTS.items():
        for cell, overrides in cells.items():
            load_config(DEFAULTS, [*ablate.REGIME, *overrides])
            host = cell.rsplit("/", 1)[0] + "/host"
            assert any(host in others for others in ablate.PARTS.values()), cell
    names = [cell for cells in ablate.PARTS.values() for cell in cells]
    assert (
        len(names) == len(set(names))
        and len(ablate.PARTS["table"]) == 16
        and len(ablate.PARTS["controls"]) == 20
    )


def test_measures_and_paired_differences():
    """Area: (8·(.2 + .4)/2 + 16·(.4 + .8)/2) / 24 = (2.4 + 9.6) / 24 = 0.5."""
    row = line("grpo/paper", 0, [0.2, 0.4, 0.8], greedy=(0.1, 0.9))
    assert [
        ablate.measure(row, name) for name in ("final", "greedy", "area", "online")
    ] == pytest.approx([80, 90, 50, 140 / 3])
    runs = {
        (r["cell"], r["seed"]): r
        for r in (
            row,
            line("grpo/host", 0, [0.2, 0.4, 0.7]),
            line("grpo/paper", 1, [0.2, 0.4, 0.5]),
            line("grpo/host", 1, [0.2, 0.4, 0.6]),
            line("grpo/paper", 2, [0.0, 0.0, 0.0]),
        )
    }
    assert ablate.differences(runs, ["grpo/paper"], ["grpo/host"], "final") == pytest.approx(
        [10, -10]
    )  # seed 2 has no partner


def test_bootstrap_covers():
    """Of 1000 samples of eight normals the interval holds the true mean 95 % of the time (standard error 0.7); plain percentiles do for 89 %."""
    draws = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1)) + 3
    inside = sum(
        low <= 3 <= high for _, low, high in (ablate.bootstrap(x.tolist(), 1000) for x in draws)
    )
    assert 0.93 < inside / 1000 < 0.97
    assert ablate.bootstrap([2.0] * 4) == (2, 2, 2) and ablate.bootstrap([1.0, 3.0, 5.0]) == (
        3,
        None,
        None,
    )


def test_all_hosts_are_averaged_within_a_seed():
    """Four hosts that share a seed's luck are one observation of it, not four."""
    runs = {
        (f"{host}/{rule}", seed): line("", seed, [0, 0, 0.1 * seed * (rule == "paper") + 0.01 * i])
        for i, host in enumerate(ablate.HOSTS)
        for rule in ("paper", "host")
        for seed in range(3)
    }
    del runs["sapo/paper", 1]
    cells, hosts = ([f"{host}/{rule}" for host in ablate.HOSTS] for rule in ("paper", "host"))
    assert ablate.differences(runs, cells, hosts, "final") == pytest.approx(
        [0, 20]
    ) and ablate.shared_seeds(runs, cells) == [0, 2]


def test_lines_of_another_regime_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "RESULTS", tmp_path)
    (tmp_path / "runs.jsonl").write_text(
        json.dumps(line("grpo/host", 0, [0, 0, 0]) | {"settings": ["train.steps=41"]}) + "\n"
    )
    with pytest.raises(
        ValueError, match="runs.jsonl, line 1: grpo/host, seed 0, was run with train.steps=41"
    ):
        ablate.read_runs()


def test_report_and_missing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "RESULTS", tmp_path)
    asked = []

    def run_one(cell, overrides, seed, scratch):
        asked.append((cell, seed))
        good = 0.1 * cell.endswith("/paper")
        return line(cell, seed, [0.3, 0.5, 0.7 + good + 0.01 * seed])

    monkeypatch.setattr(ablate, "run_one", run_one)
    ablate.run_missing(["table"], 2, 1, tmp_path)
    assert len(asked) == 32 and asked[:16] == [
        (cell, 0) for cell in ablate.PARTS["table"]
    ]  # a whole seed before the next
    ablate.run_missing(["table"], 4, 1, tmp_path)
    assert len(asked) == 64 and {seed for _, seed in asked[32:]} == {2, 3}
    text = ablate.tabulate()
    assert (
        "| grpo/paper | 4 | 81.5 | +10.0 (+10.0 … +10.0) | 50.0 | +0.0 (+0.0 … +0.0) |" in text
        and "| grpo/host | 4 | 71.5 | – |" in text
    )
    assert "| **all/paper** | 4 | 81.5 | +10.0 (+10.0 … +10.0) |" in text and "controls" not in text
    assert (
        "| gspo/paper minmax − paper | 4 | −10.0 (−10.0 … −10.0) |" in text
        and "| **all/paper minmax − paper** | 4 | −10.0" in text
    )
    assert "uniform" not in text and "all/host" not in text
    found = json.loads((tmp_path / "table.json").read_text())
    assert (
        found["grpo/paper"]["final"]
        == {"mean": pytest.approx(81.5), "gain": pytest.approx([10, 10, 10])}
        and found["grpo/paper"]["seeds"] == 4
    )
    gains, curves = (ElementTree.parse(tmp_path / f"{name}.svg") for name in ("gains", "curves"))
    svg = "{http://www.w3.org/2000/svg}"
    assert (
        len(gains.findall(f".//{svg}circle")) == 4 * 5
        and len(curves.findall(f".//{svg}polyline")) == 4 * 3
    )  # host, paper, signed
    places = {
        g.find(f"{svg}title").text.rsplit(" ", 4)[0]: float(g.find(f"{svg}circle").get("cx"))
        for g in gains.findall(f".//{svg}g")
    }
    assert (
        places["all: paper − host"]
        == places["sapo: paper − host"]
        > places["all: signed minmax − host"]
        == 436
    )  # where zero is
    assert places["all: paper minmax − paper"] < 436


def test_tables_of_nothing_and_of_half(tmp_path, monkeypatch):
    """A part without its host's runs yet, and no run at all: tables without gains, figures without marks, no crash."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path)
    assert "seeds" in ablate.tabulate()
    (tmp_path / "runs.jsonl").write_text(
        json.dumps(line("level 2: grpo/uniform", 0, [0.3, 0.5, 0.7])) + "\n"
    )
    assert "| level 2: grpo/uniform | 1 | 70.0 | – |" in ablate.tabulate()


@pytest.mark.parametrize("bound", [0.4, 2.0, 9.99, 240])
def test_ticks_are_round_and_inside(bound):
    found = ablate.ticks(bound)
    assert (
        0 in found
        and found == [-x for x in found[::-1]]
        and abs(found[0]) <= bound
        and len(found) <= 13
    )


FAKE = """import json, pathlib, sys
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("run.dir="))[8:])
assert not folder.exists() and "train.seed=3" in sys.argv and "algo.name=grpo" in sys.argv and "dyco.rule=paper" in sys.argv
folder.mkdir(parents=True)
rows = [{"step": s, **({"reward/accuracy": 0.25 * s, "policy/entropy": 1.0} if s else {}), **({"eval/accuracy": 0.5, "eval/accuracy_greedy": 1.0} if s != 1 else {})}
        for s in range(3)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
if ENDS:
    (folder / "final").mkdir()
"""


def test_one_run_becomes_one_line_and_an_unfinished_one_none(tmp_path, monkeypatch):
    """A stopped run exits with 0 and has no final/; what it left is thrown away when it is run again."""
    (tmp_path / "train.py").write_text(FAKE.replace("ENDS", "False"))
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    arguments = "grpo/paper", ablate.PARTS["table"]["grpo/paper"], 3, tmp_path / "scratch"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="grpo/paper, seed 3, did not end"):
            ablate.run_one(*arguments)
    (tmp_path / "train.py").write_text(FAKE.replace("ENDS", "True"))
    found = ablate.run_one(*arguments)
    assert (
        found["steps"] == [0, 2]
        and found["accuracy"] == [0.5, 0.5]
        and found["online"] == [0.25, 0.5]
        and found["entropy"] == [1, 1]
    )
    assert "grad_norm" not in found and list((tmp_path / "scratch").iterdir()) == []
    (tmp_path / "train.py").write_text("import sys; sys.exit('error: no such thing')")
    with pytest.raises(RuntimeError, match="error: no such thing"):
        ablate.run_one(*arguments)


def test_a_run_that_fails_does_not_end_the_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "RESULTS", tmp_path)

    def run_one(cell, overrides, seed, scratch):
        if cell == "grpo/paper":
            raise RuntimeError(f"{cell} did not end")
        return line(cell, seed, [0.3, 0.5])

    monkeypatch.setattr(ablate, "run_one", run_one)
    with pytest.raises(
        RuntimeError, match="1 of 16 runs did not end, the first: grpo/paper did not end"
    ):
        ablate.run_missing(["table"], 1, 2, tmp_path / "scratch")
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 15
    with (
        exclusive(tmp_path / "scratch", "--scratch"),
        pytest.raises(FolderError, match="another process is writing there; set --scratch"),
    ):
        ablate.run_missing(["table"], 1, 2, tmp_path / "scratch")
