"""How a process of vLLM is started from another Python, with a stand-in for it; vLLM itself is in tests/e2e."""

import json
from pathlib import Path

import pytest

from cluster.plan.build import build_plan
from deployments.stage.vllm_actor import VllmProcess, code_folder, environment, preloads, settings_of
from tests.unit.cluster.plan_examples import SMOLLM2, config, known

DIRECTORY = Path("/models/tiny")


def args_for(python: Path | str, threads: int = 2):
    models = SMOLLM2.replace("{stages: 2}", f"{{threads: {threads}}}")
    models += f"    engine: {{kind: vllm, python: {python}, compile: false}}\n"
    return build_plan(config(models), {"smollm2": known()}, "digest").models[0].args


def interpreter(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_settings_are_the_plans_own(tmp_path):
    args = args_for("/opt/vllm/bin/python")
    told = settings_of(args, DIRECTORY)
    assert told["directory"] == "/models/tiny"
    assert told["kv_bytes"] == args.stages[0].kv_bytes
    assert (told["max_running"], told["max_step_tokens"]) == (args.max_running, args.max_step_tokens)
    assert told["compile"] is False


def test_a_process_is_told_its_settings_then_asked_to_listen(tmp_path):
    python = interpreter(
        tmp_path / "python",
        f'read -r line; echo "$line" > {tmp_path}/settings; echo \'{{"ready": true}}\'\n'
        'while read -r host; do echo "{\\"address\\": \\"$host:7\\", \\"secret\\": \\"ab01\\"}"; done',
    )
    process = VllmProcess(args_for(python), DIRECTORY, tmp_path)
    assert json.loads((tmp_path / "settings").read_text())["directory"] == "/models/tiny"
    assert process.listen("127.0.0.1") == ("127.0.0.1:7", b"\xab\x01")
    assert process.listen("127.0.0.2") == ("127.0.0.2:7", b"\xab\x01")
    assert process.lives
    process.end()
    assert not process.lives


def test_the_last_words_of_a_process_that_dies_are_in_the_error(tmp_path):
    python = interpreter(tmp_path / "python", "read -r line; echo 'no module named vllm' >&2; exit 3")
    with pytest.raises(RuntimeError, match=r"status 3[\s\S]*no module named vllm"):
        VllmProcess(args_for(python), DIRECTORY, tmp_path)


def test_a_missing_python_is_named_with_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match=r"engine\.python: .*/nowhere/python .*on every node"):
        VllmProcess(args_for("/nowhere/python"), DIRECTORY, tmp_path)


def test_only_the_package_comes_before_the_environments_own_and_threads_are_the_plans(tmp_path):
    args = args_for(tmp_path / "bin" / "python", threads=3)
    found = environment({"PATH": "/bin", "PYTHONPATH": "/ours"}, args, "/code")
    assert (found["PATH"], found["PYTHONPATH"], found["OMP_NUM_THREADS"]) == ("/bin", "/code", "3")
    assert "LD_PRELOAD" not in found


def test_nothing_is_preloaded_unless_every_library_is_there(tmp_path, monkeypatch):
    python = tmp_path / "bin" / "python"
    monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so.4")
    assert preloads(python) == []
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    assert preloads(python) == ["libtcmalloc_minimal.so.4", str(tmp_path / "lib" / "libiomp5.so")]
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert preloads(python) == []


def test_the_folder_with_the_package_is_made_once_and_has_nothing_else(tmp_path):
    folder = code_folder(tmp_path)
    assert code_folder(tmp_path) == folder
    assert [each.name for each in folder.iterdir()] == ["deployments"]
    assert (folder / "deployments" / "messages.py").exists()
    assert len(list((tmp_path / "vllm").iterdir())) == 1
