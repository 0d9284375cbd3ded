"""Bundles, and whether they fit: against brute force, and refusals that name number and remedy."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import PlanError
from cluster.plan.build import build_plan
from cluster.plan.placement import Gang, all_fit, replica_bundles
from cluster.plan.types import NodePlan
from tests.unit.cluster.plan_examples import MINILM, ONE_BOX, SMOLLM2, config, known, minilm_facts


def node(cpus: float, count: int = 1) -> NodePlan:
    return NodePlan(name="n", resources={"CPU": cpus}, min=count, max=count)


def fits_by_trying_everything(gangs: list[Gang], cpus: list[int]) -> bool:
    bundles = [(index, bundle["CPU"]) for index, gang in enumerate(gangs) for bundle in gang.bundles]
    for choice in product(range(len(cpus)), repeat=len(bundles)):
        free = list(cpus)
        for place, (_, need) in zip(choice, bundles, strict=True):
            free[place] -= need
        placed = list(zip(choice, (index for index, _ in bundles), strict=True))
        spread = all(
            len({place for place, index in placed if index == gang}) == len(gangs[gang].bundles)
            for gang in range(len(gangs))
            if gangs[gang].strategy == "STRICT_SPREAD"
        )
        packed = all(
            len({place for place, index in placed if index == gang}) == 1
            for gang in range(len(gangs))
            if gangs[gang].strategy == "STRICT_PACK"
        )
        if min(free) >= 0 and spread and packed:
            return True
    return False


GANGS = st.lists(
    st.builds(
        lambda needs, strategy: Gang(name="g", bundles=tuple({"CPU": need} for need in needs), strategy=strategy),
        st.lists(st.integers(1, 4), min_size=1, max_size=2),
        st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60)
@given(gangs=GANGS, cpus=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_the_search_agrees_with_trying_every_arrangement(gangs, cpus):
    assert all_fit(gangs, [node(cpu) for cpu in cpus]) == fits_by_trying_everything(gangs, cpus)


def test_thousands_of_equal_bundles_are_decided_quickly():
    gang = Gang(name="g", bundles=({"CPU": 1.0},), strategy="PACK")
    assert all_fit([gang] * 1000, [node(10, count=100)])
    assert not all_fit([gang] * 1001, [node(10, count=100)])


def gpu_gang(strategy: str, *shares: float) -> Gang:
    return Gang(name="g", bundles=tuple({"CPU": 0.1, "GPU": share} for share in shares), strategy=strategy)


@pytest.mark.parametrize("strategy", ["PACK", "STRICT_PACK"])
def test_a_share_of_a_gpu_is_never_taken_from_two(strategy):
    box = NodePlan(name="n", resources={"CPU": 4, "GPU": 2}, min=1, max=1)
    assert all_fit([gpu_gang(strategy, 0.5, 0.5), gpu_gang(strategy, 0.5, 0.5)], [box])
    assert all_fit([gpu_gang(strategy, *[0.3333] * 6)], [box])
    assert not all_fit([gpu_gang(strategy, 1, 0.3333, 0.3333), gpu_gang(strategy, 0.5)], [box])
    assert not all_fit([gpu_gang(strategy, *[0.4] * 5)], [box])


def test_models_on_a_gpu_are_not_charged_to_the_memory_of_the_host():
    models = SMOLLM2.replace("{stages: 2}", "{stages: auto}")
    models += "    device: cuda\n    resources: {stage_gpus: 0.5}\n"
    nodes = "    - {name: box, resources: {CPU: 2, GPU: 1, memory: 300MiB}}\n"
    plan = build_plan(config(models, nodes), {"smollm2": known()}, "digest")
    args = plan.models[0].args
    assert replica_bundles(args) == [{"CPU": 0.15, "GPU": 0.5}]
    (note,) = [note for note in plan.notes if "GPU" in note]
    assert note.startswith("smollm2: GPU memory is not checked; its largest stage needs about ")


def test_the_replica_sits_in_the_first_bundle_and_memory_is_reserved_per_stage():
    plan = build_plan(config(), {"smollm2": known()}, "digest")
    args = plan.models[0].args
    first, second = replica_bundles(args)
    assert first == {"CPU": 0.15, "memory": float(args.stages[0].memory_bytes)}
    assert second == {"CPU": 0.1, "memory": float(args.stages[1].memory_bytes)}


@pytest.mark.parametrize(
    "nodes", ["    - {name: box, resources: {CPU: 2}}\n", ONE_BOX.replace("}, ", "}, ").replace("8GiB", "64GiB")]
)
def test_memory_is_reserved_only_where_nodes_declare_it(nodes):
    args = build_plan(config(nodes=nodes), {"smollm2": known()}, "digest").models[0].args
    assert args.stage_memory == ("memory" in nodes)


def refuse(models: str, nodes: str) -> str:
    versions = {"smollm2": known(), "minilm": known(model_facts=minilm_facts())}
    provider = "{kind: existing, dashboard: 'http://10.0.0.1:8265'}"
    with pytest.raises(PlanError) as caught:
        build_plan(config(models, nodes, provider), versions, "digest")
    return str(caught.value)


def test_a_stage_larger_than_every_node_is_named_with_its_parts():
    message = refuse(SMOLLM2, "    - {name: box, resources: {CPU: 2, memory: 300MiB}}\n")
    assert message == (
        "models.smollm2: stage 0 needs 452.1MiB memory (weights 182.3MiB, KV cache 228.0MiB, activations 41.8MiB), "
        "but the largest node has 300.0MiB memory; "
        "use more stages, a smaller kv_cache.tokens or batching.max_step_tokens, or larger nodes"
    )


def test_models_that_fit_alone_but_not_together_are_refused_with_both_sums():
    greedy = "    resources: {stage_cpus: 0.8}\n"
    message = refuse(SMOLLM2 + greedy + MINILM + greedy, "    - {name: box, resources: {CPU: 2}}\n")
    assert "the gateway and replicas.min copies of every model need 2.6 CPU" in message
    assert "all nodes together offer 2 CPU" in message
    assert "lower resources.stage_cpus" in message


def test_sums_that_fit_without_an_arrangement_are_refused():
    uneven = "    resources: {stage_cpus: 0.7}\n"
    message = refuse(
        SMOLLM2.replace("{stages: 2}", "{stages: 3}") + uneven, "    - {name: n, resources: {CPU: 1.25}, max: 2}\n"
    )
    assert (
        "models.smollm2: one replica needs 2.15 CPU in 3 bundles placed PACK, and the nodes offer 2.5 CPU" in message
    )
