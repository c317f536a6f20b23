"""`hybridkv doctor`: a machine and a server's flags are examined, and nothing is started."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("sglang")

from sglang_hybridkv.cli.main import main
from tests.patches.test_command_line import ACTIVE, PLUGIN_SECONDS, write_model


def doctor(*flags, **env):
    command = [sys.executable, "-m", "sglang_hybridkv.cli.main", "doctor", *flags]
    env = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", **env}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PLUGIN_SECONDS, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"), "Qwen2ForCausalLM")
    return ("--model-path", folder, "--device", "cpu", *ACTIVE)


def test_a_server_that_would_start_is_described(flags):
    status, report = doctor(*flags, "--kv-compressor-budget", "0.2")
    assert status == 0, report
    assert "FAULT" not in report
    assert "Qwen2ForCausalLM, verified: 2 layers of 2 KV heads of 16, 2 queries each" in report
    assert "--device cpu, attention torch_native, kernels " in report
    assert "hybridkv, budget 0.2, pages of 8 tokens" in report


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--enable-lora"], "--enable-lora cannot be combined with --kv-compressor hybridkv; serve the merged weights"),
        (["--kv-compressor", "none"], "add --kv-compressor hybridkv"),
    ],
)
def test_what_would_be_refused_is_said(flags, more, sentence):
    status, report = doctor(*flags, *more)
    assert status == 1
    [fault] = [line for line in report.splitlines() if line.startswith("FAULT")]
    assert fault.split()[1] == "server"
    assert sentence in report


def test_a_plugin_that_sglang_may_not_load_is_at_fault():
    status, report = doctor(SGLANG_PLUGINS="other")
    assert status == 1
    assert "SGLANG_PLUGINS = 'other' leaves it out; add hybridkv" in report


def test_help_is_about_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    assert "No server is started" in capsys.readouterr().out
