"""Where jobs keep what they make: storage and a job in, the directories of its data and of its runs out.

<storage>/data/<job>/<digest>/
  manifest.json    what a prepare job made (prepared.py); written last

<storage>/runs/<job>/<run id>/
  spec.json        what was asked for, resolved
  state.json       how far it is (state.py); replaced as a whole, so a reader never sees half of it
  log.jsonl        a line for every step
  evaluations.jsonl  a line for every evaluation along the way; written from where they are made
  evaluation.json  the last evaluation: {step, metrics}
  harness.log      what lm-eval said while it measured
  checkpoints/ tensorboard/ report.html
"""

from pathlib import Path

from cluster.errors import UsageError

MANIFEST = "manifest.json"
SPEC, STATE, LOG, EVALUATION, REPORT = "spec.json", "state.json", "log.jsonl", "evaluation.json", "report.html"
EVALUATIONS = "evaluations.jsonl"
HARNESS_LOG = "harness.log"


_DIGITS = 12
"""Of a digest, enough to tell the runs and the data of one job apart."""


def storage_directory(storage: str) -> Path:
    """The directory that a config's storage is; UsageError when it is none."""
    path = Path(storage.removeprefix("file://")).expanduser()
    if not path.is_absolute():
        raise UsageError(
            f"storage {storage} is no directory, which jobs need for data and runs; write an absolute path that all "
            "nodes share"
        )
    return path


def job_directory(storage: Path, job: str) -> Path:
    """Where all runs of a job lie."""
    return storage / "runs" / job


def run_directory(storage: Path, job: str, digest: str) -> Path:
    """Where the run of a job lies; the digest is over all that decides its result, so that equal runs are one."""
    return job_directory(storage, job) / f"{job}-{digest[:_DIGITS]}"


def data_directory(storage: Path, job: str) -> Path:
    """Where all that a prepare job made lies, a directory for each digest."""
    return storage / "data" / job


def prepared_directory(storage: Path, job: str, digest: str) -> Path:
    """Where data of a prepare job with this digest lie, once they are prepared."""
    return data_directory(storage, job) / digest[:_DIGITS]


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
