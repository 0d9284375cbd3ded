"""What the import linter cannot see: what a process really loads, and names that are only strings."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "ray", "fastapi"}


def packages_after_each(modules: Sequence[str]) -> list[set[str]]:
    """Top-level packages that one fresh interpreter holds after importing each of ``modules``, in this order."""
    code = (
        "import importlib, json, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "chain",
    [
        # What an earlier module of a chain loads is also there for a later one, so the strictest come first.
        {
            "deployments.replica.autoscale": HEAVY | {"msgspec", "pydantic"},
            "cluster.config.load": HEAVY | {"requests"},
            "cluster.plan.build": HEAVY | {"requests"},
            "deployments.messages": HEAVY,
            "deployments.replica.scheduler": HEAVY,
            "deployments.replica.blocks": HEAVY,
            "deployments.router.choose": HEAVY,
            "cluster.cli": HEAVY,
            "deployments.gateway.app": {"torch", "transformers", "ray"},
            "deployments.app": {"torch", "transformers"},
            "deployments.replica.service": {"torch", "transformers"},
        },
        {
            "deployments.runtime.runner": {"ray", "fastapi", "transformers"},
            "deployments.stage.actor": {"fastapi", "transformers"},
        },
    ],
    ids=["without torch", "with torch"],
)
def test_a_module_loads_only_what_its_place_allows(chain: dict[str, set[str]]) -> None:
    loaded = packages_after_each(list(chain))
    for (module, forbidden), packages in zip(chain.items(), loaded, strict=True):
        assert not packages & forbidden, module


def test_init_files_hold_a_docstring_and_nothing_else() -> None:
    for package in ("cluster", "deployments", "train_jobs"):
        for path in (ROOT / package).rglob("__init__.py"):
            text = path.read_text().strip()
            assert re.fullmatch(r'"""[^"]*"""', text), f"{path} is a map, not code"


def strings_naming_code() -> set[str]:
    pattern = re.compile(r'"((?:cluster|deployments|train_jobs)(?:\.\w+)+:\w+)"')
    sources = [path.read_text() for package in ("cluster", "deployments") for path in (ROOT / package).rglob("*.py")]
    return {match for source in sources for match in pattern.findall(source)}


def test_every_string_that_names_code_resolves() -> None:
    names = strings_naming_code()
    assert "deployments.app:build_model" in names
    for name in names:
        module, _, attribute = name.partition(":")
        assert hasattr(importlib.import_module(module), attribute), name


def test_modules_run_as_programs_by_name_exist() -> None:
    for module in ("cluster", "deployments.runtime.importing", "deployments.runtime.native"):
        assert importlib.util.find_spec(module) is not None


def test_nothing_edits_the_import_path() -> None:
    for package in ("cluster", "deployments", "train_jobs", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            assert path == Path(__file__) or "sys.path." not in path.read_text(), path


def test_builders_take_their_argument_by_its_real_type() -> None:
    """Serve reads the annotation object; a postponed one would be a string, and the arguments a plain dict."""
    for name in ("build_model", "build_gateway"):
        (annotation,) = (
            value for key, value in getattr(importlib.import_module("deployments.app"), name).__annotations__.items()
            if key != "return"
        )  # fmt: skip
        assert isinstance(annotation, type)
