"""token_view.py: responses token by token, with each token's role, weight and attention.

`token_view` makes the HTML and the data that the page's script draws from. The script shows one
token at a time: its attention over the picture, its numbers and its four signals.
"""

from tools.markup import Html, esc, join, tag

# The pair of one sample: (step, example) at the first and at the last evaluation, or only one.
Pair = list[tuple[int, dict]]

ROLE_CLASSES = {1: "v", -1: "t", 0: "n"}
SHADES = 9  # the darkest of the page's classes w0, w1, …
SIGNALS = ("visual_mass", "text_mass", "visual_shift", "text_shift")


# --------------------------------------------------------------------------------- what is shown


def choose_pairs(evaluations: list[tuple[int, list[dict]]], count: int) -> list[Pair]:
    """`count` samples of the last evaluation, each with its example at every evaluation.

    evaluations: (step, examples). The samples come by turns: one that changed from right to wrong
    or back, one that is wrong at last, one that is right throughout, and so on.
    """
    by_id = [(step, {example["id"]: example for example in shown}) for step, shown in evaluations]
    kinds: list[list[Pair]] = [[], [], []]
    for name in by_id[-1][1]:
        pair = [(step, examples[name]) for step, examples in by_id if name in examples]
        kinds[outcome_kind(pair)].append(pair)
    chosen = []
    for turn in range(max(len(kind) for kind in kinds)):
        chosen += [kind[turn] for kind in kinds if turn < len(kind)]
    return chosen[:count]


def outcome_kind(pair: Pair) -> int:
    """0 for a sample whose outcome changed, 1 for one that is wrong, 2 for one that is right."""
    first, last = pair[0][1], pair[-1][1]
    if first["correct"] != last["correct"]:
        return 0
    return 2 if last["correct"] else 1


def first_token(example: dict) -> int | None:
    """The token to show at first: of those one can read, the one with the most image mass.

    None for a response without tokens. A response without readable tokens begins with any token.
    """
    places = range(len(example["tokens"]))
    readable = [place for place in places if is_readable(example["tokens"][place])]
    return max(readable or places, key=lambda place: example["visual_mass"][place], default=None)


def is_readable(text: str) -> bool:
    """Whether a token shows as something: not blank, no control character, no part of a letter."""
    return bool(text.strip()) and text.strip().isprintable() and "\ufffd" not in text


# ------------------------------------------------------------------------------------------ HTML


def token_view(pairs: list[Pair], tau) -> tuple[Html, list[dict]]:
    """The legend, a button for each sample and its panel; and the data for the page's script."""
    tabs = [tab(number, pair) for number, pair in enumerate(pairs)]
    panels = [panel(number, pair) for number, pair in enumerate(pairs)]
    picker = tag("div", *tabs, class_="picker", role="tablist", aria_label="Examples")
    return join([legend(tau), picker, *panels]), [script_data(pair) for pair in pairs]


def legend(tau) -> Html:
    """What colours, shades and bright cells mean, in plain words."""
    limit = "τ" if tau is None else f"τ = {tau}"
    ramp = [tag("span", class_=f"t w{shade}") for shade in (0, 3, 6, 9)]
    entries = [
        (
            tag("span", "visual", class_="v w6 token"),
            "Since the token before, attention moved more within the image than within the text.",
        ),
        (
            tag("span", "text", class_="t w6 token"),
            "It moved more within the text than within the image.",
        ),
        (
            tag("span", "neutral", class_="n token"),
            f"The two moved about equally: they differ by at most {limit} radians (eq. 5).",
        ),
        (
            tag("span", *ramp, class_="ramp"),
            "The darker a token, the larger its weight (eq. 7) within its response.",
        ),
        (
            tag("span", class_="cell"),
            "A bright cell of the picture is where the model looked when it was about to write the "
            "token. Each picture is scaled to its own brightest cell.",
        ),
    ]
    rows = [tag("div", tag("dt", sign), tag("dd", meaning)) for sign, meaning in entries]
    return tag("dl", *rows, class_="legend")


def verdict(example: dict, *more) -> Html:
    if example["correct"]:
        return tag("b", "✓", *more, class_="good")
    return tag("b", "✗", *more, class_="bad")


def tab(number: int, pair: Pair) -> Html:
    """The button that shows a sample."""
    outcomes = [
        f"{'right' if example['correct'] else 'wrong'} at step {step}" for step, example in pair
    ]
    marks = Html(" → ".join(verdict(example) for _, example in pair))
    return tag(
        "button",
        tag("span", class_="thumb"),
        tag("span", marks),
        role="tab",
        id=f"tab-{number}",
        aria_controls=f"example-{number}",
        aria_selected="false" if number else "true",
        tabindex=-1 if number else 0,
        aria_label=f"Example {number + 1}: {', then '.join(outcomes)}",
    )


def panel(number: int, pair: Pair) -> Html:
    """A sample: its pictures and the read-out beside its question and its responses."""
    last = pair[-1][1]
    frames = []
    for place, image in enumerate(last["images"], start=1):
        shown = tag("img", src=image["file"], alt=f"Image {place} of the question")
        frames.append(tag("div", shown, tag("canvas"), class_="frame"))
    look = [tag("div", class_="readout")]
    if frames:
        look.insert(0, tag("div", *frames, class_="frames"))
    # The marker stands for a picture; after escaping it reads &lt;image&gt;.
    marker = tag("span", "image", class_="mark") + " "
    question = Html(esc(last["question"]).replace("&lt;image&gt;", marker))
    answer = tag("b", last["answer"])
    responses = [
        response(f"t{number}-{run}", run, step, example=example)
        for run, (step, example) in enumerate(pair)
    ]
    said = tag(
        "div",
        tag("p", question, class_="question"),
        tag("p", "Reference answer ", answer, " · sample ", last["id"], class_="unit"),
        tag("div", *responses, class_="responses"),
    )
    return tag(
        "article",
        tag("div", *look, class_="look"),
        said,
        class_="example",
        id=f"example-{number}",
        role="tabpanel",
        aria_labelledby=f"tab-{number}",
        hidden=number > 0,
    )


def response(name: str, run: int, step: int, example: dict) -> Html:
    """One response, its tokens coloured by role and shaded by weight.

    name: what the ids of its tokens begin with. run: its place among the sample's responses.
    """
    weights = example["weights"]
    low, high = min(weights, default=0), max(weights, default=0)
    heading = tag(
        "h4",
        f"Step {step} ",
        verdict(example, " right" if example["correct"] else " wrong"),
        tag("span", f"weights {low:.2f} … {high:.2f}", class_="unit"),
    )
    spans = []
    for place, text in enumerate(example["tokens"]):
        shade = SHADES // 2
        if high > low:
            shade = round(SHADES * (weights[place] - low) / (high - low))
        spans.append(
            tag(
                "span",
                token_text(text),
                role="option",
                id=f"{name}-{place}",
                aria_selected="false",
                class_=f"{ROLE_CLASSES[example['roles'][place]]} w{shade}",
            )
        )
    tokens = tag(
        "div",
        *spans,
        class_="tokens",
        role="listbox",
        tabindex=0,
        data_run=run,
        aria_label=f"Tokens of the response at step {step}",
    )
    return tag("div", heading, tokens, unfinished(example), class_="response")


def unfinished(example: dict) -> Html:
    """A note below a response of which not all is shown, or that the token limit cut."""
    hidden = example["length"] - len(example["tokens"])
    if hidden:
        return tag("span", f"… {hidden} more tokens", class_="unit")
    if example["truncated"]:
        return tag("span", "(cut off)", class_="unit")
    return Html()


def token_text(text: str) -> Html:
    """A token as it reads. A line break, or nothing at all, shows as a sign."""
    if not text:
        return tag("i", "∅", class_="sign")
    return Html(esc(text).replace("\n", tag("i", "↵", class_="sign") + "\n"))


# -------------------------------------------------------------------------------- for the script


def script_data(pair: Pair) -> dict:
    """What the page's script draws from: where heat-map cells lie, and each response's numbers."""
    images = pair[-1][1]["images"]
    kept = ("tokens", "roles", "weights", "scores", "probabilities", "heat", "peaks")
    runs = []
    for step, example in pair:
        run = {"step": step, "first": first_token(example)}
        run |= {key: example[key] for key in kept}
        run["signals"] = [example[key] for key in SIGNALS]
        runs.append(run)
    return {
        "images": [[image["height"], image["width"], image["block"]] for image in images],
        "runs": runs,
    }
