"""A GGUF file, or safetensors in another dtype, become a directory of safetensors in the wanted dtype.

Run as a process of its own, so that whoever imports needs no torch:

    python -m deployments.runtime.importing --source FILE_OR_DIRECTORY --out DIRECTORY --task generate --dtype
    bfloat16

Progress goes to standard output as JSON lines, ``{"label": ..., "done": ..., "total": ..., "unit": ...}``; the last
line is ``{"result": {"license": ...}}``. Exit status 1 with one line on standard error when the source cannot be
converted.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cluster.registry.positions import max_positions

Report = Callable[[str, int, int, str], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FOREIGN_KEYS = ("backend", "is_local", "local_files_only")
"""Keys of ``tokenizer_config.json`` that describe how the GGUF was opened, not the tokenizer."""


def convert_gguf(source: Path, out: Path, *, task: str, dtype: torch.dtype, report: Report) -> dict[str, Any]:
    """Write the model and tokenizer in the GGUF file ``source`` to ``out``; returns ``{"license": ...}``.

    The weights are unpacked: transformers would keep them in GGUF blocks, and those cannot be saved.
    """
    # Imported here, and below: seconds that a conversion of safetensors does not need.
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    model_class = AutoModel if task == "embed" else AutoModelForCausalLM
    _report_loading(report)
    origin = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    report("reading the tokenizer", 0, 1, "steps")
    tokenizer = AutoTokenizer.from_pretrained(**origin)
    report("reading the tokenizer", 1, 1, "steps")
    report("unpacking the weights", 0, 1, "steps")
    model = model_class.from_pretrained(**origin, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    report("unpacking the weights", 1, 1, "steps")
    report("writing safetensors", 0, 1, "steps")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _clean_descriptions(out)
    report("writing safetensors", 1, 1, "steps")
    return {"license": _gguf_license(source)}


def convert_safetensors(source: Path, out: Path, *, dtype: torch.dtype, report: Report) -> dict[str, Any]:
    """Write every safetensors file under ``source`` to ``out`` with floating-point tensors in ``dtype``.

    File names, tensor names and tensors of other types (integers, booleans) stay as they are. Other files are not
    copied, except that ``config.json`` is written with the new dtype and the index of shards with the new total size.
    """
    files = sorted(path.relative_to(source) for path in source.rglob("*.safetensors"))
    total_bytes = sum((source / path).stat().st_size for path in files)
    done_bytes = num_written = 0
    for path in files:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        num_written += _convert_shard(source / path, out / path, dtype)
        done_bytes += (source / path).stat().st_size
        report("converting", done_bytes, total_bytes, "B")
    _rewrite(source / "config.json", out / "config.json", lambda config: _with_dtype(config, dtype))
    index = "model.safetensors.index.json"
    if (source / index).is_file():
        _rewrite(source / index, out / index, lambda content: _with_total_size(content, num_written))
    return {"license": None}


def _convert_shard(source: Path, target: Path, dtype: torch.dtype) -> int:
    """Bytes of the tensors written."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    converted = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(converted, target, metadata=metadata)
    return sum(tensor.nbytes for tensor in converted.values())


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    config.pop("torch_dtype", None)
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def _with_total_size(index: dict[str, Any], num_bytes: int) -> dict[str, Any]:
    return index | {"metadata": index.get("metadata", {}) | {"total_size": num_bytes}}


def _clean_descriptions(out: Path) -> None:
    """Put right what transformers writes after reading a GGUF: its own class names, an unbounded length, a flag."""
    config = json.loads((out / "config.json").read_text())
    _rewrite(out / "config.json", out / "config.json", lambda content: _without(content, "_model_name_or_path"))
    generation = out / "generation_config.json"
    if generation.is_file():
        _rewrite(generation, generation, lambda content: _without(content, "_from_model_config"))

    def clean_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
        kept = _without(content, *_FOREIGN_KEYS) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        limit = max_positions(config)
        return kept | {"model_max_length": limit} if limit is not None else kept

    _rewrite(out / "tokenizer_config.json", out / "tokenizer_config.json", clean_tokenizer)


def _without(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}


def _rewrite(source: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = change(json.loads(source.read_text()))
    target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _gguf_license(source: Path) -> str | None:
    from transformers.integrations.gguf.reader import read_gguf_metadata  # noqa: PLC0415

    metadata, _ = read_gguf_metadata(str(source))
    found = metadata.get("general.license")
    return None if found is None else str(found)


class _ReportingBar:
    """Stands in for a tqdm bar and passes its counts on: once per hundredth, and at the end."""

    def __init__(self, report: Report, iterable: Any, label: str, total: int | None) -> None:
        self._report = report
        self._iterable = iterable
        self._label = label
        self._total = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else 0
        self._done = self._reported = 0

    def __iter__(self) -> Any:
        for item in self._iterable:
            yield item
            self.update(1)

    def __enter__(self) -> "_ReportingBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, num: int = 1) -> None:
        self._done += num
        if self._done - self._reported >= self._total / 100 or self._done == self._total:
            self._reported = self._done
            self._report(self._label, self._done, self._total, "tensors")

    def set_postfix(self, *arguments: object, **details: object) -> None:
        """Details beside the bar are not shown."""

    def set_description(self, *arguments: object, **details: object) -> None:
        """The label stays."""

    def close(self) -> None:
        """Nothing to free."""


def _report_loading(report: Report) -> None:
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    def make_bar(factory: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> _ReportingBar:  # noqa: ARG001
        iterable = arguments[0] if arguments else options.get("iterable")
        label = str(options.get("desc") or "loading").rstrip(". ").lower()
        return _ReportingBar(report, iterable, label, options.get("total"))

    transformers_logging.set_verbosity_error()
    transformers_logging.set_tqdm_hook(make_bar)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.runtime.importing", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a .gguf file, or a directory with safetensors")
    parser.add_argument("--out", type=Path, required=True, help="an empty or new directory")
    parser.add_argument("--task", choices=("generate", "embed", "classify"), required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), required=True)
    parser.add_argument(
        "--end-with-stdin", action="store_true", help="exit when standard input closes: the caller died"
    )
    return parser.parse_args(arguments)


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # unbuffered: no lock that the interpreter's end would trip over
        pass
    os._exit(1)


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status."""
    options = _parse(arguments)
    if options.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the JSON lines

    def report(label: str, done: int, total: int, unit: str) -> None:
        lines.write(json.dumps({"label": label, "done": done, "total": total, "unit": unit}) + "\n")

    options.out.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[options.dtype]
    try:
        if options.source.is_dir():
            result = convert_safetensors(options.source, options.out, dtype=dtype, report=report)
        else:
            result = convert_gguf(options.source, options.out, task=options.task, dtype=dtype, report=report)
    except Exception as error:  # the border of the process: whoever started it wants one line, not a traceback
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    lines.write(json.dumps({"result": result}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
