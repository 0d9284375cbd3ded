"""The quickstart with its real models: brought in, versioned, served, asked; compared with plain transformers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from deployments.messages import SamplingParams, SequenceStart, SequenceStep, StepInput
from tests.support.local_stages import load_runners
from tests.support.running import Cluster, write_cluster

pytestmark = pytest.mark.e2e

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
# Downloads are checked against their digests and kept between runs.
STORAGE = Path.home() / ".cache" / "manta-tests"

# Largest difference of any next-token probability between our bfloat16 stages and transformers in float32, as a
# multiple of what transformers' own bfloat16 differs by: rounding depends on the number of rows in a product.
TOLERANCE = 2.0

SENTENCES = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The quickstart on ports of its own, its storage kept for the next run."""
    models = yaml.safe_load(QUICKSTART.read_text())["models"]
    cluster = write_cluster(tmp_path_factory.mktemp("quickstart"), "quickstart-test", models)
    cluster.edit(lambda values: values.update(storage=str(STORAGE)))
    try:
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def said(cluster: Cluster) -> str:
    """What ``manta up`` printed."""
    return cluster.up()


@pytest.fixture(scope="module")
def client(cluster: Cluster, said: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def version_directory(model: str) -> Path:
    registry = Registry(str(STORAGE))
    return materialize(registry, registry.resolve(f"{model}@latest"))


def test_up_prints_the_models_answer_and_what_to_do_next(cluster: Cluster, said: str) -> None:
    assert "Paris" in said
    assert f"{cluster.url}/v1" in said
    assert "curl http" in said
    assert " chat smollm2" in said


def test_a_real_model_answers_over_two_stages(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    whole = client.chat.completions.create(model="smollm2", messages=question, temperature=0, max_tokens=20)
    stream = client.chat.completions.create(
        model="smollm2", messages=question, temperature=0, max_tokens=20, stream=True
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "Paris" in whole.choices[0].message.content
    assert streamed == whole.choices[0].message.content


def test_the_command_line_chats(cluster: Cluster, said: str) -> None:
    question = ("What is the capital of France?", "--max-tokens", "20")
    done = cluster.manta("chat", "smollm2", *question, "--config", str(cluster.config))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_embeddings_are_those_of_plain_transformers(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="minilm", input=SENTENCES)
    ours = np.array([item.embedding for item in answer.data])
    directory = version_directory("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None].float()
    theirs = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    assert np.abs(ours - theirs).max() < 1e-5
    assert ours[0] @ ours[1] > ours[0] @ ours[2] + 0.3, "sentences of one meaning are closer"


def our_distributions(directory: Path, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens over three uneven stages, the prompt in chunks of 4; and their distributions, [tokens, V]."""
    runners = load_runners(directory, [0, 11, 19, 30], num_blocks=16, block_tokens=16, dtype="bfloat16")
    vocabulary = runners[-1].slice.vocab_size
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=vocabulary)
    started = (SequenceStart(1, tuple(prompt), len(prompt), sampling, 0, 0, ()),)
    tokens, rows, computed = list(prompt), [], 0
    while len(rows) < num_tokens:
        new = tuple(tokens[computed : computed + 4])
        complete = computed + len(new) == len(tokens)
        part = SequenceStep(1, new, computed, tuple(range(8)), complete)
        result = None
        for runner in runners:
            result = runner.run(StepInput(step=computed, sequences=(part,), started=started), result)
        started, computed = (), computed + len(new)
        for sample in result:
            ids, logprobs = zip(*sample.top, strict=True)
            rows.append(torch.zeros(vocabulary).scatter(0, torch.tensor(ids), torch.tensor(logprobs).exp()))
            tokens.append(sample.token_id)
    return tokens, torch.stack(rows)


def test_bfloat16_distributions_are_those_of_transformers(said: str) -> None:
    directory = version_directory("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("The history of the lighthouse begins in the year")["input_ids"]
    tokens, ours = our_distributions(directory, prompt, 24)
    reference = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].float()
        reference[dtype] = torch.softmax(logits, dim=-1)
    their_error = (reference[torch.bfloat16] - reference[torch.float32]).abs().max()
    our_error = (ours - reference[torch.float32]).abs().max()
    print(f"largest difference from float32: transformers' bfloat16 {their_error:.4f}, ours {our_error:.4f}")
    assert our_error < TOLERANCE * their_error
