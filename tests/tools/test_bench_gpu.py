"""tools/bench_gpu.py: every part runs on a CPU, and what was not measured is not claimed."""

import json
import math

import pytest
import torch

from tools import bench, bench_gpu

PARTS = [
    "decode, graphs",
    "decode, graphs, attention captured",
    "decode, no graphs",
    "decode, no graphs, attention captured",
    "generate of transformers, static cache",
    "prefill",
    "update of one group",
    "training step",
    "memory of a training step",
]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def is_a_quantity(number: float) -> bool:
    return math.isfinite(number) and number > 0


def test_a_tiny_shape_goes_through_all_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu, "ROUNDS", 1)
    with pytest.raises(SystemExit) as leaving:
        bench.main(["gpu", "--shape", "tiny"])
    assert leaving.value.code == 0
    written = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert (written["device"], written["torch"]) == ("CPU", torch.__version__)
    assert (written["shape"], written["prompts"], written["group"]) == ("tiny", 2, 2)
    assert is_a_quantity(written["bandwidth"]) and is_a_quantity(written["flops"])
    assert [line["part"] for line in written["lines"]] == PARTS
    for line in written["lines"]:
        assert line.keys() == {"part", "value", "unit", "share", "of"}, line
        assert is_a_quantity(line["value"]) and is_a_quantity(line["share"])
    assert {line["unit"] for line in written["lines"]} == {"tokens/s", "s", "GB"}
    printed = capsys.readouterr().out
    assert all(part in printed for part in PARTS)


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.main(["gpu"])
    assert leaving.value.code == 2
    assert capsys.readouterr().out.splitlines() == [
        "no GPU here: nothing was measured (--shape tiny runs on a CPU)"
    ]
    assert not list(tmp_path.iterdir())


def test_an_unknown_shape_is_named_with_those_there_are(capsys):
    assert bench_gpu.main(["--shape", "9b"]) == 2
    assert "expected nothing or --shape 3b | tiny, found --shape 9b" in capsys.readouterr().out


def test_a_part_that_fails_is_a_line_and_the_others_go_on():
    class Some:
        device = torch.device("cpu")

        def parts(self):
            def fails():
                raise torch.OutOfMemoryError("out of memory\nTried to allocate")

            def works():
                return bench_gpu.Reached(2.0, "s", 0.5, "of the operations")

            return {"first": fails, "second": works}

    first, second = bench_gpu.measured_parts(Some())
    assert first == {"part": "first", "failed": "OutOfMemoryError: out of memory"}
    assert "failed: OutOfMemoryError" in bench_gpu.in_words(first)
    assert (second["value"], second["share"]) == (2.0, 0.5)
    assert "50.0% of the operations" in bench_gpu.in_words(second)
