import types

import pytest
from sglang.srt.server_args import ServerArgs

import hybridkv_patches
from hybridkv_patches import engine
from hybridkv_patches.engine import EngineServerArgs
from sglang_hybridkv.srt import settings as settings_module
from sglang_hybridkv.srt.settings import settings_of


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(hybridkv_patches, "startup_fault", lambda: None)
    return EngineServerArgs(ServerArgs)


@pytest.mark.parametrize("off", [{}, {"kv_compressor": None}, {"kv_compressor": "none"}])
def test_without_a_compressor_the_arguments_are_stock(make, off):
    args = make(model_path="m", **off)
    assert type(args) is ServerArgs
    assert (args.model_path, args.page_size, vars(args)) == ("m", None, {})


@pytest.mark.parametrize("config", [{"theta": 0}, '{"theta": 0}'])
def test_compressor_arguments_become_settings(make, config):
    args = make(model_path="m", kv_compressor="hybridkv", kv_compressor_budget=0.5, kv_compressor_config=config)
    settings = settings_of(args)
    assert (settings.config.budget, settings.config.theta, args.page_size) == (0.5, 0.0, settings.config.page_size)


@pytest.mark.parametrize(
    "bad",
    [
        {"kv_compressor": "gzip"},
        {"kv_compressor_budget": 0.1},
        {"kv_compressor": "hybridkv", "kv_compressor_budget": 0},
        {"kv_compressor": "hybridkv", "kv_compressor_config": {"bugdet": 1}},
        {"kv_compressor": "hybridkv", "kv_compressor_config": [1]},
        {"kv_compressor": "hybridkv", "page_size": 1},
        {"kv_compressor": "hybridkv", "tp_size": 2},
    ],
)
def test_bad_arguments_raise_one_sentence(make, bad):
    with pytest.raises(ValueError) as caught:
        make(model_path="m", **bad)
    assert "--" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_attributes_are_stock(make):
    assert make.from_cli_args == ServerArgs.from_cli_args


@pytest.fixture
def killed(monkeypatch):
    pids = []
    monkeypatch.setattr("sglang.srt.utils.kill_process_tree", pids.append)
    monkeypatch.setattr("sglang.srt.runtime_context.get_server_args", types.SimpleNamespace)
    return pids


@pytest.mark.parametrize("infos", [[], [{}], [{"kv_compressor": {"name": "hybridkv"}}, {"status": "ready"}]])
def test_a_scheduler_that_does_not_report_compression_is_stopped(killed, infos):
    with pytest.raises(RuntimeError, match="did not report compression"):
        engine.check_reports(types.SimpleNamespace(scheduler_infos=infos, all_child_pids=[11, 12]))
    assert killed == [11, 12]


def test_reports_are_checked_when_the_schedulers_are_ready(killed, monkeypatch):
    result = types.SimpleNamespace(scheduler_infos=[], all_child_pids=[], wait_for_ready=lambda: None)
    monkeypatch.setattr(settings_module, "active", lambda: None)
    engine.require_reports(None, result)
    result.wait_for_ready()
    monkeypatch.setattr(settings_module, "active", lambda: "hybridkv")
    engine.require_reports(None, result)
    with pytest.raises(RuntimeError):
        result.wait_for_ready()
    result.scheduler_infos.append({"kv_compressor": {"name": "hybridkv"}})
    result.wait_for_ready()
