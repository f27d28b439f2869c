"""report.py: the page is whole, small and inert whatever the run's files hold; train.py keeps it fresh; a browser shows it."""

import base64
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch
import yaml
from browser import CHROMIUM, Browser
from conftest import TEMPLATE, picture
from observations import observed

import config as config_module
import run_folder
import toy
import train
from config import load_config
from data import Sample, encode_prompt
from model import Policy, save_policy
from rollout import generate
from tools import intervene, report, roles

HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">\' " & <!-- ]]> {{data}} '
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


@pytest.fixture(scope="session")
def recorded(tokenizer, image_processor):
    """Examples as train.py writes them, of three random policies, as JSON."""
    policies = [
        Policy(toy.build_model(tokenizer, layers=2, seed=seed), tokenizer, image_processor)
        for seed in range(3)
    ]
    return [json.dumps(report.make_examples(policy, SAMPLES, SETTINGS)) for policy in policies]


@pytest.fixture
def examples(recorded):
    return lambda seed=0: json.loads(recorded[seed])


@pytest.fixture
def run_dir(tmp_path, examples):
    """A run's folder with two evaluations."""
    rows = [{"step": 0, "eval/accuracy": 0.25, "eval/accuracy_greedy": 0.5}]
    rows += [
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
        for step in range(1, 31)
    ]
    rows[9] |= {"policy/skipped_updates": 1.0, "policy/skipped_prompts": ["7"]}
    rows[30] |= {"eval/accuracy": 0.75, "eval/accuracy_greedy": 0.75}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(SETTINGS.to_yaml())
    for step, seed in ((0, 0), (10, 2), (30, 1)):
        found = examples(seed)
        found[0]["correct"] = step > 0
        run_folder.save_examples(tmp_path, step, found)
    return tmp_path


class Page(HTMLParser):
    """Elements, ids and addresses of a page; unclosed and wrongly closed elements are noted."""

    VOID = {"meta", "link", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wrong, self.ids, self.addresses, self.texts, self.classes = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes[k] for k in attributes if k == "id"]
        self.classes += (attributes.get("class") or "").split()
        self.addresses += [attributes[k] for k in ("src", "href") if k in attributes]
        self.wrong += [k for k in attributes if k.startswith("on")]
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


def written(folder) -> tuple[str, Page]:
    text = report.write(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == page.wrong == [] and len(set(page.ids)) == len(page.ids)
    assert all(address.startswith("data:") for address in page.addresses)  # nothing is loaded
    assert not re.search(
        r"@import|url\(|\bNaN\b|Infinity\b|\bNone\b",
        re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL),
    )
    assert len(text.encode()) < 5_000_000
    return text, page


# ------------------------------------------------------------------------------------------------------- the page


def test_the_page_holds_the_run(run_dir):
    text, page = written(run_dir)
    shown = " ".join(page.texts)
    for expected in (
        "GRPO with DyCo token advantages, rule paper",
        "step 30 of 120",
        "Held-out accuracy",
        "max_new_tokens",
        "Reference answer",
        "Step 0",
        "Step 30",
    ):
        assert expected in shown, expected
    assert (
        "Step 10" not in shown
        and page.classes.count("example") == 4
        and page.classes.count("changed") == 2
    )
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )
    kept = {
        e["id"]: e
        for e in json.loads((run_dir / "examples" / "step-00000030.json").read_text())["examples"]
    }
    assert [example["runs"][1]["tokens"] for example in data][0] == kept["large"][
        "tokens"
    ]  # it changed to right: it comes first
    for example in data:
        cells = sum(-(-h // b) * -(-w // b) for h, w, b in example["images"])
        for run in example["runs"]:
            assert len(base64.b64decode(run["heat"])) == cells * len(run["tokens"])
            assert all(len(x) == len(run["tokens"]) for x in (*run["signals"], run["weights"]))


def test_hostile_text_stays_text(run_dir):
    """In ids, questions, answers, tokens, config values and keys, the folder's own name, and analysis files."""
    folder = run_dir / "a'\"<b onclick=1>&amp;"
    folder.mkdir()
    for name in ("metrics.jsonl", "examples"):
        (run_dir / name).rename(folder / name)
    for path in (folder / "examples").iterdir():
        found = json.loads(path.read_text())
        for example in found["examples"]:
            example |= {
                "id": example["id"] + HOSTILE,
                "question": HOSTILE,
                "answer": HOSTILE,
                "tokens": [HOSTILE] * len(example["tokens"]),
            }
        path.write_text(json.dumps(found))
    tree = asdict(SETTINGS)
    tree["data"]["prompt_template"] = tree["model"]["path"] = (
        HOSTILE.replace("\ud800", "").replace("\udfff", "").replace("\x00", "")
    )
    tree["<i>"] = {"<u onload=1>": ["</td>", {"<s>": "</script>"}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    text, page = written(folder)
    assert text.count("<script") == 2 and not re.search(r"<\w+ on", text) and "\x00" not in text
    joined = "".join(page.texts)
    assert (
        '</script><script>document.title="owned"</script>' in joined
        and "&lt;b&gt; 🙂" in joined
        and "␀␛" in joined
        and "{{data}}" in joined
    )
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[
        1
    ]
    assert (
        block.isascii()
        and "<" not in block
        and json.loads(block)[0]["runs"][0]["tokens"][0] == HOSTILE
    )


def test_large_runs_stay_under_the_limit(run_dir, examples):
    """Twelve long responses about large photographs: heat-maps get coarser and examples fewer, and the page is still whole."""
    (large, *_) = examples()
    tokens = report.EXAMPLE_TOKENS
    long = {
        key: (value * tokens)[:tokens] if isinstance(value, list) and key != "images" else value
        for key, value in large.items()
    }
    long |= {
        "heat": report.encode_heat(
            torch.rand(tokens, len(base64.b64decode(large["heat"])) // len(large["tokens"]))
        ),
        "length": 9000,
    }
    noise = report.picture(picture(900, 700, 5))
    assert 10_000 < len(noise) < 600_000
    for step in (0, 30):
        run_folder.save_examples(
            run_dir,
            step,
            [
                long | {"id": str(i), "images": [large["images"][0] | {"file": noise}]}
                for i in range(12)
            ],
        )
    text, page = written(run_dir)
    assert (
        len(text) > 2_000_000
        and page.classes.count("example") >= 3
        and "8488 more tokens" in "".join(page.texts)
    )


def test_a_run_without_dyco_shows_tokens_all_the_same(run_dir):
    rows = [
        {k: v for k, v in row.items() if not k.startswith("dyco/")}
        for _, row in run_folder.read_jsonl(run_dir / "metrics.jsonl")
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "config.yaml").write_text(load_config(overrides=["dyco.enabled=false"]).to_yaml())
    _, page = written(run_dir)
    shown = "".join(page.texts)
    assert (
        "GRPO alone, without DyCo" in shown
        and "did not read attention while training" in shown
        and page.classes.count("example") == 4
    )


@pytest.mark.parametrize("keep", [1, 2, 31])
def test_a_young_run_has_a_report(run_dir, keep):
    """After the first evaluation there is one row, one column of examples, and curves of one point; later only more."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:keep]) + '{"step": 99, "half')
    for path in sorted((run_dir / "examples").iterdir())[1:]:
        path.unlink()
    _, page = written(run_dir)
    assert page.classes.count("response") == page.classes.count("example") == 4
    for path in [*(run_dir / "examples").iterdir(), run_dir / "config.yaml"]:
        path.unlink()
    assert "has left examples" in "".join(written(run_dir)[1].texts)


def test_what_analyze_found_is_on_the_page(run_dir):
    (run_dir / "analysis").mkdir()
    seen = observed([[0, 1, -1, 0, 1]] * 12, [[0.0, 0.3, 0.6, 0.0, 0.4]] * 12, [True, False] * 6)
    tokenizer = type("T", (), {"decode": lambda self, token: f"</b>{token}"})()
    (run_dir / "analysis" / "roles.json").write_text(
        json.dumps({"model": "<m>", "data": "d", **roles.describe_roles(seen, tokenizer)})
    )
    row = lambda role, arm, factor: {
        "role": role,
        "arm": arm,
        "factor": factor,
        "capped": 0.1,
        **intervene.arm_row(seen, torch.ones(12)),
    }
    arms = ("role tokens", "random tokens", "other modality")
    arms = intervene.describe_intervention(
        [
            row(None, "none", 1.0),
            *(row("visual", arm, factor) for arm in arms for factor in (0.0, 2.0)),
        ]
    )
    (run_dir / "analysis" / "intervene.json").write_text(
        json.dumps({"settings": {"model": "<m>", "data": "d"}, "arms": arms})
    )
    _, page = written(run_dir)
    shown = " ".join(page.texts)
    for expected in (
        "Right and wrong responses",
        "Interventions",
        "alignment of visual tokens",
        "other modality",
    ):
        assert expected in shown, expected
    (run_dir / "analysis" / "roles.json").write_text('{"model": 3}')
    with pytest.raises(
        report.ReportError, match="roles.json: not as train.py or analyze.py writes it"
    ):
        report.write(run_dir)


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
    ],
)
def test_what_cannot_be_read_is_one_clear_error(run_dir, capsys, name, content, message):
    (run_dir / name).unlink() if content is None else (run_dir / name).write_text(content)
    with pytest.raises(SystemExit) as caught:
        report.main([str(run_dir)])
    assert (
        message in str(caught.value)
        and str(caught.value).startswith("error: ")
        and not (run_dir / "report.html").exists()
    )


def test_heat_maps_keep_the_mass(examples):
    """Cells sum visual tokens; two images share the budget; the brightest cell of each row is 255."""
    attention = torch.rand(7, 30 * 41 + 5 * 3)
    places, heat = report.heat_maps(attention, [[30, 41], [5, 3]])
    assert places == [
        {"height": 30, "width": 41, "block": 3},
        {"height": 5, "width": 3, "block": 3},
    ] and heat.shape == (7, 10 * 14 + 2)
    torch.testing.assert_close(heat.sum(1), attention.sum(1))
    torch.testing.assert_close(
        heat[:, 15], attention[:, : 30 * 41].view(7, 30, 41)[:, 3:6, 3:6].sum((1, 2))
    )
    cells = torch.frombuffer(
        bytearray(base64.b64decode(report.encode_heat(heat))), dtype=torch.uint8
    ).view(7, -1)
    assert (
        cells.amax(1).eq(255).all()
        and (cells / 255 - heat / heat.amax(1, keepdim=True)).abs().max() <= 0.51 / 255
    )
    assert report.heat_maps(torch.zeros(4, 0), [])[1].shape == (4, 0) and report.heat_maps(
        torch.rand(1, 18), [[9, 2]], 1
    )[1].shape == (1, 1)
    large = examples()[0]
    coarse = report.coarsen(large, 64)
    assert coarse["images"][0]["block"] == 2 * large["images"][0]["block"] and len(
        base64.b64decode(coarse["heat"])
    ) <= 64 * len(large["tokens"])


def test_examples_hold_the_rollouts_own_signals(make_policy, examples):
    """The packed forward's signals of the response that the held-out evaluation samples, with the mass on the picture in its heat-map."""
    policy = make_policy()
    for place, (example, sample) in enumerate(zip(examples(), SAMPLES)):
        prompt = encode_prompt(sample, place, policy.tokenizer, policy.image_processor, TEMPLATE)
        found = generate(policy, [prompt], 1, 12, (0, "held out"), SETTINGS.dyco)
        assert example["tokens"] == [
            policy.tokenizer.decode(token) for token in found.tokens[0][found.mask[0]].tolist()
        ]
        for name, values in zip(found.signals._fields, found.signals):
            assert example[name] == pytest.approx(values[0][found.mask[0]].tolist(), abs=2e-4)
        heat = (
            torch.frombuffer(
                bytearray(base64.b64decode(example["heat"])), dtype=torch.uint8
            ).float()
            if example["heat"]
            else torch.zeros(0)
        )
        if sample.images:
            heat = (
                heat.view(len(example["tokens"]), -1)
                / 255
                * torch.tensor(example["peaks"])[:, None]
            )
            # half a grey level for each cell
            assert heat.sum(1).tolist() == pytest.approx(
                example["visual_mass"], abs=heat.shape[1] * max(example["peaks"]) / 510 + 1e-3
            )
        assert len(heat) == (len(example["tokens"]) if sample.images else 0)
        assert sum(example["weights"]) == pytest.approx(len(example["weights"]), rel=1e-3)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 1e-7), (-3, 12345), (0, 7), (0.2, 0.21), (0, 3e9)]
)
def test_ticks_are_round_and_inside(low, high):
    found = report.ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] + 1e-12 and found[-1] <= high * 1.000001
    line = report.Line("a", "first", [0, 1, 2], [low, high, low])
    assert (
        "nan" not in report.chart("t", "u", [line])
        and report.chart("t", "u", [report.Line("a", "first", [], [])]) == ""
    )


# ------------------------------------------------------------------------------------------------------- in training


@pytest.fixture
def start(make_policy, tmp_path):
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
    seen, plain = [], report.write
    monkeypatch.setattr(
        report,
        "write",
        lambda folder: (
            seen.append(len(report.read_metrics(folder / "metrics.jsonl"))) or plain(folder)
        ),
    )
    folder = start()
    assert seen == [1, 2, 3] and [p.name for p in sorted((folder / "examples").iterdir())] == [
        f"step-0000000{i}.json" for i in range(3)
    ]
    _, page = written(folder)
    assert "Step 2" in "".join(page.texts) and page.classes.count("example") == report.EXAMPLES


@pytest.mark.parametrize(
    "rows",
    [
        '{"question": "Sum circle.", "answer": "4"}\n' * 3,
        '{"question": "<image>Is it <image>?", "images": ["a.png", "a.png"], "answer": "4"}\n',
    ],
)
def test_without_held_out_rows_the_training_rows_are_shown(start, tmp_path, rows):
    """Text alone, and several images, without data.eval_path and without DyCo."""
    picture(84, 56, 0).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(rows)
    folder = start(f"data.path={tmp_path / 'rows.jsonl'}", "dyco.enabled=false")
    _, page = written(folder)
    assert (
        page.classes.count("example") == 1
        if "images" in rows
        else page.classes.count("example") >= 1
    )
    assert page.classes.count("frame") == (2 if "images" in rows else 0)


@pytest.mark.parametrize("broken", ["write", "make_examples"])
def test_a_report_that_fails_stops_no_run_and_says_so(start, monkeypatch, capsys, broken):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report, broken, fail)
    folder = start()
    out = capsys.readouterr().out
    assert (
        out.count("warning: no report at step") == 3
        and "OSError: disk full" in out
        and (folder / "final").exists()
    )


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser(run_dir, tmp_path):
    """Opens without a problem and without a request; pointing, tapping and arrow keys show a token's heat-map and signals."""
    for path in (run_dir / "examples").iterdir():
        found = json.loads(path.read_text())
        for example in found["examples"]:
            example["question"], example["tokens"][1] = "<image>" + HOSTILE, HOSTILE
        path.write_text(json.dumps(found))
    text, _ = written(run_dir)
    canvas = "JSON.stringify([...document.querySelector('#example-0 canvas').getContext('2d').getImageData(0, 0, 99, 99).data])"
    readout = "document.querySelector('#example-0 .readout').innerText"
    with Browser(tmp_path / "profile") as browser:
        for scheme in ("light", "dark"):
            browser.call(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}],
            )
            browser.open(run_dir / "report.html")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            ink, paper = (
                browser.run(f"getComputedStyle(document.body).{x}")
                for x in ("color", "backgroundColor")
            )
            assert (
                sum(map(int, re.findall(r"\d+", ink))) > sum(map(int, re.findall(r"\d+", paper)))
            ) == (scheme == "dark")
        assert browser.run("document.title") == f"{run_dir.name} · DyCo-RL"
        assert (
            browser.run("document.scripts.length") == 2
            and browser.run("document.querySelectorAll('img').length") > 0
        )
        assert 'onerror="document.title' in browser.run(
            "document.querySelector('.question').innerText"
        )

        browser.point("#t0-1-2")
        first, said = browser.run(canvas), browser.run(readout)
        assert (
            "token 3 of" in said
            and "step 30" in said
            and "image mass" in said
            and "text shift" in said
        )
        browser.point("#t0-0-3")
        assert "token 4 of" in browser.run(readout) and browser.run(canvas) != first
        browser.point("#t0-0-1")
        assert (
            HOSTILE[:30] in browser.run(readout)
            and browser.run("document.querySelectorAll('.readout script, .readout img').length")
            == 0
        )
        browser.point("#t0-1-2", click=True)
        browser.point("h1")  # away: the pinned token is shown again
        assert browser.run(canvas) == first and browser.run(readout) == said
        browser.run("document.querySelector('#example-0 .tokens[data-run=\"1\"]').focus()")
        browser.key("ArrowRight")
        assert (
            "token 4 of" in browser.run(readout)
            and browser.run("document.activeElement.getAttribute('aria-activedescendant')")
            == "t0-1-3"
        )
        browser.key("Home")
        assert "token 1 of" in browser.run(readout)

        browser.run("document.querySelector('#tab-0').focus()")
        browser.key("ArrowRight")
        assert browser.run(
            "document.querySelector('#example-0').hidden && !document.querySelector('#example-1').hidden"
        )
        browser.point("#tab-2", click=True)
        assert (
            browser.run("!document.querySelector('#example-2').hidden && document.activeElement.id")
            == "tab-2"
        )
        browser.point("[data-chart]")
        assert re.match(
            r"step \d+: ", browser.run("document.querySelector('figcaption output').innerText")
        )

        browser.call(
            "Emulation.setDeviceMetricsOverride",
            width=390,
            height=800,
            deviceScaleFactor=2,
            mobile=True,
        )
        browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
        x, y = browser.centre("#t2-1-5")
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        browser.run("new Promise(done => setTimeout(done, 400))")  # a tap is not an instant
        assert "token 6 of" in browser.run(
            "document.querySelector('#example-2 .readout').innerText"
        )
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")

        assert (
            browser.run("fetch('https://example.invalid/').then(() => 'loaded', () => 'refused')")
            == "refused"
        )
        refused = [p for p in browser.problems if "Content Security Policy" in json.dumps(p)]
        assert (
            browser.problems == refused and len(refused) >= 1
        )  # the only problem is the one made just now
        assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"} and sum(
            url.startswith("file") for url in browser.requests
        ) == 2
        assert browser.run("document.title") == f"{run_dir.name} · DyCo-RL"
