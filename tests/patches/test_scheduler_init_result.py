import types

import pytest

from hybridkv_patches import scheduler_init_result
from sglang_hybridkv.srt import settings as settings_module


@pytest.fixture
def killed(monkeypatch):
    pids = []
    monkeypatch.setattr("sglang.srt.utils.kill_process_tree", pids.append)
    monkeypatch.setattr("sglang.srt.runtime_context.get_server_args", types.SimpleNamespace)
    return pids


@pytest.mark.parametrize("infos", [[], [{}], [{"kv_compressor": {"name": "hybridkv"}}, {"status": "ready"}]])
def test_a_scheduler_that_does_not_report_compression_is_stopped(killed, infos):
    with pytest.raises(RuntimeError, match="did not report compression"):
        scheduler_init_result.check_reports(types.SimpleNamespace(scheduler_infos=infos, all_child_pids=[11, 12]))
    assert killed == [11, 12]


def test_reports_are_checked_when_the_schedulers_are_ready(killed, monkeypatch):
    result = types.SimpleNamespace(scheduler_infos=[], all_child_pids=[], wait_for_ready=lambda: None)
    monkeypatch.setattr(settings_module, "active", lambda: None)
    scheduler_init_result.require_reports(None, result)
    result.wait_for_ready()
    monkeypatch.setattr(settings_module, "active", lambda: "hybridkv")
    scheduler_init_result.require_reports(None, result)
    with pytest.raises(RuntimeError):
        result.wait_for_ready()
    result.scheduler_infos.append({"kv_compressor": {"name": "hybridkv"}})
    result.wait_for_ready()
