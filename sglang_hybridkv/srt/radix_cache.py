"""The exact prompt goes to the tree, unpinned; the request keeps its compressed pages in its row."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from sglang_hybridkv.requests.ledger import Reservation
from sglang_hybridkv.srt import sglang_versions
from sglang_hybridkv.srt.protocols import Request

_StockTree: Any = sglang_versions.tree_class()


class HybridRadixCache(_StockTree):
    """UnifiedRadixCache that commits compressed prompts and never keys KV computed over compressed context."""

    def __init__(self, params):
        super().__init__(params)
        # What a component answers here caps an insert; stock's own has no opinion. Its class cannot be replaced: the
        # tree's Rust core refuses a registry of other classes.
        self.components[ComponentType.FULL].prepare_for_caching_req = self._insertable

    def caps_inserts(self) -> bool:
        """Whether the component still answers as it was told to."""
        return self.components[ComponentType.FULL].prepare_for_caching_req == self._insertable

    @property
    def compression(self):
        """The scheduler's compression state; it hangs on the allocator."""
        return self.token_to_kv_pool_allocator.compression

    def match_prefix(self, params):
        """A hit ends before the queries that are observed, so that a prompt has one plan, cached or not.

        Only what a request may reuse is capped, not what it has just inserted: then it holds a row.
        """
        req = params.req
        if req is None or req.kv.holds_kv or self.compression.planned(req) is None:
            return super().match_prefix(params)
        key = copy.copy(params.key)
        key.limit = min(len(key), self.compression.window(req).start)
        return super().match_prefix(dataclasses.replace(params, key=key))

    def checkpoint(self, req: Request, *, up_to, **kwargs):
        """What is exact before `up_to` enters the tree; a whole prompt of a request that goes on is committed."""
        reservation = self.compression.ledger.get(req.kv.req_pool_idx)
        exact = self.compression.exact_tokens(req)
        if exact is not None:
            up_to = min(up_to, exact)
        if reservation is not None:
            if reservation.committed:
                # As the stock method when nothing is inserted.
                for component in self._components_tuple:
                    component.cleanup_after_caching_req(req, is_finished=True)
                return
            # Its row is exact as far as prefill went, and no further.
            up_to = min(up_to, reservation.prefilled)
            if not req.finished():
                self.compression.settle(reservation)
        super().checkpoint(req, up_to=up_to, **kwargs)
        if reservation is None or req.finished():
            return
        if reservation.failed:
            self.compression.give_up(req)
        else:
            self._commit(req, reservation)

    def _insertable(self, req: Request, insert_params, token_ids_len, is_finished):
        """How much of a request that goes on may enter the tree; None, all of it, in stock's words.

        After a commit the tree may evict what it holds, at any moment. A request that was retracted computes its own
        generated tokens together with its prompt, and goes on to read them: they stay in its row and its own.
        """
        if is_finished:
            return None
        reservation = self.compression.ledger.get(req.kv.req_pool_idx)
        if reservation is not None:
            return None if reservation.failed else reservation.geometry.covered
        is_whole = token_ids_len == len(req.full_untruncated_fill_ids)
        geometry = None if is_whole else self.compression.planned(req)
        return None if geometry is None else geometry.covered

    def _commit(self, req: Request, reservation: Reservation) -> None:
        sglang_versions.drop_lock(self, req)
        covered, page_size = reservation.geometry.covered, self.page_size
        # What the tree declined to adopt is still the request's, and its row is about to forget it.
        self.free_kv_row(req.kv, [(req.kv.cache_protected_len, covered)])
        self.compression.commit(req)
        pages = reservation.pages[: reservation.num_in_row]
        owned_from = covered - len(pages) * page_size
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        # Page 0 is padding: slots that may be evicted any moment must not stay visible in a live row.
        row[:owned_from] = 0
        slots = pages[:, None] * page_size + torch.arange(page_size, device=pages.device)
        row[owned_from:covered] = slots.flatten().to(row.dtype)
        sglang_versions.note_row(req, row)
        req.kv.cache_protected_len = owned_from

    def on_release(self, req: Request, **kwargs):
        super().on_release(req, **kwargs)
        self.compression.release(req)
        self.compression.update_metrics()
