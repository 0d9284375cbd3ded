"""``manta report``: a config and the name of a job in, a page about its newest run out."""

import argparse
from pathlib import Path

from cluster.command_line import Verbs, add_config, add_json, add_verb, print_json, print_line
from cluster.config.load import load_config
from cluster.errors import UsageError
from cluster.runs.files import REPORT, job_directory, newest_run, run_directories, storage_directory
from cluster.runs.page.render import render
from cluster.runs.record import read_run


def add_parser(verbs: Verbs) -> None:
    """Add the ``report`` verb."""
    report = add_verb(verbs, "report", "write one HTML page about a job's newest run: curves, data, evaluation", run)
    add_config(report)
    report.add_argument("job", metavar="JOB", help="name of the job in the YAML")
    report.add_argument("--run", dest="run_id", metavar="RUN", help="this run, not the newest")
    report.add_argument("--out", type=Path, metavar="FILE", help=f"where to (default: {REPORT} beside the run)")
    add_json(report)


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command; the exit status. Deliberate errors pass through."""
    storage = storage_directory(load_config(args.config).storage_root)
    directory = _run_directory(storage, args.job, args.run_id)
    record = read_run(directory, storage)
    path = args.out or directory / REPORT
    path.write_text(render(record), encoding="utf-8")
    if args.json:
        found = {"job": args.job, "run": record.state.run_id, "status": record.state.status, "report": str(path)}
        print_json(found)
    else:
        print_line(f"{record.state.run_id}, {record.state.status}: {path}")
    return 0


def _run_directory(storage: Path, job: str, run_id: str | None) -> Path:
    if run_id is None:
        return newest_run(storage, job)
    directory = job_directory(storage, job) / run_id
    known = run_directories(storage, job)
    if directory not in known:
        raise UsageError(f"job {job} has no run {run_id}; it has {', '.join(path.name for path in known) or 'none'}")
    return directory
