"""config.py: config.yaml as typed, strict dataclasses.

The file is the documentation: every key has its meaning and the paper's value there. Here stand the types. An unknown
key, a wrong type or a value out of range is a ConfigError that names the key, what was found and what was expected.
"""

import difflib
import math
import re
import types
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

DEFAULTS = Path(__file__).with_name("config.yaml")


class ConfigError(ValueError):
    """A config file or an override that cannot be used."""


@dataclass(frozen=True)
class Run:
    dir: str


@dataclass(frozen=True)
class Model:
    path: str
    dtype: Literal["auto", "float32", "bfloat16"]
    attention: Literal["sdpa", "eager"]
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
    max_prompt_tokens: int
    max_pixels: int


@dataclass(frozen=True)
class Toy:
    level: int
    seed: int
    train_size: int
    eval_size: int
    cache_dir: str


@dataclass(frozen=True)
class Algo:
    """`name`, `max_refills`, and the recipe of that name; with max_new_tokens, the `settings` of rl_algos.policy_loss."""

    name: str
    max_refills: int
    clip_low: float
    clip_high: float
    kl: float
    scale: Literal["std", "none"]
    mask_truncated: bool
    dynamic_sampling: bool
    overlong_buffer: int
    overlong_weight: float
    temperature_pos: float
    temperature_neg: float


@dataclass(frozen=True)
class Dyco:
    enabled: bool
    rule: str
    alpha: float
    tau: float
    ratio: str
    shift: str
    text_scope: Literal["after_image", "all"]
    layers: list[int]
    capture: Literal["rollout", "scoring"]


@dataclass(frozen=True)
class Reward:
    accuracy_weight: float
    format_weight: float
    custom: str | None
    custom_weight: float
    custom_timeout: float
    custom_on_error: Literal["raise", "zero"]


@dataclass(frozen=True)
class Rollout:
    prompts_per_step: int
    group_size: int
    max_new_tokens: int
    temperature: float
    max_cache_tokens: int


@dataclass(frozen=True)
class Train:
    steps: int
    seed: int
    updates_per_rollout: int
    micro_batch_tokens: int
    old_logprobs: Literal["auto", "rollout", "scored"]
    profile_steps: int
    threads: int


@dataclass(frozen=True)
class Optim:
    lr: float
    weight_decay: float
    warmup_steps: int
    grad_clip: float


@dataclass(frozen=True)
class Eval:
    every: int
    samples: int
    swapped: bool


@dataclass(frozen=True)
class Checkpoint:
    every: int
    keep_last: int


@dataclass(frozen=True)
class Log:
    samples_per_step: int
    tensorboard: bool


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


# ------------------------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """SafeLoader in which on, off, yes and no are words, and a key given twice is an error instead of the last one."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    keys = [key.value for key, _ in node.value]
    for key, _ in node.value:
        if keys.count(key.value) > 1:
            raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF")
)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (
        OSError,
        UnicodeDecodeError,
        yaml.YAMLError,
        ConfigError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected sections with keys (section: {{key: value}}), found {str(tree)[:60]!r}"
        )
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise ConfigError(
                f"{path}: section {section!r}: expected keys with values below it, found {keys!r:.60}"
            )
    return tree


def _nearest(name: str, known) -> str:
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _parse(text: str, wanted: Any) -> Any:
    """The value of an override, whose type is known: text needs no quotes there."""
    if wanted is str:
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ConfigError, TypeError, ValueError, RecursionError):
        return text


def _convert(value: Any, wanted: Any, key: str) -> Any:
    """`value` as the annotated type, or a ConfigError. YAML reads 1e-4 as text and 1 as an integer; both are floats."""

    def refuse(expected: str):
        raise ConfigError(f"{key}: expected {expected}, found {value!r}")

    if get_origin(wanted) is Literal:
        return (
            value if value in get_args(wanted) else refuse("one of " + ", ".join(get_args(wanted)))
        )
    if get_origin(wanted) in (Union, types.UnionType):
        inner = next(t for t in get_args(wanted) if t is not type(None))
        return None if value is None else _convert(value, inner, key)
    if get_origin(wanted) is list:
        inner = get_args(wanted)[0]
        return (
            [_convert(v, inner, key) for v in value]
            if isinstance(value, list)
            else refuse(f"a list of {inner.__name__}")
        )
    if wanted is float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                refuse("a number")
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            refuse("a finite number")
        return float(value)
    if wanted is int and isinstance(value, bool) or not isinstance(value, wanted):
        refuse({int: "a whole number", str: "text", bool: "true or false"}[wanted])
    return value


def load_config(path: str | Path = DEFAULTS, overrides: list[str] = ()) -> Config:
    """Read a YAML file over the defaults in config.yaml, then apply overrides of the form section.key=value.

    Raises ConfigError with every problem found, one per line.
    """
    path = Path(path)
    trees = (
        [_read(DEFAULTS)]
        if path.resolve() == DEFAULTS.resolve()
        else [_read(DEFAULTS), _read(path)]
    )
    problems, command_line, sections = [], {}, get_type_hints(Config)
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            problems.append(f"override {text!r}: expected section.key=value")
        else:
            wanted = get_type_hints(sections[section]).get(name) if section in sections else None
            command_line.setdefault(section, {})[name] = _parse(value, wanted)
    trees.append(command_line)

    merged: dict[str, dict] = {name: {} for name in (*sections, "recipes")}
    recipe_keys = [key for key in get_type_hints(Algo) if key not in ("name", "max_refills")]
    for tree in trees:
        for section, values in tree.items():
            if section not in merged:
                problems.append(f"unknown section {section!r}; {_nearest(section, sections)}")
            elif section == "recipes":
                for name, recipe in values.items():  # recipes.gspo.kl=0 arrives as {"gspo.kl": 0}
                    name, dot, key = str(name).partition(".")
                    recipe = {key: recipe} if dot else recipe
                    if not isinstance(recipe, dict):
                        problems.append(
                            f"recipes.{name}: expected keys and values, found {recipe!r}"
                        )
                    else:
                        merged["recipes"].setdefault(name, {}).update(recipe)
            else:
                if section == "algo" and values.get("name", merged["algo"].get("name")) != merged[
                    "algo"
                ].get("name"):
                    # another algorithm: what an earlier file, such as a run's resolved config, took from its recipe is void
                    merged["algo"] = {
                        key: value
                        for key, value in merged["algo"].items()
                        if key not in recipe_keys
                    }
                merged[section].update(values)

    recipes, name = merged.pop("recipes"), str(merged["algo"].get("name"))
    for other, recipe in recipes.items():
        problems += [
            f"unknown key recipes.{other}.{key}; {_nearest(key, recipe_keys)}"
            for key in recipe
            if key not in recipe_keys
        ]
    if name not in recipes:
        problems.append(f"algo.name: no recipe {name!r}; {_nearest(name, recipes)}")
    merged["algo"] = {**recipes.get(name, {}), **merged["algo"]}

    built = {}
    for section, kind in sections.items():
        hints = get_type_hints(kind)
        for key in merged[section]:
            if key not in hints:
                problems.append(f"unknown key {section}.{key}; {_nearest(key, hints)}")
        values = {}
        for key, wanted in hints.items():
            try:
                if key not in merged[section]:
                    raise ConfigError(f"missing key {section}.{key}")
                values[key] = _convert(merged[section][key], wanted, f"{section}.{key}")
            except ConfigError as error:
                problems.append(str(error))
        built[section] = kind(**values) if len(values) == len(hints) else None
    if not problems:
        config = Config(**built)
        problems += _out_of_range(config)
    if problems:
        raise ConfigError(f"{path}: " + "\n".join(problems))
    if (
        config.dyco.enabled
        and config.dyco.rule.startswith("signed")
        and config.dyco.alpha > 1 / math.e
    ):
        warnings.warn(
            f"dyco.alpha {config.dyco.alpha} with dyco.rule {config.dyco.rule}: above 1/e = 0.37 a weight can turn a "
            "punishment into a reward",
            stacklevel=2,
        )
    if (
        config.dyco.enabled
        and config.dyco.text_scope == "after_image"
        and config.data.prompt_template.split("{question}")[0].strip()
    ):
        warnings.warn(
            "data.prompt_template has text before {question}: with dyco.text_scope after_image, text before the first "
            "image does not count as text",
            stacklevel=2,
        )
    return config


def _out_of_range(c: Config) -> list[str]:
    """What types cannot say: ranges, names that live in tables, keys that must fit together."""
    import dyco
    import rl_algos
    import toy

    problems = []

    def need(ok: bool, key: str, expected: str) -> None:
        if not ok:
            section, name = key.split(".")
            problems.append(
                f"{key}: expected {expected}, found {getattr(getattr(c, section), name)!r}"
            )

    for key in (
        "data.max_prompt_tokens",
        "data.max_pixels",
        "toy.train_size",
        "toy.eval_size",
        "rollout.prompts_per_step",
        "rollout.max_new_tokens",
        "rollout.max_cache_tokens",
        "train.updates_per_rollout",
        "train.micro_batch_tokens",
        "eval.every",
        "eval.samples",
        "checkpoint.every",
        "checkpoint.keep_last",
    ):
        section, name = key.split(".")
        need(getattr(getattr(c, section), name) >= 1, key, "a whole number of at least 1")
    for key in (
        "algo.kl",
        "algo.max_refills",
        "algo.clip_low",
        "algo.clip_high",
        "algo.overlong_buffer",
        "algo.overlong_weight",
        "dyco.alpha",
        "dyco.tau",
        "reward.accuracy_weight",
        "reward.format_weight",
        "train.steps",
        "train.threads",
        "train.profile_steps",
        "optim.lr",
        "optim.weight_decay",
        "optim.warmup_steps",
        "log.samples_per_step",
    ):
        section, name = key.split(".")
        need(getattr(getattr(c, section), name) >= 0, key, "0 or more")
    for key in (
        "rollout.temperature",
        "reward.custom_timeout",
        "algo.temperature_pos",
        "algo.temperature_neg",
        "optim.grad_clip",
    ):
        section, name = key.split(".")
        need(getattr(getattr(c, section), name) > 0, key, "more than 0")
    need(c.reward.custom_timeout <= 1e6, "reward.custom_timeout", "at most 1e6 seconds")
    need(
        c.rollout.group_size >= 2,
        "rollout.group_size",
        "at least 2: the advantage compares responses of a group",
    )
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
    need(c.toy.level in toy.LEVELS, "toy.level", f"one of {', '.join(map(str, toy.LEVELS))}")
    need(
        bool(c.run.dir.strip()) and Path(c.run.dir).resolve() != DEFAULTS.parent.resolve(),
        "run.dir",
        "a folder of its own",
    )
    need(bool(c.dyco.layers), "dyco.layers", "at least one decoder layer")
    for key, table in (
        ("dyco.rule", dyco.RULES),
        ("dyco.ratio", dyco.RATIOS),
        ("dyco.shift", dyco.SHIFTS),
        ("algo.name", rl_algos.ALGORITHMS),
    ):
        section, name = key.split(".")
        value = getattr(getattr(c, section), name)
        need(value in table, key, f"one of {', '.join(table)}")
    return problems
