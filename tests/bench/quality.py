"""``python -m tests.bench quality``: what int8 and int4 weights cost SmolLM2-135M, in perplexity on real speeches."""

from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from rich.console import Console

from cluster.config.load import load_config
from cluster.control.code import code_digest
from cluster.control.quality import measure_quality, written_format
from cluster.control.report import report_to
from cluster.control.tables import quality_view
from cluster.control.versions import import_missing, known_versions
from cluster.registry.store import Registry
from tests.support.running import write_cluster
from tests.support.speeches import speeches

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
STORAGE = Path.home() / ".cache" / "manta-tests"
NUM_WINDOWS = 8


def main() -> None:
    """Bring in model and text if they are not there yet, measure, print."""
    report = report_to()
    with TemporaryDirectory() as directory:
        models = yaml.safe_load(QUICKSTART.read_text())["models"][:1]
        cluster = write_cluster(Path(directory), "quality", models)
        cluster.edit(lambda values: values.update(storage=str(STORAGE)))
        config = load_config(cluster.config)
    registry = Registry(config.storage_root)
    import_missing(config, registry, known_versions(config, registry), report.progress, code_digest())
    model = config.models[0]
    qualities = measure_quality(config, model.name, speeches(STORAGE / "texts"), report, num_windows=NUM_WINDOWS)
    report.close()
    Console().print(quality_view(qualities, written_format(model)))


if __name__ == "__main__":
    main()
