"""wemath.py: We-Math (arXiv 2407.01284): composite problems and the one-step problems in them.

A composite problem has a row for each of its two or three steps and one for the whole. Which of
these a model answers says whether it lacks knowledge, cannot combine it, or knows the answer by
rote.
"""

import re
import warnings
from collections import defaultdict

from benchmarks.answers import letter_after_answer, match_option
from benchmarks.benchmark import Benchmark, Result, accuracies, accuracy, mean, option_prompt
from benchmarks.files import BenchmarkError, show

# A composite problem: "1", "2", "3" or "multi" -> the place of that row among the results.
Problem = dict[str, int]


class WeMath(Benchmark):
    """The headline counts a problem once it is mastered: the whole and every step are right."""

    title = "WeMath"
    metric = "Score (Strict)"
    reference = "the letter of an option"
    columns = ("ID", "key", "knowledge concept", "question", "A", "B", "answer")

    def prompt(self, row):
        text = option_prompt(row)
        if self.name == "WeMath_COT" and "requirement" in row.cells:
            text += f"\n{row['requirement']}"
        return text

    def check(self, row, text):
        letter = match_option(text, row.options(), self.answer_is)
        return None if letter is None else letter == row["answer"]

    def report(self, results):
        problems = complete_problems(results)
        hits = [bool(result.hit) for result in results]
        scores = mastery(problems, hits)
        one_step = [result for result in results if not result.row["key"].endswith("multi")]
        scores["One-step(S1)"] = accuracy(one_step)
        scores["Two-step(S2)"] = accuracy(r for r in results if r.row["key"] == "2steps_multi")
        scores["Three-step(S3)"] = accuracy(r for r in results if r.row["key"] == "3steps_multi")
        scores["domain"] = domain_accuracies(one_step)
        by_letter = [self._hits_after_answer(result) for result in results]
        scores['letter after "Answer"'] = mastery(problems, by_letter)
        return scores["Score (Strict)"], scores

    @staticmethod
    def _hits_after_answer(result: Result) -> bool:
        letter = letter_after_answer(result.text)
        return letter is not None and letter == result.row.cells.get("answer")


def complete_problems(results: list[Result]) -> list[Problem]:
    """The composite problems that have all their rows. Raises BenchmarkError if there are none."""
    problems = find_problems(results)
    complete = [parts for (steps, _), parts in problems.items() if len(parts) == int(steps) + 1]
    if not complete:
        raise BenchmarkError(
            "no problem has all its rows: each step and the composite problem; "
            "expected at least one"
        )
    lacking = len(problems) - len(complete)
    if lacking:
        warnings.warn(
            f"WeMath: {lacking} of {len(problems)} problems lack a row and do not count",
            stacklevel=3,
        )
    return complete


def find_problems(results: list[Result]) -> dict[tuple[str, str], Problem]:
    """(number of steps, ID) -> problem. One ID serves a two-step and a three-step problem."""
    problems: dict[tuple[str, str], Problem] = defaultdict(dict)
    for place, result in enumerate(results):
        row = result.row
        match = re.fullmatch(r"(2)steps_([12]|multi)|(3)steps_([123]|multi)", row["key"])
        if not match:
            raise BenchmarkError(
                f"{row.where}: 'key' is {show(row['key'])}; "
                "expected such as '2steps_1' or '3steps_multi'"
            )
        steps = match[1] or match[3]
        part = match[2] or match[4]
        parts = problems[steps, row["ID"]]
        if part in parts:
            raise BenchmarkError(
                f"{row.where}: {row['key']} of problem {show(row['ID'])} stands at "
                f"{results[parts[part]].row.where}, too; expected each once"
            )
        parts[part] = place
    return problems


def mastery(problems: list[Problem], hits: list[bool]) -> dict[str, float | None]:
    """Shares of the problems by what the model can do, in percent.

    Insufficient knowledge: neither the whole nor every step is right. Inadequate generalization:
    only the whole is wrong. Complete mastery: the whole is right and so is every step (strict), or
    any step (loose). Rote memorization: the share, of the problems whose whole is right, that is
    not mastered.
    """
    insufficient = inadequate = answered = mastered_strict = mastered_loose = 0
    for parts in problems:
        whole = hits[parts["multi"]]
        steps = [hits[place] for part, place in parts.items() if part != "multi"]
        if whole:
            answered += 1
            if all(steps):
                mastered_strict += 1
            if any(steps):
                mastered_loose += 1
        elif all(steps):
            inadequate += 1
        else:
            insufficient += 1

    def share(count: float) -> float:
        return 100 * count / len(problems)

    scores = {}
    for rule, mastered in (("Strict", mastered_strict), ("Loose", mastered_loose)):
        by_rote = 100 * (answered - mastered) / answered if answered else None
        scores |= {
            f"Score ({rule})": share(mastered + 0.5 * inadequate),
            f"InsufficientKnowledge ({rule})": share(insufficient),
            f"InadequateGeneralization ({rule})": share(inadequate),
            f"CompleteMastery ({rule})": share(mastered),
            f"RoteMemorization ({rule})": by_rote,
        }
    return scores


def domain_accuracies(one_step: list[Result]) -> dict[str, float | None]:
    """The accuracy of each domain: the mean over those of its concepts that the rows have."""
    concepts = accuracies(one_step, "knowledge concept")
    known = {concept for group in WEMATH_DOMAINS.values() for concept in group}
    unknown = sorted(concepts.keys() - known)
    if unknown:
        warnings.warn(
            f"WeMath: {len(unknown)} knowledge concepts are in no domain, "
            f"{show(unknown[0])} for one",
            stacklevel=3,
        )
    return {
        domain: mean(concepts[concept] for concept in group if concept in concepts)
        for domain, group in WEMATH_DOMAINS.items()
    }


# The leaves of We-Math's knowledge tree under its twelve second-level domains.
WEMATH_DOMAINS = {
    "Understanding and Conversion of Units": (
        "Conversion Rates and Calculations Between Area Units",
        "Conversion Rates and Calculations Between Length Units",
        "Conversion Rates and Calculations Between Volume Units (Including Liters and Milliliters)",
    ),
    "Angles and Length": (
        "Understanding Angles (Using a Protractor)",
        "Understanding Length (Using a Ruler)",
    ),
    "Calculation of Plane Figures": (
        "Sum of Interior Angles of Triangles",
        "Sum of Interior Angles of Other Polygons",
        "Calculation and Comparison of Angles",
        "Area of Triangles",
        "Area of Parallelograms",
        "Area of Trapezoids",
        "Area of Rectangles",
        "Area of Squares",
        "Area of Circles",
        "Area of Sectors",
        "Perimeter of Triangles",
        "Perimeter of Parallelograms",
        "Perimeter of Trapezoids",
        "Perimeter of Rectangles",
        "Perimeter of Squares",
        "Circumference of Circles",
    ),
    "Understanding of Plane Figures": (
        "Properties and Understanding of Triangles",
        "Properties and Understanding of Parallelograms",
        "Properties and Understanding of Trapezoids",
        "Properties and Understanding of Rectangles",
        "Properties and Understanding of Squares",
        "Understanding Triangular Rulers",
        "Understanding and Representing Angles",
        "Distance Between Two Points",
        "Understanding Line Segments, Lines, and Rays",
        "perpendicularity",
        "Parallel",
        "Understanding Circles",
        "Understanding Sectors",
        "Observing Figures",
    ),
    "Calculation of Solid Figures": (
        "Surface Area of Cylinders",
        "Surface Area of Rectangular Cuboids",
        "Surface Area of Cubes",
        "Volume and Capacity of Cones",
        "Volume and Capacity of Cylinders",
        "Volume and Capacity of Rectangular Cuboids",
        "Volume and Capacity of Cubes",
    ),
    "Understanding of Solid Figures": (
        "Expanded View of Cylinders",
        "Expanded View of Rectangular Cuboids",
        "Expanded View of Cubes",
        "Properties of Cylinders",
        "Properties of Cones",
        "Properties and Understanding of Rectangular Cuboids",
        "Properties and Understanding of Cubes",
        "Observing Objects",
    ),
    "Basic Transformations of Figures": (
        "Axial Symmetry",
        "Translation",
        "Rotation",
    ),
    "Cutting and Combining of Figures": (
        "Combining and Dividing Solids",
        "Division of Plane Figures",
        "Combining Plane Figures",
        "Tessellation of Figures",
        "Folding Problems of Figures",
    ),
    "Direction": (
        "Southeast, Southwest, Northeast, Northwest Directions",
        "Cardinal Directions (East, South, West, North)",
    ),
    "Position": (
        "Front-Back Position",
        "Up-Down Position",
        "Left-Right Position",
    ),
    "Route Map": (
        "Determining the Positions of Objects Based on Direction, Angle, and Distance",
        "Describing Simple Routes Based on Direction and Distance",
    ),
    "Correspondence of Coordinates and Positions": (
        "Representing Positions Using Ordered Pairs",
        "Finding Positions Based on Ordered Pairs",
    ),
}
