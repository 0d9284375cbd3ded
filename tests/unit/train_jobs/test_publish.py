"""A finished run becomes a version with metrics and lineage, or leaves the registry as it was."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cluster.control.code import git_commit, install_root
from cluster.registry.manifest import Lineage
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from tests.support.tiny_run import tiny_run
from tests.support.tiny_task import EVALUATION
from train_jobs.evaluation.requirements import missed
from train_jobs.publish import PublishPlan, evaluate, evaluate_and_publish
from train_jobs.run_spec import RunSpec
from train_jobs.supervision.worker import train_here
from train_jobs.trainer.hooks import NoHooks, TrainResult
from train_jobs.trainer.materials import gather
from train_jobs.trainer.state import trained_weights
from train_jobs.trainer.world import World


def train(spec: RunSpec) -> TrainResult:
    return train_here(spec, World.current(), NoHooks())


def plan(storage: Path, **require: float) -> PublishPlan:
    return PublishPlan(
        storage=str(storage),
        model="tiny",
        alias="latest",
        require=require,
        modes={"loss": "min", "accuracy": "max"},
        task="generate",
        adapter_of=None,
        lineage=Lineage(parents=("base@v1",), job="tiny", config_digest="c", data_digest="d", code_digest="e"),
    )


def test_a_run_becomes_a_version(tmp_path: Path) -> None:
    spec = tiny_run(tmp_path, "good", steps=5)
    spec = replace(spec, train=replace(spec.train, ema=0.5))
    checkpoint = train(spec).checkpoint
    done = evaluate_and_publish(spec, plan(tmp_path, loss=10.0), checkpoint)
    assert (done.step, done.version, done.missed) == (5, "tiny@v1", ())
    registry = Registry(str(tmp_path))
    version = registry.resolve("tiny@latest")
    assert version.metrics == done.metrics
    assert version.lineage == plan(tmp_path).lineage
    assert (version.architecture, version.dtype, version.task) == ("TinyModel", "float32", "generate")
    stored = load_file(materialize(registry, version) / "model.safetensors")
    averages = trained_weights(checkpoint, averaged=True)
    assert all(stored[name].equal(weight) for name, weight in averages.items())
    assert evaluate_and_publish(spec, plan(tmp_path), checkpoint).version == "tiny@v1"
    assert not (spec.run_dir / "export").exists()


def test_what_is_measured_is_what_is_published(tmp_path: Path) -> None:
    spec = tiny_run(tmp_path, "along", steps=5)
    along = replace(spec, train=replace(spec.train, evaluation=EVALUATION))
    checkpoint = train(along).checkpoint
    materials = gather(spec.materials, spec.arguments)
    known = evaluate(along, materials, checkpoint)
    afterwards = evaluate(spec, materials, train(tiny_run(tmp_path, "afterwards", steps=5)).checkpoint)
    assert known == afterwards
    assert evaluate(spec, replace(materials, evaluation_data=None), tmp_path_checkpoint(tmp_path)) == {}


def tmp_path_checkpoint(tmp_path: Path) -> Path:
    return tiny_run(tmp_path, "afterwards").checkpoints / "step-5"


def test_nothing_is_published_when_a_requirement_is_missed_or_the_export_fails(tmp_path: Path) -> None:
    spec = tiny_run(tmp_path, "bad", steps=5)
    checkpoint = train(spec).checkpoint
    done = evaluate_and_publish(spec, plan(tmp_path, loss=0.001, accuracy=0.9), checkpoint)
    assert done.version is None
    assert done.missed == (
        f"loss is {done.metrics['loss']:.4g}, and at most 0.001 is required",
        "accuracy is required, and the evaluation gives loss",
    )
    failing = replace(spec, arguments=replace(spec.arguments, export_fails=True))
    with pytest.raises(OSError, match="No space left"):
        evaluate_and_publish(failing, plan(tmp_path), checkpoint)
    assert Registry(str(tmp_path)).names() == []
    assert not (spec.run_dir / "export").exists()


def test_requirements_are_bounds_on_the_side_that_is_worse() -> None:
    modes = {"loss": "min", "accuracy": "max"}
    assert missed({"loss": 2.0, "accuracy": 0.9}, modes, {"loss": 2.0, "accuracy": 0.9}) == ()
    assert missed({"loss": 2.0}, modes, {"loss": math.nan}) == ("loss is nan, and at most 2 is required",)
    assert missed({"accuracy": 0.9}, modes, {"accuracy": 0.8999}) == (
        "accuracy is 0.8999, and at least 0.9 is required",
    )


def test_commit_is_that_of_the_checkout() -> None:
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
    assert (commit is not None) == (install_root() / ".git").exists()
