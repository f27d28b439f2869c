"""ablate.py: statistics by hand, the grid as configs, a run that is not repeated.

And whose runs count: those of the present code, config and seed, and never the shipped ones.
"""

import doctest
import functools
import json
import shutil
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

import dyco
from config import DEFAULTS, load_config
from run_folder import FolderError, exclusive
from tools import ablate, ablation_cells, rule_table
from tools.ablation_cells import CELLS, DEFAULT_PARTS, HOSTS, KNOWN_RULES, PARTS, REGIME, RULE_PARTS
from tools.ablation_figures import GAIN_STEPS
from tools.ablation_tables import differences, measure, shared_seeds, tabulate
from tools.charts import ticks

SVG = "{http://www.w3.org/2000/svg}"
OUTPUTS = ("table.md", "table.json", "gains.svg", "curves.svg")

# What tests do not change is worked out once for all lines.
present_code = functools.cache(ablate.code_fingerprint)
present_config = functools.cache(ablate.cell_config)


def line(cell, seed, curve, greedy=(0.5, 0.5)):
    """A line of runs.jsonl, of the present code and config."""
    return {
        "cell": cell,
        "seed": seed,
        "config": ablate.config_fingerprint(present_config(cell), seed),
        "code": present_code(),
        "settings": CELLS[cell],
        "steps": [0, 8, 24],
        "accuracy": curve,
        "greedy": list(greedy),
        "online": curve,
        "seconds": 1.0,
    }


def write_lines(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results/."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(ablate, "RESULTS", folder)
    return folder


@pytest.fixture
def shipped(results):
    """A copy of the results/ of this project."""
    shutil.copytree(ablate.ROOT / "results", results, dirs_exist_ok=True)
    return results


def test_every_cell_is_a_config_and_has_its_host():
    for cells in PARTS.values():
        for cell, overrides in cells.items():
            load_config(DEFAULTS, [*REGIME, *overrides])
            host = cell.rsplit("/", 1)[0] + "/host"
            assert any(host in others for others in PARTS.values()), cell
    # A cell that stands in two parts is the same in both.
    for cells in PARTS.values():
        for cell, overrides in cells.items():
            assert CELLS[cell] == [*REGIME, *overrides]
    assert len(PARTS["table"]) == 16
    # Ten rules with their controls, a host and one more control, on two levels.
    assert len(PARTS["credit"]) == 2 * (10 * 2 + 2)
    assert len(PARTS["controls"]) == 20
    # A rule that the other parts leave out is a part: with its host and controls, on two levels.
    assert len(PARTS["centered"]) == 2 * 4
    assert "centered" not in DEFAULT_PARTS
    asked_for = set(RULE_PARTS) | KNOWN_RULES
    assert set(dyco.RULES) - asked_for == {"off", "response"}


def test_measures_and_paired_differences():
    """Area: (8·(.2 + .4)/2 + 16·(.4 + .8)/2) / 24 = (2.4 + 9.6) / 24 = 0.5."""
    row = line("grpo/paper", 0, [0.2, 0.4, 0.8], greedy=(0.1, 0.9))
    names = ("final", "greedy", "area", "online")
    assert [measure(row, name) for name in names] == pytest.approx([80, 90, 50, 140 / 3])
    rows = [
        row,
        line("grpo/host", 0, [0.2, 0.4, 0.7]),
        line("grpo/paper", 1, [0.2, 0.4, 0.5]),
        line("grpo/host", 1, [0.2, 0.4, 0.6]),
        line("grpo/paper", 2, [0.0, 0.0, 0.0]),  # seed 2 has no partner
    ]
    runs = {(row["cell"], row["seed"]): row for row in rows}
    gains = differences(runs, ["grpo/paper"], ["grpo/host"], "final")
    assert gains == pytest.approx([10, -10])


def test_all_hosts_are_averaged_within_a_seed():
    """Four hosts that share a seed's luck are one observation of it, not four."""
    runs = {}
    for i, host in enumerate(HOSTS):
        for seed in range(3):
            base = 0.01 * i
            runs[f"{host}/host", seed] = line(f"{host}/host", seed, [0, 0, base])
            runs[f"{host}/paper", seed] = line(f"{host}/paper", seed, [0, 0, base + 0.1 * seed])
    del runs["sapo/paper", 1]
    papers = [f"{host}/paper" for host in HOSTS]
    hosts = [f"{host}/host" for host in HOSTS]
    assert differences(runs, papers, hosts, "final") == pytest.approx([0, 20])
    assert shared_seeds(runs, papers) == [0, 2]


# ------------------------------------------------------------------------------- whose runs count


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A copy of the sources. fork("dyco.py", old, new) changes one of them."""
    present_code()  # of the sources that stand here, before those of the fork are asked
    root = tmp_path / "fork"
    (root / "rewards").mkdir(parents=True)
    for path in [*ablate.ROOT.glob("*.py"), *ablate.ROOT.glob("rewards/*.py")]:
        shutil.copy(path, root / path.relative_to(ablate.ROOT))
    monkeypatch.setattr(ablate, "ROOT", root)

    def change(name, old, new):
        source = (root / name).read_text(encoding="utf-8")
        assert old in source
        (root / name).write_text(source.replace(old, new, 1), encoding="utf-8")

    return change


def test_a_changed_rule_is_other_code(fork):
    assert ablate.code_fingerprint() == present_code()  # wherever the sources stand
    fork("dyco.py", '_paper, "eq. 8', '_off, "eq. 8')
    assert ablate.code_fingerprint() != present_code()


def test_comments_docstrings_and_formatting_are_not(fork):
    fork("dyco.py", "RULES = {\n", "# All of them.\nRULES = {\n\n    # The host.\n")
    fork("dyco.py", '"""dyco.py', '"""My dyco.py')
    fork("dyco.py", "    return torch.where(mask, ", "    return torch.where(\n        mask, ")
    fork(
        "rl_algos.py",
        '    """REINFORCE with a clipped',
        '    """The policy gradient with a clipped',
    )
    assert ablate.code_fingerprint() == present_code()


def test_the_sources_that_decide_are_those_that_train_imports(fork):
    decide = (
        "train dyco rl_algos attention decoder lora rollout model data rows toy evaluate "
        "distributed metrics"
    )
    expected = {f"{name}.py" for name in decide.split()}
    expected |= {f"rewards/{path.name}" for path in (ablate.ROOT / "rewards").glob("*.py")}
    assert ablate.deciding_sources().keys() == expected
    fork("rewards/units.py", "from __future__", "CHANGED = 1\nfrom __future__")
    assert ablate.code_fingerprint() != present_code()


def test_what_only_writes_and_shows_does_not_count(fork):
    (ablate.ROOT / "tools").mkdir()
    (ablate.ROOT / "tools" / "report.py").write_text("COLOR = 1\n")
    fork("config.py", "TOY_LEVELS = (1, 2, 3)", "TOY_LEVELS = (1, 2)")
    assert ablate.code_fingerprint() == present_code()


def test_a_module_of_the_forks_own_counts(fork):
    fork("dyco.py", "\nRULES = {\n", "\nimport my_rule\n\nRULES = {\n")
    (ablate.ROOT / "my_rule.py").write_text("WEIGHT = 1\n")
    before = ablate.code_fingerprint()
    (ablate.ROOT / "my_rule.py").write_text("WEIGHT = 2\n")
    assert ablate.code_fingerprint() != before


def test_a_source_that_is_no_python_is_named(fork):
    fork("dyco.py", "RULES = {", "RULES = = {")
    with pytest.raises(ValueError, match=r"dyco\.py, line \d+: invalid syntax"):
        ablate.code_fingerprint()


@pytest.mark.parametrize(
    "same",
    [
        "run.dir=elsewhere",
        "toy.cache_dir=elsewhere",
        "checkpoint.every=3",
        "checkpoint.keep_last=7",
        "log.samples_per_step=9",
        "train.profile_steps=1",
    ],
)
def test_keys_without_effect_leave_the_config_the_same(same):
    plain = ablate.config_fingerprint(load_config(DEFAULTS), 0)
    assert ablate.config_fingerprint(load_config(DEFAULTS, [same]), 0) == plain


@pytest.mark.parametrize(
    "other", ["dyco.alpha=0.3", "optim.lr=0.001", "toy.seed=1", "rollout.group_size=4"]
)
def test_all_other_keys_and_the_seed_make_another_config(other):
    plain = load_config(DEFAULTS)
    fingerprints = [
        ablate.config_fingerprint(plain, 0),
        ablate.config_fingerprint(plain, 1),
        ablate.config_fingerprint(load_config(DEFAULTS, [other]), 0),
    ]
    assert len(set(fingerprints)) == 3
    # The seed is the one that the run is given, whatever the file says.
    seeded = load_config(DEFAULTS, ["train.seed=5"])
    assert ablate.config_fingerprint(seeded, 0) == fingerprints[0]


def test_a_reward_of_the_forks_own_counts_by_its_source(fork):
    config = load_config(DEFAULTS, ["reward.custom=my_reward.py:reward"])
    fingerprints = []
    for value in ("0", "1", "1  # at most"):
        source = f"def reward(response, answer, sample):\n    return {value}\n"
        (ablate.ROOT / "my_reward.py").write_text(source)
        fingerprints.append(ablate.config_fingerprint(config, 0))
    assert fingerprints[0] != fingerprints[1] == fingerprints[2]


def test_only_lines_of_the_present_code_and_config_are_runs(tmp_path):
    counts = line("grpo/paper", 0, [0.1, 0.2, 0.3])
    of_another_seed = counts | {"seed": 1}
    of_an_unknown_cell = counts | {"cell": "grpo/mine"}
    of_other_code = line("grpo/host", 0, [0, 0, 0]) | {"code": "0123456789abcdef"}
    of_another_config = line("grpo/host", 0, [0, 0, 0]) | {"config": "0123456789abcdef"}
    others = [of_another_seed, of_an_unknown_cell, of_other_code, of_another_config, {"step": 1}]
    write_lines(tmp_path, [counts, *others])
    assert ablate.read_runs(tmp_path) == ({("grpo/paper", 0): counts}, 5)
    assert ablate.read_runs(tmp_path / "new") == ({}, 0)


def test_shipped_lines_never_count(shipped, tmp_path):
    """Neither where they are nor copied into a fork's folder, though all 58 cells are there."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(shipped / "runs.jsonl", out)
    assert ablate.read_runs(out) == ({}, 464)
    for folder, others in ((out, 464), (tmp_path / "new", 0)):
        plan = ablate.plan_runs(["table"], 1, folder)
        assert plan.missing == [(cell, 0) for cell in PARTS["table"]]
        assert plan.others == others


def contents(folder):
    """{file: its bytes} of a folder and of those in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shipped_report_says_so_and_is_the_shipped_table(shipped, capsys, monkeypatch):
    before = contents(shipped)
    ablate.main(["--report"])
    assert "These are the 464 runs that came with the project" in capsys.readouterr().out
    monkeypatch.setattr(ablate, "CREDIT_RESULTS", shipped / "credit")
    ablate.main(["rate", "--report"])  # one part would otherwise take the place of all
    ablate.main(["credit", "--report"])
    assert "runs that came with the project" in capsys.readouterr().out
    assert contents(shipped) == before


def test_shipped_lines_of_another_regime_are_refused(results):
    row = line("grpo/host", 0, [0, 0, 0]) | {"settings": ["train.steps=41"]}
    write_lines(results, [row])
    expected = "runs.jsonl, line 1: grpo/host, seed 0, was run with train.steps=41"
    with pytest.raises(ValueError, match=expected):
        ablate.read_shipped(ablate.RESULTS)


# ----------------------------------------------------------------------------------- what is to do


def test_the_time_is_estimated_from_the_runs_there(results, tmp_path):
    """13 of 16 are missing, two at a time: 7 rounds of 30 s."""
    rows = [line(cell, 0, [0.1, 0.2, 0.3]) for cell in list(PARTS["table"])[:3]]
    rows = [row | {"seconds": seconds} for row, seconds in zip(rows, (20, 30, 40), strict=True)]
    old = rows[0] | {"code": "0123456789abcdef", "seconds": 999}
    write_lines(tmp_path, [*rows, old])
    plan = ablate.plan_runs(["table", "table"], 1, tmp_path)
    assert ablate.describe_plan(plan, 2, tmp_path).splitlines() == [
        f"16 runs wanted (16 cells × 1 seeds), 3 of them in {tmp_path}, 13 to run: "
        "about 4 minutes, 2 at a time (the mean of those there is 30 s)",
        "1 runs there were made with other code or another config and do not count",
    ]


def test_without_any_there_the_shipped_ones_tell_the_time(shipped, tmp_path):
    """464 runs of 104.6 s, two at a time, are 24259 s."""
    plan = ablate.plan_runs(DEFAULT_PARTS, 8, tmp_path / "out")
    text = ablate.describe_plan(plan, 2, tmp_path / "out")
    assert text.startswith("464 runs wanted (58 cells × 8 seeds), 0 of them in ")
    assert (
        "464 to run: about 6.7 hours, 2 at a time (the mean of the shipped runs is 105 s)" in text
    )


def test_nothing_to_go_by_and_nothing_to_do(results, tmp_path):
    plan = ablate.plan_runs(["table"], 1, tmp_path / "out")
    text = ablate.describe_plan(plan, 2, tmp_path)
    assert text.endswith("16 to run; no run is there to tell how long that takes")
    write_lines(tmp_path, [line(cell, 0, [0.1, 0.2, 0.3]) for cell in PARTS["table"]])
    text = ablate.describe_plan(ablate.plan_runs(["table"], 1, tmp_path), 2, tmp_path)
    assert text.endswith(f"16 of them in {tmp_path}, 0 to run")


def test_a_dry_run_only_speaks(made, tmp_path, capsys):
    out = tmp_path / "out"
    ablate.main(["table", "--seeds", "2", "--dry-run", "--out", str(out)])
    assert "32 runs wanted (16 cells × 2 seeds), 0 of them" in capsys.readouterr().out
    assert made == []
    assert not out.exists()


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
def test_numbers_are_at_least_one(option, capsys):
    with pytest.raises(SystemExit):
        ablate.main([option, "0"])
    assert "found 0; expected at least 1" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- running


@pytest.fixture
def made(results, monkeypatch):
    """The (cell, seed) of runs in the order they are made in; `paper` is ten points better."""
    made = []

    def run_one(cell, seed, scratch):
        made.append((cell, seed))
        gain = 0.1 if cell.endswith("/paper") else 0
        return line(cell, seed, [0.3, 0.5, 0.7 + gain + 0.01 * seed])

    monkeypatch.setattr(ablate, "run_one", run_one)
    return made


def test_what_is_missing_is_run_seed_after_seed(made, tmp_path):
    out = tmp_path / "out"
    ablate.run_grid(["table"], 2, jobs=1, out=out)
    assert len(made) == 32
    assert made[:16] == [(cell, 0) for cell in PARTS["table"]]
    ablate.run_grid(["table"], 4, jobs=1, out=out)
    assert len(made) == 64
    assert {seed for _, seed in made[32:]} == {2, 3}


def test_credit_runs_have_a_table_of_their_own(made, tmp_path, capsys, monkeypatch):
    """Each rule against its own control: those called …/paper are ten points better at the end.

    Two of the curve's three steps of 8, 16 lie on that end: 10 · ½ · ⅔ = 3.3 points of the mean.
    """
    out = tmp_path / "out"
    ablate.run_grid(["credit"], 1, jobs=1, out=out)
    text = (out / "table.md").read_text()
    assert "| grpo/vppo | 1 |" in text and "| level 3: grpo/phrases uniform | 1 |" in text
    assert "| paper | 2 | +3.3 | +3.3 | +3.3 | – | – | +3.3 |" in text
    assert "| siblings | 2 | +0.0 | +0.0 | +0.0 | – | – | +0.0 |" in text
    assert "## table" not in text
    # Another part in the same folder leaves this one's table there.
    ablate.run_grid(["rate"], 1, jobs=1, out=out)
    assert "## credit" in (out / "table.md").read_text()
    assert "## rate" in (out / "table.md").read_text()
    monkeypatch.setattr(rule_table, "SEEDS", 2)
    ablate.run_grid(["credit"], 2, jobs=1, out=out)
    text = (out / "table.md").read_text()
    # 2 of 16 choices of signs; the other nine rules are at 1. Ten times 2/16 is above 1.
    assert "| 0.125 | 1.000 |" in text
    gains = ElementTree.parse(out / "gains.svg")
    # Ten rules on two levels and both, over the control and over the host.
    assert len(gains.findall(f".//{SVG}circle")) == 10 * 3 * 2
    curves = ElementTree.parse(out / "curves.svg")
    assert {"grpo", "level 3: grpo"} <= {text.text for text in curves.findall(f".//{SVG}text")}
    # Of each rule on each level: host, rule and shuffled; phrases has a uniform, too. Of the other
    # part host, paper and shuffled at both rates, and the same with signed minmax on both levels.
    of_rules = 2 * (10 * 3 + 1)
    of_hosts = 2 * 3 + 2 * 4
    assert len(curves.findall(f".//{SVG}polyline")) == of_rules + of_hosts
    made.clear()
    capsys.readouterr()
    ablate.main(["credit", "--report", "--out", str(out)])
    assert "against its own shuffled control" in capsys.readouterr().out
    assert not made


def test_earlier_names_of_rules_are_understood_in_shipped_runs(results):
    row = line("grpo/shuffled", 0, [0.1, 0.2, 0.3])
    settings = [s for s in row["settings"] if not s.startswith(("dyco.rule", "dyco.control"))]
    row["settings"] = [*settings, "dyco.rule=shuffled"]
    write_lines(results, [row])
    assert ablate.read_shipped(results).keys() == {("grpo/shuffled", 0)}
    row["settings"] = [*settings, "dyco.rule=uniform"]
    write_lines(results, [row])
    with pytest.raises(ValueError, match="grpo/shuffled, seed 0, was run with"):
        ablate.read_shipped(results)


def test_sign_flip_and_holm():
    """All signs alike is the most extreme of 2^n choices, and so is its opposite."""
    assert doctest.testmod(rule_table).failed == 0
    assert doctest.testmod(ablate).failed == 0
    assert doctest.testmod(ablation_cells).failed == 0
    assert rule_table.sign_flip([1.0] * 16) == 2 / 2**16
    # |1 + 2 − 3| = 0, as far as any other: each mean is at least as far from 0.
    assert rule_table.sign_flip([1.0, 2.0, -3.0]) == 1
    # Sums of 0.1 in different orders differ by rounding, and still count as equal: 2 of 8.
    assert rule_table.sign_flip([0.1, 0.2, 0.3]) == 0.25
    assert rule_table.holm([0.2, 0.001, 0.5]) == pytest.approx([0.4, 0.003, 0.5])
    assert rule_table.holm([0.9, 0.8]) == [1.0, 1.0]


def test_no_p_value_before_all_planned_runs_are_there():
    over_host = {"level 1": [0.5] * 8, "level 3": [1.5] * 8}
    full = rule_table.answer_of("mine", {"level 1": [1.0] * 8, "level 3": [1.0] * 8}, over_host)
    short = rule_table.answer_of("other", {"level 1": [1.0] * 8, "level 3": [1.0] * 7}, over_host)
    assert full.p == 2 / 2**16 and short.p is None
    assert full.over_host["both"][0] == 1
    assert "| < 0.001 | < 0.001 | +1.0 (" in rule_table.rule_lines([full], planned=1)[-1]
    for answers, planned in (([full], 2), ([full, short], 2)):
        assert all(
            "| – | – | +1.0 (" in line for line in rule_table.rule_lines(answers, planned)[2:]
        )


def test_a_rule_that_was_not_planned_is_a_question_of_its_own(results):
    """Its p-value is not corrected, and the ten planned rules do not wait for it."""
    cells = list(PARTS["centered"])
    rows = []
    for cell in cells:
        height = 0.4 if cell.endswith("/centered") else 0.2
        rows += [line(cell, seed, [height] * 3) for seed in range(8)]
    write_lines(results, rows)
    table = tabulate(ablate.read_runs(results)[0], results, ["centered"])
    gain = "+20.0 (+20.0 … +20.0)"
    assert f"| centered | 16 | {gain} | {gain} | {gain} | < 0.001 | < 0.001 |" in table
    assert f"| grpo/centered − centered uniform | 8 | {gain} |" in table
    # The same rows are no answer to what was planned, but they are shown beside it.
    both = tabulate(ablate.read_runs(results)[0], results, ["credit", "centered"])
    assert "## centered" in both and "| centered | 16 |" in both


def test_an_interrupted_grid_goes_on_where_it_was(made, tmp_path, monkeypatch):
    """Also over a line that was half-written when the machine went down."""
    out = tmp_path / "out"
    plain = ablate.run_one

    def interrupted(cell, seed, scratch):
        if len(made) == 5:
            raise KeyboardInterrupt
        return plain(cell, seed, scratch)

    with monkeypatch.context() as patch:
        patch.setattr(ablate, "run_one", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ablate.run_grid(["table"], 1, jobs=1, out=out)
    assert not (out / "table.md").exists()
    with open(out / "runs.jsonl", "a") as file:
        file.write('{"cell": "grpo/host", "se')

    ablate.run_grid(["table"], 1, jobs=1, out=out)
    assert made == [(cell, 0) for cell in PARTS["table"]]  # none of them twice
    assert ablate.read_runs(out)[0].keys() == set(made)


def test_a_grid_leaves_the_shipped_results_alone(made, shipped, tmp_path, capsys):
    before = contents(shipped)
    out = tmp_path / "out"
    ablate.main(["table", "--seeds", "1", "--jobs", "1", "--out", str(out)])
    assert len(made) == 16
    assert {path.name for path in out.iterdir()} == {".lock", "runs.jsonl", *OUTPUTS}
    assert contents(shipped) == before
    assert "| grpo/paper | 1 | 80.0 | +10.0 |" in capsys.readouterr().out

    table = (out / "table.md").read_text()
    (out / "table.md").unlink()
    ablate.main(["--report", "--out", str(out)])
    assert (out / "table.md").read_text() == table


def test_other_code_runs_again_beside_the_old_lines(made, fork, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["table", "--seeds", "1", "--jobs", "1", "--out", str(out)]
    ablate.main(command)
    old = (out / "runs.jsonl").read_bytes()
    fork("dyco.py", '_paper, "eq. 8', '_off, "eq. 8')
    with pytest.raises(SystemExit, match=r"no run there .* config \(16 with others\)"):
        ablate.main(["--report", "--out", str(out)])

    plain = ablate.run_one
    code = ablate.code_fingerprint()
    monkeypatch.setattr(ablate, "run_one", lambda *run: plain(*run) | {"code": code})
    capsys.readouterr()
    ablate.main(command)
    assert len(made) == 32
    assert (out / "runs.jsonl").read_bytes().startswith(old)
    said = "16 runs there were made with other code or another config and do not count"
    assert said in capsys.readouterr().out


def test_code_that_changes_while_the_grid_runs_is_said(made, fork, tmp_path, monkeypatch):
    """Runs from before the change do not stand in a table with those from after it."""
    plain = ablate.run_one

    def run_and_change(cell, seed, scratch):
        row = plain(cell, seed, scratch)
        if len(made) == 16:
            fork("dyco.py", '_paper, "eq. 8', '_off, "eq. 8')
        return row

    monkeypatch.setattr(ablate, "run_one", run_and_change)
    expected = "changed after the grid began: 16 more runs in .* do not count"
    with pytest.raises(RuntimeError, match=expected):
        ablate.run_grid(["table"], 1, jobs=1, out=tmp_path / "out")


def test_the_folder_of_a_grid_is_no_other_folder(made, results, tmp_path):
    with pytest.raises(SystemExit, match="these are the shipped runs; give a folder of your own"):
        ablate.main(["--out", str(results)])
    (tmp_path / "table.md").write_text("my notes")
    with pytest.raises(SystemExit, match="found table.md without a runs.jsonl"):
        ablate.main(["--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == "my notes"
    assert made == []


def test_tables_and_figures_of_one_part(made, tmp_path):
    out = tmp_path / "out"
    ablate.run_grid(["table"], 4, jobs=1, out=out)
    text = (out / "table.md").read_text()
    assert "| grpo/paper | 4 | 81.5 | +10.0 (+10.0 … +10.0) | 50.0 | +0.0 (+0.0 … +0.0) |" in text
    assert "| grpo/host | 4 | 71.5 | – |" in text
    assert "| **all/paper** | 4 | 81.5 | +10.0 (+10.0 … +10.0) |" in text
    assert "| gspo/paper minmax − paper | 4 | −10.0 (−10.0 … −10.0) |" in text
    assert "| **all/paper minmax − paper** | 4 | −10.0" in text
    for absent in ("controls", "uniform", "all/host"):
        assert absent not in text

    entry = json.loads((out / "table.json").read_text())["grpo/paper"]
    assert entry["seeds"] == 4
    assert entry["final"] == {
        "mean": pytest.approx(81.5),
        "gain": pytest.approx([10, 10, 10]),
    }

    curves = ElementTree.parse(out / "curves.svg")
    assert len(curves.findall(f".//{SVG}polyline")) == 4 * 3  # host, paper, signed
    gains = ElementTree.parse(out / "gains.svg")
    assert len(gains.findall(f".//{SVG}circle")) == 4 * 5
    places = {}
    for mark in gains.findall(f".//{SVG}g"):
        name = mark.find(f"{SVG}title").text.rsplit(" ", 4)[0]
        places[name] = float(mark.find(f"{SVG}circle").get("cx"))
    zero = 436
    assert places["all: signed minmax − host"] == zero
    assert places["all: paper − host"] == places["sapo: paper − host"] > zero
    assert places["all: paper minmax − paper"] < zero


def test_tables_of_nothing_and_of_half(tmp_path):
    """A part without its host's runs yet, and no run at all: no gains, no marks, no crash."""
    assert "seeds" in tabulate({}, tmp_path)
    runs = {("level 2: grpo/uniform", 0): line("level 2: grpo/uniform", 0, [0.3, 0.5, 0.7])}
    assert "| level 2: grpo/uniform | 1 | 70.0 | – |" in tabulate(runs, tmp_path)


@pytest.mark.parametrize("bound", [0.4, 2.0, 9.99, 240])
def test_ticks_are_round_and_inside(bound):
    places = ticks(-bound, bound, GAIN_STEPS)
    assert 0 in places
    assert places == [-x for x in places[::-1]]
    assert abs(places[0]) <= bound
    assert len(places) <= 13


# What stands in for train.py: it writes three rows of metrics, and final/ where it ends.
FAKE = """
import json, pathlib, sys

folder = pathlib.Path(next(a for a in sys.argv if a.startswith("run.dir="))[8:])
assert not folder.exists()
assert {"train.seed=3", "algo.name=grpo", "dyco.rule=paper"} <= set(sys.argv)
folder.mkdir(parents=True)
evaluation = {"eval/accuracy": 0.5, "eval/accuracy_greedy": 1.0}
rows = [
    {"step": 0, **evaluation},
    {"step": 1, "reward/accuracy": 0.25, "policy/entropy": 1.0},
    {"step": 2, "reward/accuracy": 0.5, "policy/entropy": 1.0, **evaluation},
]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""
ENDS = '(folder / "final").mkdir()\n'
CHANGES = 'pathlib.Path("train.py").write_text("pass")\n'


def test_one_run_becomes_one_line_and_an_unfinished_one_none(tmp_path, monkeypatch):
    """A stopped run exits with 0 and has no final/."""
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    program = tmp_path / "train.py"

    def run_one():
        return ablate.run_one("grpo/paper", 3, Path(tempfile.mkdtemp(dir=tmp_path)))

    program.write_text(FAKE)
    with pytest.raises(RuntimeError, match="grpo/paper, seed 3, did not end"):
        run_one()

    program.write_text(FAKE + ENDS)
    row = run_one()
    assert row["steps"] == [0, 2]
    assert row["accuracy"] == [0.5, 0.5]
    assert row["online"] == [0.25, 0.5]
    assert row["entropy"] == [1, 1]
    assert "grad_norm" not in row
    assert (row["config"], row["code"]) == ablate.present_origin("grpo/paper", 3)

    program.write_text(FAKE.replace("rows =", "rows = [{'step': 32}] +", 1) + ENDS)
    with pytest.raises(RuntimeError, match="metrics.jsonl: the steps are not 0, 1, 2"):
        run_one()

    program.write_text(FAKE + ENDS + CHANGES)
    with pytest.raises(RuntimeError, match="seed 3: the code or the config changed while it ran"):
        run_one()

    program.write_text("import sys; sys.exit('error: no such thing')")
    with pytest.raises(RuntimeError, match="error: no such thing"):
        run_one()


def test_a_run_that_fails_does_not_end_the_grid(results, tmp_path, monkeypatch):
    """Each run has a folder of its own, so that one which a killed grid left behind cannot write
    into another's. It goes when its line is written; others in the folder of results stay."""
    places = []

    def run_one(cell, seed, place):
        assert list(place.iterdir()) == []
        places.append(place)
        if cell == "grpo/paper":
            raise RuntimeError(f"{cell} did not end")
        return line(cell, seed, [0.3, 0.5])

    monkeypatch.setattr(ablate, "run_one", run_one)
    out = tmp_path / "out"
    (out / "unfinished").mkdir(parents=True)
    expected = "1 of 16 runs did not end, the first: grpo/paper did not end"
    with pytest.raises(RuntimeError, match=expected):
        ablate.run_grid(["table"], 1, jobs=2, out=out)
    assert len((out / "runs.jsonl").read_text().splitlines()) == 15
    assert len(set(places)) == 16
    assert sum(place.exists() for place in places) == 1
    assert (out / "unfinished").exists()


def test_a_line_that_cannot_be_written_is_said(results, made, tmp_path, monkeypatch, capsys):
    def append_jsonl(path, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ablate, "append_jsonl", append_jsonl)
    with pytest.raises(RuntimeError, match=r"runs.jsonl: \[Errno 28\] No space left on device"):
        ablate.run_grid(["table"], 1, jobs=1, out=tmp_path / "out")
    assert '"cell": "grpo/host", "seed": 0' in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"seed": "0"}, "\"seed\" is '0'; expected an integer"),
        ({"seconds": None}, '"seconds" is nothing; expected a number above 0'),
        ({"seconds": float("inf")}, '"seconds" is inf; expected a number above 0'),
        ({"steps": [0, 0, 24]}, '"steps" is not two numbers or more that rise'),
        ({"steps": [0]}, '"steps" is not two numbers'),
        ({"accuracy": None}, '"accuracy" is not a list of numbers from 0 to 1'),
        ({"accuracy": [0.1, float("nan"), 0.2]}, '"accuracy" is not a list of numbers'),
        ({"accuracy": [0.1, 0.2, 5]}, '"accuracy" is not a list of numbers from 0 to 1'),
        ({"accuracy": [0.1, 0.2]}, '"accuracy" has 2 numbers, and "steps" 3'),
        ({"greedy": []}, '"greedy" is not a list'),
        ({"online": ["0.1"]}, '"online" is not a list'),
    ],
)
def test_a_line_that_is_no_run_is_named_before_anything_runs(results, made, change, problem):
    row = line("grpo/host", 0, [0.1, 0.2, 0.3])
    write_lines(results, [row, row | change])
    with pytest.raises(ValueError, match=f"runs.jsonl, line 2: {problem}") as caught:
        ablate.plan_runs(["table"], 1, results)
    assert "mend the line, or take it out" in str(caught.value)
    assert made == []


def test_two_lines_of_one_run_must_agree(results):
    row = line("grpo/host", 0, [0.1, 0.2, 0.3])
    write_lines(results, [row, row])
    assert len(ablate.read_runs(results)[0]) == 1
    write_lines(results, [row, row | {"accuracy": [0.1, 0.2, 0.4]}])
    with pytest.raises(ValueError, match="line 2: another line has other numbers of grpo/host"):
        ablate.read_runs(results)


def test_a_cell_that_is_another_one_now_keeps_no_grid_from_being_planned(results, tmp_path):
    """Of shipped runs a plan takes the time alone."""
    row = line("grpo/paper", 0, [0.1, 0.2, 0.3]) | {"settings": ["dyco.tau=9"], "seconds": 40.0}
    write_lines(results, [row])
    with pytest.raises(ValueError, match="which is not what that cell is now"):
        ablate.read_shipped(results)
    assert ablate.plan_runs(["table"], 1, tmp_path / "out").seconds == 40
    write_lines(results, [{"cell": "grpo/host", "seed": 0}])
    with pytest.raises(ValueError, match='runs.jsonl, line 1: "seconds" is nothing'):
        ablate.plan_runs(["table"], 1, tmp_path / "out")


def test_a_report_says_where_it_has_no_runs(shipped, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="has no runs of table; expected some of credit"):
        ablate.main(["table", "credit", "--report"])
    with pytest.raises(SystemExit, match="has no runs of centered"):
        ablate.main(["centered", "--report"])
    monkeypatch.setattr(ablate, "CREDIT_RESULTS", shipped / "credit")
    ablate.main(["--report", "--out", str(shipped / "credit")])
    count = len((shipped / "credit" / "runs.jsonl").read_text().splitlines())
    assert f"{count} runs that came with the project" in capsys.readouterr().out


def test_two_grids_do_not_share_a_folder(results, tmp_path):
    expected = "another process is writing there; set --out"
    with exclusive(tmp_path, "--out"), pytest.raises(FolderError, match=expected):
        ablate.run_grid(["table"], 1, jobs=2, out=tmp_path)
