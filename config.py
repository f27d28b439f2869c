"""config.py: config.yaml as strict, typed settings.

config.yaml is the documentation and holds the defaults: every key has its meaning and the paper's
value there. Here stand the type and the range of each. An unknown key, a wrong type or a value out
of range is a ConfigError, which names the key, what was found and what was expected.
"""

import math
import re
import types
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

import dyco
import rl_algos
from rows import nearest

DEFAULTS = Path(__file__).with_name("config.yaml")
TOY_LEVELS = (1, 2, 3)  # those of toy.LEVELS; config does not import the toy


class ConfigError(ValueError):
    """A config file or an override that cannot be used."""


class Range(NamedTuple):
    """The numbers that a key may have, `expected` in words."""

    expected: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most and value > self.above


Count = Annotated[int, Range("a whole number of at least 1", least=1)]
WholeNumber = Annotated[int, Range("0 or more", least=0)]
NotNegative = Annotated[float, Range("0 or more", least=0)]
Positive = Annotated[float, Range("more than 0", above=0)]
Seconds = Annotated[float, Range("more than 0 and at most 1e6 seconds", above=0, most=1e6)]
GroupSize = Annotated[
    int, Range("at least 2: the advantage compares responses of a group", least=2)
]


@dataclass(frozen=True)
class Run:
    dir: str


@dataclass(frozen=True)
class Model:
    path: str
    dtype: Literal["auto", "float32", "bfloat16"]
    gradient_checkpointing: bool
    freeze_vision: bool
    compile: Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Data:
    path: str
    image_root: str | None
    eval_path: str | None
    eval_image_root: str | None
    prompt_template: str
    on_error: Literal["raise", "skip"]
    max_prompt_tokens: Count
    max_pixels: Count


@dataclass(frozen=True)
class Toy:
    level: Literal[TOY_LEVELS]
    seed: int
    train_size: Count
    eval_size: Count
    cache_dir: str


@dataclass(frozen=True)
class Algo:
    """`name`, `max_refills`, and the recipe of that name.

    With max_new_tokens they are the `settings` of rl_algos.policy_loss.
    """

    name: Literal[tuple(rl_algos.ALGORITHMS)]
    max_refills: WholeNumber
    clip_low: NotNegative
    clip_high: NotNegative
    kl: NotNegative
    scale: Literal["std", "none"]
    mask_truncated: bool
    dynamic_sampling: bool
    overlong_buffer: WholeNumber
    overlong_weight: NotNegative
    temperature_pos: Positive
    temperature_neg: Positive


@dataclass(frozen=True)
class Dyco:
    enabled: bool
    rule: Literal[tuple(dyco.RULES)]
    alpha: NotNegative
    tau: NotNegative
    ratio: Literal[tuple(dyco.RATIOS)]
    shift: Literal[tuple(dyco.SHIFTS)]
    text_scope: Literal["after_image", "all"]
    layers: list[int]
    capture: Literal["rollout", "scoring"]


@dataclass(frozen=True)
class Reward:
    accuracy_weight: NotNegative
    format_weight: NotNegative
    custom: str | None
    custom_weight: float
    custom_timeout: Seconds
    custom_on_error: Literal["raise", "zero"]


@dataclass(frozen=True)
class Rollout:
    prompts_per_step: Count
    group_size: GroupSize
    max_new_tokens: Count
    temperature: Positive
    max_cache_tokens: Count


@dataclass(frozen=True)
class Train:
    steps: WholeNumber
    seed: int
    updates_per_rollout: Count
    micro_batch_tokens: Count
    old_logprobs: Literal["auto", "rollout", "scored"]
    profile_steps: WholeNumber
    threads: WholeNumber


@dataclass(frozen=True)
class Optim:
    lr: NotNegative
    weight_decay: NotNegative
    warmup_steps: WholeNumber
    grad_clip: Positive


@dataclass(frozen=True)
class Eval:
    every: Count
    samples: Count
    swapped: bool


@dataclass(frozen=True)
class Checkpoint:
    every: Count
    keep_last: Count


@dataclass(frozen=True)
class Log:
    samples_per_step: WholeNumber


@dataclass(frozen=True)
class Config:
    run: Run
    model: Model
    data: Data
    toy: Toy
    algo: Algo
    dyco: Dyco
    reward: Reward
    rollout: Rollout
    train: Train
    optim: Optim
    eval: Eval
    checkpoint: Checkpoint
    log: Log

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True, width=1000)


SECTIONS: dict[str, type] = get_type_hints(Config)
RECIPE_KEYS = tuple(key for key in get_type_hints(Algo) if key not in ("name", "max_refills"))


# ------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """SafeLoader, in which on, off, yes and no are words, and a key given twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ConfigError(f"line {line}: key {key.value!r} is given twice")
        if isinstance(key, yaml.ScalarNode):
            seen.add(key.value)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF")
)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# What PyYAML lets out where a text is no YAML, or names something that is not plain data.
UNREADABLE = (yaml.YAMLError, ConfigError, TypeError, ValueError, RecursionError)


def _read(path: Path) -> dict[str, dict]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, *UNREADABLE) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected sections with keys (section: {{key: value}}), "
            f"found {str(tree)[:60]!r}"
        )
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise ConfigError(
                f"{path}: section {section!r}: expected keys with values below it, "
                f"found {keys!r:.60}"
            )
    return tree


def _read_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, dict]:
    """section.key=value of the command line, as a tree."""
    tree: dict[str, dict] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            problems.append(f"override {text!r}: expected section.key=value")
            continue
        hints = get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
        tree.setdefault(section, {})[name] = _parse(value, hints.get(name))
    return tree


def _parse(text: str, wanted: Any) -> Any:
    """The value of an override. Its type is known, so text needs no quotes."""
    if wanted is str:
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except UNREADABLE:
        return text


# ----------------------------------------------------------------------------- merging and checking


def load_config(path: str | Path = DEFAULTS, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file over the defaults in config.yaml, then apply overrides section.key=value.

    Raises ConfigError with every problem found, one per line.
    """
    path = Path(path)
    problems: list[str] = []
    trees = [_read(DEFAULTS)]
    if path.resolve() != DEFAULTS.resolve():
        trees.append(_read(path))
    trees.append(_read_overrides(overrides, problems))
    sections, recipes = _merge(trees, problems)
    sections["algo"] = _with_recipe(sections["algo"], recipes, problems)
    config = _build(sections, problems)
    if not problems:
        problems += _contradictions(config)
    if problems:
        raise ConfigError(f"{path}: " + "\n".join(problems))
    _warn_of_surprises(config)
    return config


def _merge(trees: list[dict], problems: list[str]) -> tuple[dict[str, dict], dict[str, dict]]:
    """The sections and the recipes of several trees; what a later one says wins."""
    sections: dict[str, dict] = {name: {} for name in SECTIONS}
    recipes: dict[str, dict] = {}
    for tree in trees:
        for section, values in tree.items():
            if section == "recipes":
                _merge_recipes(recipes, values, problems)
            elif section not in sections:
                problems.append(f"unknown section {section!r}; {nearest(section, SECTIONS)}")
            else:
                if section == "algo":
                    _forget_recipe_of_another(sections["algo"], values)
                sections[section].update(values)
    return sections, recipes


def _forget_recipe_of_another(algo: dict, values: dict) -> None:
    """Drop what an earlier file took from the recipe of another algorithm.

    A run's config.yaml is such a file: it holds the whole recipe of its own algorithm.
    """
    if values.get("name", algo.get("name")) == algo.get("name"):
        return
    for key in RECIPE_KEYS:
        algo.pop(key, None)


def _merge_recipes(recipes: dict[str, dict], values: dict, problems: list[str]) -> None:
    for name, recipe in values.items():
        name, dot, key = str(name).partition(".")
        if dot:  # recipes.gspo.kl=0 arrives as {"gspo.kl": 0}
            recipe = {key: recipe}
        if isinstance(recipe, dict):
            recipes.setdefault(name, {}).update(recipe)
        else:
            problems.append(f"recipes.{name}: expected keys and values, found {recipe!r}")


def _with_recipe(algo: dict, recipes: dict[str, dict], problems: list[str]) -> dict:
    """The section `algo` over the recipe that it names, which is over the base of all recipes."""
    base = recipes.get("base", {})
    of_algorithms = {name: recipe for name, recipe in recipes.items() if name != "base"}
    for name, recipe in recipes.items():
        for key in recipe:
            if key not in RECIPE_KEYS:
                problems.append(f"unknown key recipes.{name}.{key}; {nearest(key, RECIPE_KEYS)}")
    name = str(algo.get("name"))
    if name not in of_algorithms:
        problems.append(f"algo.name: no recipe {name!r}; {nearest(name, of_algorithms)}")
    return {**base, **of_algorithms.get(name, {}), **algo}


def _build(sections: dict[str, dict], problems: list[str]) -> Config | None:
    """The typed config, or None where there are problems."""
    built = {}
    for section, kind in SECTIONS.items():
        values = sections[section]
        hints = get_type_hints(kind, include_extras=True)
        for key in values:
            if key not in hints:
                problems.append(f"unknown key {section}.{key}; {nearest(key, hints)}")
        converted = {}
        for key, wanted in hints.items():
            if key not in values:
                problems.append(f"missing key {section}.{key}")
                continue
            try:
                converted[key] = _convert(values[key], wanted, f"{section}.{key}")
            except ConfigError as error:
                problems.append(str(error))
        if len(converted) == len(hints):
            built[section] = kind(**converted)
    return Config(**built) if len(built) == len(SECTIONS) else None


def _convert(value: Any, wanted: Any, key: str) -> Any:
    """`value` as the annotated type. Raises ConfigError."""

    def need(holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: expected {expected}, found {value!r}")

    kind = get_origin(wanted)
    if kind is Annotated:
        base, allowed = get_args(wanted)
        value = _convert(value, base, key)
        need(allowed.holds(value), allowed.expected)
        return value
    if kind is Literal:
        choices = get_args(wanted)
        # True equals 1, and is no level.
        is_choice = any(type(value) is type(choice) and value == choice for choice in choices)
        need(is_choice, "one of " + ", ".join(map(str, choices)))
        return value
    if kind in (Union, types.UnionType):  # with None
        inner = next(t for t in get_args(wanted) if t is not type(None))
        return None if value is None else _convert(value, inner, key)
    if kind is list:
        inner = get_args(wanted)[0]
        need(isinstance(value, list), f"a list of {inner.__name__}")
        return [_convert(item, inner, key) for item in value]
    if wanted is float:
        if isinstance(value, str):  # YAML reads 1e-4 as text
            try:
                value = float(value)
            except ValueError:
                need(False, "a number")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        need(is_number and math.isfinite(value), "a finite number")
        return float(value)
    names = {int: "a whole number", str: "text", bool: "true or false"}
    need(type(value) is wanted, names[wanted])
    return value


def _contradictions(c: Config) -> list[str]:
    """What the type of a single key cannot say."""
    problems = []

    def need(holds: bool, key: str, expected: str) -> None:
        if not holds:
            section, name = key.split(".")
            found = getattr(getattr(c, section), name)
            problems.append(f"{key}: expected {expected}, found {found!r}")

    need(
        c.algo.overlong_buffer <= c.rollout.max_new_tokens,
        "algo.overlong_buffer",
        f"at most rollout.max_new_tokens ({c.rollout.max_new_tokens})",
    )
    need(
        c.rollout.prompts_per_step % c.train.updates_per_rollout == 0,
        "rollout.prompts_per_step",
        f"a multiple of train.updates_per_rollout ({c.train.updates_per_rollout})",
    )
    need(
        c.data.prompt_template.count("{question}") == 1,
        "data.prompt_template",
        "text with {question} in it, once",
    )
    need(
        c.reward.accuracy_weight > 0 or not c.algo.dynamic_sampling,
        "algo.dynamic_sampling",
        "false where reward.accuracy_weight is 0, since it drops groups by accuracy",
    )
    # A run writes its resolved config.yaml into its folder: that must not be this repository's.
    is_repository = Path(c.run.dir).resolve() == DEFAULTS.parent.resolve()
    need(bool(c.run.dir.strip()) and not is_repository, "run.dir", "a folder of its own")
    need(bool(c.dyco.layers), "dyco.layers", "at least one decoder layer")
    return problems


def _warn_of_surprises(c: Config) -> None:
    if not c.dyco.enabled:
        return
    if c.dyco.rule.startswith("signed") and c.dyco.alpha > 1 / math.e:
        warnings.warn(
            f"dyco.alpha {c.dyco.alpha} with dyco.rule {c.dyco.rule}: above 1/e = 0.37 a weight "
            "can turn a punishment into a reward",
            stacklevel=3,
        )
    before_question = c.data.prompt_template.split("{question}")[0]
    if c.dyco.text_scope == "after_image" and before_question.strip():
        warnings.warn(
            "data.prompt_template has text before {question}: with dyco.text_scope after_image, "
            "text before the first image does not count as text",
            stacklevel=3,
        )
