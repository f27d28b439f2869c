"""mathematics.py: the mathematical benchmarks of the paper's table, but for We-Math (wemath.py)."""

import re
import string
from dataclasses import replace

from benchmarks.answers import HIDDEN, answer_letters, half_width, is_equal, match_option
from benchmarks.benchmark import (
    Benchmark,
    Result,
    accuracies,
    accuracy,
    group_by,
    group_by_column,
    mean,
    percent,
)
from benchmarks.files import BenchmarkError, Row, read_literal, show


class MathVision(Benchmark):
    """Competition mathematics with pictures, options or a free answer (arXiv 2402.14804)."""

    title = "MathVision"
    columns = ("question", "choices", "answer", "category")
    reference = "the letter of an option, or a value where there are no options"

    def check(self, row, text):
        choices = self._choices(row)
        if not choices:
            return is_equal(text, row["answer"]) or None
        options = dict(zip(string.ascii_uppercase, choices, strict=False))
        letter = match_option(text, options, self.answer_is)
        return None if letter is None else letter == row["answer"]

    @staticmethod
    def _choices(row: Row) -> list[str]:
        choices = read_literal(row["choices"], row.where, "choices")
        if not isinstance(choices, list) or len(choices) > len(string.ascii_uppercase):
            raise BenchmarkError(
                f"{row.where}: 'choices' is {show(row['choices'])}; "
                "expected a list of at most 26 options"
            )
        return [str(choice) for choice in choices]

    def report(self, results):
        overall = accuracy(results)
        settled = {"Overall": self._settled(results)}
        for name, group in group_by_column(results, "category").items():
            settled[name] = self._settled(group)
        return overall, {
            "Overall": overall,
            "category": accuracies(results, "category"),
            "prefetch rate": settled,  # VLMEvalKit's name
        }

    @staticmethod
    def _settled(results: list[Result]) -> float | None:
        """The share of the results that the rule could settle."""
        return percent(result.hit is not None for result in results)


class MathVerse(Benchmark):
    """The same geometry problems with less and less of the text (arXiv 2403.14624)."""

    title = "MathVerse"
    metric = "mean over problem versions"
    reference = "the letter of an option, or the value of a free-form question"

    @property
    def columns(self):
        return (
            self._question_column,
            "question_for_eval",
            "question_type",
            "problem_version",
            "metadata",
            "answer",
        )

    @property
    def _question_column(self) -> str:
        return "query_cot" if "cot" in self.name else "question"

    def prompt(self, row):
        return row[self._question_column]

    def check(self, row, text):
        kind = row["question_type"]
        if kind == "free-form":
            return (
                text.replace(HIDDEN, "").strip() == row["answer"].strip()
                or is_equal(text, row["answer"])
                or None
            )
        if kind != "multi-choice":
            raise BenchmarkError(
                f"{row.where}: 'question_type' is {show(kind)}; "
                "expected 'multi-choice' or 'free-form'"
            )
        letter = match_option(text, self._options(row), self.answer_is, whole=True)
        return None if letter is None else letter == row["answer"].strip()

    @staticmethod
    def _options(row: Row) -> dict[str, str]:
        """Letter -> text of the options, which stand in lines such as "A:40°" after "Choices:"."""
        listed = row["question_for_eval"].rpartition("Choices:")[2]
        options = {
            letter: option.strip() or letter
            for letter, option in re.findall(r"(?m)^[ \t]*+([A-Z]):(.*)$", listed)
        }
        # The options of some rows stand in the picture alone; then only letters can match.
        return options or dict.fromkeys("ABCD", "")

    def report(self, results):
        metadata = {result.row.index: self._metadata(result.row) for result in results}
        versions = {}
        for version, group in group_by_column(results, "problem_version").items():
            versions[version] = {"Overall": accuracy(group)}
            for kind in ("subject", "subfield"):
                versions[version][kind] = self._accuracies_by(group, metadata, kind)
        headline = mean(scores["Overall"] for scores in versions.values())
        return headline, {
            self.metric: headline,
            "Overall": accuracy(results),
            "problem_version": versions,
        }

    @staticmethod
    def _metadata(row: Row) -> dict:
        value = read_literal(row["metadata"], row.where, "metadata")
        if not isinstance(value, dict) or not {"subject", "subfield"} <= value.keys():
            raise BenchmarkError(
                f"{row.where}: 'metadata' is {show(row['metadata'])}; "
                "expected a dict with 'subject' and 'subfield'"
            )
        return value

    @staticmethod
    def _accuracies_by(group: list[Result], metadata: dict, kind: str) -> dict[str, float]:
        parts = group_by(group, lambda row: str(metadata[row.index][kind]))
        return {name: accuracy(part) for name, part in sorted(parts.items())}


# The whole number directly after "answer is", "Answer:" or "答案是".
_STATED_NUMBER = re.compile(
    r"(?:(?i:\banswer\s*+(?:is\b|:))|答案\s*+(?:是|为|為|:))[\s:*(\[$]*+([0-9]++)(?!\w|[.,][0-9])"
)


class LogicVista(Benchmark):
    """Logical puzzles whose options stand in the picture (arXiv 2407.04973)."""

    title = "LogicVista"
    columns = ("question", "answer", "skill")
    reference = "letters A-I joined by ', ', or a number"
    SKILLS = ("inductive", "deductive", "numerical", "spatial", "mechanical")

    def load(self, path, pictures=False):
        rows, dropped = super().load(path, pictures)
        # In a response small letters are words; alone in a reference they can only be letters.
        for place, row in enumerate(rows):
            answer = row.cells.get("answer", "")
            if re.fullmatch("[a-i](, [a-i])*", answer):
                rows[place] = replace(row, cells=row.cells | {"answer": answer.upper()})
        return rows, dropped

    def final(self, response, unbox=True):
        return half_width(super().final(response, unbox))

    def check(self, row, text):
        if row["answer"].isdigit():  # the options of a few rows are numbered
            stated = _STATED_NUMBER.findall(text)
            number = stated[-1] if stated else text.strip(string.whitespace + "*()[].$")
            return number == row["answer"] if number.isdigit() else None
        letters = answer_letters(text)
        if letters is None:
            return None
        expected = row["answer"].lower().split(", ")
        return sorted(letter.lower() for letter in letters) == sorted(expected)

    def report(self, results):
        scores = {"Overall": accuracy(results)}
        for skill in self.SKILLS:
            # The cell may name several skills.
            scores[skill] = accuracy(r for r in results if skill in r.row["skill"])
        return scores["Overall"], scores
