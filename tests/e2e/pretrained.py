"""A pretrained model, SmolLM2-135M-Instruct of `make models-real`: its self-test, and 20 prompts beside stock.

`make test-pretrained` runs it; `make test` does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness import Server
from benchmarks.models.make_models import DEFAULT_DIR
from tests.e2e.checks import Reference, ask, assert_compressed, assert_nothing_lost, assert_same
from tests.e2e.conftest import make_server, run_servers
from tests.e2e.prompts import Prompt

SMOLLM2 = DEFAULT_DIR / "smollm2"
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 160, 8
DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Reference]]:
    ours, stock = make_server(SMOLLM2, 1.0, name="full"), make_server(SMOLLM2, name="stock")
    for _ in run_servers(ours, stock):
        yield ours, Reference(stock)
        assert_nothing_lost(ours)


def english() -> list[Prompt]:
    """Pieces of this project's documentation, which was written and not drawn at random."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    ids = tokenizer("".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))))["input_ids"]
    return [Prompt(tuple(ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS])) for i in range(NUM_PROMPTS)]


def test_a_pretrained_model_gives_stock_s_tokens_and_passes_its_self_test(servers: tuple[Server, Reference]) -> None:
    ours, stock = servers
    for prompt in english():
        answer = ask(ours, prompt, NEW_TOKENS)
        assert len(prompt.ids) == PROMPT_TOKENS
        assert_same(answer, stock.ask(prompt, NEW_TOKENS))
        assert_compressed(answer)
    state = ours.compressor_state()
    assert state is not None
    assert (state["model"]["architecture"], state["model"]["self_test"]) == ("LlamaForCausalLM", "passed")
