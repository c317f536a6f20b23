"""Ask one compressing server everything at once, for long: ``python -m tests.e2e.soak --requests 20000 --seed 1``.

Requests are drawn from the seed: text and images under shared prefixes, budgets of their own or none, streams, samples,
aborts, clients that leave, constrained output, log-probs of prompts, damaged images and bad settings; in between the
cache is flushed and generation is paused. First stock SGLang and then the same server, one request at a time, answer
each prompt; whatever comes later is compared with that. A batch of another shape rounds in another way, and can decide
between two heads or tokens that are equal but for that: another plan than the first is accepted when the prompt gets it
again twice from an empty cache. In the end nothing may be held, every request has been counted once, and the server's
memory is where it was after a quarter of the run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil

from benchmarks.harness import Server, end_on_sigterm
from benchmarks.models.make_models import make_model
from benchmarks.provenance import run_metadata
from tests.e2e import planted_faults
from tests.e2e.checks import Answer, ask, assert_nothing_lost, read_answer, request_body, settle
from tests.e2e.conftest import VL, make_server
from tests.e2e.preloaded import CPU_RANKS
from tests.e2e.prompts import Prompt, Vision, text

POOL_TOKENS = 1536
NUM_PROMPTS = 120
NEW_TOKENS = 16
WORKERS = 16
BATCH = 250  # requests
REQUEST_SECONDS = 120
COLD_RUNS = 60  # in which a plan may come again
TOLERANCE = 1e-3  # of log-probs: a batch of another shape rounds in another way
RSS_GROWTH_MIB = 48  # of any process, after a quarter of the run
BUDGETS = (0.1, 0.3, 1.0)
SETTINGS: list[dict[str, Any] | None] = [None, None, None, {"budget": 0.3}, {"budget": 1.0}, {"enabled": False}]
KINDS = {
    "plain": 44,
    "prompt_log_probs": 8,
    "stream": 14,
    "leave": 8,
    "abort": 8,
    "samples": 5,
    "constrained": 4,
    "one_token": 4,
    "damaged_image": 3,
    "bad_setting": 2,
}
PATTERN = "(ab|ba){3}"


@dataclasses.dataclass(frozen=True)
class Request:
    """One of the run; the same for the same seed and number."""

    number: int
    kind: str
    prompt: int
    new_tokens: int
    settings: dict[str, Any] | None
    seconds: float  # until an abort

    @classmethod
    def draw(cls, seed: int, number: int) -> Request:
        """The `number`-th request of a seed."""
        rng = random.Random(f"{seed}-{number}")
        [kind] = rng.choices(list(KINDS), list(KINDS.values()))
        # In every second batch nobody leaves, so that the server's counts can be compared exactly.
        if kind in ("leave", "abort") and number // BATCH % 2 == 0:
            kind = "plain"
        new_tokens = 1 if kind == "one_token" else rng.randint(2, NEW_TOKENS)
        settings = {"budget": 7.0} if kind == "bad_setting" else rng.choice(SETTINGS)
        return cls(number, kind, rng.randrange(NUM_PROMPTS), new_tokens, settings, rng.uniform(0, 0.4))

    @property
    def budget(self) -> float:
        """What its answer depends on; 1.0 stands for a dense one, too."""
        settings = self.settings or {"budget": BUDGETS[0]}
        return float(settings.get("budget", 1.0))


def make_prompts(seed: int, vision: Vision) -> list[Prompt]:
    """Of 40 to about 400 tokens, under twelve prefixes; a third have images, some of them the same."""
    rng, prompts = random.Random(seed), []
    for i in range(NUM_PROMPTS):
        prompt = text(1000 * seed + i % 12, 16 * (i % 12)) + text(1000 * seed + 100 + i, rng.randint(40, 200))
        for j in range(rng.choice([0, 0, 1, 2]) if i % 2 else 0):
            prompt += vision.image(1000 * seed + (i + j) % 16, 56 * rng.randint(1, 3), 112) + text(i + j, 20)
        prompts.append(prompt)
    return prompts


class Soak:
    """One run.

    Attributes
    ----------
    counts : how many requests of each kind, dense reason and other event.
    faults : one sentence each.
    """

    def __init__(self, server: Server, seed: int, prompts: list[Prompt], image: Prompt, stock: list[Answer]):
        self.server, self.seed, self.prompts, self.image, self.stock = server, seed, prompts, image, stock
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.certain, self.uncertain = 0, 0  # requests that the server has counted, and that it may have counted
        self._lock = threading.Lock()
        # By prompt and budget, and then by plan: there are several where rounding decides.
        self.quiet: dict[tuple[int, float], dict[str, Answer]] = {}
        self._of_other_plans: list[tuple[Request, Answer]] = []
        for i, budget in itertools.product(range(NUM_PROMPTS), BUDGETS):
            answer = ask(server, prompts[i], NEW_TOKENS, **custom({"budget": budget}))
            self.quiet[i, budget] = {answer.record["plan"]: answer}
            self.check_answer(Request(-1, "quiet", i, NEW_TOKENS, {"budget": budget}, 0), answer)
        self.counted_before = self.counted()

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """An error of the block is a fault."""
        try:
            yield
        except Exception as error:
            with self._lock:
                self.faults.append(f"{what}: {type(error).__name__}: {error}"[:600])

    def counted(self) -> int:
        """Requests that the server says that it has served."""
        state = self.server.compressor_state()
        assert state is not None, "the server does not compress"
        return int(state["compressed_requests"] + sum(state["dense_requests"].values()))

    def run(self, number: int) -> None:
        """One request, and what is to be said against its answer."""
        request, certain, uncertain = Request.draw(self.seed, number), 0, 2
        with self.noting(str(request)):
            if number % BATCH == BATCH // 2:
                mode = "in_place" if number // BATCH % 2 else "retract"
                with self.paused(mode):
                    self.counts[f"paused, {mode}"] += 1
            certain, uncertain = getattr(self, f"_{request.kind}")(request)
        with self._lock:
            self.counts[request.kind] += 1
            self.certain += certain
            self.uncertain += uncertain

    @contextlib.contextmanager
    def paused(self, mode: str) -> Iterator[None]:
        """Generation is paused in the block, and a moment longer, in which others ask."""
        self.server.client.post("/pause_generation", json={"mode": mode}).raise_for_status()
        try:
            yield
            time.sleep(0.3)
        finally:
            self.server.client.post("/continue_generation", json={}).raise_for_status()

    def end_batch(self) -> None:
        """Nothing is held, each request was counted once, and the cache is forgotten, the host store with it.

        Then plans that were not those of the quiet run are looked for.
        """
        left = settle(self.server)
        assert not left, f"an idle server still holds {left}"
        counted = self.counted()
        gained, sent, unknown = counted - self.counted_before, self.certain, self.uncertain
        self.counted_before, self.certain, self.uncertain = counted, 0, 0
        self.counts["counted by the server"] += gained
        assert sent <= gained <= sent + unknown, f"{gained} requests were counted; {sent} to {sent + unknown} were sent"
        self.server.client.post("/flush_cache").raise_for_status()
        waiting, self._of_other_plans = self._of_other_plans, []
        for request, answer in waiting:
            with self.noting(str(request)):
                self.find_plan(request, answer.record["plan"])
                self.check_answer(request, answer)
        self.counted_before = self.counted()

    def find_plan(self, request: Request, plan: str) -> None:
        """AssertionError unless the request's prompt gets it again, twice: without a prefix, beside other prompts."""
        quiet, found = self.quiet[request.prompt, request.budget], 0
        if plan in quiet:  # of an earlier request
            return
        for number in range(COLD_RUNS):
            answer = self.ask_beside_others(request, random.Random(number))
            found += answer.record["plan"] == plan
            if found == 2:
                quiet[plan] = answer
                self.counts["plans that rounding decides"] += 1
                return
        raise AssertionError(f"plan {plan}, {', '.join(quiet)} in the quiet run, and {found} of {COLD_RUNS} cold ones")

    def ask_beside_others(self, request: Request, rng: random.Random) -> Answer:
        """From an empty cache, in parts and a batch that depend on up to six dense prompts that come first."""
        others = [text(rng.randrange(10**6), rng.randrange(1, 250)) for _ in range(rng.randint(1, 6))]
        settle(self.server)
        self.server.client.post("/flush_cache").raise_for_status()
        with ThreadPoolExecutor(WORKERS) as pool, self.paused("in_place"):
            answers = [
                pool.submit(ask, self.server, prompt, new_tokens, **custom(settings))
                for prompt, new_tokens, settings in (
                    *((other, 1, {"enabled": False}) for other in others),
                    (self.prompts[request.prompt], NEW_TOKENS, {"budget": request.budget}),
                )
            ]
        return [answer.result() for answer in answers][-1]

    def check_memory(self, resident: list[dict[str, int]]) -> None:
        """No process has grown."""
        growth = {name: max(one[name] for one in resident) - mib for name, mib in resident[0].items()}
        assert max(growth.values()) <= RSS_GROWTH_MIB, f"resident memory grew, in MiB: {growth}"

    def check_nothing_lost(self) -> None:
        """Every page of every rank is free, and the log shows no fault."""
        assert_nothing_lost(self.server, largest_prompt=text(self.seed, POOL_TOKENS - 50))
        state = self.server.compressor_state()
        assert state is not None
        first, *others = state["ranks"]
        assert all(rank == first for rank in others), state["ranks"]

    def body(self, request: Request, **more: Any) -> dict[str, Any]:
        """What /generate is sent."""
        body = request_body(self.prompts[request.prompt], request.new_tokens, **custom(request.settings, **more))
        return body | {"top_logprobs_num": 0, "rid": f"soak-{self.seed}-{request.number}"}

    def post(self, body: dict[str, Any]) -> httpx.Response:
        """Its answer, in bounded time."""
        return self.server.client.post("/generate", json=body, timeout=REQUEST_SECONDS)

    def check_answer(self, request: Request, answer: Answer) -> None:
        """Tokens, log-probs and plan are those of the quiet run; of exact answers, and all first tokens, stock's."""
        record, expected = answer.record, self.stock[request.prompt]
        with self._lock:
            self.counts["compressed" if record["compressed"] else f"dense, {record['reason']}"] += 1
            self.counts["retractions"] += answer.meta.get("num_retractions", 0)
        first = Answer(answer.ids[:1], answer.logprobs[:1], {}, {})
        self.compare(first, expected, "the first token of stock")
        if not record["compressed"] or request.budget == 1.0:
            self.compare(answer, expected, "stock")
            return
        quiet = self.quiet[request.prompt, request.budget].get(record["plan"])
        if quiet is None:
            with self._lock:
                self._of_other_plans.append((request, answer))
        # What a retracted request has generated is computed again, exactly.
        elif not answer.meta.get("num_retractions"):
            self.compare(answer, quiet, "the quiet run")

    def compare(self, answer: Answer, expected: Answer, name: str) -> None:
        """AssertionError unless `answer` begins `expected`, but for what a tie may change."""
        for place, (token, value) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
            difference = abs(value - expected.logprobs[place])
            assert difference <= TOLERANCE, f"log-prob {place} is off by {difference:.1e} from {name}"
            if token != expected.ids[place]:
                self.counts["ties"] += 1
                return
        self.counts["answers compared"] += 1

    def _plain(self, request: Request) -> tuple[int, int]:
        response = self.post(self.body(request)).raise_for_status()
        answer = read_answer(response.json())
        assert len(answer.ids) == request.new_tokens, f"{len(answer.ids)} tokens"
        self.check_answer(request, answer)
        return 1, 0

    _one_token = _plain

    def _prompt_log_probs(self, request: Request) -> tuple[int, int]:
        answer = read_answer(self.post(self.body(request, logprob_start_len=0)).raise_for_status().json())
        self.check_answer(request, answer)
        ours, theirs = (a.meta["input_token_logprobs"] for a in (answer, self.stock[request.prompt]))
        pairs = [(a[0], b[0]) for a, b in zip(ours, theirs, strict=True) if a[0] is not None]
        worst = max(abs(a - b) for a, b in pairs)
        assert worst <= TOLERANCE, f"log-probs of the prompt are off by {worst:.1e} from stock"
        return 1, 0

    def _stream(self, request: Request) -> tuple[int, int]:
        with self.server.stream("/generate", self.body(request)) as answers:
            *_, last = answers
        self.check_answer(request, read_answer(last))
        return 1, 0

    def _leave(self, request: Request) -> tuple[int, int]:
        with self.server.stream("/generate", self.body(request)) as answers:
            for _ in range(request.number % 4):
                next(answers, None)
        return 0, 1

    def _abort(self, request: Request) -> tuple[int, int]:
        body = self.body(request)
        timer = threading.Timer(
            request.seconds, lambda: self.server.client.post("/abort_request", json={"rid": body["rid"]})
        )
        timer.start()
        response = self.post(body)
        timer.join()
        if response.status_code != 200:
            assert "abort" in response.text.lower(), response.text[:200]
            return 0, 1
        answer = response.json()
        self.counts["aborted"] += answer["meta_info"]["finish_reason"]["type"] == "abort"
        if answer["meta_info"].get("output_token_logprobs"):
            self.check_answer(request, read_answer(answer))
        return 1, 0

    def _samples(self, request: Request) -> tuple[int, int]:
        answers = self.post(self.body(request, sampling_params={"n": 2}) | self._images_of_one(request))
        for answer in answers.raise_for_status().json():
            self.check_answer(request, read_answer(answer))
        return 2, 0

    def _images_of_one(self, request: Request) -> dict[str, Any]:
        images = self.prompts[request.prompt].images
        return {"image_data": [list(images)]} if images else {}

    def _constrained(self, request: Request) -> tuple[int, int]:
        limits = {"regex": PATTERN, "ignore_eos": False, "max_new_tokens": 12}
        answer = self.post(self.body(request, sampling_params=limits)).raise_for_status().json()
        assert re.fullmatch(PATTERN, answer["text"]), f"{answer['text']!r} is not {PATTERN}"
        return 1, 0

    def _damaged_image(self, request: Request) -> tuple[int, int]:
        response = self.post(self.body(request) | Prompt(self.image.ids, ("data:image/png;base64,AAECAwQF",)).body())
        assert response.status_code == 400, response.text[:200]
        assert "IMAGE data at index 0" in response.text
        return 0, 0

    def _bad_setting(self, request: Request) -> tuple[int, int]:
        response = self.post(self.body(request))
        assert response.status_code == 400, response.text[:200]
        assert "budget = 7.0 is not allowed" in response.text
        return 0, 0


def custom(settings: dict[str, Any] | None, **body: Any) -> dict[str, Any]:
    """`body` with the settings of a request in its sampling parameters."""
    params = {} if settings is None else {"custom_params": {"kv_compressor": settings}}
    return {**body, "sampling_params": {**body.get("sampling_params", {}), **params}}


def resident_mib(server: Server) -> dict[str, int]:
    """Of its processes, by name."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    named = {"launcher": root} | {child.name().removeprefix("sglang::"): child for child in root.children()}
    return {name: process.memory_info().rss // 2**20 for name, process in named.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole of it; what was counted, and `faults`."""
    seed, vision = arguments.seed, Vision(make_model(VL))
    prompts = make_prompts(seed, vision)
    sizes = {"max_total_tokens": POOL_TOKENS, "chunked_prefill_size": 256, "max_running_requests": 16}
    config = {"page_size": 8, "min_head_pages": 1, "min_prompt_tokens": 32}
    with make_server(VL, server_class=Server, **sizes) as server:
        stock = ask_stock(server, prompts)
    started, resident = time.monotonic(), []
    flags = "--schedule-conservativeness", "0.1", "--tp-size", str(arguments.tp_size)
    cores = {CPU_RANKS: "|".join(map(str, range(arguments.tp_size)))} if arguments.tp_size > 1 else {}
    plant = planted_faults.Plant(arguments.plant)
    server = make_server(
        VL, BUDGETS[0], config, *flags, env=plant.env | cores, name="soak", server_class=Server, **sizes
    )
    with server:
        soak = Soak(server, seed, prompts, vision.image(seed), stock)
        plant.begin()
        began, number = time.monotonic(), arguments.first
        with ThreadPoolExecutor(WORKERS) as pool:
            while not is_over(arguments, number - arguments.first, time.monotonic() - began):
                batch = range(number, number + BATCH)
                list(pool.map(soak.run, batch))
                number = batch.stop
                if not server.alive():
                    soak.faults.append("the server ended")
                    break
                with soak.noting(f"after {number} requests"):
                    soak.end_batch()
                if soak.faults and arguments.plant is not None:
                    break
                resident.append(resident_mib(server))
                words = f"{time.monotonic() - began:.0f} s, resident MiB {resident[-1]}, {len(soak.faults)} faults"
                say(f"{number} requests, {words}")
        seconds = time.monotonic() - began
        settled = resident[len(resident) // 4 :]
        checks = [soak.check_nothing_lost] if server.alive() else []
        checks += [lambda: soak.check_memory(settled)] if settled else []
        for check in checks:
            with soak.noting("in the end"):
                check()
    return {
        "bench": "soak",
        "seed": seed,
        "requests": number - arguments.first,
        "seconds": round(seconds),
        "preparation_seconds": round(began - started),
        "tp_size": arguments.tp_size,
        "planted": arguments.plant,
        "resident_mib": [resident[0], settled[0], settled[len(settled) // 2], settled[-1]] if resident else [],
        "counts": dict(sorted(soak.counts.items())),
        "faults": soak.faults,
        **run_metadata(),
    }


def ask_stock(server: Server, prompts: list[Prompt]) -> list[Answer]:
    """One at a time, with the log-probs of their prompts."""
    return [ask(server, prompt, NEW_TOKENS, logprob_start_len=0) for prompt in prompts]


def is_over(arguments: argparse.Namespace, num_requests: int, seconds: float) -> bool:
    """Whether as many requests as asked for, or as many minutes, are behind us."""
    if arguments.requests is not None:
        return num_requests >= int(arguments.requests)
    return seconds >= 60 * float(arguments.minutes)


def say(line: str) -> None:
    """Progress; standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Print one JSON object; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="how long, without --requests (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, help="how many, instead of --minutes")
    parser.add_argument("--seed", type=int, help="of prompts and requests (default: a new one, which is printed)")
    parser.add_argument("--first", type=int, default=0, help="number of the first request, to go on or to repeat")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks of the compressing server, a core for each")
    parser.add_argument(
        "--plant", choices=planted_faults.NAMES, help="break this in the server; the run ends when it is found"
    )
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1, 10**6)
    end_on_sigterm()
    say(f"seed {arguments.seed}")
    result = run(arguments)
    print(json.dumps(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
