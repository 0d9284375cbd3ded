"""How a train job ended, for people and for programs."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from train_jobs.tables import pairs
from train_jobs.training import Trained


def trained_view(trained: Trained) -> RenderableType:
    """Where the run is, what it measured, and what came of it."""
    state, result = trained.state, trained.result
    heading = Text.assemble((f"Job {state.job}", "bold"), f"  {state.status} after step {state.step}")
    metrics = trained.published.metrics if trained.published is not None else result.metrics
    facts = [("run", str(trained.resolved.run_dir))]
    if result.resumed_from is not None:
        facts.append(("resumed from", f"step {result.resumed_from}"))
    if result.loss is not None:
        facts.append(("loss", f"{result.loss:.6g}"))
    facts += [(name, f"{value:.6g}") for name, value in _numbers(metrics).items() if name != "loss"]
    facts.append(("published", state.published or _nothing(trained)))
    notes = [Text(f"Note: {note}.") for note in (*result.damaged, *state.notes)]
    return Group(heading, Text(""), pairs(facts), *notes)


def _nothing(trained: Trained) -> str:
    if trained.resolved.job.publish is None:
        return "nothing; the job names no model to publish"
    if trained.result.outcome == "stopped":
        return "nothing yet; submit the job again to continue it"
    return "nothing"


def trained_values(trained: Trained) -> dict[str, Any]:
    """The same as JSON values."""
    metrics = trained.published.metrics if trained.published is not None else trained.result.metrics
    return {
        "job": trained.state.job,
        "run_directory": str(trained.resolved.run_dir),
        "status": trained.state.status,
        "step": trained.state.step,
        "num_steps": trained.state.num_steps,
        "resumed_from": trained.result.resumed_from,
        "loss": trained.result.loss,
        "metrics": _numbers(metrics),
        "published": trained.state.published,
        "notes": list(trained.state.notes),
    }


def _numbers(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
