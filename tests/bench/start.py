"""``python -m tests.bench start``: how long the quickstart takes to start, again, and with one setting changed.

The models are in the registry already; cold means that Ray is not running.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from rich.console import Console
from rich.table import Table

from tests.support.running import Cluster, write_cluster

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
STORAGE = Path.home() / ".cache" / "manta-tests"


def main() -> None:
    """Start, measure, stop, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=STORAGE, help="where the models are, or will be imported to")
    storage = parser.parse_args().storage
    with TemporaryDirectory() as directory:
        cluster = write_cluster(Path(directory), "bench", yaml.safe_load(QUICKSTART.read_text())["models"])
        cluster.edit(lambda values: values.update(storage=str(storage)))
        try:
            cluster.up()  # brings the models into the registry, if they are not there yet
            cluster.down()
            Console().print(start_table(cluster))
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


if __name__ == "__main__":
    main()
