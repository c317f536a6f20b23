import sys
import types

import pytest

from hybridkv_patches.entry import fault_of
from hybridkv_patches.hook import Hook, apply

MODULE = "hybridkv_hook_target"


@pytest.fixture
def target(monkeypatch):
    """A module with things to hook, and SGLang's registry restored afterwards."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    module = types.ModuleType(MODULE)

    class Machine:
        def run(self, number):
            return number

        @classmethod
        def make(cls, number):
            return number

        @staticmethod
        def double(number):
            return 2 * number

    module.Machine = Machine
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    return Machine


def hook_on(name, function, kind="after"):
    return Hook(target=f"{MODULE}.{name}", kind=kind, function=function, why="a test", until="the test ends")


def install(*hooks):
    for hook in hooks:
        hook.install()
    apply()


@pytest.mark.parametrize("name", ["run", "make", "double"])
def test_an_installed_hook_is_found(target, name):
    hook = hook_on(f"Machine.{name}", lambda result, *args: result + 1)
    assert not hook.is_installed()
    install(hook)
    assert hook.is_installed()


def test_three_kinds_on_one_target_all_run(target):
    hooks = [
        hook_on("Machine.run", lambda self, number: ((self, number + 1), {}), "before"),
        hook_on("Machine.run", lambda result, self, number: result * 10, "after"),
        hook_on("Machine.run", lambda original, self, number: original(self, number) + 0.5, "around"),
    ]
    install(*hooks)
    assert all(hook.is_installed() for hook in hooks)
    assert target().run(1) == 20.5


@pytest.mark.parametrize("name", ["Machine.stop", "Engine.run", "nothing"])
def test_a_target_that_does_not_exist_is_named(target, name):
    hook = hook_on(name, print)
    install(hook)
    assert f"SGLang did not take the hook on {hook.target} (" in fault_of([hook])


def test_a_hook_behind_somebody_elses_is_not_installed(target):
    theirs, ours = hook_on("Machine.run", lambda result, *args: None), hook_on("Machine.run", lambda result, *args: -1)
    install(theirs)
    install(ours)
    assert theirs.is_installed()
    assert not ours.is_installed()
    assert target().run(1) == 1
