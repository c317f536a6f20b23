"""The README tells the truth about what can be set and what can be answered."""

import json
import re
from pathlib import Path

from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.requests.admission import DenseReason

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_setting_is_listed_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", README, flags=re.MULTILINE))
    assert {name: json.loads(text) for name, text in rows.items()} == HybridKVConfig().model_dump()


def test_every_dense_reason_is_explained():
    assert set(re.findall(r"^\| `(\w+)` \| [^`|]", README, flags=re.MULTILINE)) >= {str(r) for r in DenseReason}
