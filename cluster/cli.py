"""The ``manta`` command: arguments in, one call, text or JSON and an exit status out.

Exit status 0: done. 1: it failed (a lost process, a refused download, a model that does not start). 2: the command
line, the config or the plan is wrong. Errors are plain lines on standard error.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from cluster import cli_drill, cli_jobs, cli_models, cli_report
from cluster.command_line import (
    DEFAULT_DASHBOARD,
    Verbs,
    add_config,
    add_json,
    add_verb,
    carry_out,
    count,
    print_json,
    print_line,
    seconds,
)
from cluster.config.load import load_config
from cluster.config.schema import json_schema
from cluster.control.apply import down, plan_actions, up
from cluster.control.ask import CHAT_TEMPERATURE, Gateway
from cluster.control.chat import answer_once, converse
from cluster.control.dashboard import Dashboard
from cluster.control.logs import LogLine, follow_logs, log_files, read_logs
from cluster.control.observe import cluster_status
from cluster.control.provider import ray_of, running_dashboard
from cluster.control.quality import measure_quality, written_format
from cluster.control.report import report_to
from cluster.control.samples import base_url, first_answers, next_steps
from cluster.control.tables import plan_view, quality_view, status_view
from cluster.errors import UsageError
from cluster.plan.diff import Nothing

_DEFAULT_URL = "http://127.0.0.1:8000"

_EPILOG = """\
a first session:
  manta up configs/quickstart.yaml       start, serve, and answer a first question
  manta chat smollm2 "What is Ray?"      ask
  manta status configs/quickstart.yaml   what runs, where, and how much memory it takes
  manta down configs/quickstart.yaml     stop what `up` started

exit status: 0 done, 1 failed, 2 wrong command line, config or plan
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    args = _parser().parse_args(argv)
    return carry_out(lambda: int(args.run(args)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="manta",
        description="Trains, versions and serves models on one elastic Ray cluster, from one YAML file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"manta {version('manta-cluster')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add(verbs, "validate", _validate, "check a config and print every mistake in it", config=True)
    _add(verbs, "plan", _plan, "show what would run where, and what `up` would do now", config=True)
    up_verb = _add(verbs, "up", _up, "make the cluster as the config says", config=True)
    up_verb.add_argument(
        "--timeout", type=seconds, default=1800.0, metavar="TIME", help="longest wait for the models (default 30m)"
    )
    _add(verbs, "status", _status, "list models, versions, replicas and stages", config=True)
    _add(verbs, "down", _down, "stop what `up` started, and nothing else", config=True)
    _add_chat(verbs)
    _add_logs(verbs)
    _add_quality(verbs)
    config_verb = verbs.add_parser("config", help="about the config file").add_subparsers(
        required=True, metavar="VERB"
    )
    _add(config_verb, "schema", _schema, "print the JSON schema of the YAML, for editors", as_json=False)
    cli_jobs.add_parsers(verbs)
    cli_drill.add_parser(verbs)
    cli_models.add_parser(verbs)
    cli_report.add_parser(verbs)
    verbs.choices["models"].set_defaults(run=cli_models.run)
    return parser


def _add(
    verbs: Verbs,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    config: bool = False,
    as_json: bool = True,
) -> argparse.ArgumentParser:
    parser = add_verb(verbs, name, summary, run)
    if config:
        add_config(parser)
    if as_json:
        add_json(parser)
    return parser


def _add_chat(verbs: Verbs) -> None:
    chat = _add(verbs, "chat", _chat, "talk to a model; without PROMPT, a conversation", as_json=False)
    chat.add_argument("model", metavar="MODEL", help="name of the model in the YAML")
    chat.add_argument("prompt", metavar="PROMPT", nargs="?", help="one question; - reads it from standard input")
    chat.add_argument(
        "--temperature", type=float, default=CHAT_TEMPERATURE, help="0 is greedy, 2 is wild (default %(default)s)"
    )
    chat.add_argument("--max-tokens", type=int, metavar="N", help="end each answer after N tokens")
    where = chat.add_mutually_exclusive_group()
    where.add_argument("--config", type=Path, metavar="CONFIG", help="the YAML file that says where the gateway is")
    where.add_argument("--url", help=f"base URL of the gateway (default {_DEFAULT_URL})")


def _add_logs(verbs: Verbs) -> None:
    logs = _add(verbs, "logs", _logs, "print the logs of a model's replicas and stages")
    logs.add_argument("model", metavar="MODEL", help="a model, an application such as smollm2-v1, or gateway")
    add_config(logs, optional=True)
    logs.add_argument("--dashboard", metavar="URL", help=f"without CONFIG: the Ray dashboard ({DEFAULT_DASHBOARD})")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as lines are added, until Ctrl-C")
    logs.add_argument(
        "-n", "--lines", type=count, default=100, metavar="N", help="last N lines of each (default 100)"
    )


def _add_quality(verbs: Verbs) -> None:
    quality = _add(
        verbs, "quality", _quality, "measure what int8 and int4 weights would cost a model in quality", config=True
    )
    quality.add_argument("model", metavar="MODEL", help="name of the model in the YAML; it must be imported")
    quality.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="text like that of its users, in UTF-8"
    )
    quality.add_argument(
        "--windows",
        type=count,
        default=8,
        metavar="N",
        help="pieces of 1024 tokens (or of the context, if shorter) to read from all over it (default 8)",
    )


def _validate(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    if args.json:
        print_json(config.model_dump(mode="json"))
    else:
        counted = {"models": config.models, "jobs": config.jobs}
        said = [
            f"{len(entries)} {what} ({', '.join(entry.name for entry in entries)})"
            for what, entries in counted.items()
            if entries
        ]
        print_line(f"{args.config} is valid: cluster {config.name} with {' and '.join(said)}.")
    return 0


def _plan(args: argparse.Namespace) -> int:
    plan, actions = plan_actions(load_config(args.config))
    if args.json:
        print_json({"plan": plan.model_dump(mode="json"), "actions": [_action(action) for action in actions]})
    else:
        Console().print(plan_view(plan, actions))
    return 0


def _up(args: argparse.Namespace) -> int:
    began = time.monotonic()
    config = load_config(args.config)
    report = report_to()
    try:
        applied = up(config, report, timeout_s=args.timeout)
        url = base_url(config)
        changed = applied.actions != (Nothing(),)
        answers = first_answers(Gateway(url), applied.plan.models, report.say) if changed else ()
    finally:
        report.close()
    if args.json:
        print_json(
            {
                "url": f"{url}/v1",
                "dashboard": applied.dashboard_url,
                "actions": [_action(action) for action in applied.actions],
                "answers": [
                    {"model": answer.model, "question": answer.question, "answer": answer.text} for answer in answers
                ],
            }
        )
    else:
        print_line(f"Up after {time.monotonic() - began:.1f} s." if changed else Nothing().sentence)
        print_line(next_steps(config, applied.plan, applied.dashboard_url, answers, str(args.config), own_command()))
    return 0


def own_command() -> str:
    """How to call this command again: ``manta`` where the shell finds this one so, else its path (`make up`)."""
    found = shutil.which("manta")
    if found is not None and os.path.realpath(found) == os.path.realpath(sys.argv[0]):
        return "manta"
    return sys.argv[0] if Path(sys.argv[0]).name == "manta" else f"{sys.executable} -m cluster"


def _status(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    status = cluster_status(config.name, ray_of(config).dashboard())
    if args.json:
        print_json(status.model_dump(mode="json"))
    else:
        Console().print(status_view(status))
    return 0


def _down(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    report = report_to()
    try:
        stopped = down(config, report)
    finally:
        report.close()
    if args.json:
        print_json({"stopped": stopped})
    else:
        print_line(f"Cluster {config.name} is down." if stopped else f"Nothing of cluster {config.name} runs.")
    return 0


def _quality(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    report = report_to()
    try:
        qualities = measure_quality(config, args.model, args.text, report, num_windows=args.windows)
    finally:
        report.close()
    if args.json:
        print_json([asdict(each) for each in qualities])
    else:
        (model,) = (model for model in config.models if model.name == args.model)
        Console().print(quality_view(qualities, written_format(model)))
    return 0


def _chat(args: argparse.Namespace) -> int:
    url = base_url(load_config(args.config)) if args.config is not None else args.url or _DEFAULT_URL
    gateway = Gateway(url, temperature=args.temperature, max_answer_tokens=args.max_tokens)
    if args.prompt is None and sys.stdin.isatty():
        import readline  # noqa: F401, PLC0415 (gives input() line editing and history; only a conversation wants it)

        print_line(f"Talking to {args.model}. Ctrl-C stops an answer, Ctrl-D leaves.")
        converse(gateway, args.model)
        return 0
    prompt = sys.stdin.read().strip() if args.prompt in (None, "-") else args.prompt
    if not prompt:
        raise UsageError("manta chat: the prompt is empty; write one after the model's name")
    answer_once(gateway, args.model, prompt)
    return 0


def _logs(args: argparse.Namespace) -> int:
    if args.config is not None and args.dashboard is not None:
        raise UsageError("manta logs: CONFIG and --dashboard both say where the cluster is; give one of them")
    dashboard = _dashboard_of(args.config, args.dashboard)
    files = log_files(dashboard, args.model)
    read = follow_logs if args.follow else read_logs
    try:
        for line in read(dashboard, files, args.lines):
            print_line(_log_line(line, as_json=args.json))
    except KeyboardInterrupt:
        return 0
    return 0


def _dashboard_of(path: Path | None, url: str | None) -> Dashboard:
    if path is None:
        return Dashboard.with_token_from_environment(url or DEFAULT_DASHBOARD)
    return running_dashboard(load_config(path), path)


def _log_line(line: LogLine, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"source": line.label, "line": line.text})
    return f"{line.label}  {line.text}"


def _schema(args: argparse.Namespace) -> int:  # noqa: ARG001 (the signature of a verb)
    print_json(json_schema())
    return 0


def _action(action: object) -> dict[str, object]:
    return {name: getattr(action, name) for name in ("kind", "sentence", "apps", "model") if hasattr(action, name)}
