from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.requests.spans import VisualSpan, num_observation_rows, observed_window, text_mask
from tests.builders import LAWS


@st.composite
def prompts(draw):
    """Disjoint spans in order, and a prompt length at or beyond the last."""
    borders = sorted(draw(st.sets(st.integers(0, 200), max_size=8)))
    pairs = list(zip(borders[::2], borders[1::2], strict=False))
    spans = tuple(VisualSpan(start, end, "image") for start, end in pairs)
    end = max((span.end for span in spans), default=0)
    return spans, end + draw(st.integers(0 if spans else 1, 60))


@LAWS
@given(prompts(), st.integers(1, 250))
def test_text_is_what_no_span_covers(prompt, num_tokens):
    spans, _ = prompt
    mask = text_mask(spans, num_tokens)
    expected = [not any(span.start <= token < span.end for span in spans) for token in range(num_tokens)]
    assert mask.tolist() == expected


@LAWS
@given(prompts(), st.integers(1, 64))
def test_observed_rows_are_the_text_after_the_last_visual_token(prompt, wanted):
    spans, prompt_len = prompt
    rows = num_observation_rows(spans, prompt_len, wanted)
    assert 1 <= rows <= min(wanted, prompt_len)
    mask = text_mask(spans, prompt_len).tolist()
    if mask[-1]:
        assert all(mask[prompt_len - rows :])
        assert rows == min(wanted, prompt_len) or not mask[prompt_len - rows - 1]
    else:
        assert rows == min(wanted, prompt_len), "a prompt that ends in an image: its last tokens"


@LAWS
@given(prompts(), st.integers(1, 300))
def test_the_window_is_the_end_of_the_prompt(prompt, wanted):
    spans, prompt_len = prompt
    text = observed_window("text", spans, prompt_len, wanted)
    last = observed_window("last", spans, prompt_len, wanted)
    assert text == range(prompt_len - num_observation_rows(spans, prompt_len, wanted), prompt_len)
    assert last == range(max(prompt_len - wanted, 0), prompt_len)
