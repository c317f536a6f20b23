"""Compress inside sglang.Engine, without a server.

    python examples/offline_engine.py --model-path .models/smollm2 LICENSE
    python examples/offline_engine.py --model-path Qwen/Qwen2.5-VL-7B-Instruct --budget 0.05 LICENSE

The engine starts processes of its own, which import this file: keep the guard at its end.
"""

import argparse
import os
from pathlib import Path

import torch


def engine_options() -> dict:
    """What the engine needs besides the model, by what this machine has."""
    if torch.cuda.is_available():
        return {}
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    # Left open, a CPU engine takes about 11 GB for its KV pool.
    return {"device": "cpu", "max_total_tokens": 20000, "sleep_on_idle": True}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress inside sglang.Engine.")
    parser.add_argument("document", type=Path)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--compressor", default="hybridkv")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--characters", type=int, default=6000, help="how much of the document is read")
    args = parser.parse_args()

    options = engine_options()
    import sglang

    engine = sglang.Engine(
        model_path=args.model_path, kv_compressor=args.compressor, kv_compressor_budget=args.budget, **options
    )
    try:
        text = args.document.read_text(encoding="utf-8")[: args.characters]
        prompt = f"{text}\n\nIn one sentence, this text says that"
        answer = engine.generate(prompt, sampling_params={"temperature": 0, "max_new_tokens": 32})
        print(answer["text"].strip())
        print(answer["meta_info"]["kv_compressor"])
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
