import re
import subprocess
from pathlib import Path

import pytest

from sglang_hybridkv.srt import sglang_versions
from tests.cpu_engine import setup_env


def read_pins(lock):
    """Package name to version; fails on a line that is not pinned."""
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(re.fullmatch(r"([a-z0-9.-]+)==(\S+)", line).groups() for line in lines)
    assert len(pins) == len(lines)
    return pins


LOCKS = sorted(set(setup_env.HERE.glob("requirements*.lock")) - {setup_env.DEV_LOCK})


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_locks_pin_every_package_once(lock):
    engine = read_pins(lock)
    dev = read_pins(setup_env.DEV_LOCK)
    assert not engine.keys() & dev.keys()
    assert engine["sglang"] == (lock.stem.removeprefix("requirements").removeprefix("-") or setup_env.DEFAULT_SGLANG)
    assert sglang_versions.is_supported(engine["sglang"])
    assert setup_env.torch_requirement(lock.read_text()) == f"torch=={engine['torch']}"


def test_a_version_without_a_lock_is_refused_in_one_sentence(monkeypatch):
    setup_env.check_sglang()
    monkeypatch.setattr(setup_env, "SGLANG", "0.5.20")
    monkeypatch.setattr(setup_env, "ENGINE_LOCK", setup_env.HERE / "requirements-0.5.20.lock")
    with pytest.raises(setup_env.SetupError, match=r"^SGLANG = '0.5.20' is not allowed; legal: one of 0.5.21, 0.5.23$"):
        setup_env.check_sglang()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that setup_env takes for the repository."""
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "VENV", tmp_path)
    monkeypatch.setattr(setup_env, "STAMPS", tmp_path / "stamps.json")
    return tmp_path


def test_fingerprint_follows_names_and_contents_only(checkout):
    folder = checkout / "compat"
    folder.mkdir()
    (folder / "a.py").write_text("1")
    first = setup_env.fingerprint([folder])
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_text("x")
    assert setup_env.fingerprint([folder]) == first
    (folder / "a.py").write_text("2")
    second = setup_env.fingerprint([folder])
    (folder / "a.py").rename(folder / "b.py")
    assert len({first, second, setup_env.fingerprint([folder])}) == 3


def test_the_editable_step_reads_whatever_the_compiled_kernels_are_made_of():
    *_, (title, paths, _) = setup_env.STEPS
    assert "editable" in title
    read = {str(path.relative_to(setup_env.ROOT)) for path in paths}
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=setup_env.ROOT, capture_output=True)
    files = [Path(name) for name in tracked.stdout.decode().splitlines()]
    native = {str(f) for f in files if f.parts[0] == "kernels" and f.suffix not in {".py", ".typed", ".json"}}
    assert {"kernels/hybridkv_kernels/cpu/module.cpp", "kernels/hybridkv_kernels/decode_attn/cpu.h"} <= native
    assert read == {"pyproject.toml", "setup.py"} | native


def test_only_changed_and_failed_steps_run_again(checkout, monkeypatch):
    done, broken = [], set()
    (checkout / "one").write_text("1")
    (checkout / "two").write_text("2")

    def install(name):
        if name in broken:
            raise setup_env.SetupError("no")
        done.append(name)

    steps = tuple((name, [checkout / name], lambda name=name: install(name)) for name in ("one", "two"))
    monkeypatch.setattr(setup_env, "STEPS", steps)
    assert [setup_env.run_steps(), setup_env.run_steps()] == [2, 0]
    (checkout / "two").write_text("changed")
    broken.add("two")
    with pytest.raises(setup_env.SetupError):
        setup_env.run_steps()
    broken.clear()
    assert setup_env.run_steps() == 1
    assert done == ["one", "two", "two"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_broken_stamps_count_as_none(checkout, content):
    setup_env.STAMPS.write_text(content)
    assert setup_env.read_stamps() == {}


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ((3, 9, 1), r"^Python 3.11 or 3.12 is needed, but this is Python 3.9 [^\n]*$"),
        ((3, 11, 7), r"^[^\n]* cannot make virtual environments: [^\n]*$"),
    ],
)
def test_a_python_that_does_not_do_is_refused_in_one_sentence(monkeypatch, version, sentence):
    monkeypatch.setattr(setup_env.sys, "version_info", version)
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup_env, "probe", lambda command: False)
    with pytest.raises(setup_env.SetupError, match=sentence):
        setup_env.find_base_python()


@pytest.mark.parametrize(
    ("answers", "num_calls", "fails"),
    [
        ([(0, "")], 1, False),
        ([(1, "ERROR: No matching distribution found for torch"), (0, "")], 2, False),
        ([(1, "ERROR: No matching distribution found for torch"), (1, "no network")], 2, True),
        ([(1, "No space left on device")], 1, True),
    ],
)
def test_torch_comes_from_the_cpu_index_only_when_pip_finds_none(monkeypatch, answers, num_calls, fails):
    calls = []

    def answer(*arguments):
        calls.append(arguments)
        return answers[len(calls) - 1]

    monkeypatch.setattr(setup_env, "try_pip_install", answer)
    if fails:
        with pytest.raises(setup_env.SetupError, match="torch==.*\\+cpu"):
            setup_env.install_torch()
    else:
        setup_env.install_torch()
    assert [setup_env.TORCH_CPU_INDEX in call for call in calls] == [False, True][:num_calls]
