"""The program `demerge`: it gathers the commands and turns errors into one message and an exit code.

Nothing here, nor at the top of a command's module, imports torch: `demerge --help` answers at once.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback

import typer
from typer.exceptions import TyperException

from demerge.cli import (
    analyze,
    coefficients,
    compare,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    finetune,
    inspect,
    landscape,
    layers,
    merge,
    methods,
    ranges,
    sample,
    stats,
    transfer,
)
from demerge.cli.common import printable
from demerge.errors import DemergeError

app = typer.Typer(
    name="demerge",
    help="Measure how timesteps conflict, finetune one expert per range, merge them into one diffusion model, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)

NAMES = {  # what is wrong with a path, and not with the machine
    getattr(errno, name)
    for name in (
        "ENOENT",
        "ENOTDIR",
        "EISDIR",
        "EEXIST",
        "ENAMETOOLONG",
        "ELOOP",
        "EINVAL",
        "EILSEQ",
        "ENOTEMPTY",
    )
}
START, PATH, AROUND = "Start here", "The path, in order", "Around it"
app.command(rich_help_panel=START)(demo.demo)
app.command(rich_help_panel=START)(doctor.doctor)
app.command(rich_help_panel=PATH)(analyze.analyze)
app.command(rich_help_panel=PATH)(ranges.ranges)
app.command(rich_help_panel=PATH)(layers.layers)
app.command(rich_help_panel=PATH)(finetune.finetune)
app.command(rich_help_panel=PATH)(stats.stats)
app.command(rich_help_panel=PATH)(transfer.transfer)
app.command(rich_help_panel=PATH)(coefficients.coefficients)
app.command(rich_help_panel=PATH)(merge.merge)
app.command(rich_help_panel=PATH)(landscape.landscape)
app.command(rich_help_panel=PATH)(evaluate.evaluate)
app.command(rich_help_panel=PATH)(compare.compare)
app.command(rich_help_panel=AROUND)(methods.methods)
app.command(rich_help_panel=AROUND)(sample.sample)
app.command(rich_help_panel=AROUND)(inspect.inspect)
app.command(rich_help_panel=AROUND)(convert.convert)
app.add_typer(data.app, name="data", rich_help_panel=AROUND)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    """Gather what holds for every command."""
    context.obj = {"debug": debug}
    if version:
        from importlib.metadata import version as installed

        print(installed("demerge"))
        raise typer.Exit


def main() -> None:
    """Run the program; a user's mistake ends in one message and its exit code, never in a traceback."""
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "20000"
    )  # threads that spin for long are many times slower on shared cores
    debug = "--debug" in sys.argv
    sys.argv = [
        sys.argv[0],
        *(["--debug"] if debug else []),
        *(word for word in sys.argv[1:] if word != "--debug"),
    ]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    _check_working_folder(debug)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer catches Ctrl-C itself, and says nothing
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except DemergeError as error:
        _fail(str(error), error.exit_code, debug)
    except typer.Abort:
        _fail("interrupted", 130, debug)
    except TyperException as error:
        _refuse(error, debug)
    except KeyboardInterrupt:
        _fail("interrupted; nothing that was committed is lost", 130, debug)
    except MemoryError:
        _fail("not enough memory\n  fix: a smaller batch, or a larger machine", 4, debug)
    except OSError as error:
        if error.strerror is None:
            _bug(error, debug)
        name = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        _fail(
            f"{error.strerror}{name}\n  fix: check the path",
            3 if error.errno in NAMES else 4,
            debug,
        )
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            _fail(
                "not enough memory on the accelerator\n  fix: a smaller batch, or --device cpu",
                4,
                debug,
            )
        _bug(error, debug)


def _check_working_folder(debug: bool) -> None:
    """Refuse to work in a folder that was deleted: no path means anything there, and torch cannot be loaded."""
    try:
        os.getcwd()
    except FileNotFoundError:
        _fail("the current folder was deleted\n  fix: cd to a folder that exists", 2, debug)


def _bug(error: Exception, debug: bool) -> None:
    _fail(
        f"a bug in demerge: {type(error).__name__}: {error}\n  fix: run again with --debug and report it",
        1,
        debug,
    )


def _refuse(error: TyperException, debug: bool) -> None:
    """Say what is wrong with the command line, and how to see its options."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "demerge"
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    _fail(
        f"{message[:1].lower()}{message[1:]}\n  fix: run `{command} --help` for its options",
        2,
        debug,
    )


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"demerge: {printable(message)}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
