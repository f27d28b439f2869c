"""report.py: the page is whole, small and inert whatever the run's files hold; it shows what it is
for at the top; several runs compare; train.py keeps it fresh; a browser shows it."""

import base64
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch
import yaml
from browser import CHROMIUM, Browser
from conftest import TEMPLATE, picture

import config as config_module
import run_folder
import toy
import train
from config import load_config
from data import Sample, encode_prompt
from model import Policy, save_policy
from rollout import generate
from tools import examples as examples_module
from tools import report
from tools.read_run import ReportError, read_metrics
from tools.token_view import choose_pairs, first_token

HOSTILE = (
    '</script><script>document.title="owned"</script>'
    "<img src=x onerror=\"document.title='owned'\">' \" & <!-- ]]> {{data}} "
    "\u2028\u2029\x00\x1b\x7f\u202e \ud800 \udfff &lt;b&gt; 🙂"
)
SETTINGS = load_config(overrides=["rollout.max_new_tokens=12", f"data.prompt_template={TEMPLATE}"])
SAMPLES = [
    Sample("large", (picture(560, 420, 0),), "<image>Sum circle.", "3"),
    Sample("none", (), "Sum circle, square.", "5"),
    Sample(
        "two", (picture(56, 84, 1), picture(140, 56, 2)), "<image>Sum cross.<image>And circle.", "7"
    ),
    Sample("small", (picture(84, 84, 3),), "<image>Sum cross.", "4"),
]
START = {
    "step": 0,
    "date": "2026-03-01T10:00:00+00:00",
    "command": "train.py config.yaml run.dir=<b>x</b>",
    "device": "NVIDIA Test",
    "dtype": "bfloat16",
    "processes": 8,
    "python": "3.11.9",
    "torch": "2.9.1",
    "transformers": "4.57.0",
    "commit": "abc1234+changes",
}


# ------------------------------------------------------------------------------ a run's folder


@pytest.fixture(scope="session")
def recorded(tokenizer, image_processor):
    """Examples as train.py writes them, of three random policies, as JSON."""
    texts = []
    for seed in range(3):
        model = toy.build_model(tokenizer, layers=2, seed=seed)
        policy = Policy(model, tokenizer, image_processor)
        texts.append(json.dumps(examples_module.make_examples(policy, SAMPLES, SETTINGS)))
    return texts


@pytest.fixture
def examples(recorded):
    """examples(seed) -> a fresh copy of one policy's examples."""

    def load(seed: int = 0) -> list[dict]:
        return json.loads(recorded[seed])

    return load


def metrics() -> list[dict]:
    """Rows of metrics.jsonl: thirty steps with an evaluation at the first and at the last."""
    rows = [{"step": 0, "eval/accuracy": 0.25, "eval/accuracy_greedy": 0.5}]
    for step in range(1, 31):
        rows.append(
            {
                "step": step,
                "reward/mean": 1 + step / 40,
                "reward/accuracy": step / 40,
                "dyco/alignment": 0.6,
                "dyco/visual_share": 0.2,
                "dyco/text_share": 0.7,
                "dyco/neutral_share": 0.1,
                "policy/grad_norm": 1e-7 * step,
                "time/rollout": 0.5,
            }
        )
    rows[9] |= {"policy/skipped_updates": 1.0, "policy/skipped_prompts": ["7"]}
    rows[30] |= {"eval/accuracy": 0.75, "eval/accuracy_greedy": 0.75}
    return rows


def write_rows(path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path, examples):
    """A run's folder with three evaluations that left examples."""
    write_rows(tmp_path / "metrics.jsonl", metrics())
    (tmp_path / "config.yaml").write_text(SETTINGS.to_yaml())
    for step, seed in ((0, 0), (10, 2), (30, 1)):
        shown = examples(seed)
        shown[0]["correct"] = step > 0
        run_folder.save_examples(tmp_path, step, shown)
    return tmp_path


class Page(HTMLParser):
    """A page's ids, classes, addresses and texts, and what is wrong: elements that are not closed
    in order, and attributes that run a script."""

    VOID = {"meta", "link", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.classes: list[str] = []
        self.feed(text)
        self.close()

    @property
    def shown(self) -> str:
        return " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.classes += (attributes.get("class") or "").split()
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]
        self.wrong += [key for key in attributes if key.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def checked(path) -> tuple[str, Page]:
    """A page's text and elements, after what must hold for any page."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == page.wrong == []
    assert len(set(page.ids)) == len(page.ids)
    assert all(address.startswith("data:") for address in page.addresses)  # nothing is loaded
    without_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"@import|url\(|\bNaN\b|Infinity\b|\bNone\b", without_scripts)
    assert len(text.encode()) < 5_000_000
    return text, page


def written(folder) -> tuple[str, Page]:
    return checked(report.write(folder))


def script_data(text: str) -> str:
    """The JSON that the page's script reads."""
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    return re.search(pattern, text, re.DOTALL)[1]


# ------------------------------------------------------------------------------------- the page


def test_the_page_holds_the_run(run_dir):
    text, page = written(run_dir)
    for expected in (
        "GRPO with DyCo token advantages, rule paper",
        "step 30 of 120",
        "Held-out accuracy",
        "max_new_tokens",
        "Reference answer",
        "Step 0",
        "Step 30",
    ):
        assert expected in page.shown, expected
    assert "Step 10" not in page.shown
    assert page.classes.count("example") == 4
    assert page.classes.count("changed") == 2
    data = json.loads(script_data(text))
    last = json.loads((run_dir / "examples" / "step-00000030.json").read_text())["examples"]
    kept = {example["id"]: example for example in last}
    # It changed to right, so it comes first.
    assert data[0]["runs"][1]["tokens"] == kept["large"]["tokens"]
    for example in data:
        cells = sum(-(-h // block) * -(-w // block) for h, w, block in example["images"])
        for run in example["runs"]:
            count = len(run["tokens"])
            assert len(base64.b64decode(run["heat"])) == cells * count
            assert all(len(values) == count for values in (*run["signals"], run["weights"]))


def test_the_token_view_comes_before_all_but_the_headline(run_dir):
    """Tiles and the held-out curve, tokens, curves, how it was run; the settings come last."""
    write_rows(run_dir / "starts.jsonl", [START])
    text, page = written(run_dir)
    sections = [name for name in page.ids if not re.match(r"data|tab-|example-|t\d", name)]
    assert sections == ["tokens", "training", "signals", "run"]
    order = [
        'class="tiles"',
        "Held-out accuracy</b>",
        'id="tokens"',
        'class="legend"',
        'id="example-0"',
        'id="training"',
        "Entropy" if "policy/entropy" in text else "Gradient norm",
        'id="signals"',
        'id="run"',
        "NVIDIA Test",
        "Settings that differ from config.yaml",
        "The other",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_settings_are_folded_but_for_those_that_differ(run_dir):
    text, page = written(run_dir)
    start = text.index("Settings that differ")
    folded = text.index("<details>", start)
    end = text.index("</details>", folded)
    visible, hidden = text[start:folded], text[folded:end]
    for name, usual in (("rollout.max_new_tokens", "64"), ("data.prompt_template", "{question}")):
        assert name in visible and usual in visible
        assert name not in hidden
    for name in ("run.dir", "rollout.group_size", "dyco.tau"):
        assert name in hidden and name not in visible
    count = sum(len(section) for section in asdict(SETTINGS).values())
    assert f"The other {count - 2} settings: as in config.yaml" in page.shown
    (run_dir / "config.yaml").write_text(load_config(overrides=["run.dir=x"]).to_yaml())
    assert "Every setting is as in config.yaml" in written(run_dir)[1].shown


def test_the_legend_says_what_colours_shades_and_cells_mean(run_dir):
    _, page = written(run_dir)
    for expected in (
        "attention moved more within the image than within the text",
        "It moved more within the text than within the image",
        "differ by at most τ = 0.05 radians",
        "the larger its weight (eq. 7)",
        "A bright cell of the picture is where the model looked",
    ):
        assert expected in page.shown, expected
    assert page.classes.count("legend") == 1


def test_curves_say_what_is_good(run_dir):
    _, page = written(run_dir)
    for expected in ("Higher is better.", "Healthy: no spikes.", "Lower is faster."):
        assert expected in page.shown, expected


def test_the_token_shown_first_can_be_read(examples, run_dir):
    """Of the tokens that show as something, it is the one with the most image mass."""
    tokens = ["\n", " ", "", "a", "\u200b", "b", "\ufffd", "\x00", "c"]
    masses = [0.9, 0.9, 0.9, 0.2, 0.9, 0.7, 0.9, 0.9, 0.3]
    assert first_token({"tokens": tokens, "visual_mass": masses}) == 5
    assert first_token({"tokens": [" ", "\n"], "visual_mass": [0.1, 0.2]}) == 1
    assert first_token({"tokens": [], "visual_mass": []}) is None
    shown = examples(1)
    large = next(example for example in shown if example["id"] == "large")
    count = len(large["tokens"])
    large["tokens"] = [f"t{i}" for i in range(count)]
    large["tokens"][2] = "\n"
    large["visual_mass"] = [0.1] * count
    large["visual_mass"][2], large["visual_mass"][3] = 0.9, 0.8
    large["correct"] = True
    run_folder.save_examples(run_dir, 30, shown)
    data = json.loads(script_data(written(run_dir)[0]))
    assert data[0]["runs"][1]["first"] == 3


def test_examples_take_turns_by_what_became_of_them():
    """One that changed, one that is wrong at last, one that is right throughout, and so on."""

    def evaluation(step: int, right: str) -> tuple[int, list[dict]]:
        return step, [{"id": name, "correct": name in right} for name in "abcdefg"]

    pairs = choose_pairs([evaluation(0, "abc"), evaluation(9, "bcg")], 12)
    assert [pair[-1][1]["id"] for pair in pairs] == ["a", "d", "b", "g", "e", "c", "f"]
    assert [[step for step, _ in pair] for pair in pairs] == [[0, 9]] * 7
    assert len(choose_pairs([evaluation(0, "abc")], 3)) == 3


def test_hostile_text_stays_text(run_dir):
    """In ids, questions, answers, tokens, config values and keys, starts, and the folder's name."""
    folder = run_dir / "a'\"<b onclick=1>&amp;"
    folder.mkdir()
    for name in ("metrics.jsonl", "examples"):
        (run_dir / name).rename(folder / name)
    for path in (folder / "examples").iterdir():
        content = json.loads(path.read_text())
        for example in content["examples"]:
            example["id"] += HOSTILE
            example["question"] = example["answer"] = HOSTILE
            example["tokens"] = [HOSTILE] * len(example["tokens"])
        path.write_text(json.dumps(content))
    tree = asdict(SETTINGS)
    harmless_to_yaml = HOSTILE.replace("\ud800", "").replace("\udfff", "").replace("\x00", "")
    tree["data"]["prompt_template"] = tree["model"]["path"] = harmless_to_yaml
    tree["<i>"] = {"<u onload=1>": ["</td>", {"<s>": "</script>"}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    write_rows(folder / "starts.jsonl", [START | {"command": HOSTILE, HOSTILE: HOSTILE}])
    text, page = written(folder)
    assert text.count("<script") == 2
    assert not re.search(r"<\w+ on", text)
    assert "\x00" not in text
    joined = "".join(page.texts)
    for expected in (
        '</script><script>document.title="owned"</script>',
        "&lt;b&gt; 🙂",
        "␀␛",
        "{{data}}",
    ):
        assert expected in joined, expected
    block = script_data(text)
    assert block.isascii() and "<" not in block
    assert json.loads(block)[0]["runs"][0]["tokens"][0] == HOSTILE
    other = run_dir / "<b onclick=1>"
    other.mkdir()
    write_rows(other / "metrics.jsonl", metrics())
    text, page = checked(report.compare([folder, other], run_dir / "comparison.html"))
    assert text.count("<script") == 2
    assert not re.search(r"<\w+ on", text)
    assert "<b onclick=1>" in page.shown


def test_large_runs_stay_under_the_limit(run_dir, examples):
    """Twelve long responses about large photographs: heat-maps get coarser and examples fewer, and
    the page is still whole."""
    large = examples()[0]
    tokens = examples_module.EXAMPLE_TOKENS
    long = {}
    for key, value in large.items():
        repeated = isinstance(value, list) and key != "images"
        long[key] = (value * tokens)[:tokens] if repeated else value
    cells = len(base64.b64decode(large["heat"])) // len(large["tokens"])
    long["heat"] = examples_module.encode_heat(torch.rand(tokens, cells))
    long["length"] = 9000
    noise = examples_module.picture(picture(900, 700, 5))
    assert 10_000 < len(noise) < 600_000
    long["images"] = [large["images"][0] | {"file": noise}]
    for step in (0, 30):
        run_folder.save_examples(run_dir, step, [long | {"id": str(i)} for i in range(12)])
    text, page = written(run_dir)
    assert len(text) > 2_000_000
    assert page.classes.count("example") >= 3
    assert "8488 more tokens" in "".join(page.texts)


def test_a_run_without_dyco_shows_tokens_all_the_same(run_dir):
    rows = []
    for row in metrics():
        rows.append({key: value for key, value in row.items() if not key.startswith("dyco/")})
    write_rows(run_dir / "metrics.jsonl", rows)
    (run_dir / "config.yaml").write_text(load_config(overrides=["dyco.enabled=false"]).to_yaml())
    _, page = written(run_dir)
    assert "GRPO alone, without DyCo" in page.shown
    assert "did not read attention while training" in page.shown
    assert page.classes.count("example") == 4


@pytest.mark.parametrize("keep", [1, 2, 31])
def test_a_young_run_has_a_report(run_dir, keep):
    """After the first evaluation there is one row, one column of examples, and curves of one point;
    later only more."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:keep]) + '{"step": 99, "half')
    for path in sorted((run_dir / "examples").iterdir())[1:]:
        path.unlink()
    _, page = written(run_dir)
    assert page.classes.count("response") == page.classes.count("example") == 4
    for path in [*(run_dir / "examples").iterdir(), run_dir / "config.yaml"]:
        path.unlink()
    assert "has left examples" in "".join(written(run_dir)[1].texts)


def test_a_response_without_tokens_has_its_place(run_dir, examples):
    shown = examples(1)
    for example in shown:
        for key, value in example.items():
            if isinstance(value, list) and key != "images":
                example[key] = []
        example["heat"] = ""
        example["length"] = 0
    run_folder.save_examples(run_dir, 30, shown)
    data = json.loads(script_data(written(run_dir)[0]))
    assert [example["runs"][1]["first"] for example in data] == [None] * 4


# ----------------------------------------------------------------------------------- its starts


def test_the_newest_start_is_shown(run_dir):
    newest = START | {"step": 20, "date": "2026-03-02T11:00:00+00:00", "commit": None}
    write_rows(run_dir / "starts.jsonl", [START, newest])
    with open(run_dir / "starts.jsonl", "a") as file:
        file.write('{"step": 25, "da')  # cut short
    text, page = written(run_dir)
    for expected in (
        "2 times, at steps 0, 20",
        "2026-03-02T11:00:00+00:00",
        "train.py config.yaml run.dir=<b>x</b>",
        "NVIDIA Test",
        "bfloat16",
        "3.11.9",
        "2.9.1",
        "4.57.0",
    ):
        assert expected in page.shown, expected
    assert START["date"] not in page.shown
    assert '<th scope="row">commit</th><td>–</td>' in text
    write_rows(run_dir / "starts.jsonl", [START])
    assert "abc1234+changes" in written(run_dir)[1].shown


def test_an_older_run_has_no_starts(run_dir):
    assert "holds no starts.jsonl" in written(run_dir)[1].shown


# ------------------------------------------------------------------------------ its analysis


def roles_file() -> dict:
    """roles.json as tools/roles.py writes it, with hostile strings and undefined estimates."""
    undefined = [None, None, None]
    row = {"correct": [0.35, 0.3, 0.4], "incorrect": [0.3, 0.2, 0.4], "difference": undefined}
    names = ["visual tokens, %", "alignment of visual tokens"]
    names += [f"alignment at {10 * i}–{10 * i + 10} % of the response" for i in range(10)]
    statistics = {name: row for name in names}
    statistics[names[-1]] = {part: undefined for part in row}
    counts = {"counts": [20, 0, 3] + [0] * 29, "quantiles": {"10": 0.0, "50": 0.0, "90": 0.2}}
    histograms = {"correct": counts, "incorrect": {"counts": [0] * 32, "quantiles": {}}}
    string = {"token": "</b>7", "share": 0.8, "occurrences": 24}
    return {
        "model": "<m>",
        "data": "d",
        "counts": {
            "correct": {"responses": 6, "prompts": 5},
            "incorrect": {"responses": 7, "prompts": 4},
        },
        "statistics": statistics,
        "shifts": {"visual_shift": histograms, "text_shift": histograms},
        "strings": {"visual": [string], "text": [string, string]},
    }


def intervention_file() -> dict:
    """intervene.json as tools/intervene.py writes it."""
    arms = []
    for name in ("role tokens", "random tokens", "other modality"):
        for factor in (0.0, 1.0, 2.0):
            arms.append(
                {
                    "role": "visual",
                    "arm": name,
                    "factor": factor,
                    "accuracy": [0.5, 0.25, 0.75],
                    "change": [0.0, -0.1, 0.1],
                    "against random": [0.0, None, None],
                    "alignment": [0.35, 0.3, 0.4],
                    "touched": 1.0,
                    "capped": 0.1,
                }
            )
    return {"settings": {"model": "<m>", "data": "d"}, "arms": arms}


def test_what_an_analysis_left_is_on_the_page(run_dir):
    folder = run_dir / "analysis"
    folder.mkdir()
    (folder / "roles.json").write_text(json.dumps(roles_file()))
    (folder / "intervene.json").write_text(json.dumps(intervention_file()))
    _, page = written(run_dir)
    for expected in (
        "Right and wrong responses",
        "Interventions",
        "alignment of visual tokens",
        "other modality",
        "6 responses to 5 prompts were right, 7 to 4 wrong",
        "</b>7",
    ):
        assert expected in page.shown, expected
    (folder / "roles.json").write_text('{"model": 3}')
    with pytest.raises(ReportError, match="roles.json: not as train.py or a tool writes it"):
        report.write(run_dir)


# --------------------------------------------------------------------------------- several runs


@pytest.fixture
def two_runs(tmp_path):
    """Two folders whose configs differ in three settings and run.dir."""
    folders = []
    for name, changes in (("left", ["algo.name=gspo"]), ("right", ["train.seed=3"])):
        folder = tmp_path / name
        folder.mkdir()
        config = load_config(overrides=[*changes, f"run.dir={folder}"])
        (folder / "config.yaml").write_text(config.to_yaml())
        write_rows(folder / "metrics.jsonl", metrics())
        folders.append(folder)
    return folders


def test_runs_lie_over_one_another(two_runs, tmp_path):
    """A table of what differs, then each curve with a line per run, under their folders' names."""
    text, page = checked(report.compare(two_runs, tmp_path / "page.html"))
    table = text[text.index('id="differences"') : text.index('id="training"')]
    for expected in ("algo.name", "gspo", "algo.clip_low", "train.seed", ">left<", ">right<"):
        assert expected in table, expected
    for absent in ("run.dir", "algo.scale", "dyco.tau"):
        assert absent not in table, absent
    charts = re.findall(r"data-chart=\"([^\"]*)\"", text)
    assert len(charts) == page.shown.count("Figures") == 11
    for chart in charts:
        assert len(json.loads(chart.replace("&quot;", '"'))["lines"]) == 2
    for expected in ("Held-out accuracy: greedy", "Held-out accuracy: sampled", "Roles: text"):
        assert expected in page.shown, expected
    for place in (0, 1):
        assert f"var(--run-{place})" in text
    assert "var(--run-2)" not in text
    assert page.classes.count("example") == 0


def test_runs_of_one_name_are_told_apart(two_runs, tmp_path):
    deeper = tmp_path / "deeper" / "left"
    deeper.parent.mkdir()
    two_runs[1].rename(deeper)
    (deeper / "config.yaml").unlink()
    _, page = checked(report.compare([two_runs[0], deeper], tmp_path / "page.html"))
    assert str(two_runs[0]) in page.shown and str(deeper) in page.shown
    assert f"{deeper} holds no config.yaml" in page.shown
    with pytest.raises(ReportError, match="given twice; expected different folders"):
        report.compare([two_runs[0], two_runs[0]], tmp_path / "page.html")


# --------------------------------------------------------------------------------- command line


def test_the_command_writes_the_page_and_prints_its_path(run_dir, two_runs, capsys, monkeypatch):
    report.main([str(run_dir)])
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    assert (run_dir / "report.html").exists()
    folders = [str(folder) for folder in two_runs]
    report.main([*folders, "--out", str(run_dir / "seeds.html")])
    assert capsys.readouterr().out == f"{run_dir / 'seeds.html'}\n"
    assert (run_dir / "seeds.html").exists()
    monkeypatch.chdir(run_dir)
    report.main(folders)
    assert capsys.readouterr().out == "comparison.html\n"
    assert (run_dir / "comparison.html").exists()
    assert not (two_runs[0] / "report.html").exists()


def test_what_cannot_be_compared_is_one_clear_error(two_runs, tmp_path, capsys):
    left, right = map(str, two_runs)
    for arguments, message in (
        ([left, str(tmp_path)], f"{tmp_path}: no metrics.jsonl; expected the folder of a train.py"),
        ([left, right, "--out", str(tmp_path)], "--out: expected a file in a folder that exists"),
        ([left, right, "--out", f"{tmp_path}/no/x.html"], "--out: expected a file in a folder"),
        ([left, "--out", "x.html"], "--out is for several runs"),
        ([left] * 9, "expected at most 8 runs to compare, found 9"),
    ):
        with pytest.raises(SystemExit) as caught:
            report.main(arguments)
        (error,) = str(caught.value).splitlines()
        assert message in error
        assert error.startswith("error: ")


def without(key: str) -> str:
    return json.dumps({name: value for name, value in START.items() if name != key}) + "\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.jsonl", None, "no metrics.jsonl; expected the folder of a train.py run"),
        ("metrics.jsonl", "", "no whole row yet"),
        ("metrics.jsonl", "{}\n", "line 1: step is None"),
        ("metrics.jsonl", '{"step": 1, "a": "<b>"}\n', "line 1: a is '<b>'; expected a number"),
        ("metrics.jsonl", '{"step": 1}\nx\n', "line 2:"),
        ("metrics.jsonl", '{"step": 1, "a": NaN}\n', "line 1: a is nan"),
        ("config.yaml", "a: [", "config.yaml: not as"),
        ("config.yaml", "3", "config.yaml: not as"),
        (
            "examples/step-00000030.json",
            '{"step": 30, "examples": [{}]}',
            "step-00000030.json: not as",
        ),
        ("examples/step-00000030.json", "", "step-00000030.json: not as"),
        ("starts.jsonl", "x\n", "starts.jsonl, line 1:"),
        ("starts.jsonl", json.dumps(START) + "\n[]\n", "starts.jsonl, line 2: found []"),
        ("starts.jsonl", without("commit"), "starts.jsonl, line 1: no commit; expected a start"),
        (
            "starts.jsonl",
            json.dumps(START | {"step": "1"}) + "\n",
            "starts.jsonl, line 1: step is '1'; expected a whole number",
        ),
        (
            "starts.jsonl",
            json.dumps(START | {"device": ["a"]}) + "\n",
            "starts.jsonl, line 1: device is ['a']; expected text or a number",
        ),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(run_dir, capsys, name, content, message):
    if content is None:
        (run_dir / name).unlink()
    else:
        (run_dir / name).write_text(content)
    with pytest.raises(SystemExit) as caught:
        report.main([str(run_dir)])
    (error,) = str(caught.value).splitlines()
    assert message in error
    assert error.startswith("error: ")
    assert str(run_dir) in error
    assert not (run_dir / "report.html").exists()
    with pytest.raises(ReportError):
        report.write(run_dir)


def changed(tree, path: tuple, value):
    """A copy of JSON content with another value at a path; without the key where value is DEL."""
    if not path:
        return value
    first, *rest = path
    copy = tree.copy()
    if value is DEL and not rest:
        del copy[first]
    else:
        copy[first] = changed(tree[first], tuple(rest), value)
    return copy


DEL = object()
OF_AN_EXAMPLE = {
    "id": [None, 7, ["a"], DEL],
    "correct": [None, "yes", DEL],
    "length": ["3", 2.5, math.nan],
    "tokens": [None, "abc", [1], [], {}],
    "roles": [[2], ["v"], [[]], None],
    "weights": [[], None, [math.nan] * 12, [True] * 12, ["1"] * 12, 3],
    "visual_mass": [[math.inf], {}, DEL],
    "peaks": [[], [None] * 12],
    "heat": ["", "x", "AAAA", None, 10**400],
    "images": [None, [], [{}], [3], {"file": "x"}],
}
OF_AN_IMAGE = {
    "file": ["https://example.invalid/x.png", None, DEL],
    "block": [0, -1, 1.5, True, 10**400, 2**70],
    "height": [0, "9", 10**120, None],
}


def test_every_damage_to_the_examples_is_one_clear_error(run_dir):
    """A wrong type, a missing key, a list of another length, a figure that is not finite."""
    path = run_dir / "examples" / "step-00000030.json"
    content = json.loads(path.read_text())
    first = ("examples", 0)
    damages = [((), value) for value in (None, [], 3, {}, "x", math.nan)]
    damages += [(("step",), value) for value in (None, "30", 1.5, True, math.inf, DEL)]
    damages += [(("examples",), value) for value in (None, 3, ["x"], [None], {"a": 1}, DEL)]
    for key, values in OF_AN_EXAMPLE.items():
        damages += [((*first, key), value) for value in values]
    for key, values in OF_AN_IMAGE.items():
        damages += [((*first, "images", 0, key), value) for value in values]
    for place, value in damages:
        path.write_text(json.dumps(changed(content, place, value)))
        refused(run_dir, path)


def refused(run_dir, path) -> None:
    """The report is one line that names the file."""
    with pytest.raises(ReportError) as caught:
        report.write(run_dir)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["examples/step-00000030.json", "config.yaml", "starts.jsonl"])
def test_bytes_that_are_no_text_are_one_clear_error(run_dir, name):
    write_rows(run_dir / "starts.jsonl", [START])
    path = run_dir / name
    whole = path.read_bytes()
    for content in (b"\xff\n", b"{\x00}\n", b"[" * 3000 + b"\n", b"9" * 5000 + b"\n"):
        path.write_bytes(content)
        refused(run_dir, path)
    if name != "starts.jsonl":  # of which the last line may be half-written
        path.write_bytes(whole[: len(whole) // 2] + b": [")
        refused(run_dir, path)


@pytest.mark.parametrize("content", ["dyco: 3", "algo: [1]", "a: &a {b: *a}", "? [1, 2]\n: 3", "x"])
def test_a_config_without_sections_is_one_clear_error(run_dir, content):
    (run_dir / "config.yaml").write_text(content)
    refused(run_dir, run_dir / "config.yaml")


@pytest.mark.parametrize("figure", ["1e999", "-1e101", "1" + "0" * 400, "Infinity", "true"])
def test_a_figure_that_no_curve_can_show_is_one_clear_error(run_dir, figure):
    (run_dir / "metrics.jsonl").write_text(f'{{"step": 1, "a": {figure}}}\n')
    refused(run_dir, run_dir / "metrics.jsonl")


@pytest.mark.parametrize("name", ["roles.json", "intervene.json"])
def test_a_damaged_analysis_is_one_clear_error(run_dir, name):
    (run_dir / "analysis").mkdir()
    path = run_dir / "analysis" / name
    whole = json.dumps(roles_file() if name == "roles.json" else intervention_file())
    for content in ("", "[]", "null", whole[:-9], whole.replace("0.35", "NaN"), '{"arms": 1e999}'):
        path.write_text(content)
        refused(run_dir, path)


def test_tiny_and_huge_figures_have_their_curves(run_dir):
    figures = [5e-324, 1e-310, -1e100, 1e100, 0]
    rows = [{"step": step, "policy/entropy": value} for step, value in enumerate(figures)]
    for count in (1, 2, 5):
        write_rows(run_dir / "metrics.jsonl", rows[:count])
        assert "Entropy" in written(run_dir)[1].shown


def test_a_reward_of_ones_own_has_its_curve(run_dir, two_runs, tmp_path):
    """Only where the run has one."""
    assert "Your own reward" not in written(run_dir)[1].shown
    rows = [row | {"reward/custom": 0.5} for row in metrics()]
    write_rows(run_dir / "metrics.jsonl", rows)
    assert "Your own reward" in written(run_dir)[1].shown
    write_rows(two_runs[0] / "metrics.jsonl", rows)
    _, page = checked(report.compare(two_runs, tmp_path / "page.html"))
    assert "Your own reward" in page.shown


# ------------------------------------------------------------------------------------- examples


def heat_of(example: dict) -> torch.Tensor:
    """An example's heat-maps, [tokens, cells] in 0 … 255."""
    heat = torch.frombuffer(bytearray(base64.b64decode(example["heat"])), dtype=torch.uint8)
    return heat.float().view(len(example["tokens"]), -1)


def test_heat_maps_keep_the_mass(examples):
    """Cells sum visual tokens; two images share the budget; the brightest cell of a row is 255."""
    attention = torch.rand(7, 30 * 41 + 5 * 3)
    places, heat = examples_module.heat_maps(attention, [[30, 41], [5, 3]])
    assert places == [
        {"height": 30, "width": 41, "block": 3},
        {"height": 5, "width": 3, "block": 3},
    ]
    assert heat.shape == (7, 10 * 14 + 2)
    torch.testing.assert_close(heat.sum(1), attention.sum(1))
    first_image = attention[:, : 30 * 41].view(7, 30, 41)
    torch.testing.assert_close(heat[:, 15], first_image[:, 3:6, 3:6].sum((1, 2)))
    encoded = {"heat": examples_module.encode_heat(heat), "tokens": [""] * 7}
    levels = heat_of(encoded)
    assert levels.amax(1).eq(255).all()
    # Rounding to a level moves a cell by half a level at most.
    assert (levels / 255 - heat / heat.amax(1, keepdim=True)).abs().max() <= 0.51 / 255
    assert examples_module.heat_maps(torch.zeros(4, 0), [])[1].shape == (4, 0)
    assert examples_module.heat_maps(torch.rand(1, 18), [[9, 2]], 1)[1].shape == (1, 1)
    large = examples()[0]
    coarse = examples_module.coarsen(large, 64)
    assert coarse["images"][0]["block"] == 2 * large["images"][0]["block"]
    assert heat_of(coarse).shape[1] <= 64


def test_examples_hold_the_rollouts_own_signals(make_policy, examples):
    """The packed forward's signals of the response that the held-out evaluation samples, with the
    mass on the picture in its heat-map."""
    policy = make_policy()
    for place, (example, sample) in enumerate(zip(examples(), SAMPLES, strict=True)):
        prompt = encode_prompt(sample, place, policy.tokenizer, policy.image_processor, TEMPLATE)
        rollout = generate(
            policy,
            [prompt],
            group_size=1,
            max_new_tokens=12,
            key=(0, "held out"),
            capture=SETTINGS.dyco,
        )
        mask = rollout.mask[0]
        ids = rollout.tokens[0][mask].tolist()
        assert example["tokens"] == [policy.tokenizer.decode(token) for token in ids]
        for name, values in rollout.signals._asdict().items():
            assert example[name] == pytest.approx(values[0][mask].tolist(), abs=2e-4)
        assert bool(example["heat"]) == bool(sample.images)
        if sample.images:
            heat = heat_of(example) / 255 * torch.tensor(example["peaks"])[:, None]
            # Each cell is off by half a grey level at most, and each number by its rounding.
            tolerance = heat.shape[1] * max(example["peaks"]) / 510 + 1e-3
            assert heat.sum(1).tolist() == pytest.approx(example["visual_mass"], abs=tolerance)
            assert len(heat) == len(example["tokens"])
        assert sum(example["weights"]) == pytest.approx(len(example["weights"]), rel=1e-3)


# ---------------------------------------------------------------------------------- in training


@pytest.fixture
def start(make_policy, tmp_path):
    """start(*overrides) trains a tiny policy for two steps and returns the run's folder."""
    save_policy(make_policy(seed=1), tmp_path / "model")

    def run(*overrides):
        train.main(
            [
                str(config_module.DEFAULTS),
                f"run.dir={tmp_path / 'run'}",
                f"model.path={tmp_path / 'model'}",
                "rollout.prompts_per_step=2",
                "rollout.group_size=2",
                "rollout.max_new_tokens=8",
                "train.steps=2",
                "eval.samples=3",
                "eval.every=1",
                *overrides,
            ]
        )
        return tmp_path / "run"

    return run


def test_training_writes_and_refreshes_the_report(start, monkeypatch):
    rows_seen = []
    plain_write = report.write

    def write(folder):
        rows_seen.append(len(read_metrics(folder / "metrics.jsonl")))
        return plain_write(folder)

    monkeypatch.setattr(report, "write", write)
    folder = start()
    assert rows_seen == [1, 2, 3]
    names = [path.name for path in sorted((folder / "examples").iterdir())]
    assert names == [f"step-0000000{i}.json" for i in range(3)]
    _, page = written(folder)
    assert "Step 2" in "".join(page.texts)
    assert page.classes.count("example") == examples_module.EXAMPLES


@pytest.mark.parametrize(
    "rows, least, frames",
    [
        ('{"question": "Sum circle.", "answer": "4"}\n' * 3, 1, 0),
        (
            '{"question": "<image>Is it <image>?", "images": ["a.png", "a.png"], "answer": "4"}\n',
            1,
            2,
        ),
    ],
)
def test_without_held_out_rows_the_training_rows_are_shown(start, tmp_path, rows, least, frames):
    """Text alone, and several images, without data.eval_path and without DyCo."""
    picture(84, 56, 0).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(rows)
    folder = start(f"data.path={tmp_path / 'rows.jsonl'}", "dyco.enabled=false")
    _, page = written(folder)
    count = page.classes.count("example")
    assert count == 1 if frames else count >= least
    assert page.classes.count("frame") == frames


@pytest.mark.parametrize("module, broken", [(report, "write"), (examples_module, "make_examples")])
def test_a_report_that_fails_stops_no_run_and_says_so(start, monkeypatch, capsys, module, broken):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, broken, fail)
    folder = start()
    out = capsys.readouterr().out
    assert out.count("warning: no report at step") == 3
    assert "OSError: disk full" in out
    assert (folder / "final").exists()


# --------------------------------------------------------------------------------- in a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")

CANVAS = (
    "JSON.stringify([...document.querySelector('#example-0 canvas').getContext('2d')"
    ".getImageData(0, 0, 99, 99).data])"
)
READOUT = "document.querySelector('#example-0 .readout').innerText"
FITS = "document.documentElement.scrollWidth <= innerWidth"


@pytest.fixture
def hostile_page(run_dir):
    """A page whose questions and second tokens are hostile."""
    for path in (run_dir / "examples").iterdir():
        content = json.loads(path.read_text())
        for example in content["examples"]:
            example["question"] = "<image>" + HOSTILE
            example["tokens"][1] = HOSTILE
        path.write_text(json.dumps(content))
    written(run_dir)
    return run_dir / "report.html"


@needs_chromium
def test_in_a_browser(hostile_page, tmp_path):
    """Opens without a problem and without a request; pointing, tapping and arrow keys show a
    token's heat-map and signals."""
    title = f"{hostile_page.parent.name} · DyCo-RL"
    with Browser(tmp_path / "profile") as browser:
        check_colour_schemes(browser, hostile_page)
        assert browser.run("document.title") == title
        assert browser.run("document.scripts.length") == 2
        assert browser.run("document.querySelectorAll('img').length") > 0
        question = browser.run("document.querySelector('.question').innerText")
        assert 'onerror="document.title' in question
        check_pointing_at_tokens(browser)
        check_keyboard(browser)
        check_picker(browser)
        browser.point("[data-chart]")
        output = browser.run("document.querySelector('.chart output').innerText")
        assert re.match(r"step \d+: ", output)
        check_touch(browser)
        answer = "fetch('https://example.invalid/').then(() => 'loaded', () => 'refused')"
        assert browser.run(answer) == "refused"
        refused = [p for p in browser.problems if "Content Security Policy" in json.dumps(p)]
        assert browser.problems == refused  # the only problem is the one made just now
        assert len(refused) >= 1
        assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
        assert sum(url.startswith("file") for url in browser.requests) == 2
        assert browser.run("document.title") == title


def brightness(browser, property_name: str) -> int:
    color = browser.run(f"getComputedStyle(document.body).{property_name}")
    return sum(int(number) for number in re.findall(r"\d+", color))


def check_colour_schemes(browser, page) -> None:
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.call("Emulation.setEmulatedMedia", features=[feature])
        browser.open(page)
        assert browser.run(FITS)
        ink_is_brighter = brightness(browser, "color") > brightness(browser, "backgroundColor")
        assert ink_is_brighter == (scheme == "dark")


def check_pointing_at_tokens(browser) -> None:
    browser.point("#t0-1-2")
    first, said = browser.run(CANVAS), browser.run(READOUT)
    for expected in ("token 3 of", "step 30", "image mass", "text shift"):
        assert expected in said, expected
    browser.point("#t0-0-3")
    assert "token 4 of" in browser.run(READOUT)
    assert browser.run(CANVAS) != first
    browser.point("#t0-0-1")
    assert HOSTILE[:30] in browser.run(READOUT)
    elements = "document.querySelectorAll('.readout script, .readout img').length"
    assert browser.run(elements) == 0
    browser.point("#t0-1-2", click=True)
    browser.point("h1")  # away: the pinned token is shown again
    assert browser.run(CANVAS) == first
    assert browser.run(READOUT) == said


def check_keyboard(browser) -> None:
    browser.run("document.querySelector('#example-0 .tokens[data-run=\"1\"]').focus()")
    browser.key("ArrowRight")
    assert "token 4 of" in browser.run(READOUT)
    active = browser.run("document.activeElement.getAttribute('aria-activedescendant')")
    assert active == "t0-1-3"
    browser.key("Home")
    assert "token 1 of" in browser.run(READOUT)


def check_picker(browser) -> None:
    browser.run("document.querySelector('#tab-0').focus()")
    browser.key("ArrowRight")
    assert browser.run("document.querySelector('#example-0').hidden")
    assert not browser.run("document.querySelector('#example-1').hidden")
    browser.point("#tab-2", click=True)
    assert not browser.run("document.querySelector('#example-2').hidden")
    assert browser.run("document.activeElement.id") == "tab-2"


def check_touch(browser) -> None:
    browser.resize(390, 800, mobile=True)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y = browser.centre("#t2-1-5")
    touch = [{"x": x, "y": y}]
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=touch)
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.run("new Promise(done => setTimeout(done, 400))")  # a tap is not an instant
    said = browser.run("document.querySelector('#example-2 .readout').innerText")
    assert "token 6 of" in said
    assert browser.run(FITS)


# The labels of charts that reach beyond the window, or beyond the card of their chart by more than
# the page's margin. The SVG scales with its card, so its own coordinates do not say that.
CLIPPED = """[...document.querySelectorAll('svg text')].filter(text => {
  const label = text.getBoundingClientRect(), card = text.closest('figure').getBoundingClientRect();
  return label.left < card.left - 1 || label.right > card.right + 1;
}).map(text => text.textContent)"""
PLACES = """JSON.stringify([...document.querySelectorAll('section, figure, svg, h2, .chart output')]
  .map(element => { const box = element.getBoundingClientRect();
                    return [box.left, box.top + scrollY, box.width, box.height].map(Math.round); }))
"""


@needs_chromium
def test_nothing_is_clipped_and_nothing_moves(run_dir, two_runs, tmp_path):
    """At every width the labels of charts lie inside their card and the page fits the window;
    reading a chart moves nothing."""
    (run_dir / "analysis").mkdir()
    (run_dir / "analysis" / "roles.json").write_text(json.dumps(roles_file()))
    (run_dir / "analysis" / "intervene.json").write_text(json.dumps(intervention_file()))
    write_rows(run_dir / "starts.jsonl", [START])
    rows = metrics()
    for row in rows[1:]:
        row |= {"policy/clip_fraction": 0.1, "policy/ratio_deviation": 0.1}
    write_rows(run_dir / "metrics.jsonl", rows)
    pages = [report.write(run_dir), report.compare(two_runs, tmp_path / "page.html")]
    with Browser(tmp_path / "profile") as browser:
        for page in pages:
            for width in (360, 380, 600, 768, 1024, 1280, 1600):
                browser.resize(width, 800)
                browser.open(page)
                browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
                assert browser.run(FITS), width
                assert browser.run(CLIPPED) == [], width
            for width in (380, 1280):
                browser.resize(width, 800)
                browser.open(page)
                before = browser.run(PLACES)
                for number in range(browser.run("document.querySelectorAll('svg').length")):
                    browser.run(f"document.querySelectorAll('svg')[{number}].id = 'pointed'")
                    browser.point("#pointed")
                    assert browser.run(PLACES) == before, (page.name, width, number)
                    browser.run("document.querySelector('#pointed').removeAttribute('id')")
        assert browser.problems == []


@needs_chromium
def test_the_first_token_shown_is_marked(run_dir, tmp_path):
    """The token that the page begins with is the one that the data names."""
    text, _ = written(run_dir)
    data = json.loads(script_data(text))
    with Browser(tmp_path / "profile") as browser:
        browser.open(run_dir / "report.html")
        for number, example in enumerate(data):
            selected = browser.run(
                f"document.querySelector('#example-{number} [aria-selected=true]').id"
            )
            assert selected == f"t{number}-1-{example['runs'][1]['first']}"
