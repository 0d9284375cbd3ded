"""Aliases: a name that points at a version, moved by compare-and-swap, with every move on record.

The truth is the log of moves, one file per move, each created exclusively: of two writers that saw the same
generation exactly one creates the next. ``aliases/<alias>.json`` repeats the newest move for quick reading and for
people; ``history.jsonl`` repeats all moves of the model. Both are brought up to date by whoever writes next when a
writer dies between its move and the repetition.

    models/<name>/aliases/<alias>.json
    models/<name>/moves/<alias>/<generation>.json
    models/<name>/history.jsonl
"""

import getpass
import json
import os
import time
from typing import Literal

from pydantic import ValidationError

from cluster.errors import AliasConflict, RegistryError
from cluster.registry.manifest import ManifestModel, check_alias_name, check_model_name, check_version_name
from cluster.registry.tree import Tree


class AliasMove(ManifestModel):
    """One move of an alias, and with the highest generation: its state."""

    alias: str
    version: str
    """What the alias points at from this move on."""
    generation: int
    """1 for the first move, then one more each time."""
    previous: str | None
    """Where a rollback goes; None when there is nothing before."""
    previous_generation: int | None = None
    """The move that first put ``previous`` in place: the state a rollback restores."""
    kind: Literal["set", "rollback"] = "set"
    by: str
    at: int
    """Unix time, seconds."""
    reason: str


class Aliases:
    """The aliases of the models in one registry. Holds no state; any number of processes may use it at once."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def names(self, model: str) -> list[str]:
        """Aliases of ``model``, sorted."""
        found = self._tree.names(f"models/{check_model_name(model)}/moves")
        return [alias for alias in found if self.read(model, alias) is not None]

    def read(self, model: str, alias: str) -> AliasMove | None:
        """Where ``alias`` points now; None when it was never set."""
        move = self._repetition(model, alias)  # may be behind the log
        while (later := self._move(model, alias, 1 if move is None else move.generation + 1)) is not None:
            move = later
        return move

    def set(
        self, model: str, alias: str, version: str, *, reason: str, expected_generation: int | None = None
    ) -> AliasMove:
        """Point ``alias`` at ``version`` and return the new state; the present state if it points there already.

        ``expected_generation`` is what the caller read (0: no such alias); without it, what is there now is taken.
        AliasConflict when somebody else moved it in between. That the version exists is the caller's to check.
        """
        check_version_name(version)
        current = self.read(model, alias)
        _check_generation(model, alias, current, expected_generation)
        if current is not None and current.version == version:
            return current
        move = AliasMove(
            alias=check_alias_name(alias),
            version=version,
            generation=1 if current is None else current.generation + 1,
            previous=None if current is None else current.version,
            previous_generation=None if current is None else current.generation,
            by=_user(),
            at=int(time.time()),
            reason=reason,
        )
        return self._commit(model, move)

    def rollback(self, model: str, alias: str, *, reason: str, expected_generation: int | None = None) -> AliasMove:
        """Point ``alias`` at the version before the present one and return the new state.

        A second rollback goes one further back, not forward to the version that was just left.
        RegistryError when there is nothing before; AliasConflict as in ``set``.
        """
        current = self.read(model, alias)
        _check_generation(model, alias, current, expected_generation)
        if current is None:
            raise RegistryError(
                f"{model}@{alias}: no such alias; its aliases: {', '.join(self.names(model)) or 'none'}"
            )
        if current.previous is None or current.previous_generation is None:
            raise RegistryError(
                f"{model}@{alias} points at {current.version}, its first version: nothing to go back to"
            )
        restored = self._move(model, alias, current.previous_generation)
        if restored is None:
            raise RegistryError(
                f"{model}@{alias}: move {current.previous_generation} is missing; set the alias by hand"
            )
        move = current.model_copy(
            update={
                "version": restored.version,
                "generation": current.generation + 1,
                "previous": restored.previous,
                "previous_generation": restored.previous_generation,
                "kind": "rollback",
                "by": _user(),
                "at": int(time.time()),
                "reason": reason,
            }
        )
        return self._commit(model, move)

    def history(self, model: str, alias: str) -> tuple[AliasMove, ...]:
        """Every move of ``alias``, oldest first."""
        current = self.read(model, alias)
        if current is None:
            return ()
        moves = (self._move(model, alias, generation) for generation in range(1, current.generation + 1))
        return tuple(move for move in moves if move is not None)

    def _commit(self, model: str, move: AliasMove) -> AliasMove:
        won = self._tree.create(_move_path(model, move.alias, move.generation), _to_json(move))
        if not won:
            raise AliasConflict(
                f"{model}@{move.alias} was moved by somebody else past generation {move.generation - 1}; "
                "look at it again, then repeat"
            )
        self._repeat(model, move)
        return move

    def _repeat(self, model: str, move: AliasMove) -> None:
        path = f"models/{model}/history.jsonl"
        text = self._tree.read(path) if self._tree.size(path) is not None else b""
        recorded = {_recorded_move(line) for line in text.splitlines()}
        missing = [past for past in self.history(model, move.alias) if (past.alias, past.generation) not in recorded]
        torn = b"" if not text or text.endswith(b"\n") else b"\n"  # a writer died in the middle of its line
        self._tree.append(path, torn + b"".join(past.model_dump_json().encode() + b"\n" for past in missing))
        self._tree.replace(f"models/{model}/aliases/{move.alias}.json", _to_json(move))

    def _repetition(self, model: str, alias: str) -> AliasMove | None:
        path = f"models/{check_model_name(model)}/aliases/{check_alias_name(alias)}.json"
        return self._parse(path)

    def _move(self, model: str, alias: str, generation: int) -> AliasMove | None:
        return self._parse(_move_path(model, alias, generation))

    def _parse(self, path: str) -> AliasMove | None:
        try:
            return AliasMove.model_validate_json(self._tree.read(path))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise RegistryError(
                f"{self._tree.uri}/{path} is damaged, or written by a newer Manta: {error}"
            ) from error


def _move_path(model: str, alias: str, generation: int) -> str:
    return f"models/{model}/moves/{alias}/{generation}.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"


def _recorded_move(line: bytes) -> tuple[str, int] | None:
    try:
        move = json.loads(line)
    except ValueError:
        return None
    return move["alias"], move["generation"]


def _to_json(move: AliasMove) -> bytes:
    return (move.model_dump_json(indent=2) + "\n").encode()


def _check_generation(model: str, alias: str, current: AliasMove | None, expected: int | None) -> None:
    actual = 0 if current is None else current.generation
    if expected is not None and expected != actual:
        raise AliasConflict(
            f"{model}@{alias} is at generation {actual}, not {expected}; look at it again, then repeat"
        )
