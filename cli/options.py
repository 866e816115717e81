"""Options dataclasses become the parameters of a command, and `--config FILE` fills them in.

    @from_options
    def finetune(inputs: FinetuneInputs, options: FinetuneOptions, *, json: Json = False): ...

Each field of the dataclasses is one parameter, described by its `Spec` alone. A flag wins over the
config file, and the file over the default. The values that a command ran with are written to
OUT/COMMAND.yaml, which `--config` takes.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from demerge.errors import UsageError
from demerge.options import Options, spec_of, types_of

HOW_TO_RUN = {"config", "context", "dry_run", "json"}  # not part of what a config file records


def from_options(
    command: Callable[..., None] | None = None, *, record: bool = True
) -> Callable[..., Any]:
    """Return the command with a parameter for each field of its options, and `--config`.

    Args:
        command: its parameters of type `Options` are replaced by their fields.
        record: whether OUT/COMMAND.yaml is written.
    """
    if command is None:
        return partial(from_options, record=record)
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if _is_options(kind)}
    parameters: list[inspect.Parameter] = []
    keys: dict[str, str] = {}
    unrecorded = set(HOW_TO_RUN)
    for kind in groups.values():
        types = types_of(kind)
        for field in dataclasses.fields(kind):
            parameters.append(_parameter(field, types[field.name]))
            keys[field.name] = _key(_flags(field))
            if not spec_of(field).recorded:
                unrecorded.add(field.name)
    others = {n: p for n, p in inspect.signature(command).parameters.items() if n not in groups}
    parameters += [p.replace(annotation=hints[name]) for name, p in others.items()]
    parameters += [_parameter_of("config", CONFIG)]
    if "context" not in others:
        parameters += [_parameter_of("context", typer.Context)]

    @wraps(command)
    def run(**values: Any) -> None:
        context = values["context"]
        recorded = {
            keys.get(name, name): value
            for name, value in values.items()
            if name not in unrecorded and value is not None
        }
        try:
            options = {name: _build(kind, values) for name, kind in groups.items()}
            command(**options, **{name: values[name] for name in others})
        except UsageError as error:
            if of_file := _with_file(error, context, keys):
                raise of_file from error
            raise
        if record and not values.get("dry_run"):
            _write_record(command.__name__, recorded)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
    )
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def stated(context: typer.Context, options: Options) -> dict[str, Any]:
    """Return the values that the command line or the config file states, without defaults."""
    names = [field.name for field in dataclasses.fields(options)]
    own = [name for name in names if _source(context, name) not in ("", "DEFAULT")]
    return {name: getattr(options, name) for name in own}


def explain_config(error: Exception) -> UsageError | None:
    """Return an error of the parser with the config file that the value is from, if it is."""
    context: Any = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    if parameter is None or _source(context, parameter.name) != "DEFAULT_MAP":
        return None
    value = repr(context.default_map[parameter.name])
    rule = getattr(error, "message", "").removeprefix("Value error, ").rstrip(".")
    rule = rule.replace("Input should", "it must").replace(f"{value} is not", "it must be")
    what = f"{context.params['config']}: {_key(parameter.opts)} is {value}"
    return UsageError(what, fix=rule)


def _with_file(
    error: UsageError, context: typer.Context, keys: Mapping[str, str]
) -> UsageError | None:
    """Return an error with the config file, if it begins with the name of an option from there."""
    first = error.what.partition(" ")[0]
    names = [name for name, key in keys.items() if first in (name, key)]
    if "DEFAULT_MAP" not in [_source(context, name) for name in names]:
        return None
    return UsageError(f"{context.params['config']}: {error.what}", fix=error.fix)


def _source(context: typer.Context, name: str) -> str:
    """Return where a parameter's value is from: DEFAULT_MAP is the config file; "" if unknown."""
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


def _is_options(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)


def _build(kind: type[Options], values: dict[str, Any]) -> Options:
    """Take the values of one dataclass out of all values; a text goes through `Spec.parse`."""
    own = {}
    for field in dataclasses.fields(kind):
        value, spec = values.pop(field.name), spec_of(field)
        if spec.parse is not None and (spec.multiple or isinstance(value, str)):
            value = spec.parse(() if value is None else value)
        own[field.name] = value
    return kind(**own)


def _parameter(field: dataclasses.Field[Any], type_: Any) -> inspect.Parameter:
    """Return the Typer parameter of one field."""
    spec = spec_of(field)
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    help = f"{spec.help.removesuffix('.')} ({spec.rule})." if spec.rule else spec.help
    shows_default = spec.shown_default or (default is not None and not spec.multiple)
    shown: dict[str, Any] = {"help": help, "metavar": spec.metavar, "rich_help_panel": spec.panel}
    shown["show_default"] = shows_default
    if spec.multiple:
        type_, default = list[str] | None, None
    elif spec.parse is not None:
        type_ = str if default is inspect.Parameter.empty else str | None
        if not (default is None or isinstance(default, str)):
            default = (spec.write or _text)(default)
    if spec.argument:
        annotation: Any = Annotated[type_, typer.Argument(**shown)]
    else:
        annotation = Annotated[type_, typer.Option(*_flags(field), **shown)]
    return _parameter_of(field.name, annotation, default)


def _flags(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """Return the names on the command line; a switch that is off has no `--no-` twin."""
    name = field.name.replace("_", "-")
    if spec_of(field).flags:
        return spec_of(field).flags
    return (f"--{name}/--no-{name}",) if field.default is True else (f"--{name}",)


def _parameter_of(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults from a config file.

    Raises:
        InputError: if the file cannot be read.
        UsageError: if it has an unknown key.
    """
    if path is None:
        return None
    from demerge.storage.documents import check_known_keys, read_document

    parameters = {_key(p.opts): p for p in context.command.params if p.name not in HOW_TO_RUN}
    parameters.pop("help", None)
    document = read_document(path, words=True)
    table = {str(name).replace("-", "_"): value for name, value in document.items()}
    for name in [name for name in table if name not in parameters]:
        _check_not_of_recipe(name, {p.name: key for key, p in parameters.items()}, path)
    check_known_keys(table, parameters, str(path))
    context.default_map = {}
    for key, value in table.items():
        of = parameters[key]
        is_repeatable = of.multiple or of.nargs == -1
        context.default_map[of.name or key] = _texts(value) if is_repeatable else _text(value)
    return path


def _check_not_of_recipe(name: str, keys: Mapping[str | None, str], path: Path) -> None:
    """Check that an unknown key of `merge` is not one of a recipe."""
    from demerge.merging.recipe.reading import KINDS

    if "recipe" in keys and name in KINDS:
        fix = "a recipe has this key; --recipe takes recipes"
        if name in keys:
            fix = f"write '{keys[name]}', as the option is called; a recipe calls it '{name}'"
        raise UsageError(f"{path}: unknown key '{name}'", fix=fix)


CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML or TOML file with the same names as the options. Flags win over it.",
        metavar="FILE",
        is_eager=True,
        callback=_read_config,
        show_default=False,
    ),
]


def _key(names: Iterable[str]) -> str:
    """Return what a config file calls an option: its longest name on the command line."""
    return max(names, key=len).split("/")[0].lstrip("-").replace("-", "_")


def _text(value: Any) -> Any:
    """Return a list as the command line writes it: `0.3,0.7`."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _texts(value: Any) -> list[str]:
    """Return what a repeatable option is given: a table is NAME=VALUE pairs, a text is one."""
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    if isinstance(value, dict):
        return [f"{name}={_text(each)}" for name, each in value.items()]
    return [str(value)]


def _write_record(command: str, values: dict[str, Any]) -> None:
    """Write the values that a command ran with into its output folder, if it has one."""
    out = values.get("out")
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes of a launcher
    if not is_first or not isinstance(out, Path) or not out.is_dir():
        return
    import yaml

    from demerge.storage.atomic import commit_text

    plain = {name: _plain(value) for name, value in values.items()}
    commit_text(out / f"{command}.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    """Return a value as YAML holds it: paths as text, also those in a list."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
