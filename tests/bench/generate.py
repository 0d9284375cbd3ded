"""``python -m tests.bench generate``: tokens per second through the whole stack beside transformers' ``generate``.

The same checkpoint, dtype and number of tokens; ``generate`` runs one static batch in this process, in the same run.
"""

import argparse
import asyncio
import itertools
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.bench.closed_loop import measure
from tests.bench.http_client import CompletionsServer
from tests.bench.machine import CpuClock
from tests.bench.servers import MODEL, MantaServer, Running, checkpoint_of
from tests.bench.start import QUICKSTART, STORAGE
from tests.bench.workloads import WORKLOADS, PromptSource

WARM_UP_S = 4.0
SECONDS = 15.0
NAMES = ("W1", "W2", "W3", "W4", "W5")


def main() -> None:
    """Start, measure, stop, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=STORAGE, help="where the model is, or will be imported to")
    storage = parser.parse_args().storage
    model = yaml.safe_load(QUICKSTART.read_text())["models"][0]
    with TemporaryDirectory() as directory:
        with MantaServer(variant="quickstart", model=model, storage=storage).running(Path(directory)) as running:
            table = speed_table(running, storage)
        Console().print(table)


def speed_table(running: Running, storage: Path) -> Table:
    """Every workload through the whole stack, and as a ratio to transformers' static batch in process."""
    directory = checkpoint_of(storage)
    source = PromptSource(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    table = Table("workload", "streams x in/out", "tok/s", "TTFT p50 ms", "x generate", "errors")
    for workload in map(WORKLOADS.__getitem__, NAMES):
        point = asyncio.run(
            measure(
                CompletionsServer(url=running.url, model=MODEL),
                workload,
                source.prompts(workload, 0),
                clock=CpuClock(running.roots),
                warm_up_s=WARM_UP_S,
                seconds=SECONDS,
            )
        )
        prompts = list(itertools.islice(source.prompts(workload, 1), workload.num_streams))
        found, first = point.figures, point.figures.first_token
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts])
        times = found.tokens_per_s / generate_tokens_per_s(reference, ids, workload.output_tokens)
        print(workload.name, f"{found.tokens_per_s:.1f} tok/s, {times:.2f} x generate", flush=True)
        cells = (f"{found.tokens_per_s:.1f}", f"{first.p50_ms:.0f}" if first else "-", f"{times:.2f}")
        table.add_row(workload.name, workload.shape, *cells, str(found.num_errors))
    return table


def generate_tokens_per_s(model: PreTrainedModel, prompts: torch.Tensor, num_tokens: int) -> float:
    """One static batch [streams, tokens] through ``generate``: output tokens per second, prefill included."""
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return len(prompts) * num_tokens / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
