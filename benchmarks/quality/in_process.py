"""Ask all servers of a plan at once, without a server: one prefill of a prompt, then every setting answers it.

What `ask_cells` asks of real servers, `benchmarks.replay` computes with the compressors' own code. It is for tables
that servers would take days for on a CPU; a few cells asked of real servers beside it show that both say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.cases import END_OF_TURN, Cell, DrawText, Exchange, make_exchanges
from benchmarks.quality.client import MAX_ANSWER_TOKENS, NUM_TOP_LOGPROBS, Reply
from benchmarks.quality.runs import score
from benchmarks.quality.servers import STOCK, ServerSpec, launch_config
from benchmarks.quality.store import AnswerFile
from benchmarks.replay import Held, Prompt, Replay, ReplayedModel, compress, everything
from sglang_hybridkv.compressors import Compressor, get_compressor
from sglang_hybridkv.config import parse_config

_WORDS_AROUND = 12
ROWS_AT_ONCE = 512
"""Tokens of all settings in one forward: as many as fit the memory of a small machine."""


@dataclass(frozen=True)
class _Answer:
    """Tokens [T] of one setting, and the logits [T, vocabulary] that each was chosen from."""

    ids: torch.Tensor
    logits: torch.Tensor


def make_compressor(spec: ServerSpec, calibration: Path | None) -> Compressor | None:
    """The compressor of a spec with the settings that its server would have; None for stock."""
    if spec.compressor == STOCK:
        return None
    compressor = get_compressor(spec.compressor)
    config = launch_config(spec, calibration)
    return compressor(parse_config(config, compressor.config_class, budget=spec.budget))


class Answerer:
    """Answers of one model under several settings.

    Parameters
    ----------
    specs : stock among them or not; it is computed in any case.
    """

    def __init__(self, model: ReplayedModel, specs: Sequence[ServerSpec], calibration: Path | None):
        self.model = model
        self.compressors = {spec: make_compressor(spec, calibration) for spec in specs}
        self.ends = {model.tokenizer.convert_tokens_to_ids(END_OF_TURN), model.tokenizer.eos_token_id}
        self._plain = get_compressor("full")(parse_config(None, get_compressor("full").config_class, budget=1.0))

    @torch.inference_mode()
    def answer(
        self, exchange: Exchange, specs: Sequence[ServerSpec], base: Prompt | None
    ) -> tuple[Prompt, dict[ServerSpec, dict[str, Any]]]:
        """The prompt, for the next question about the same scene, and the line that is kept of each spec's answer."""
        prompt = self.model.prefill(self.model.encode(exchange.messages), base)
        written, is_free = self._written(exchange), not exchange.question.answer
        max_tokens = MAX_ANSWER_TOKENS if is_free else _answer_tokens(self.model.tokenizer, exchange)
        stock = self._greedy(prompt, [everything(prompt, self._plain)], written, max_tokens)[0]
        held = {spec: self._hold(prompt, spec, max_tokens + len(written)) for spec in specs}
        lines = {}
        compressed = [spec for spec in specs if spec.compressor != STOCK]
        forced = self._forced(prompt, [held[spec] for spec in compressed], written, stock.ids)
        differing = [spec for spec, one in zip(compressed, forced, strict=True) if not torch.equal(one.ids, stock.ids)]
        answers = dict(zip(compressed, forced, strict=True)) | {spec: stock for spec in specs if spec not in compressed}
        if differing and not is_free:
            own = self._greedy(prompt, [held[spec] for spec in differing], written, max_tokens)
            answers |= dict(zip(differing, own, strict=True))
        for spec in specs:
            line = score(exchange, self._reply(prompt, spec, held[spec], answers[spec]))
            if is_free and spec in compressed:
                line["forced_top"] = line["top"]
            lines[spec] = line
        return prompt, lines

    def _written(self, exchange: Exchange) -> torch.Tensor:
        """Tokens that the exchange makes every setting write before its answer."""
        if exchange.forced is None:
            return torch.empty(0, dtype=torch.int64)
        ids: torch.Tensor = self.model.tokenizer(exchange.forced, add_special_tokens=False, return_tensors="pt")
        return ids["input_ids"][0]  # type: ignore[call-overload, no-any-return]

    def _hold(self, prompt: Prompt, spec: ServerSpec, max_new_tokens: int) -> Held:
        compressor = self.compressors[spec]
        if compressor is None:
            return everything(prompt, self._plain)
        return compress(prompt, compressor, max_new_tokens)

    def _begin(self, prompt: Prompt, replay: Replay, written: torch.Tensor) -> torch.Tensor:
        """[B, vocabulary]: logits of the answer's first token."""
        if len(written) == 0:
            return prompt.logits.expand(len(replay.held), -1)
        return replay.step(written.expand(len(replay.held), -1), last=1)[:, 0]

    def _greedy(self, prompt: Prompt, held: list[Held], written: torch.Tensor, max_tokens: int) -> list[_Answer]:
        replay = Replay(self.model, prompt, held)
        logits = [self._begin(prompt, replay, written)]
        tokens = [logits[0].argmax(-1)]
        while len(tokens) < max_tokens and not self._have_ended(torch.stack(tokens, 1)):
            logits.append(replay.step(tokens[-1][:, None])[:, 0])
            tokens.append(logits[-1].argmax(-1))
        ids, by_step = torch.stack(tokens, 1), torch.stack(logits, 1)
        lengths = [self._length(row) for row in ids.tolist()]
        return [_Answer(ids[i, :length], by_step[i, :length]) for i, length in enumerate(lengths)]

    def _forced(self, prompt: Prompt, held: list[Held], written: torch.Tensor, ids: torch.Tensor) -> list[_Answer]:
        """What each setting would have chosen at each token of stock's answer `ids`."""
        answers: list[_Answer] = []
        at_once = max(1, ROWS_AT_ONCE // (len(written) + len(ids)))
        for start in range(0, len(held), at_once):
            replay = Replay(self.model, prompt, held[start : start + at_once])
            logits = self._begin(prompt, replay, written)[:, None]
            if len(ids) > 1:
                logits = torch.cat((logits, replay.step(ids[None, :-1].expand(len(logits), -1))), dim=1)
            answers += [_Answer(row.argmax(-1), row) for row in logits]
        return answers

    def _length(self, ids: list[int]) -> int:
        return next((i + 1 for i, token in enumerate(ids) if token in self.ends), len(ids))

    def _have_ended(self, ids: torch.Tensor) -> bool:
        return all(any(token in self.ends for token in row) for row in ids.tolist())

    def _reply(self, prompt: Prompt, spec: ServerSpec, held: Held, answer: _Answer) -> Reply:
        decode = self.model.tokenizer.decode
        values, ids = answer.logits.log_softmax(-1).topk(NUM_TOP_LOGPROBS, dim=-1)
        top = [
            {decode([token]): round(value, 4) for token, value in zip(tokens, row, strict=True)}
            for tokens, row in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        said = [token for token in answer.ids.tolist() if token not in self.ends]
        return Reply(
            text=decode(said, skip_special_tokens=True),
            prompt_tokens=len(prompt.ids),
            tokens=[decode([token]) for token in answer.ids.tolist()],
            top=top,
            record=None if spec.compressor == STOCK else held.record(len(prompt.ids)),
            ids=answer.ids.tolist(),
        )


def _answer_tokens(tokenizer: Any, exchange: Exchange) -> int:
    """Longest answer, in tokens, to a question with a right one: within a server's limit, not much longer than that."""
    right = len(tokenizer(exchange.question.answer, add_special_tokens=False)["input_ids"])
    return min(exchange.question.max_tokens or MAX_ANSWER_TOKENS, right + right // 2 + _WORDS_AROUND)


def answer_cells(
    answerer: Answerer,
    cells: Sequence[Cell],
    files: Mapping[ServerSpec, AnswerFile],
    *,
    seed: int,
    advance: Callable[[int], Any],
    draw: DrawText | None = None,
) -> None:
    """Ask every setting whatever its file does not have yet, scene by scene.

    Parameters
    ----------
    files : open, one a spec.
    advance : takes how many answers were added.
    draw : shows texts as pictures, for models that read pages; None writes them out.
    """
    for cell in cells:
        for index in range(cell.n):
            base = None
            known = set.intersection(*({*file.answers} for file in files.values()))
            for exchange in make_exchanges(seed, cell, index, known, draw):
                missing = [spec for spec, file in files.items() if exchange.key not in file.answers]
                base, lines = answerer.answer(exchange, missing, base)
                for spec, line in lines.items():
                    files[spec].append(line)
                advance(len(lines))
