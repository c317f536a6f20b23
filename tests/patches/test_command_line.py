"""SGLang's own entry points with the installed plugin: exit codes and the one sentence, before a model loads."""

import argparse
import json
import os
import subprocess
import sys
import textwrap

import pytest
from sglang.srt.server_args import ServerArgs

from benchmarks import harness
from sglang_hybridkv.srt.refusals import REFUSALS

PLUGIN_SECONDS = 240
ACTIVE = ("--kv-compressor", "hybridkv")
# Values that the launcher itself ends on, where SGLang's parser does not tell one.
VALUES = {
    "--enable-dp-attention": ("--dp-size", "2", "--tp-size", "2"),
    "--speculative-algorithm": ("NGRAM",),
    "--dllm-algorithm": ("LowConfidence",),
    "--lora-paths": ("a=b",),
    "--radix-cache-backend": ("flexkv",),
    "--model-impl": ("transformers",),
}


def refused_flags():
    """{flag: values} of every row of REFUSALS, and of what is refused beside them."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags = {f"--{phase}attention-backend": ("triton",) for phase in ("", "prefill-", "decode-")}
    flags["--page-size"] = ("1",)
    for refusal in (row for row in REFUSALS if row.is_known_to(ServerArgs)):
        flag = refusal.flag.split()[0]
        action = parser._option_string_actions[flag]
        if action.nargs == 0 or flag in VALUES:
            flags[flag] = VALUES.get(flag, ())
        else:
            flags[flag] = (str(next(filter(refusal.applies, action.choices or [2]))),)
    return flags


REFUSED = refused_flags()
# Runs each case of stdin through SGLang's parser and up to the point where a server would start its processes.
PARSE_CASES = """
    import contextlib, io, json, sys
    from sglang.srt.plugins import load_plugins
    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import prepare_server_args
    from sglang_hybridkv.srt.settings import settings_of

    def outcome(argv):
        captured = io.StringIO()
        try:
            with contextlib.redirect_stderr(captured):
                args = prepare_server_args(argv)
                runtime_context.publish(args, role="tokenizer")
        except SystemExit as ended:
            return {"code": ended.code, "error": captured.getvalue()}
        settings, view = settings_of(args), resolving_view(args)
        return {
            "budget": settings and settings.config.budget,
            "page_size": view.page_size,
            "attention_backend": view.attention_backend,
            "has_server_hooks": "hybridkv_patches.scheduler" in sys.modules,
        }

    print(json.dumps({name: outcome(argv) for name, argv in json.load(sys.stdin).items()}))
"""
RUN_CLI = "from sglang.cli.main import main; main()"
RUN_LAUNCHER = "import runpy; runpy.run_module('sglang.launch_server', run_name='__main__', alter_sys=True)"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A model without weights: a config is all that SGLang reads before it starts processes."""
    return write_model(tmp_path_factory.mktemp("model"), "Qwen2ForCausalLM")


def write_model(folder, architecture):
    config = {"architectures": [architecture], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    config |= {"max_position_embeddings": 2048, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def python(code, *argv, stdin=None, **env):
    """Run `code` in a fresh process of the CPU engine."""
    env = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", **env}
    env.pop("SGLANG_PLUGINS", None)
    command = [sys.executable, "-c", textwrap.dedent(code), *argv]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=env, timeout=PLUGIN_SECONDS, check=False
    )


def launch(model_path, *argv, code=RUN_LAUNCHER, **env):
    """The one sentence with which a launcher ends."""
    done = python(code, *argv, "--model-path", model_path, "--device", "cpu", *ACTIVE, **env)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("sglang: error: ")]
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode, len(sentences)) == (2, 1), done.stderr
    return sentences[0].removeprefix("sglang: error: ")


@pytest.fixture(scope="module")
def outcomes(model_path, tmp_path_factory):
    """What becomes of many command lines, all in one process."""
    folder = tmp_path_factory.mktemp("config")
    yaml_path, bad_yaml_path = folder / "server.yaml", folder / "bad.yaml"
    yaml_path.write_text("kv-compressor: hybridkv\nkv-compressor-budget: 0.25\nkv-compressor-config: {page_size: 32}\n")
    bad_yaml_path.write_text("kv-compressor: hybridkv\nkv-compressor-budget: 2\n")
    other_model = write_model(tmp_path_factory.mktemp("other"), "StableLmForCausalLM")
    base = ["--model-path", model_path, "--device", "cpu"]
    # The first two come first: they show what a process without compression has imported.
    cases = {
        "absent": base,
        "none": [*base, "--kv-compressor", "none"],
        "defaults": [*base, *ACTIVE],
        "budget": [*base, *ACTIVE, "--kv-compressor-budget=0.5"],
        "yaml": [*base, "--config", str(yaml_path)],
        "bad yaml": [*base, "--config", str(bad_yaml_path)],
        "unknown compressor": [*base, "--kv-compressor", "gzip"],
        "other model": ["--model-path", other_model, "--device", "cpu", *ACTIVE],
    }
    cases |= {flag: [*base, *ACTIVE, flag, *values] for flag, values in REFUSED.items()}
    done = python(PARSE_CASES, stdin=json.dumps(cases))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["absent", "none"])
def test_without_a_compressor_sglang_decides(outcomes, case):
    assert outcomes[case]["budget"] is None
    assert outcomes[case]["page_size"] == 1
    assert not outcomes[case]["has_server_hooks"]


@pytest.mark.parametrize("case, budget, page_size", [("defaults", 0.1, 8), ("budget", 0.5, 8), ("yaml", 0.25, 32)])
def test_a_compressing_server_gets_its_page_size_and_backend(outcomes, case, budget, page_size):
    outcome = outcomes[case]
    assert (outcome["budget"], outcome["page_size"], outcome["attention_backend"]) == (
        budget,
        page_size,
        "torch_native",
    )


@pytest.mark.parametrize(
    "case, part",
    [
        ("bad yaml", "--kv-compressor-budget = 2.0 is not allowed; legal: a number above 0 and at most 1"),
        ("unknown compressor", "--kv-compressor = 'gzip' is unknown; legal values: none, hybridkv"),
        (
            "other model",
            "StableLmForCausalLM cannot be combined with --kv-compressor hybridkv; it is not among the verified ones",
        ),
        *((flag, flag) for flag in REFUSED),
    ],
)
def test_what_cannot_work_ends_with_one_sentence(outcomes, case, part):
    assert outcomes[case]["code"] == 2
    error = [line for line in outcomes[case]["error"].splitlines() if line.startswith("sglang: error: ")]
    assert len(error) == 1
    assert part in error[0]


@pytest.mark.slow
@pytest.mark.parametrize("code, command", [(RUN_LAUNCHER, ()), (RUN_CLI, ("serve",))])
def test_both_launchers_exit(model_path, code, command):
    sentence = launch(model_path, *command, "--pp-size", "2", code=code)
    assert sentence.startswith("--pp-size above 1 cannot be combined with --kv-compressor hybridkv")


@pytest.mark.slow
def test_kernels_that_cannot_be_end_a_server_before_it_loads_a_model(model_path):
    sentence = launch(model_path, HYBRIDKV_KERNELS="foo")
    assert sentence == "HYBRIDKV_KERNELS = 'foo' is not allowed; legal: one of naive, cpu, triton"


@pytest.mark.slow
def test_help_has_our_flags():
    """Of this launcher; `sglang serve --help` ends before SGLang loads plugins."""
    done = python(RUN_LAUNCHER, "--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert all(part in words for part in ("--kv-compressor-budget FRACTION", "'hybridkv config explain NAME' lists"))


@pytest.mark.slow
def test_another_sglang_version_is_refused_only_for_compression(model_path):
    before = "import sglang.version; sglang.version.__version__ = '0.5.24'\n"
    sentence = launch(model_path, code=before + RUN_LAUNCHER)
    assert sentence == "--kv-compressor does not support SGLang 0.5.24; install a version >=0.5.21,<0.5.24"
    stock = json.dumps({"absent": ["--model-path", model_path, "--device", "cpu"]})
    done = python(before + textwrap.dedent(PARSE_CASES), stdin=stock)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_hook_target_that_does_not_exist_ends_the_server(model_path):
    before = """
from hybridkv_patches import scheduler
from hybridkv_patches.hook import Hook
target = "sglang.srt.managers.scheduler.Scheduler.gone"
scheduler.ENTRIES += (Hook(target=target, kind="after", function=print, why="", until=""),)
"""
    done = python(before + RUN_LAUNCHER, "--model-path", model_path, "--device", "cpu", *ACTIVE)
    assert done.returncode == 2
    sentence = done.stderr.splitlines()[-2]
    assert "SGLang did not take the hook on sglang.srt.managers.scheduler.Scheduler.gone" in sentence
    assert "SGLANG_PLUGINS=hybridkv" in sentence


@pytest.mark.slow
def test_engine_raises_the_same_sentences(model_path):
    code = """
        import json, sys, sglang
        base = {"model_path": sys.argv[1], "device": "cpu"}
        cases = [{"kv_compressor_budget": 0.5}, {"kv_compressor": "hybridkv", "kv_compressor_budget": 1.5},
                 {"kv_compressor": "hybridkv", "pp_size": 2}, {"kv_compressor": "hybridkv", "page_size": 1},
                 {"kv_compressor": "hybridkv", "server_args": sglang.ServerArgs(**base)}]
        for case in cases:
            try:
                sglang.Engine(**base, **case)
            except ValueError as error:
                print("refused:", error)
    """
    done = python(code, model_path)
    assert done.returncode == 0, done.stderr
    sentences = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    parts = ["would change nothing", "= 1.5 is not allowed", "--pp-size above 1", "--page-size 1 differs"]
    parts.append("reads no kv_compressor beside server_args")
    assert all(part in sentence for part, sentence in zip(parts, sentences, strict=True))


@pytest.mark.server
def test_a_scheduler_without_the_plugin_ends_the_server(model_path, tmp_path):
    """The launcher has the plugin, its scheduler process has not: the server must not serve uncompressed."""
    script = tmp_path / "launch.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            if __name__ == "__main__":
                from sglang.srt.plugins import load_plugins
                load_plugins()
                os.environ["SGLANG_PLUGINS"] = "another_plugin"  # what the scheduler process will load
                from sglang.launch_server import run_server
                from sglang.srt.server_args import prepare_server_args
                from sglang.srt.utils import kill_process_tree
                try:
                    run_server(prepare_server_args(sys.argv[1:]))
                finally:
                    kill_process_tree(os.getpid(), include_parent=False)
            """
        )
    )
    done = start_server([str(script)], model_path)
    assert done.returncode == 2, done.stderr
    assert "sglang: error: --kv-compressor is set but the scheduler process did not report compression" in done.stderr


@pytest.mark.server
def test_a_foreign_radix_cache_ends_the_server(model_path, tmp_path):
    """Every process takes our hooks, but SGLang's own tree is built."""
    script = """
        import dataclasses
        from hybridkv_patches import registry

        def build_stock(original, ctx, **kwargs):
            return original(ctx, **kwargs)

        registry.ENTRIES = tuple(dataclasses.replace(hook, function=build_stock) for hook in registry.ENTRIES)
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(script))
    search_path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = start_server(["-m", "sglang.launch_server"], model_path, PYTHONPATH=search_path)
    # Not our exit code: SGLang ends its launcher by a signal when a scheduler raises.
    assert done.returncode != 0
    assert "--kv-compressor is set but SGLang kept its own radix cache (UnifiedRadixCache)" in done.stderr


def start_server(launcher, model_path, **changes):
    """Start a server that should end by itself."""
    flags = ["--device", "cpu", "--load-format", "dummy", "--skip-tokenizer-init", "--max-total-tokens", "2048"]
    port = str(harness.free_port())
    command = [sys.executable, *launcher, "--model-path", model_path, "--port", port, *flags, *ACTIVE]
    env = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", **changes}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=PLUGIN_SECONDS, check=False)
