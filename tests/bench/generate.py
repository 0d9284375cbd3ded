"""``python -m tests.bench generate``: tokens per second through the whole stack beside transformers' ``generate``.

The same checkpoint, dtype and number of tokens; ``generate`` runs one static batch in this process, in the same run.
"""

import argparse
import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from tests.bench.load import WORKLOADS, Workload, prompt_ids, run
from tests.bench.start import QUICKSTART, STORAGE
from tests.support.running import Cluster, write_cluster

MODEL = "smollm2"
WARM_UP_S = 4.0
SECONDS = 15.0


def main() -> None:
    """Start, measure, stop, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=STORAGE, help="where the models are, or will be imported to")
    storage = parser.parse_args().storage
    with TemporaryDirectory() as directory:
        cluster = write_cluster(Path(directory), "bench", yaml.safe_load(QUICKSTART.read_text())["models"][:1])
        cluster.edit(lambda values: values.update(storage=str(storage)))
        try:
            cluster.up()
            Console().print(speed_table(cluster))
        finally:
            cluster.down()


def speed_table(cluster: Cluster) -> Table:
    """Every workload through the whole stack, and as a ratio to transformers' static batch in process."""
    registry = Registry(yaml.safe_load(cluster.config.read_text())["storage"])
    directory = materialize(registry, registry.resolve(f"{MODEL}@latest"))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    table = Table("workload", "streams", "in/out", "tok/s", "TTFT p50 ms", "x generate", "errors")
    for workload in WORKLOADS:
        measured = asyncio.run(run(cluster.url, MODEL, workload, warm_up_s=WARM_UP_S, seconds=SECONDS))
        ours = measured.tokens_per_second(WARM_UP_S, WARM_UP_S + SECONDS)
        ratio = ours / generate_tokens_per_second(reference, workload)
        shape = f"{workload.prompt_tokens}/{workload.output_tokens}"
        print(workload.name, f"{ours:.1f} tok/s, {ratio:.2f} x generate", flush=True)
        table.add_row(
            workload.name,
            str(workload.num_streams),
            shape,
            f"{ours:.1f}",
            f"{measured.first_token_p50_ms:.0f}",
            f"{ratio:.2f}",
            str(measured.num_errors),
        )
    return table


def generate_tokens_per_second(model: PreTrainedModel, workload: Workload) -> float:
    """One static batch of the workload's shape through ``generate``: output tokens per second, prefill included."""
    prompts = torch.tensor([prompt_ids(workload.prompt_tokens, number) for number in range(workload.num_streams)])
    num_tokens = workload.output_tokens
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
    return workload.num_streams * num_tokens / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
