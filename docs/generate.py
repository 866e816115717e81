"""Pages that come from the code: merge methods, commands, API, tables of records. A hook of MkDocs.

    generated_pages()    the text of each page by its path below docs/
    fill_in(text)        {{ record FORMAT }} and {{ exit_codes }} of a written page, as tables
    undocumented()       the public names without a docstring, which `make docs` refuses

No page is committed, so that none can be out of date.
"""

from __future__ import annotations

import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, get_args

import demerge
from demerge import errors
from demerge.cli.main import app
from demerge.merging.registry import Method, all_methods
from demerge.options import Options, choices_of, spec_of, types_of
from demerge.storage.schema import Record

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "demerge",
    "demerge.analysis",
    "demerge.finetuning",
    "demerge.merging",
    "demerge.evaluation",
    "demerge.statistics",
    "demerge.data",
    "demerge.diffusion.model",
    "demerge.diffusion.sampling",
    "demerge.options",
    "demerge.testing",
    "demerge.errors",
)
WIDTH = 100  # columns of a help page


# -- merge methods --------------------------------------------------------------------------------

EXAMPLE = """
import torch
from demerge.merging import merge_tensors

base = {"w": torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]])}
deltas = [
    torch.tensor([[0.40, 0.00, -0.20], [0.10, 0.30, 0.00]]),
    torch.tensor([[0.20, -0.10, 0.30], [0.00, 0.50, -0.40]]),
]
experts = [{"w": base["w"] + delta} for delta in deltas]
"""
INPUTS = {
    "fisher": '[{"w": torch.tensor([[1.0, 1.0, 4.0], [1.0, 2.0, 1.0]])}, {"w": torch.ones(2, 3)}]',
    "gram": '[{"w": torch.diag(torch.tensor([1.0, 2.0, 1.0]))}, {"w": torch.eye(3)}]',
}


def method_pages() -> dict[str, str]:
    """Return one page per merge method, and the table of all."""
    methods = all_methods()
    rows = [
        f"| [`{name}`]({name}.md) | {_paper(method.paper)} | {_cell(method.summary)} |"
        for name, method in methods.items()
    ]
    head = "# Merge methods\n\n`demerge merge --method NAME --option KEY=VALUE` uses one of them.\n"
    more = "[Extending](../extending.md) shows how to add your own.\n\n"
    table = "| method | paper | what it returns |\n|---|---|---|\n" + "\n".join(rows)
    pages = {"methods/index.md": f"{head}{more}{table}\n"}
    return pages | {f"methods/{name}.md": _method_page(method) for name, method in methods.items()}


def _method_page(method: Method) -> str:
    document = method.document()
    body = (inspect.getdoc(method.function) or "").partition("\n")[2]
    body, _, raises = body.partition("Raises:")
    body = body.partition("Args:")[0]
    names = ", ".join(f"`{name}`" for name in document["aliases"])
    parts = [
        f"# {method.name}",
        method.summary + textwrap.dedent(body).rstrip(),
        f"Paper: {_paper(method.paper)}." + (f" Also called {names}." if names else ""),
        "## Formula",
        method.description,
        "## Options",
        _options_table(method) or "This method has no options.",
        _presets(document["presets"]),
        _needs(document["needs"]),
        "## Errors\n\n" + _raises(raises) if raises else "",
        "## Example",
        "Two experts, as state dicts in memory. The result is the merged task vector.",
        _example(method),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _options_table(method: Method) -> str:
    if not method.options:
        return ""
    rows = [
        f"| `{name}` | `{option.default}` | {_cell(option.rule)} | {_cell(option.help)} |"
        for name, option in method.options.items()
    ]
    return "| option | default | values | meaning |\n|---|---|---|---|\n" + "\n".join(rows)


def _presets(presets: dict[str, dict[str, Any]]) -> str:
    if not presets:
        return ""
    lines = []
    for name, options in presets.items():
        settings = ", ".join(f"`{key}={value}`" for key, value in options.items())
        lines.append(f"- `--option preset={name}` sets {settings}.")
    return "Presets reproduce other programs:\n\n" + "\n".join(lines)


def _needs(needs: list[str]) -> str:
    if not needs:
        return ""
    lines = "\n".join(f"- {need}" for need in needs)
    files = "\n\n`demerge stats` makes these files." if any(".saf" in n for n in needs) else ""
    return f"It needs more than the weights:\n\n{lines}{files}"


def _raises(text: str) -> str:
    entries = re.findall(r"(\w+): (.+?)(?=\n\w+: |\Z)", textwrap.dedent(text).strip(), re.DOTALL)
    return "\n".join(f"- `{kind}`: {' '.join(what.split())}" for kind, what in entries)


def _example(method: Method) -> str:
    """Return an example as code with its output, which is computed here."""
    code, arguments = EXAMPLE.strip(), ["base", "experts", f'"{method.name}"']
    if method.inputs:
        values = ", ".join(f'"{name}": {INPUTS[name]}' for name in method.inputs)
        arguments.append(f"inputs={{{values}}}")
    if method.name == "range_weighted":
        code = f"from demerge import TimestepRange\n{code}"
        arguments.append("ranges=[TimestepRange(0, 250), TimestepRange(250, 1000)]")
    many, call = len(arguments) > len(("base", "experts", "name")), ", ".join(arguments)
    call = "\n    " + ",\n    ".join(arguments) + ",\n" if many else call
    code += f'\nmerged = merge_tensors({call})\nprint(merged["w"] - base["w"])'
    output = io.StringIO()
    with redirect_stdout(output):
        exec(code, {})
    return f"```python\n{code}\n```\n\n```text\n{output.getvalue().strip()}\n```"


def _paper(text: str) -> str:
    linked = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return linked or "none"


# -- commands -------------------------------------------------------------------------------------


def command_page() -> str:
    """Return the help of every command, as the program prints it."""
    from typer.main import get_command

    head = "# Commands\n\nThis page is what `demerge COMMAND --help` prints.\n"
    parts = [head, _help_block([])]
    for words in _command_words(get_command(app), []):
        parts.append(f"## demerge {' '.join(words)}\n\n{_help_block(words)}")
    return "\n\n".join(parts) + "\n"


def _command_words(command: Any, before: list[str]) -> Iterator[list[str]]:
    for name, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from _command_words(inner, [*before, name])
        else:
            yield [*before, name]


def _help_block(words: list[str]) -> str:
    return f"```text\n{help_of(words)}\n```"


def help_of(words: list[str]) -> str:
    """Return what `demerge WORDS --help` prints on a plain terminal of 100 columns."""
    from typer.testing import CliRunner

    plain = {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH), "TERM": "dumb", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, [*words, "--help"], env=plain)
    return "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())


# -- API ------------------------------------------------------------------------------------------


def api_pages() -> dict[str, str]:
    """Return a page per public package; a name of several is described on the first page."""
    homes: dict[str, str] = {}
    return {f"reference/{package}.md": _api_page(package, homes) for package in PACKAGES}


def _api_page(package: str, homes: dict[str, str]) -> str:
    """Return a page; `homes` has a link to each described name, and gets those of this page."""
    sections: list[str] = []
    links: list[str] = []
    for name, value in public_names(package):
        place = f"{value.__module__}.{value.__qualname__}"
        if place in homes:
            links.append(f"[`{name}`]({homes[place]})")
        elif _is_options(value):
            homes[place] = f"{package}.md#{name.lower()}"
            sections.append(_options_section(name, value))
        else:
            homes[place] = f"{package}.md#{place}"
            sections.append(f"::: {place}")
    also = [f"Described on another page: {', '.join(links)}."] if links else []
    summary = _summary(import_module(package))
    return "\n\n".join([f"# {package}", summary, *also, *sections]) + "\n"


def _is_options(value: Any) -> bool:
    """Say whether a value is a class all of whose fields are options."""
    is_kind_of_options = inspect.isclass(value) and issubclass(value, Options)
    values = getattr(value, "__dataclass_fields__", {}).values()
    return is_kind_of_options and bool(values) and all("option" in v.metadata for v in values)


def public_names(package: str) -> Iterator[tuple[str, Any]]:
    """Yield the public names of a module: those of `__all__`, or else what it defines itself."""
    module = import_module(package)
    names = getattr(module, "__all__", None) or list(vars(module))
    for name in names:
        value = getattr(module, name)
        own = getattr(value, "__module__", "") == package or hasattr(module, "__all__")
        is_described = inspect.isclass(value) or inspect.isfunction(value)
        if own and is_described and not name.startswith("_"):
            yield name, value


def _options_section(name: str, kind: type[Options]) -> str:
    rows = []
    for field in fields(kind):
        spec, type_ = spec_of(field), types_of(kind)[field.name]
        default = f"`{field.default!r}`"
        if field.default is MISSING:
            default = "required" if field.default_factory is MISSING else "empty"
        values = " or ".join(f"`{choice}`" for choice in choices_of(type_)) or spec.rule
        text = f"{spec.help.rstrip('.')}{f': {values}' if values else ''}."
        rows.append(f"| `{field.name}` | {default} | {_cell(text)} |")
    table = "| option | default | meaning |\n|---|---|---|\n" + "\n".join(rows)
    return f"## {name}\n\n{_summary(kind)}\n\n{table}"


def undocumented() -> list[str]:
    """Return the public names, their methods included, that have no docstring."""
    missing = []
    for package in PACKAGES:
        if not inspect.getdoc(import_module(package)):
            missing.append(package)
        for name, value in public_names(package):
            if str(getattr(value, "__module__", "")).startswith("demerge"):
                missing += _without_docstring(f"{package}.{name}", value)
    return sorted(set(missing))


def _without_docstring(name: str, value: Any) -> Iterator[str]:
    made_up = is_dataclass(value) and str(value.__doc__).startswith(f"{value.__name__}(")
    if made_up or not (value.__doc__ or "").strip():
        yield name
    own = vars(value) if inspect.isclass(value) else {}
    values = own.get("__dataclass_fields__", {})  # a field may have a function as its default
    for inner, member in own.items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        is_public = not inner.startswith("_") and inner not in values
        if is_public and inspect.isfunction(function) and not function.__doc__:
            yield f"{name}.{inner}"


def link_sources() -> None:
    """Make a folder in which the three source folders are one package, for readers of source."""
    folder = ROOT / "build" / "docs-source" / "demerge"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [*(ROOT / "demerge").iterdir(), ROOT / "analysis", ROOT / "cli"]:
        (folder / path.name).symlink_to(path)


# -- tables of written pages ----------------------------------------------------------------------


def fill_in(text: str) -> str:
    """Replace {{ record FORMAT }}, {{ record MODULE.NAME }} and {{ exit_codes }} by tables."""
    text = re.sub(r"\{\{ record ([\w./]+) \}\}", lambda match: record_table(match[1]), text)
    return text.replace("{{ exit_codes }}", exit_codes_table())


def record_table(name: str) -> str:
    """Return the keys of a record: type, whether required, meaning.

    Args:
        name: its format, such as `demerge.expert/1`, or where its type is.
    """
    from pydantic import TypeAdapter

    module, _, attribute = name.rpartition(".")
    kind = _records()[name] if "/" in name else getattr(import_module(module), attribute)
    schema = TypeAdapter(kind).json_schema()
    meanings = _attributes(kind)
    rows = []
    for key, entry in schema["properties"].items():
        need = "yes" if key in schema.get("required", ()) else "no"
        rows.append(f"| `{key}` | {_type_words(entry)} | {need} | {_cell(meanings.get(key, ''))} |")
    return "| key | type | required | meaning |\n|---|---|---|---|\n" + "\n".join(rows)


@cache
def _records() -> dict[str, type[Record]]:
    """Return all records that name their format."""
    for module in walk_packages(demerge.__path__, "demerge."):
        import_module(module.name)
    kinds = [kind for kind in Record.__subclasses__() if "format" in kind.model_fields]
    return {get_args(kind.model_fields["format"].annotation)[0]: kind for kind in kinds}


def _type_words(entry: dict[str, Any]) -> str:
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return " or ".join(f"`{value}`" for value in entry["enum"])
    if "$ref" in entry:
        return entry["$ref"].rpartition("/")[2]
    if "anyOf" in entry:
        return " or ".join(_type_words(choice) for choice in entry["anyOf"])
    if entry.get("type") == "array":
        if entry.get("maxItems") == 2:
            return "[start, stop]"
        return f"list of {_type_words(entry['items'])}" if entry.get("items") else "list"
    return {"object": "table", "string": "text", "integer": "integer"}.get(
        entry.get("type", ""), entry.get("type", "any value")
    )


def _attributes(kind: type) -> dict[str, str]:
    """Return what the docstring's `Attributes:` say, by name."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        match = re.match(r"    ([\w, ]+): (.*)", line)
        if match:
            names = match[1].split(", ")
            meanings.update(dict.fromkeys(names, match[2]))
        elif line.startswith("        "):
            for name in names:
                meanings[name] += f" {line.strip()}"
        else:
            names = []
    return meanings


def exit_codes_table() -> str:
    """Return the exit codes: those of the errors, and those of the program itself."""
    rows = {0: ("success", ""), 1: ("a bug in demerge", "Please report it.")}
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, errors.DemergeError) and kind.exit_code > 1:
            rows[kind.exit_code] = (f"`{kind.__name__}`", _summary(kind))
    rows[130] = ("Ctrl-C", "What was committed is whole. Run the command again.")
    lines = [f"| {code} | {name} | {text} |" for code, (name, text) in sorted(rows.items())]
    return "| code | name | meaning |\n|---|---|---|\n" + "\n".join(lines)


def _summary(value: Any) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# -- the hook -------------------------------------------------------------------------------------


def generated_pages() -> dict[str, str]:
    """Return the text of every generated page by its path below docs/."""
    return method_pages() | api_pages() | {"reference/cli.md": command_page()}


def on_startup(**_: Any) -> None:
    """Make the folder of sources before plugins look for it."""
    link_sources()


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation, after those of the file mkdocs.yml."""
    methods = [{name: f"methods/{name}.md"} for name in all_methods()]
    api = [{package: f"reference/{package}.md"} for package in PACKAGES]
    config.nav = [
        *config.nav[:3],
        {"Merge methods": [{"All": "methods/index.md"}, *methods]},
        *config.nav[3:-1],
        {"Reference": [{"Commands": "reference/cli.md"}, *config.nav[-1]["Reference"]]},
        {"Python": api},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages.

    Raises:
        PluginError: if a public name has no docstring.
    """
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    if missing := undocumented():
        raise PluginError(f"public names without a docstring: {', '.join(missing)}")
    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the tables in."""
    return fill_in(markdown)
