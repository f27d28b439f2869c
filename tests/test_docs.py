"""What README.md and docs/ say exists: links, files, modules, functions, settings and targets.

A page that names something the project has no longer got is wrong without anybody noticing. So each
test collects what the pages name and looks for it.
"""

import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from config import load_config

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {path.stem for path in ROOT.glob("*.py")} | {"rewards"}
FILE_ENDINGS = {"py", "yaml", "md", "json", "jsonl", "html", "tsv", "txt", "png", "svg"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(text: str) -> str:
    """The text outside fenced blocks and inline code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text: str) -> list[str]:
    """The targets of Markdown links, pictures and <img> tags, without those of other sites."""
    prose = without_code(text)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    return [target for target in targets if not target.startswith(("http://", "https://"))]


def settings() -> set[str]:
    """Every section.key of the config."""
    sections = asdict(load_config())
    return {f"{section}.{key}" for section, keys in sections.items() for key in keys}


def source_of(module: str) -> str:
    """The text of a module at the top level, which may be a folder."""
    single = ROOT / f"{module}.py"
    files = [single] if single.exists() else sorted((ROOT / module).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def defines(source: str, name: str) -> bool:
    return re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=", source, re.MULTILINE) is not None


def test_the_readme_fits_on_a_train_ride():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 2300


@each_page
def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    missing = [
        target for target in links(text) if not (page.parent / target.partition("#")[0]).exists()
    ]
    assert not missing


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / target).resolve() for target in links(README.read_text(encoding="utf-8"))}
    assert set(PAGES) - {README} <= linked


@each_page
def test_formulas_are_closed(page):
    """GitHub shows the rest of a page as a formula where one is not closed."""
    for line in without_code(page.read_text(encoding="utf-8")).splitlines():
        assert line.count("$") % 2 == 0, line
        assert line.count("$$") in (0, 2), line
        assert line.count("{") == line.count("}") or "$" not in line, line


def test_all_eight_equations_are_there():
    text = README.read_text(encoding="utf-8")
    for number in range(1, 9):
        assert re.search(rf"^\*\*Eq\. {number}, .*\n\$\$.+\$\$$", text, re.MULTILINE), number


@each_page
def test_commands_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    for tool in re.findall(r"-m tools\.([a-z_]+)", text):
        assert (ROOT / "tools" / f"{tool}.py").exists(), f"tools.{tool}"
    for script in re.findall(r"\bbin/(?:python|torchrun)\b[^\n`]*?\b(\w+\.py)\b", text):
        assert (ROOT / script).exists(), script
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"


def test_a_setting_that_make_takes_for_a_variable_is_an_error():
    make = ["make", "-n", "-C", str(ROOT), "train"]
    refused = subprocess.run([*make, "algo.name=gspo"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert 'found the settings algo.name of train.py; expected them in ARGS="' in refused.stderr
    taken = subprocess.run([*make, "ARGS=algo.name=gspo"], capture_output=True, text=True)
    assert "train.py config.yaml algo.name=gspo" in taken.stdout


@each_page
def test_commands_use_the_python_of_the_project(page):
    """Each block of commands can be pasted into a shell in the clone."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    for line in "".join(blocks).splitlines():
        command = re.match(r"\s*(\S*(?:python|torchrun))\s", line)
        assert command is None or command[1].startswith(".venv/bin/"), line


@each_page
def test_overrides_are_settings(page):
    """section.key=value, in commands and in sentences."""
    known = settings()
    named = re.findall(r"(?<![\w./-])([a-z]+\.[a-z_]+)=", page.read_text(encoding="utf-8"))
    assert set(named) <= known, set(named) - known


@each_page
def test_dotted_names_exist(page):
    """`section.key` is a setting, `module.name` is defined in that module."""
    known = settings()
    named = re.findall(r"`([a-z_]+)\.(\w+)", page.read_text(encoding="utf-8"))
    for owner, name in named:
        if name in FILE_ENDINGS or f"{owner}.{name}" in known:
            continue
        if owner in MODULES:
            assert defines(source_of(owner), name), f"{owner}.{name}"
        else:
            assert owner not in asdict(load_config()), f"{owner}.{name}"


def test_the_tree_names_what_exists():
    """The block of the README that lists the files, a line each."""
    text = README.read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```\n(config\.yaml .*?)^```", text, re.MULTILINE | re.DOTALL)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    missing = [name for name in sorted(listed) if not (ROOT / name).exists()]
    assert not missing
    explained = listed | set(links(text))
    unexplained = [path.name for path in ROOT.glob("*.py") if path.name not in explained]
    assert not unexplained
    named = re.search(r"^tools/ +(.*):", tree, re.MULTILINE)[1].split(", ")
    programs = [path.stem for path in (ROOT / "tools").glob("*.py")]
    assert set(named) <= set(programs), set(named) - set(programs)
