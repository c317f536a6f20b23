"""Names of compressors, and those that other distributions bring."""

import re
import sys
from pathlib import Path

import pytest
import torch

from sglang_hybridkv.compressors import (
    BUILT_IN,
    ENTRY_POINT_GROUP,
    PromptLayer,
    PromptObservation,
    compressor_names,
    get_compressor,
)
from sglang_hybridkv.compressors.hybridkv import HybridKV
from sglang_hybridkv.config import parse_config
from tests.builders import ALL_HEADS, TinyPool, fresh_generator

DOCS = (Path(__file__).parents[3] / "docs" / "compressors.md").read_text(encoding="utf-8")
NAMES = ["hybridkv", "snapkv", "look-m", "madakv", "sparsemm", "quest", "tgv-kv", "adakv", "pyramidkv"]
NAMES += ["expected-attention", "random", "full"]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution with one module and one compressor where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(distribution, source, *, name="key-norm", value="key_norm:KeyNorm"):
        folder = tmp_path / f"{distribution}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{name} = {value}\n")
        (tmp_path / f"{value.split(':')[0]}.py").write_text(source)

    yield put
    sys.modules.pop("key_norm", None)


def example():
    (source,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    return source


def test_built_in_names():
    assert list(BUILT_IN) == NAMES
    assert compressor_names() == NAMES
    assert get_compressor("hybridkv") is HybridKV


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'h2o' is unknown; legal values: none, hybridkv, snapkv, ") as caught:
        get_compressor("h2o")
    assert "\n" not in str(caught.value)


def test_the_documentation_lists_every_compressor():
    rows = re.findall(r"^\| `([\w-]+)` \|(?:[^|\n]*\|){3}$", DOCS, flags=re.MULTILINE)
    assert rows == NAMES


def test_the_documented_example_registers_and_obeys_the_laws(install):
    install("acme-kv", example())
    assert compressor_names() == [*NAMES, "key-norm"]
    assert "key_norm" not in sys.modules, "a name is listed without an import"
    compressor_class = get_compressor("key-norm")
    config = parse_config({"late_layers": 2, "page_size": 8, "min_prompt_tokens": 1}, compressor_class.config_class)
    compressor = compressor_class(config)
    assert not compressor.may_retrieve

    generator = fresh_generator()
    keys, slots = torch.randn(50, 2, 32, generator=generator), torch.randperm(50, generator=generator)[:40]
    is_text = torch.arange(40) % 4 == 0
    layer = PromptLayer(keys[:8], keys, keys, slots, 0.2, is_text, layer_idx=0)
    layers = [compressor.score_layer(layer) for _ in range(4)]
    statistic, salience = (torch.stack(parts) for parts in zip(*layers, strict=True))
    observation = PromptObservation(statistic, salience, is_text, 5)
    plan = compressor.plan(observation, 24, most_dynamic=ALL_HEADS)
    assert int(plan.num_head_pages.sum()) == 24
    assert int(plan.num_head_pages.min()) >= config.min_head_pages
    assert (plan.num_head_pages.diff(dim=0) >= 0).all(), "later layers keep more"
    order = compressor.rank_tokens(observation, plan).sorted()
    assert torch.equal(order.sort(dim=-1).values, torch.arange(40).expand_as(order))

    pool = TinyPool(generator, compressor=compressor_class(config.model_copy(update={"budget": 0.5})))
    prompt = pool.add_prompt(100)
    pool.compress(prompt)
    for layer in range(2):
        for head in range(2):
            pool.held_tokens(prompt, layer, head)
        assert pool.decode([prompt], layer, pool.queries(1)).isfinite().all()


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("", "cannot be imported: AttributeError"),
        ("KeyNorm = 7", "is no subclass of sglang_hybridkv.compressors.Compressor: key_norm:KeyNorm"),
        (
            "from sglang_hybridkv.compressors import Compressor\nclass KeyNorm(Compressor):\n    name = 'other'",
            "must have that name",
        ),
    ],
)
def test_a_broken_distribution_is_named_when_it_is_asked_for(install, source, complaint):
    install("acme-kv", source)
    assert get_compressor("snapkv").name == "snapkv", "others do not suffer"
    with pytest.raises(ValueError) as caught:
        get_compressor("key-norm")
    assert "--kv-compressor = 'key-norm' of the installed distribution acme-kv" in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_takes_the_name_of_another(install):
    install("acme-kv", example(), name="snapkv")
    with pytest.raises(ValueError, match="'snapkv' is ambiguous: sglang-hybridkv and acme-kv bring one"):
        get_compressor("snapkv")
    assert compressor_names() == NAMES
