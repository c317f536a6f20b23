"""Before it serves, a server asks its own model: one short prompt, dense and through the compressed path.

Dense is the prefill of SGLang's attention backend, over the prompt and each token of the answer. Compressed is the
decode of that answer at budget 1.0, with the server's own pool, ledger, tree, compressor and kernels, and in CUDA
graphs where it has them. A model that attends to more than it shows RadixAttention, or whose cache does not hold what
its prefill has read (keys before RoPE), gives other log-probs then.
"""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_hybridkv.requests.admission import EXPLANATIONS, DenseReason
from sglang_hybridkv.requests.settings import WARM_UP, RequestSettings
from sglang_hybridkv.srt import sglang_versions
from sglang_hybridkv.srt.backends import concrete_backends

NUM_STEPS = 5
_MIN_COVERED = 64  # tokens of the prompt that are compressed
_TAIL = 5  # tokens of the prompt that stay dense
_NUM_BEST = 10
# Nats. In half precision decode rounds otherwise than prefill, and an expert may be another one where two tie.
FP32_LIMIT = 1e-3
HALF_LIMIT = 0.5


@dataclasses.dataclass(frozen=True)
class SelfTestResult:
    """What came out.

    Attributes
    ----------
    obstacle : why the prompt could not be compressed; None when it was.
    difference : nats. Of each decode step the largest difference between the log-probs of the ten best tokens, and of
        the steps the median: rounding may turn single ones.
    limit : of the difference; it depends on the model's dtype.
    seconds : that it took.
    """

    obstacle: str | None
    difference: float | None
    limit: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether dense and compressed answer the same."""
        return self.difference is not None and self.difference <= self.limit

    def describe(self) -> str:
        """For people."""
        if self.difference is None:
            return f"self-test not run ({self.obstacle})"
        verdict = "passed" if self.passed else "failed"
        return f"self-test {verdict} in {self.seconds:.2f} s, log-probs differ by {self.difference:.1e}"

    def as_dict(self) -> dict[str, Any]:
        """For `/server_info`."""
        verdict = f"not run: {self.obstacle}" if self.difference is None else "passed" if self.passed else "failed"
        return {"self_test": verdict, "self_test_difference": self.difference, "self_test_seconds": self.seconds}


def run_self_test(scheduler: Any) -> SelfTestResult:
    """Ask the model of an idle `scheduler` that has all its parts; pool, tree and counters are as before.

    Raises
    ------
    ValueError
        The model hands attention what compression does not know, or the compressor failed.

    Notes
    -----
    Cost: NUM_STEPS + 1 prefills of fewer than 150 tokens, or of the longest window and a page more, and NUM_STEPS
    decode steps. On all ranks alike.
    """
    started = time.perf_counter()
    test = _SelfTest(scheduler)
    try:
        with torch.no_grad():
            obstacle, difference = test.run()
    finally:
        test.forget()
    limit = FP32_LIMIT if test.runner.dtype == torch.float32 else HALF_LIMIT
    return SelfTestResult(obstacle, difference, limit, time.perf_counter() - started)


class _SelfTest:
    def __init__(self, scheduler: Any):
        self.runner, self.tree = scheduler.tp_worker.model_runner, scheduler.tree_cache
        self.rows, self.allocator = scheduler.req_to_token_pool, scheduler.token_to_kv_pool_allocator
        self.compression = self.allocator.compression

    def run(self) -> tuple[str | None, float | None]:
        """Obstacle and difference, of which one is None."""
        config = self.compression.config
        # Beyond a layer's window, where there is one.
        window = max(self.compression.cache.memory.layout.windows, default=0)
        length = max(2 * config.page_size, _MIN_COVERED, window + config.page_size) + _TAIL
        vocabulary = self.runner.model_config.vocab_size
        prompt = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
        compressed = RequestSettings(
            config.model_copy(update={"budget": 1.0, "min_prompt_tokens": 1}), given=(("budget", 1.0),)
        )
        with self._stock_prefill():
            answer, dense = self._answer_densely(prompt)
        found = self._answer_compressed(prompt, answer, compressed)
        if isinstance(found, str):
            return found, None
        differences = [_difference(*pair) for pair in zip(dense[1:], found, strict=True)]
        return None, sorted(differences)[len(differences) // 2]

    def _answer_densely(self, prompt: list[int]) -> tuple[list[int], list[torch.Tensor]]:
        """NUM_STEPS greedy tokens, and the log-probs of one token more."""
        settings = RequestSettings(self.compression.config, enabled=False)
        answer: list[int] = []
        distributions = []
        while True:
            req, _, logprobs = self._prefill(prompt + answer, settings)
            sglang_versions.release(self.tree, req)
            distributions.append(logprobs)
            if len(answer) == NUM_STEPS:
                return answer, distributions
            answer.append(int(logprobs.argmax()))

    def _answer_compressed(
        self, prompt: list[int], answer: Sequence[int], settings: RequestSettings
    ) -> list[torch.Tensor] | str:
        """Log-probs after each token of `answer`; or why the prompt was not compressed."""
        req, batch, _ = self._prefill(prompt, settings)
        reservation = self.compression.ledger.get(req.kv.req_pool_idx)
        if reservation is None:
            return EXPLANATIONS[DenseReason(self.compression.request_info(req)["reason"])]
        self.compression.settle(reservation)
        if reservation.overflowed:
            return EXPLANATIONS[DenseReason.HOST_STORE_FULL]
        if reservation.failed:
            raise ValueError(f"in the self-test {EXPLANATIONS[DenseReason.COMPRESSOR_FAILED]}")
        req.output_ids.append(answer[0])
        self.tree.checkpoint(req, up_to=len(prompt))
        distributions = []
        for token in answer:
            batch.input_ids = torch.tensor([token], dtype=torch.int64, device=batch.device)
            batch.prepare_for_decode()
            distributions.append(self._forward(batch))
        sglang_versions.release(self.tree, req)
        return distributions

    def _prefill(self, ids: list[int], settings: RequestSettings) -> tuple[Req, ScheduleBatch, torch.Tensor]:
        """As the scheduler prefills a request of its own; log-probs [vocabulary] of the next token."""
        params = SamplingParams(max_new_tokens=NUM_STEPS + 1, temperature=0.0, custom_params={WARM_UP: True})
        params.normalize(None)
        req = Req("hybridkv-self-test", "", array("q", ids), params)
        self.compression.set_settings(req, settings)
        req.init_next_round_input(self.tree)
        sglang_versions.take_lock(self.tree, req)
        sglang_versions.set_extend_end(req, len(ids))
        batch = ScheduleBatch.init_new(
            [req], self.rows, self.allocator, self.tree, self.runner.model_config, False, SpeculativeAlgorithm.NONE
        )
        batch.prepare_for_extend()
        batch.input_ids, batch.prefill_input_ids_cpu = batch.prefill_input_ids_cpu.to(batch.device), None
        return req, batch, self._forward(batch)

    def _forward(self, batch: ScheduleBatch) -> torch.Tensor:
        forward_batch = ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)
        logits = self.runner.forward(forward_batch).logits_output.next_token_logits
        return logits[0].float().log_softmax(-1).cpu()

    @contextmanager
    def _stock_prefill(self) -> Iterator[None]:
        backends = concrete_backends(self.runner.attn_backend).values()
        for backend in backends:
            backend.prefills_as_stock = True
        try:
            yield
        finally:
            for backend in backends:
                backend.prefills_as_stock = False

    def forget(self) -> None:
        """Everything, as SGLang's flush does; nobody has been served yet."""
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()
        self.compression.forget_counts()


def _difference(dense: torch.Tensor, found: torch.Tensor) -> float:
    best = dense.topk(min(_NUM_BEST, len(dense))).indices
    difference = (dense[best] - found[best]).abs().max().item()
    return float("inf") if difference != difference else difference
