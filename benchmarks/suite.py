"""suite.py: the benchmarks by name, and the toy among them."""

import functools
from dataclasses import dataclass

import rewards
from benchmarks.benchmark import Benchmark
from benchmarks.files import BenchmarkError, Row
from benchmarks.mathematics import LogicVista, MathVerse, MathVision
from benchmarks.visual import MME, HallusionBench, MMBench
from benchmarks.wemath import WeMath


@dataclass(frozen=True)
class Toy(Benchmark):
    """The held-out split of the embedded default."""

    level: int = 1
    title = "toy"
    # None leaves pictures as the model's own image processor has them.
    min_pixels = None
    max_pixels = None
    max_new_tokens = 128
    prompt_mode = "train"

    @functools.cached_property
    def samples(self):
        import toy
        from config import load_config

        _, test = toy.splits(load_config(overrides=[f"toy.level={self.level}"]))
        return test

    def load(self, path, pictures=False):
        if path is not None:
            raise BenchmarkError(
                f"{self.name} is drawn, not read from a file; found --data {path}, expected none"
            )
        rows = []
        for place, sample in enumerate(self.samples):
            cells = {"question": sample.question.replace("<image>", ""), "answer": sample.answer}
            rows.append(Row(f"{self.name}, sample {place}", str(place), cells))
        return rows, set()

    def fingerprint(self, path):
        return self.samples.fingerprint

    def pictures(self, row, root):
        return self.samples[int(row.index)].images

    def check(self, row, text):
        return rewards.equivalent(text, row["answer"])


# Each dataset name of VLMEvalKit, with the number of rows of the released file.
_ALL = (
    WeMath("WeMath", 1740),
    WeMath("WeMath_COT", 1740),
    MathVision("MathVision", 3040),
    MathVision("MathVision_MINI", 304),
    MathVerse("MathVerse_MINI", 3940),
    MathVerse("MathVerse_MINI_Vision_Only", 788),
    MathVerse("MathVerse_MINI_Vision_Only_cot", 788),
    MathVerse("MathVerse_MINI_Vision_Dominant", 788),
    MathVerse("MathVerse_MINI_Vision_Intensive", 788),
    MathVerse("MathVerse_MINI_Text_Lite", 788),
    MathVerse("MathVerse_MINI_Text_Dominant", 788),
    LogicVista("LogicVista", 447),
    HallusionBench("HallusionBench", 951),
    MME("MME", 2374),
    MMBench("MMBench_DEV_EN", 4300, about=True),
    MMBench("MMBench_DEV_CN", 4300, about=True),
    MMBench("MMBench_DEV_EN_V11", 4900, about=True),
    MMBench("MMBench_DEV_CN_V11", 4900, about=True),
    MMBench("MMBench"),
    MMBench("MMBench_V11"),
    Toy("toy", 200),
    Toy("toy_level2", 200, level=2),
    Toy("toy_level3", 200, level=3),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def find(name: str) -> Benchmark:
    """The benchmark of a name. Raises BenchmarkError with the nearest name."""
    if name not in BENCHMARKS:
        # config imports torch, which scoring does not need.
        from rows import nearest

        raise BenchmarkError(f"no benchmark {name!r}; {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
