"""Conversion in a subprocess: a GGUF file, or safetensors in another dtype, becomes a directory of safetensors.

The subprocess has torch; this package does not. It is named by string and answers in JSON lines.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.config.models import Dtype, Task
from cluster.errors import SourceError
from cluster.registry.progress import Progress

CONVERTER = "deployments.runtime.importing"
_TAIL_LINES = 12
_STARTING = "starting the converter"
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def convert(source: Path, out: Path, *, task: Task, dtype: Dtype, progress: Progress) -> dict[str, Any]:
    """Convert ``source`` (a .gguf file or a directory) into ``out``; what the converter found out, e.g. ``license``.

    SourceError with the converter's own last words when it fails.
    """
    command = [sys.executable, "-m", CONVERTER, "--source", str(source), "--out", str(out)]
    command += ["--task", task, "--dtype", dtype, "--end-with-stdin"]
    progress(_STARTING, 0, None, "steps")
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own module, arguments are paths and enumerations
            command,
            stdin=subprocess.PIPE,  # stays open, and empty, as long as this process lives: the converter ends with it
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | _QUIET,
        )
        try:
            result = _follow(process, progress)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if status != 0 or result is None:
            raise SourceError(f"{source} could not be converted ({_how_it_ended(status)}):\n{_tail(errors)}")
    return result


def _follow(process: subprocess.Popen[str], progress: Progress) -> dict[str, Any] | None:
    assert process.stdout is not None
    with process.stdout as lines:
        for number, line in enumerate(lines):
            if number == 0:
                progress(_STARTING, 1, 1, "steps")
            message = json.loads(line)
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            progress(message["label"], message["done"], message["total"], message["unit"])
    return None


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"killed by signal {-status}; with signal 9 the machine may have been short of memory"
    return f"exit status {status}"


def _tail(errors: Any) -> str:
    errors.seek(0)
    return "\n".join(f"  {line}" for line in errors.read().strip().splitlines()[-_TAIL_LINES:])
