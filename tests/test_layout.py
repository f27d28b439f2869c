"""Where things live: few files at the top, imports that point one way, tools that can be started.

Whoever opens the folder shall see the paper first, and whoever changes a file shall know what it
can break: only the files that come after it in the tables below.
"""

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("rewards", "run_folder", "benchmarks", "tools")

# What each module of the core may import of ours when it is imported: lines above its own.
CORE = {
    "dyco": set(),
    "rl_algos": set(),
    "rows": set(),
    "lora": set(),
    "distributed": {"rows"},
    "rewards": set(),
    "data": {"rows"},
    "config": {"dyco", "lora", "rl_algos", "rows"},
    "attention": {"data", "dyco"},
    "decoder": set(),
    "model": {"attention", "data", "decoder", "dyco", "rows"},
    "rollout": {"attention", "data", "decoder", "dyco", "model", "rows"},
    "evaluate": {"rewards"},
    "metrics": {"distributed"},
    "run_folder": {"distributed", "dyco", "config", "lora", "model", "rows"},
    "toy": {"data", "run_folder"},
    "train": {
        "dyco",
        "lora",
        "rl_algos",
        "distributed",
        "rows",
        "rewards",
        "data",
        "config",
        "attention",
        "decoder",
        "model",
        "rollout",
        "toy",
        "evaluate",
        "metrics",
        "run_folder",
    },
}
# Scoring needs no torch. Running a model may import what the core has, but for training.
RUNNING = {"benchmarks.running", "benchmarks.folder"}
OF_SCORING = {"rewards"}
OF_RUNNING = CORE.keys() - {"train", "dyco", "lora", "rl_algos"}
# The functions of the core that may import tools or benchmarks when they are called.
LATE = {
    ("train", "refresh_report"): {"tools"},
    ("evaluate", "ask"): {"tools"},
    ("evaluate", "run"): {"benchmarks"},
    ("evaluate", "score"): {"benchmarks"},
    ("evaluate", "table"): {"benchmarks"},
    ("evaluate", "parse"): {"benchmarks"},
    ("evaluate", "main"): {"tools"},
}
# A tool imports no other tool that is a command, but for this one, which bench.py compares with.
SHARED_COMMANDS = {"tools.estimate"}
# It takes numbers instead of options, and needs TRL.
WITHOUT_HELP = {"tools.trl_peer"}


def files() -> dict[str, Path]:
    """Module -> file, of the top level and of the folders of modules."""
    paths = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))]
    names = {}
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


FILES = files()


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def is_for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_in(node: ast.AST) -> set[str]:
    """Modules of ours that one import statement imports."""
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        # `from tools import report` imports a module, `from tools.report import write` a name.
        submodules = {f"{node.module}.{alias.name}" for alias in node.names}
        names = submodules & FILES.keys()
        if len(names) < len(submodules):
            names.add(node.module)
    else:
        return set()
    return names & FILES.keys()


def imports_at_once(module: str) -> set[str]:
    """Modules of ours that are imported when this one is."""
    imported = set()

    def visit(node: ast.AST) -> None:
        if is_for_types_alone(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        imported.update(imports_in(node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    for statement in tree_of(module).body:
        # What stands below `if __name__ == "__main__":` runs only in a command.
        if not (isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)):
            visit(statement)
    return imported


def top(module: str) -> str:
    return module.partition(".")[0]


def is_command(module: str) -> bool:
    return 'if __name__ == "__main__":' in FILES[module].read_text(encoding="utf-8")


COMMANDS = sorted(name for name in FILES if top(name) == "tools" and is_command(name))


def test_the_top_level_has_at_most_15_files_and_all_are_in_the_table():
    at_top = {path.stem for path in ROOT.glob("*.py")}
    assert len(at_top) <= 15
    assert at_top | {"rewards", "run_folder"} == CORE.keys()


def test_the_table_points_one_way():
    """Each line names only lines above it, so there can be no cycle among the core."""
    above = set()
    for module, allowed in CORE.items():
        assert allowed <= above, module
        above.add(module)


@pytest.mark.parametrize("module", FILES)
def test_imports_are_those_of_the_table(module):
    imported = imports_at_once(module)
    folder = top(module)
    others = {top(name) for name in imported} - {folder}
    if folder == "tools":
        assert others <= CORE.keys() | {"benchmarks"}
        commands = imported & set(COMMANDS)
        assert commands <= SHARED_COMMANDS
    elif folder == "benchmarks":
        assert others <= (OF_RUNNING if module in RUNNING else OF_SCORING)
    else:
        assert others <= CORE[folder]


def test_what_benchmarks_imports_of_itself_is_for_scoring_alone():
    for module in FILES:
        if top(module) == "benchmarks" and module not in RUNNING:
            assert not imports_at_once(module) & RUNNING, module


def test_no_module_imports_itself_through_others():
    finished = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module in finished:
            return
        for imported in sorted(imports_at_once(module)):
            visit(imported, (*path, module))
        finished.add(module)

    for module in FILES:
        visit(module, ())


def test_the_core_calls_tools_and_benchmarks_in_few_places():
    late = {}
    for module in CORE:
        for function in ast.walk(tree_of(module)):
            if isinstance(function, ast.FunctionDef):
                imported = set().union(*map(imports_in, ast.walk(function)))
                used = {top(name) for name in imported} & {"tools", "benchmarks"}
                if used:
                    late[module, function.name] = used
    assert late == LATE


@pytest.mark.parametrize("module", sorted(set(COMMANDS) - WITHOUT_HELP))
def test_each_tool_says_how_it_is_used(module, capsys):
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(module).main(["--help"])
    assert not leaving.value.code
    assert f"python -m {module}" in capsys.readouterr().out


def start_with_help(module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout


def test_a_tool_is_started_as_a_module():
    start_with_help("tools.report")


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(set(COMMANDS) - WITHOUT_HELP - {"tools.report"}))
def test_every_tool_is_started_as_a_module(module):
    start_with_help(module)
