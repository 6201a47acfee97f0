"""The `hsa` command: collects the commands, sets up logging, turns errors into one line and an exit code.

To add a command: write hsa_ultralong/cli/NAME.py with `register(app: typer.Typer) -> None`, import torch and the like
inside the command's function (so that `hsa --help` stays instant), and add the module to COMMANDS below, in the order
of the help. Let errors of the user rise as ValueError or OSError: they become "error: ..." here. tests/cli/.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hsa_ultralong.cli import (
    ask,
    average,
    bench,
    chat,
    compact,
    compare,
    convert,
    data,
    evaluate,
    generate,
    memorize,
    memory,
    plan,
    plot,
    quickstart,
    serve,
    train,
    tune,
    write,
)
from hsa_ultralong.cli.common import collect_rarely
from hsa_ultralong.cli.terminal import LogFormatter, echo, one_line

COMMANDS = (
    quickstart, memorize, ask, chat, memory, serve, generate, data, write, train, average, convert, compact, tune, plot,
    plan, evaluate, compare, bench,
)  # fmt: skip

EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# packages whose own exception classes report bad files or bad input
_LIBRARIES = {"hsa_ultralong", "huggingface_hub", "safetensors", "safetensors_rust", "tokenizers", "transformers"}


# how torch, on a CPU and a GPU, and allocators below it say that a size is beyond the machine
_TOO_LARGE = re.compile(
    "can't allocate memory|not enough memory|out of memory|bad_alloc|cannot allocate|size calculation overflowed|"
    "multiplication overflow|overflow when unpacking",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d[\d.,_e+]*[KMBG]?", re.IGNORECASE)


def is_too_large(error: Exception) -> bool:
    """True for errors of allocation and of numbers that fit nowhere."""
    if isinstance(error, MemoryError | OverflowError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error)) is not None


def is_user_error(error: Exception) -> bool:
    """True for what a user can mend: bad values, files, missing packages, too little memory; bugs keep a traceback."""
    if isinstance(error, BrokenPipeError):
        return False
    if isinstance(error, ValueError | OSError | ImportError | RecursionError) or is_too_large(error):
        return True
    return type(error).__module__.split(".")[0] in _LIBRARIES


def describe(error: Exception, arguments: Sequence[str] = ()) -> str:
    """The error in one line; where memory or the range of a number is the limit, with the numbers of the command."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return one_line(f"{error.strerror}: {error.filename}")
    text = one_line(" ".join(str(error).split()) or type(error).__name__)
    if isinstance(error, RecursionError):
        return f"something is nested too deeply to be read: {text}"
    if not is_too_large(error):
        return text
    given = numbers_given(arguments)
    advice = f"smaller {', '.join(given)} may fit" if given else "a smaller input or model may fit"
    return f"too large for this machine: {text[:200]}; {one_line(advice)}"


def numbers_given(arguments: Sequence[str]) -> list[str]:
    """The options of a command line whose values are numbers, such as "--lengths 64K"."""
    pairs = [one.partition("=")[::2] for one in arguments if one.startswith("--") and "=" in one]
    pairs += [pair for pair in itertools.pairwise(arguments) if pair[0].startswith("--") and "=" not in pair[0]]
    found = []
    for name, value in pairs:
        # lists of numbers, and --set KEY=NUMBER
        if all(_NUMBER.fullmatch(part) for part in value.rpartition("=")[2].split(",")):
            found.append(f"{name} {value if len(value) <= 40 else value[:20] + '...'}")
    return found


class _StandardError(logging.StreamHandler):
    """Writes to what sys.stderr is at the moment of writing."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_log_handler = _StandardError()
_log_handler.setFormatter(LogFormatter("%(levelname)s %(name)s: %(message)s"))


class CommandGroup(TyperGroup):
    """A typer group whose commands end with "error: ..." and code 2 on bad input, with code 130 on Ctrl-C."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta["arguments"] = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            _refuse_usage(error)
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            _refuse_usage(error)
            if not is_user_error(error) or ctx.params.get("debug"):
                raise
            echo(f"error: {describe(error, ctx.meta['arguments'])}", err=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None


def _refuse_usage(error: Exception) -> None:
    """End with one line if the command line is wrong: an unknown option, a number out of range ...

    A group that is called without a command shows its help instead.
    """
    message = getattr(error, "format_message", None)
    if message is None or type(error).__name__ == "NoArgsIsHelpError":
        return
    context = getattr(error, "ctx", None)
    where = f"; see {context.command_path} --help" if context is not None else ""
    echo(f"error: {one_line(message()).rstrip('.')}{where}", err=True)
    raise typer.Exit(EXIT_BAD_INPUT)


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
    from hsa_ultralong import __version__

    echo(f"hsa-ultralong {__version__}")
    raise typer.Exit


def set_up_logging(verbose: bool) -> None:
    """Log records of the library to standard error: warnings, or also information."""
    logger = logging.getLogger("hsa_ultralong")
    if _log_handler not in logger.handlers:
        logger.addHandler(_log_handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    # what other libraries say goes there, and quotes files too
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(LogFormatter("%(levelname)s %(name)s: %(message)s"))


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
    collect_rarely()
    warnings.showwarning = lambda message, *_, **__: echo(f"warning: {one_line(message)}", err=True)
    try:
        app(prog_name="hsa")
    except Exception:
        # a bug; what it quotes must not act on the terminal either
        echo(traceback.format_exc(), err=True, nl=False)
        sys.exit(EXIT_BUG)


if __name__ == "__main__":
    main()
