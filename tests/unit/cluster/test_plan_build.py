"""The whole plan: golden files, automatic choices, refusals, notes."""

import json
from pathlib import Path

import pytest

from cluster.errors import PlanError
from cluster.plan.build import build_plan
from cluster.plan.memory import VLLM_BYTES
from cluster.plan.serve_app import NO_PROXIES, gateway_app, model_apps, serve_config
from cluster.plan.types import AdapterFacts, Plan
from tests.unit.cluster.plan_examples import MINILM, ONE_BOX, SMOLLM2, config, facts, known, minilm_facts

GOLDEN = Path(__file__).parent / "golden"
EXISTING = "{kind: existing, dashboard: 'http://10.0.0.1:8265'}"


def both() -> Plan:
    versions = {"smollm2": known(), "minilm": known("v3", minilm_facts())}
    return build_plan(config(SMOLLM2 + MINILM), versions, "digest")


def spread() -> Plan:
    models = SMOLLM2.replace("{stages: 2}", "{split: [12, 10, 8], stages: 3, placement: STRICT_SPREAD, threads: 4}")
    nodes = "    - {name: node, resources: {CPU: 4, memory: 2GiB, train_slot: 1}, min: 1, max: 3}\n"
    return build_plan(config(models, nodes, EXISTING), {"smollm2": known()}, "digest")


CASES = {
    "plan_two_models.json": lambda: both().model_dump(mode="json"),
    "plan_spread.json": lambda: spread().model_dump(mode="json"),
    "plan_before_import.json": lambda: build_plan(config(), {}, "digest").model_dump(mode="json"),
    "serve_two_models.json": lambda: serve_config(
        NO_PROXIES, [*model_apps(both()), gateway_app(both().gateway, both().routing, {})]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_file(name):
    """Changed on purpose? Write the new file with the line that the failure shows."""
    actual = json.dumps(CASES[name](), indent=1, sort_keys=True) + "\n"
    assert actual == (GOLDEN / name).read_text(), f"golden file {name} differs"


def test_a_job_that_does_not_fit_beside_the_models_is_noted():
    jobs = """jobs:
  - {name: text, kind: prepare, task: lm, inputs: [{source: "path:///text", format: text}], tokenizer: "registry://t@v1",
     sequence_tokens: 64}
  - {name: learn, kind: train, task: lm, base: {source: "registry://smollm2@latest"}, data: text, workers: 2,
     batch: {sequences: 8, micro_sequences: 4}, duration: {steps: 10}, optimizer: {kind: adamw, lr: 1.0e-4},
     resources: {cpus: 0.5}}
"""

    def notes(nodes: str) -> tuple[str, ...]:
        return build_plan(config(SMOLLM2 + jobs, nodes, EXISTING), {"smollm2": known()}, "d").notes

    assert not notes("    - {name: node, resources: {CPU: 4}, min: 1, max: 1}\n")
    for resources in ("{CPU: 4, train_slot: 1}", "{CPU: 1, train_slot: 2}"):
        assert any(
            "learn: its workers, at least 2 with 0.5 CPU, 1 train_slot each, do not fit" in note
            for note in notes(f"    - {{name: node, resources: {resources}, min: 1, max: 1}}\n")
        )


def test_a_plan_survives_json():
    assert Plan.model_validate_json(both().model_dump_json()) == both()


def test_vllm_takes_one_stage_and_memory_of_its_own():
    nodes = "    - {name: node, resources: {CPU: 2, memory: 8GiB}, min: 1, max: 4}\n"
    ours = SMOLLM2.replace("{stages: 2}", "{stages: 1}\n    batching: {speculative_tokens: 0}")
    ours = build_plan(config(ours, nodes, EXISTING), {"smollm2": known()}, "d")
    models = SMOLLM2.replace("    pipeline: {stages: 2}", "    engine: {kind: vllm, python: /opt/vllm/bin/python}")
    theirs = build_plan(config(models, nodes, EXISTING), {"smollm2": known()}, "d")
    stage, other = theirs.models[0].args.stages[0], ours.models[0].args.stages[0]
    assert theirs.models[0].args.vllm.python == "/opt/vllm/bin/python"
    assert stage.memory_bytes == other.memory_bytes + VLLM_BYTES
    with pytest.raises(PlanError, match=r"smollm2"):
        build_plan(config(models, nodes.replace("8GiB", "2GiB"), EXISTING), {"smollm2": known()}, "d")


def test_auto_takes_the_fewest_stages_that_fit_the_memory_of_the_nodes():
    models = SMOLLM2.replace("{stages: 2}", "{stages: auto}")

    def stages(memory: str) -> int:
        nodes = f"    - {{name: node, resources: {{CPU: 2, memory: {memory}}}, min: 1, max: 4}}\n"
        return len(build_plan(config(models, nodes, EXISTING), {"smollm2": known()}, "d").models[0].args.stages)

    assert [stages("4GiB"), stages("470MiB"), stages("340MiB")] == [1, 2, 3]
    with pytest.raises(
        PlanError,
        match=r"auto tried 1 to 30 stages and none fits; with 30, .* needs .* memory .*largest node has 60.0MiB",
    ):
        stages("60MiB")


def test_auto_is_one_stage_where_nodes_do_not_say_their_memory():
    models = SMOLLM2.replace("{stages: 2}", "{stages: auto}")
    plan = build_plan(config(models, "    - {name: box, resources: {CPU: 2}}\n"), {"smollm2": known()}, "d")
    assert len(plan.models[0].args.stages) == 1


@pytest.mark.parametrize(("stages", "cpus", "threads"), [(1, 8, 8), (2, 8, 4), (3, 2, 1)])
def test_auto_threads_share_the_cores_of_the_node(stages, cpus, threads):
    models = SMOLLM2.replace("{stages: 2}", f"{{stages: {stages}}}")
    plan = build_plan(config(models, f"    - {{name: box, resources: {{CPU: {cpus}}}}}\n"), {"smollm2": known()}, "d")
    assert plan.models[0].args.threads_per_stage == threads


def test_auto_threads_ignore_a_head_node_that_offers_no_core():
    nodes = "    - {name: head, resources: {CPU: 0}}\n    - {name: worker, resources: {CPU: 16}, max: 2}\n"
    existing = "{kind: existing, dashboard: 'http://ray.example:8265'}"
    plan = build_plan(config(SMOLLM2, nodes, existing), {"smollm2": known()}, "d")
    assert plan.models[0].args.threads_per_stage == 8


@pytest.mark.parametrize(("memory", "surge"), [("2200MiB", False), ("3100MiB", True)])
def test_an_update_needs_room_for_the_minimum_of_replicas_of_the_new_version(memory, surge):
    two = SMOLLM2.replace("min: 1", "min: 2")  # 754 MiB each
    nodes = f"    - {{name: box, resources: {{CPU: 2, memory: {memory}}}}}\n"
    assert build_plan(config(two, nodes), {"smollm2": known()}, "d").surge is surge


def test_a_context_beyond_the_model_is_refused_with_both_numbers():
    with pytest.raises(PlanError, match=r"context_tokens: 9000 tokens, but LlamaForCausalLM was trained for 8192"):
        build_plan(config(SMOLLM2 + "    context_tokens: 9000\n"), {"smollm2": known()}, "d")


def test_the_wrong_task_is_refused():
    with pytest.raises(PlanError, match=r"models\.smollm2\.task: generate, but the registry's version is for embed"):
        build_plan(config(), {"smollm2": known(model_facts=facts(task="embed"))}, "d")


def test_an_adapter_needs_an_engine_that_merges_it():
    version = known().model_copy(update={"adapter": AdapterFacts(of="base@v1", kind="lora", num_params=9)})
    models = SMOLLM2.replace("    pipeline: {stages: 2}", "    engine: {kind: vllm, python: /opt/vllm/bin/python}")
    assert build_plan(config(), {"smollm2": version}, "d").models[0].args is not None
    with pytest.raises(PlanError, match=r"engine: vllm, but smollm2@v1 is an adapter of base@v1, .* publish it merg"):
        build_plan(config(models), {"smollm2": version}, "d")


def test_weights_that_are_stored_quantized_are_refused():
    packed = known().model_copy(update={"quantization": "gptq"})
    with pytest.raises(
        PlanError, match=r"models\.smollm2\.source: .*smollm2@v1 are stored quantized \(gptq.*int8 or"
    ):
        build_plan(config(), {"smollm2": packed}, "d")


def test_quantization_is_counted_except_where_torch_unpacks_the_weights():
    def planned(lines: str) -> Plan:
        return build_plan(config(SMOLLM2 + lines), {"smollm2": known()}, "d")

    def weights(plan: Plan) -> int:
        return sum(stage.weight_bytes for stage in plan.models[0].args.stages)

    plain, packed = planned(""), planned("    quantization: int4\n")
    unpacked = planned("    quantization: int4\n    kernels: torch\n")
    assert weights(packed) < 0.5 * weights(plain)
    assert weights(unpacked) == weights(plain)
    assert packed.notes == ()
    assert "saves neither memory nor time" in unpacked.notes[0]


def test_a_maximum_that_does_not_fit_is_a_note_and_so_is_missing_room_for_an_update():
    tight = "    - {name: box, resources: {CPU: 2, memory: 1GiB}}\n"
    plan = build_plan(config(SMOLLM2, tight), {"smollm2": known()}, "d")
    assert not plan.surge
    assert [note.split(":")[0] for note in plan.notes] == [
        "no room for the old and the new version of a model at once",
        "smollm2",
    ]
    assert build_plan(config(SMOLLM2, ONE_BOX), {"smollm2": known()}, "d").notes == ()


def test_a_version_of_another_registry_model_is_named_as_such():
    other = known().model_copy(update={"name": "base"})
    assert build_plan(config(), {"smollm2": other}, "d").models[0].args.registry_name == "base"
    assert build_plan(config(), {"smollm2": known()}, "d").models[0].args.registry_name is None


def test_code_from_a_uri_becomes_the_working_directory_of_every_application():
    text = config().model_dump(mode="json")
    text["cluster"]["code"] = {"kind": "uri", "uri": "s3://bucket/manta.zip"}
    changed = type(config()).model_validate(text)
    plan = build_plan(changed, {"smollm2": known()}, "d")
    apps = [*model_apps(plan), gateway_app(plan.gateway, plan.routing, plan.runtime_env)]
    assert [app["runtime_env"] for app in apps] == [{"working_dir": "s3://bucket/manta.zip"}] * 2
