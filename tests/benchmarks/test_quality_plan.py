"""Which servers a preset starts, with which settings, and what the command line refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.cases import TASKS
from benchmarks.quality.cli import main, parse_variants
from benchmarks.quality.presets import ABLATION, PRESETS, SWEEP, TEXT_PRESETS, Choices, build_plan
from benchmarks.quality.servers import (
    ServerSpec,
    launch_config,
    model_fingerprint,
    with_calibration,
)
from benchmarks.texts import LENGTHS
from sglang_hybridkv.compressors import compressor_names
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.config import parse_config


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_baselines_come_first_then_hybridkv_and_no_server_twice(preset) -> None:
    plan = build_plan(preset, Choices())
    specs = [spec for spec, _ in plan]
    assert specs[0] == ServerSpec("stock")
    others = [spec.compressor for spec in specs if spec.compressor not in ("stock", "full", "hybridkv")]
    assert [spec.compressor for spec in specs][-len(others) :] == others or not others
    assert len({spec.slug for spec in specs}) == len(specs)
    assert all(cells for _, cells in plan)


def test_every_server_is_asked_at_most_what_stock_is_asked() -> None:
    for preset in PRESETS.values():
        (_, asked), *others = build_plan(preset, Choices())
        scenes = {(cell.scene, cell.context): cell for cell in asked}
        for _, cells in others:
            for cell in cells:
                baseline = scenes[cell.scene, cell.context]
                assert cell.n <= baseline.n
                assert set(cell.tasks) <= set(baseline.tasks)


def test_choices_replace_those_of_the_preset() -> None:
    choices = Choices(compressors=["snapkv"], budgets=[0.3], tasks=["get"], scenes=["page", "coherent"], n=2)
    plan = build_plan(PRESETS["headline"], choices)
    assert [spec.label for spec, _ in plan] == ["stock", "snapkv 0.3"]
    assert {(cell.scene, cell.n, cell.tasks) for _, cells in plan for cell in cells} == {
        ("page", 2, ("get",)),
        ("coherent", 2, ("get",)),
    }


def test_a_preset_may_ask_some_tasks_less_often_and_a_choice_of_tasks_is_asked_once() -> None:
    cells = build_plan(TEXT_PRESETS["headline"], Choices())[0][1]
    assert {task: cell.n for cell in cells for task in cell.tasks} == {
        **dict.fromkeys(("needle", "price", "crew", "cloze"), 120),
        **dict.fromkeys(("sequel", "summary", "second_new", "second_turn", "second_in_place"), 25),
    }
    (cell,) = build_plan(TEXT_PRESETS["headline"], Choices(tasks=["crew", "sequel"], split="held-out"))[0][1]
    assert (cell.tasks, cell.n, cell.split) == (("crew", "sequel"), 120, "held-out")


def test_short_prompts_are_compressed_too_unless_the_variant_says_otherwise() -> None:
    assert launch_config(ServerSpec("hybridkv", 0.1), None) == {"min_prompt_tokens": 64}
    own = {"min_prompt_tokens": 600, "theta": 0.5}
    assert launch_config(ServerSpec("hybridkv", 0.1, own), None) == own
    assert launch_config(ServerSpec("sparsemm", 0.1), Path("c.json"))["calibration"] == "c.json"


def test_a_calibration_has_to_be_there_and_is_part_of_what_was_asked(tmp_path: Path) -> None:
    scores, sparsemm, hybridkv = tmp_path / "scores.json", ServerSpec("sparsemm", 0.1), ServerSpec("hybridkv", 0.1)
    with pytest.raises(ValueError, match="hybridkv calibrate"):
        with_calibration(sparsemm, scores)
    assert with_calibration(hybridkv, scores) == hybridkv
    seen = set()
    for content in ("{}", "{ }"):
        scores.write_text(content)
        spec = with_calibration(sparsemm, scores)
        assert launch_config(spec, scores)["calibration"] == str(scores)
        seen.add(spec.slug)
    assert len(seen) == 2


def test_fingerprint_follows_weights_and_config_but_not_the_calibration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    seen = [model_fingerprint(tmp_path)]
    (tmp_path / "visual_head_scores.json").write_text("{}")
    assert model_fingerprint(tmp_path) == seen[0]
    for change in (b"x" + bytes((3 << 20) - 1), bytes((3 << 20) - 1) + b"x", bytes(3 << 20) + b"\0"):
        weights.write_bytes(change)
        seen.append(model_fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    seen.append(model_fingerprint(tmp_path))
    assert len(set(seen)) == 5


def test_variants_keep_the_defaults_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "variants.json"
    path.write_text('{"low": {"theta": 0.1}}')
    assert parse_variants(f"@{path}") == parse_variants(path.read_text()) == {"": {}, "low": {"theta": 0.1}}
    assert parse_variants(None) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "huge"], ["--preset", "huge", *PRESETS]),
        (["--compressors", "zip"], ["--compressors", "zip", "stock", *compressor_names()]),
        (["--tasks", "dance"], ["dance", *TASKS]),
        (["--scenes", "opera"], ["opera", "coherent"]),
        (["--contexts", "7"], ["7", "1600"]),
        (["--budgets", "0.1,1.5"], ["--budgets", "1.5"]),
        (["--scenes", "page", "--tasks", "get"], ["--tasks"]),
        (["--n", "0"], ["--n", "0"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--concurrency", "0"], ["--concurrency", "0"]),
        (["--variants", "{"], ["--variants", "JSON"]),
        (["--variants", json.dumps({"a": 1})], ["--variants"]),
        (["--variants", "@nowhere.json"], ["--variants", "nowhere.json"]),
        (["--preset", "smoke", "--model-path", "nowhere"], ["--model-path", "nowhere", "config.json"]),
        (["--preset", "smoke", "--out", "/dev/null"], ["--out", "/dev/null"]),
        (["--base-url", "http://127.0.0.1:9"], ["127.0.0.1:9", "does not answer"]),
        (["--base-url", "nonsense"], ["nonsense", "does not answer"]),
        (["--split", "held-out"], ["--split", "texts"]),
        (["--model", "smollm2", "--preset", "ablation"], ["--preset", "ablation", "smoke"]),
        (["--model", "smollm2", "--contexts", "1600"], ["context", "1600", *LENGTHS]),
        (["report", "--out", "nowhere"], ["--out", "nowhere", "no answers"]),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, words, capsys) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert [word for word in words if str(word) not in captured.err] == []


@pytest.mark.parametrize("variants", [SWEEP, ABLATION], ids=["sweep", "ablation"])
def test_every_variant_of_the_presets_is_legal_and_another_one(variants):
    """Two names for the same settings would look like a finding."""
    configs = [parse_config({"budget": 0.1, **config}, HybridKVConfig) for config in variants.values()]
    names = {}
    for name, config in zip(variants, configs, strict=True):
        names.setdefault(config.model_dump_json(), []).append(name)
    defaults = names.pop(HybridKVConfig(budget=0.1).model_dump_json())
    assert "" in defaults
    assert all(len(same) == 1 for same in names.values()), names
