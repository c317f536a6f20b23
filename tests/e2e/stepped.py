"""SGLang's real scheduler in a process of its own, driven one iteration of its event loop at a time.

There is no HTTP server, no tokenizer and no thread: a test sends a script, a generator function, to the process.
The scheduler's own loop runs it where it would receive requests. Each `yield` lets the loop go on until it asks for
requests again, so that a script is the same sequence of events in each run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import tempfile
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.harness import compression_flags, engine_flags
from benchmarks.models.make_models import make_model
from tests.e2e.conftest import CONFIG, STRICT_ENV
from tests.e2e.preloaded import fork

READY_SECONDS = 180
SCRIPT_SECONDS = 200
MOST_STEPS = 5000  # of one script, its end included: what goes on for longer hangs
GREEDY = {"temperature": 0.0}
_NUMBERS = itertools.count()


class Crashed(AssertionError):
    """The scheduler itself failed while a script ran."""


class SteppedScheduler:
    """The process; it is started with the first script, and again after it has died.

    Parameters
    ----------
    flags : command line of the server.
    env : added to this process's environment.
    """

    def __init__(self, flags: Sequence[str], env: dict[str, str]):
        self.flags, self.env = list(flags), env
        self.log = Path(tempfile.mkdtemp(prefix="hybridkv-stepped-")) / "scheduler.log"
        self._process: Any = None
        self._pipe: Any = None

    def run(self, script: Callable[..., Iterator[None]], *args: Any) -> Any:
        """Run `script(steps, *args)` and return what it returns; AssertionError with the trace of its failure."""
        if self._process is None:
            self._start()
        self._pipe.send((script, args))
        outcome, value = self._receive(SCRIPT_SECONDS)
        if outcome == "failed":
            raise AssertionError(value)
        if outcome == "crashed":
            self.stop()
            raise Crashed(value)
        return value

    def stop(self) -> None:
        """End the process; safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self.log.touch()
        address = str(self.log.with_name(f"pipe-{next(_NUMBERS)}"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            listener.settimeout(READY_SECONDS)
            self._process = fork({**os.environ, **self.env}, self.log, f"{__name__}:_serve", address, self.flags)
            self._pipe = Connection(listener.accept()[0].detach())
        outcome, value = self._receive(READY_SECONDS)
        assert outcome == "ready", value

    def _receive(self, seconds: float) -> tuple[str, Any]:
        with contextlib.suppress(EOFError):
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        self.stop()
        return "failed", f"no word within {seconds:.0f} s; the log ends:\n{self.log.read_text()[-3000:]}"


def make_scheduler(budget, pool_tokens, *flags, chunk_tokens=128, max_running=4, env=None, model=None, **config):
    """A scheduler of tiny-qwen2 or `model`, not started yet; stock for budget None. `config` is the compressor's."""
    recipe = engine_flags(
        "cpu",
        max_total_tokens=pool_tokens,
        max_running_requests=max_running,
        chunked_prefill_size=chunk_tokens,
        dtype="float32",
    )
    # An idle scheduler would wait there for sockets that nobody writes to.
    recipe_flags = [flag for flag in recipe.flags if flag != "--sleep-on-idle"]
    compression = compression_flags(budget, {**CONFIG, **config})
    path = ["--model-path", str(model or make_model("tiny-qwen2"))]
    return SteppedScheduler([*path, *recipe_flags, *compression, *flags], {**recipe.env, **STRICT_ENV, **(env or {})})


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, 256, num_tokens).tolist()


class Steps:
    """What a script may do with the scheduler, and what it can see.

    Attributes
    ----------
    scheduler : SGLang's own.
    accepted : ids of all requests that were submitted.
    tokens, records : of each request that has an end, what it generated and its compression record.
    plans : by whatever a script keys them with, over all scripts.
    reasons : of each request that has an end, its finish reason.
    hidden_states : of each request that asked for them, one element for its prompt and one for each token but the last.
    breaks : whether the script lets compressions fail.
    """

    def __init__(self, scheduler: Any):
        from sglang.srt.managers.io_struct import msgpack_decode

        self.scheduler = scheduler
        self.compression = getattr(scheduler.token_to_kv_pool_allocator, "compression", None)
        self.allocator = scheduler.token_to_kv_pool_allocator
        for channel in (scheduler.ipc_channels.send_to_tokenizer, scheduler.output_streamer.send_to_detokenizer):
            channel.socket = SimpleNamespace(
                send=lambda data, flags: self._receive(msgpack_decode(data)),
                send_pyobj=lambda output, flags, protocol: self._receive(output),
            )
        self.plans: dict[Any, str] = {}
        self.forget()

    def forget(self) -> None:
        """Of an idle scheduler: a new script begins."""
        self.accepted: list[str] = []
        self.tokens: dict[str, list[int]] = {}
        self.records: dict[str, dict[str, Any] | None] = {}
        self.reasons: dict[str, dict[str, Any]] = {}
        self.retractions: dict[str, int] = {}
        self.hidden_states: dict[str, list[Any]] = {}
        self.answers: list[Any] = []
        self.breaks = False
        self._counted_before = self._counted()

    def submit(
        self,
        rid: str,
        ids: Sequence[int],
        new_tokens: int,
        custom_params: Any = None,
        *,
        may_end: bool = False,
        **fields: Any,
    ) -> None:
        """A request arrives; `fields` are those of SGLang's TokenizedGenerateReqInput.

        It has `new_tokens` in any case. With `may_end` SGLang does not know that: since 0.5.22 it reserves memory for
        all of an answer that ignores the end of a sequence.
        """
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        never = {str(token): -100.0 for token in self.scheduler.model_config.hf_eos_token_id}
        ends = {"logit_bias": never} if may_end else {"ignore_eos": True}
        sampling = SamplingParams(**GREEDY, **ends, max_new_tokens=new_tokens, custom_params=custom_params)
        sampling.normalize(None)
        sampling.verify(self.scheduler.model_config.vocab_size)
        values: dict[str, Any] = {
            "input_text": "",
            "input_embeds": None,
            "mm_inputs": None,
            "token_type_ids": None,
            "return_logprob": False,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "token_ids_logprob": None,
            "stream": False,
        }
        request = TokenizedGenerateReqInput(
            rid=rid, input_ids=array("q", ids), sampling_params=sampling, **(values | fields)
        )
        self.accepted.append(rid)
        self.scheduler.process_input_requests([request])

    def abort(self, rid: str) -> None:
        """A client gives up its request."""
        from sglang.srt.managers.io_struct import AbortReq

        self.scheduler.process_input_requests([AbortReq(rid=rid)])

    def retract_every(self, decode_steps: int | None) -> None:
        """Retract a request in each so many forwards, by SGLang's own test switch; None for no more."""
        from sglang.srt.managers import scheduler

        scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = decode_steps is not None, decode_steps or 1

    def expect_short_answers(self) -> None:
        """Expect a twentieth of each answer: more is admitted than the pool will hold."""
        tracker = self.scheduler.new_token_ratio_tracker
        tracker.current = tracker.init = tracker.min = 0.05
        tracker.decay = 0.0

    def pause(self, mode: str) -> None:
        """As /pause_generation does; "retract" or "in_place"."""
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        self.scheduler.process_input_requests([PauseGenerationReqInput(mode=mode)])

    def go_on(self) -> None:
        """As /continue_generation does."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        self.scheduler.process_input_requests([ContinueGenerationReqInput()])

    def flush(self) -> None:
        """As /flush_cache does; SGLang refuses while a request runs."""
        from sglang.srt.managers.io_struct import FlushCacheReqInput

        self.scheduler.process_input_requests([FlushCacheReqInput()])

    def ended(self) -> list[str]:
        """Ids of requests that have an answer or a refusal."""
        return [rid for rid in self.accepted if rid in self.reasons]

    def in_hands(self) -> dict[str, Any]:
        """Requests that the scheduler counts as running or waiting, by id."""
        scheduler = self.scheduler
        batches = [scheduler.running_batch, scheduler.last_batch, scheduler.cur_batch_for_debug]
        known = [req for batch in batches if batch is not None for req in batch.reqs]
        known += [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
        known += [] if scheduler.chunked_req is None else [scheduler.chunked_req]
        return {req.rid: req for req in known}

    def check(self) -> None:
        """AssertionError when a request is lost, or ledger, host store, table, tree and allocator do not agree."""
        lost = set(self.accepted) - set(self.ended()) - self.in_hands().keys()
        assert not lost, f"neither answered nor refused nor counted as running or waiting: {sorted(lost)}"
        if self.compression is None:
            return
        self.compression.check_integrity()
        free = self.allocator.get_all_free_pages()
        assert len(free.unique()) == len(free), "a page is free twice"
        rows = [req.kv.req_pool_idx for req in self.in_hands().values() if req.kv.holds_kv]
        assert self.compression.ledger.by_row.keys() <= set(rows), "pages are reserved for a row that nobody holds"
        pages = [r.pages for r in self.compression.ledger.by_row.values()]
        held = set(torch_cat(pages)) & set(free.tolist())
        assert not held, f"pages are reserved and free: {sorted(held)[:8]}"

    def until(self, condition: Callable[[], bool], steps: int = MOST_STEPS) -> Iterator[None]:
        """Let the loop go on until `condition` holds, and check everything after each step."""
        for _ in range(steps):
            if condition():
                return
            yield
            self.check()
        raise AssertionError(f"not within {steps} steps; waiting or running: {sorted(self.in_hands())}")

    def all_ended(self) -> bool:
        """Whether every request has its end."""
        return len(self.ended()) == len(self.accepted)

    def idle(self) -> bool:
        """Whether nothing runs or waits, and no result is still to come."""
        return bool(self.scheduler.is_fully_idle())

    def check_idle(self) -> None:
        """AssertionError unless all is free or evictable, and each request has a record and was counted once."""
        assert self.idle(), f"it does not come to rest: {sorted(self.in_hands())}"
        kept = self.allocator.available_size() + self.scheduler.tree_cache.evictable_size()
        assert kept == self.allocator.size, f"{self.allocator.size - kept} tokens' worth of pages are held"
        if self.compression is None:
            return
        assert not self.compression.ledger.by_row, "pages are still reserved"
        assert self.compression.store.used_bytes() == 0, "host pages are held"
        for rid in self.ended():
            record = self.records.get(rid)
            assert record is not None, f"{rid} has no record"
            assert record["compressed"] == (record["reason"] is None), record
            assert self.breaks or record["reason"] != "compressor_failed", f"see {rid} in the log"
        counted = self._counted() - self._counted_before
        assert counted == len(self.accepted), f"{len(self.accepted)} requests, of which {counted} were counted"

    def _counted(self) -> int:
        if self.compression is None:
            return 0
        stats = self.compression.stats
        return stats.num_compressed + sum(stats.num_dense.values())

    def _receive(self, output: Any) -> None:
        from sglang.srt.managers.io_struct import AbortReq, BatchTokenIDOutput

        if isinstance(output, AbortReq):
            reason = {"type": "abort", **(output.finished_reason or {})}
            if "kv_compressor" in reason:
                self.records[output.rid] = json.loads(reason.pop("kv_compressor"))
            self._end(output.rid, reason)
        elif isinstance(output, BatchTokenIDOutput):
            records = (output.customized_info or {}).get("kv_compressor")
            for i, rid in enumerate(output.rids):
                self.tokens.setdefault(rid, []).extend(output.output_ids[i])
                self.retractions[rid] = output.retraction_counts[i]
                self.records[rid] = None if records is None else records[i]
                if output.output_hidden_states is not None and output.output_hidden_states[i] is not None:
                    self.hidden_states[rid] = output.output_hidden_states[i]
                if output.finished_reasons[i] is not None:
                    self._end(rid, output.finished_reasons[i])
        else:
            self.answers.append(output)

    def _end(self, rid: str, reason: dict[str, Any]) -> None:
        assert rid not in self.reasons, f"{rid} has two ends"
        self.reasons[rid] = reason


def torch_cat(pages: list[Any]) -> list[int]:
    """Numbers of a list of tensors."""
    return [number for tensor in pages for number in tensor.tolist()]


def _serve(address: str, flags: list[str]) -> None:
    """What the process does."""
    pipe = Client(address)
    try:
        steps = Steps(_make_scheduler(flags))
        events = _scripts(steps, pipe)

        def ingest_requests() -> list[Any]:
            if next(events, "done") == "done":
                steps.scheduler.gracefully_exit = True
            return []

        steps.scheduler.ingest_requests = ingest_requests
        steps.scheduler.run_event_loop()
    except BaseException:
        pipe.send(("crashed", traceback.format_exc()))


def _scripts(steps: Steps, pipe: Any) -> Iterator[None]:
    """Run what comes through the pipe; it ends with the pipe."""
    pipe.send(("ready", None))
    with contextlib.suppress(EOFError):
        while True:
            script, args = pipe.recv()
            pipe.send((yield from _run(steps, script, args)))


def _make_scheduler(flags: list[str]) -> Any:
    """As SGLang's run_scheduler_process makes it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.managers.scheduler import Scheduler, configure_scheduler_process
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    server_args = prepare_server_args(flags)
    server_args.resolve_once()
    port_args = PortArgs.init_new(server_args)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    configure_scheduler_process(server_args, 0)
    return Scheduler(server_args, port_args)


def _run(steps: Steps, script: Callable[..., Iterator[None]], args: tuple[Any, ...]) -> Iterator[None]:
    """Run one script, and then whatever is left of its requests; returns what to tell the parent."""
    ratios = dataclasses.replace(steps.scheduler.new_token_ratio_tracker)
    steps.forget()
    try:
        verdict = "ok", (yield from script(steps, *args))
    except Exception:
        verdict = "failed", traceback.format_exc()
    steps.retract_every(None)
    for field in dataclasses.fields(ratios):
        setattr(steps.scheduler.new_token_ratio_tracker, field.name, getattr(ratios, field.name))
    for rid in set(steps.accepted) - set(steps.ended()):
        steps.abort(rid)
    if steps.scheduler._engine_paused:
        steps.go_on()
    for _ in range(MOST_STEPS):
        if steps.idle():
            break
        yield
    try:
        steps.check_idle()
    except AssertionError:
        return "crashed", f"{verdict[1]}\n{traceback.format_exc()}"
    steps.flush()
    yield
    return verdict
