"""Bounds and timeouts of a running model change while its replicas go on."""

import json

from tests.support.running import Cluster


def replica_ids(cluster: Cluster) -> set[str]:
    (model,) = (model for model in cluster.status()["models"] if model["name"] == "tiny")
    return {replica["id"] for version in model["versions"] for replica in version["replicas"]}


def test_bounds_and_timeouts_change_without_a_restart(cluster: Cluster) -> None:
    original = cluster.config.read_text()
    before = replica_ids(cluster)
    try:
        cluster.edit(
            lambda values: values["models"][0].update(
                replicas={"min": 2, "max": 2, "target_waiting_tokens": 4096},
                timeouts={"request": "90s", "step": "30s", "drain": "20s"},
            )
        )
        actions = json.loads(cluster.manta("plan", str(cluster.config), "--json").stdout)["actions"]
        assert [action["kind"] for action in actions] == ["change_settings", "await_apps", "switch_routes"]
        cluster.up()
        assert before < replica_ids(cluster)
        assert len(replica_ids(cluster)) == 2
        assert "Nothing to do" in cluster.up()
    finally:
        cluster.config.write_text(original)
        cluster.up()
    assert "Nothing to do" in cluster.up()
