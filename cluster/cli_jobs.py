"""``manta train``, ``jobs`` and ``stop``: arguments in, submissions to the cluster, tables and an exit status out."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

from rich.console import Console

from cluster.command_line import DEFAULT_DASHBOARD, INTERRUPTED, Verbs, add_config, add_json, add_verb, print_json
from cluster.config.load import load_config
from cluster.control.dashboard import Dashboard
from cluster.control.follow import follow, view_on
from cluster.control.job_status import job_statuses, jobs_view, submitted_jobs
from cluster.control.jobs import Submission, newest, stop, submissions, submit
from cluster.control.provider import ray_of, running_dashboard
from cluster.errors import ControlError, UsageError
from cluster.plan.jobs import plan_job


def add_parsers(verbs: Verbs) -> None:
    """Add the three verbs; ``run`` carries each out."""
    train = _add(verbs, "train", _train, "submit a job of the config to the cluster; again, to continue it")
    train.add_argument("job", metavar="JOB", help="name of the job, of any kind")
    train.add_argument("-f", "--follow", action="store_true", help="show its log and progress until it ends")
    train.add_argument("--dry-run", action="store_true", help="only check and show what would run, on this machine")
    jobs = _add(verbs, "jobs", _jobs, "list the jobs of a config or a cluster, and what they are at", optional=True)
    jobs.add_argument("--dashboard", metavar="URL", help=f"without CONFIG: the Ray dashboard ({DEFAULT_DASHBOARD})")
    stop_verb = _add(verbs, "stop", _stop, "let a job save what it has, and end it; `train` continues it")
    stop_verb.add_argument("job", metavar="JOB", help="name of the job")


def _add(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], summary: str, *, optional: bool = False
) -> argparse.ArgumentParser:
    parser = add_verb(verbs, name, summary, run)
    add_config(parser, optional=optional)
    add_json(parser)
    return parser


def _train(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    plan = plan_job(config, args.job)
    if args.dry_run:
        return _dry_run(args)
    dashboard = running_dashboard(config, args.config)
    last = newest(submissions(dashboard, config.name), args.job)
    if args.follow and last is not None and last.active:
        submission_id = last.id
        _say(f"{args.job} is {last.state.lower()} already; this is {submission_id}.")
    else:
        submission_id = submit(dashboard, config, args.config, plan)
        _say(f"Submitted {args.job} as {submission_id}.")
    if not args.follow:
        return _tell_submitted(args, submission_id, dashboard)
    return _follow(args, dashboard, submission_id)


def _dry_run(args: argparse.Namespace) -> int:
    """In a process of its own, because this one knows no training."""
    command = [sys.executable, "-m", "train_jobs", "run", str(args.config), args.job, "--dry-run"]
    command += ["--json"] if args.json else []
    return subprocess.run(command, check=False).returncode  # noqa: S603 (our own interpreter)


def _tell_submitted(args: argparse.Namespace, submission_id: str, dashboard: Dashboard) -> int:
    if args.json:
        print_json({"job": args.job, "submission": submission_id})
    else:
        _say(f"Follow it with `manta train {args.config} {args.job} --follow`, or at {dashboard.url}/#/jobs.")
    return 0


def _follow(args: argparse.Namespace, dashboard: Dashboard, submission_id: str) -> int:
    try:
        ended = follow(dashboard, submission_id, view_on())
    except KeyboardInterrupt:
        _say(
            f"\n{args.job} goes on without you. `manta train {args.config} {args.job} --follow` shows it again, "
            f"`manta stop {args.config} {args.job}` ends it."
        )
        return INTERRUPTED
    if args.json:
        print_json({"job": args.job, "submission": submission_id, "state": ended.state, "message": ended.message})
    else:
        _say(_ending(ended))
    return 0 if ended.state == "SUCCEEDED" else 1


def _ending(ended: Submission) -> str:
    match ended.state:
        case "SUCCEEDED":
            return f"{ended.job} is done."
        case "STOPPED":
            return f"{ended.job} was stopped; submit it again to continue it."
        case "FAILED":
            return f"{ended.job} failed; its log says why. Submit it again to continue it."
        case _:
            return f"{ended.job} is {ended.state.lower()}; its log cannot be read any further."


def _jobs(args: argparse.Namespace) -> int:
    if args.config is not None and args.dashboard is not None:
        raise UsageError("manta jobs: CONFIG and --dashboard both say where the cluster is; give one of them")
    if args.config is None:
        dashboard = Dashboard.with_token_from_environment(args.dashboard or DEFAULT_DASHBOARD)
        title, statuses = dashboard.url, submitted_jobs(submissions(dashboard))
    else:
        config = load_config(args.config)
        running = ray_of(config).dashboard()
        title = config.name
        statuses = job_statuses(config, [] if running is None else submissions(running, config.name))
    if args.json:
        print_json([asdict(status) for status in statuses])
    else:
        Console().print(jobs_view(title, statuses))
    return 0


def _stop(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    plan_job(config, args.job)
    last = newest(submissions(running_dashboard(config, args.config), config.name), args.job)
    if last is None or not last.active:
        state = "was never submitted" if last is None else f"has ended already ({last.state.lower()})"
        raise ControlError(f"job {args.job} of {config.name} {state}; there is nothing to stop")
    _say(f"Stopping {last.id}: it saves what it has.")
    ended = stop(running_dashboard(config, args.config), last)
    if args.json:
        print_json({"job": args.job, "submission": ended.id, "state": ended.state})
    else:
        _say(_ending(ended))
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
