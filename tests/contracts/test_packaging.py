"""The wheel holds the three packages and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

SUFFIXES = (".py", ".cpp", ".h", ".html", ".css", ".js")
ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(tmp_path)], cwd=copy, capture_output=True, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"cluster", "deployments", "train_jobs"}
    sources = {
        str(path.relative_to(copy)) for top in tops for path in (copy / top).rglob("*") if path.suffix in SUFFIXES
    }
    assert sources <= set(names), "every module, every source of the kernels and every part of a page is in the wheel"
