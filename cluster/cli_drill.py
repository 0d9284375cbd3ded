"""``manta drill``: a config and scenario names in, a table of kept and broken promises and an exit status out."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields

from cluster.command_line import Verbs, add_config, add_json, add_verb, count, seconds
from cluster.config.load import load_config
from cluster.control.drill.phase import Options
from cluster.errors import UsageError
from cluster.units import exact_seconds

_EPILOG = """\
A drill kills and stops processes of one model's replicas, changes its config and puts it back, and asks more than
can be answered, all while requests are under way; then it says which promises were kept. It touches nothing but what
this config runs, and only on this machine. Meant for a staging cluster, which it needs for itself.

exit status: 0 every promise was kept, 1 one was broken, 2 wrong command line or config
"""


def add_parser(verbs: Verbs) -> None:
    """Add the ``drill`` verb."""
    drill = add_verb(verbs, "drill", "hurt the cluster under traffic and see whether its promises hold", run)
    drill.epilog, drill.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    add_config(drill, optional=True)
    drill.add_argument("scenarios", metavar="SCENARIO", nargs="*", help="which to play (default: all but soak)")
    drill.add_argument("--list", action="store_true", help="list the scenarios and do nothing")
    drill.add_argument("--yes", action="store_true", help="do not ask before killing anything")
    add_json(drill)
    drill.add_argument("--model", metavar="MODEL", help="which model (default: the first that generates)")
    for flag, field, read, metavar, text in _OPTIONS:
        default = getattr(Options(), field)
        shown = exact_seconds(default) if read is seconds else default
        drill.add_argument(
            flag, dest=field, type=read, default=default, metavar=metavar, help=f"{text} (default {shown})"
        )


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


_OPTIONS: tuple[tuple[str, str, Callable[[str], float], str, str], ...] = (
    ("--streams", "lanes", count, "N", "open at the same time"),
    ("--requests", "min_requests", count, "N", "in each scenario, at least"),
    ("--patience", "patience_s", seconds, "TIME", "what takes longer counts as never ending"),
    ("--rounds", "rounds", count, "N", "times that kill-stage kills every stage"),
    ("--load", "load_s", seconds, "TIME", "length of each part of the overload"),
    ("--cycles", "num_cycles", count, "N", "connections that are opened and dropped"),
    ("--soak", "soak_s", seconds, "TIME", "length of the soak"),
    ("--seed", "seed", int, "N", "of prompts, and of the moments of the kills"),
)
