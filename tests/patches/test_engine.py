import sys
import types

import pytest
from sglang.srt.server_args import ServerArgs

from hybridkv_patches import engine
from hybridkv_patches.engine import EngineServerArgs
from sglang_hybridkv.srt.settings import settings_of


@pytest.fixture
def make():
    return EngineServerArgs(ServerArgs)


@pytest.mark.parametrize("off", [{}, {"kv_compressor": None}, {"kv_compressor": "none"}])
def test_without_a_compressor_the_arguments_are_stock(make, off):
    args = make(model_path="m", **off)
    assert type(args) is ServerArgs
    assert (args.model_path, args.page_size, vars(args)) == ("m", None, {})


@pytest.mark.parametrize("config", [{"theta": 0}, '{"theta": 0}'])
def test_compressor_arguments_become_settings(make, config):
    ours = {"kv_compressor_budget": 0.5, "kv_compressor_events": "ipc:///tmp/a", "kv_compressor_config": config}
    args = make(model_path="m", kv_compressor="hybridkv", **ours)
    settings = settings_of(args)
    assert settings.config.events == "ipc:///tmp/a"
    assert (settings.config.budget, settings.config.theta, args.page_size) == (0.5, 0.0, settings.config.page_size)


def test_other_attributes_are_stock(make):
    assert make.from_cli_args == ServerArgs.from_cli_args


def test_the_engine_of_this_process_takes_our_arguments(monkeypatch):
    entry, _guard = engine.ENTRIES
    monkeypatch.delitem(sys.modules, "sglang.srt.entrypoints.engine", raising=False)
    assert not engine.is_imported()
    entry.install()
    assert not entry.is_installed()
    stock = type("Engine", (), {"server_args_class": ServerArgs})
    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.engine", types.SimpleNamespace(Engine=stock))
    assert engine.is_imported()
    assert not entry.is_installed()
    for _ in range(2):
        entry.install()
        assert entry.is_installed()
        assert stock.server_args_class.stock is ServerArgs


@pytest.mark.parametrize("ours", [{"kv_compressor": "hybridkv"}, {"kv_compressor_budget": 0.5}, {}])
def test_our_keywords_beside_server_args_are_refused(monkeypatch, ours):
    class Engine:
        def __init__(self, **kwargs):
            self.server_args = kwargs["server_args"]

    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.engine", types.SimpleNamespace(Engine=Engine))
    _arguments, guard = engine.ENTRIES
    assert not guard.is_installed()
    guard.install()
    assert guard.is_installed()
    if ours:
        with pytest.raises(ValueError, match=f"^sglang.Engine reads no {next(iter(ours))} beside server_args; build"):
            Engine(server_args="theirs", **ours)
    else:
        assert Engine(server_args="theirs").server_args == "theirs"
    assert not hasattr(object.__new__(Engine), "server_args")
