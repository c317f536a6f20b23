import subprocess
import sys
from pathlib import Path

import pytest

from hybridkv_patches import activation, runtime_context
from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import sglang_versions


@pytest.mark.parametrize("installed", ["0.5.21", "0.5.21.post1", "0.5.21+cu130", "0.5.22", "0.5.23", "0.5.23.post2"])
def test_supported_versions(monkeypatch, installed):
    monkeypatch.setattr("sglang.version.__version__", installed)
    assert activation.version_fault() is None


def test_the_distribution_asks_for_a_supported_version():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nsglang = ["sglang{sglang_versions.SUPPORTED}"]\n' in project


@pytest.mark.parametrize("installed", ["0.5.17", "0.5.20", "0.5.21rc1", "0.5.24.dev1", "0.5.24", "0.6.0", "0.0.0.dev0"])
def test_other_versions_are_named_with_the_supported_ones(monkeypatch, installed):
    monkeypatch.setattr("sglang.version.__version__", installed)
    assert activation.startup_fault() == (
        f"--kv-compressor does not support SGLang {installed}; install a version >=0.5.21,<0.5.24"
    )
    with pytest.raises(RuntimeError, match=installed):
        runtime_context.activate()


def test_what_was_asked_for_and_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(activation, "_asked_for", [])
    monkeypatch.setattr("hybridkv_patches.hook.apply", lambda: None)
    monkeypatch.setattr(Hook, "install", lambda hook: None)
    assert activation.startup_fault() is None
    lost = [
        Hook(target=f"sglang.srt.{name}", kind="after", function=print, why="a test", until="the test ends")
        for name in ("version.b", "version.a")
    ]
    activation.install(lost)
    fault = activation.startup_fault()
    assert "did not take the hook on sglang.srt.version.a, sglang.srt.version.b (" in fault
    assert "SGLANG_PLUGINS=hybridkv" in fault


def test_importing_the_package_imports_nothing_of_sglang():
    code = "import sys, hybridkv_patches; print({'sglang', 'torch', 'sglang_hybridkv'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
