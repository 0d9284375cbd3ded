"""``python -m tests.bench grammar DIRECTORY``: what a JSON schema costs each token, and whether steps wait for it.

One stage with all layers, in this process. ``mask`` is the processor time of a mask, on the thread that computes it
while the next step is under way; ``wait`` is how long a step stood still for the masks of all its rows.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from deployments.messages import Grammar, SamplingParams, SequenceStart, SequenceStep, StepInput
from deployments.runtime.runner import StageRunner
from deployments.runtime.settings import RunnerConfig, StageSlice

NUM_ROWS = (1, 8, 32)
NUM_STEPS = 48
BLOCK_TOKENS = 16
BLOCKS_PER_ROW = 16
PROMPT = "Write a list of people as JSON, with name, age, address and tags.\n"
SCHEMA = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
            "address": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                "required": ["city", "zip"],
                "additionalProperties": False,
            },
            "active": {"type": "boolean"},
        },
        "required": ["name", "age", "email", "tags", "address", "active"],
        "additionalProperties": False,
    },
}


class Bench:
    """A model and its prompt; numbers sequences and steps."""

    def __init__(self, directory: Path, kernels: str) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.runner = StageRunner(
            RunnerConfig(
                directory=directory,
                part=StageSlice(start=0, stop=config["num_hidden_layers"], is_first=True, is_last=True),
                dtype=torch.bfloat16,
                device=torch.device("cpu"),
                context_tokens=BLOCKS_PER_ROW * BLOCK_TOKENS,
                num_blocks=BLOCKS_PER_ROW * max(NUM_ROWS),
                block_tokens=BLOCK_TOKENS,
                kernels=kernels,  # type: ignore[arg-type]
                num_threads=torch.get_num_threads(),
            )
        )
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._prompt = tuple(tokenizer.encode(PROMPT).ids)
        self._end_token_ids = (config["eos_token_id"],)
        self._num_steps = 0

    def run(self, num_rows: int, grammar: Grammar | None) -> tuple[list[float], list[float], float]:
        """Seconds of each step, seconds of it waited for masks, and mean processor seconds of a mask."""
        sampling = SamplingParams(max_tokens=NUM_STEPS, temperature=0.8, grammar=grammar, ignore_eos=True)
        length = len(self._prompt)
        starts = [SequenceStart(row, self._prompt, length, sampling, row, 0, ()) for row in range(num_rows)]
        tokens = dict.fromkeys(range(num_rows), self._prompt)
        position, step_s, wait_s = 0, [], []
        for _ in range(NUM_STEPS):
            parts = tuple(
                SequenceStep(row, token_ids, position, self._blocks(row, position + len(token_ids)), True)
                for row, token_ids in tokens.items()
            )
            begin, waited = time.perf_counter(), self._waited_s()
            samples = self.runner.run(self._step(parts, starts), None)
            step_s.append(time.perf_counter() - begin)
            wait_s.append(self._waited_s() - waited if position else 0.0)
            assert isinstance(samples, list)
            assert all(sample.problem is None for sample in samples)
            position += len(next(iter(tokens.values())))
            tokens, starts = {sample.sequence_id: (sample.token_id,) for sample in samples}, []
        constraints = self._constraints()
        masks = sum(constraint.num_masks - 1 for constraint in constraints)
        mask_s = sum(constraint.spent_s for constraint in constraints) / masks if masks else 0.0
        self.runner.forget()
        return step_s[1:], wait_s[1:], mask_s

    def _step(self, parts: tuple[SequenceStep, ...], starts: list[SequenceStart]) -> StepInput:
        self._num_steps += 1
        return StepInput(step=self._num_steps, sequences=parts, started=tuple(starts))

    def _constraints(self) -> list:
        rows = self.runner._sampler._sequences.values()
        return [row.constraint for row in rows if row.constraint is not None]

    def _waited_s(self) -> float:
        return sum(constraint.waited_s for constraint in self._constraints())

    @staticmethod
    def _blocks(row: int, num_tokens: int) -> tuple[int, ...]:
        first = row * BLOCKS_PER_ROW
        return tuple(range(first, first - (-num_tokens // BLOCK_TOKENS)))

    @property
    def grammar(self) -> Grammar:
        """The schema, for this model."""
        return Grammar(kind="json_schema", text=json.dumps(SCHEMA), end_token_ids=self._end_token_ids)


def main() -> None:
    """Measure free and constrained decoding in turns, and print the better of two rounds of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench grammar", description=__doc__)
    parser.add_argument("directory", type=Path, help="a checkpoint of a generating model, with its tokenizer.json")
    parser.add_argument("--kernels", choices=["auto", "torch", "native"], default="auto")
    arguments = parser.parse_args()
    bench = Bench(arguments.directory, arguments.kernels)
    bench.run(1, bench.grammar)  # reads the tokenizer, compiles
    table = Table("rows", "free step ms", "constrained step ms", "mask us/token", "wait us/step", "longest wait us")
    for num_rows in NUM_ROWS:
        rounds = [(bench.run(num_rows, None), bench.run(num_rows, bench.grammar)) for _ in range(2)]
        free_s = min(statistics.median(free[0]) for free, _ in rounds)
        step_s, wait_s, mask_s = min((constrained for _, constrained in rounds), key=lambda one: sum(one[0]))
        table.add_row(
            str(num_rows),
            f"{free_s * 1e3:.1f}",
            f"{statistics.median(step_s) * 1e3:.1f}",
            f"{mask_s * 1e6:.0f}",
            f"{statistics.fmean(wait_s) * 1e6:.0f}",
            f"{max(wait_s) * 1e6:.0f}",
        )
    Console().print(f"{arguments.directory.name}: {bench.runner.kernels} kernels, {torch.get_num_threads()} threads")
    Console().print(table)


if __name__ == "__main__":
    main()
