"""Metrics of an evaluation for people: what an evaluation gave in, a table of 80 columns out."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from train_jobs.views.tables import columns, pairs

_COUNTS = ("num_items", "num_targets", "num_pairs")


def metrics_view(heading: str, metrics: Mapping[str, Any]) -> RenderableType:
    """Plain metrics in two columns, and a row for each class where there are classes."""
    plain = [(name, metric_text(name, value)) for name, value in metrics.items() if isinstance(value, int | float)]
    parts: list[RenderableType] = [Text(heading, style="bold"), Text(""), pairs(plain)]
    if metrics.get("classes"):
        parts += [Text(""), _class_table(metrics["classes"])]
    return Group(*parts)


def metric_text(name: str, value: float) -> str:
    """A metric in as many digits as say something."""
    return f"{value:,}" if name in _COUNTS else f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def _class_table(rows: list[dict[str, Any]]) -> Table:
    table = columns()
    table.add_column("class", overflow="fold")
    for name in ("precision", "recall", "F1", "items"):
        table.add_column(name, justify="right")
    for row in rows:
        scores = (f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
        table.add_row(row["label"], *scores, f"{row['support']:,}")
    return table
