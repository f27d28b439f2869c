"""scoring.py: from responses to scores, with the rule of a benchmark."""

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import rewards
from benchmarks.answers import HIDDEN, final_answer
from benchmarks.benchmark import Benchmark, Result, mean
from benchmarks.files import MISSING, BenchmarkError, Row, show
from benchmarks.responses import (
    RESPONSES,
    Responses,
    listed,
    name_of,
    read_responses,
    read_settings,
)

NO_JUDGE = "none (rule-based)"
MAX_SHOWN = 3  # rows whose reference nothing matches, in one message

Judge = Callable[[str, str, dict], str | bool]


def score(
    benchmark: Benchmark,
    rows: list[Row],
    responses: Responses,
    mode: str,
    dropped: Iterable[str] = (),
    allow_missing: bool = False,
    judge: Judge | None = None,
    judge_name: str = "custom",
) -> dict:
    """Score responses {index: {sample: text}} to the rows by the benchmark's rule.

    mode: "raw" reads the whole response, "final" its final answer.
    dropped: indices that need no response.
    allow_missing: missing responses are wrong, instead of an error.
    judge: is asked about responses that the rule cannot settle, as judge(response, answer, the
        row's cells). It returns what the response answers, which goes through the same rule, or
        True or False.

    Returns what `evaluate.py score` prints. With n samples to a row all scores are means over the
    samples, and pass@k is added for k = 1, 2, 4 … n. Raises BenchmarkError.
    """
    _refuse_unknown(benchmark, rows, responses, dropped)
    samples = 1 + max((sample for texts in responses.values() for sample in texts), default=0)
    missing = _count_missing(rows, responses, samples, allow_missing=allow_missing)

    headlines = []
    reports = []
    hits = dict.fromkeys((row.index for row in rows), 0)  # of all samples of a row
    unmatched = 0
    for sample in range(samples):
        results = []
        for row in tqdm(rows, benchmark.name, disable=judge is None):
            response = responses.get(row.index, {}).get(sample)
            result = _check(benchmark, row, response, mode=mode, judge=judge)
            results.append(result)
            if result.hit is None:
                unmatched += 1
            elif result.hit:
                hits[row.index] += 1
        headline, scores = benchmark.report(results)
        headlines.append(headline)
        reports.append(scores)

    scores = _average(reports)
    if samples > 1:
        scores |= _pass_rates(list(hits.values()), samples)
    return {
        "benchmark": benchmark.name,
        "mode": mode,
        "headline": {"metric": benchmark.metric, "value": mean(headlines)},
        "scores": scores,
        "counts": {
            "rows": len(rows),
            "scored": len(rows) * samples - missing,
            "unmatched": unmatched,
            "missing": missing,
        },
        "judge": NO_JUDGE if judge is None else judge_name,
    }


def score_file(
    benchmark: Benchmark,
    data: str | None,
    responses: str | Path,
    mode: str,
    allow_missing: bool = False,
    judge: str | None = None,
) -> dict:
    """`score` of a file of responses to the rows of a file. judge: FILE.py:function."""
    ask = rewards.load_custom(judge, "--judge") if judge else None
    rows, dropped = benchmark.load(data)
    check_origin(benchmark, data, Path(responses))
    check_references(benchmark, rows)
    return score(
        benchmark,
        rows,
        read_responses(responses),
        mode=mode,
        dropped=dropped,
        allow_missing=allow_missing,
        judge=ask,
        judge_name=judge,
    )


def check_origin(benchmark: Benchmark, data: str | None, responses: Path) -> None:
    """Compare the run.json beside the responses, where there is one, with what they are scored on.

    Warns of a file that has changed since then: a reference may have been mended. Raises
    BenchmarkError for another benchmark, whose rows may well have the same indices.
    """
    if responses.name != RESPONSES:
        return
    try:
        settings = read_settings(responses.parent)
    except BenchmarkError:  # responses that evaluate.py did not write have none
        return
    if settings["benchmark"] != benchmark.name:
        raise BenchmarkError(
            f"{responses}: run.json beside it says that these are responses to "
            f"{settings['benchmark']}; expected responses to {benchmark.name}"
        )
    if settings["rows"] != benchmark.fingerprint(data):
        warnings.warn(
            f"{data or benchmark.name} has changed since {responses} was written", stacklevel=4
        )


def lacks_reference(benchmark: Benchmark, row: Row) -> bool:
    """Whether the answer of the row is empty. Whatever responds to it is not right."""
    return "answer" in benchmark.columns and not row.cells.get("answer", "").strip()


def check_references(benchmark: Benchmark, rows: list[Row]) -> None:
    """Hold each reference against itself: given as a response, it must be right in mode "final".

    Warns of rows whose reference is not, in one line; they are scored, as wrong. Raises
    BenchmarkError if no row has a reference that anything can match.
    """
    if "answer" not in benchmark.columns:
        return
    unmatched = []
    for row in rows:
        reference = row.cells.get("answer", "")
        if not _check(benchmark, row, reference, mode="final", judge=None).hit:
            unmatched.append(f"{row.where}: 'answer' is {show(reference)}")
    if not unmatched:
        return
    text = (
        f"{len(unmatched)} of {len(rows)} rows have an answer that not even its own text matches; "
        f"expected {benchmark.reference}: {'; '.join(unmatched[:MAX_SHOWN])}"
    )
    if len(unmatched) > MAX_SHOWN:
        text += f"; … and {len(unmatched) - MAX_SHOWN} more"
    if len(unmatched) == len(rows):
        raise BenchmarkError(text)
    warnings.warn(f"{text}; scored as wrong", stacklevel=3)


def _refuse_unknown(
    benchmark: Benchmark, rows: list[Row], responses: Responses, dropped: Iterable[str]
) -> None:
    unknown = sorted(responses.keys() - {row.index for row in rows} - set(dropped))
    if unknown:
        names = listed(map(show, unknown))
        raise BenchmarkError(
            f"{len(unknown)} responses are to rows that {benchmark.name}'s file does not have: "
            f"{names}"
        )


def _count_missing(rows: list[Row], responses: Responses, samples: int, allow_missing: bool) -> int:
    """How many responses are missing. Raises BenchmarkError if any may not be."""
    missing = []
    for row in rows:
        present = responses.get(row.index, {})
        missing += [
            name_of(row.index, sample) for sample in range(samples) if sample not in present
        ]
    if missing:
        total = len(rows) * samples
        text = f"{len(missing)} of {total} responses are missing: {listed(missing)}"
        if not allow_missing:
            raise BenchmarkError(f"{text}; --allow-missing scores them as wrong")
        warnings.warn(f"{text}; scored as wrong", stacklevel=3)
    return len(missing)


def _check(
    benchmark: Benchmark, row: Row, response: str | None, mode: str, judge: Judge | None
) -> Result:
    """What the rule, and then the judge, make of one response. None is missing, and wrong."""
    if response is None:
        return Result(row, "", False)
    if lacks_reference(benchmark, row):
        return Result(row, response, None)
    if mode == "final":
        row = _with_plain_reference(row)
        text, hit = _check_final(benchmark, row, response)
    else:
        text = response
        # VLMEvalKit keeps responses in a spreadsheet, out of which these come as "nan".
        hit = None if text in MISSING else benchmark.check(row, text)
    if hit is None and judge is not None:
        verdict = _ask(judge, row, response)
        hit = verdict if isinstance(verdict, bool) else benchmark.check(row, verdict)
    return Result(row, text, hit)


def _with_plain_reference(row: Row) -> Row:
    """The row, whose reference is read like a response if it is boxed or tagged itself.

    VLMEvalKit reads boxed references for numbers alone, so that this is no part of mode "raw".
    """
    if "answer" not in row.cells:
        return row
    return replace(row, cells=row.cells | {"answer": final_answer(row["answer"])})


def _check_final(benchmark: Benchmark, row: Row, response: str) -> tuple[str, bool | None]:
    """(what was read, whether it is right) of the final answer: the first reading that settles."""
    readings = benchmark.readings(response)
    for text in readings:
        hit = benchmark.check(row, text)
        if hit is not None:
            return text.replace(HIDDEN, ""), hit
    return readings[0].replace(HIDDEN, ""), None


def _ask(judge: Judge, row: Row, response: str) -> str | bool:
    try:
        # Standard output is for the score alone.
        with contextlib.redirect_stdout(sys.stderr):
            verdict = judge(response, row["answer"], dict(row.cells))
    except (Exception, SystemExit) as error:
        raise BenchmarkError(
            f"{row.where}: the judge failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(verdict, str | bool):
        raise BenchmarkError(
            f"{row.where}: the judge returned {type(verdict).__name__}; "
            "expected text, True or False"
        )
    return verdict


def _average(trees: list[Any]) -> Any:
    """The mean of dicts of dicts of numbers, entry by entry; None where one is None."""
    if isinstance(trees[0], dict):
        return {key: _average([tree[key] for tree in trees]) for key in trees[0]}
    return None if None in trees else mean(trees)


def _pass_rates(hits: list[int], samples: int) -> dict[str, float]:
    """pass@k in percent, for k = 1, 2, 4 … and k = samples. hits: right samples of each row."""
    counts = {samples}
    k = 1
    while k <= samples:
        counts.add(k)
        k *= 2
    return {
        f"pass@{k}": 100 * mean(pass_at_k(samples, right, k) for right in hits)
        for k in sorted(counts)
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k responses is right: 1 − C(n−c, k) / C(n, k).

    It is estimated without bias from n responses of which c are right. Source: Chen et al. 2021
    (arXiv 2107.03374), section 2.1.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)
