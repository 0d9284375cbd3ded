"""What a number format costs in quality: a checkpoint and a text in, the perplexity of each format out.

Run as a process of its own, so that whoever asks needs no torch:

    python -m deployments.runtime.quality --checkpoint DIRECTORY --text FILE --format bfloat16 --format bfloat16+int4

Every line of standard output is a JSON object. ``{"format": ..., "done": 2, "total": 8}`` counts windows of the
format that is being measured; its result follows, with ``perplexity``, ``same_choice`` (share of the positions at
which the most likely token is that of the first format), ``num_tokens``, ``weight_bytes`` and ``kernels``. Exit
status 1 with one line on standard error when it cannot be measured.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from deployments.messages import SequenceStep, StepInput
from deployments.runtime.quantize import Quantization
from deployments.runtime.runner import StageRunner
from deployments.runtime.settings import DTYPES, Kernels, RunnerConfig, StageSlice
from deployments.runtime.support import UnsupportedModelError

_BLOCK_TOKENS = 16
_STEP_TOKENS = 256  # bounds the logits that exist at once
_CHARACTERS_PER_TOKEN = 16  # more than any text has on average
_QUANTIZATIONS: dict[str, Quantization | None] = {"": None, "int8": "int8", "int4": "int4"}


class QualityError(Exception):
    """The quality cannot be measured; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well a model in one format predicts a text."""

    perplexity: float
    """exp of the mean negative log-likelihood of the tokens; 1 is perfect."""
    first_choices: tuple[int, ...]
    """The most likely token at each predicted position."""
    weight_bytes: int
    kernels: str

    def same_choice(self, other: "Score") -> float:
        """Share of the positions at which both find the same token most likely."""
        pairs = list(zip(self.first_choices, other.first_choices, strict=True))
        return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def read_windows(directory: Path, text: str, *, window_tokens: int, num_windows: int) -> list[list[int]]:
    """``num_windows`` runs of ``window_tokens`` token ids, from places evenly spread over ``text``.

    Raises QualityError when the text is too short for that many.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    piece = len(text) // num_windows
    longest = min(piece, window_tokens * _CHARACTERS_PER_TOKEN)
    parts = [text[index * piece : index * piece + longest] for index in range(num_windows)]
    windows: list[list[int]] = [tokenizer(part, verbose=False)["input_ids"][:window_tokens] for part in parts]
    shortest = min(len(window) for window in windows)
    if shortest < window_tokens:
        raise QualityError(
            f"the text has {len(text)} characters, too few for {num_windows} windows of {window_tokens} tokens (one "
            f"has only {shortest}); give a longer text, or fewer windows"
        )
    return windows


def measure(
    runner: StageRunner, windows: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda _: None
) -> Score:
    """How well ``runner``, a whole model, predicts each token of a window from all before it.

    ``progress`` gets the number of windows done.
    """
    nats: float = 0
    first_choices: list[int] = []
    for number, window in enumerate(windows):
        for logits_TV, next_T in _predictions(runner, window):
            logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
            nats -= float(logprobs_TV.gather(1, next_T[:, None]).sum(dtype=torch.float64))
            first_choices += logits_TV.argmax(dim=-1).tolist()
        progress(number + 1)
    return Score(
        perplexity=math.exp(nats / len(first_choices)),
        first_choices=tuple(first_choices),
        weight_bytes=runner.weight_bytes,
        kernels=runner.kernels,
    )


def _predictions(runner: StageRunner, window: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [T, V] and the tokens that follow [T], step by step; every window takes the same blocks."""
    blocks = tuple(range(-(-len(window) // _BLOCK_TOKENS)))
    for start in range(0, len(window) - 1, _STEP_TOKENS):
        stop = min(start + _STEP_TOKENS, len(window) - 1)
        sequence = SequenceStep(1, tuple(window[start:stop]), start, blocks, False)
        logits_TV = runner.compute(StepInput(step=start, sequences=(sequence,)), None, every_row=True)
        yield logits_TV, torch.tensor(window[start + 1 : stop + 1], device=logits_TV.device)


def load_whole(
    directory: Path, *, dtype: torch.dtype, quantization: Quantization | None, kernels: Kernels, context_tokens: int
) -> StageRunner:
    """The model in ``directory`` as one stage on the CPU; UnsupportedModelError when it cannot be run so."""
    config = json.loads((directory / "config.json").read_text())
    num_layers = (config.get("text_config") or config)["num_hidden_layers"]
    return StageRunner(
        RunnerConfig(
            directory=directory,
            part=StageSlice(start=0, stop=num_layers, is_first=True, is_last=True),
            dtype=dtype,
            device=torch.device("cpu"),
            context_tokens=context_tokens,
            num_blocks=-(-context_tokens // _BLOCK_TOKENS),
            block_tokens=_BLOCK_TOKENS,
            quantization=quantization,
            kernels=kernels,
            num_threads=torch.get_num_threads(),
        )
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m deployments.runtime.quality")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8")
    parser.add_argument(
        "--format", action="append", required=True, dest="formats", help="DTYPE or DTYPE+QUANTIZATION"
    )
    parser.add_argument("--kernels", choices=("auto", "native", "torch"), default="auto")
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        _measure_all(args)
    except (QualityError, UnsupportedModelError, OSError, UnicodeDecodeError) as error:
        place = args.text if isinstance(error, QualityError | UnicodeDecodeError) else args.checkpoint
        sys.exit(f"{place}: {error}")


def _measure_all(args: argparse.Namespace) -> None:
    text = args.text.read_text(encoding="utf-8")
    windows = read_windows(args.checkpoint, text, window_tokens=args.window_tokens, num_windows=args.windows)
    first: Score | None = None
    for form in args.formats:
        dtype, _, quantization = form.partition("+")
        runner = load_whole(
            args.checkpoint,
            dtype=DTYPES[dtype],
            quantization=_QUANTIZATIONS[quantization],
            kernels=args.kernels,
            context_tokens=args.window_tokens,
        )

        def report(done: int, form: str = form) -> None:
            _print({"format": form, "done": done, "total": len(windows)})

        score = measure(runner, windows, report)
        first = first or score
        result = {
            "perplexity": score.perplexity,
            "same_choice": score.same_choice(first),
            "num_tokens": len(score.first_choices),
            "weight_bytes": score.weight_bytes,
            "kernels": score.kernels,
        }
        _print({"format": form, "result": result})


def _print(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
