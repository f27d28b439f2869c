"""config.py: strict, typed, with recipes; and config.yaml, which is the documentation."""

import re
from dataclasses import asdict

import pytest
import yaml

from config import DEFAULTS, ConfigError, load_config


def test_defaults_load_and_round_trip(tmp_path):
    config = load_config()
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    assert config.dyco.alpha == 0.2 and config.dyco.tau == 0.05 and config.dyco.rule == "paper"


def test_the_3b_file_is_complete_but_for_the_data():
    config = load_config(DEFAULTS.with_name("config_3b.yaml"), ["data.path=rows.jsonl"])
    assert (
        config.model.path == "Qwen/Qwen2.5-VL-3B-Instruct"
        and config.optim.lr == 1e-6
        and config.dyco == load_config().dyco
    )


@pytest.mark.parametrize(
    "name, low, high, kl",
    [
        ("grpo", 0.2, 0.2, 0.04),
        ("dapo", 0.2, 0.28, 0.0),
        ("gspo", 3e-4, 4e-4, 0.001),
        ("sapo", 0.2, 0.2, 0.001),
    ],
)
def test_recipe_follows_the_name(name, low, high, kl):
    algo = load_config(DEFAULTS, [f"algo.name={name}"]).algo
    assert (algo.clip_low, algo.clip_high, algo.kl) == (low, high, kl)
    assert algo.dynamic_sampling == algo.mask_truncated == (name == "dapo")
    assert (algo.temperature_pos, algo.temperature_neg) == (1.0, 1.05)
    assert algo.kl_cap == 10


def test_a_key_under_algo_wins_over_the_recipe(tmp_path):
    assert load_config(DEFAULTS, ["algo.name=gspo", "algo.kl=0"]).algo.kl == 0.0
    assert load_config(DEFAULTS, ["recipes.grpo.kl=0.5"]).algo.kl == 0.5
    (tmp_path / "mine.yaml").write_text("algo: {name: dapo, clip_high: 0.3}\ntrain: {steps: 7}\n")
    mine = load_config(tmp_path / "mine.yaml")
    assert (mine.algo.clip_high, mine.algo.clip_low, mine.train.steps) == (0.3, 0.2, 7)
    assert mine.optim == load_config().optim  # what a file leaves out is as in config.yaml


def test_a_recipe_of_ones_own(tmp_path):
    recipe = dict(asdict(load_config().algo))
    del recipe["name"], recipe["max_refills"]
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"algo": {"name": "dapo"}, "recipes": {"dapo": recipe | {"kl": 0.5}}})
    )
    assert load_config(tmp_path / "mine.yaml").algo.kl == 0.5


def test_numbers_and_switches_as_people_write_them():
    config = load_config(
        DEFAULTS,
        [
            "optim.lr=1e-5",
            "optim.weight_decay=0",
            "model.compile=on",
            "dyco.layers=[0, -1]",
            "data.image_root=/some/where",
            "data.eval_path=null",
        ],
    )
    assert (
        config.optim.lr == 1e-5
        and config.optim.weight_decay == 0.0
        and config.model.compile == "on"
    )
    assert (
        config.dyco.layers == [0, -1]
        and config.data.image_root == "/some/where"
        and config.data.eval_path is None
    )


def test_words_that_yaml_takes_for_something_else(tmp_path):
    """off is a rule and a setting, not False; a folder may be called 2024.

    Braces are no mapping.
    """
    config = load_config(
        DEFAULTS,
        ["dyco.rule=off", "model.compile=off", "run.dir=2024", "data.prompt_template={question}"],
    )
    assert (config.dyco.rule, config.model.compile, config.run.dir) == ("off", "off", "2024")
    assert config.data.prompt_template == "{question}"
    (tmp_path / "mine.yaml").write_text("dyco: {rule: off, enabled: true}\nmodel: {compile: on}\n")
    assert (
        load_config(tmp_path / "mine.yaml").dyco.rule == "off"
        and load_config(tmp_path / "mine.yaml").model.compile == "on"
    )


def test_another_algorithm_over_a_resolved_config_brings_its_recipe(tmp_path):
    (tmp_path / "run.yaml").write_text(load_config(DEFAULTS, ["algo.kl=0.5"]).to_yaml())
    assert load_config(tmp_path / "run.yaml").algo.kl == 0.5
    assert (
        load_config(tmp_path / "run.yaml", ["algo.name=dapo"]).algo
        == load_config(DEFAULTS, ["algo.name=dapo"]).algo
    )
    assert load_config(tmp_path / "run.yaml", ["algo.name=dapo", "algo.kl=0.1"]).algo.kl == 0.1


def test_warnings_about_settings_that_surprise():
    with pytest.warns(UserWarning, match="above 1/e"):
        load_config(DEFAULTS, ["dyco.rule=signed", "dyco.alpha=0.9"])
    with pytest.warns(UserWarning, match=r"text before \{question\}"):
        load_config(DEFAULTS, ["data.prompt_template=Look: {question}"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("recipes.gspo.klx=3", r"unknown key recipes\.gspo\.klx; did you mean 'kl'\?"),
        ("recipes.gspo=3", r"recipes\.gspo: expected keys and values, found 3"),
        ("algo.nme=gspo", r"unknown key algo\.nme; did you mean 'name'\?"),
        ("tran.steps=3", r"unknown section 'tran'; did you mean 'train'\?"),
        ("train.steps=many", r"train\.steps: expected a whole number, found 'many'"),
        ("train.steps=1.5", r"train\.steps: expected a whole number, found 1\.5"),
        ("train.steps=true", r"train\.steps: expected a whole number, found True"),
        ("optim.lr=fast", r"optim\.lr: expected a number, found 'fast'"),
        ("optim.lr=nan", r"optim\.lr: expected a finite number, found"),
        ("optim.lr=-1", r"optim\.lr: expected 0 or more, found -1\.0"),
        ("dyco.enabled=1", r"dyco\.enabled: expected true or false, found 1"),
        ("dyco.rule=papr", r"dyco\.rule: expected one of off, paper.*found 'papr'"),
        ("dyco.layers=3", r"dyco\.layers: expected a list of int, found 3"),
        ("dyco.layers=[]", r"dyco\.layers: expected at least one decoder layer"),
        (
            "model.dtype=float16",
            r"model\.dtype: expected one of auto, float32, bfloat16, found 'float16'",
        ),
        ("algo.name=grop", r"algo\.name: no recipe 'grop'; did you mean 'grpo'\?"),
        ("rollout.group_size=1", r"rollout\.group_size: expected at least 2"),
        (
            "train.updates_per_rollout=3",
            r"rollout\.prompts_per_step: expected a multiple of "
            r"train\.updates_per_rollout \(3\), found 16",
        ),
        ("rollout.temperature=0", r"rollout\.temperature: expected more than 0"),
        ("data.prompt_template=Hello", r"data\.prompt_template: expected text with \{question\}"),
        ("run.dir=", r"run\.dir: expected a folder of its own, found ''"),
        (
            f"run.dir={DEFAULTS.parent}",
            r"run\.dir: expected a folder of its own",
        ),  # whose config.yaml would be replaced
        ("toy.level=9", r"toy\.level: expected one of 1, 2, 3, found 9"),
        ("train=3", r"override 'train=3': expected section\.key=value"),
        ("steps", r"override 'steps': expected section\.key=value"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(DEFAULTS, [override])


def test_groups_are_not_dropped_by_an_accuracy_that_does_not_count():
    with pytest.raises(
        ConfigError,
        match=r"algo\.dynamic_sampling: expected false where reward\.accuracy_weight is 0",
    ):
        load_config(DEFAULTS, ["algo.name=dapo", "reward.accuracy_weight=0"])


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(DEFAULTS, ["train.steps=x", "optim.lr=y", "nothing.at=all"])
    assert all(part in str(caught.value) for part in ("train.steps", "optim.lr", "'nothing'"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("train: {steps: 1, steps: 2}", "line 1: key 'steps' is given twice"),
        ("- a\n- b", "expected sections with keys"),
        ("train: 3", "section 'train': expected keys with values below it, found 3"),
        ("log:", "section 'log': expected keys with values below it, found None"),
        ("train: [", "while parsing"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_broken_files(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "absent.yaml")


def test_every_key_has_a_line_and_a_meaning():
    """config.yaml is the only documentation of the keys: one line each, with a comment."""
    blocks = dict(
        re.findall(r"^(\w+):[^\n]*\n((?:(?: .*)?\n)+)", DEFAULTS.read_text() + "\n", re.MULTILINE)
    )
    blocks["algo"] += blocks.pop("recipes")
    for section, keys in asdict(load_config()).items():
        for key in keys:
            assert re.search(rf"^ +{key}: .*# \S", blocks[section], re.MULTILINE), (
                f"{section}.{key} has no line with a comment"
            )
