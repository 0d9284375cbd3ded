"""The digest of the code, and the refusal to run under a plan of other code."""

import pytest

from cluster.control.code import check_code_digest, code_digest
from cluster.errors import ControlError


@pytest.fixture
def tree(tmp_path):
    for name in (
        "cluster/a.py",
        "deployments/b/c.py",
        "train_jobs/d.py",
        "deployments/b/k.cpp",
        "deployments/b/notes.txt",
        "other/e.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return tmp_path


@pytest.mark.parametrize("name", ["cluster/a.py", "deployments/b/c.py", "train_jobs/d.py", "deployments/b/k.cpp"])
def test_every_source_file_counts(tree, name):
    before = code_digest(tree)
    (tree / name).write_text("changed\n")
    assert code_digest(tree) != before


def test_moving_code_between_files_counts(tree):
    before = code_digest(tree)
    (tree / "cluster/a.py").rename(tree / "cluster/z.py")
    assert code_digest(tree) != before


@pytest.mark.parametrize("name", ["deployments/b/notes.txt", "other/e.py"])
def test_nothing_else_counts(tree, name):
    before = code_digest(tree)
    (tree / name).write_text("changed\n")
    assert code_digest(tree) == before


def test_other_code_is_refused_with_both_digests():
    check_code_digest(code_digest())
    with pytest.raises(ControlError, match=f"{code_digest()[:12]} from .* planned 0123456789ab"):
        check_code_digest("0123456789abcdef")
