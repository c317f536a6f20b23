import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"sglang_hybridkv": "", "hybridkv_kernels": "kernels", "hybridkv_patches": "patches"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("sglang_hybridkv", "kernels", "patches", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    subprocess.run(command, cwd=copy, check=True)
    (path,) = (copy / "wheels").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_three_packages_whole_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        str(file.relative_to(ROOT / source_root))
        for package, source_root in PACKAGES.items()
        for file in (ROOT / source_root / package).rglob("*")
        if file.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".json"}
    }
    assert names == expected


def test_wheel_registers_the_plugin(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert wheel.read(entry_points).decode().split() == [
        "[sglang.srt.plugins]",
        "hybridkv",
        "=",
        "hybridkv_patches:register",
    ]


def test_hard_dependencies_leave_sglang_out(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    lines = wheel.read(metadata).decode().splitlines()
    hard = {
        line.split(":")[1].strip() for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line
    }
    assert hard == {"packaging", "psutil", "pydantic>=2", "torch"}
