"""``manta drill``: a config and scenario names in, a table of kept and broken promises and an exit status out."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from cluster.config.load import load_config
from cluster.control.drill.phase import Options
from cluster.errors import UsageError
from cluster.units import exact_seconds, parse_seconds

_EPILOG = """\
A drill kills and stops processes of one model's replicas, changes its config and puts it back, and asks more than
can be answered, all while requests are under way; then it says which promises were kept. It touches nothing but what
this config runs, and only on this machine. Meant for a staging cluster, which it needs for itself.

exit status: 0 every promise was kept, 1 one was broken, 2 wrong command line or config
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``drill`` verb."""
    summary = "hurt the cluster under traffic and see whether its promises hold"
    drill = subparsers.add_parser(
        "drill", help=summary, description=f"{summary.capitalize()}.", epilog=_EPILOG, formatter_class=_FORMATTER
    )
    drill.add_argument("config", type=Path, metavar="CONFIG", nargs="?", help="the YAML file")
    drill.add_argument("scenarios", metavar="SCENARIO", nargs="*", help="which to play (default: all but soak)")
    drill.add_argument("--list", action="store_true", help="list the scenarios and do nothing")
    drill.add_argument("--yes", action="store_true", help="do not ask before killing anything")
    drill.add_argument("--json", action="store_true", help="print JSON for programs")
    drill.add_argument("--model", metavar="MODEL", help="which model (default: the first that generates)")
    for flag, field, read, metavar, text in _OPTIONS:
        default = getattr(Options(), field)
        shown = exact_seconds(default) if read is _seconds else default
        drill.add_argument(
            flag, dest=field, type=read, default=default, metavar=metavar, help=f"{text} (default {shown})"
        )
    drill.set_defaults(run=run)


_FORMATTER = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command; the exit status. Deliberate errors pass through."""
    from cluster.control.drill import command  # noqa: PLC0415 (its HTTP client takes half a second to load)

    if args.list:
        command.show_scenarios()
        return 0
    if args.config is None:
        raise UsageError("manta drill: CONFIG is missing; `manta drill --list` lists the scenarios")
    config = load_config(args.config)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    played = command.prepare(config, args.model, args.scenarios, options)
    _agree(f"This hurts model {played.model} of cluster {config.name}: {', '.join(played.names)}.", yes=args.yes)
    return command.play(played, as_json=args.json)


def _agree(what: str, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{what} Say so with --yes.")
    if input(f"{what} Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UsageError("manta drill: nothing was done")


def _seconds(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write 1 or more")
    return int(text)


_OPTIONS: tuple[tuple[str, str, Callable[[str], float], str, str], ...] = (
    ("--streams", "lanes", _count, "N", "open at the same time"),
    ("--requests", "min_requests", _count, "N", "in each scenario, at least"),
    ("--patience", "patience_s", _seconds, "TIME", "what takes longer counts as never ending"),
    ("--rounds", "rounds", _count, "N", "times that kill-stage kills every stage"),
    ("--load", "load_s", _seconds, "TIME", "length of each part of the overload"),
    ("--cycles", "num_cycles", _count, "N", "connections that are opened and dropped"),
    ("--soak", "soak_s", _seconds, "TIME", "length of the soak"),
    ("--seed", "seed", int, "N", "of prompts, and of the moments of the kills"),
)
