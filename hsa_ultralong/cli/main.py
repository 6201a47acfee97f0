"""The `hsa` command: collects the commands, sets up logging, turns errors into one line and an exit code.

To add a command: write hsa_ultralong/cli/NAME.py with `register(app: typer.Typer) -> None`, import torch and the like
inside the command's function (so that `hsa --help` stays instant), and add the module to COMMANDS below, in the order
of the help. Let errors of the user rise as ValueError or OSError: they become "error: ..." here. tests/cli/.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hsa_ultralong.cli import (
    ask,
    average,
    bench,
    convert,
    data,
    evaluate,
    generate,
    memorize,
    memory,
    plan,
    plot,
    quickstart,
    train,
)

COMMANDS = (quickstart, memorize, ask, memory, generate, data, train, average, convert, plot, plan, evaluate, bench)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# packages whose own exception classes report bad files or bad input
_LIBRARIES = {"hsa_ultralong", "huggingface_hub", "safetensors", "safetensors_rust", "tokenizers", "transformers"}


def is_user_error(error: Exception) -> bool:
    """True for what a user can mend: bad values, files, missing packages, too little memory; bugs keep a traceback."""
    if isinstance(error, BrokenPipeError):
        return False
    if isinstance(error, ValueError | OSError | ImportError | MemoryError):
        return True
    kind = type(error)
    return kind.__module__.split(".")[0] in _LIBRARIES or kind.__name__ == "OutOfMemoryError"


def describe(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


class _StandardError(logging.StreamHandler):
    """Writes to what sys.stderr is at the moment of writing."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_log_handler = _StandardError()
_log_handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))


class CommandGroup(TyperGroup):
    """A typer group whose commands end with "error: ..." and code 2 on bad input, with code 130 on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            if not is_user_error(error) or ctx.params.get("debug"):
                raise
            typer.echo(f"error: {describe(error)}", err=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None


app = typer.Typer(
    name="hsa",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if not is_wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(f"hsa-ultralong {version('hsa-ultralong')}")
    except PackageNotFoundError:
        typer.echo("hsa-ultralong (a checkout that is not installed)")
    raise typer.Exit


def set_up_logging(verbose: bool) -> None:
    """Log records of the library to standard error: warnings, or also information."""
    logger = logging.getLogger("hsa_ultralong")
    if _log_handler not in logger.handlers:
        logger.addHandler(_log_handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is being done.")] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="HSA_DEBUG", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Language models that remember: train on a few thousand tokens, read and answer over millions."""
    set_up_logging(verbose)


for _module in COMMANDS:
    _module.register(app)


def main() -> None:
    """Entry point of the `hsa` script."""
    app(prog_name="hsa")


if __name__ == "__main__":
    main()
