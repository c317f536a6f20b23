"""The exact prompt goes to the tree, unpinned; the request keeps its compressed pages in its row."""

from __future__ import annotations

import copy
import dataclasses

import torch
from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_hybridkv.requests.ledger import Reservation
from sglang_hybridkv.srt.protocols import Request


class HybridRadixCache(UnifiedRadixCache):
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

    def cache_unfinished_req(self, req: Request, chunked=False, **kwargs):
        reservation = self.compression.ledger.get(req.kv.req_pool_idx)
        is_done = not chunked and reservation is not None
        if is_done:
            self.compression.settle(reservation)
        super().cache_unfinished_req(req, chunked=chunked, **kwargs)
        if not is_done:
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
        geometry = self.compression.planned(req) if insert_params.chunked else None
        return None if geometry is None else geometry.covered

    def _commit(self, req: Request, reservation: Reservation) -> None:
        self.unpin(req)
        # A later unpin must find nothing to drop.
        req.last_node, req.lock_receipt = None, DecLockRefParams()
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
        req.prefix_indices = row[: len(req.prefix_indices)].to(torch.int64, copy=True)
        req.kv.cache_protected_len = owned_from

    def insert_req(self, req: Request, *, up_to, **kwargs):
        reservation = self.compression.ledger.get(req.kv.req_pool_idx)
        if reservation is None:
            super().insert_req(req, up_to=up_to, **kwargs)
        elif not reservation.committed:
            # It ended before the commit: its row is exact as far as prefill went, and no further.
            super().insert_req(req, up_to=min(up_to, reservation.prefilled), **kwargs)
        else:
            # As the stock method when nothing is inserted.
            for component in self._components_tuple:
                component.cleanup_after_caching_req(req, is_finished=True)

    def on_release(self, req: Request, *, inserted):
        super().on_release(req, inserted=inserted)
        self.compression.release(req)
        self.compression.update_metrics()

    def session_held_tokens(self, active_pool_idxs=None):
        """Stock's, plus the compressed pages that no row shows: the leak check counts rows and the tree only."""
        return super().session_held_tokens(active_pool_idxs) + self.compression.ledger.unlisted_tokens()
