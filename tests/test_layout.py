"""The rules that no single file shows: packages, direction of imports, one writer, light start."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import demerge

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LAYERS = {"demerge": "demerge", "demerge.analysis": "analysis", "demerge.cli": "cli"}
LIGHT = {*sys.stdlib_module_names, "typer"}
LIGHT_ROOMS = (
    "demerge.cli",
    "demerge.device",
    "demerge.errors",
    "demerge.options",
    "demerge.stage",
)
ALGORITHMS = (
    "demerge.analysis.partitioning",
    "demerge.finetuning.objective",
    "demerge.finetuning.projection",
    "demerge.merging.methods",
    "demerge.evaluation.metrics",
    "demerge.lora",
    "demerge.diffusion",
    "demerge.data",
)
SHOWS = ("demerge.analysis.planning", "demerge.cli", "demerge.reporting.theme")
WRITERS = ("demerge.storage.atomic", "demerge.storage.lock")
WRITES = {"write_text", "write_bytes", "save_file", "symlink_to", "hardlink_to"}
SAVES = {
    "savefig",
    "savez",
    "savez_compressed",
    "savetxt",
    "to_csv",
    "to_html",
    "to_json",
    "to_parquet",
    "tofile",
}

SAVERS = {"torch", "np", "numpy", "image", "picture", "sheet", "figure"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the product: its dotted name and its file."""
    for package, folder in LAYERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *inner]).removesuffix(".__init__"), path


MODULES = list(modules())


def imports(node: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """The names a syntax tree imports, without those for types; those in functions if `lazy`."""
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not for_types and (lazy or not inside):
            yield from imports(child, lazy=lazy)


def layer(name: str) -> int:
    return 2 if name.startswith("demerge.cli") else 1 if name.startswith("demerge.analysis") else 0


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# -- packages --------------------------------------------------------------------------------------


def test_every_package_is_listed():
    found = {name for name, path in MODULES if path.name == "__init__.py"}
    assert sorted(found) == PROJECT["tool"]["setuptools"]["packages"]


def test_every_folder_with_modules_is_a_package():
    assert [path for _, path in MODULES if not (path.parent / "__init__.py").is_file()] == []


def test_the_public_names_are_few_and_exist():
    assert len(demerge.__all__) <= 25
    assert [name for name in demerge.__all__ if not hasattr(demerge, name)] == []


def test_this_checkout_is_what_is_tested():
    import demerge.analysis
    import demerge.cli

    assert Path(demerge.__file__).resolve().is_relative_to(ROOT)
    assert Path(demerge.cli.__file__).resolve().is_relative_to(ROOT)
    assert Path(demerge.analysis.__file__).resolve().is_relative_to(ROOT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the source archive and the editable wheel of a copy of this checkout."""
    copy, out = tmp_path_factory.mktemp("copy") / "demerge", tmp_path_factory.mktemp("built")
    junk = ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "notebooks")

    def ignored(folder: str, names: list[str]) -> set[str]:
        return junk(folder, names) | ({"shared"} if Path(folder) == ROOT else set())

    copytree(ROOT, copy, ignore=ignored)
    (out / "editable").mkdir()
    for build in ("b.build_wheel(o); b.build_sdist(o)", "b.build_editable(o + '/editable')"):
        program = f"import sys; from setuptools import build_meta as b; o = sys.argv[1]; {build}"
        command = [sys.executable, "-c", program, str(out)]
        subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return out


def product_files() -> set[str]:
    """What an installation holds: all modules, the marker of types, the assets."""
    files = {
        "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
        for package, folder in LAYERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assets = (path for path in (ROOT / "demerge" / "assets").rglob("*") if path.is_file())
    return files | {path.relative_to(ROOT).as_posix() for path in assets} | {"demerge/py.typed"}


def test_the_wheel_holds_one_name_and_all_of_the_product(built):
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"demerge"}
    assert {name for name in names if ".dist-info/" not in name} == product_files()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_archive_can_build_the_wheel(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for _, path in MODULES}
    assert sources | {"pyproject.toml", "README.md", "LICENSE", "demerge/py.typed"} <= names


def test_the_editable_wheel_maps_the_three_folders(built):
    archive = zipfile.ZipFile(next((built / "editable").glob("*.whl")))
    finder = next(name for name in archive.namelist() if name.endswith("_finder.py"))
    mapping = archive.read(finder).decode()
    assert all(f"'{package}': " in mapping for package in LAYERS)


# -- imports ---------------------------------------------------------------------------------------


def test_imports_run_down():
    wrong = []
    for name, path in MODULES:
        for imported in imports(tree(path)):
            is_foreign = imported.split(".")[0] in ("cli", "analysis", "tests", "torchvision")
            is_above = imported.startswith("demerge.") and layer(imported) > layer(name)
            if is_foreign or is_above:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_algorithms_import_no_command_page_or_stage():
    """Rooms of formulas know neither how they are asked nor how they are shown."""
    wrong = []
    for name, path in MODULES:
        if name.startswith(ALGORITHMS) and "plots" not in name:
            for imported in imports(tree(path)):
                if imported.startswith(SHOWS) or ".report." in imported:
                    wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_tests_mirror_the_tree():
    """A folder of tests is one of the product's, or one that CONTRIBUTING's map names."""
    product = {path.parent.relative_to(ROOT).as_posix() for _, path in MODULES}
    product = {folder.removeprefix("demerge/") for folder in product}
    own = {"benchmarks", "fault", "fuzz", "gpu", "cli/help"}
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    assert folders - product - own - {"."} == set()


def test_only_the_map_finds_modules_above_it_by_name():
    """`ConflictMap.plot` and `to_frame` are methods of the map; no other module looks up."""
    above = ("demerge.analysis.", "demerge.cli.")
    texts = {
        name: [ast.unparse(call) for call in ast.walk(tree(path)) if isinstance(call, ast.Call)]
        for name, path in MODULES
        if layer(name) == 0
    }
    looks = [
        name
        for name, calls in texts.items()
        if any("import_module(" in c and any(a in c for a in above) for c in calls)
    ]
    assert looks == ["demerge.conflict"]


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_commands_start_light(path):
    heavy = [
        imported
        for imported in imports(tree(path), lazy=False)
        if imported.split(".")[0] not in LIGHT
        and not imported.startswith(LIGHT_ROOMS)
        and ".options." not in imported
    ]
    assert heavy == []


HELP = """
import sys, time
from demerge.cli.main import main
sys.argv = ["demerge", "--help"]
try:
    main()
except SystemExit as stop:
    heavy = {"torch", "numpy", "diffusers", "pandas", "PIL"} & set(sys.modules)
    print(stop.code, time.process_time(), sorted(heavy), file=sys.stderr)
"""


def test_help_takes_under_half_a_second_and_imports_nothing_heavy():
    least = 1.0
    for _ in range(4):  # the first compiles what was never imported; a busy machine slows some
        result = subprocess.run(
            [sys.executable, "-c", HELP], check=False, capture_output=True, text=True
        )
        code, seconds, heavy = result.stderr.split(maxsplit=2)
        assert (code, heavy.strip()) == ("0", "[]")
        assert "finetune" in result.stdout
        least = min(least, float(seconds))
        if least < 0.5:
            return
    assert least < 0.5


# -- one writer ------------------------------------------------------------------------------------


def writes(node: ast.AST) -> Iterator[str]:
    """The calls in a syntax tree that write to a place by its name."""
    for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
        name = (
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        )
        if (
            name in WRITES
            or (name == "open" and _opens_to_write(call))
            or (_saves(call, name) and _names_a_place(call))
        ):
            yield f"line {call.lineno}: {ast.unparse(call)}"


def _opens_to_write(call: ast.Call) -> bool:
    first = 1 if isinstance(call.func, ast.Name) else 0
    given = [
        *call.args[first:],
        *(keyword.value for keyword in call.keywords if keyword.arg == "mode"),
    ]
    modes = [
        node.value
        for node in given
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)


def _saves(call: ast.Call, name: str) -> bool:
    """Say whether a call saves by itself; our values' own `save(path)` goes through `files.py`."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    return name in SAVES or (name == "save" and isinstance(owner, ast.Name) and owner.id in SAVERS)


def _names_a_place(call: ast.Call) -> bool:
    """Whether an argument looks like a path: a text, a path joined by `/`, or a name of one."""
    return any(_is_a_place(given) for given in call.args)


def _is_a_place(given: ast.expr) -> bool:
    if isinstance(given, ast.Name):
        return any(word in given.id for word in ("path", "file", "out", "folder", "dir"))
    if isinstance(given, ast.BinOp):
        return isinstance(given.op, ast.Div)
    return isinstance(given, ast.JoinedStr)


def test_only_the_writers_write():
    wrong = {name: list(writes(tree(path))) for name, path in MODULES if name not in WRITERS}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "open('a', 'w')",
        "path.open('ab')",
        "path.open(mode='r+')",
        "path.write_text('')",
        "figure.savefig(path)",
        "table.to_csv(out / 'a.csv')",
        "numpy.savez(out / 'a.npz')",
        "image.save(path)",
        "torch.save(weights, path)",
        "save_file(tensors, path)",
    ],
)
def test_the_rule_sees_writes(line):
    assert list(writes(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "path.open('rb')",
        "figure.savefig(buffer)",
        "table.to_csv()",
        "partition.save(path)",
        "Image.open(path)",
        "open(w)",
    ],
)
def test_the_rule_sees_no_more(line):
    assert not list(writes(ast.parse(line)))


# -- the rest --------------------------------------------------------------------------------------


def test_nothing_big_is_shipped():
    assets = [path for path in (ROOT / "demerge" / "assets").rglob("*") if path.is_file()]
    assert [path.name for path in assets if path.stat().st_size > 5_300_000] == []


def required(dependency: str) -> str:
    return re.split(r"[\[>]", dependency)[0].lower().replace("_", "-")


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {
        required(dependency) for dependency in PROJECT["project"]["dependencies"]
    } - pinned == set()


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    roots = {imported.split(".")[0] for _, path in MODULES for imported in imports(tree(path))}
    names = {
        "PIL": "pillow",
        "sklearn": "scikit-learn",
        "huggingface_hub": "huggingface-hub",
        "yaml": "pyyaml",
    }
    imported = {names.get(root, root) for root in roots - sys.stdlib_module_names - {"demerge"}}
    core = {required(dependency) for dependency in PROJECT["project"]["dependencies"]}
    extras = {
        required(d)
        for extra in ("sd", "data", "lora", "cluster")
        for d in PROJECT["project"]["optional-dependencies"][extra]
    }
    assert imported - extras == core


def test_continuous_integration_is_the_two_commands():
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in text
    assert (
        "\nmake demo DEMO=" in text
    )  # in a folder of its own, so that an old report cannot stand in for a new one
    assert "\nmake test\n" in text
