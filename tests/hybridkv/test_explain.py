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
