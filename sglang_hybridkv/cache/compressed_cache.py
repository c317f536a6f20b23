"""The forward's one object: what it holds of compressed prompts, and what it does with them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from hybridkv_kernels.decode_attn import decode_attn, plan_decode
from hybridkv_kernels.retrieve_chunks import retrieve_chunks
from sglang_hybridkv.cache.compress import ObservedPrompt, compress_prompt
from sglang_hybridkv.cache.memory import CacheMemory, make_memory
from sglang_hybridkv.cache.observation import PromptObserver, QueryPart
from sglang_hybridkv.cache.prefetch import QueryPrefetch
from sglang_hybridkv.cache.stopwatch import Stopwatch
from sglang_hybridkv.compressors.base import Compressor
from sglang_hybridkv.config import RetrievalConfig
from sglang_hybridkv.requests.ledger import Reservation

if TYPE_CHECKING:
    from hybridkv_kernels.decode_attn.triton_plan import DecodePlan

logger = logging.getLogger(__name__)


class CompressedCache:
    """Compressed prompts by request row, and the compressor that makes them.

    The scheduler has the parts of a prompt's prefill watched, binds its row before the forward that compresses it is
    launched, and releases the row when the request gives it back. In between the forward compresses once, and
    retrieves and attends at each step.

    Attributes
    ----------
    memory : pool views, table and host store, and the stream on which rows are written to the latter.
    compressor : bound to the model, with the server's settings; a request with its own brings another one.
    retrieval : how its dynamic heads retrieve; None where no head is dynamic.
    bound : reservations by row, from `bind` to `release`.
    observer : queries and scores of prompts that are being prefilled.
    counters : [2], int64, on the pool's device. Chunks that queries chose, and those of them that were resident.
    prefetch : which requests attend to what their previous query retrieved; None when that is off.
    """

    def __init__(self, memory: CacheMemory, compressor: Compressor):
        self.memory, self.compressor = memory, compressor
        self.retrieval = compressor.config.retrieval
        self.bound: dict[int, Reservation] = {}
        self._compressors: dict[int, Compressor] = {}
        self.observer = PromptObserver(compressor, memory.layout.num_layers)
        keys = memory.views.k_pages
        self.counters = torch.zeros(2, dtype=torch.int64, device=keys.device)
        self.prefetch: QueryPrefetch | None = None
        self._plan: DecodePlan | None = None
        config = compressor.config
        if isinstance(config, RetrievalConfig) and config.prefetch != "off":
            num_rows = len(memory.table.num_pages)
            self.prefetch = QueryPrefetch(
                config.prefetch_similarity, num_rows, memory.layout, keys.shape[2], keys.dtype, keys.device
            )

    @classmethod
    def create(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        compressor: Compressor,
        *,
        num_rows: int,
        max_prompt_tokens: int,
        num_host_pages: int,
        windows: tuple[int, ...] = (),
    ) -> CompressedCache:
        """A cache over the pool `keys`, `values` [L, slots, H, D], which stay the caller's.

        Parameters
        ----------
        compressor : that has met the model (`Compressor.bind`).
        num_rows, max_prompt_tokens, num_host_pages, windows : as `make_memory` takes them.
        """
        memory = make_memory(
            keys,
            values,
            compressor.config,
            num_rows=num_rows,
            max_prompt_tokens=max_prompt_tokens,
            num_host_pages=num_host_pages,
            windows=windows,
        )
        return cls(memory, compressor)

    def bind(self, row: int, reservation: Reservation, compressor: Compressor | None = None) -> None:
        """Give `row` its pages, before the forward that compresses its prompt is launched.

        Parameters
        ----------
        compressor : with the request's own settings; None is the server's.
        """
        assert row not in self.bound, f"row {row} is bound already"
        self.bound[row] = reservation
        self._compressors[row] = compressor = compressor or self.compressor
        self.memory.table.bind(row, reservation.pages, reservation.host_pages, reservation.geometry.covered)
        self.observer.begin(row, reservation.spans, compressor)
        if self.prefetch is not None:
            self.prefetch.forget(row)

    def observe(self, layer_idx: int, parts: Sequence[QueryPart], scaling: float) -> None:
        """Look at one layer of parts of watched prompts, right after its attention; after the last one, compress.

        Layers with a window are not looked at. A prompt of which this fails is given up alone. All that is written is
        the row's own, and its prompt is only read: nobody else notices. When the device itself is broken, giving up
        fails, too, and ends the scheduler.

        Parameters
        ----------
        parts : of one batch; those of rows that are not watched, or no longer, are passed over.
        """
        layout, final = self.memory.layout, []
        is_compressed = not layout.window(layer_idx)
        for part in parts:
            if not self.observer.is_interested(part.row):
                continue
            with self._contained(part.row, self.observer.prompt_len(part.row)):
                if is_compressed:
                    part = part._replace(q=self.observer.gather(part.row, layer_idx, part.q, part.start))
                if self.observer.is_final(part.row):
                    final.append(part)
        if is_compressed:
            self._score(layer_idx, final, scaling)
        if layer_idx == layout.num_layers - 1:
            self._finish([part.row for part in final if self.observer.is_final(part.row)])

    def _score(self, layer_idx: int, parts: Sequence[QueryPart], scaling: float) -> None:
        """All prompts together; one by one where that fails."""
        rows = self.memory.views.layer_rows(layer_idx)
        if len(parts) > 1:
            try:
                self.observer.score(parts, *rows, scaling)
                return
            except Exception:
                logger.warning("KV compressor: %d prompts are scored one by one", len(parts), exc_info=True)
        for part in parts:
            with self._contained(part.row, self.observer.prompt_len(part.row)):
                self.observer.score([part], *rows, scaling)

    def _finish(self, rows: Sequence[int]) -> None:
        """Compress the prompts of these rows, whose layers have all run."""
        for row in rows:
            with self._contained(row, self.observer.prompt_len(row)):
                self.compress(row, *self.observer.finish(row))

    @contextlib.contextmanager
    def _contained(self, row: int, prompt_len: int) -> Iterator[None]:
        """After an error the prompt of `row` stays dense, and the others have their turn."""
        try:
            yield
        except Exception:
            logger.exception("KV compressor: a prompt of %d tokens could not be compressed", prompt_len)
            self.give_up(row)

    def compress(self, row: int, slots: torch.Tensor, observed: ObservedPrompt) -> None:
        """Fill the pages of a bound row from its prompt's own `slots` [>= covered], int64; see `compress_prompt`."""
        reservation, stopwatch = self.bound[row], Stopwatch(slots.device)
        compress_prompt(self.memory, self._compressors[row], reservation, row, slots, observed)
        stopwatch.stop()
        reservation.seconds = stopwatch.seconds

    def join(self) -> None:
        """Before the layers of a forward are launched: it comes after what was written to the host store before it.

        The host does not wait. From here on host rows may be read, and the slots that they came from may be another's.
        """
        self.memory.side.join()

    def retrieve(self, layer_idx: int, q: torch.Tensor, req_rows: torch.Tensor) -> None:
        """Bring the dynamic heads of one layer up to date with new queries.

        Parameters
        ----------
        q : [B, H * G, D], contiguous.
        req_rows : [B], integer. Rows of these requests; a dense row is left alone.

        Notes
        -----
        No host sync, fixed shapes: capturable.
        """
        if self.retrieval is None:
            return
        views, table, store = self.memory.views, self.memory.table, self.memory.store
        retrieve_chunks(q, views, table, store.pages, self.counters, layer_idx, req_rows, self.retrieval)

    def retrieve_first(self, layer_idx: int, q: torch.Tensor, req_rows: torch.Tensor) -> torch.Tensor | None:
        """`retrieve` before a layer attends: all rows, or with prefetch those that it has to correct.

        Returns
        -------
        The other rows, for `retrieve_ahead`; None without prefetch.
        """
        later = None
        if self.memory.layout.window(layer_idx):
            return None
        if self.prefetch is not None:
            req_rows, later = self.prefetch.split(q, self.memory.table, layer_idx, req_rows)
        self.retrieve(layer_idx, q, req_rows)
        return later

    def retrieve_ahead(self, layer_idx: int, q: torch.Tensor, later: torch.Tensor | None) -> None:
        """After a layer has attended: the rows that `retrieve_first` left, for the next step."""
        if later is None:
            return
        assert self.prefetch is not None
        is_last = layer_idx == self.memory.layout.full_layers[-1]
        self.prefetch.beside(lambda: self.retrieve(layer_idx, q, later), q, later, is_last=is_last)

    def attend(
        self,
        layer_idx: int,
        q: torch.Tensor,
        req_rows: torch.Tensor,
        req_to_token: torch.Tensor,
        seq_lens: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """[B, H * G, D]: one softmax over head pages and dense tail; arguments as those of `decode_attn`.

        The layers of a step come one after the other, with the same row and length tensors: the first one plans for
        all, inside of a captured graph, too.
        """
        plan = self._plan
        if layer_idx == 0 or plan is None or not plan.is_for(req_rows, seq_lens):
            plan = plan_decode(q, self.memory.table, req_rows, seq_lens, self.retrieval)
        # Dropped after the last layer, so that no other step can meet it.
        self._plan = None if layer_idx == self.memory.layout.num_layers - 1 else plan
        return decode_attn(
            q,
            self.memory.views,
            self.memory.table,
            layer_idx,
            req_rows,
            req_to_token,
            seq_lens,
            scaling=scaling,
            retrieval=self.retrieval,
            plan=plan,
        )

    def give_up(self, row: int) -> None:
        """After an error in `observe`: `row` stays dense, whatever was written; see `Reservation.failed`."""
        self.observer.drop(row)
        if row in self.bound:
            self.bound[row].failed = True
            self.memory.table.clear(row)

    def readable(self, row: int) -> Reservation | None:
        """What a decode step reads for `row` besides its dense tail; None for a dense row.

        Waits for the forward that compressed the row, once.
        """
        reservation = self.bound.get(row)
        if reservation is None or reservation.failed or reservation.refusal() is not None:
            return None
        return reservation

    def release(self, row: int) -> None:
        """Make `row` dense again; its pages are the caller's to free."""
        self.observer.drop(row)
        self._compressors.pop(row, None)
        if self.bound.pop(row, None) is not None:
            self.memory.table.clear(row)

    def clear(self) -> None:
        """Make every row dense, and every host page free."""
        self.bound.clear()
        self._compressors.clear()
        self.observer.clear()
        self.memory.table.clear_all()
        self.memory.store.clear()

    def forget_counts(self) -> None:
        """Set all counters to zero."""
        self.counters.zero_()
        if self.prefetch is not None:
            self.prefetch.counters.zero_()

    def check_integrity(self) -> None:
        """AssertionError unless table and host store hold exactly what the bound rows reserved."""
        self.memory.store.check_integrity([reservation.host_pages for reservation in self.bound.values()])
        rows = set(self.memory.table.num_pages.nonzero().flatten().tolist())
        bound = {row for row in self.bound if self.readable(row) is not None}
        assert rows == bound, f"the table binds rows {rows}, the cache {bound}"
