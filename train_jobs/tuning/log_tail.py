"""Evaluations of a run as they are logged: a run directory in; those that came since the last look out."""

from pathlib import Path
from typing import Any

from cluster.runs.files import EVALUATIONS
from cluster.runs.log import EvaluationReport, decode_evaluation


class LogTail:
    """Reads what was appended. A resumed run drops the lines after its checkpoint; its steps do not come twice."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVALUATIONS
        self._offset = 0
        self._identity: Any = None
        self._step = 0

    def new(self) -> list[EvaluationReport]:
        """Evaluations after later steps than those before, in order; a line that is being written is left."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            self._follow(file)
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        self._offset += len(whole) + 1 if whole else 0
        lines = [decode_evaluation(line) for line in whole.split(b"\n")]
        found = [line for line in lines if line is not None and line.step > self._step]
        self._step = max([self._step, *(line.step for line in found)])
        return found

    def _follow(self, file: Any) -> None:
        """From the start again when it is another file, or has become shorter."""
        size = file.seek(0, 2)
        identity = self._path.stat().st_ino
        if identity != self._identity or size < self._offset:
            self._offset, self._identity = 0, identity
