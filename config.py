"""config.py: config.yaml as strict, typed settings.

config.yaml is the documentation and holds the defaults: every key has its meaning and the paper's
value there. Here stand the type and the range of each. An unknown key, a wrong type or a value out
of range is a ConfigError. Each line of it names the file or the command line, the key, what was
found and what was expected.
"""

import math
import os
import re
import reprlib
import types
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

import dyco
import lora
import rl_algos
from rows import nearest

DEFAULTS = Path(__file__).with_name("config.yaml")
COMMAND_LINE = "command line"
TOY_LEVELS = (1, 2, 3)  # those of toy.LEVELS; config does not import the toy
LARGEST_INTEGER = 2**63 - 1  # of a tensor, and of a random generator's seed


class ConfigError(ValueError):
    """A config file or an override that cannot be used."""


class Range(NamedTuple):
    """The numbers that a key may have: `least` or more, more than `above`, in words `expected`.

    At the other end, `most` or less, because of what `why` says.
    """

    expected: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    why: str = ""


class Setting(NamedTuple):
    """A value as it was read, and where: the name of a file, or the command line."""

    value: Any
    source: str


Sections = dict[str, dict[str, Setting]]

HOME = "a leading ~ is the home folder"
PathText = Annotated[str, HOME]
Count = Annotated[int, Range("a whole number of at least 1", least=1)]
WholeNumber = Annotated[int, Range("0 or more", least=0)]
NotNegative = Annotated[float, Range("0 or more", least=0)]
Positive = Annotated[float, Range("more than 0", above=0)]
GroupSize = Annotated[
    int, Range("at least 2: the advantage compares responses of a group", least=2)
]
# An upper bound leaves out what makes the first step fail, and nothing that could work.
Seconds = Annotated[
    float,
    Range("more than 0 and at most 1e6 seconds", above=0, most=1e6, why="a timer takes no more"),
]
LearningRate = Annotated[
    float,
    Range("0 or more", least=0, most=10, why="AdamW moves each weight by about as much a step"),
]
Share = Annotated[
    float, Range("a share of 0 to 1", least=0, most=1, why="it is a share of optim.lr")
]
FLOAT32 = "its products must be float32 numbers"
Weight = Annotated[float, Range("0 or more", least=0, most=1e6, why=FLOAT32)]
SignedWeight = Annotated[float, Range("-1e6 or more", least=-1e6, most=1e6, why=FLOAT32)]
Alpha = Annotated[
    float, Range("0 or more", least=0, most=1000, why="it multiplies every advantage")
]
Rank = Annotated[
    int, Range("0 or more", least=0, most=1024, why="adapters are meant to be of low rank")
]
LoraAlpha = Annotated[float, Range("more than 0", above=0, most=1e6, why=FLOAT32)]
Temperature = Annotated[
    float,
    Range(
        "more than 0, at least 0.001", least=0.001, most=100, why="it divides every log-probability"
    ),
]
Threads = Annotated[
    int, Range("0 or more", least=0, most=1024, why="each is a thread of the system")
]


@dataclass(frozen=True)
class Run:
    dir: PathText
    final_dtype: Literal["source", "float32"]


@dataclass(frozen=True)
class Model:
    path: PathText
    dtype: Literal["auto", "float32", "bfloat16"]
    gradient_checkpointing: bool
    freeze_vision: bool
    compile: Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Lora:
    """The `settings` of lora.add."""

    rank: Rank
    alpha: LoraAlpha
    targets: list[str]


@dataclass(frozen=True)
class Data:
    path: PathText
    image_root: PathText | None
    eval_path: PathText | None
    eval_image_root: PathText | None
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
    cache_dir: PathText


@dataclass(frozen=True)
class Algo:
    """`name`, `max_refills`, and the recipe of that name.

    With max_new_tokens they are the `settings` of rl_algos.policy_loss.
    """

    name: Literal[tuple(rl_algos.ALGORITHMS)]
    max_refills: WholeNumber
    clip_low: NotNegative
    clip_high: NotNegative
    kl: Weight
    kl_cap: Weight
    scale: Literal["std", "none"]
    mask_truncated: bool
    dynamic_sampling: bool
    overlong_buffer: WholeNumber
    overlong_weight: Weight
    temperature_pos: Temperature
    temperature_neg: Temperature


@dataclass(frozen=True)
class Dyco:
    enabled: bool
    rule: Literal[tuple(dyco.RULES)]
    control: Literal[tuple(dyco.CONTROLS)]
    alpha: Alpha
    tau: NotNegative
    ratio: Literal[tuple(dyco.RATIOS)]
    shift: Literal[tuple(dyco.SHIFTS)]
    text_scope: Literal["after_image", "all"]
    layers: list[int]
    capture: Literal["rollout", "scoring"]


@dataclass(frozen=True)
class Reward:
    accuracy_weight: Weight
    format_weight: Weight
    custom: PathText | None
    custom_weight: SignedWeight
    custom_timeout: Seconds
    custom_on_error: Literal["raise", "zero"]


@dataclass(frozen=True)
class Rollout:
    prompts_per_step: Count
    group_size: GroupSize
    max_new_tokens: Count
    temperature: Temperature
    max_cache_tokens: Count
    graphs: Literal["auto", "off"]


@dataclass(frozen=True)
class Train:
    steps: WholeNumber
    seed: int
    updates_per_rollout: Count
    micro_batch_tokens: Count
    old_logprobs: Literal["auto", "rollout", "scored"]
    profile_steps: WholeNumber
    threads: Threads


@dataclass(frozen=True)
class Optim:
    lr: LearningRate
    weight_decay: Weight
    warmup_steps: WholeNumber
    schedule: Literal["constant", "linear", "cosine"]
    floor: Share
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
    lora: Lora
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


def _nearest_key(section: str, key: str) -> str:
    """A hint for a key that its section does not have: one of another section, or a near one."""
    elsewhere = _sections_with(key)
    if elsewhere:
        return "did you mean " + " or ".join(repr(f"{other}.{key}") for other in elsewhere) + "?"
    return nearest(key, get_type_hints(SECTIONS[section]))


def _sections_with(key: str) -> list[str]:
    return [section for section, kind in SECTIONS.items() if key in get_type_hints(kind)]


SHORT = reprlib.Repr()
SHORT.maxlevel = 3
SHORT.maxstring = 100
SHORT.maxother = 100


def _show(value: Any) -> str:
    """repr() of a value that may be huge, deep, or hold itself: YAML's aliases allow all three."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"


def _name(key: Any) -> str:
    """A key for an error message, short and on one line whatever the file held."""
    if isinstance(key, str) and len(key) <= 300:
        return key if key.isprintable() else repr(key)
    return _show(key)


# ---------------------------------------------------------------------------------- reading a file


class _Loader(yaml.SafeLoader):
    """SafeLoader, without the readings of YAML 1.1 that surprise.

    on, off, yes, no and dates are text. A key that is given twice is an error, and so is a number
    that YAML would take for an octal one (0120 is 80) or for one of base 60 (1:30 is 90).
    """

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                problem="found a list or a mapping as a key; expected a word",
                problem_mark=key.start_mark,
            )
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
            )
        seen.add(key.value)
    return dict(loader.construct_pairs(node, deep=True))


class _UnclearNumber(yaml.constructor.ConstructorError):
    """A number that YAML 1.1 reads otherwise than people do."""


def _clear_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """The number that a scalar stands for, where people and YAML 1.1 read it alike."""
    text = str(node.value)
    is_integer = node.tag == "tag:yaml.org,2002:int"
    value = loader.construct_yaml_int(node) if is_integer else loader.construct_yaml_float(node)
    problem = None
    if ":" in text:
        problem = f"{text} would be read in base 60, as {value}; write {value}"
    elif is_integer and re.fullmatch(r"[-+]?0[0-7_]+", text):
        sign = "-" if text.startswith("-") else ""
        digits = text.lstrip("+-0_") or "0"
        problem = (
            f"{text} begins with 0 and would be read in base 8, as {value}; write {sign}{digits}"
        )
    if problem is not None:
        problem += f", or '{text}' in quotes if it is text"
        raise _UnclearNumber(problem=problem, problem_mark=node.start_mark)
    return value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF")
)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _clear_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _clear_number)


def _load_yaml(text: str) -> Any:
    """What a YAML text stands for. Raises ConfigError, of one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        parts = [part for part in (error.context, error.problem) if part]
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        message = line + ", ".join(parts)
    except RecursionError:
        message = "it is nested too deeply"
    # A character that YAML forbids. And PyYAML lets out whatever it stumbles over where a scalar
    # does not fit the tag that it was given, as in "!!int x".
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
    raise ConfigError(_name(message[:300])) from None


def _read(path: Path, source: str) -> dict[str, dict]:
    """The sections of a config file, not yet checked. Raises ConfigError."""
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such config file") from None
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source}: expected sections with keys (section: {{key: value}}), found {_show(tree)}"
        )
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise ConfigError(
                f"{source}: section {_show(section)}: expected keys with values below it, "
                f"found {_show(keys)}"
            )
    return tree


# -------------------------------------------------------------------------------- the command line


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(config file, overrides) of a command line: one argument without "=", and any with it.

    Raises ConfigError, which names the argument at fault and how to write it.

    >>> split_arguments(["config.yaml", "train.steps=3"])
    ('config.yaml', ['train.steps=3'])
    """
    # One mistake is enough: it decides what the arguments after it are taken for.
    for place, argument in enumerate(arguments):
        advice = _how_to_write(list(arguments), place)
        if advice:
            raise ConfigError(
                f"{COMMAND_LINE}: {_show(argument)}: expected section.key=value; {advice}"
            )
    overrides = [argument for argument in arguments if "=" in argument]
    others = [argument for argument in arguments if "=" not in argument]
    if not others:
        raise ConfigError(f"{COMMAND_LINE}: no config file; expected one, such as config.yaml")
    file = next((other for other in others if other.endswith((".yaml", ".yml"))), others[0])
    others.remove(file)
    if others:
        raise ConfigError(
            f"{COMMAND_LINE}: {_show(others[0])}: expected section.key=value; "
            f"the config file is {_name(file)} already"
        )
    return file, overrides


def _how_to_write(arguments: list[str], place: int) -> str:
    """What to write instead of an argument that is no file and no override, or ""."""
    argument = arguments[place].lstrip("-")
    has_dashes = argument != arguments[place]
    key = argument.removesuffix("=")
    if has_dashes and "=" in argument[:-1]:
        return f"write {argument}"
    if not _names_a_key(key):
        return "there are no options with dashes" if has_dashes else ""
    # "algo.name gspo", "algo.name =gspo", "algo.name = gspo" and "algo.name= gspo"
    following = arguments[place + 1 : place + 3]
    value = "".join(following if following[:1] == ["="] else following[:1]).lstrip("=")
    if not value or "=" in value or value.endswith((".yaml", ".yml")):
        # "algo.name=" is an override, with an empty value.
        return "" if argument.endswith("=") else f"write {key}=VALUE"
    return f"write {key}={value}"


def _names_a_key(argument: str) -> bool:
    """Whether it reads as section.key, and is no file such as train.yaml."""
    section, dot, key = argument.partition(".")
    if not dot or section not in (*SECTIONS, "recipes") or "=" in argument:
        return False
    return not key.endswith(("yaml", "yml")) and not os.path.exists(argument)


def _read_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, dict]:
    """section.key=value of the command line, as a tree."""
    tree: dict[str, dict] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            hint = _missing_section(section, value) if equals else ""
            problems.append(
                f"{COMMAND_LINE}: override {_show(text)}: expected section.key=value{hint}"
            )
            continue
        hints = get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
        try:
            tree.setdefault(section, {})[name] = _parse(value, hints.get(name))
        except ConfigError as error:
            problems.append(f"{COMMAND_LINE}: {_name(section)}.{_name(name)}: {error}")
    return tree


def _missing_section(key: str, value: str) -> str:
    """A hint for key=value without a section."""
    whole = [repr(f"{section}.{key}={value}") for section in _sections_with(key)]
    return f"; did you mean {' or '.join(whole)}?" if whole else ""


def _parse(text: str, wanted: Any) -> Any:
    """The value of an override. Its type is known, so text needs no quotes.

    Raises ConfigError for a number that can be misread.
    """
    if wanted is str:
        return text
    may_be_text = str in get_args(wanted) and get_origin(wanted) is not list  # text or null
    try:
        value = yaml.load(text, Loader=_Loader)
    except _UnclearNumber as error:
        if may_be_text:
            return text
        raise ConfigError(error.problem) from None
    # Whatever is no YAML is text, and the type of its key will say what was expected.
    except Exception:
        return text
    return text if may_be_text and value is not None and not isinstance(value, str) else value


# ----------------------------------------------------------------------------- merging and checking


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """`load_config` of a file that a run wrote, whose rule may have a name of earlier versions."""
    rule = _read(Path(path), _name(str(path))).get("dyco", {}).get("rule")
    now = []
    if isinstance(rule, str) and rule in dyco.FORMER_NAMES:
        name, control = dyco.FORMER_NAMES[rule]
        now = [f"dyco.rule={name}", f"dyco.control={control}"]
    return load_config(path, [*now, *overrides])


def load_config(path: str | Path = DEFAULTS, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file over the defaults in config.yaml, then apply overrides section.key=value.

    Raises ConfigError with every problem found, one per line.
    """
    path = Path(path)
    problems: list[str] = []
    # config.yaml itself is read once, and called by the name that the user gave.
    is_default = os.path.realpath(path) == os.path.realpath(DEFAULTS)
    trees = []  # (source, tree)
    for file in [path] if is_default else [DEFAULTS, path]:
        source = _name(str(file))
        trees.append((source, _read(file, source)))
    trees.append((COMMAND_LINE, _read_overrides(overrides, problems)))
    sections, recipes = _merge(trees, problems)
    sections["algo"] = _with_recipe(sections["algo"], recipes, problems)
    config = _build(sections, problems)
    if not problems:
        problems += _contradictions(config, sections, [source for source, _ in trees])
    if problems:
        raise ConfigError("\n".join(problems))
    _warn_of_surprises(config)
    return config


def _merge(trees: list[tuple[str, dict]], problems: list[str]) -> tuple[Sections, Sections]:
    """The sections and the recipes of several (source, tree); what a later one says wins."""
    sections: Sections = {name: {} for name in SECTIONS}
    recipes: Sections = {}
    for source, tree in trees:
        for section, values in tree.items():
            if section == "recipes":
                _merge_recipes(recipes, values, problems, source=source)
            elif section not in sections:
                problems.append(
                    f"{source}: unknown section {_show(section)}; "
                    f"{nearest(_name(section), [*SECTIONS, 'recipes'])}"
                )
            else:
                settings = {key: Setting(value, source) for key, value in values.items()}
                if section == "algo":
                    _forget_recipe_of_another(sections["algo"], settings)
                sections[section].update(settings)
    return sections, recipes


def _forget_recipe_of_another(algo: dict[str, Setting], later: dict[str, Setting]) -> None:
    """Drop what an earlier file took from the recipe of another algorithm.

    A run's config.yaml is such a file: it holds the whole recipe of its own algorithm.
    """
    if "name" not in later or "name" not in algo or later["name"].value == algo["name"].value:
        return
    for key in RECIPE_KEYS:
        algo.pop(key, None)


def _merge_recipes(recipes: Sections, values: dict, problems: list[str], source: str) -> None:
    known = ("base", *rl_algos.ALGORITHMS)
    for name, recipe in values.items():
        name, dot, key = _name(name).partition(".")
        if dot:  # recipes.gspo.kl=0 arrives as {"gspo.kl": 0}
            recipe = {key: recipe}
        if name not in known:
            problems.append(f"{source}: unknown recipe {_show(name)}; {nearest(name, known)}")
        elif not isinstance(recipe, dict):
            problems.append(
                f"{source}: recipes.{name}: expected keys and values, found {_show(recipe)}"
            )
        else:
            _merge_recipe(recipes.setdefault(name, {}), recipe, problems, where=(source, name))


def _merge_recipe(
    merged: dict[str, Setting], recipe: dict, problems: list[str], where: tuple[str, str]
) -> None:
    source, name = where
    for key, value in recipe.items():
        # An unknown key is left out, or it would be reported again as one of `algo`.
        if key in RECIPE_KEYS:
            merged[key] = Setting(value, source)
        else:
            hint = nearest(_name(key), RECIPE_KEYS)
            problems.append(f"{source}: unknown key recipes.{name}.{_name(key)}; {hint}")


def _with_recipe(
    algo: dict[str, Setting], recipes: Sections, problems: list[str]
) -> dict[str, Setting]:
    """The section `algo` over the recipe that it names, which is over the base of all recipes."""
    base = recipes.get("base", {})
    if "name" not in algo:
        return {**base, **algo}
    name, source = algo["name"]
    names = [known for known in recipes if known != "base"]
    if isinstance(name, str) and name in names:
        return {**base, **recipes[name], **algo}
    problems.append(f"{source}: algo.name: no recipe {_show(name)}; {nearest(_name(name), names)}")
    # The rest of the section is checked under a name that exists, since it is not at fault.
    return {**base, **algo, "name": Setting(next(iter(rl_algos.ALGORITHMS)), source)}


def _build(sections: Sections, problems: list[str]) -> Config | None:
    """The typed config, or None where there are problems."""
    built = {}
    for section, kind in SECTIONS.items():
        settings = sections[section]
        hints = get_type_hints(kind, include_extras=True)
        for key, (_, source) in settings.items():
            if key not in hints:
                hint = _nearest_key(section, _name(key))
                problems.append(f"{source}: unknown key {section}.{_name(key)}; {hint}")
        converted = {}
        for key, wanted in hints.items():
            if key not in settings:
                problems.append(f"{DEFAULTS}: missing key {section}.{key}")
                continue
            value, source = settings[key]
            try:
                converted[key] = _convert(value, wanted, f"{section}.{key}")
            except ConfigError as error:
                problems.append(f"{source}: {error}")
        if len(converted) == len(hints):
            built[section] = kind(**converted)
    return Config(**built) if len(built) == len(SECTIONS) else None


def _convert(value: Any, wanted: Any, key: str) -> Any:
    """`value` as the annotated type. Raises ConfigError."""

    def need(holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: expected {expected}, found {_show(value)}")

    kind = get_origin(wanted)
    if kind is Annotated:
        base, allowed = get_args(wanted)
        value = _convert(value, base, key)
        if allowed is HOME:
            return _expand_home(value, key)
        need(value >= allowed.least and value > allowed.above, allowed.expected)
        need(value <= allowed.most, f"at most {allowed.most:g} ({allowed.why})")
        return value
    if kind is Literal:
        choices = get_args(wanted)
        # True equals 1, and is no level.
        is_choice = any(type(value) is type(choice) and value == choice for choice in choices)
        expected = "one of " + ", ".join(map(str, choices))
        if key == "dyco.rule" and isinstance(value, str) and value in dyco.FORMER_NAMES:
            expected = "dyco.rule={} dyco.control={}".format(*dyco.FORMER_NAMES[value])
        need(is_choice, expected)
        return value
    if kind in (Union, types.UnionType):  # with None
        inner = next(t for t in get_args(wanted) if t is not type(None))
        return None if value is None else _convert(value, inner, key)
    if kind is list:
        inner = get_args(wanted)[0]
        need(isinstance(value, list), f"a list of {inner.__name__}")
        return [_convert(item, inner, key) for item in value]
    if wanted is float:
        number = _as_float(value)
        need(number is not None, "a number")
        need(math.isfinite(number), "a finite number")
        return number
    # Not isinstance: True is an int, and no whole number.
    names = {int: "a whole number", str: "text", bool: "true or false"}
    need(type(value) is wanted, names[wanted])
    if wanted is int:
        need(abs(value) <= LARGEST_INTEGER, "a whole number below 2^63")
    if wanted is str:
        # YAML can spell both: a NUL, which no path holds, and half of a surrogate pair.
        is_writable = not any("\ud800" <= character <= "\udfff" for character in value)
        need("\0" not in value and is_writable, "text that UTF-8 can hold, without NUL")
    return value


def _as_float(value: Any) -> float | None:
    """The number that a value stands for, or None. YAML reads 1e-4 as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _expand_home(path: str, key: str) -> str:
    """The path, with the home folder for a leading ~. Raises ConfigError."""
    # No shell has seen a path in a file, nor the one in run.dir=~/x.
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{key}: no home folder is known for {_show(path)}; "
            f"write {_show('./' + path)} if that is the name of a file or folder"
        )
    if re.match(r"\$\{?\w", path):
        raise ConfigError(
            f"{key}: expected a path, found {_show(path)}, whose variable is not replaced here"
        )
    return expanded


def _contradictions(c: Config, sections: Sections, sources: list[str]) -> list[str]:
    """What the type of a single key cannot say. sources: in the order in which they were read."""
    problems = []

    def need(holds: bool, key: str, expected: str, other: str | None = None) -> None:
        if holds:
            return
        settings = []
        for name in (key, other or key):
            section, _, field = name.partition(".")
            settings.append(sections[section][field])
        # Of two keys that contradict each other, the one that was read last is to blame.
        source = max((setting.source for setting in settings), key=sources.index)
        problems.append(f"{source}: {key}: expected {expected}, found {_show(settings[0].value)}")

    need(
        c.algo.overlong_buffer <= c.rollout.max_new_tokens,
        "algo.overlong_buffer",
        f"at most rollout.max_new_tokens ({c.rollout.max_new_tokens})",
        other="rollout.max_new_tokens",
    )
    need(
        c.rollout.prompts_per_step % c.train.updates_per_rollout == 0,
        "rollout.prompts_per_step",
        f"a multiple of train.updates_per_rollout ({c.train.updates_per_rollout})",
        other="train.updates_per_rollout",
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
        other="reward.accuracy_weight",
    )
    need(bool(c.run.dir.strip()), "run.dir", "a folder of its own")
    need(
        not _holds_more_than_a_run(c.run.dir),
        "run.dir",
        "a folder of its own, not this repository, your home folder or one above the current one",
    )
    need(bool(c.dyco.layers), "dyco.layers", "at least one decoder layer")
    need(
        c.dyco.control == "none" or not dyco.RULES[c.dyco.rule].per_response,
        "dyco.control",
        f"none, since a control does not change dyco.rule={c.dyco.rule}",
        other="dyco.rule",
    )
    need(bool(c.lora.targets), "lora.targets", "at least one linear layer")
    for name in c.lora.targets:
        if name not in lora.TARGETS:
            source = sections["lora"]["targets"].source
            hint = nearest(_name(name), lora.TARGETS)
            problems.append(f"{source}: lora.targets: unknown layer {_show(name)}; {hint}")
    return problems


def _holds_more_than_a_run(folder: str) -> bool:
    """Whether a run that writes its config.yaml and its final/ into the folder could do harm."""
    if not folder.strip():
        return False
    path = Path(os.path.realpath(folder))
    if path == DEFAULTS.parent.resolve():
        return True
    homes = [Path(os.path.realpath(place)) for place in (os.path.expanduser("~"), os.pardir)]
    return any(home.is_relative_to(path) for home in homes)


def _warn_of_surprises(c: Config) -> None:
    if not c.dyco.enabled:
        return
    if c.dyco.rule == "signed" and c.dyco.alpha > 1 / math.e:
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
