"""``python -m train_jobs run CONFIG JOB``: a job of the YAML runs here, or on the Ray cluster around this process.

What happens goes to standard error line by line, the result to standard output. Exit status 0: done. 1: it failed.
2: the command line, the config or the job is wrong.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from cluster.command_line import add_config, add_json, add_verb, carry_out, print_json
from cluster.config.load import load_config
from cluster.control.code import check_code_digest
from cluster.control.report import report_to
from train_jobs.running import do

_COLUMNS = 80


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    args = _parser().parse_args(argv)
    return carry_out(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train_jobs", description="Runs jobs of a config.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    summary = "run a job to its end, from wherever an earlier submission of it got to"
    verb = add_verb(verbs, "run", summary)
    add_config(verb)
    verb.add_argument("job", metavar="JOB", help="name of the job in it")
    verb.add_argument(
        "--dry-run", action="store_true", help="check and show what would run; downloads what it must look at"
    )
    add_json(verb)
    verb.add_argument("--code-digest", metavar="SHA256", help="refuse to run with other code than this")
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.code_digest is not None:
        check_code_digest(args.code_digest)
    config = load_config(args.config)
    report = report_to()
    try:
        shown = do(config, args.job, report, what="look" if args.dry_run else "run")
    finally:
        report.close()
    if args.json:
        print_json(shown.values)
    else:
        Console(width=None if sys.stdout.isatty() else _COLUMNS).print(shown.view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
