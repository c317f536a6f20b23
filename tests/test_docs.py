"""The documentation is current: generated pages, links, figures, and every command that it tells a reader to run."""

import argparse
import importlib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import docs
from benchmarks.models.make_models import SPECS
from benchmarks.quality import front_picture
from sglang_hybridkv.cli import main as cli
from sglang_hybridkv.compressors import BUILT_IN, get_compressor
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.config import BUDGET_FLAG, CONFIG_FLAG, parse_config
from sglang_hybridkv.requests.admission import DenseReason
from sglang_hybridkv.srt import refusals

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), ROOT / "benchmarks/README.md"]
)
EXAMPLES = sorted(ROOT.glob("examples/**/*.py"))
# Pages whose commands are checked one by one.
TOLD = [*PAGES, *EXAMPLES]
EXAMPLE_TESTS = (ROOT / "tests/e2e/test_examples.py").read_text(encoding="utf-8")
# Commands that no test runs or parses, as patterns, and why.
NOT_RUN = {
    r"pip install sglang==[\d.]+": "needs a GPU: it installs SGLang for CUDA; on a CPU make setup does the same",
    r"pip install \.": "make setup, which continuous integration runs, installs the project",
    r"pip install \./examples/own_compressor": "tests/e2e/test_examples.py puts it on the path instead",
    r'pip install "\.\[quality\]"': "the libraries of the metrics are in the set-up's lock files",
    r"pip (download|install --no-index) .*": "needs a GPU host",
}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


README = read(ROOT / "README.md")


@pytest.mark.parametrize(("path", "text"), docs.pages().items(), ids=lambda value: getattr(value, "name", ""))
def test_generated_pages_are_current(path, text):
    assert read(path) == text, f"{path.name} is not what the code says; run python -m benchmarks.docs"


def test_every_architecture_is_in_the_table_of_models_and_every_checkpoint_stands_once():
    assert set(docs.SERVED_MODELS) == set(refusals.ARCHITECTURES)
    checkpoints = [name for model in docs.SERVED_MODELS.values() for name in model.checkpoints]
    assert sorted(checkpoints) == sorted(SPECS)


def test_settings_have_every_field_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^`]+)` \| `[^`]+` \|", docs.settings_page(), flags=re.MULTILINE)
    assert {name: json.loads(text) for name, text in rows} == HybridKVConfig().model_dump()
    named = set(re.findall(r"^\| `(\w+)` \|", docs.settings_page(), flags=re.MULTILINE))
    assert named == {name for compressor in BUILT_IN.values() for name in compressor.config_class.model_fields}


def test_every_dense_reason_has_an_explanation_and_advice():
    for page in (docs.refusals_page(), read(ROOT / "docs/troubleshooting.md")):
        assert set(re.findall(r"^\| `(\w+)` \| [^`|]", page, flags=re.MULTILINE)) >= {str(r) for r in DenseReason}


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(read(target)), f"{page.name} links to {link}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    """Paths in backticks, from the root, from sglang_hybridkv or from the page; NAME in capitals is the reader's."""
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_.]+\.(?:py|jsonl|md))`", read(page)):
        assert any((base / name).exists() for base in (ROOT, ROOT / "sglang_hybridkv", page.parent)), (
            f"{page.name} names {name}"
        )


def test_the_index_has_every_page():
    index = read(ROOT / "docs/README.md")
    missing = [
        page.name for page in ROOT.glob("docs/*.md") if f"({page.name})" not in index and page.name != "README.md"
    ]
    assert not missing


def test_the_readme_is_short_and_names_what_ci_runs():
    assert README.count("\n") <= 140
    ci = read(ROOT / ".ci/run").splitlines()
    assert "make test" in ci
    assert "make test " in README
    assert "make demo " in README


def test_figures_of_the_readme_are_those_of_the_rows():
    rows = [row for row in front_picture.read_newest(front_picture.RESULTS) if not row["variant"]]
    for model in ("smollm2", "reader"):
        for budget in front_picture.BUDGETS:
            group = [
                row
                for row in front_picture.common_tasks([row for row in rows if row["model"] == model])
                if (row["compressor"], row["budget"]) == ("hybridkv", budget)
            ]
            kept, right = front_picture.count_kept(group)
            assert re.search(rf"{kept} of (these )?{right} kept", README), (model, budget, kept, right)
            assert f"{100 * front_picture.resident(group):.1f} %" in README


def test_the_documented_compressor_is_the_example():
    (source,) = re.findall(r"```python\n(.*?)```", read(ROOT / "docs/compressors.md"), flags=re.DOTALL)
    assert source == read(ROOT / "examples/own_compressor/key_norm.py")
    (tables,) = re.findall(r"```toml\n(.*?)```", read(ROOT / "docs/compressors.md"), flags=re.DOTALL)
    assert tables in read(ROOT / "examples/own_compressor/pyproject.toml")


def commands() -> list[str]:
    """Command lines of code blocks, and of the indented lines in the docstrings of examples."""
    found = []
    for path in TOLD:
        if path.suffix == ".md":
            fences = re.findall(r"^```(\w*)\n(.*?)^```", read(path), flags=re.MULTILINE | re.DOTALL)
            blocks = [block for language, block in fences if not language]
            lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
            found += re.findall(r"`(curl [^`]*)`", read(path))
        else:
            lines = [line.strip() for line in read(path).split('"""')[1].splitlines() if line.startswith("    ")]
        found += [line for line in lines if re.match(r"(\S*python3?|make|pip|curl|hybridkv) ", line)]
    return sorted({line.split("  #")[0].strip() for line in found})


@pytest.fixture(scope="module")
def server_flags() -> set[str]:
    """Flags that SGLang's parser knows, with ours."""
    from sglang.srt.server_args import ServerArgs

    from hybridkv_patches import server_args

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if server_args.FLAG not in parser._option_string_actions:
        server_args.add_flags(None, parser)
    return set(parser._option_string_actions)


def check_server(arguments: list[str], known: set[str]) -> None:
    """SGLang knows the flags, and we their values."""
    given = {flag: value for flag, value in itertools.pairwise([*arguments, ""]) if flag.startswith("--")}
    assert given.keys() <= known
    if "--kv-compressor" not in given:
        return
    config = given.get(CONFIG_FLAG)
    budget = float(given[BUDGET_FLAG]) if BUDGET_FLAG in given else None
    config_class = get_compressor(given["--kv-compressor"]).config_class
    parse_config(None if config is None or config.startswith("@") else config, config_class, budget=budget)


def check_module(name: str, arguments: list[str]) -> None:
    """The module is there, and its sources know the flags."""
    path = ROOT / name.replace(".", "/")
    files = [path.with_suffix(".py"), *path.glob("*.py"), *ROOT.glob("benchmarks/quality/*.py")]
    sources = "".join(read(file) for file in files if file.exists())
    assert path.is_dir() or path.with_suffix(".py").exists(), name
    for flag in arguments:
        assert not flag.startswith("--") or f'"{flag}"' in sources, f"{name} does not know {flag}"


@pytest.mark.parametrize("command", commands())
def test_every_command_is_run_or_parsed_or_excused(command, server_flags):
    if any(re.fullmatch(pattern, command) for pattern in NOT_RUN):
        return
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", read(ROOT / "Makefile"), flags=re.MULTILINE)
    elif program == "curl":
        paths = ("/server_info", "/kv_compressor/settings")
        assert any(path in command for path in paths), "only what benchmarks/harness.py and test_operation.py ask, too"
    elif [program, *arguments[:1]] == ["hybridkv", "doctor"]:
        check_server(arguments[1:], server_flags)
    elif program == "hybridkv":
        cli._parser().parse_args(arguments)
    elif arguments[0] == "-c":
        compile(arguments[1], command, "exec")
    elif arguments[:2] in (["-m", "sglang.launch_server"], ["-m", "benchmarks.serve"]):
        check_server(arguments[2:], server_flags)
    elif arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in arguments[2:])
    elif arguments[:2] == ["-m", "sglang_router.launch_router"]:
        known = importlib.import_module("sglang_router.launch_router").parse_router_args
        assert known(arguments[2:]).worker_urls
    elif arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    else:
        script = ROOT / arguments[0]
        assert script in EXAMPLES
        assert script.name in EXAMPLE_TESTS, f"no test runs {script.name}"
        for flag in arguments[1:]:
            assert not flag.startswith("--") or f'"{flag}"' in read(script), f"{script.name} does not know {flag}"
