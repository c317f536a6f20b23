import pytest

from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.compressors.calibration import load_calibration
from sglang_hybridkv.config import parse_config
from tests.builders import make_calibration


def refusal(path, num_layers=2, num_kv_heads=3):
    with pytest.raises(ValueError) as caught:
        load_calibration(path, num_layers, num_kv_heads)
    sentence = str(caught.value)
    assert sentence.startswith(f"calibration file {str(path)!r} ")
    assert "`hybridkv calibrate`" in sentence
    assert "\n" not in sentence
    return sentence


def test_what_was_written_is_read(tmp_path):
    scores = [[0.0, 1.5, 2.0], [3.0, 0.25, 0.0]]
    path = make_calibration(tmp_path / "c.json", 2, 3, scores)
    assert load_calibration(path, 2, 3).scores == scores
    assert load_calibration(str(path), 2, 3).model.name == "m"


def test_another_model_is_named_with_its_shape(tmp_path):
    path = make_calibration(tmp_path / "c.json", 2, 3)
    sentence = refusal(path, 28, 4)
    assert "belongs to 'm' with 2 layers of 3 KV heads, the model to serve has 28 of 4" in sentence


def test_missing_file(tmp_path):
    assert "cannot be read: No such file" in refusal(tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    assert refusal(path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 2}, "is damaged: format: "),
        ({"kind": "text"}, "is damaged: kind: "),
        ({"num_samples": 0}, "is damaged: num_samples: "),
        ({"extra": 1}, "is damaged: extra: "),
        ({"scores": [[1.0, 1.0, 1.0]]}, "scores must be 2 lists of 3, as its model says, got 1 of 3"),
        ({"scores": [[1.0, 1.0, 1.0], [1.0]]}, "got 2 of 1 and 3"),
        ({"scores": []}, "got 0 of nothing"),
        ({"scores": [[0.0] * 3] * 2}, "scores are all 0"),
        ({"scores": [[1.0, -1.0, 1.0]] * 2}, "is damaged: scores.0.1: "),
    ],
)
def test_wrong_content_is_pointed_at(tmp_path, changes, complaint):
    assert complaint in refusal(make_calibration(tmp_path / "c.json", 2, 3, **changes))


def test_sparsemm_asks_for_the_file():
    config_class = get_compressor("sparsemm").config_class
    with pytest.raises(ValueError, match="needs the field 'calibration': path of the model's visual-head scores"):
        parse_config(None, config_class)
    with pytest.raises(ValueError, match="calibration = 7 is not allowed; legal: a text"):
        parse_config({"calibration": 7}, config_class)
