"""When the native kernels are used and when not: configs, machines, compilers; and the rotary angles."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deployments.runtime.native import build as native_build
from deployments.runtime.native.architecture import NotNativeError, read_architecture
from deployments.runtime.native.build import NEEDED_FLAGS, build, check_processor, processor_flags
from deployments.runtime.native.rope import rotary_angles
from deployments.runtime.runner import StageRunner
from deployments.runtime.settings import RunnerConfig, StageSlice
from deployments.runtime.support import UnsupportedModelError
from tests.support.native_slices import needs_native
from tests.support.tiny_models import save_tiny_model

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}


def read(directory: Path, config: dict):
    (directory / "config.json").write_text(json.dumps(config))
    return read_architecture(directory)


REFUSED = {
    "gemma": (LLAMA | {"model_type": "gemma2"}, "model_type gemma2 is not one of llama, mistral"),
    "narrow heads": (LLAMA | {"num_attention_heads": 8}, "head_dim 8 is not a multiple of 16"),
    "odd width": (LLAMA | {"hidden_size": 72, "head_dim": 16}, "hidden_size 72 is not a multiple of 16"),
    "longrope": (LLAMA | {"rope_scaling": {"type": "longrope"}}, "rope type longrope is not one of default"),
    "partial": (LLAMA | {"partial_rotary_factor": 0.5}, "part of each head"),
    "gelu": (LLAMA | {"hidden_act": "gelu"}, "activation is gelu"),
    "quantized": (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "stored weights are quantized"),
    "no window said": (LLAMA | {"model_type": "mistral"}, "config.json has no sliding_window"),
    "no layer types": (QWEN2, "config.json has no layer_types"),
    "too few layer types": (QWEN2 | {"layer_types": ["full_attention"]}, "does not describe every layer"),
    "heads": (LLAMA | {"num_key_value_heads": 3}, "not a multiple of its KV heads"),
    "head width": (LLAMA | {"model_type": "qwen3"}, "config.json has no head_dim"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_compute_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(NotNativeError, match=reason):
        read(tmp_path, config)


def test_both_spellings_of_rope_are_read(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = read(tmp_path, LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = read(tmp_path, LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope["original_max_position_embeddings"] == 128
    assert read(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}).rope["rope_type"] == "linear"
    assert read(tmp_path, LLAMA).rope["rope_theta"] == 10_000.0


def test_layers_differ_where_the_config_says_so(tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention", "sliding_attention"]}
    assert read(tmp_path, QWEN2 | kinds).windows == (None, 8)
    assert read(tmp_path, QWEN2 | kinds | {"use_sliding_window": False}).windows == (None, None)
    assert read(tmp_path, LLAMA | {"model_type": "mistral", "sliding_window": 9}).windows == (9, 9)
    assert read(tmp_path, LLAMA | {"model_type": "smollm3", "no_rope_layer_interval": 2}).rotates == (True, False)


ROPES = {
    "linear": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn deepseek": {"factor": 4.0, "original_max_position_embeddings": 64,
                      "mscale": 1.3, "mscale_all_dim": 0.7,
                      "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn factor": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_angles_are_those_of_transformers(name: str, head_dim: int) -> None:
    parameters = ROPES[name] | {"rope_type": name.split()[0], "rope_theta": 5e5}
    shape = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 256}
    config = AutoConfig.for_model("llama", **shape, rope_parameters=dict(parameters))
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    expected = torch.arange(300.0)[:, None] * frequencies
    angles = rotary_angles(parameters, head_dim=head_dim, num_positions=300)
    assert torch.allclose(angles, torch.cat((expected.cos(), expected.sin()), dim=1) * factor, atol=1e-4)


def test_a_processor_without_the_instructions_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor: 0\nflags\t\t: fma avx512f sse\nbugs:\n")
    with pytest.raises(NotNativeError, match="this processor has no amx_bf16, amx_int8, amx_tile"):
        check_processor(processor_flags(cpuinfo))
    assert processor_flags(tmp_path / "none") == frozenset()
    check_processor(NEEDED_FLAGS | {"sse"})


def test_the_library_is_compiled_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = tmp_path / "source"
    source.mkdir()
    (source / "slice.cpp").write_text("int one() { return 1; }\n")
    monkeypatch.setattr(native_build, "__file__", str(source / "build.py"))
    library = build(tmp_path / "cache")
    made = library.stat().st_mtime_ns
    assert build(tmp_path / "cache") == library
    assert library.stat().st_mtime_ns == made
    (source / "slice.cpp").write_text("int one() { return }\n")
    with pytest.raises(NotNativeError, match=r"cannot compile the kernels: .*slice.cpp:1:.* error"):
        build(tmp_path / "cache")
    (source / "slice.cpp").write_text("int one() { return 2; }\n")
    assert build(tmp_path / "cache") != library
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {"slice.so", "lock"}


def test_without_a_compiler_the_reason_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotNativeError, match=r"no C\+\+ compiler .* install one"):
        build(tmp_path)


def runner(directory: Path, **changes) -> StageRunner:
    values = {
        "directory": directory,
        "part": StageSlice(start=0, stop=4, is_first=True, is_last=True),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "context_tokens": 64,
        "num_blocks": 8,
        "block_tokens": 16,
    }
    return StageRunner(RunnerConfig(**(values | changes)))


@needs_native
def test_auto_takes_native_kernels_where_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny_model(tmp_path, "llama", hidden_size=64)
    caplog.set_level("INFO")
    assert runner(tmp_path).kernels == "amx-bf16"
    assert runner(tmp_path, quantization="int4").kernels == "amx-int4"
    assert runner(tmp_path, kernels="torch").kernels == "torch"
    assert runner(tmp_path, dtype=torch.float32).kernels == "torch"
    assert runner(tmp_path, block_tokens=8).kernels == "torch"
    assert [record.message for record in caplog.records if "kernels" in record.message] == [
        "native kernels, amx-bf16, 1 threads",
        "native kernels, amx-int4, 1 threads",
        "torch kernels: kernels is set to torch",
        "torch kernels: the dtype is float32, not bfloat16",
        "torch kernels: block_tokens 8 is not a multiple of 16",
    ]


def test_native_or_nothing(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "phi3", hidden_size=64)
    with pytest.raises(UnsupportedModelError, match=r"model_type phi3 is not one of .*; set kernels to auto"):
        runner(tmp_path, kernels="native")
