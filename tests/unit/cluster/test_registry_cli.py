"""``manta models``: every verb against a real registry, as text and as JSON."""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import cli_models
from cluster.config.load import load_config
from cluster.control.state import LocalState, forget_state, state_directory, write_state
from cluster.errors import AliasConflict, ControlError, RegistryError, UsageError
from tests.support.tiny_checkpoint import write_checkpoint
from tests.unit.cluster.recorded_dashboard import RecordedDashboard

SERVE = "/api/serve/applications/"

Manta = Callable[..., tuple[int, str]]


@pytest.fixture
def manta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Manta:
    """Runs ``manta models ...`` on a storage of its own; the exit status and what went to standard output."""
    parser = argparse.ArgumentParser(prog="manta")
    cli_models.add_parser(parser.add_subparsers())

    def run(line: str, storage: Path | None = tmp_path / "storage") -> tuple[int, str]:
        argv = ["models", *shlex.split(line), *(["--storage", str(storage)] if storage else [])]
        status = cli_models.run(parser.parse_args(argv))
        return status, capsys.readouterr().out

    return run


def _import(manta: Manta, tmp_path: Path, *, seed: int = 0) -> None:
    directory = write_checkpoint(tmp_path / f"m{seed}", seed=seed)
    status, _ = manta(f"import tiny path://{directory} --dtype float32")
    assert status == 0


def _json(manta: Manta, line: str) -> Any:
    return json.loads(manta(f"{line} --json")[1])


def test_import_list_and_show(manta: Manta, tmp_path: Path) -> None:
    assert "no models in" in manta("list")[1]
    directory = write_checkpoint(tmp_path / "m")
    (directory / "model.pt").write_bytes(b"x")
    status, text = manta(f"import tiny path://{directory} --dtype float32")
    assert status == 0
    assert "tiny@v1" in text
    assert "not taken from the source: model.pt" in text
    assert "tiny" in manta("list")[1]
    (listed,) = _json(manta, "list tiny")
    assert (listed["version"], listed["aliases"], listed["left_out"]) == ("v1", ["latest"], ["model.pt"])
    shown = _json(manta, "show tiny")
    assert [file["path"] for file in shown["files"]] == ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert shown["aliases"][0]["generation"] == 1
    assert "model.safetensors" in manta("show tiny@v1")[1]


def test_alias_and_rollback(manta: Manta, tmp_path: Path) -> None:
    _import(manta, tmp_path, seed=0)
    _import(manta, tmp_path, seed=1)
    assert _json(manta, "alias tiny champion v1 --expect-generation 0 --reason chosen")["reason"] == "chosen"
    assert manta("alias tiny champion v2")[1] == "tiny@champion -> v2 (generation 2, before it v1)\n"
    with pytest.raises(AliasConflict):
        manta("alias tiny champion v1 --expect-generation 1")
    assert _json(manta, "rollback tiny champion")["version"] == "v1"
    assert manta("rollback tiny")[1] == "tiny@latest -> v1 (generation 3)\n"
    with pytest.raises(RegistryError, match="nothing to go back to"):
        manta("rollback tiny")


def test_verify_exits_1_for_damage(manta: Manta, tmp_path: Path) -> None:
    _import(manta, tmp_path)
    assert manta("verify") == (0, "tiny@v1: good\n")
    (digest,) = [f["sha256"] for f in _json(manta, "show tiny")["files"] if f["path"] == "config.json"]
    blob = tmp_path / "storage" / "registry" / "blobs" / "sha256" / digest[:2] / digest
    blob.chmod(0o644)
    blob.write_bytes(b"x" * blob.stat().st_size)
    status, text = manta("verify tiny")
    assert status == 1
    assert "config.json is damaged" in text
    assert manta("verify tiny --remove-damaged")[0] == 1
    _import(manta, tmp_path)
    assert _json(manta, "verify") == {"tiny@v1": []}


def test_gc_pin_and_unpin(manta: Manta, tmp_path: Path) -> None:
    for seed in range(4):
        _import(manta, tmp_path, seed=seed)
    assert manta("pin tiny@v1")[1] == "tiny@v1 is pinned\n"
    assert _json(manta, "show tiny@v1")["pinned"]
    said = _json(manta, "gc --dry-run --grace 0s")
    assert (said["versions"], said["dry_run"]) == (["tiny@v2"], True)
    assert _json(manta, "gc --grace 0s --running tiny@v2")["versions"] == []
    assert "removed tiny@v2; 1 blobs" in manta("gc --grace 0s")[1]
    assert manta("unpin tiny@v1")[1] == "tiny@v1 is no longer pinned\n"
    with pytest.raises(UsageError, match="tiny@v1 is not pinned; pinned: none"):
        manta("unpin tiny@v1")
    assert [version["version"] for version in _json(manta, "list")] == ["v1", "v3", "v4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import", "give NAME and SOURCE, or --config FILE"),
        ("import tiny", "give NAME and SOURCE, or --config FILE"),
        ("gc --grace soon", "--grace: 'soon' is not"),
        ("list --config x.yaml", "give one of them"),
    ],
)
def test_wrong_usage_is_explained(manta: Manta, line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        manta(line)


def test_config_names_storage_and_sources(manta: Manta, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    config = tmp_path / "manta.yaml"
    config.write_text(
        f"""
name: test
storage: {tmp_path}/from-config
cluster:
  provider: {{kind: local, dashboard_port: 1}}
  nodes: [{{name: box, resources: {{CPU: 2}}}}]
models:
  - {{name: tiny, source: 'path://{directory}', dtype: float32, context_tokens: 64}}
"""
    )
    status, text = manta(f"import --config {config}", storage=None)
    assert (status, text.split()[0]) == (0, "tiny@v1")
    assert (tmp_path / "from-config" / "registry" / "models" / "tiny").is_dir()
    assert manta(f"gc --dry-run --grace 0s --config {config}", storage=None)[0] == 0
    with pytest.raises(UsageError, match="has no model 'other'; it has tiny"):
        manta(f"import other --config {config}", storage=None)
    with pytest.raises(UsageError, match="belong to a SOURCE"):
        manta(f"import --config {config} --dtype float16", storage=None)


def test_gc_keeps_what_a_local_cluster_of_the_storage_serves_without_being_told(manta: Manta, tmp_path: Path) -> None:
    for seed in range(3):
        _import(manta, tmp_path, seed=seed)
    config = {"import_path": "deployments.app:build_model", "args": {"model": "served-as", "version": "v1"}}
    config["args"] |= {"registry_name": "tiny"}
    process = psutil.Process()
    started = {"pid": process.pid, "started_at": process.create_time(), "temp_dir": "/none", "settings": {}}
    directory = tmp_path / "storage" / "clusters" / "other"
    with RecordedDashboard(
        {SERVE: [{"applications": {"served-as-v1": {"deployed_app_config": config}}}]}
    ) as dashboard:
        write_state(directory, LocalState(**started, dashboard_url=dashboard.url))
        assert _json(manta, "gc --grace 0s --dry-run")["versions"] == []
    with pytest.raises(ControlError, match="no Ray dashboard answers"):
        manta("gc --grace 0s")
    forget_state(directory)
    manta("alias tiny latest v3")
    assert _json(manta, "gc --grace 0s")["versions"] == ["tiny@v1"]


def test_gc_of_shared_storage_wants_to_be_told_what_runs(manta: Manta) -> None:
    with pytest.raises(UsageError, match=r"other machines may serve from memory://gc.*--config FILE .*--running"):
        manta("gc --storage memory://gc", storage=None)
    assert manta("gc --storage memory://gc --running", storage=None)[0] == 0


def test_gc_removes_nothing_while_it_is_not_known_what_runs(manta: Manta, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        f"name: test\nstorage: {tmp_path}/storage\n"
        "cluster:\n  nodes: [{name: box, resources: {CPU: 2}}]\n"
        "models:\n  - {name: tiny, source: 'path:///none'}\n"
    )
    directory = state_directory(load_config(config))
    process = psutil.Process()
    started = {"pid": process.pid, "started_at": process.create_time()}
    write_state(directory, LocalState(**started, temp_dir="/none", dashboard_url="http://127.0.0.1:1", settings={}))
    with pytest.raises(ControlError, match="cannot change this while it runs"):
        manta(f"gc --grace 0s --config {config}", storage=None)
