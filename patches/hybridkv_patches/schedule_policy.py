"""Tell admission which request it prices: the stock budget sees lengths only."""

from hybridkv_patches.hook import Hook

_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"


def consider(adder, req, *args, **kwargs):
    """BEFORE a request is priced; stock budgets do not have `consider`."""
    from sglang_hybridkv.srt.prefill_budget import HybridPrefillBudget

    if isinstance(adder.memory_budget, HybridPrefillBudget):
        adder.memory_budget.consider(req)


def price_preemption(original, adder, req):
    """AROUND preempt_to_schedule: stock asks the budget for what is left and prices the request itself.

    It does so with lengths from the last time the request was considered, which a new one has none of, and takes the
    request's prefix hit for memory that can be evicted. What it does not see is charged to the budget meanwhile.
    """
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    from sglang_hybridkv.srt.prefill_budget import HybridPrefillBudget
    from sglang_hybridkv.srt.sglang_versions import prefix_len

    budget = adder.memory_budget
    if not isinstance(budget, HybridPrefillBudget):
        return original(adder, req)
    req.init_next_round_input(adder.tree_cache)
    budget.consider(req)
    extend_input_len = len(req.full_untruncated_fill_ids) - prefix_len(req)
    seen_by_stock = extend_input_len + min(req.sampling_params.max_new_tokens, CLIP_MAX_NEW_TOKENS)
    unseen = budget.demand(extend_input_len, adder._swa_new_tokens(req)) - seen_by_stock
    with adder._lock_node(req.last_node):
        budget.total_offset += unseen
        try:
            return original(adder, req)
        finally:
            budget.total_offset -= unseen


_PRICED = [
    Hook(
        target=f"{_ADDER}.{method}",
        kind="before",
        function=consider,
        why="the peak of a compressed request depends on its prompt and what it may still generate",
        until="PrefillBudget.check_prefill is given the request",
    )
    for method in ("add_one_req", "add_chunked_req")
]
ENTRIES = (
    *_PRICED,
    Hook(
        target=f"{_ADDER}.preempt_to_schedule",
        kind="around",
        function=price_preemption,
        why="running requests are preempted for one that is priced without its pages, and then does not fit",
        until="preempt_to_schedule asks PrefillBudget.check_prefill",
    ),
)
