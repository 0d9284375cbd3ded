"""Aliases: moved by one writer at a time, with a record, and back again."""

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import AliasConflict, RegistryError
from cluster.registry.alias import Aliases
from cluster.registry.manifest import VersionSpec
from cluster.registry.store import Registry
from cluster.registry.tree import Tree, open_tree
from tests.support.tiny_checkpoint import write_checkpoint

SPEC = VersionSpec(task="generate", dtype="float32", architecture="LlamaForCausalLM", model_type="llama")


@pytest.fixture(params=["local", "memory"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    return open_tree(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def _history(tree: Tree) -> list[tuple[str, int, str]]:
    lines = map(json.loads, tree.read("models/tiny/history.jsonl").splitlines())
    return [(line["alias"], line["generation"], line["version"]) for line in lines]


def test_alias_moves_are_recorded(tree: Tree) -> None:
    aliases = Aliases(tree)
    assert aliases.read("tiny", "latest") is None
    first = aliases.set("tiny", "latest", "v1", reason="first")
    second = aliases.set("tiny", "latest", "v2", reason="second")
    assert (first.generation, first.previous) == (1, None)
    assert (second.generation, second.previous, second.reason) == (2, "v1", "second")
    assert aliases.read("tiny", "latest") == second
    assert aliases.history("tiny", "latest") == (first, second)
    assert _history(tree) == [("latest", 1, "v1"), ("latest", 2, "v2")]
    assert json.loads(tree.read("models/tiny/aliases/latest.json"))["version"] == "v2"
    assert aliases.names("tiny") == ["latest"]


def test_setting_what_is_set_is_no_move(tree: Tree) -> None:
    aliases = Aliases(tree)
    first = aliases.set("tiny", "latest", "v1", reason="first")
    assert aliases.set("tiny", "latest", "v1", reason="again") == first
    assert len(_history(tree)) == 1


def test_stale_generation_is_a_conflict(tree: Tree) -> None:
    aliases = Aliases(tree)
    aliases.set("tiny", "latest", "v1", reason="", expected_generation=0)
    with pytest.raises(AliasConflict, match=r"tiny@latest is at generation 1, not 0"):
        aliases.set("tiny", "latest", "v2", reason="", expected_generation=0)
    with pytest.raises(AliasConflict, match=r"generation 1, not 7"):
        aliases.rollback("tiny", "latest", reason="", expected_generation=7)


def test_one_of_many_racing_writers_wins_each_generation(tmp_path: Path) -> None:
    aliases = Aliases(open_tree(str(tmp_path)))
    aliases.set("tiny", "latest", "v1", reason="")
    barrier = threading.Barrier(8)

    def move(number: int) -> str | None:
        barrier.wait(timeout=30)
        try:
            return aliases.set("tiny", "latest", f"v{number}", reason="", expected_generation=1).version
        except AliasConflict:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [version for version in pool.map(move, range(2, 10)) if version is not None]
    current = aliases.read("tiny", "latest")
    assert current is not None
    assert winners == [current.version]
    assert current.generation == 2


def test_writer_that_loses_after_reading_gets_a_conflict(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Aliases(tree), Aliases(tree)
    slow.set("tiny", "latest", "v1", reason="")
    create = tree.create

    def create_after_the_other(path: str, data: bytes) -> bool:
        monkeypatch.setattr(tree, "create", create)
        fast.set("tiny", "latest", "v3", reason="")
        return create(path, data)

    monkeypatch.setattr(tree, "create", create_after_the_other)
    with pytest.raises(AliasConflict, match="moved by somebody else past generation 1"):
        slow.set("tiny", "latest", "v2", reason="")
    current = slow.read("tiny", "latest")
    assert current is not None
    assert current.version == "v3"


def test_rollback_walks_back_and_not_forward(tree: Tree) -> None:
    aliases = Aliases(tree)
    for version in ("v1", "v2", "v3"):
        aliases.set("tiny", "latest", version, reason="")
    assert aliases.rollback("tiny", "latest", reason="v3 is bad").version == "v2"
    second = aliases.rollback("tiny", "latest", reason="v2 too")
    assert (second.version, second.previous, second.kind, second.generation) == ("v1", None, "rollback", 5)
    with pytest.raises(RegistryError, match="points at v1, its first version: nothing to go back to"):
        aliases.rollback("tiny", "latest", reason="")
    aliases.set("tiny", "latest", "v4", reason="")
    assert aliases.rollback("tiny", "latest", reason="").version == "v1"
    assert [version for _, _, version in _history(tree)] == ["v1", "v2", "v3", "v2", "v1", "v4", "v1"]


def test_rollback_of_an_unknown_alias_names_the_known_ones(tree: Tree) -> None:
    aliases = Aliases(tree)
    aliases.set("tiny", "champion", "v1", reason="")
    with pytest.raises(RegistryError, match="no such alias; its aliases: champion"):
        aliases.rollback("tiny", "latest", reason="")


def test_writer_that_died_after_its_move_is_completed_by_the_next(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    aliases = Aliases(tree)
    aliases.set("tiny", "latest", "v1", reason="")
    with monkeypatch.context() as dying:
        dying.setattr(tree, "append", _die)
        with pytest.raises(OSError, match="gone"):
            aliases.set("tiny", "latest", "v2", reason="")
    current = aliases.read("tiny", "latest")
    assert current is not None
    assert current.version == "v2"
    aliases.set("tiny", "latest", "v3", reason="")
    assert [version for _, _, version in _history(tree)] == ["v1", "v2", "v3"]


def _die(path: str, data: bytes) -> None:
    raise OSError("gone")


def test_torn_history_line_is_left_and_the_move_written_again(tree: Tree) -> None:
    aliases = Aliases(tree)
    aliases.set("tiny", "latest", "v1", reason="")
    tree.replace("models/tiny/history.jsonl", tree.read("models/tiny/history.jsonl")[:-20])
    aliases.set("tiny", "latest", "v2", reason="")
    torn, *lines = tree.read("models/tiny/history.jsonl").splitlines()
    assert [json.loads(line)["version"] for line in lines] == ["v1", "v2"]
    assert not torn.endswith(b"}")


@pytest.mark.parametrize("alias", ["", "v1", "v12", "../x", "a/b", "A", "9a", ".x", "a" * 41])
def test_odd_alias_names_are_refused(tree: Tree, alias: str) -> None:
    with pytest.raises(RegistryError, match="alias"):
        Aliases(tree).set("tiny", alias, "v1", reason="")


def test_alias_of_a_missing_version_is_refused(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "storage"))
    registry.publish("tiny", write_checkpoint(tmp_path / "c"), SPEC)
    with pytest.raises(RegistryError, match=r"tiny@v2 is not in .*versions of tiny: v1"):
        registry.set_alias("tiny", "latest", "v2", reason="")


def test_rollback_to_a_removed_version_is_refused(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "storage"))
    for seed in range(2):
        version = registry.publish("tiny", write_checkpoint(tmp_path / f"c{seed}", seed=seed), SPEC)
        registry.set_alias("tiny", "latest", version.version, reason="")
    registry.tree.remove("models/tiny/versions/v1/manifest.json")
    with pytest.raises(RegistryError, match="tiny@v1 is not in"):
        registry.rollback("tiny", "latest", reason="")
    assert registry.resolve("tiny").version == "v2"
