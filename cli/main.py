"""The program `demerge`: it lists the commands and turns errors into one message and an exit code.

Nothing here, nor at the top of a command's module, imports torch, so that `demerge --help` answers
at once.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from demerge.cli import data
from demerge.cli.common import printable
from demerge.cli.options import explain_config
from demerge.cli.ranges import check
from demerge.errors import DemergeError


class Commands(TyperGroup):
    """The commands of the program; the name of one may have two words, as `ranges check`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Take two words for a name if they are one."""
        words = " ".join(args[:2])
        return super().resolve_command(ctx, [words, *args[2:]] if words in self.commands else args)


app = typer.Typer(
    name="demerge",
    cls=Commands,
    help="Turn a pretrained diffusion model into a better one by merging experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)

PANELS = {
    "The path, in order": ("analyze", "ranges", "finetune", "merge", "evaluate", "compare"),
    "Start and check": ("demo", "doctor"),
    "Models and methods": ("methods", "sample", "ema", "inspect", "convert"),
    "Diagnostics": ("stats", "layers", "transfer", "coefficients", "landscape"),
}
for panel, names in PANELS.items():
    for name in names:
        command = getattr(import_module(f"demerge.cli.{name}"), name)
        app.command(rich_help_panel=panel)(command)
app.command("ranges check", rich_help_panel="Start and check")(check)
app.add_typer(data.app, name="data", rich_help_panel="Start and check")

# errors of the path that the user gave, and not of the machine
PATH_ERRORS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL, errno.EILSEQ, errno.ENOTEMPTY,
}  # fmt: skip


@app.callback(invoke_without_command=True)
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    """Read the options that hold for every command."""
    if version:
        from importlib.metadata import version as installed

        print(installed("demerge"))
        raise typer.Exit


def main() -> None:
    """Run the program; a user's mistake ends in one message and an exit code, not a traceback."""
    # threads that spin for long are many times slower on shared cores
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    try:
        os.getcwd()  # no path has a meaning in a deleted folder, and torch cannot be loaded
    except FileNotFoundError:
        _fail("the current folder was deleted\n  fix: cd to a folder that exists", 2, debug)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer catches Ctrl-C itself and prints nothing
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except (Exception, KeyboardInterrupt) as error:
        _fail(*_explain(error), debug)


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code of an error."""
    match error:
        case DemergeError():
            return str(error), error.exit_code
        case typer.Abort():
            return "interrupted", 130
        case TyperException():
            if of_file := explain_config(error):
                return _explain(of_file)
            context = getattr(error, "ctx", None)
            command = "demerge" if context is None else context.command_path
            message = error.format_message().replace("Value error, ", "").rstrip(".")
            fix = f"run `{command} --help` for its options"
            return f"{message[:1].lower()}{message[1:]}\n  fix: {fix}", 2
        case KeyboardInterrupt():
            return "interrupted; nothing that was committed is lost", 130
        case MemoryError():
            return "not enough memory\n  fix: use a smaller batch, or a larger machine", 4
        case OSError(strerror=str(reason), filename=file):
            name = f": {os.fsdecode(file)}" if isinstance(file, str | bytes) else ""
            return f"{reason}{name}\n  fix: check the path", 3 if error.errno in PATH_ERRORS else 4
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        fix = "use a smaller batch, or --device cpu"
        return f"not enough memory on the accelerator\n  fix: {fix}", 4
    what = f"a bug in demerge: {type(error).__name__}: {error}"
    return f"{what}\n  fix: run again with --debug and report it", 1


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"demerge: {printable(message)}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
