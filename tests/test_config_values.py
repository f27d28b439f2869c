"""config.py: values that YAML misreads, folders that no run may have, and whom an error blames."""

import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import COMMAND_LINE, DEFAULTS, ConfigError, load_config, split_arguments


def message_of(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return str(caught.value)


def message_of_overrides(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(DEFAULTS, overrides)
    return str(caught.value)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "mine.yaml"


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "written, read, advice",
    [
        ("0120", "80", "120"),
        ("-010", "-8", "-10"),
        ("0_17", "15", "17"),
        ("00", "0", "0"),
        ("1:30", "90", "90"),
        ("1:30:00", "5400", "5400"),
        ("1:30.5", "90.5", "90.5"),
    ],
)
@pytest.mark.parametrize("key", ["train.steps", "optim.lr", "dyco.layers", "recipes.gspo.kl"])
def test_numbers_that_yaml_reads_in_another_base(file, key, written, read, advice):
    section, _, name = key.partition(".")
    first, dot, last = name.partition(".")
    value = f"{{{last}: {written}}}" if dot else written
    value = f"[-1, {written}]" if first == "layers" else value
    message = message_of(file, f"run: {{dir: x}}\n{section}:\n  {first}: {value}\n")
    assert message.startswith(f"{file}: line 3: {written} ") and "\n" not in message
    assert f"as {read}; write {advice}, or '{written}' in quotes" in message

    value = f"[-1, {written}]" if first == "layers" else written
    message = message_of_overrides(f"{key}={value}")
    assert message.startswith(f"command line: {key}: {written} ") and "\n" not in message
    assert f"as {read}; write {advice}, or" in message


def test_what_is_meant_as_text_is_text(file):
    """On the command line the type of a key is known; in a file a number in quotes is text."""
    config = load_config(DEFAULTS, ["run.dir=0120", "data.eval_path=1:30", "model.path=2024-01-01"])
    assert (config.run.dir, config.data.eval_path) == ("0120", "1:30")
    assert config.model.path == "2024-01-01"
    file.write_text("run: {dir: '0120'}\ndata: {eval_path: 2024-01-01, path: on}\n")
    config = load_config(file)
    assert (config.run.dir, config.data.eval_path, config.data.path) == ("0120", "2024-01-01", "on")


def test_numbers_that_are_clear_stay():
    config = load_config(DEFAULTS, ["train.steps=1_000", "train.seed=0x10", "eval.every=0b11"])
    assert (config.train.steps, config.train.seed, config.eval.every) == (1000, 16, 3)
    assert load_config(DEFAULTS, ["train.steps=0", "optim.lr=0.010"]).optim.lr == 0.01


@pytest.mark.parametrize("digits", [20, 401, 5000])
@pytest.mark.parametrize("key", ["train.steps", "train.seed", "optim.lr", "dyco.alpha"])
def test_numbers_of_hundreds_of_digits(file, key, digits):
    for number in ("9" * digits, "-" + "9" * digits, "0x" + "f" * digits):
        section, name = key.split(".")
        for message in (
            message_of(file, f"{section}: {{{name}: {number}}}"),
            message_of_overrides(f"{key}={number}"),
        ):
            assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e400", "-1e999", "infinity"])
def test_numbers_that_are_not_finite(file, number):
    for key in ("optim.lr", "reward.custom_weight"):
        section, name = key.split(".")
        assert f"{key}: expected a finite" in message_of(file, f"{section}: {{{name}: {number}}}")
        assert f"{key}: expected a finite" in message_of_overrides(f"{key}={number}")
    assert "expected a whole number" in message_of_overrides(f"train.steps={number}")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("optim.lr=1e300", "at most 10 (AdamW"),
        ("optim.weight_decay=1e7", "at most 1e+06"),
        ("rollout.temperature=101", "at most 100"),
        ("rollout.temperature=1e-300", "more than 0, at least 0.001"),
        ("algo.temperature_pos=1e5", "at most 100"),
        ("algo.kl=1e30", "at most 1e+06"),
        ("algo.kl_cap=1e39", "at most 1e+06"),
        ("algo.kl_cap=-1", "0 or more"),
        ("optim.floor=1.5", "at most 1 (it is a share of optim.lr)"),
        ("optim.floor=-0.1", "a share of 0 to 1"),
        ("optim.schedule=sine", "one of constant, linear, cosine"),
        ("recipes.grpo.kl=1e30", "at most 1e+06"),
        ("dyco.alpha=1001", "at most 1000"),
        ("reward.accuracy_weight=1e40", "at most 1e+06"),
        ("reward.custom_weight=-1e40", "-1e6 or more"),
        ("reward.custom_timeout=1e7", "at most 1e+06"),
        ("train.threads=1000000000", "at most 1024"),
    ],
)
def test_what_would_fail_at_the_first_step_is_refused(override, expected):
    message = message_of_overrides(override)
    assert f": expected {expected}" in message and message.startswith("command line: ")
    assert "\n" not in message


# ---------------------------------------------------------------- text and files


@pytest.mark.parametrize("text", ["a\\0b", "\\ud800", "a\\udfffb"])
@pytest.mark.parametrize("key", ["run.dir", "data.path", "data.eval_path", "data.prompt_template"])
def test_text_that_no_file_can_hold(file, key, text):
    section, name = key.split(".")
    message = message_of(file, f'{section}: {{{name}: "{text}"}}')
    assert f"{file}: {key}: expected text that UTF-8 can hold" in message and "\n" not in message
    message.encode()


@pytest.mark.parametrize(
    "content",
    [
        "run: {dir: a\0b}",
        "run: " + "[" * 3000,
        "run: {dir: " + "{a: " * 500 + "1" + "}" * 501,
        "train: [",
        "a: b: c",
        "train:\n\tsteps: 1",
        "? [a]\n: b",
        "run: {dir: *x}",
        "a: &a [*a]\nrun: {dir: *a}",
        "dyco: {layers: &a [*a]}",
        "recipes: &a {gspo: *a}",
        "train: !!int x",
        "train: {steps: !!int ''}",
        "train: {seed: !!float ''}",
        "dyco: {enabled: !!bool perhaps}",
        "run: {dir: !!timestamp soon}",
        "run: {dir: !!binary '#'}",
        "run: {dir: !!python/object/apply:os.system ['true']}",
        "run: {<<: {dir: x}}",
        "--- 1\n--- 2",
        "%YAML 9.9\n---\na: b",
        "0x" + "f" * 5000,
        "0x" + "f" * 5000 + ": 1",
        "train: {0x" + "f" * 5000 + ": 1}",
        "'" + "a" * 5000 + "': {b: c}",
        "train: {'" + "a" * 5000 + "': 1}",
        'train: {"a\\nb\\e[31m": 1}',
        '"a\\nb": 3',
    ],
)
def test_hostile_files_end_in_one_line(file, content):
    message = message_of(file, content)
    assert message.startswith(f"{file}: ") and message.isprintable() and len(message) < 1000


def test_aliases_that_grow(file):
    """Each level holds the one before nine times: 9^20 words, if anything were to print them."""
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 21):
        aliases = ", ".join([f"*l{level - 1}"] * 9)
        levels.append(f"l{level}: &l{level} [{aliases}]")
    bomb = "toy: {" + ", ".join(levels) + "}\n"
    for user in ("run: {dir: *l20}", "algo: {name: *l20}", "recipes: {gspo: *l20}", "log: *l20"):
        message = message_of(file, bomb + user)
        assert len(message) < 6000  # the 21 unknown keys, and the value that is cut
    assert all(line.startswith(f"{file}: ") for line in message.splitlines())


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "key",
    ["run.dir", "data.path", "data.image_root", "data.eval_path", "data.eval_image_root"]
    + ["model.path", "toy.cache_dir", "reward.custom"],
)
def test_the_home_folder_is_filled_in(file, key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    section, name = key.split(".")
    file.write_text(f"{section}: {{{name}: ~/x.py:f}}")
    for config in (load_config(file), load_config(DEFAULTS, [f"{key}=~/x.py:f"])):
        assert getattr(getattr(config, section), name) == "/home/someone/x.py:f"
        file.write_text(config.to_yaml())
        assert "~" not in file.read_text() and load_config(file) == config
    assert load_config(DEFAULTS, [f"{key}=a/~/b"]).to_yaml().count("a/~/b") == 1

    message = message_of_overrides(f"{key}=~nobody-has-this-name/x")
    assert (
        f"{key}: no home folder is known for '~nobody-has-this-name/x'; write './~nobod" in message
    )
    message = message_of_overrides(f"{key}=$HOME/x")
    assert f"{key}: expected a path, found '$HOME/x', whose variable is not replaced" in message


def test_other_text_keeps_its_signs():
    config = load_config(DEFAULTS, ["data.prompt_template={question}~", "model.path=a/b-$c"])
    assert (config.data.prompt_template, config.model.path) == ("{question}~", "a/b-$c")


def test_a_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "work" / "here"
    home.mkdir()
    here.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for folder in ("/", "//", "~", "~/", "..", "../..", "runs/../..", str(home), str(tmp_path)):
        message = message_of_overrides(f"run.dir={folder}")
        assert message.startswith("command line: run.dir: expected a folder of its own, not this")
        assert "\n" not in message
    assert "a folder of its own" in message_of_overrides(f"run.dir={tmp_path / 'link'}")
    for folder in ("runs/toy", "~/runs", "../other", str(tmp_path / "x"), ".", str(home / "x")):
        load_config(DEFAULTS, [f"run.dir={folder}"])


# ---------------------------------------------------------------- whom an error blames


def test_each_line_names_its_source(file):
    file.write_text("train: {stps: 3, seed: x}\nlog: {samples_per_step: -1}\nrecipe: {a: b}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["train.setps=4", "optim.lr=fast", "log.samples_per_step=2", "steps=5"])
    assert str(caught.value).splitlines() == [
        "command line: override 'steps=5': expected section.key=value; "
        "did you mean 'train.steps=5'?",
        f"{file}: unknown section 'recipe'; did you mean 'recipes'?",
        f"{file}: unknown key train.stps; did you mean 'steps'?",
        "command line: unknown key train.setps; did you mean 'steps'?",
        f"{file}: train.seed: expected a whole number, found 'x'",
        "command line: optim.lr: expected a number, found 'fast'",
    ]


def test_of_two_keys_the_later_one_is_blamed(file):
    expected = "rollout.prompts_per_step: expected a multiple of train.updates_per_rollout (3)"
    assert message_of(file, "train: {updates_per_rollout: 3}").startswith(f"{file}: {expected}")
    file.write_text("train: {updates_per_rollout: 4}")
    with pytest.raises(ConfigError, match="^command line: rollout.prompts_per_step: .*found 3$"):
        load_config(file, ["rollout.prompts_per_step=3"])
    message = message_of_overrides("rollout.max_new_tokens=9", "algo.overlong_buffer=10")
    assert message.startswith("command line: algo.overlong_buffer: expected at most")


def test_a_key_of_another_section_is_named():
    assert "unknown key train.lr; did you mean 'optim.lr'?" in message_of_overrides("train.lr=1")
    assert "'toy.seed' or 'train.seed'" in message_of_overrides("data.seed=1")
    assert "'toy.seed=1' or 'train.seed=1'" in message_of_overrides("seed=1")


def test_an_unknown_algorithm_is_one_line(file):
    expected = "algo.name: no recipe 'grop'; did you mean 'grpo'?"
    assert message_of_overrides("algo.name=grop") == f"command line: {expected}"
    assert message_of(file, "algo: {name: grop}") == f"{file}: {expected}"
    assert message_of(file, "algo: {name: 3}").startswith(f"{file}: algo.name: no recipe 3; known:")
    # A resolved config holds the recipe of another algorithm.
    file.write_text(load_config().to_yaml())
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["algo.name=grop", "algo.klx=1", "algo.clip_low=x"])
    assert str(caught.value).splitlines() == [
        f"command line: {expected}",
        "command line: unknown key algo.klx; did you mean 'kl'?",
        "command line: algo.clip_low: expected a number, found 'x'",
    ]


def test_a_recipe_of_no_algorithm_is_no_silent_setting(file):
    message = message_of_overrides("recipes.gsop.kl=0", "algo.name=gspo")
    assert message == "command line: unknown recipe 'gsop'; did you mean 'gspo'?"
    message = message_of(file, "recipes: {grpo: {klx: 1, kl: x}}")
    assert message.splitlines() == [
        f"{file}: unknown key recipes.grpo.klx; did you mean 'kl'?",
        f"{file}: algo.kl: expected a number, found 'x'",
    ]


# ---------------------------------------------------------------- arguments


def test_arguments_are_a_file_and_overrides():
    overrides = ["train.steps=3", "run.dir=", "data.prompt_template={question} = ?"]
    assert split_arguments(["c.yaml", *overrides]) == ("c.yaml", overrides)
    assert split_arguments([*overrides, "c.yaml"]) == ("c.yaml", overrides)
    for name in ("train.yaml", "data.yml", "/x/config", "runs/toy/config.yaml"):
        assert split_arguments([name]) == (name, [])


@pytest.mark.parametrize(
    "arguments, at_fault, advice",
    [
        ("c.yaml algo.name gspo", "algo.name", "write algo.name=gspo"),
        ("algo.name gspo c.yaml", "algo.name", "write algo.name=gspo"),
        ("algo.name gspo", "algo.name", "write algo.name=gspo"),
        ("c.yaml algo.name = gspo", "algo.name", "write algo.name=gspo"),
        ("c.yaml algo.name =gspo", "algo.name", "write algo.name=gspo"),
        ("c.yaml algo.name= gspo", "algo.name=", "write algo.name=gspo"),
        ("c.yaml algo.name", "algo.name", "write algo.name=VALUE"),
        ("algo.name c.yaml", "algo.name", "write algo.name=VALUE"),
        ("c.yaml recipes.gspo.kl 0", "recipes.gspo.kl", "write recipes.gspo.kl=0"),
        ("c.yaml train.steps optim.lr=1", "train.steps", "write train.steps=VALUE"),
        ("c.yaml --algo.name=gspo", "--algo.name=gspo", "write algo.name=gspo"),
        ("c.yaml --algo.name gspo", "--algo.name", "write algo.name=gspo"),
        ("c.yaml --resume", "--resume", "there are no options with dashes"),
        ("c.yaml gspo", "gspo", "the config file is c.yaml already"),
        ("gspo c.yaml", "gspo", "the config file is c.yaml already"),
        ("a.yaml b.yaml", "b.yaml", "the config file is a.yaml already"),
    ],
)
def test_the_argument_at_fault_is_named(arguments, at_fault, advice):
    with pytest.raises(ConfigError) as caught:
        split_arguments(arguments.split())
    expected = f"command line: {at_fault!r}: expected section.key=value; {advice}"
    assert str(caught.value) == expected


def test_a_config_file_is_needed():
    for arguments in ([], ["train.steps=3"]):
        with pytest.raises(ConfigError, match="^command line: no config file; expected one"):
            split_arguments(arguments)


@given(st.lists(st.sampled_from(["c.yaml", "algo.name", "=", "gspo", "-", "--x=", "a.b=c", ""])))
def test_any_arguments_are_split_or_refused(arguments):
    try:
        file, overrides = split_arguments(arguments)
    except ConfigError as error:
        assert str(error).startswith("command line: ") and "\n" not in str(error)
    else:
        assert sorted([file, *overrides]) == sorted(arguments)


# ---------------------------------------------------------------- any text

PIECES = st.sampled_from(
    ["train", "steps", "algo", "name", "recipes", "gspo", "run", "dir", "optim", "lr", "dyco"]
    + ["layers", "data", "path", ": ", ":\n  ", "\n", "\n- ", "{", "}", "[", "]", ", ", "&a ", "*a"]
    + ["0120", "1:30", "0x1F", "1e400", ".inf", ".nan", "~", "~/x", "null", "true", "'", '"', "? "]
    + ["!!int ", "!!float ", "!!bool ", "!!null ", "!!set ", "!!omap ", "!!pairs ", "!!binary "]
    + [
        "!!timestamp ",
        "!!str ",
        "!!seq ",
        "!!map ",
        "!x ",
        "<<",
        "=",
        "|\n ",
        ">\n ",
        "#",
        "%",
        "\0",
    ]
    + [
        "\\0",
        "\\ud800",
        "\ud800",
        "\t",
        "\x85",
        "\u2028",
        "\ufeff",
        "é",
        "---\n",
        "...\n",
        "@",
        "`",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TEXTS, st.lists(TEXTS, max_size=2))
@example("run: {dir: '/'}", ["run.dir=~"])
@example("algo: {name: !!int ''}", ["=", "."])
def test_any_small_text_loads_or_is_refused(tmp_path, text, overrides):
    file = tmp_path / "any.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = load_config(file, overrides)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith((f"{file}: ", f"{COMMAND_LINE}: "))
        return
    file.write_text(config.to_yaml(), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_config(file) == config
