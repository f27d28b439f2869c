"""walkthrough.py: the page as docs/ has it, its arithmetic, what it names, and hostile text.

No warm start is needed: a random policy makes a page with the same sentences. Numbers, answers,
tokens and cells depend on the policy, and on the processor, so `skeleton` leaves them out. All
other words, the heads of tables, the labels of lines and the names of functions must be those of
docs/walkthrough.md.
"""

import ast
import inspect
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import picture

import rewards
from model import save_policy
from tools import walkthrough

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "walkthrough.md"
NUMBER = r"−?\d+(?:,\d{3})*(?:\.\d+)?(?:e−\d+)?"
# What a line by hand may hold, besides numbers and signs.
FUNCTIONS = {"sqrt": math.sqrt, "exp": math.exp, "arccos": math.acos}
WORDS_OF_THE_TOOL = inspect.getsource(walkthrough)


@pytest.fixture
def model(make_policy, tmp_path):
    """The folder of a policy with random weights."""
    save_policy(make_policy(seed=1), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def write_page(model, tmp_path, monkeypatch):
    """write_page(*options) runs the command -> the page. Every other response counts as right."""
    turn = iter(range(10**6))
    monkeypatch.setattr(rewards, "accuracy", lambda text, answer: float(next(turn) % 2))

    def write(*options: str) -> str:
        out = tmp_path / "out" / "walkthrough.md"
        settings = ["rollout.max_new_tokens=9", "train.threads=0"]
        walkthrough.main(["--model", str(model), "--out", str(out), *options, *settings])
        return out.read_text()

    return write


# ------------------------------------------------------------------------------- the page in docs/


def without_numbers(text: str) -> str:
    """Numbers become #, and code spans that no template has become CODE."""

    def mask(span: re.Match) -> str:
        return span[0] if span[0] in WORDS_OF_THE_TOOL else "CODE"

    text = re.sub(r"(`+).+?\1", mask, " ".join(text.split()))
    return re.sub(NUMBER, "#", text)


def skeleton(page: str) -> list[str]:
    """What of a page depends neither on the policy nor on the processor, part by part."""
    parts: list[str] = []
    in_block, in_table = False, False
    for line in page.splitlines():
        was_in_table, in_table = in_table, line.startswith("|")
        if line.startswith("```"):
            in_block = not in_block
            part = "```"
        elif in_block and re.match(r"\d: |    ", line):
            part = "an answer"
        elif in_table and was_in_table:
            part = re.sub(r"[^|]+", ".", line.replace("\\|", ""))
        elif in_block or in_table or not line.strip():
            part = without_numbers(line)
        elif parts and parts[-1].startswith("TEXT"):
            part = f"{parts.pop()} {line}"
        else:
            part = f"TEXT {line}"
        if not parts or part != parts[-1]:
            parts.append(part)
    return [without_numbers(part) for part in parts]


def test_the_page_in_docs_is_what_the_command_writes(write_page):
    """All but numbers, tokens, answers and cells."""
    assert skeleton(write_page()) == skeleton(PAGE.read_text())


@pytest.mark.parametrize(
    "old, new",
    [
        ("## 4. Roles", "## 4. Parts"),
        ("`token_weights`", "`weights_of_tokens`"),
        ("| role | score | weight |", "| role | weight | score |"),
        ("visual shift:  2 × arccos", "visual shift:  arccos"),
        ("punished *harder*", "punished *less*"),
        ("| 3 | 1 | 1 |", "| 3 | 1 |"),
        ("\n## 5. Rewards", "\nmore words\n\n## 5. Rewards"),
    ],
)
def test_a_page_with_another_word_is_another_page(old, new):
    page = PAGE.read_text()
    assert old in page
    assert skeleton(page.replace(old, new, 1)) != skeleton(page)


def test_another_number_or_token_is_the_same_page():
    page = PAGE.read_text()
    other = page
    for old, new in {"0.866": "0.1", "' yellow'": "' blue'", "square is red": "x"}.items():
        other = other.replace(old, new)
    assert other != page
    assert skeleton(other) == skeleton(page)


def test_the_page_is_short_and_has_three_pictures():
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 250
    assert len(re.findall(r"^## \d\. ", text, re.MULTILINE)) == 8
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        ElementTree.parse(PAGE.with_name(name))
    assert text.count("![") == 3


def test_files_and_functions_that_the_page_names_exist():
    text = " ".join(PAGE.read_text().split())
    named = re.findall(r"\*\*Where:\*\*(.*?)\. \*\*Left out\?\*\*", text)
    assert len(named) == 8
    for of_section in named:
        for file, functions in re.findall(r"`([\w/]+\.py)`: (.*?)(?:;|$)", of_section):
            tree = ast.parse((ROOT / file).read_text())
            known = names_in(tree)
            for function in re.findall(r"`([\w.]+)`", functions):
                assert function in known, f"{file}: {function}"


def names_in(tree: ast.Module) -> set[str]:
    """Functions, classes and methods of a module."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            inner = [x for x in node.body if isinstance(x, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in inner}
    return names


# ------------------------------------------------------------------------------ arithmetic by hand


def by_hand(page: str) -> list[tuple[str, str]]:
    """The (expression, result) of every equation with a sign or a function in it."""
    equations = []
    for text in re.findall(r"(?::  |\| )([^|:\n]+ = [^|\n]+?)(?: \||$)", page, re.MULTILINE):
        expression, result = text.split(" = ")
        equations.append((expression, result))
    return equations


def worth(expression: str, add: dict[int, float]) -> float:
    """The value of an expression whose i-th number is changed by add[i]."""
    places = iter(range(1000))

    def changed(match: re.Match) -> str:
        place = next(places)
        return f"({float(match[0].replace('−', '-')) + add.get(place, 0.0)!r})"

    # A minus between blanks is a sign, and one before a digit belongs to the number.
    python = re.sub(r"(?:(?<=[( ])−(?=\d))?\d+(?:\.\d+)?", changed, expression.replace("^2", "²"))
    python = python.replace("×", "*").replace("−", "-").replace("²", "**2")
    return eval(python, {"__builtins__": {}}, FUNCTIONS)


def step_of(text: str) -> float:
    """Half a unit of the last decimal that is printed.

    Whole numbers are exact, and so are settings such as α, which have one decimal.
    """
    decimals = len(text.partition(".")[2])
    return 0.5 * 10**-decimals if decimals > 1 else 0.0


def check(expression: str, result: str) -> None:
    """The result follows from the printed numbers, as far as their rounding lets it."""
    numbers = re.findall(r"\d+(?:\.\d+)?", expression.replace("^2", ""))
    exact = worth(expression, {})
    allowed = step_of(result) + 1e-9
    for place, text in enumerate(numbers):
        allowed += abs(worth(expression, {place: step_of(text)}) - exact)
    assert abs(exact - float(result.replace("−", "-"))) <= allowed, f"{expression} = {result}"


def test_arithmetic_on_the_page_is_right(write_page):
    for page in (PAGE.read_text(), write_page()):
        equations = by_hand(page)
        assert len(equations) == 28
        for expression, result in equations:
            check(expression, result)


def test_wrong_arithmetic_is_noticed():
    check("(1 + 0.2 × 1.356) × −0.866", "−1.101")
    with pytest.raises(AssertionError):
        check("(1 + 0.2 × 1.356) × −0.866", "−1.104")
    with pytest.raises(AssertionError):
        check("2 × arccos(0.8774)", "1.010")


def rows_below(page: str, head: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    below = page[page.index(f"| {head}") :].split("\n")[2:]
    rows = []
    for line in below:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.replace("\\|", "").strip("|").split("|")])
    return rows


def test_tables_of_the_page_are_consistent():
    """Roots of the products of shares; weights of mean 1; roles by the lead of 0.05."""
    page = PAGE.read_text().replace("−", "-")
    *places, _ = rows_below(page, "image token")
    for _, _, _, before, now, root in places:
        check(f"sqrt({before} × {now})", root)

    halves = rows_below(page, " | token")
    tokens = [row[:7] for row in halves] + [row[7:] for row in halves]
    weights = [float(weight) for *_, weight in tokens]
    assert sum(weights) / len(weights) == pytest.approx(1, abs=5e-4)
    normal = sum(math.exp(float(score)) for *_, score, _ in tokens) / len(tokens)
    for number, _, visual, text, role, score, weight in tokens:
        lead = float(visual) - float(text)
        if abs(abs(lead) - 0.05) > 1e-3:
            expected = "neutral" if abs(lead) < 0.05 else "visual" if lead > 0 else "text"
            assert role == expected, number
        assert float(weight) == pytest.approx(math.exp(float(score)) / normal, abs=2e-3)


# --------------------------------------------------------------------------- hosts and the gradient


def test_a_wrong_answer_is_on_the_page_of_docs():
    """The reader has both signs before him, and the step did what it should."""
    rewards_of = {row[0]: row for row in rows_below(PAGE.read_text(), "answer | right")}
    assert {row[1] for row in rewards_of.values()} == {"0", "1"}
    ratios = re.findall(r"probability after / before:.* = ([\d.]+)", PAGE.read_text())
    good, bad = map(float, ratios)
    assert good > 1 > bad


# ------------------------------------------------------------------------------------- the command


def test_ones_own_picture_and_equal_rewards(model, tmp_path, capsys):
    """A random policy is never right: the page says that nothing is learned."""
    picture(140, 84, seed=3).save(tmp_path / "a.png")
    walkthrough.main(
        [
            *("--model", str(model), "--image", str(tmp_path / "a.png")),
            *("--question", "How many | `cats`?", "--answer", "3"),
            *("rollout.max_new_tokens=6", "train.threads=0"),
        ]
    )
    page = capsys.readouterr().out
    assert "The prompt is your question about your picture." in page
    assert "`` How many | `cats`? ``" in page
    assert "All rewards of this prompt are equal" in page
    assert "![" not in page
    for expression, result in by_hand(page):
        check(expression, result)
    assert {row[-1] for row in rows_below(page, "answer | right")} == {"0.000"}


def test_text_of_a_model_stays_text(write_page, tmp_path, monkeypatch):
    """Whatever tokens say, no table has more cells, and pictures are XML without elements of it."""
    hostile = "</text><script>|`\x1b[31m\ud800\ufffe"

    def decode(self, *arguments, **options):
        return hostile

    from transformers import Qwen2Tokenizer

    monkeypatch.setattr(Qwen2Tokenizer, "decode", decode)
    page = write_page()
    assert "script" in page
    assert "\x1b" not in page
    rows = page[page.index("|  | token | visual shift") :].split("\n\n")[0].split("\n")
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {15}
    for name in ("attention", "shifts", "weights"):
        tree = ElementTree.parse(tmp_path / "out" / f"walkthrough-{name}.svg")
        kinds = {element.tag.rpartition("}")[2] for element in tree.iter()}
        assert kinds <= {"svg", "title", "rect", "text", "path", "circle", "image"}


def test_rows_come_from_before_the_step(write_page, tmp_path):
    """The row's masses are those that the rollout read, on the page and in the picture.

    A learning rate of 0.05 leaves nothing of a row as it was.
    """
    page = write_page("optim.lr=0.05")
    of_row = re.search(r"all text before it:  ([\d.]+) \+ ([\d.]+) ", page).groups()
    score = r"score of token \d+:  [\d.]+ / \(([\d.]+) \+ ([\d.]+)\)"
    of_rollout = re.search(score, page).groups()
    for mass, read in zip(of_row, of_rollout, strict=True):
        assert float(mass) == pytest.approx(float(read), abs=2e-3)
    svg = (tmp_path / "out" / "walkthrough-attention.svg").read_text()
    assert f"{of_row[0]} on the picture" in svg


def test_the_row_is_that_of_the_token_with_the_largest_lead(write_page):
    for page in (PAGE.read_text(), write_page()):
        halves = rows_below(page, " | token")
        tokens = [row for pair in halves for row in (pair[:7], pair[7:]) if row[0]]
        leads = {row[0]: float(row[2]) - float(row[3]) for row in tokens if row[0] != "1"}
        shown = re.search(r"score of token (\d+):", page)[1]
        assert leads[shown] == pytest.approx(max(leads.values()), abs=2e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image", "a.png"], "--image, --question and --answer go together"),
        (["--image", "no.png", "--question", "?", "--answer", "3"], "no.png"),
        (["--image", "b.png", "--question", "?", "--answer", "3"], "cannot be decoded"),
        (["--image", "a.png", "--question", "<image><image>", "--answer", "3"], "several <image>"),
        (["--image", "a.png", "--question", "<|im_end|>", "--answer", "3"], "special token"),
        (["--image", "a.png", "--question", "?", "--answer", ""], "--answer ''"),
        (["--out", "page.txt"], "expected a file that ends in .md"),
        (["dyco.rule=signed"], "dyco.rule: found signed"),
        (["dyco.enabled=false"], "dyco.enabled: found false"),
        (["dyco.layers=[0,1]"], "dyco.layers: found several"),
        (["rollout.group=3"], "rollout.group"),
        (["--model", "nowhere"], "no folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(56, 56, seed=0).save("a.png")
    Path("b.png").write_text("no picture")
    if "--model" not in options:
        monkeypatch.setattr(walkthrough.train, "build", None)  # no model is loaded
    with pytest.raises(SystemExit) as leaving:
        walkthrough.main(options)
    said = str(leaving.value)
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said


def test_too_few_groups_with_different_rewards_are_said(write_page, monkeypatch):
    monkeypatch.setattr(rewards, "accuracy", lambda text, answer: 0.0)
    monkeypatch.setattr(walkthrough, "SEARCHED", 3)
    page = " ".join(write_page().split())
    assert "None of the first 3 questions that training does not see, or one alone, had 4" in page
    assert "All rewards of this prompt are equal" in page
