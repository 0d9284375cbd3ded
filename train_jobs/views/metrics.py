"""Metrics of an evaluation for people: what an evaluation gave in, a table of 80 columns out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from train_jobs.views.tables import columns, pairs


def metrics_view(heading: str, metrics: Mapping[str, Any], notes: Sequence[str] = ()) -> RenderableType:
    """Plain metrics in two columns, a row for each class where there are classes, and notes below."""
    plain = [(name, metric_text(value)) for name, value in metrics.items() if isinstance(value, int | float)]
    parts: list[RenderableType] = [Text(heading, style="bold"), Text(""), pairs(plain)]
    if metrics.get("classes"):
        parts += [Text(""), _class_table(metrics["classes"])]
    parts += [Text(f"Note: {note}") for note in notes]
    return Group(*parts)


def metric_text(value: float) -> str:
    """A metric in as many digits as say something."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def _class_table(rows: list[dict[str, Any]]) -> Table:
    table = columns()
    table.add_column("class", overflow="fold")
    for name in ("precision", "recall", "F1", "items"):
        table.add_column(name, justify="right")
    for row in rows:
        scores = (f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
        table.add_row(row["label"], *scores, f"{row['support']:,}")
    return table
