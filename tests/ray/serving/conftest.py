"""One local cluster for these files: a tiny chat model over two stages, an embedding model, a classifier."""

from collections.abc import Iterator

import pytest

from tests.support.running import (
    Cluster,
    chat_model,
    save_tiny_chat,
    save_tiny_encoder,
    save_tiny_sorter,
    write_cluster,
)

LABELS = ("ham", "spam")


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started by ``manta up``, ended by ``manta down``; nothing may be left."""
    directory = tmp_path_factory.mktemp("cluster")
    save_tiny_chat(directory / "chat-a", seed=4)
    save_tiny_chat(directory / "chat-b", seed=6)
    save_tiny_encoder(directory / "encoder")
    save_tiny_sorter(directory / "classifier", LABELS)
    models = [
        chat_model(str(directory / "chat-a")),
        {
            "name": "tiny-embed",
            "source": f"path://{directory / 'encoder'}",
            "task": "embed",
            "dtype": "float32",
            "context_tokens": 64,
            "pipeline": {"stages": 1, "threads": 1},
            "replicas": {"min": 1, "max": 1},
        },
        {
            "name": "tiny-classify",
            "source": f"path://{directory / 'classifier'}",
            "task": "classify",
            "dtype": "float32",
            "context_tokens": 64,
            "pipeline": {"stages": 1, "threads": 1},
            "replicas": {"min": 1, "max": 1},
        },
    ]
    cluster = write_cluster(directory, "tiny-cluster", models)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
