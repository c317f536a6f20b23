import pytest
from sglang.srt.arg_groups import resolution_hooks as stock_hooks
from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.server_args import ServerArgs

from hybridkv_patches import resolution_hooks, server_args


@pytest.mark.parametrize("entry", resolution_hooks.ENTRIES, ids=lambda entry: entry.function.__name__)
def test_an_installed_step_is_found_and_runs_around_stock_s(monkeypatch, entry):
    monkeypatch.setattr(stock_hooks, "_HOOKS", {})
    assert not entry.is_installed()
    entry.install()
    assert entry.is_installed()
    assert list(stock_hooks._HOOKS) == [entry.target.rpartition(".")[2]]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("backend", [None, "breakable"])
def test_prefill_stays_eager_unless_the_user_wants_graphs(monkeypatch, compressed, backend):
    monkeypatch.setattr("sglang.srt.utils.is_cuda", lambda: True)  # where SGLang captures it by default
    args, stock = (ServerArgs(model_path="m", cuda_graph_backend_prefill=backend) for _ in range(2))
    if compressed:
        server_args.adopt(args, server_args.make_settings("hybridkv", None, None))
    resolution_hooks.keep_prefill_eager(args, parse_cuda_graph_config)
    parse_cuda_graph_config(stock)
    graphs, untouched = resolving_view(args).cuda_graph_config, resolving_view(stock).cuda_graph_config
    assert graphs.decode.backend == untouched.decode.backend == "full"
    assert untouched.prefill.backend != "disabled"
    assert graphs.prefill.backend == ("disabled" if compressed and backend is None else untouched.prefill.backend)
