"""SGLang's own test kits, those of its wheel, on a stock server and on two compressing ones: ``make test-sglang-kits``.

The kits are mixins that ask a server over HTTP. Their tests are theirs; here stand the server that each wants, and the
tests that must fail: those that stock fails, too, and those whose answer compression changes, as is documented.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import unittest
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from benchmarks.harness import Server, compression_flags, engine_flags
from benchmarks.models.make_models import make_model
from benchmarks.models.real_models import smollm2_folder
from tests.e2e.checks import assert_nothing_lost
from tests.e2e.conftest import STRICT_ENV, VL
from tests.e2e.prompts import image_url, text

pytestmark = pytest.mark.timeout(1200)  # seconds; four images with long answers take a busy CPU minutes

TINY, TRAINED = "tiny-qwen2", "smollm2"
BUDGETS = {"stock": None, "1.0": 1.0, "0.1": 0.1}
ALL, COMPRESSED = tuple(BUDGETS), ("1.0", "0.1")
SMALL_MODEL = "this model is too small for it"
# Kits ask short questions: with small pages and windows as many of them as can be are compressed.
CONFIG = {"min_prompt_tokens": 1, "page_size": 8, "min_head_pages": 1, "recent_window": 8}


@dataclass(frozen=True)
class ServerKind:
    """A server that kits ask, stock or compressing; `is_asked_briefly` when nothing is left to prune at 0.1."""

    model: str = TINY
    running: int = 32
    env: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()
    is_asked_briefly: bool = False


LARGE = ServerKind(flags=("--enable-return-hidden-states",))
LEARNED, SEEING = ServerKind(TRAINED), ServerKind(VL)
IMPATIENT_QUEUE = ServerKind(running=1, env=(("SGLANG_REQ_WAITING_TIMEOUT", "0.01"),), is_asked_briefly=True)
IMPATIENT = ServerKind(env=(("SGLANG_REQ_RUNNING_TIMEOUT", "1"),), is_asked_briefly=True)


@dataclass(frozen=True)
class Kit:
    """A test class of SGLang's wheel.

    Attributes
    ----------
    path : module in sglang.test, and class.
    kind : the server that it asks.
    values : attributes that the kit wants of its host.
    tests : names of the tests that apply; all of the class when empty.
    fails : tests that have to fail: on which servers, a pattern of the failure, and why.
    """

    path: str
    kind: ServerKind = LARGE
    values: dict[str, Any] = field(default_factory=dict)
    tests: tuple[str, ...] = ()
    fails: dict[str, tuple[tuple[str, ...], str, str]] = field(default_factory=dict)

    def load(self) -> type:
        """The class, of the wheel or of this module."""
        module, _, name = self.path.rpartition(".")
        return getattr(_import(module), name) if module else globals()[name]


def _import(module: str) -> Any:
    return importlib.import_module(f"sglang.test.{module}")


class Dice(random.Random):
    """In place of `random` in kits that throw 30,000 tokens: the tiny models know a few hundred."""

    def randint(self, low: int, high: int) -> int:
        return super().randint(low, min(high, 255))


Dice.Random = Dice  # type: ignore[attr-defined]


class RadixTree:
    """`radix_cache_server_kit` is a function."""

    def test_radix_attention(self) -> None:
        _import("kits.radix_cache_server_kit").run_radix_attention_test(self.base_url)


class CacheHit:
    """`cache_hit_kit` is a function; its conversations are ours, for it would download some."""

    def test_outputs_are_cached(self) -> None:
        self._run(miss_tolerance=1)

    def test_prompts_are_cached(self) -> None:
        self._run(miss_tolerance=32)  # the whole answer

    def _run(self, **options: int) -> None:
        kit = _import("kits.cache_hit_kit")
        rows = [SimpleNamespace(prompt=list(text(seed, 256).ids)) for seed in range(16)]
        with mock.patch.object(kit, "sample_random_requests", lambda num_prompts, **_: rows[:num_prompts]):
            kit.run_multiturn_cache_hit_test(self.base_url, str(self.model), output_length=32, **options)


def cached_prompt_only(result: dict[str, Any], history: int, output: int, label: str) -> None:
    """What a next turn finds: on stock the answer, too, with compression the prompt, in whole pages.

    More than that is what another request with the same beginning has sent as its prompt.
    """
    cached = result["meta_info"]["cached_tokens"]
    least = history // 8 * 8 if "kv_compressor" in result["meta_info"] else history + output
    assert least <= cached <= history + output, label


def cached_prefix(result: dict[str, Any], prefix: int, label: str) -> None:
    """Stock's law in whole pages; the prefix has 512 tokens."""
    assert result["meta_info"]["cached_tokens"] == prefix, label


_PROMPTS = [list(text(seed, 700).ids) for seed in range(48)]
_KL = {"kl_div_thres": 0.002, "kl_div_max_samples": 16, "kl_div_prefill_max_new_tokens": 128}
_TURNS = {
    "input_ids": _PROMPTS,
    "max_new_tokens": 64,
    "sampling_temperature": 0,
    "prefill_cache_assert": staticmethod(cached_prefix),
    "decode_cache_assert": staticmethod(cached_prompt_only),
}
_INEXACT = (("0.1",), "^avg_kl_div=", "answers over a compressed prompt have other log-probs")
_UNCACHED = (COMPRESSED, r"^(assert \d+ >= \d+|$|Too few decode cache hits: 0/16)", "outputs are not cached")
# Without compression this model fills the object's one text up to the limit of the answer; at 0.1 it ends it.
_CUT_SHORT = (("stock", "1.0"), "^Expecting ',' delimiter", SMALL_MODEL)
_RUNS_ON = (
    ("0.1",),
    "^Expected finish_reason: stop, but got: length",
    "a tenth of a prompt as short as this, which the defaults leave dense, gives another answer",
)


def _closed(kind: str) -> tuple[str, ...]:
    """Tests of texts that a grammar bounds, which any model gets right; with random weights others do not end."""
    texts = ["email", "greeting", "number", "phone", "date", "hex_color"]
    texts += ["all_optional_function_params"] if kind == "ebnf" else []
    return tuple(f"test_{kind}_generate_{text}" for text in texts)


KITS = (
    Kit("RadixTree"),
    Kit("CacheHit", fails={"test_outputs_are_cached": _UNCACHED}),
    Kit(
        "kits.kl_divergence_kit.KLDivergenceMixin",
        values=_KL | {"kl_div_decode_max_new_tokens": 128},
        fails={
            "test_input_output_logprobs_match_prefill_cache_hit": _INEXACT,
            "test_input_output_logprobs_match_decode_cache_hit": _UNCACHED,
        },
    ),
    Kit(
        "kits.unified_radix_cache_kit.UnifiedRadixTreeTestMixin",
        values=_TURNS,
        tests=(
            "test_multiturn_logprobs_match",
            "test_multiturn_prefill_cache_hit_branching",
            "test_multiturn_decode_cache_hit_branching",
        ),
        fails={
            "test_multiturn_logprobs_match": _INEXACT,
            "test_multiturn_prefill_cache_hit_branching": _INEXACT,
            "test_multiturn_decode_cache_hit_branching": _INEXACT,
        },
    ),
    Kit("kits.abort_timeout_kit.AbortAllMixin"),
    Kit("kits.abort_timeout_kit.WaitingTimeoutMixin", IMPATIENT_QUEUE),
    Kit("kits.abort_timeout_kit.RunningTimeoutTwoWaveMixin", IMPATIENT, {"running_timeout_sleep": 1}),
    Kit("kits.pause_generation_kit.PauseResumeInPlaceMixin", values={"pause_ignore_eos": True}),
    Kit("kits.basic_api_contract_kit.BasicAPIContractMixin"),
    Kit(
        "kits.basic_decode_correctness_kit.BasicDecodeCorrectnessMixin",
        LEARNED,
        fails={"test_basic_math": (ALL, "^'391' not found", SMALL_MODEL)},
    ),
    Kit(
        "kits.basic_scheduler_stress_kit.BasicSchedulerStressMixin",
        LEARNED,
        fails={"test_concurrent_requests": (ALL, "^0 not greater than or equal to 7", SMALL_MODEL)},
    ),
    Kit("kits.matched_stop_kit.MatchedStopMixin", LEARNED, fails={"test_finish_stop_eos": _RUNS_ON}),
    Kit("kits.json_mode_kit.JSONModeMixin", LEARNED),
    Kit(
        "kits.json_constrained_kit.JSONConstrainedMixin",
        LEARNED,
        fails={"test_json_generate": _CUT_SHORT, "test_mix_json_and_other": _CUT_SHORT},
    ),
    Kit("kits.regex_constrained_kit.RegexConstrainedMixin", tests=_closed("regex")),
    Kit("kits.regex_constrained_kit.RegexConstrainedMixin", LEARNED, tests=("test_regex_generate_complex_json",)),
    Kit("kits.ebnf_constrained_kit.EBNFConstrainedMixin", tests=_closed("ebnf")),
    Kit(
        "kits.spec_server_kits.SpecLogprobKit",
        LEARNED,
        tests=(
            "test_logprob_start_len",
            "test_logprob_match",
            "test_logprob_decode_match_prefill",
            "test_token_ids_logprob_ragged",
        ),
    ),
    Kit("kits.spec_server_kits.SpecHiddenStatesKit"),
    Kit("vlm_utils.ImageOpenAITestMixin", SEEING, tests=("test_mixed_batch", "test_image_prefix_cache_reuse")),
)


def test_every_kit_is_run_or_said_not_to_apply() -> None:
    """In docs/reliability.md, by the name of its file."""
    page = (Path(__file__).parents[2] / "docs/reliability.md").read_text()
    files = {path.stem for path in Path(_import("kits").__path__[0]).glob("*_kit*.py")}
    run = {kit.path.split(".")[1] for kit in KITS if kit.path.startswith("kits.")}
    run |= {"radix_cache_server_kit", "cache_hit_kit"}  # their functions
    assert not {name for name in files - run if f"`{name}`" not in page}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each of the kits' tests and each server; those of one server stand together."""
    if metafunc.function is not test_kit:
        return
    params = []
    for kind in sorted({kit.kind for kit in KITS}, key=repr):
        for budget in BUDGETS:
            for kit in (kit for kit in KITS if kit.kind == kind):
                for name in kit.tests or unittest.TestLoader().getTestCaseNames(_case(kit)):
                    place = f"{budget}-{kit.path.rpartition('.')[2]}-{name}"
                    params.append(pytest.param(budget, kit, name, id=place))
    metafunc.parametrize(("budget", "kit", "name"), params)


def _case(kit: Kit) -> type[unittest.TestCase]:
    """The kit's mixin as unittest wants it; a class that starts a server of its own loses that."""
    nothing = classmethod(lambda cls: None)
    body = {"setUpClass": nothing, "tearDownClass": nothing}
    return type(f"{kit.path.rpartition('.')[2]}Case", (kit.load(), unittest.TestCase), body)


class Servers:
    """One server at a time; the next test that wants another one ends it."""

    def __init__(self) -> None:
        self.key: tuple[ServerKind, str] | None = None
        self.server: Server | None = None

    def get(self, kind: ServerKind, budget: str) -> Server:
        if self.key != (kind, budget):
            self.stop()
            model = smollm2_folder() if kind.model == TRAINED else make_model(kind.model)
            sizes = {"max_total_tokens": 60000, "max_running_requests": kind.running, "chunked_prefill_size": 1024}
            recipe = engine_flags("cpu", dtype="float32", **sizes)
            flags = [*recipe.flags, *kind.flags, *compression_flags(BUDGETS[budget], CONFIG)]
            server = Server(model, flags, {**recipe.env, **STRICT_ENV, **dict(kind.env)}, name=f"kits-{budget}")
            server.start()
            self.key, self.server = (kind, budget), server
        assert self.server is not None
        return self.server

    def stop(self) -> None:
        """End the server, which has to have compressed something if it was to."""
        server, key, self.key, self.server = self.server, self.key, None, None
        if server is not None and key is not None:
            try:
                state = server.compressor_state()
            finally:
                server.stop()
            is_exempt = state is None or (key[0].is_asked_briefly and key[1] == "0.1")
            assert is_exempt or state["compressed_requests"] > 0


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.stop()


def test_kit(servers: Servers, budget: str, kit: Kit, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's test passes, and the server holds nothing after it."""
    import openai

    server = servers.get(kit.kind, budget)
    assert (server.compressor_state() is None) == (budget == "stock")
    model = server.command[server.command.index("--model-path") + 1]
    lengths = _import("kl_test_utils")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(lengths._cached_input_ids, f"{model}_3000_48", _PROMPTS)
    for module in ("radix_cache_server_kit", "unified_radix_cache_kit"):
        monkeypatch.setattr(_import(f"kits.{module}"), "random", Dice(1))
    # Eight thousand tokens take a small CPU longer than two minutes.
    monkeypatch.setattr(_import("kits.basic_scheduler_stress_kit"), "_REQUEST_TIMEOUT", 600)
    images = _import("vlm_utils")
    monkeypatch.setattr(images, "IMAGE_MAN_IRONING_URL", image_url(1))
    monkeypatch.setattr(images, "IMAGE_SGL_LOGO_URL", image_url(2, 112, 112))
    url = server.url + ("/v1" if kit.kind is SEEING else "")
    host = {"base_url": url, "model": model, "process": server.process, "api_key": "none"}
    host["client"] = openai.Client(api_key="none", base_url=f"{server.url}/v1")
    case = _case(kit)
    for attribute, value in (host | kit.values).items():
        setattr(case, attribute, value)
    on, words, why = kit.fails.get(name, ((), "", ""))
    fails = budget in on
    try:
        with pytest.raises(Exception, match=words) if fails else contextlib.nullcontext():
            case(name).debug()
    finally:
        assert_nothing_lost(server)
    if fails:
        pytest.xfail(why)
