"""ablate.py: statistics by hand, the grid as configs, a run that is not repeated."""

import json
from xml.etree import ElementTree

import pytest

from config import DEFAULTS, load_config
from run_folder import FolderError, exclusive
from tools import ablate

SVG = "{http://www.w3.org/2000/svg}"


def line(cell, seed, curve, greedy=(0.5, 0.5)):
    """A line of runs.jsonl."""
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


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results/."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path)
    return tmp_path


def test_every_cell_is_a_config_and_has_its_host():
    for cells in ablate.PARTS.values():
        for cell, overrides in cells.items():
            load_config(DEFAULTS, [*ablate.REGIME, *overrides])
            host = cell.rsplit("/", 1)[0] + "/host"
            assert any(host in others for others in ablate.PARTS.values()), cell
    names = [cell for cells in ablate.PARTS.values() for cell in cells]
    assert len(names) == len(set(names))
    assert len(ablate.PARTS["table"]) == 16
    assert len(ablate.PARTS["controls"]) == 20


def test_measures_and_paired_differences():
    """Area: (8·(.2 + .4)/2 + 16·(.4 + .8)/2) / 24 = (2.4 + 9.6) / 24 = 0.5."""
    row = line("grpo/paper", 0, [0.2, 0.4, 0.8], greedy=(0.1, 0.9))
    names = ("final", "greedy", "area", "online")
    assert [ablate.measure(row, name) for name in names] == pytest.approx([80, 90, 50, 140 / 3])
    rows = [
        row,
        line("grpo/host", 0, [0.2, 0.4, 0.7]),
        line("grpo/paper", 1, [0.2, 0.4, 0.5]),
        line("grpo/host", 1, [0.2, 0.4, 0.6]),
        line("grpo/paper", 2, [0.0, 0.0, 0.0]),  # seed 2 has no partner
    ]
    runs = {(row["cell"], row["seed"]): row for row in rows}
    gains = ablate.differences(runs, ["grpo/paper"], ["grpo/host"], "final")
    assert gains == pytest.approx([10, -10])


def test_all_hosts_are_averaged_within_a_seed():
    """Four hosts that share a seed's luck are one observation of it, not four."""
    runs = {}
    for i, host in enumerate(ablate.HOSTS):
        for seed in range(3):
            base = 0.01 * i
            runs[f"{host}/host", seed] = line("", seed, [0, 0, base])
            runs[f"{host}/paper", seed] = line("", seed, [0, 0, base + 0.1 * seed])
    del runs["sapo/paper", 1]
    papers = [f"{host}/paper" for host in ablate.HOSTS]
    hosts = [f"{host}/host" for host in ablate.HOSTS]
    assert ablate.differences(runs, papers, hosts, "final") == pytest.approx([0, 20])
    assert ablate.shared_seeds(runs, papers) == [0, 2]


def test_lines_of_another_regime_are_refused(results):
    row = line("grpo/host", 0, [0, 0, 0]) | {"settings": ["train.steps=41"]}
    (results / "runs.jsonl").write_text(json.dumps(row) + "\n")
    expected = "runs.jsonl, line 1: grpo/host, seed 0, was run with train.steps=41"
    with pytest.raises(ValueError, match=expected):
        ablate.read_runs()


@pytest.fixture
def made(results, monkeypatch):
    """The (cell, seed) of runs in the order they are made in; `paper` is ten points better."""
    made = []

    def run_one(cell, overrides, seed, scratch):
        made.append((cell, seed))
        gain = 0.1 if cell.endswith("/paper") else 0
        return line(cell, seed, [0.3, 0.5, 0.7 + gain + 0.01 * seed])

    monkeypatch.setattr(ablate, "run_one", run_one)
    return made


def test_what_is_missing_is_run_seed_after_seed(made, tmp_path):
    ablate.run_missing(["table"], 2, 1, tmp_path)
    assert len(made) == 32
    assert made[:16] == [(cell, 0) for cell in ablate.PARTS["table"]]
    ablate.run_missing(["table"], 4, 1, tmp_path)
    assert len(made) == 64
    assert {seed for _, seed in made[32:]} == {2, 3}


def test_tables_and_figures_of_one_part(made, results):
    ablate.run_missing(["table"], 4, 1, results)
    text = ablate.tabulate()
    assert "| grpo/paper | 4 | 81.5 | +10.0 (+10.0 … +10.0) | 50.0 | +0.0 (+0.0 … +0.0) |" in text
    assert "| grpo/host | 4 | 71.5 | – |" in text
    assert "| **all/paper** | 4 | 81.5 | +10.0 (+10.0 … +10.0) |" in text
    assert "| gspo/paper minmax − paper | 4 | −10.0 (−10.0 … −10.0) |" in text
    assert "| **all/paper minmax − paper** | 4 | −10.0" in text
    for absent in ("controls", "uniform", "all/host"):
        assert absent not in text

    entry = json.loads((results / "table.json").read_text())["grpo/paper"]
    assert entry["seeds"] == 4
    assert entry["final"] == {
        "mean": pytest.approx(81.5),
        "gain": pytest.approx([10, 10, 10]),
    }

    curves = ElementTree.parse(results / "curves.svg")
    assert len(curves.findall(f".//{SVG}polyline")) == 4 * 3  # host, paper, signed
    gains = ElementTree.parse(results / "gains.svg")
    assert len(gains.findall(f".//{SVG}circle")) == 4 * 5
    places = {}
    for mark in gains.findall(f".//{SVG}g"):
        name = mark.find(f"{SVG}title").text.rsplit(" ", 4)[0]
        places[name] = float(mark.find(f"{SVG}circle").get("cx"))
    zero = 436
    assert places["all: signed minmax − host"] == zero
    assert places["all: paper − host"] == places["sapo: paper − host"] > zero
    assert places["all: paper minmax − paper"] < zero


def test_tables_of_nothing_and_of_half(results):
    """A part without its host's runs yet, and no run at all: no gains, no marks, no crash."""
    assert "seeds" in ablate.tabulate()
    row = line("level 2: grpo/uniform", 0, [0.3, 0.5, 0.7])
    (results / "runs.jsonl").write_text(json.dumps(row) + "\n")
    assert "| level 2: grpo/uniform | 1 | 70.0 | – |" in ablate.tabulate()


@pytest.mark.parametrize("bound", [0.4, 2.0, 9.99, 240])
def test_ticks_are_round_and_inside(bound):
    places = ablate.ticks(-bound, bound, ablate.GAIN_STEPS)
    assert 0 in places
    assert places == [-x for x in places[::-1]]
    assert abs(places[0]) <= bound
    assert len(places) <= 13


# What stands in for train.py: it writes three rows of metrics, and final/ where it ends.
FAKE = """
import json, pathlib, sys

folder = pathlib.Path(next(a for a in sys.argv if a.startswith("run.dir="))[8:])
assert not folder.exists()
assert {"train.seed=3", "algo.name=grpo", "dyco.rule=paper"} <= set(sys.argv)
folder.mkdir(parents=True)
evaluation = {"eval/accuracy": 0.5, "eval/accuracy_greedy": 1.0}
rows = [
    {"step": 0, **evaluation},
    {"step": 1, "reward/accuracy": 0.25, "policy/entropy": 1.0},
    {"step": 2, "reward/accuracy": 0.5, "policy/entropy": 1.0, **evaluation},
]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""
ENDS = '(folder / "final").mkdir()\n'


def test_one_run_becomes_one_line_and_an_unfinished_one_none(tmp_path, monkeypatch):
    """A stopped run exits with 0 and has no final/; what it left goes when it is run again."""
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    program = tmp_path / "train.py"
    scratch = tmp_path / "scratch"
    overrides = ablate.PARTS["table"]["grpo/paper"]

    program.write_text(FAKE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="grpo/paper, seed 3, did not end"):
            ablate.run_one("grpo/paper", overrides, 3, scratch)

    program.write_text(FAKE + ENDS)
    row = ablate.run_one("grpo/paper", overrides, 3, scratch)
    assert row["steps"] == [0, 2]
    assert row["accuracy"] == [0.5, 0.5]
    assert row["online"] == [0.25, 0.5]
    assert row["entropy"] == [1, 1]
    assert "grad_norm" not in row
    assert list(scratch.iterdir()) == []

    program.write_text("import sys; sys.exit('error: no such thing')")
    with pytest.raises(RuntimeError, match="error: no such thing"):
        ablate.run_one("grpo/paper", overrides, 3, scratch)


def test_a_run_that_fails_does_not_end_the_grid(results, monkeypatch):
    def run_one(cell, overrides, seed, scratch):
        if cell == "grpo/paper":
            raise RuntimeError(f"{cell} did not end")
        return line(cell, seed, [0.3, 0.5])

    monkeypatch.setattr(ablate, "run_one", run_one)
    expected = "1 of 16 runs did not end, the first: grpo/paper did not end"
    with pytest.raises(RuntimeError, match=expected):
        ablate.run_missing(["table"], 1, 2, results / "scratch")
    assert len((results / "runs.jsonl").read_text().splitlines()) == 15


def test_two_grids_do_not_share_a_scratch_folder(results):
    expected = "another process is writing there; set --scratch"
    with exclusive(results, "--scratch"), pytest.raises(FolderError, match=expected):
        ablate.run_missing(["table"], 1, 2, results)
