"""A train job in: its data are prepared, its run is launched or continued, and how it ended is told."""

import time
from collections.abc import Callable

import msgspec

from cluster.config.jobs_train import METRICS
from cluster.config.schema import ClusterConfig
from cluster.control.code import code_digest, git_commit
from cluster.control.report import Report
from cluster.plan.jobs import JobPlan, plan_data
from cluster.registry.manifest import Lineage
from cluster.runs.files import storage_directory
from cluster.runs.progress import Progress
from cluster.runs.state import RunState, read_state
from train_jobs.job import read_prepare, run_digest
from train_jobs.kinds.prepare import connect, run_prepare
from train_jobs.launch import launch
from train_jobs.publish import PublishPlan, publish_run
from train_jobs.resolving import Resolved, data_of, look_at_data, resolve
from train_jobs.run_spec import RunSpec, WorkerNeeds
from train_jobs.tasks.materials import OPEN, PreparedData
from train_jobs.views.shown import Shown
from train_jobs.views.training import train_values, train_view, trained_values, trained_view

_LINE_EVERY_S = 5.0


def run(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """Train to the end, from wherever an earlier submission got to, and publish; MantaError says what hinders."""
    connect(f"jobs.{plan.name}")
    resolved = resolve_with_data(config, plan, report)
    for note in resolved.notes:
        report.say(f"Note: {note}.")
    report.say(f"Run {resolved.run_dir}.")
    spec, publication = run_spec(config, resolved), publish_plan(config, resolved)
    result = launch(spec, ProgressLines(report.say).tell).result
    metrics = result.metrics
    if publication is not None and result.outcome == "finished":
        report.say(f"Evaluating and publishing {publication.model}.")
        metrics = publish_run(spec, publication, result).metrics
    told = (resolved, result, read_state(spec.run_dir), metrics)
    return Shown(view=trained_view(*told), values=trained_values(*told))


def look(config: ClusterConfig, plan: JobPlan, report: Report) -> Shown:
    """What would run, and how large it is; sources and a base from outside the registry are downloaded to know."""
    resolved = resolve(config, plan, look_at_data(config, plan, report.progress), report.progress)
    return Shown(view=train_view(resolved), values=train_values(resolved))


def publish_plan(config: ClusterConfig, resolved: Resolved) -> PublishPlan | None:
    """Where the run goes, with its lineage; None when the job publishes nothing."""
    job, base = resolved.job, resolved.base.registered
    if job.publish is None:
        return None
    as_adapter = job.adapter is not None and job.adapter.publish == "adapter"
    assert base is not None or not as_adapter, "the config refuses adapters on random weights"
    return PublishPlan(
        storage=config.storage_root,
        model=job.publish.model,
        alias=job.publish.alias,
        require=job.publish.require,
        modes=METRICS[job.task],
        task="classify" if job.task == "classify" else "generate",
        adapter_of=base.reference if base is not None and as_adapter else None,
        lineage=Lineage(
            parents=() if base is None else (base.reference,),
            job=job.name,
            config_digest=run_digest(job, resolved.base.version),
            data_digest=job.training.data_digest,
            code_digest=code_digest(),
            commit=git_commit(),
        ),
    )


def resolve_with_data(config: ClusterConfig, plan: JobPlan, report: Report) -> Resolved:
    """The job on its data, which are prepared first when they are not there."""
    prepare = plan_data(config, plan)
    manifest = run_prepare(prepare, config.storage_root, report.progress)
    return resolve(config, plan, data_of(config, read_prepare(prepare), manifest), report.progress)


def run_spec(config: ClusterConfig, resolved: Resolved) -> RunSpec:
    """What the launcher is told."""
    job, data = resolved.job, resolved.data
    assert resolved.run_dir is not None
    assert data.directory is not None
    storage = storage_directory(config.storage_root)
    return RunSpec(
        job=job.name,
        run_dir=resolved.run_dir,
        data_directory=data.directory.relative_to(storage).as_posix(),
        train=job.training,
        min_workers=job.workers.min,
        max_workers=job.workers.max,
        needs=WorkerNeeds(cpus=job.resources.cpus, gpus=float(job.resources.gpus), threads=job.resources.threads),
        start_timeout_s=job.timeouts.start_s,
        step_timeout_s=job.timeouts.step_s,
        resize_delay_s=job.workers.resize_delay_s,
        max_failures=job.max_failures,
        materials=OPEN,
        arguments=PreparedData(task=resolved.task, directory=data.directory),
        settings=msgspec.to_builtins(job),
        code_digest=code_digest(),
    )


class ProgressLines:
    """States of a run become lines: every few seconds while it steps, and whenever it waits or starts anew."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._told_at = float("-inf")
        self._told_step = -1
        self._told: set[str] = set()

    def tell(self, state: RunState) -> None:
        """Say what is new about the run."""
        self._once(f"waiting: {state.waiting}" if state.waiting else None)
        for number, attempt in enumerate(state.attempts, 1):
            resumed = "" if attempt.resumed_from is None else f", from step {attempt.resumed_from}"
            self._once(f"attempt {number}: {attempt.num_workers} workers{resumed}")
            why = f", {attempt.reason}" if attempt.reason else ""
            self._once(f"attempt {number} {attempt.end}{why}" if attempt.end else None)
        if state.score is not None:
            self._once(f"evaluated after step {state.score.step}: {state.score.metric} {_number(state.score.score)}")
        over = state.status != "running"
        if state.num_steps is None and not over:
            return
        if state.step == self._told_step or (not over and self._clock() - self._told_at < _LINE_EVERY_S):
            return
        self._told_at, self._told_step = self._clock(), state.step
        self._say(
            str(
                Progress(
                    step=state.step,
                    num_steps=state.num_steps,
                    loss=state.loss,
                    tokens_per_s=state.tokens_per_s,
                    left_s=state.remaining_s,
                )
            )
        )

    def _once(self, line: str | None) -> None:
        if line is not None and line not in self._told:
            self._told.add(line)
            self._say(line)


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.6g}"
