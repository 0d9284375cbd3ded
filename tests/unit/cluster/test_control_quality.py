"""``manta quality``: what is refused before anything is measured, and the table."""

from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli import main
from cluster.control.quality import FormatQuality, formats_of, written_format
from cluster.control.tables import quality_view
from tests.unit.cluster.plan_examples import MINILM, ONE_BOX, SMOLLM2, config


@pytest.fixture
def yaml(tmp_path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: test\nstorage: {tmp_path}/storage\ncluster:\n  provider: {{kind: local}}\n  nodes:\n{ONE_BOX}"
        f"models:\n{SMOLLM2}{MINILM}"
    )
    return path


@pytest.mark.parametrize(
    ("model", "status", "says"),
    [
        ("smollm", 2, "no model smollm in the config; it has smollm2, minilm"),
        ("minilm", 2, "minilm has task embed; only models that generate predict a text"),
        ("smollm2", 1, "smollm2 is not imported yet; run `manta up`"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused(yaml, tmp_path, capsys, model, status, says):
    text = tmp_path / "text.txt"
    text.write_text("words")
    assert main(["quality", str(yaml), model, "--text", str(text)]) == status
    assert says in capsys.readouterr().err


def test_a_missing_text_is_refused(yaml, tmp_path, capsys):
    assert main(["quality", str(yaml), "smollm2", "--text", str(tmp_path / "none.txt")]) == 2
    assert "none.txt is not a file" in capsys.readouterr().err


def test_the_models_own_dtype_is_what_the_others_are_compared_with():
    exact = config(SMOLLM2 + "    dtype: float32\n").models[0]
    assert formats_of(exact) == ("float32", "bfloat16", "bfloat16+int8", "bfloat16+int4")
    assert written_format(exact) == "float32"
    packed = config(SMOLLM2 + "    quantization: int4\n").models[0]
    assert formats_of(packed) == ("bfloat16", "bfloat16+int8", "bfloat16+int4")
    assert written_format(packed) == "bfloat16+int4"


def test_the_table_marks_what_the_config_asks_for():
    def quality(form: str, perplexity: float) -> FormatQuality:
        return FormatQuality(
            format=form,
            perplexity=perplexity,
            ratio=perplexity / 20,
            same_choice=0.75,
            weight_bytes=2**20,
            kernels="torch",
            num_tokens=100,
        )

    console = Console(width=80, record=True)
    console.print(quality_view([quality("bfloat16", 20), quality("bfloat16+int4", 25)], "bfloat16+int4"))
    rows = {line.split()[0]: line.split()[1:] for line in console.export_text().splitlines() if line.strip()}
    assert rows["bfloat16"] == ["20.000", "1.0000", "75.0%", "1.0MiB", "torch"]
    assert rows["bfloat16+int4"] == ["*", "25.000", "1.2500", "75.0%", "1.0MiB", "torch"]
