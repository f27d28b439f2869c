"""ablate.py: statistics by hand, the grid as configs, a run that is not repeated."""
import json
from xml.etree import ElementTree

import pytest

import ablate
from config import DEFAULTS, load_config


def line(cell, seed, curve, greedy=(0.5, 0.5)):
    return {"cell": cell, "seed": seed, "steps": [0, 8, 24], "accuracy": curve, "greedy": list(greedy), "overrides": [], "seconds": 1.0}


def test_every_cell_is_a_config_and_has_its_host():
    for part, cells in ablate.PARTS.items():
        for cell, overrides in cells.items():
            load_config(DEFAULTS, [*ablate.REGIME, *overrides])
            host = cell.rsplit("/", 1)[0] + "/host"
            assert any(host in others for others in ablate.PARTS.values()), cell
    names = [cell for cells in ablate.PARTS.values() for cell in cells]
    assert len(names) == len(set(names)) and len(ablate.PARTS["table"]) == 16 and len(ablate.PARTS["controls"]) == 20


def test_measures_and_paired_differences():
    """Area: (8·(.2 + .4)/2 + 16·(.4 + .8)/2) / 24 = (2.4 + 9.6) / 24 = 0.5."""
    row = line("grpo/paper", 0, [0.2, 0.4, 0.8], greedy=(0.1, 0.9))
    assert [ablate.measure(row, name) for name in ("final", "greedy", "area")] == pytest.approx([80, 90, 50])
    runs = {(r["cell"], r["seed"]): r for r in (row, line("grpo/host", 0, [0.2, 0.4, 0.7]), line("grpo/paper", 1, [0.2, 0.4, 0.5]),
                                                line("grpo/host", 1, [0.2, 0.4, 0.6]), line("grpo/paper", 2, [0.0, 0.0, 0.0]))}
    assert ablate.differences(runs, ["grpo/paper"], ["grpo/host"], "final") == pytest.approx([10, -10])  # seed 2 has no partner


def test_bootstrap_covers():
    """Of 300 samples of eight normals, the interval holds the true mean about 90 % of the time: percentile intervals of few values
    are a little short of 95 %."""
    import torch

    draws = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)) + 3
    inside = sum(low <= 3 <= high for _, low, high in (ablate.bootstrap(x.tolist(), 1000) for x in draws))
    assert 0.84 < inside / 300 < 0.97
    assert ablate.bootstrap([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_report_and_missing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "RESULTS", tmp_path)
    asked = []

    def run_one(cell, overrides, seed, scratch):
        asked.append((cell, seed))
        good = 0.1 * cell.endswith("/paper")
        return line(cell, seed, [0.3, 0.5, 0.7 + good + 0.01 * seed])
    monkeypatch.setattr(ablate, "run_one", run_one)
    ablate.run_missing(["table"], 2, 1, tmp_path)
    assert len(asked) == 32 and asked[:16] == [(cell, 0) for cell in ablate.PARTS["table"]]  # a whole seed before the next
    ablate.run_missing(["table"], 3, 1, tmp_path)
    assert len(asked) == 48 and {seed for _, seed in asked[32:]} == {2}
    text = ablate.tabulate()
    assert "| grpo/paper | 3 | 81.0 | +10.0 (+10.0 … +10.0) | 50.0 | +0.0 (+0.0 … +0.0) |" in text and "| grpo/host | 3 | 71.0 | – |" in text
    assert "| **all/paper** | 12 | 81.0 | +10.0 (+10.0 … +10.0) |" in text and "controls" not in text
    assert "| gspo/paper minmax − paper | 3 | −10.0 (−10.0 … −10.0) |" in text and "| **all/paper minmax − paper** | 12 | −10.0" in text
    assert "uniform" not in text and "all/host" not in text
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["grpo/paper"]["final"] == {"mean": pytest.approx(81), "seeds": 3, "gain": pytest.approx([10, 10, 10])}
    gains, curves = (ElementTree.parse(tmp_path / f"{name}.svg") for name in ("gains", "curves"))
    svg = "{http://www.w3.org/2000/svg}"
    assert len(gains.findall(f".//{svg}circle")) == 12 + 3 and len(curves.findall(f".//{svg}polyline")) == 4 * 3  # host, paper, signed
    places = {g.find(f"{svg}title").text.split()[0]: float(g.find(f"{svg}circle").get("cx")) for g in gains.findall(f".//{svg}g")
              if "minmax" not in g.find(f"{svg}title").text}
    assert places["all/paper"] == places["sapo/paper"] > 390  # zero is at 390


def test_tables_of_nothing_and_of_half(tmp_path, monkeypatch):
    """A part without its host's runs yet, and no run at all: tables without gains, figures without marks, no crash."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path)
    assert "seeds" in ablate.tabulate()
    (tmp_path / "runs.jsonl").write_text(json.dumps(line("level 2: grpo/uniform", 0, [0.3, 0.5, 0.7])) + "\n")
    assert "| level 2: grpo/uniform | 1 | 70.0 | – |" in ablate.tabulate()


@pytest.mark.parametrize("bound", [0.4, 2.0, 9.99, 240])
def test_ticks_are_round_and_inside(bound):
    found = ablate.ticks(bound)
    assert 0 in found and found == [-x for x in found[::-1]] and abs(found[0]) <= bound and len(found) <= 13
