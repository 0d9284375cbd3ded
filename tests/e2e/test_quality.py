"""``manta quality`` on a tiny model: imported, measured in every format by the command itself."""

import json
from pathlib import Path

import pytest

from tests.support.running import save_tiny_chat, write_cluster

pytestmark = pytest.mark.e2e


def test_every_format_is_measured_on_the_text(tmp_path: Path) -> None:
    save_tiny_chat(tmp_path / "model", max_position_embeddings=1024)
    model = {"name": "tiny", "source": f"path://{tmp_path / 'model'}", "dtype": "bfloat16", "quantization": "int8"}
    cluster = write_cluster(tmp_path, "quality-test", [model])
    imported = cluster.manta(
        "models", "import", "tiny", model["source"], "--dtype", "bfloat16", "--storage", str(cluster.storage)
    )
    assert imported.returncode == 0, imported.stderr
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number}: hello world.\n" for number in range(400)))
    asked = ("quality", str(cluster.config), "tiny", "--text", str(text), "--windows", "2")

    done = cluster.manta(*asked, "--json")
    assert done.returncode == 0, done.stderr
    plain, int8, int4 = json.loads(done.stdout)
    assert [each["format"] for each in (plain, int8, int4)] == ["bfloat16", "bfloat16+int8", "bfloat16+int4"]
    assert (plain["ratio"], plain["same_choice"], plain["num_tokens"]) == (1.0, 1.0, 2046)
    assert 1.0 > int8["same_choice"] > int4["same_choice"]

    short = cluster.manta(*asked[:-1], "20")
    assert short.returncode == 1
    assert "20 windows of 1024 tokens" in short.stderr
    assert "fewer windows" in short.stderr
