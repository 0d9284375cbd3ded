"""Where the runs of jobs lie: storage and a job in, run directories out.

<storage>/runs/<job>/<run id>/
  spec.json        what was asked for, resolved
  state.json       how far it is (state.py); replaced as a whole, so a reader never sees half of it
  log.jsonl        a line for every step, and for every evaluation along the way
  evaluation.json  the last evaluation: {step, metrics}
  checkpoints/ tensorboard/ report.html
"""

from pathlib import Path

from cluster.errors import UsageError

RUNS = "runs"
SPEC, STATE, LOG, EVALUATION, REPORT = "spec.json", "state.json", "log.jsonl", "evaluation.json", "report.html"


def job_directory(storage: Path, job: str) -> Path:
    """Where all runs of a job lie."""
    return storage / RUNS / job


def data_directory(storage: Path, job: str) -> Path:
    """Where all that a prepare job made lies, a directory for each digest."""
    return storage / "data" / job


def run_directories(storage: Path, job: str) -> list[Path]:
    """The runs of a job that have a state, the one that was changed last first."""
    root = job_directory(storage, job)
    found = [path.parent for path in root.glob(f"*/{STATE}")]
    return sorted(found, key=lambda path: ((path / STATE).stat().st_mtime, path.name), reverse=True)


def newest_run(storage: Path, job: str) -> Path:
    """The run of a job that was changed last; UsageError when it has none."""
    found = run_directories(storage, job)
    if not found:
        raise UsageError(
            f"job {job} has no run in {job_directory(storage, job)}; start one with `manta train CONFIG {job}`"
        )
    return found[0]
