"""The numbers a person watches: what a step took and gave in, lines of logs and points of curves out."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import msgspec
import psutil
import torch
from tensorboardX import SummaryWriter

from cluster.runs.files import EVALUATIONS, LOG
from cluster.runs.log import EvaluationReport, StepReport, encode_line


class Meter:
    """Makes the reports of every worker; the one with a directory writes them."""

    def __init__(
        self,
        run_dir: Path | None,
        *,
        first_step: int,
        flops_per_position: float,
        peak_flops: float,
        device: torch.device,
    ) -> None:
        """``peak_flops`` is that of all workers. An earlier attempt's lines after ``first_step`` are dropped."""
        self._flops = flops_per_position
        self._peak = peak_flops
        self._device = device
        self._process = psutil.Process()
        self._log: TextIO | None = None
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._log = _continue_log(run_dir / LOG, first_step).open("a", buffering=1)
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def report(
        self,
        *,
        step: int,
        num_steps: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        counts: tuple[int, int, int],
        step_s: float,
        data_wait_s: float,
        checkpoint_stall_s: float,
        staleness: int,
    ) -> StepReport:
        """The step's numbers, written where this worker writes; ``counts`` are targets, tokens and positions."""
        targets, tokens, positions = counts
        report = StepReport(
            step=step,
            num_steps=num_steps,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            num_targets=targets,
            num_tokens=tokens,
            padding_ratio=1.0 - tokens / positions if positions else 0.0,
            tokens_per_s=tokens / step_s,
            mfu=positions * self._flops / (step_s * self._peak),
            step_s=step_s,
            data_wait_s=data_wait_s,
            checkpoint_stall_s=checkpoint_stall_s,
            memory_bytes=self._used_memory_bytes(),
            staleness=staleness,
            time=_now(),
        )
        if self._log is not None:
            self._write(self._log, report)
        return report

    def _write(self, log: TextIO, report: StepReport) -> None:
        log.write(encode_line(report))
        for name, value in msgspec.structs.asdict(report).items():
            if name not in ("step", "num_steps", "time"):
                self._board.add_scalar(f"train/{name}", value, report.step)

    def _used_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return int(self._process.memory_info().rss)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._log is not None:
            self._log.close()
            self._board.close()


class EvaluationLog:
    """Writes the evaluations of a run; a file of its own, since steps and evaluations may come from two machines."""

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """An earlier attempt's lines after ``first_step`` are dropped."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = _continue_log(run_dir / EVALUATIONS, first_step)
        self._curves = run_dir / "tensorboard" / "evaluate"
        self._purge_step = first_step + 1
        self._board: SummaryWriter | None = None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics after ``step`` steps."""
        with self._path.open("a") as log:
            log.write(encode_line(EvaluationReport(step=step, evaluation=dict(metrics), time=_now())))
        if self._board is None:
            self._board = SummaryWriter(str(self._curves), purge_step=self._purge_step)
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"evaluate/{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        """End the thread that writes the curves."""
        if self._board is not None:
            self._board.close()


def _now() -> float:
    return round(time.time(), 3)


def _continue_log(path: Path, first_step: int) -> Path:
    if path.is_file():
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of an attempt that was killed while writing
            if entry["step"] <= first_step:
                kept.append(line + "\n")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept))
        partial.replace(path)
    return path


_KNOWN_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 operations per second by the makers' data sheets; a name is matched as a part of the device's."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix product operations per second: by data sheet where known, else the best of a few products done here."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _KNOWN_PEAKS.items():
            if part in name:
                return peak
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones((size, size), dtype=dtype, device=device)
    fastest_s = sys.float_info.max
    for _ in range(5):
        began = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for an accelerator
        fastest_s = min(fastest_s, time.perf_counter() - began)
    return 2 * size**3 / fastest_s
