"""The page itself: a record in, one HTML document out that holds its style and script and asks for nothing else."""

import time
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cluster.runs.page.curves import percent, short
from cluster.runs.page.panels import charts
from cluster.runs.page.results import (
    attempt_rows,
    confusion_rows,
    label_rows,
    left_out,
    metric_rows,
    moment,
    setting_rows,
    tiles,
)
from cluster.runs.page.trials import scatters, setting_names, trial_rows
from cluster.runs.record import RunRecord
from cluster.units import format_bytes


def render(record: RunRecord, *, now: float | None = None) -> str:
    """The page about a run as it stands; everything that comes from files is escaped."""
    now = time.time() if now is None else now
    metrics = record.evaluation.metrics if record.evaluation is not None else {}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "short": short, "bytes": format_bytes, "count": "{:,}".format}
    return environment.from_string(_part("page.html")).render(
        state=record.state,
        step=record.steps[-1].step if record.steps else record.state.step,
        began=moment(record.state.began),
        made=moment(now),
        tiles=tiles(record, now),
        charts=charts(record),
        sweep=record.sweep,
        varied=[] if record.sweep is None else setting_names(record.sweep),
        trials=[] if record.sweep is None else trial_rows(record.sweep),
        scatters=[] if record.sweep is None else scatters(record.sweep),
        attempts=attempt_rows(record.state.attempts, record.state.status == "running"),
        evaluation=record.evaluation,
        metrics=metric_rows(metrics),
        classes=metrics.get("classes", []),
        confusion=confusion_rows(metrics),
        calibration=metrics.get("calibration", []),
        data=record.data,
        labels=[] if record.data is None else label_rows(record.data),
        left_out=[] if record.data is None else left_out(record.data),
        settings=setting_rows(record.settings),
        style=Markup(_part("style.css")),  # noqa: S704 (a file of ours)
        script=Markup(_part("script.js")),  # noqa: S704 (a file of ours)
    )


def _part(name: str) -> str:
    return files("cluster.runs.page").joinpath(name).read_text(encoding="utf-8")
