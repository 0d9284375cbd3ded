"""Prepared data for people: a manifest, or the plan of a prepare job, in; tables of 80 columns out."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.plan.jobs import JobPlan
from cluster.runs.prepared import Manifest, SplitEntry
from train_jobs.data.spec import PrepareSpec
from train_jobs.views.tables import columns, pairs


def data_view(manifest: Manifest) -> RenderableType:
    """What a prepare job made: counts, labels, sources, notes."""
    table = columns()
    table.add_column("split")
    for name in ("documents", "sequences", "tokens", "targets", "full", "cut"):
        table.add_column(name, justify="right")
    for name, split in manifest.splits.items():
        table.add_row(name, *_split_row(split))
    parts: list[RenderableType] = [
        Text.assemble((f"Data {manifest.name}", "bold"), f"  task {manifest.task}  digest {manifest.digest[:12]}"),
        table,
        pairs(_facts(manifest)),
    ]
    if manifest.labels is not None:
        parts += [Text(""), _label_table(manifest)]
    parts += [Text(f"Note: {note}") for note in manifest.notes]
    parts += [Text(f"Left out: {row.place}: {row.reason}") for row in manifest.bad_rows_sample]
    return Group(*parts)


def _split_row(split: SplitEntry) -> Sequence[str]:
    counts = (split.num_documents, split.num_sequences, split.num_tokens, split.num_targets)
    return (*(f"{count:,}" for count in counts), f"{split.fill_ratio:.1%}", f"{split.num_truncated:,}")


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    left_out = {
        "malformed": manifest.num_bad_rows,
        "duplicates": manifest.num_duplicates,
        "too short": manifest.num_too_short,
        "without targets": manifest.num_without_targets,
    }
    said = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    facts = [
        ("sequences of", f"{manifest.sequence_tokens} tokens"),
        ("rows read", f"{manifest.num_rows:,}" + (f", left out: {said}" if said else "")),
        ("tokenizer", f"{manifest.tokenizer.source}, {manifest.tokenizer.vocab_size:,} tokens"),
    ]
    facts += [("source", f"{source.source}, {source.num_files:,} files") for source in manifest.sources]
    return facts


def _label_table(manifest: Manifest) -> Table:
    table = columns()
    table.add_column("label")
    for name in manifest.splits:
        table.add_column(name, justify="right")
    for label in manifest.labels or ():
        counts = (split.label_counts.get(label, 0) for split in manifest.splits.values())
        table.add_row(label, *(f"{count:,}" for count in counts))
    return table


def prepare_view(plan: JobPlan, spec: PrepareSpec) -> RenderableType:
    """A prepare job that has not run."""
    how = "in the job's process" if plan.workers.max == 1 else f"by up to {plan.workers.max} actors of Ray Data"
    facts = [
        ("sequences of", f"{spec.sequence_tokens} tokens"),
        ("tokenizer", spec.tokenizer),
        ("held out", f"{spec.split.eval_fraction:.1%} of the documents, seed {spec.split.seed}"),
        ("bad rows", f"up to {spec.max_bad_rows} tolerated"),
        ("runs", how),
    ]
    facts += [("source", f"{each.source}, {each.format}, weight {each.weight:g}") for each in spec.inputs]
    heading = Text.assemble((f"Data {spec.name}", "bold"), f"  task {spec.task}  not prepared yet")
    return Group(heading, Text(""), pairs(facts))
