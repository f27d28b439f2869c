r"""answers.py: the rules that read an answer out of a response.

The rules are those of VLMEvalKit's rule-based path, described here and written anew, with its
quirks: scores are comparable only if the rules are the same. Each benchmark says which of them it
uses. Responses are hostile input, so every rule takes linear time and nothing is evaluated.
"""

import re
import string
from fractions import Fraction

import rewards

# ----------------------------------------------------------------------------------- final answers


def final_answer(response: str, unbox: bool = True) -> str:
    r"""What a response that reasons first gives as its answer.

    Three steps, each only where there is such a part: take the text after the last </think>; in it
    the last <answer>…</answer>; in that, with `unbox`, the last \boxed{…} with balanced braces.

    final_answer(r"<think>So 3+2.</think><answer>\boxed{\text{B}}</answer>") -> "B"
    """
    text = response.rpartition("</think>")[2]
    block = rewards.extract_answer(text)
    if block is not None:
        text = block
    if unbox:
        boxed = _last_boxed(text)
        if boxed is not None:
            text = _without_text_command(boxed.strip())
    return text.strip()


def _last_boxed(text: str) -> str | None:
    r"""The content of the \boxed{…} that begins last, or None."""
    open_braces = []
    last = None
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            open_braces.append(brace.end())
        elif open_braces:
            start = open_braces.pop()
            is_boxed = text.endswith(r"\boxed{", 0, start)
            if is_boxed and (last is None or start > last[0]):
                last = start, brace.start()
    return None if last is None else text[last[0] : last[1]]


def _without_text_command(boxed: str) -> str:
    r""" "\text{B}" -> "B", if the command holds all of the text."""
    for command in (r"\text{", r"\mathrm{"):
        if boxed.startswith(command):
            opening = len(command) - 1
            if _closing_brace(boxed, opening) == len(boxed) - 1:
                return boxed[len(command) : -1]
    return boxed


def _closing_brace(text: str, start: int) -> int:
    """Where the brace that opens at `start` is closed, or -1."""
    depth = 0
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    return -1


# ---------- letters inside mathematics

# Put behind a letter that names a point or a quantity, so that no rule takes it for an option. It
# is a letter itself, so that with it the two are one word.
HIDDEN = "\u02b9"
# Possessive, and none looks past the next delimiter: the time is linear in the text.
_EXPRESSIONS = re.compile(
    r"\$\$[^$]*+\$\$|\$[^$\n]*+\$"
    r"|\\\((?:[^\\]|\\(?![()]))*+\\\)|\\\[(?:[^\\]|\\(?![\[\]]))*+\\\]"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
_LETTER_LIST = re.compile(r"[\s()\[\]*.$,;\\]*+(?:[A-Z](?:[\s()\[\]*.$,;&\\]|and)*+)++")
_LABEL = re.compile(r"[\s$({\[*\\]*+(?:text\w*+\s*+\{)?+[({\[]*+[A-Z]\s*+[.):\]}]")


def hide_letters(text: str, whole: bool = False) -> str:
    r"""The text, in whose expressions letters of points and quantities are no options.

    An expression stands between dollars, in \(…\), \[…\] or \boxed{…}; with `whole` the text is
    one. A lone letter, a list of letters, and a letter that labels what follows, stay options.

    hide_letters(r"\angle B = 30^{\circ}", whole=True) -> r"\angle Bʹ = 30^{\circ}"
    hide_letters(r"So $AB = 3$.") -> unchanged: AB is one word
    """
    if whole:
        return _hide_in(text) if re.search(r"[\\^_={}<>+]", text) else text
    hidden = _EXPRESSIONS.sub(lambda match: _hide_in(match[0]), text)
    boxed = _last_boxed(hidden)
    if boxed is not None:
        hidden = hidden.replace("{" + boxed + "}", "{" + hide_letters(boxed, whole=True) + "}")
    return hidden


def _hide_in(expression: str) -> str:
    bare = _WRAPPED.sub(r"\1", expression)
    if _LETTER_LIST.fullmatch(bare):
        return re.sub(r"[$\\]", " ", bare)  # no matcher reads a letter between dollars
    label = _LABEL.match(expression)
    kept = label.end() if label else 0
    # A letter that is a command, such as \S, is none.
    hidden = re.sub(r"(?<![\w\\])([A-Z])(?!\w)", rf"\1{HIDDEN}", expression[kept:])
    return expression[:kept] + hidden


# ---------------------------------------------------------------------------------- multiple choice

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def match_option(
    text: str, options: dict[str, str], answer_is: bool = False, whole: bool = False
) -> str | None:
    """VLMEvalKit's matcher: the letter of an option, "Z" for "none of them", or None.

    Either exactly one option letter stands alone in the text, for the first time among its last
    four words. Or exactly one option's words stand in a short text.

    answer_is: adds VLMEvalKit's rule of 2026-06-17: "answer is", white space, stars, and then a
        letter a-d.
    whole: is ours. Options are not looked for inside longer words and numbers, such as 40° in
        140°. A degree sign, and a space before a unit, may be missing.

    match_option("The answer is (B).", {"A": "red", "B": "blue"}) -> "B"
    match_option("It is blue", {"A": "red", "B": "blue"}) -> "B"
    """
    if _API_FAILURE not in text:
        letter = _match_letter(text, options, answer_is)
        if letter is not None:
            return letter
    return _match_words(text.lower(), options, whole)


def _match_letter(text: str, options: dict[str, str], answer_is: bool) -> str | None:
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    words = text.translate(_TO_SPACES).split()
    present = set(words)
    letters = [letter for letter in options if letter in present]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:
        return letters[0]
    if not letters and "Z" in present:
        return "Z"
    if answer_is:
        # As VLMEvalKit has it, without a word boundary: "answer is because" gives B.
        match = re.search(r"(?i)answer\s++is\s++\**+([a-d])", text)
        if match and match[1].upper() in options:
            return match[1].upper()
    return None


def _match_words(text: str, options: dict[str, str], whole: bool) -> str | None:
    """The only option whose words stand in a text that is not too long for that."""
    text = text.replace(HIDDEN, "")
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    stands = _stands_whole if whole else str.__contains__
    letters = [letter for letter, option in options.items() if stands(text, option.lower())]
    return letters[0] if len(letters) == 1 else None


def _stands_whole(text: str, option: str) -> bool:
    wanted = re.escape(_without_degrees(option))
    pattern = rf"(?<![\w.,]){wanted}(?!\w|[.,]\d)"
    if re.fullmatch(r"\d{1,2}", wanted):
        pattern += r"(?!\)\s*+\w)"  # "(1) 5" is the first part of an answer, and no 1
    return re.search(pattern, _without_degrees(text)) is not None


def _without_degrees(text: str) -> str:
    """ "3 cm" -> "3cm", "40°" -> "40"."""
    return re.sub(r"(?<=\d)\s+(?=[^\W\d])", "", text.replace("°", ""))


# --------------------------------------------------------------------------------------- yes and no

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def yes_or_no(text: str) -> str | None:
    """ "Yes" or "No" if exactly one of the two is a word of the text, else None.

    VLMEvalKit's cleaning of punctuation comes first.

    yes_or_no("Yes, it is.") -> "Yes"
    yes_or_no("**Yes**") -> None
    yes_or_no("A: yes or no? No.") -> None
    """
    original = text.lower()
    text = original
    has_comma_in_number = re.search(r"\d,\d", original) is not None
    for mark in _PUNCTUATION:
        beside_space = mark + " " in original or " " + mark in original
        # A mark beside a space anywhere is deleted everywhere. Others become spaces.
        text = text.replace(mark, "" if has_comma_in_number or beside_space else " ")
    # Of the periods that touch no digit, the first 32 are deleted, as there.
    words = set(re.sub(r"(?<!\d)\.(?!\d)", "", text, count=32).split())
    if "yes" in words and "no" not in words:
        return "Yes"
    if "no" in words and "yes" not in words:
        return "No"
    return None


# ------------------------------------------------------------------------------ explicit statements

# The halves of the full-width forms of ASCII, and of the punctuation of Chinese and Japanese.
_HALF_WIDTH = str.maketrans(
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | {ord("。"): ".", ord("．"): ".", ord("、"): ",", ord("　"): " "}
    | {ord("【"): "[", ord("】"): "]", ord("「"): " ", ord("」"): " "}
)
# A letter, or several, that no word, value or operator goes on. Chinese has no spaces.
_NO_WORD = r"(?!(?![\u3400-\u9fff])\w)"
_STATED_LETTERS = rf"[A-I]{_NO_WORD}(?:\s*+(?:[,;/&和]|and\b)\s*+[A-I]{_NO_WORD})*+"
_STATEMENT = re.compile(
    r"(?:(?i:\b(?:(?:answer|choice)s?|(?:correct|right|best) option)\s*+(?:is\b|are\b|:))"
    r"|答案\s*+(?:是|为|為|选|選|:)|(?:应|應|故|所以)[选選](?:择|擇)?|^\s*+[选選](?:择|擇)?)"
    r"[\s:*]*+(?:(?i:option|choice)s?\b|选项|選項)?+[\s:*(\[$]*+"
    rf"({_STATED_LETTERS})"
    # An equation, or an article, follows.
    r"(?!\s*+[=+\-/^<>]|['’])(?!\s+(?!(?:because|since|as|for|so|with|which|and|or|is)\b)[a-z])"
)


def half_width(text: str) -> str:
    """ "答案：（Ｂ）。" -> "答案:(B)." """
    return text.translate(_HALF_WIDTH)


def stated_letters(text: str) -> str | None:
    """The letters that stand after the last "answer is", "Answer:", "答案是" …, or None.

    A letter that is an article or begins an equation is none.

    stated_letters("A is wrong. The answer is B, since C is too small.") -> "B"
    stated_letters("答案：（Ｂ）") -> "B"
    stated_letters("The answer is B = 30") -> None
    """
    stated = [match[1] for match in _STATEMENT.finditer(half_width(text))]
    return stated[-1].replace("和", ",") if stated else None


# ------------------------------------------------------------------------- letters and free answers


def letter_after_answer(text: str) -> str | None:
    """WeMath's own rule: the first character after the last "Answer", if it is a letter A-H.

    The characters < > : . are removed before.

    letter_after_answer("<Answer>: <<B>>") -> "B"
    letter_after_answer("The answer is B") -> None
    """
    text = re.sub("[<>:.]", "", text.rpartition("Answer")[2].strip()).strip()
    return text[0] if text and text[0] in "ABCDEFGH" else None


_SEPARATORS = r"(?:[\s,;/&]|\band\b)"
_LETTERS = rf"[A-I](?!\w)(?:{_SEPARATORS}++[A-I](?!\w))*+"
_ANSWER_LETTERS = re.compile(
    r"(?i:\b(?:answer|option|choice)s?\s*+(?:is\b|are\b|:)[\s:*]*+(?:(?:option|choice)s?\b)?+)"
    rf"[\s:*(\[$]*+({_LETTERS})"
)


def answer_letters(text: str) -> set[str] | None:
    """LogicVista's letters A-I, by the first of four rules that applies; None if none does.

    1. The whole text is a list of letters, which may be numbered.
    2. The text is one letter as a label, and then the option's words.
    3. A list stands directly after "answer is", "options are", "choice:" …; the last one counts.
    4. One letter B-H stands alone in the text. "A" and "I" are words, too.

    answer_letters("A, C") -> {"A", "C"}
    answer_letters("A hard one. The answer is B and D.") -> {"B", "D"}
    """
    stripped = text.strip(string.whitespace + "*()[].$")
    whole = re.sub(r"^(?i:option|choice)s?\s+", "", stripped).lstrip("*([")
    without_numbers = re.sub(r"\(?\b\d{1,2}\)", " ", whole).strip()  # "1) A 2) C"
    for letters in (whole, without_numbers):
        if re.fullmatch(rf"{_LETTERS}|[A-I]{{2,9}}", letters):
            return set(re.findall("[A-I]", letters))
    label = re.match(r"([A-I])[.:)\]*]+\s", whole)
    if label and not re.search(r"\b[A-I][.:)\]]", whole[label.end() :]):
        return {label[1]}
    after = [match[1] for match in _ANSWER_LETTERS.finditer(text)]
    if after:
        return set(re.findall("[A-I]", after[-1]))
    alone = set(re.findall(r"\b[B-H]\b", text))
    return alone if len(alone) == 1 else None


def is_equal(answer: str, reference: str) -> bool:
    r"""MathVision's equality: the same text without case, or rational numbers closer than 1e-6.

    For the numbers, what is boxed stands for the whole text, on both sides: VLMEvalKit's parser of
    LaTeX does that. Degree signs and dollars say nothing. Units, surds, π and variables are not
    understood.

    is_equal(r"\frac{1}{2}", "0.5") -> True
    is_equal(r"The angle is \boxed{45^\circ}.", "45") -> True
    is_equal("5 cm", "5") -> False
    """
    answer = answer.replace(HIDDEN, "").lower().strip()
    reference = reference.replace(HIDDEN, "").lower().strip()
    if answer == reference:
        return True
    value = _number(answer)
    expected = _number(reference)
    return value is not None and expected is not None and abs(value - expected) < 1e-6


# It begins at no white space, so that a long run of it takes linear time.
_SAYS_NOTHING = re.compile(r"\^\s*+(?:\\circ(?![a-z])|\{\s*+\\circ\s*+\})|\\\$")


def _number(text: str) -> Fraction | None:
    return rewards.rational(_SAYS_NOTHING.sub("", boxed_values(text)))


_BOX = re.compile(r"\\(?:boxed|fbox)\s*+(\{?)")


def boxed_values(text: str) -> str:
    r"""The contents of all boxes, joined by commas; the text itself if it has none.

    Neighbours that are the same count once. If the last box is never closed, it holds the rest of
    the text. An earlier box that is not closed before the next one hides all boxes before it.

    boxed_values(r"First \boxed{3}, then \fbox{4}.") -> "3,4"
    """
    end = len(text)
    closings = _closing_braces(text)
    values: list[str] = []
    for box in reversed(list(_BOX.finditer(text))):
        opening = box.start(1)
        closing = closings.get(opening, end)
        if closing >= end:
            if not values:
                values = [text[opening:]]
            break
        value = text[box.end() : closing].strip()
        if not values or values[-1] != value:
            values.append(value)
        end = box.start()
    return ",".join(reversed(values)) if values else text


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed opens -> where it closes."""
    open_braces = []
    closings = {}
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            closings[open_braces.pop()] = brace.start()
    return closings
