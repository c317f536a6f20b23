"""The plugin under sglang.Engine, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import engine_flags
from tests.e2e.conftest import CONFIG, STRICT_ENV

pytestmark = pytest.mark.server

ENGINE_SCRIPT = """
import json
from pathlib import Path

import psutil
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path={model!r}, device="cpu", attention_backend="torch_native", dtype="float32", max_total_tokens=4000,
        max_running_requests=4, chunked_prefill_size=512, sleep_on_idle=True,
        kv_compressor="hybridkv", kv_compressor_budget=0.2, kv_compressor_config={config!r},
    )
    answers = engine.generate(
        input_ids=[list(range(200)) * 2, list(range(20))],
        sampling_params={{"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}},
    )
    info = engine.get_server_info()
    children = psutil.Process().children(recursive=True)
    engine.shutdown()
    _, alive = psutil.wait_procs(children, timeout=20)
    result = {{"answers": answers, "state": info["internal_states"][0]["kv_compressor"], "alive": len(alive)}}
    Path({out!r}).write_text(json.dumps(result))
"""


def test_engine(tmp_path: Path, vl_model: Path) -> None:
    script, out = tmp_path / "engine.py", tmp_path / "result.json"
    script.write_text(ENGINE_SCRIPT.format(model=str(vl_model), config=CONFIG, out=str(out)))
    env = {**os.environ, **engine_flags("cpu").env, **STRICT_ENV}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    result = json.loads(out.read_text())
    long, short = (answer["meta_info"]["kv_compressor"] for answer in result["answers"])
    assert long["compressed"]
    assert long["static_heads"] > 0
    assert long["dynamic_heads"] > 0
    assert short["reason"] == "prompt_too_short"
    assert all(len(answer["output_ids"]) == 8 for answer in result["answers"])
    assert (result["state"]["budget"], result["state"]["compressed_requests"]) == (0.2, 1)
    assert result["state"]["device_kv_bytes"] == 0
    assert result["alive"] == 0, "processes outlive the engine"
