"""What commands share: arguments as text in, checked values out; what stops a command in, an exit status out."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from cluster.errors import MantaError
from cluster.units import parse_seconds

DEFAULT_DASHBOARD = "http://127.0.0.1:8265"
INTERRUPTED = 130

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def carry_out(command: Callable[[], int]) -> int:
    """The exit status of a command; what stands in its way is a plain line on standard error, and bugs are raised."""
    try:
        return command()
    except MantaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. Run the same command again to go on from here.\n")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (`| head`) has enough
        return 0
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # not about a file: a bug, whose trace is wanted
        place = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"{place}{error.strerror}; check that storage exists, is writable, and has space\n")
        return 1


def add_verb(
    verbs: Verbs, name: str, summary: str, run: Callable[[argparse.Namespace], int] | None = None
) -> argparse.ArgumentParser:
    """A verb that says what it does, and is carried out by ``run``."""
    parser = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The config, as the verb's first argument."""
    parser.add_argument("config", type=Path, metavar="CONFIG", nargs="?" if optional else None, help="the YAML file")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def seconds(text: str) -> float:
    """An argument such as ``30m``."""
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """An argument that is 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write 1 or more")
    return int(text)


def print_line(text: str) -> None:
    """A line of the result, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_json(value: object) -> None:
    """The result, for programs."""
    print_line(json.dumps(value, indent=2))
