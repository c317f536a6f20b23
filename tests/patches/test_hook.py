import sys
import types

import pytest

from hybridkv_patches.hook import Hook, install, missing

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
    return Hook(f"{MODULE}.{name}", kind, function, why="a test", until="the test ends")


@pytest.mark.parametrize("name", ["run", "make", "double"])
def test_installed_hooks_are_not_missing(target, name):
    hook = hook_on(f"Machine.{name}", lambda result, *args: result + 1)
    assert missing([hook]) == [hook.target]
    install([hook])
    assert missing([hook]) == []


def test_three_kinds_on_one_target_all_run(target):
    hooks = [
        hook_on("Machine.run", lambda self, number: ((self, number + 1), {}), "before"),
        hook_on("Machine.run", lambda result, self, number: result * 10, "after"),
        hook_on("Machine.run", lambda original, self, number: original(self, number) + 0.5, "around"),
    ]
    install(hooks)
    assert missing(hooks) == []
    assert target().run(1) == 20.5


@pytest.mark.parametrize("name", ["Machine.stop", "Engine.run", "nothing"])
def test_a_target_that_does_not_exist_is_missing(target, name):
    hook = hook_on(name, print)
    install([hook])
    assert missing([hook]) == [hook.target]


def test_a_hook_behind_somebody_elses_is_missing(target):
    theirs, ours = hook_on("Machine.run", lambda result, *args: None), hook_on("Machine.run", lambda result, *args: -1)
    install([theirs])
    install([ours])
    assert missing([theirs]) == []
    assert missing([ours]) == [ours.target]
    assert target().run(1) == 1
