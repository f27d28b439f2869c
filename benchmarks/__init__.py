"""The seven benchmarks of the paper's table, and the toy: prompt, answer rule and metric of each.

    benchmark = find("MMBench_DEV_EN_V11")
    rows, dropped = benchmark.load("MMBench_DEV_EN_V11.tsv")
    responses = read_responses("responses.jsonl")                # {index: {sample: text}}
    score(benchmark, rows, responses, mode="final", dropped=dropped)

The files are VLMEvalKit's TSV files and the names are its dataset names. Prompts, answer rules and
metrics are those of its rule-based path, described here and written anew
(github.com/open-compass/VLMEvalKit, as of June 2026). Each rule reads either the whole response
(mode "raw") or what `final_answer` finds in it (mode "final"). A response that the rule cannot
settle is *unmatched* and counts as wrong. That is where VLMEvalKit asks a judge model, and where a
function of yours may be asked.

Scoring, in the order of reading:
    files.py         the rows of a TSV file, which may hold anything
    responses.py     the file of a model's responses
    answers.py       the rules that read an answer out of a response
    benchmark.py     what a benchmark is; the class to derive from
    mathematics.py   MathVision, MathVerse, LogicVista
    wemath.py        We-Math and its tree of concepts
    visual.py        HallusionBench, MME, MMBench
    suite.py         all of them by name, and the toy
    scoring.py       from responses to scores; pass@k
    table.py         several runs in the layout of the paper's table 1
    options.py       the options of evaluate.py run, score and table

Running a model, which alone needs torch and is not imported here:
    running.py       answer the rows, on one process or several
    folder.py        the folder of a run: its settings, its responses, going on with it

Files and responses are hostile input: nothing in them is executed, every rule takes linear time,
and what is wrong is a BenchmarkError that names the place.
"""

from benchmarks.answers import (
    answer_letters,
    final_answer,
    is_equal,
    letter_after_answer,
    match_option,
    yes_or_no,
)
from benchmarks.benchmark import Benchmark, Result
from benchmarks.files import BenchmarkError, Row, read_tsv
from benchmarks.responses import read_responses
from benchmarks.scoring import pass_at_k, score, score_file
from benchmarks.suite import BENCHMARKS, find

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkError",
    "Result",
    "Row",
    "answer_letters",
    "final_answer",
    "find",
    "is_equal",
    "letter_after_answer",
    "match_option",
    "pass_at_k",
    "read_responses",
    "read_tsv",
    "score",
    "score_file",
    "yes_or_no",
]
