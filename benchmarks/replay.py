"""Answers under compression without a server: one prefill of a prompt, then every compressor decodes beside the others.

The model runs in this process on the CPU. What a compressor decides is computed by its own code from the same
observation as in the engine; a decode step then attends to the rows that the engine would hold: kept rows of static
heads, the chunks that the step's own query selects in dynamic heads, and the dense tail. All settings decode as one
batch over the same keys and values, so that a table of twenty servers costs little more than one.
`tests/benchmarks/test_replay.py` compares it with the engine's kernels, number by number.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hybridkv_kernels.chunks import Retrieval, top_chunks
from hybridkv_kernels.host_pages import round_rows, widen_rows
from hybridkv_kernels.retrieve_chunks.naive import join_group, score_chunks_by_query, score_tokens_by_query
from sglang_hybridkv.cache.compress import ObservedPrompt, plan_prompt
from sglang_hybridkv.cache.observation import PromptObserver, QueryPart
from sglang_hybridkv.cache.offload import summarize_heads
from sglang_hybridkv.compressors import Compressor
from sglang_hybridkv.config import RetrievalConfig
from sglang_hybridkv.requests.admission import EXPLANATIONS, DenseReason, PoolShape, decide
from sglang_hybridkv.requests.spans import VisualSpan, observed_window

_ATTENTION = "hybridkv_replay"


@dataclass(frozen=True)
class Prompt:
    """A prompt whose prefill has run.

    Attributes
    ----------
    ids : [N], int64.
    q : [L, N, H * G, D] and k, v : [L, N, H, D]. After RoPE.
    logits : [vocabulary]. Of the token after the prompt.
    spans : images.
    scaling : factor of q . k before the softmax.
    position_delta : a token's position less its index, after the prompt; not 0 only with M-RoPE.
    """

    ids: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    logits: torch.Tensor
    spans: tuple[VisualSpan, ...]
    scaling: float
    position_delta: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return self.k.shape[0], self.k.shape[2]


@dataclass(frozen=True)
class Held:
    """What one setting holds of a prompt.

    Attributes
    ----------
    covered : tokens of the page-aligned prompt; later ones are dense.
    kept : [L, H, covered], bool. Rows of static heads; of dynamic heads, those that the buffer starts with.
    is_dynamic : [L, H], bool.
    num_pages : [L, H], int64. Kept or buffer pages.
    config : settings of the compressor; they say how chunks are scored.
    merged : per layer, keys and values [H, covered, D] in place of the prompt's; None without merging.
    device_pages : pages of L x H head pages on the device, summaries and rounding included.
    query_rms : [L, H, D], of the observed queries, by which keys are coded; None where no head is dynamic.
    """

    covered: int
    kept: torch.Tensor
    is_dynamic: torch.Tensor
    num_pages: torch.Tensor
    config: Any
    device_pages: int
    merged: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None
    query_rms: torch.Tensor | None = None

    def resident_ratio(self, num_tokens: int) -> float:
        """Device bytes over stock's for a request of `num_tokens` tokens in all, as the engine counts them."""
        page_size = self.config.page_size
        allocated = -(-num_tokens // page_size)
        return (self.device_pages + allocated - self.covered // page_size) / allocated

    def record(self, prompt_len: int) -> dict[str, Any]:
        """The engine's record of the request; its first answered token is counted, as at the commit."""
        num_dynamic = int(self.is_dynamic.sum())
        return {
            "compressed": True,
            "reason": None,
            "prompt_tokens": prompt_len,
            "budget": self.config.budget,
            "resident_ratio": self.resident_ratio(prompt_len + 1),
            "host_bytes": None,
            "static_heads": self.is_dynamic.numel() - num_dynamic,
            "dynamic_heads": num_dynamic,
        }


def observe(prompt: Prompt, compressor: Compressor) -> ObservedPrompt:
    """What the compressor sees, as the engine shows it."""
    num_tokens, slots = len(prompt.ids), torch.arange(len(prompt.ids))
    observer = PromptObserver(compressor, len(prompt.q))
    observer.watch(
        0, observed_window(compressor.observed_rows, prompt.spans, num_tokens, compressor.config.observation_rows)
    )
    observer.begin(0, prompt.spans)
    for layer_idx, (q, k, v) in enumerate(zip(prompt.q, prompt.k, prompt.v, strict=True)):
        part = QueryPart(0, observer.gather(0, layer_idx, q, 0), 0, slots)
        observer.score([part], k, v, prompt.scaling)
    return observer.finish(0)[1]


@torch.inference_mode()
def compress(prompt: Prompt, compressor: Compressor, max_new_tokens: int = 64) -> Held:
    """Do what the engine does at the end of prefill, up to the rows that it would move.

    Raises ValueError when the engine would serve the prompt dense, and for what only servers can do.
    """
    config = compressor.config
    if isinstance(config, RetrievalConfig) and config.estimates:
        raise ValueError("replay: unretrieved = 'estimate' is for servers only")
    if isinstance(config, RetrievalConfig) and config.prefetch != "off" and config.stored_dtype != "same":
        raise ValueError("replay: prefetch with rounded host rows is for servers only")
    num_layers, num_kv_heads = prompt.shape
    compressor.bind(num_layers, num_kv_heads)
    shape = PoolShape(config.page_size, num_layers * num_kv_heads, sys.maxsize)
    geometry = decide(len(prompt.ids), max_new_tokens, config, shape)
    if isinstance(geometry, DenseReason):
        raise ValueError(f"a prompt of {len(prompt.ids)} tokens is served dense: {EXPLANATIONS[geometry]}")
    observed = observe(prompt, compressor)
    plan = plan_prompt(compressor, geometry, observed, most_dynamic=geometry.max_dynamic_heads)
    heads, merged = plan.heads, None
    if compressor.merges:
        covered = geometry.covered
        merged = tuple(
            compressor.merge(k[:covered].transpose(0, 1), v[:covered].transpose(0, 1), kept, plan.is_text)
            for k, v, kept in zip(prompt.k, prompt.v, plan.kept, strict=True)
        )
    pages = geometry.pages_used(int(heads.is_dynamic.sum()), num_layers * num_kv_heads)
    held = (geometry.covered, plan.kept, heads.is_dynamic, heads.num_head_pages, config, pages)
    return Held(*held, merged, observed.query_rms)


def everything(prompt: Prompt, compressor: Compressor) -> Held:
    """Hold every row, as stock does."""
    num_layers, num_kv_heads = prompt.shape
    page_size = compressor.config.page_size
    pages = len(prompt.ids) // page_size
    kept = torch.ones(num_layers, num_kv_heads, pages * page_size, dtype=torch.bool)
    heads = torch.zeros(num_layers, num_kv_heads, dtype=torch.int64)
    return Held(pages * page_size, kept, heads.bool(), heads + pages, compressor.config, pages)


@dataclass
class _Extend:
    """Prefill: new tokens attend to the first `num_base` of the base and to their own."""

    base: Prompt | None
    num_base: int
    layers: list[tuple[torch.Tensor, ...]] = dataclasses.field(default_factory=list)
    scaling: float = 0.0

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """[1, H * G, T, D]: attention of T new queries; keeps what the prompt needs."""
        self.scaling = scaling
        states = [x[0].transpose(0, 1) for x in (q, k, v)]
        if self.base is not None and self.num_base:
            earlier = (x[layer_idx, : self.num_base] for x in (self.base.q, self.base.k, self.base.v))
            states = [torch.cat(pair) for pair in zip(earlier, states, strict=True)]
        self.layers.append(tuple(states))
        keys, values = (x.transpose(0, 1)[None] for x in states[1:])
        mask = None
        if self.num_base:
            place = torch.arange(keys.shape[2])
            mask = place <= place[self.num_base :, None]
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )


class Replay:
    """Decode of one prompt under several settings at once; `step` takes the tokens of all of them.

    Attributes
    ----------
    length : tokens that were decoded so far, the same for every setting.
    """

    def __init__(self, model: ReplayedModel | None, prompt: Prompt, held: Sequence[Held]):
        self.model, self.prompt, self.held, self.length = model, prompt, list(held), 0
        self._tails: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(prompt.k)
        self._rows: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._summaries: dict[tuple[int, int], torch.Tensor] = {}
        self._resident: dict[tuple[int, int, int], torch.Tensor] = {}
        self._queries: dict[tuple[int, int, int], torch.Tensor] = {}
        self._exact: dict[tuple[int, int, int], torch.Tensor] = {}
        self._rounded: dict[int, tuple[torch.Tensor, ...]] = {}

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """[B, T, vocabulary]: logits after each, or the `last`, of `tokens` [B, T], which go on from earlier steps'."""
        assert self.model is not None, "without a model there is attention, and no next token"
        start = len(self.prompt.ids) + self.length + self.prompt.position_delta
        logits = self.model.run(tokens, torch.arange(start, start + tokens.shape[1]), self, last)
        self.length += tokens.shape[1]
        return logits

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """[B, H * G, T, D]: attention of T new queries of each setting."""
        tail = self._tails[layer_idx]
        if tail is not None:
            k, v = torch.cat((tail[0], k), dim=2), torch.cat((tail[1], v), dim=2)
        self._tails[layer_idx] = (k, v)
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, H, G, T, D]
        place = torch.arange(k.shape[2])
        is_later = place > place[-q.shape[2] :, None]  # [T, S]
        out = torch.empty_like(grouped)
        for i, held in enumerate(self.held):
            for kv_head in (~held.is_dynamic[layer_idx]).nonzero().flatten().tolist():
                rows = self._static_rows(i, layer_idx, kv_head)
                own = (k[i, kv_head], v[i, kv_head])
                out[i, kv_head] = _softmax_attention(grouped[i, kv_head], rows, own, None, is_later, scaling)
        for settings, kv_heads, unseen in self._retrieve(layer_idx, grouped, keep=True):
            prompt, heads = self.prompt, (settings, kv_heads)
            rows = _rows_of((prompt.k[layer_idx], prompt.v[layer_idx]), kv_heads)
            if self.held[int(settings[0])].config.stored_dtype != "same":
                # Every row twice, as it was and as it is fetched; a query misses one of them.
                is_exact = self._stay_exact(layer_idx, settings, kv_heads, ~unseen[:, 0]).unsqueeze(1)
                rounded = _rows_of(self._rounded_rows(layer_idx), kv_heads)
                rows = tuple(torch.cat(pair, dim=2) for pair in zip(rows, rounded, strict=True))
                unseen = torch.cat((unseen | ~is_exact, unseen | is_exact), dim=-1)
            own = tuple(x.unsqueeze(2)[heads] for x in (k, v))
            out[heads] = _softmax_attention(grouped[heads], rows, own, unseen, is_later, scaling)
        return out.flatten(1, 2)

    def seen(self, layer_idx: int, q: torch.Tensor) -> torch.Tensor:
        """[B, H, T, N], bool: prompt rows that queries [B, H * G, T, D] of each setting attend to."""
        grouped = q.unflatten(1, (self.prompt.shape[1], -1))
        seen = torch.ones(len(self.held), *grouped.shape[1:4:2], len(self.prompt.ids), dtype=torch.bool)
        for i, held in enumerate(self.held):
            seen[i, ..., : held.covered] = held.kept[layer_idx][:, None]
        for settings, kv_heads, unseen in self._retrieve(layer_idx, grouped):
            seen[settings, kv_heads] = ~unseen[:, 0]
        return seen

    def _static_rows(self, i: int, layer_idx: int, kv_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, D] that a static head of a setting holds of the prompt."""
        key = (i, layer_idx, kv_head)
        if key not in self._rows:
            held = self.held[i]
            keys, values = self.prompt.k[layer_idx, :, kv_head], self.prompt.v[layer_idx, :, kv_head]
            first = (keys[: held.covered], values[: held.covered])
            if held.merged is not None:
                first = (held.merged[layer_idx][0][kv_head], held.merged[layer_idx][1][kv_head])
            kept = held.kept[layer_idx, kv_head]
            rows = [torch.cat((x[kept], y[held.covered :])) for x, y in zip(first, (keys, values), strict=True)]
            self._rows[key] = (rows[0], rows[1])
        return self._rows[key]

    def _retrieve(
        self, layer_idx: int, grouped: torch.Tensor, *, keep: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Settings [E] and KV heads [E] that retrieve alike, and prompt rows [E, 1, T, N] that each query misses.

        Where the settings have a hysteresis, or prefetch, later calls know what the last query has left on the device
        if this one is to `keep` it.
        """
        groups: dict[tuple[Retrieval, float | None, int, int, str], list[tuple[int, int]]] = {}
        for i, held in enumerate(self.held):
            config = held.config
            for kv_head in held.is_dynamic[layer_idx].nonzero().flatten().tolist():
                similarity = None if config.prefetch == "off" else config.prefetch_similarity
                key = (config.retrieval, similarity, config.page_size, held.covered, config.stored_dtype)
                groups.setdefault(key, []).append((i, kv_head))
        for (retrieval, similarity, page_size, covered, _), members in groups.items():
            settings, kv_heads = torch.tensor(members).T
            vectors = torch.stack([self._chunk_summaries(layer_idx, i)[kv_head] for i, kv_head in members])
            q = grouped[settings, kv_heads]  # [E, G, T, D]
            by_query = _score_chunks(q.flatten(1, 2), vectors, retrieval, covered).unflatten(1, q.shape[1:3])
            scores = join_group(by_query.transpose(1, 2).flatten(0, 1), retrieval.chunk_score)  # [E * T, C]
            pages = torch.stack([self.held[i].num_pages[layer_idx, kv_head] for i, kv_head in members])
            counts = pages * (page_size // retrieval.chunk_size)
            if retrieval.hysteresis or similarity is not None:
                before = resident = torch.stack([self._resident_chunks(layer_idx, *one) for one in members])
                steps = []
                for step_scores in scores.unflatten(0, (len(q), -1)).unbind(1):
                    resident = _choose(step_scores + retrieval.hysteresis * resident, counts, retrieval)
                    steps.append(resident)
                chosen = torch.stack(steps, dim=1)
                if keep:
                    self._resident |= {(layer_idx, *one): row for one, row in zip(members, resident, strict=True)}
                if similarity is not None:
                    before = torch.cat((before.unsqueeze(1), chosen[:, :-1]), dim=1)
                    is_corrected = self._have_moved(layer_idx, members, q, similarity, keep=keep)
                    chosen = torch.where(is_corrected.unsqueeze(2), chosen, before)
            else:
                chosen = _choose(scores, counts.repeat_interleave(q.shape[2]), retrieval).unflatten(0, (len(q), -1))
            unseen = torch.zeros(*chosen.shape[:2], len(self.prompt.ids), dtype=torch.bool)
            unseen[..., :covered] = ~chosen.repeat_interleave(retrieval.chunk_size, dim=2)
            yield settings, kv_heads, unseen.unsqueeze(1)

    def _have_moved(
        self, layer_idx: int, members: list[tuple[int, int]], q: torch.Tensor, similarity: float, *, keep: bool
    ) -> torch.Tensor:
        """[E, T], bool: where prefetch corrects, as `QueryPrefetch` does: a head of the setting has another query now.

        `members` are settings and KV heads of queries q [E, G, T, D]; zeros come before the first.
        """
        mean = q.mean(dim=1)  # [E, T, D]
        nothing = torch.zeros_like(mean[0, 0])
        first = torch.stack([self._queries.get((layer_idx, *one), nothing) for one in members])
        before = torch.cat((first.unsqueeze(1), mean[:, :-1]), dim=1)
        if keep:
            self._queries |= {(layer_idx, *one): row for one, row in zip(members, mean[:, -1], strict=True)}
        moved = torch.nn.functional.cosine_similarity(mean, before, dim=-1) < similarity
        settings = torch.tensor([i for i, _ in members])
        return torch.stack([moved[settings == i].any(dim=0) for i, _ in members])

    def _stay_exact(
        self, layer_idx: int, settings: torch.Tensor, kv_heads: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """[E, T, N], bool: rows that no head has fetched, as it holds them since the prompt was compressed.

        `seen` [E, T, N] are the rows that the next T queries of the heads [E] of some `settings` [E] attend to. What
        one of them leaves out comes back from the host, if at all.
        """
        keys = [(layer_idx, *one) for one in zip(settings.tolist(), kv_heads.tolist(), strict=True)]
        first = []
        for key in keys:
            if key not in self._exact:
                self._exact[key] = torch.ones(seen.shape[2], dtype=torch.bool)
                held = self.held[key[1]]
                self._exact[key][: held.covered] = held.kept[layer_idx, key[2]]
            first.append(self._exact[key])
        is_exact = (torch.stack(first).unsqueeze(1) & seen).cummin(dim=1).values
        self._exact |= dict(zip(keys, is_exact[:, -1], strict=True))
        return is_exact

    def _rounded_rows(self, layer_idx: int) -> tuple[torch.Tensor, ...]:
        """Keys and values [N, H, D] of a layer as they come back from a host store of int8."""
        if layer_idx not in self._rounded:
            both = (x[layer_idx] for x in (self.prompt.k, self.prompt.v))
            self._rounded[layer_idx] = tuple(widen_rows(*round_rows(rows), rows.dtype) for rows in both)
        return self._rounded[layer_idx]

    def _resident_chunks(self, layer_idx: int, i: int, kv_head: int) -> torch.Tensor:
        """[C], bool: chunks that a dynamic head of a setting holds."""
        held = self.held[i]
        first = held.kept[layer_idx, kv_head].unflatten(0, (-1, held.config.tokens_per_chunk)).any(dim=1)
        return self._resident.get((layer_idx, i, kv_head), first)

    def _chunk_summaries(self, layer_idx: int, i: int) -> torch.Tensor:
        """[H, vectors, D]: what a setting keeps on the device of one layer to choose chunks by."""
        if (layer_idx, i) not in self._summaries:
            held = self.held[i]
            k, v = (x[layer_idx, : held.covered].transpose(0, 1) for x in (self.prompt.k, self.prompt.v))
            assert held.query_rms is not None, "heads are dynamic after an observation"
            self._summaries[layer_idx, i] = summarize_heads(held.config.retrieval, k, v, held.query_rms[layer_idx])
        return self._summaries[layer_idx, i]


def _rows_of(layers: tuple[torch.Tensor, ...], kv_heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values [E, 1, N, D] of heads [E], from those [N, H, D] of a layer."""
    return tuple(x[:, kv_heads].transpose(0, 1).unsqueeze(1) for x in layers)


def _choose(scores: torch.Tensor, counts: torch.Tensor, retrieval: Retrieval) -> torch.Tensor:
    """[E, C], bool: the forced chunks and the best of the others by their scores [E, C], counts [E] in all."""
    forced = retrieval.forced_chunks(scores.shape[1], counts)
    return top_chunks(scores.masked_fill(forced, float("inf")), counts)


def _score_chunks(q: torch.Tensor, vectors: torch.Tensor, retrieval: Retrieval, covered: int) -> torch.Tensor:
    """[E, G, C]: how much each query of q [E, G, D] wants each chunk, by summaries [E, vectors, D]."""
    if not retrieval.is_coded:
        summaries = vectors.unflatten(1, (covered // retrieval.chunk_size, -1))
        return score_chunks_by_query(q, summaries, retrieval.chunk_score)
    by_token = score_tokens_by_query(q, vectors, retrieval.coded_channels(q.shape[2]))[..., :covered]
    return by_token.unflatten(2, (-1, retrieval.chunk_size)).amax(dim=3)


def _softmax_attention(
    q: torch.Tensor,
    rows: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    unseen: torch.Tensor | None,
    is_later: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """[..., G, T, D]: one softmax of queries q [..., G, T, D] over the prompt's `rows` and their `own` tokens.

    Both are keys and values [..., 1, rows, D], or without the 1. `unseen` marks prompt rows that a query does not
    attend to, and `is_later` [T, tokens] own tokens that come after it.
    """
    (k, v), (own_k, own_v) = rows, own
    on_prompt = q @ k.transpose(-1, -2) * scaling
    if unseen is not None:
        on_prompt.masked_fill_(unseen, float("-inf"))
    on_own = (q @ own_k.transpose(-1, -2) * scaling).masked_fill_(is_later, float("-inf"))
    probs = torch.cat((on_prompt, on_own), dim=-1).softmax(-1)
    num_rows = k.shape[-2]
    return probs[..., :num_rows] @ v + probs[..., num_rows:] @ own_v


class ReplayedModel:
    """A checkpoint of transformers, text or vision-language, whose attention this module computes."""

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32):
        from transformers import (
            AttentionInterface,
            AttentionMaskInterface,
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoProcessor,
            AutoTokenizer,
        )

        AttentionInterface.register(_ATTENTION, self._attend)
        AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
        config = AutoConfig.from_pretrained(path)
        self.is_visual = hasattr(config, "vision_config")
        if self.is_visual:
            attention: Any = {"text_config": _ATTENTION, "vision_config": "sdpa"}
            self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=attention)
            self.processor = AutoProcessor.from_pretrained(path)
            self.tokenizer = self.processor.tokenizer
            self.text_model = self.model.model.language_model
        else:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=_ATTENTION)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.text_model = self.model.model
        self.model.eval()
        self._attention: Any = None

    def _attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        out = self._attention.attend(module.layer_idx, query, key, value, kwargs["scaling"])
        return out.transpose(1, 2).contiguous(), None

    def run(self, tokens: torch.Tensor, positions: torch.Tensor, attention: Any, last: int | None = None) -> Any:
        """[B, T, vocabulary]: logits of text tokens [B, T] at positions [T], of the `last` of them where given."""
        self._attention = attention
        position_ids = positions.expand(tokens.shape)
        if self._has_mrope:
            position_ids = position_ids.expand(3, *tokens.shape)
        embeds = self.text_model.get_input_embeddings()(tokens)
        hidden = self.text_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden if last is None else hidden[:, -last:]).float()

    @property
    def _has_mrope(self) -> bool:
        parameters = getattr(self.text_model.config, "rope_parameters", None) or {}
        return "mrope_section" in parameters

    def encode(self, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Inputs of the model for a conversation, with pictures as data URLs, that the model answers next."""
        # A last turn of the assistant is the beginning of its answer.
        begun = messages[-1]["role"] == "assistant"
        how = {"add_generation_prompt": not begun, "continue_final_message": begun, "tokenize": False}
        if not self.is_visual:
            text = self.tokenizer.apply_chat_template(messages, **how)
            return {"input_ids": self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]}
        images: list[Image.Image] = []
        turns = [turn | {"content": [_part(part, images) for part in _parts(turn)]} for turn in messages]
        text = self.processor.apply_chat_template(turns, **how)
        return dict(self.processor(text=[text], images=images or None, return_tensors="pt"))

    @torch.inference_mode()
    def prefill(self, inputs: dict[str, torch.Tensor], base: Prompt | None = None) -> Prompt:
        """Run a prompt; `base` is another one, with the same images, whose common beginning is not computed again."""
        ids = inputs["input_ids"][0]
        # At least one token is left to compute, as its logits are wanted.
        num_base = 0 if base is None else min(_common_prefix(ids, base.ids), len(ids) - 1)
        spans = self._spans(ids)
        if num_base < max((span.end for span in spans), default=0):
            num_base = 0
        extend = _Extend(base, num_base)
        if num_base or not spans:
            delta = base.position_delta if num_base and base is not None else 0
            logits = self.run(ids[None, num_base:], torch.arange(num_base, len(ids)) + delta, extend, last=1)[0, 0]
        else:
            self._attention = extend
            logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            rope_deltas = getattr(self.model.model, "rope_deltas", None)
            delta = 0 if rope_deltas is None else int(rope_deltas.flatten()[0])
        q, k, v = (torch.stack(states) for states in zip(*extend.layers, strict=True))
        return Prompt(ids, q, k, v, logits, spans, extend.scaling, delta)

    def _spans(self, ids: torch.Tensor) -> tuple[VisualSpan, ...]:
        token = getattr(self.model.config, "image_token_id", None)
        if token is None:
            return ()
        is_image = torch.nn.functional.pad((ids == token).int(), (1, 1))
        starts, ends = ((is_image.diff() == step).nonzero().flatten().tolist() for step in (1, -1))
        return tuple(VisualSpan(start, end, "image") for start, end in zip(starts, ends, strict=True))


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: dict[str, Any], images: list[Image.Image]) -> dict[str, Any]:
    """A part of a message for transformers; its picture goes to `images`."""
    if part["type"] != "image_url":
        return part
    _, data = part["image_url"]["url"].split(",", 1)
    images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    return {"type": "image"}


def _common_prefix(a: torch.Tensor, b: torch.Tensor) -> int:
    length = min(len(a), len(b))
    differs = (a[:length] != b[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
