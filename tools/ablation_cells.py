"""ablation_cells.py: what the grid of tools.ablate runs: cells, in parts.

A *cell* is a set of config overrides, called "[prefix: ]host/rule". A *part* is some cells that are
run and asked about together. Every cell is run with the same seeds.
"""

import dyco

HOSTS = ("grpo", "dapo", "gspo", "sapo")  # the paper's four, not all of rl_algos.ALGORITHMS
# The second pool was added after the results: most of the variance between seeds is SAPO's.
POOLS = {"all": HOSTS, "without sapo": HOSTS[:3]}

# The default level with four optimizer steps per rollout, so that ratios leave 1, stopped while the
# hosts still rise. It was chosen on these curves, of the hosts alone with seed 1000, before any run
# with DyCo in this regime. Percent right at temperature 1 every 8 steps:
#   grpo 31 42 56 60 76 87, dapo 31 46 60 73 75 88, gspo 31 35 49 57 67 78, sapo 31 27 32 44 57 81
# Greedy 52 -> 100, 92, 89, 95; responses of 40 tokens; 15 to 28 % of the groups are all right or
# all wrong.
REGIME = [
    "train.steps=40",
    "train.updates_per_rollout=4",
    "eval.every=8",
    "eval.samples=300",
    "toy.eval_size=300",
    "eval.swapped=false",
    "checkpoint.every=20",
    "checkpoint.keep_last=1",
    "log.samples_per_step=0",
]


def rule_settings(rule: str, ratio: str = "relative", control: str = "none") -> list[str]:
    settings = [f"dyco.rule={rule}", f"dyco.ratio={ratio}"]
    if control != "none":
        settings.append(f"dyco.control={control}")
    return settings


def control_name(rule: str, control: str) -> str:
    """
    >>> control_name("paper", "shuffled"), control_name("signed", "shuffled")
    ('shuffled', 'signed shuffled')
    """
    return control if rule == "paper" else f"{rule} {control}"


def controls_of(rule: str, ratio: str = "relative") -> dict[str, list[str]]:
    """What a rule must be compared with: equal weights, then the same weights on other tokens."""
    return {
        control_name(rule, control): rule_settings(rule, ratio, control)
        for control in ("uniform", "shuffled")
    }


def cells_of(
    algorithm: str, rules: dict[str, list[str]], prefix: str = "", extra: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """{cell: its overrides} of one host; a cell is called "[prefix]algorithm/rule"."""
    return {
        f"{prefix}{algorithm}/{name}": [f"algo.name={algorithm}", *settings, *extra]
        for name, settings in rules.items()
    }


def cells_of_hosts(rules: dict[str, list[str]]) -> dict[str, list[str]]:
    cells = {}
    for host in HOSTS:
        cells |= cells_of(host, rules)
    return cells


OFF = ["dyco.enabled=false"]
TABLE = {
    "host": OFF,
    "paper": rule_settings("paper"),
    "paper minmax": rule_settings("paper", "minmax"),
    "signed minmax": rule_settings("signed", "minmax"),
}
CONTROLS = {
    **controls_of("paper"),
    **controls_of("signed", "minmax"),
    "response": rule_settings("response"),
}
SMALL = {"host": OFF, "paper": rule_settings("paper"), **controls_of("paper")}
VARIANTS = {
    "tau 0": ["dyco.tau=0"],
    "tau 0.2": ["dyco.tau=0.2"],
    "alpha 0.05": ["dyco.alpha=0.05"],
    "alpha 0.8": ["dyco.alpha=0.8"],
    "hellinger": ["dyco.shift=hellinger"],
    "js": ["dyco.shift=js"],
    "l1": ["dyco.shift=l1"],
    "text scope all": ["dyco.text_scope=all"],
    "first layer": ["dyco.layers=[0]"],
    "all layers": ["dyco.layers=[0,1,2,3]"],
}
LEVELS = {  # of the toy, on which rules of token credit are compared: prefix and settings of cells
    "level 1": ("", ()),
    "level 3": ("level 3: ", ("toy.level=3",)),
}
# Rules of token credit, each with its own shuffled control: cell -> (rule, ratio).
CREDIT_RULES = {
    "paper": ("paper", "relative"),
    "signed minmax": ("signed", "minmax"),
    "entropy": ("entropy", "relative"),
    "vppo": ("vppo", "relative"),
    "pgpo": ("pgpo", "relative"),
    "tor": ("tor", "relative"),
    "vgpo": ("vgpo", "relative"),
    "surprise": ("surprise", "relative"),
    "siblings": ("siblings", "relative"),
    "phrases": ("phrases", "relative"),
}
OWN_RULE = "phrases"  # must also beat its uniform control


def credit_cells() -> dict[str, list[str]]:
    cells = {"host": OFF}
    for cell, (rule, ratio) in CREDIT_RULES.items():
        cells[cell] = rule_settings(rule, ratio)
        cells[control_name(rule, "shuffled")] = rule_settings(rule, ratio, "shuffled")
    cells[f"{OWN_RULE} uniform"] = rule_settings(OWN_RULE, control="uniform")
    return cells


def cells_on_levels(rules: dict[str, list[str]]) -> dict[str, list[str]]:
    """With GRPO on the levels of LEVELS."""
    cells = {}
    for prefix, extra in LEVELS.values():
        cells |= cells_of("grpo", rules, prefix, extra=extra)
    return cells


def cells_of_rule(rule: str) -> dict[str, list[str]]:
    """A rule with its host and its controls."""
    rules = {"host": OFF, rule: rule_settings(rule), **controls_of(rule)}
    return cells_on_levels(rules)


# Each rule that is in none of the other parts is a part by its own name. So whoever adds a rule to
# dyco.RULES can ask for it. Where a response has one factor, no control would change it.
KNOWN_RULES = {rule for rule, _ in CREDIT_RULES.values()}
RULE_PARTS = [
    rule for rule, entry in dyco.RULES.items() if rule not in KNOWN_RULES and not entry.per_response
]


PARTS = {  # of each seed, in the order in which they are run
    "table": cells_of_hosts(TABLE),
    "controls": cells_of_hosts(CONTROLS),
    "rate": {
        **cells_of("grpo", SMALL, "half rate: ", extra=("optim.lr=5e-05",)),
        **cells_of("grpo", SMALL, "twice rate: ", extra=("optim.lr=0.0002",)),
    },
    "ablations": cells_of("grpo", VARIANTS),
    "level2": cells_of(
        "grpo", SMALL, "level 2: ", extra=("toy.level=2", "rollout.max_new_tokens=96")
    ),
    "credit": cells_on_levels(credit_cells()),
}
DEFAULT_PARTS = [part for part in PARTS if part != "credit"]
PARTS |= {rule: cells_of_rule(rule) for rule in RULE_PARTS}
CELLS = {  # cell -> all its overrides
    cell: [*REGIME, *overrides] for cells in PARTS.values() for cell, overrides in cells.items()
}
AGAINST = {  # what a cell is set against besides its host
    "paper": (*controls_of("paper"), "response"),
    "paper minmax": ("uniform", "paper"),
    "signed minmax": tuple(controls_of("signed")),
    "phrases": tuple(controls_of("phrases")),  # our own rule, which has to beat both of them
    **{rule: tuple(controls_of(rule)) for rule in RULE_PARTS},
}

MEASURES = {
    "final": "at the end, temperature 1",
    "greedy": "at the end, greedy",
    "area": "mean over the curve",
    "online": "mean in training",
}
KEPT = {  # of metrics.jsonl, every step
    "online": "reward/accuracy",
    "entropy": "policy/entropy",
    "clip_fraction": "policy/clip_fraction",
    "grad_norm": "policy/grad_norm",
    "length": "response/length",
    "alignment": "dyco/alignment",
}


def cells_of_parts(parts: list[str]) -> list[str]:
    return [cell for part in dict.fromkeys(parts) for cell in PARTS[part]]
