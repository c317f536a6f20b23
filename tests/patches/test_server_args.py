import argparse

import pytest
from sglang.srt.server_args import ServerArgs

from hybridkv_patches import activation, server_args
from hybridkv_patches.server_args import BUDGET_FLAG, CONFIG_FLAG, EVENTS_FLAG, FLAG
from sglang_hybridkv.srt.settings import settings_of


def parse(*argv, page_size=None):
    """What stands in for ServerArgs after the flags went through both hooks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--page-size", type=int, default=page_size)
    server_args.add_flags(None, parser)
    return server_args.take_flags(make_stock, None, parser.parse_args(argv))


def make_stock(cls, namespace):
    return ServerArgs(model_path="m", page_size=namespace.page_size)


def is_stock(args):
    return settings_of(args) is None and args.page_size is None and not vars(args)


def refusal(capsys, *argv, **kwargs):
    with pytest.raises(SystemExit) as caught:
        parse(*argv, **kwargs)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("sglang: error: ")
    return lines[0].removeprefix("sglang: error: ")


@pytest.mark.parametrize("argv", [(), (FLAG, "none")])
def test_without_a_compressor_nothing_changes(argv):
    assert is_stock(parse(*argv))


def test_flags_become_settings_and_claim_the_page_size():
    args = parse(FLAG, "hybridkv", BUDGET_FLAG, "0.25", CONFIG_FLAG, '{"page_size": 32}')
    settings = settings_of(args)
    assert (settings.name, settings.config.budget, settings.config.page_size, args.page_size) == (
        "hybridkv",
        0.25,
        32,
        32,
    )


def test_settings_survive_the_trip_to_the_scheduler():
    settings = settings_of(parse(FLAG, "quest", CONFIG_FLAG, '{"host_store_bytes": 5}'))
    assert (settings.config.chunk_score, settings.config.host_store_bytes) == ("quest", 5)
    settings = settings_of(parse(FLAG, "hybridkv", CONFIG_FLAG, '{"preset": "paper", "theta": 0.5}'))
    assert (settings.config.preset, settings.config.theta) == ("paper", 0.5)
    assert settings_of(parse(FLAG, "full")).config.budget == 1.0
    for given in ((), (CONFIG_FLAG, '{"events": "ipc:///tmp/a"}')):
        assert settings_of(parse(FLAG, "full", EVENTS_FLAG, "ipc:///tmp/a", *given)).config.events == "ipc:///tmp/a"


def test_a_page_size_that_agrees_is_fine():
    assert parse(FLAG, "hybridkv", "--page-size", "8").page_size == 8


@pytest.mark.parametrize(
    "argv, parts",
    [
        ((FLAG, "gzip"), (FLAG, "'gzip'", "none, hybridkv")),
        ((BUDGET_FLAG, "0.1"), (BUDGET_FLAG, "would change nothing without --kv-compressor hybridkv")),
        ((FLAG, "none", CONFIG_FLAG, "{}"), (CONFIG_FLAG, "would change nothing")),
        ((BUDGET_FLAG, "1", CONFIG_FLAG, "{}"), (f"{BUDGET_FLAG} and {CONFIG_FLAG}", "would change nothing")),
        ((FLAG, "hybridkv", BUDGET_FLAG, ""), (f"{BUDGET_FLAG} = ''", "legal: a number above 0 and at most 1")),
        ((FLAG, "hybridkv", BUDGET_FLAG, "nan"), (f"{BUDGET_FLAG} = nan", "legal: a number above 0 and at most 1")),
        ((FLAG, "hybridkv", CONFIG_FLAG, "{"), (CONFIG_FLAG, "is not valid JSON")),
        ((FLAG, "hybridkv", CONFIG_FLAG, '{"budget": 0.2}', BUDGET_FLAG, "0.1"), ("0.2", "0.1", "differ")),
        ((EVENTS_FLAG, "tcp://127.0.0.1:5559"), (EVENTS_FLAG, "would change nothing without")),
        ((FLAG, "hybridkv", EVENTS_FLAG, "5559"), (f"{EVENTS_FLAG} = '5559' is not allowed", "tcp://127.0.0.1:5559")),
        (
            (FLAG, "hybridkv", CONFIG_FLAG, '{"events": "ipc:///tmp/a"}', EVENTS_FLAG, "ipc:///tmp/b"),
            (f"{EVENTS_FLAG} 'ipc:///tmp/b' and events 'ipc:///tmp/a'", "differ"),
        ),
        ((FLAG, "snapkv", CONFIG_FLAG, '{"theta": 0.5}'), ("no field 'theta'", "known fields: budget")),
        ((FLAG, "full", BUDGET_FLAG, "0.1"), (f"{BUDGET_FLAG} = 0.1", "legal: a number equal to 1")),
        ((FLAG, "hybridkv", "--page-size", "1"), ("--page-size 1", "differs from 8, the page_size", "leave it out")),
    ],
)
def test_bad_flags_end_with_one_sentence(capsys, argv, parts):
    sentence = refusal(capsys, *argv)
    assert all(part in sentence for part in parts), sentence


def test_compression_is_refused_while_hooks_are_missing(capsys, monkeypatch):
    monkeypatch.setattr(activation, "startup_fault", lambda: "SGLang did not take the hook on x")
    assert refusal(capsys, FLAG, "hybridkv") == "SGLang did not take the hook on x"
    assert is_stock(parse())
    with pytest.raises(ValueError, match="did not take the hook on x"):
        server_args.make_settings("hybridkv", None, None)


def test_help_is_short_and_says_where_the_fields_are_explained():
    parser = argparse.ArgumentParser()
    server_args.add_flags(None, parser)
    text = parser.format_help()
    assert all(
        flag in text
        for flag in (FLAG, BUDGET_FLAG, CONFIG_FLAG, "{none,hybridkv,snapkv,look-m,", "Default: none", "Default: 0.1")
    )
    assert "hybridkv config explain NAME" in " ".join(text.split())
    assert len(text.splitlines()) < 40
