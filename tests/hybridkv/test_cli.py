"""The command line of ``hybridkv``: what it writes, and one sentence with exit status 2 for bad input."""

import json
import subprocess
import sys

import pytest

from benchmarks.models.make_models import make_model
from sglang_hybridkv.cli.main import main


def run(*args):
    return main(["calibrate", *map(str, args)])


def test_calibrate_writes_scores(tmp_path, vl_model, capsys):
    out = tmp_path / "scores.json"
    assert run("--model-path", vl_model, "--out", out, "--samples", 1, "--device", "cpu") == 0
    written = json.loads(out.read_text())
    assert (written["kind"], written["num_samples"]) == ("visual_head_scores", 1)
    assert [len(layer) for layer in written["scores"]] == [4, 4, 4, 4]
    assert "KV heads looked at a word" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--samples": 0}, "--samples = 0: expected at least 1"),
        ({"--model-path": "nowhere"}, "--model-path = nowhere: expected a local checkpoint folder"),
        (
            {"--out": "missing/scores.json"},
            "--out = missing/scores.json: cannot be written (No such",
        ),
        ({"--samples-from": "nowhere"}, "--samples-from = nowhere: nowhere/samples.jsonl cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(tmp_path, vl_model, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"--model-path": vl_model, "--out": "scores.json"} | options
    assert run(*(part for pair in arguments.items() for part in pair)) == 2
    sentence = capsys.readouterr().err  # and no bar
    assert sentence.startswith("hybridkv calibrate: ")
    assert sentence.count("\n") == 1
    assert message in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_vision_is_refused(tmp_path, capsys):
    folder = make_model("tiny-qwen2")
    assert run("--model-path", folder, "--out", tmp_path / "scores.json") == 2
    assert "model_type = 'qwen2' in config.json; expected qwen2_vl or qwen2_5_vl" in capsys.readouterr().err


def test_a_checkpoint_without_weights_is_refused(tmp_path, vl_model, capsys):
    (tmp_path / "config.json").write_text((vl_model / "config.json").read_text())
    assert run("--model-path", tmp_path, "--out", tmp_path / "scores.json") == 2
    assert "the checkpoint cannot be loaded" in capsys.readouterr().err


def test_an_interruption_keeps_the_work_and_says_how_to_go_on(tmp_path, vl_model, capsys, monkeypatch):
    from sglang_hybridkv.cli import vision_model

    def interrupt(self, sample):
        raise KeyboardInterrupt

    out = tmp_path / "scores.json"
    with monkeypatch.context() as patch:
        patch.setattr(vision_model.VisionModel, "observe", interrupt)
        assert run("--model-path", vl_model, "--out", out, "--samples", 1) == 130
    assert "go on with the same command and --resume" in capsys.readouterr().err
    assert (tmp_path / "scores.json.partial").exists()
    assert run("--model-path", vl_model, "--out", out, "--samples", 1, "--resume") == 0
    assert out.exists()


def test_the_command_line_imports_neither_sglang_nor_transformers():
    code = "import sys, sglang_hybridkv.cli.main as m; print({'sglang', 'transformers', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
