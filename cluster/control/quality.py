"""``manta quality``: a model of the config and a text in, what each number format costs in quality out.

Measured in a subprocess, which has torch; this package does not. It is named by string and answers in JSON lines.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.config.models import ModelConfig
from cluster.config.schema import ClusterConfig
from cluster.control.report import Report
from cluster.control.versions import known_versions
from cluster.errors import ControlError, UsageError
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry

METER = "deployments.runtime.quality"
_WINDOW_TOKENS = 1024
_TAIL_LINES = 12
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "OMP_WAIT_POLICY": "passive",  # threads that spin are slower by ten times beside a busy cluster
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatQuality:
    """One way to hold a model's weights, and how well the model predicts the text in it."""

    format: str
    """dtype, or dtype+quantization."""
    perplexity: float
    ratio: float
    """Perplexity as a multiple of the first format's."""
    same_choice: float
    """Share of the positions at which the most likely token is that of the first format."""
    weight_bytes: int
    kernels: str
    """What computed it: native kernels or torch."""
    num_tokens: int


def formats_of(model: ModelConfig) -> tuple[str, ...]:
    """What is measured: the model's dtype first, then every quantization, which computes in bfloat16."""
    return tuple(dict.fromkeys((model.dtype, "bfloat16", "bfloat16+int8", "bfloat16+int4")))


def written_format(model: ModelConfig) -> str:
    """The format that the config asks for."""
    return model.dtype if model.quantization is None else f"{model.dtype}+{model.quantization}"


def measure_quality(
    config: ClusterConfig, model_name: str, text: Path, report: Report, *, num_windows: int
) -> list[FormatQuality]:
    """Perplexity of ``model_name``'s imported version on ``text`` in every format, plain ``dtype`` first.

    The text is read in ``num_windows`` windows of 1024 tokens, or of the model's whole context where that is shorter.
    Raises UsageError for a model or text that cannot be measured, ControlError in the meter's words when it fails.
    """
    model = _model(config, model_name)
    if not text.is_file():
        raise UsageError(f"manta quality: --text {text} is not a file")
    directory = _checkpoint(config, model)
    window_tokens = min(_WINDOW_TOKENS, model.context_tokens)
    command = [sys.executable, "-m", METER, "--checkpoint", str(directory), "--text", str(text)]
    command += ["--windows", str(num_windows), "--window-tokens", str(window_tokens), "--kernels", model.kernels]
    command += [part for form in formats_of(model) for part in ("--format", form)]
    return _with_ratios(_run(command, report))


def _model(config: ClusterConfig, name: str) -> ModelConfig:
    found = {model.name: model for model in config.models}
    if name not in found:
        raise UsageError(f"manta quality: no model {name} in the config; it has {', '.join(found)}")
    if found[name].task != "generate":
        raise UsageError(
            f"manta quality: {name} has task {found[name].task}; only models that generate predict a text"
        )
    return found[name]


def _checkpoint(config: ClusterConfig, model: ModelConfig) -> Path:
    registry = Registry(config.storage_root)
    known = known_versions(config, registry).get(model.name)
    if known is None:
        raise ControlError(f"{model.name} is not imported yet; run `manta up`, which imports {model.source}")
    return materialize(registry, registry.get(known.name, known.version))


def _run(command: list[str], report: Report) -> list[dict[str, Any]]:
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(  # noqa: S603 - our own module, arguments are paths and enumerations
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | _QUIET
        ) as process:
            assert process.stdout is not None
            results = list(_results(process.stdout, report))
        if process.returncode != 0:
            raise ControlError(f"the quality could not be measured:\n{_tail(errors)}")
    return results


def _results(lines: IO[str], report: Report) -> Iterator[dict[str, Any]]:
    for line in lines:
        message = json.loads(line)
        if "result" in message:
            yield {"format": message["format"]} | message["result"]
        else:
            report.progress(f"measuring {message['format']}", message["done"], message["total"], "windows")


def _tail(errors: IO[str]) -> str:
    errors.seek(0)
    return "\n".join(f"  {line}" for line in errors.read().strip().splitlines()[-_TAIL_LINES:])


def _with_ratios(results: list[dict[str, Any]]) -> list[FormatQuality]:
    plain = results[0]["perplexity"]
    return [FormatQuality(**result, ratio=result["perplexity"] / plain) for result in results]
