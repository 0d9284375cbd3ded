"""``manta report``: a config and the name of a job in, a page about its newest run out."""

import argparse
import json
import sys
from pathlib import Path

from cluster.config.load import load_config
from cluster.errors import UsageError
from cluster.runs.files import REPORT, job_directory, newest_run, run_directories, storage_directory
from cluster.runs.page.render import render
from cluster.runs.record import read_run


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``report`` verb."""
    summary = "write one HTML page about a job's newest run: curves, data, evaluation"
    report = subparsers.add_parser("report", help=summary, description=f"{summary.capitalize()}.")
    report.add_argument("config", type=Path, metavar="CONFIG", help="the YAML file")
    report.add_argument("job", metavar="JOB", help="name of the job in the YAML")
    report.add_argument("--run", dest="run_id", metavar="RUN", help="this run, not the newest")
    report.add_argument("--out", type=Path, metavar="FILE", help=f"where to (default: {REPORT} beside the run)")
    report.add_argument("--json", action="store_true", help="print JSON for programs")
    report.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command; the exit status. Deliberate errors pass through."""
    storage = storage_directory(load_config(args.config).storage_root)
    directory = _run_directory(storage, args.job, args.run_id)
    record = read_run(directory, storage)
    path = args.out or directory / REPORT
    path.write_text(render(record), encoding="utf-8")
    if args.json:
        found = {"job": args.job, "run": record.state.run_id, "status": record.state.status, "report": str(path)}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write(f"{record.state.run_id}, {record.state.status}: {path}\n")
    return 0


def _run_directory(storage: Path, job: str, run_id: str | None) -> Path:
    if run_id is None:
        return newest_run(storage, job)
    directory = job_directory(storage, job) / run_id
    known = run_directories(storage, job)
    if directory not in known:
        raise UsageError(f"job {job} has no run {run_id}; it has {', '.join(path.name for path in known) or 'none'}")
    return directory
