"""``python -m tests.bench``: how long the quickstart takes to start, and how fast it generates, as ratios.

Prints the cold start (Ray not running, models already in the registry), the warm redeploy (one model's settings
changed), and for each workload output tokens/s and the median time to the first token, beside transformers' own
``generate`` over the same checkpoint, dtype and number of tokens, in this process, in the same run.
"""

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
from tests.support.running import Cluster, write_cluster

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
STORAGE = Path.home() / ".cache" / "manta-tests"
MODEL = "smollm2"
WARM_UP_S = 4.0
SECONDS = 15.0


def main() -> None:
    """Start, measure, stop, print."""
    console = Console()
    with TemporaryDirectory() as directory:
        models = yaml.safe_load(QUICKSTART.read_text())["models"]
        cluster = write_cluster(Path(directory), "bench", models)
        cluster.edit(lambda values: values.update(storage=str(STORAGE)))
        try:
            cluster.up()  # brings the models into the registry, if they are not there yet
            cluster.down()
            console.print(start_table(cluster))
            console.print(speed_table(cluster))
        finally:
            cluster.down()


def start_table(cluster: Cluster) -> Table:
    """Cold start and warm redeploy, in seconds."""
    table = Table("start", "seconds")
    table.add_row("cold: Ray, gateway, both models answer", f"{timed(cluster):.1f}")
    cluster.edit(lambda values: values["models"][0].update(batching={"max_running": 24}))
    table.add_row("warm: one model's settings changed", f"{timed(cluster):.1f}")
    table.add_row("nothing changed", f"{timed(cluster):.1f}")
    return table


def timed(cluster: Cluster) -> float:
    """Seconds that ``manta up`` takes."""
    begin = time.perf_counter()
    cluster.up()
    return time.perf_counter() - begin


def speed_table(cluster: Cluster) -> Table:
    """Every workload through the whole stack, and as a ratio to transformers' static batch in process."""
    registry = Registry(str(STORAGE))
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
