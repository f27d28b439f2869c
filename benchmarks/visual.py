"""visual.py: the visual-centric benchmarks of the paper's table."""

import re
import warnings

from benchmarks.answers import final_answer, half_width, match_option, yes_or_no
from benchmarks.benchmark import (
    Benchmark,
    Result,
    accuracies,
    accuracy,
    all_hit,
    group_by,
    group_by_column,
    mean,
    option_prompt,
    percent,
)
from benchmarks.files import BenchmarkError, Row, show


class YesNo(Benchmark):
    """Questions to be answered by yes or no."""

    reference = "'Yes' or 'No'"

    def final(self, response, unbox=True):
        # VLMEvalKit cleans neither: "**Yes**" and "Answer:Yes" hold no word that is yes.
        text = half_width(final_answer(response, unbox))
        return text.replace("*", "").replace(":", " ")

    def check(self, row, text):
        if row["answer"] not in ("Yes", "No"):
            raise BenchmarkError(
                f"{row.where}: 'answer' is {show(row['answer'])}; expected 'Yes' or 'No'"
            )
        answer = yes_or_no(text)
        return None if answer is None else answer == row["answer"]


class HallusionBench(YesNo):
    """Illusions and edited figures, each figure under several questions (arXiv 2310.14566).

    aAcc counts answers, fAcc figures all of whose answers are right, qAcc questions that are
    answered rightly for all of their figures.
    """

    title = "HallusionBench"
    metric = "aAcc"
    columns = ("question", "answer", "category", "l2-category")

    def report(self, results):
        overall = self._accuracies(results)
        scores = {"Overall": overall, "mean of aAcc, fAcc, qAcc": mean(overall.values())}
        for column in ("category", "l2-category"):
            scores[column] = {
                name: self._accuracies(group)
                for name, group in group_by_column(results, column).items()
            }
        return overall["aAcc"], scores

    def _accuracies(self, results: list[Result]) -> dict[str, float]:
        figures = group_by(results, self._figure)
        questions = group_by(results, self._question)
        return {
            "aAcc": accuracy(results),
            "fAcc": percent(all_hit(group) for group in figures.values()),
            "qAcc": percent(all_hit(group) for group in questions.values()),
        }

    def _figure(self, row: Row) -> tuple[str, str, str]:
        parts = self._index_parts(row)
        return row["l2-category"], parts[3], parts[4]

    def _question(self, row: Row) -> tuple[str, str, str]:
        parts = self._index_parts(row)
        return row["l2-category"], parts[3], parts[5]

    @staticmethod
    def _index_parts(row: Row) -> list[str]:
        parts = row.index.split("_")
        if len(parts) < 6:
            raise BenchmarkError(
                f"{row.where}: the index is {show(row.index)}; expected six parts joined by '_', "
                "the fourth to sixth being set, figure and question"
            )
        return parts


class MME(YesNo):
    """Two questions to each picture (arXiv 2306.13394).

    A category's points are its accuracy plus the share of pictures both of whose answers are
    right, so at most 200. Fourteen categories make 2800.
    """

    title = "MME"
    metric = "100 · (perception + reasoning) / 2800"
    columns = ("question", "answer", "category", "image_path")
    CATEGORIES = {
        "perception": (
            "OCR",
            "artwork",
            "celebrity",
            "color",
            "count",
            "existence",
            "landmark",
            "position",
            "posters",
            "scene",
        ),
        "reasoning": (
            "code_reasoning",
            "commonsense_reasoning",
            "numerical_calculation",
            "text_translation",
        ),
    }

    def report(self, results):
        known = (*self.CATEGORIES["perception"], *self.CATEGORIES["reasoning"])
        points = {}
        for category, group in group_by(results, lambda row: row["category"]).items():
            if category not in known:
                raise BenchmarkError(
                    f"{group[0].row.where}: 'category' is {show(category)}; "
                    f"expected one of {', '.join(known)}"
                )
            points[category] = self._points(category, group)
        absent = [category for category in known if points.get(category) is None]
        if absent:
            warnings.warn(
                f"MME: no pairs of questions in {', '.join(absent)}, "
                "which add nothing to the total",
                stacklevel=2,
            )
        scores = {
            name: sum(points.get(category) or 0.0 for category in group)
            for name, group in self.CATEGORIES.items()
        }
        scores["total"] = scores["perception"] + scores["reasoning"]
        scores["category"] = {category: points.get(category) for category in known}
        return scores["total"] / 28, scores

    @staticmethod
    def _points(category: str, results: list[Result]) -> float | None:
        """The points of a category; None if no picture has two questions."""
        pictures = group_by(results, lambda row: row["image_path"])
        pairs = [group[:2] for group in pictures.values() if len(group) > 1]
        single = len(pictures) - len(pairs)
        if single:
            warnings.warn(
                f"MME, {category}: {single} pictures have one question instead of two "
                "and enter no pair",
                stacklevel=3,
            )
        if not pairs:
            return None
        return accuracy(results) + percent(all_hit(pair) for pair in pairs)


class MMBench(Benchmark):
    """Multiple choice, each question once per rotation of its options (arXiv 2307.06281).

    Circular accuracy, the headline, counts a question whose every rotation is answered rightly.
    """

    title = "MMBench"
    metric = "circular accuracy"
    reference = "the letter of an option"
    columns = ("question", "A", "B", "answer", "category", "l2-category")
    SHORT = {
        "coarse_perception": "CP",
        "finegrained_perception (instance-level)": "FP-S",
        "finegrained_perception (cross-instance)": "FP-C",
        "logic_reasoning": "LR",
        "relation_reasoning": "RR",
        "attribute_reasoning": "AR",
    }

    def prompt(self, row):
        return option_prompt(row, "Please select the correct answer from the options above. \n")

    def check(self, row, text):
        letter = match_option(text, row.options(), self.answer_is)
        return None if letter is None else letter == row["answer"]

    def report(self, results):
        first = [r for r in results if self._integer(r.row, "index") == self._question(r.row)]
        if not first:
            raise BenchmarkError(
                "no row is the first of its rotations; expected indices below 1,000,000"
            )
        rotations = group_by(results, self._question)
        circular = [
            Result(result.row, "", all_hit(rotations[self._question(result.row)]))
            for result in first
        ]
        scores = {
            "circular": self._by_split(circular),
            "vanilla circ0": self._by_split(first),
            "vanilla all": self._by_split(results),
        }
        return scores["circular"]["Overall"], scores

    def _by_split(self, results: list[Result]) -> dict:
        """Scores of all results and, if there is more than one split, of each."""
        scores = self._accuracies(results)
        splits = group_by(results, lambda row: row.cells.get("split", "none"))
        if len(splits) > 1:
            scores["split"] = {
                name: self._accuracies(part) for name, part in sorted(splits.items())
            }
        return scores

    def _accuracies(self, results: list[Result]) -> dict:
        abilities = accuracies(results, "l2-category")
        return {
            "Overall": accuracy(results),
            "l2-category": {self.SHORT.get(name, name): hit for name, hit in abilities.items()},
            "category": accuracies(results, "category"),
        }

    def _question(self, row: Row) -> int:
        """What the rotations of a question have in common: the index of the first of them."""
        if "g_index" in row.cells:
            return self._integer(row, "g_index")
        return self._integer(row, "index") % 10**6

    @staticmethod
    def _integer(row: Row, column: str) -> int:
        text = row.index if column == "index" else row[column]
        if not re.fullmatch("[0-9]{1,18}", text):
            raise BenchmarkError(
                f"{row.where}: {column!r} is {show(text)}; expected a whole number"
            )
        return int(text)
