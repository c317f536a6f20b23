import subprocess
import sys

import pytest

import hybridkv_patches
from hybridkv_patches.hook import Hook


@pytest.mark.parametrize("installed", ["0.5.21", "0.5.21.post1", "0.5.21+cu130"])
def test_supported_versions(monkeypatch, installed):
    monkeypatch.setattr("sglang.version.__version__", installed)
    assert hybridkv_patches.version_fault() is None


@pytest.mark.parametrize("installed", ["0.5.17", "0.5.20", "0.5.21rc1", "0.5.22.dev1", "0.5.22", "0.6.0", "0.0.0.dev0"])
def test_other_versions_are_named_with_the_supported_ones(monkeypatch, installed):
    monkeypatch.setattr("sglang.version.__version__", installed)
    assert hybridkv_patches.version_fault() == (
        f"--kv-compressor does not support SGLang {installed}; install a version >=0.5.21,<0.5.22"
    )
    with pytest.raises(RuntimeError, match=installed):
        hybridkv_patches.activate()


def test_every_hook_says_why_and_until_and_has_one_entry():
    from hybridkv_patches import server_args

    hooks = server_args.HOOKS + hybridkv_patches.server_hooks()
    assert all(hook.why and hook.until for hook in hooks)
    assert len({(hook.target, hook.function) for hook in hooks}) == len(hooks)


def test_a_hook_target_that_does_not_exist_is_named(monkeypatch):
    from hybridkv_patches import scheduler

    lost = Hook("sglang.srt.managers.scheduler.Scheduler.gone", "after", print, why="a test", until="the test ends")
    monkeypatch.setattr(scheduler, "HOOKS", (lost,))
    fault = hybridkv_patches.hooks_fault()
    assert lost.target in fault
    assert "SGLANG_PLUGINS=hybridkv" in fault


def test_importing_the_package_imports_nothing_of_sglang():
    code = "import sys, hybridkv_patches; print({'sglang', 'torch', 'sglang_hybridkv'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
