"""The README and the documentation say what is true: their commands, names, links and tables come from the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from demerge.cli.main import app
from demerge.merging import all_methods

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = sorted((ROOT / "docs").rglob("*.md"))
OTHERS = (
    "README.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    "examples/cifar10/README.md",
    "examples/emoji/README.md",
    "notebooks/cifar10/README.md",
)
PAGES = [*(ROOT / name for name in OTHERS), *WRITTEN]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
SOURCES = ("demerge", "analysis", "cli")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language, "" for commands."""
    found: list[tuple[str, list[str]]] = []
    is_inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            is_inside = not is_inside
            found += [(line.strip("` "), [])] if is_inside else []
        elif is_inside:
            found[-1][1].append(line)
    return [textwrap.dedent("\n".join(lines)) for name, lines in found if name == language]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command line of demerge on a page."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        match = re.search(r"(?:^|[\s/])demerge(?:\.cli\.main)? +([a-z].*)", line)
        if match:
            yield shlex.split(match[1], comments=True)


# -- the README -----------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 700


def test_the_readme_shows_the_six_commands_and_counts_the_methods() -> None:
    shown = [words[0] for words in commands(ROOT / "README.md")]
    path = ("analyze", "ranges", "finetune", "merge", "evaluate", "compare")
    assert set(path) <= set(shown)
    ours = [m for m in all_methods().values() if m.function.__module__.startswith("demerge.")]
    assert f"{len(ours)} methods" in README


# -- all pages ------------------------------------------------------------------------------------


@each_page
def test_commands_exist_with_their_options(page: Path) -> None:
    top = get_command(app)
    for words in commands(page):
        command = top
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            count = 2 if " ".join(words[:2]) in command.commands else 1
            command, words = command.commands[" ".join(words[:count])], words[count:]
        known = {name for parameter in command.params for name in parameter.opts}
        known |= {name for parameter in command.params for name in parameter.secondary_opts}
        options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        assert set(options) - known - {"--help", "-h"} == set(), f"demerge {command.name}"


@each_page
def test_links_lead_somewhere(page: Path, generate: ModuleType) -> None:
    generated = {ROOT / "docs" / name for name in made_pages(generate)}
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target.partition("#")[0]).resolve()
        is_elsewhere = re.match(r"https?://|#", target)
        assert is_elsewhere or path.exists() or path in generated, target


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    rooms = "demerge|analysis|cli|tests|notebooks|examples"
    named = re.findall(rf"`((?:{rooms})/[\w/.-]*)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_python_imports_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        if block.startswith("# "):  # a new file; test_extending.py runs it
            continue
        imports = (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom))
        for node in imports:
            module = importlib.import_module(str(node.module))
            assert [n.name for n in node.names if not hasattr(module, n.name)] == []


def test_every_package_has_tests_or_contributing_names_it() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Tests")[2]
    missing = []
    for folder in {path.parent for top in SOURCES for path in (ROOT / top).rglob("[a-z]*.py")}:
        name = folder.relative_to(ROOT).as_posix()
        tests = ROOT / "tests" / name.removeprefix("demerge").removeprefix("/")
        if not [*tests.glob("test_*.py")] and f"`{name}`" not in text:
            missing.append(name)
    assert missing == []


# -- generated pages ------------------------------------------------------------------------------

_PAGES: dict[str, str] = {}


def made_pages(generate: ModuleType) -> dict[str, str]:
    """Return the generated pages, made once."""
    if not _PAGES:
        _PAGES.update(generate.generated_pages())
    return _PAGES


def test_every_public_name_has_a_docstring(generate: ModuleType) -> None:
    assert generate.undocumented() == []


def test_every_method_has_a_page_with_a_computed_example(generate: ModuleType) -> None:
    for name in all_methods():
        page = made_pages(generate)[f"methods/{name}.md"]
        assert "## Formula" in page and "tensor([[" in page.rpartition("```text")[2]


def test_every_command_has_its_help(generate: ModuleType) -> None:
    page = made_pages(generate)["reference/cli.md"]
    for name in get_command(app).commands:
        assert f"## demerge {name}" in page
    assert "Usage: demerge merge" in page and "Traceback" not in page


@pytest.mark.parametrize("page", WRITTEN, ids=[path.stem for path in WRITTEN])
def test_tables_are_filled_in(page: Path, generate: ModuleType) -> None:
    assert "{{" not in generate.fill_in(page.read_text(encoding="utf-8"))


def test_every_record_is_described(generate: ModuleType) -> None:
    page = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    assert [name for name in generate._records() if name not in page] == []


def test_benchmarks_are_json_and_shown() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "benchmarks").glob("*.json"):
        assert path.name in page
        json.loads(path.read_text(encoding="utf-8"))


def test_everything_for_docs_and_development_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    extras = project["optional-dependencies"]
    needed = [re.split(r"[>=\[]", name)[0] for name in (*extras["docs"], *extras["dev"])]
    assert [n for n in needed if n != "demerge" and f"{n.lower()}==" not in pinned] == []
