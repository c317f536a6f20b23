"""Tell admission which request it prices: the stock budget sees lengths only."""

from hybridkv_patches.hook import Hook

_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"


def consider(adder, req, *args, **kwargs):
    """BEFORE a request is priced; stock budgets do not have `consider`."""
    from sglang_hybridkv.srt.prefill_budget import HybridPrefillBudget

    if isinstance(adder.memory_budget, HybridPrefillBudget):
        adder.memory_budget.consider(req)


ENTRIES = tuple(
    Hook(
        target=f"{_ADDER}.{method}",
        kind="before",
        function=consider,
        why="the peak of a compressed request depends on its prompt and what it may still generate",
        until="PrefillBudget.check_prefill is given the request",
    )
    for method in ("add_one_req", "add_chunked_req")
)
