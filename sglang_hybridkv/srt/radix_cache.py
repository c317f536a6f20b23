"""The exact prompt goes to the tree, unpinned; the request keeps its compressed pages in its row."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


class HybridRadixCache(UnifiedRadixCache):
    """UnifiedRadixCache that commits compressed prompts and never keys KV computed over compressed context."""

    @property
    def compression(self):
        """The scheduler's compression state; it hangs on the allocator."""
        return self.token_to_kv_pool_allocator.compression

    def cache_unfinished_req(self, req, chunked=False, **kwargs):
        super().cache_unfinished_req(req, chunked=chunked, **kwargs)
        reservation = self.compression.ledger.get(req.kv.req_pool_idx)
        if not chunked and reservation is not None:
            self._commit(req, reservation)

    def _commit(self, req, reservation) -> None:
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

    def insert_req(self, req, *, up_to, **kwargs):
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

    def on_release(self, req, *, inserted):
        super().on_release(req, inserted=inserted)
        self.compression.release(req)

    def session_held_tokens(self, active_pool_idxs=None):
        """Stock's, plus the compressed pages that no row shows: the leak check counts rows and the tree only."""
        return super().session_held_tokens(active_pool_idxs) + self.compression.ledger.unlisted_tokens()
