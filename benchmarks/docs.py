"""Write docs/settings.md, docs/refusals.md and docs/models.md from the code: ``python -m benchmarks.docs``.

The tables of today's defaults in docs/quality.md, and that of SGLang's kits in docs/reliability.md, come from the
committed rows.

``tests/test_docs.py`` says whether the committed files are current.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import sglang_kits
from benchmarks.quality.front_picture import MODELS, RESULTS, read_newest
from benchmarks.quality.report import markdown
from hybridkv_patches import server_args
from sglang_hybridkv.compressors import BUILT_IN
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.config import (
    BUDGET_FLAG,
    CONFIG_FLAG,
    EVENTS_FLAG,
    CompressorConfig,
    RetrievalConfig,
    legal_values,
)
from sglang_hybridkv.requests.admission import EXPLANATIONS
from sglang_hybridkv.srt import model_requirements, refusals, self_test, sglang_versions

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN_TABLES, END_TABLES = "<!-- tables of today's defaults -->", "<!-- end of the tables of today's defaults -->"
TASKS_OF_BETTER_MODELS = ("pair", "hop", "tally")
KITS_BEGIN = "<!-- The table is written by `python -m benchmarks.docs` from the rows of the kits. -->"
KITS_END = "<!-- End of the table. -->"
GENERATED = "<!-- Written from the code by `python -m benchmarks.docs`; do not edit. -->"

SETTINGS = """# Settings

{generated}

Settings are given to a server in one of these ways:

```
python -m sglang.launch_server --model-path M --kv-compressor hybridkv --kv-compressor-budget 0.2
python -m sglang.launch_server --model-path M --kv-compressor hybridkv --kv-compressor-config '{{"page_size": 16}}'
python -m sglang.launch_server --model-path M --kv-compressor hybridkv --kv-compressor-config @settings.json
```

{budget_flag} and {events_flag} are short forms of the fields `budget` and `events`. {config_flag} takes a JSON object,
or `@` and the path of a file that holds one. In Python, `sglang.Engine` takes the same by keyword, from `kv_compressor`
to `kv_compressor_config`; the last may be a dict. A field that the chosen compressor does not have ends the server with
one sentence, and so does a value outside the legal ones. `hybridkv config explain NAME FIELD` prints what stands here,
`hybridkv config validate NAME JSON` says whether a server would take the settings, and `hybridkv config print NAME
JSON` shows all of them. Some fields may also be set by a single request, see [requests.md](requests.md).

Words such as page, chunk, static and dynamic head are explained in [architecture.md](architecture.md#vocabulary). Where
each compressor comes from stands in [compressors.md](compressors.md).

## hybridkv

The column `paper` has the value that `{{"preset": "paper"}}` sets; a field that you give yourself wins. *Inferred*
marks a choice that the published text of the method leaves open. The values that the preset `paper` has for
`num_sink_tokens`, `recent_window`, `pool_kernel`, `observation_rows`, `min_head_pages` and `text_share` are inferred,
too, and its `dynamic_share` is inferred from the paper's latency table.

{hybridkv}

Budgets follow one law. Whole head pages go one by one to the head with the largest weight per page that it already
holds (Webster's method), over all layers and heads. So the budget is never exceeded, every head gets `min_head_pages`,
a larger budget takes a page from no head, and budget 1 keeps every row.

## Fields of every compressor

{engine}

## Fields of compressors with dynamic heads

These are `hybridkv` and `quest`. Their defaults are those below unless the compressor's own table says otherwise.

{retrieval}

## The other compressors

Each table has the fields that only this compressor has, and those whose default differs from the two tables above.

{others}"""


@dataclass(frozen=True)
class ServedModel:
    """An architecture that is served.

    Attributes
    ----------
    published : models that have it.
    sees : images and videos, or text alone.
    checkpoints : tiny ones of `SPECS` that tests/e2e/test_equality.py asks.
    since : the first supported SGLang on which these tests pass.
    """

    published: str
    sees: str
    checkpoints: tuple[str, ...]
    since: str = "0.5.21"


_TEXT, _IMAGES, _ALL = "text", "text, images", "text, images, video"
SERVED_MODELS = {
    "Gemma3ForCausalLM": ServedModel(
        "Gemma 3 (text); its layers with a window are not compressed", _TEXT, ("tiny-gemma3",)
    ),
    "Glm4vMoeForConditionalGeneration": ServedModel("GLM-4.5V, GLM-4.6V", _IMAGES, ("tiny-glm4v_moe",)),
    "InternVLChatModel": ServedModel("InternVL 3 and 3.5, with a language model of Qwen", _IMAGES, ("tiny-internvl",)),
    "LlamaForCausalLM": ServedModel("Llama 2, 3, 3.1, 3.2 (text)", _TEXT, ("tiny-llama",)),
    "MistralForCausalLM": ServedModel("Mistral 7B, Mistral Nemo", _TEXT, ("tiny-mistral",)),
    "Phi3ForCausalLM": ServedModel("Phi-3, Phi-4-mini, Phi-4", _TEXT, ("tiny-phi3",)),
    "Qwen2ForCausalLM": ServedModel("Qwen2, Qwen2.5", _TEXT, ("tiny-qwen2",)),
    "Qwen3ForCausalLM": ServedModel("Qwen3", _TEXT, ("tiny-qwen3",)),
    "Qwen3MoeForCausalLM": ServedModel("Qwen3-30B-A3B, Qwen3-235B-A22B", _TEXT, ("tiny-qwen3_moe",)),
    "Qwen2VLForConditionalGeneration": ServedModel("Qwen2-VL", _ALL, ("tiny-qwen2_vl",)),
    "Qwen2_5_VLForConditionalGeneration": ServedModel(
        "Qwen2.5-VL", _ALL, ("tiny-qwen2_5_vl", "tiny-qwen2_5_vl-g7", "tiny-qwen2_5_vl-d128")
    ),
    "Qwen3VLForConditionalGeneration": ServedModel("Qwen3-VL, dense", _ALL, ("tiny-qwen3_vl",)),
    "Qwen3VLMoeForConditionalGeneration": ServedModel("Qwen3-VL, mixture of experts", _ALL, ("tiny-qwen3_vl_moe",)),
}

_REFUSED = "[refusals.md](refusals.md)"
SWITCHES = (
    ("`--tp-size 2`", "same tokens, pages and plans on all ranks", "`tests/e2e/test_tensor_parallel.py`"),
    (
        "`--schedule-policy`",
        "`fcfs`, SGLang's own choice, and `lpm` give stock's tokens",
        "`tests/e2e/test_equality.py`; its servers without overlap have `lpm`",
    ),
    (
        "`--enable-priority-scheduling`",
        "preempted requests come back, and none is lost",
        "`tests/e2e/test_steps.py`",
    ),
    ("`--enable-metrics`", "counts what was compressed ([metrics.md](metrics.md))", "`tests/e2e/test_operation.py`"),
    ("CUDA graphs of decode", "full ones; prefill runs without", "[gpu.md](gpu.md)"),
    (
        "several servers behind SGLang's router",
        "as without compression ([replicas.md](replicas.md))",
        "`tests/e2e/test_operation.py`",
    ),
    (
        "weights in fp8, AWQ or GPTQ",
        "not refused, for compression sees only queries, keys and values",
        "read, not run",
    ),
    (
        "LoRA",
        "refused: an adapter changes keys and values, so that plans and prefixes would have to be an adapter's, which "
        "was not proven",
        _REFUSED,
    ),
    ("a KV cache in fp8 or less", "refused: kernels and host store have rows of 16 or 32 bits", _REFUSED),
    (
        "speculative decoding",
        "refused before anything is loaded: it verifies several tokens in one step, and retrieval serves one query",
        _REFUSED,
    ),
    (
        "CUDA graphs of prefill",
        "refused, or switched off where SGLang would choose them: prefill is observed in Python between layers",
        _REFUSED,
    ),
    (
        "`--dp-size`, DP attention, pipeline and expert parallelism",
        "refused: not proven, or a device would have a part of a request only",
        _REFUSED,
    ),
)

MODELS_PAGE = """# Models

{generated}

The architecture is the first entry of `architectures` in a checkpoint's `config.json`.

## Verified

Tests of this project compare these with stock SGLang.

{table}

All of them passed on SGLang 0.5.21 and on 0.5.23. Each starts stock SGLang and a compressing server with a tiny
checkpoint of random weights, on a CPU in fp32, and compares tokens and log-probabilities at budget 1.0 through the
compressed path: prompts in one piece and in several, eight requests at once, and for models that see, images and
videos of several shapes, across the border of a piece and from the cache. Then a smaller budget is asked for, and the
exact prefix once more.

```
.venv/bin/python -m pytest tests/e2e/test_equality.py
```

What the tests do not say: the published checkpoints themselves were not run, but for SmolLM2-135M, which has Llama's
architecture (`make test-pretrained` compares 20 prompts; [quality.md](quality.md) has more), and nothing in this table
but Qwen2.5-VL's shape has run on a GPU ([gpu.md](gpu.md)). On CUDA, models with experts write K to the pool inside
their RoPE kernel. The observation reads K from the pool after the attention of a layer, so that this should not matter;
it was read, not run.

Not verified, and what stops it:

- LLaVA-OneVision as transformers has it (`LlavaOnevisionForConditionalGeneration`): SGLang 0.5.21 does not have it.
- LLaVA and LLaVA-OneVision as their authors published them (`LlavaLlamaForCausalLM`, `LlavaQwenForCausalLM`,
  `LlavaMistralForCausalLM`): SGLang loads their vision tower in float16 whatever `--dtype` says, so that stock cannot
  answer in fp32. It marks their images in another way, too, and the observation would take them for text.
- LLaVA 1.5 as transformers has it (`LlavaForConditionalGeneration`): SGLang 0.5.21 has no class for its vision tower.
- Gemma 3 with images (`Gemma3ForConditionalGeneration`): its image tokens attend to each other in both directions in
  prefill, which only some of SGLang's backends do. With `unverified_model` it starts; the self-test asks in text.
- Videos of GLM and InternVL were not tried.

## Any other: by self-test

A server with another architecture starts only with `{{"unverified_model": true}}` in `--kv-compressor-config`. What
proves it then is a check of the loaded model, and the self-test below. It asks in text: nothing proves images, videos
and audio of such a model. `/server_info` says under `kv_compressor.model` whether the architecture is verified and what
the self-test gave, and so does the line of the log that says that compression is active.

Compression needs:

{requirements}
- {no_other_inputs};
- keys in the cache as attention reads them, after RoPE. This one only the self-test sees.

A model that does not meet one of them is refused after it was loaded, in one sentence that repeats the words above. The
last but one is seen when attention first runs. Seen once, on tiny checkpoints of random weights: Granite and OLMo 2
start so.

Layers with a window of the last tokens, as Gemma 3 has in five of six, are not compressed. When a prompt is compressed,
they keep as many of its last pages as the window reaches, on the device, whatever the budget; the budget is a share of
what the other layers hold. So a prompt shorter than the window saves nothing in these layers, and of a long one they
keep little. The published text checkpoints of Gemma 3 have heads of 256 elements; the tiny one of the tests has 32, and
the kernels were compared with the references at both sizes. SGLang gives Gemma 2 and 3 one pool for all layers, which
compression needs; models for which it makes a pool of its own for the windows are refused, unless
`--disable-hybrid-swa-memory` leaves them one.

## The self-test

Every compressing server asks its own model before it serves, a verified one, too: one prompt of random tokens and an
answer of {steps} tokens. The dense side is the prefill of SGLang's attention backend, which computes the prompt and
each token of the answer anew. The compressed side decodes this answer at budget 1.0, with the server's own pages, tree,
compressor, kernels and CUDA graphs. Of each step the log-probs of the ten best tokens are compared. The server ends
with one sentence when the largest difference, in the median step, is above {fp32:g} nats in fp32, and {half:g} in half
precision. Nothing of it is left in pool, tree, counters or metrics.

On the tiny models of the tests it takes 0.1 to 0.9 s on a busy CPU, and the log-probs differ by 0.06 nats in bfloat16.
What SGLang compiles when a model is asked for the first time is compiled then: 15 s for GLM-4.5V's choice of experts on
a CPU, which the first request would wait for otherwise.

When the prompt cannot be compressed, for instance because pool or host store are too small, an unverified model is
refused, and for a verified one the log and `/server_info` say that the self-test was not run.

## What else a server may have on

{switches}
"""

REFUSALS = """# What is refused, and what is served without compression

{generated}

A server that cannot compress does not start: it ends with exit status 2 and one sentence that names the flag and what
to do instead. A request that cannot be compressed is [served dense](#requests-served-dense), and its answer says why.
[troubleshooting.md](troubleshooting.md) explains how to read both.

## Versions and places

SGLang {sglang} is supported; any other version is refused. Values of the flags themselves are checked
against [settings.md](settings.md). After start-up the server also checks that every hook is in place, that pool,
allocator, radix tree and attention backend are those of this plugin, and that the cache is not quantized.

Served are the architectures {architectures}, and any other
with `unverified_model` that meets the requirements and passes the self-test ([models.md](models.md)). The places are
`--device` {devices}.

## Server arguments

Each of these ends the server with "*argument* cannot be combined with --kv-compressor *name*; *what to do instead*".

{arguments}

## Refusals that depend on more than one argument

A word in braces stands for what you gave.

{conditions}

`sparsemm` also refuses a file of visual-head scores that is missing, damaged or was made for another model.

## Requests that are refused

A request with one of these fields is answered with HTTP status 400 and "*field* is not served with --kv-compressor
*name*; *what to do instead*".

{requests}

## Requests served dense

The reason is in the answer, under `meta_info.kv_compressor.reason`. `/server_info` counts requests by reason, and the
log names a reason at most once a minute. Budget 1 is the proof mode: it is never served dense because it saves nothing.
A request is dense for `host_store_full` when its own plan needs more host memory than it could reserve, and not because
a worst case would. That is known before its prefill where the settings fix the number of dynamic heads, and else after
it ([how much it reserves](architecture.md#what-a-prompt-reserves-in-the-host-store)). With
`{{"on_host_store_full": "static"}}` the heads that do not fit are static instead, those with the highest statistic.

{reasons}"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _fields(
    config_class: type[CompressorConfig], names: Iterable[str], *, paper: bool = False, known: Iterable[str] = ()
) -> str:
    """Table of fields: legal values, default, and meaning where it is not `known`."""
    defaults = config_class.defaults()
    published = HybridKVConfig(preset="paper").model_dump() if paper else {}
    rows = []
    for name in names:
        default = f"`{json.dumps(defaults[name])}`" if name in defaults else "required"
        cells = [f"`{name}`", legal_values(name, config_class), default]
        cells += [f"`{json.dumps(published[name])}`"] if paper else []
        rows.append([*cells, "see above" if name in known else config_class.model_fields[name].description or ""])
    return _table(["field", "legal values", "default", *(["paper"] if paper else []), "what it does"], rows)


def _own_fields(config_class: type[CompressorConfig]) -> list[str]:
    """Fields that a class adds, or gives another default or other legal values, beside the engine's."""
    engine = RetrievalConfig if issubclass(config_class, RetrievalConfig) else CompressorConfig
    known, defaults = engine.defaults(), config_class.defaults()
    return [
        name
        for name in config_class.model_fields
        if name not in known
        or known[name] != defaults.get(name)
        or legal_values(name, engine) != legal_values(name, config_class)
    ]


def settings_page() -> str:
    """Return docs/settings.md."""
    retrieval = [name for name in RetrievalConfig.model_fields if name not in CompressorConfig.model_fields]
    others = []
    for name, compressor in BUILT_IN.items():
        own = _own_fields(compressor.config_class)
        if compressor.config_class is not HybridKVConfig:
            table = (
                _fields(compressor.config_class, own, known=RetrievalConfig.model_fields)
                if own
                else "It has the fields and defaults of the tables above."
            )
            others.append(f"### {name}\n\n{table}\n")
    return SETTINGS.format(
        generated=GENERATED,
        budget_flag=f"`{BUDGET_FLAG}`",
        events_flag=f"`{EVENTS_FLAG}`",
        config_flag=f"`{CONFIG_FLAG}`",
        hybridkv=_fields(HybridKVConfig, HybridKVConfig.model_fields, paper=True),
        engine=_fields(CompressorConfig, CompressorConfig.model_fields),
        retrieval=_fields(RetrievalConfig, retrieval),
        others="\n".join(others),
    )


def _flag_words(row: refusals.Refusal) -> str:
    return f"`{row.flag}`" + (f" (SGLang {row.since} and later)" if row.since else "")


def refusals_page() -> str:
    """Return docs/refusals.md."""
    given = [(_flag_words(row), row.recipe) for row in refusals.REFUSALS]
    several = [(f"`{row.flag}`", row.when, row.recipe) for row in refusals.CONDITIONS]
    sentences = (
        (server_args.NO_COMPRESSOR, "a setting is given, but no compressor"),
        (server_args.OTHER_PAGE_SIZE, "you asked for pages of another size than the compressor's"),
    )
    for text, when in sentences:
        flag, recipe = text.split("; ")
        several.append((f"`{flag}`", when, recipe))
    return REFUSALS.format(
        generated=GENERATED,
        sglang=f"`{sglang_versions.SUPPORTED}`",
        architectures=", ".join(f"`{name}`" for name in refusals.ARCHITECTURES),
        devices=", ".join(
            f"`{device}` with `--attention-backend` {' or '.join(f'`{name}`' for name in names)}"
            for device, names in refusals.ATTENTION_BACKENDS.items()
        ),
        arguments=_table(["argument", "what to do instead"], given),
        conditions=_table(["argument", "refused when", "what to do instead"], several),
        requests=_table(
            ["field", "what to do instead"],
            [(f"`{row.field}`", row.recipe) for row in (*refusals.REQUEST_REFUSALS, refusals.SCORE_EXTRACTION)],
        ),
        reasons=_table(["reason", "meaning"], [(f"`{reason}`", words) for reason, words in EXPLANATIONS.items()]),
    )


def quality_page() -> str:
    """docs/quality.md with the tables of today's defaults, a section a model."""
    head, begin, rest = (DOCS / "quality.md").read_text(encoding="utf-8").partition(BEGIN_TABLES)
    _, end, tail = rest.partition(END_TABLES)
    if not (begin and end):
        raise ValueError(f"docs/quality.md: expected the marks {BEGIN_TABLES} and {END_TABLES}")
    rows = [row for row in read_newest(RESULTS) if row["task"] not in TASKS_OF_BETTER_MODELS]
    sections = [
        f"### {name}\n\n{markdown([row for row in rows if row['model'] == model], '####')}"
        for model, name in MODELS.items()
    ]
    return "\n".join([f"{head}{begin}\n", *sections, f"{end}{tail}"])


def models_page() -> str:
    """docs/models.md."""
    tests = "tests/e2e/test_equality.py"
    columns = ["architecture", "models that have it", "what they see", "since SGLang", f"checkpoints in {tests}"]
    rows = [
        (f"`{name}`", model.published, model.sees, model.since, ", ".join(f"`{one}`" for one in model.checkpoints))
        for name, model in SERVED_MODELS.items()
    ]
    return MODELS_PAGE.format(
        generated=GENERATED,
        table=_table(columns, rows),
        switches=_table(["option", "with compression", "how we know"], SWITCHES),
        requirements="\n".join(f"- {one.words};" for one in model_requirements.REQUIREMENTS),
        no_other_inputs=model_requirements.NO_OTHER_INPUTS,
        steps=self_test.NUM_STEPS,
        fp32=self_test.FP32_LIMIT,
        half=self_test.HALF_LIMIT,
    )


def reliability_page() -> str:
    """Return docs/reliability.md with the table of SGLang's kits between its two marks."""
    before, _, rest = (DOCS / "reliability.md").read_text(encoding="utf-8").partition(KITS_BEGIN)
    table = sglang_kits.table(sglang_kits.read_results())
    return f"{before}{KITS_BEGIN}\n\n{table}\n\n{KITS_END}{rest.partition(KITS_END)[2]}"


def pages() -> dict[Path, str]:
    """Return the text of every generated file."""
    texts = {
        "settings.md": settings_page(),
        "refusals.md": refusals_page(),
        "models.md": models_page(),
        "quality.md": quality_page(),
    }
    if sglang_kits.RESULTS.is_file():  # rows of a whole run of the kits
        texts["reliability.md"] = reliability_page()
    return {DOCS / name: text.rstrip() + "\n" for name, text in texts.items()}


def write() -> None:
    """Write all files."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(prog="python -m benchmarks.docs", description=__doc__).parse_args()
    write()


if __name__ == "__main__":
    main()
