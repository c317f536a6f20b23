import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"sglang_hybridkv": "", "hybridkv_kernels": "kernels", "hybridkv_patches": "patches"}


SOURCES = {".py", ".cpp", ".cu", ".cuh", ".h", ".inc", ".json"}
LIBRARY = "hybridkv_kernels/_cpu.so"
FOLDERS = ("sglang_hybridkv", "kernels", "patches", "benchmarks", "tests", "docs", "examples", ".ci")
NOT_COPIED = ("__pycache__", "*.egg-info", "*.so", "build", ".*")


def copy_of_the_checkout(folder):
    """So that a build leaves nothing in the checkout and uses nothing built there."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, copy)
    for page in ROOT.glob("*.md"):
        shutil.copy(page, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return copy


def build_wheel(folder, **environment):
    copy = copy_of_the_checkout(folder)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    subprocess.run(command, cwd=copy, check=True, env=os.environ | environment)
    (path,) = (copy / "wheels").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory):
    """Built where there is no compiler."""
    nothing = "/nowhere/no-compiler"
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("plain"), CC=nothing, CXX=nothing)) as archive:
        yield archive


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(wheel_path):
    with zipfile.ZipFile(wheel_path) as archive:
        yield archive


def files_of(wheel):
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def package_sources():
    return {
        str(file.relative_to(ROOT / source_root))
        for package, source_root in PACKAGES.items()
        for file in (ROOT / source_root / package).rglob("*")
        if file.suffix in SOURCES or file.name == "py.typed"
    }


@pytest.mark.slow
def test_wheel_holds_the_three_packages_whole_and_nothing_else(wheel):
    library = {LIBRARY} if any(map(shutil.which, ("c++", "g++"))) else set()
    assert files_of(wheel) == package_sources() | library


@pytest.mark.slow
def test_wheel_is_for_every_python_3_and_this_platform(wheel_path):
    """Also without a library: the build does not know beforehand whether there is a compiler."""
    python, abi, platform = wheel_path.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")


@pytest.mark.slow
def test_the_library_in_the_wheel_loads_and_needs_neither_python_nor_torch(wheel, tmp_path):
    if LIBRARY not in wheel.namelist():
        pytest.skip("there is no compiler")
    path = wheel.extract(LIBRARY, tmp_path)
    library = ctypes.CDLL(path)
    for function in ("hk_best_isa", "hk_decode", "hk_retrieve", "hk_score", "hk_compact"):
        assert getattr(library, function)
    linked = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
    assert "python" not in linked
    assert "torch" not in linked
    assert Path(path).stat().st_size < 4_000_000, "symbols are a multiple of what runs"


def test_a_build_that_fails_leaves_no_older_library(tmp_path):
    copy = copy_of_the_checkout(tmp_path)
    library = copy / "kernels" / LIBRARY
    library.write_text("an older build")
    os.utime(library, (0, 0))
    nothing = {"CC": "/nowhere/no-compiler", "CXX": "/nowhere/no-compiler"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=copy, check=True, env=os.environ | nothing
    )
    assert not library.exists()


def test_a_library_that_is_newer_than_its_sources_serves_another_environment_too(tmp_path):
    copy = copy_of_the_checkout(tmp_path)
    library = copy / "kernels" / LIBRARY
    library.write_text("built a moment ago")
    nothing = {"CC": "/nowhere/no-compiler", "CXX": "/nowhere/no-compiler"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=copy, check=True, env=os.environ | nothing
    )
    assert library.read_text() == "built a moment ago"


def test_source_distribution_is_the_checkout(tmp_path):
    copy = copy_of_the_checkout(tmp_path)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=copy, check=True)
    (path,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = {file for name in FOLDERS for file in (copy / name).rglob("*") if file.is_file()}
    ours = {str(file.relative_to(copy)) for file in files if "__pycache__" not in file.parts}
    assert ours - packed == set()
    assert {"setup.py", "pyproject.toml", "Makefile", "LICENSE", *(path.name for path in ROOT.glob("*.md"))} <= packed


def test_every_package_says_that_it_is_typed(plain_wheel):
    assert {f"{package}/py.typed" for package in PACKAGES} <= files_of(plain_wheel)


def test_without_a_compiler_the_wheel_is_whole_but_for_the_library(plain_wheel):
    assert files_of(plain_wheel) == package_sources()


def test_wheel_registers_the_plugin_and_the_command(plain_wheel):
    (entry_points,) = [name for name in plain_wheel.namelist() if name.endswith("entry_points.txt")]
    assert [line for line in plain_wheel.read(entry_points).decode().splitlines() if line] == [
        "[console_scripts]",
        "hybridkv = sglang_hybridkv.cli.main:main",
        "[sglang.srt.plugins]",
        "hybridkv = hybridkv_patches:register",
    ]


def test_hard_dependencies_leave_sglang_out(plain_wheel):
    (metadata,) = [name for name in plain_wheel.namelist() if name.endswith("METADATA")]
    lines = plain_wheel.read(metadata).decode().splitlines()
    hard = {
        line.split(":")[1].strip() for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line
    }
    assert hard == {"msgspec", "packaging", "psutil", "pydantic>=2", "pyzmq", "torch"}
