import json
from importlib import metadata

import pytest

from sglang_hybridkv.cli.main import main
from sglang_hybridkv.compressors import BUILT_IN, get_compressor


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_field_is_explained(capsys, name):
    assert main(["config", "explain", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(get_compressor(name).config_class.model_fields)


def test_one_field(capsys):
    assert main(["config", "explain", "hybridkv", "theta"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith("theta a number at least 0 and at most 1.01; default 1.01; a request may set it. threshold")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["gzip"], "--kv-compressor = 'gzip' is unknown; legal values: none, hybridkv"),
        (["hybridkv", "thta"], "hybridkv has no field 'thta' (did you mean 'theta'?); its fields: budget, "),
    ],
)
def test_what_is_not_there_is_one_sentence(capsys, argv, complaint):
    assert main(["config", "explain", *argv]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_what_is_printed_is_valid_and_the_same_again(capsys, tmp_path):
    assert main(["config", "print", "hybridkv", '{"page_size": 16}', "--budget", "0.2"]) == 0
    printed = capsys.readouterr().out
    values = json.loads(printed)
    assert (values["page_size"], values["budget"]) == (16, 0.2)
    assert set(values) == set(get_compressor("hybridkv").config_class.model_fields)
    file = tmp_path / "settings.json"
    file.write_text(printed)
    for command, expected in (("print", printed), ("validate", "hybridkv with budget 0.2: the settings are valid\n")):
        assert main(["config", command, "hybridkv", f"@{file}"]) == 0
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("command", ["print", "validate"])
def test_what_a_server_would_refuse_is_refused(capsys, command):
    assert main(["config", command, "hybridkv", '{"bugdet": 0.2}']) == 2
    error = capsys.readouterr().err
    assert "'bugdet' (did you mean 'budget'?)" in error
    assert error.count("\n") == 1


def test_versions(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert f"sglang {metadata.version('sglang')}, torch {metadata.version('torch')}\n" in capsys.readouterr().out
