"""Texts hold what their questions ask for, once, and the two halves have nothing in common."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import texts
from benchmarks.scenes import Question
from benchmarks.texts import (
    DEVELOPMENT,
    FREE_KINDS,
    HELD_OUT,
    KINDS,
    LENGTHS,
    SPLITS,
    Text,
    ask_text,
    count_tokens,
    draw_text,
    is_right,
    normalise,
    passages,
)


def draw(seed: int, length: int = 1000, split: str = DEVELOPMENT) -> Text:
    return draw_text(np.random.default_rng(seed), length, split=split)


def ask(seed: int, text: Text, kind: str) -> Question:
    return ask_text(np.random.default_rng(seed), text, kind)


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_draws_the_same_text(split: str) -> None:
    assert draw(3, split=split) == draw(3, split=split) != draw(4, split=split)
    assert ask(1, draw(3), "pair") == ask(1, draw(3), "pair") != ask(2, draw(3), "pair")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_text_has_the_length_that_names_it(length: int, split: str) -> None:
    for seed in range(5):
        assert count_tokens(draw(seed, length, split).body) == pytest.approx(length, rel=0.05)


def test_tokens_are_estimated_as_smollm2_counts_them() -> None:
    """Checked where `make models-real` has been run; the estimate itself needs no model."""
    folder = Path(__file__).resolve().parents[2] / ".models" / "smollm2"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("make models-real has not been run")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for split in SPLITS:
        for length in LENGTHS:
            for seed in range(5):
                tokens = len(tokenizer.encode(draw(seed, length, split).body).ids)
                assert tokens == pytest.approx(length, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_facts_are_in_the_text_once(seed: int) -> None:
    text = draw(seed, split=SPLITS[seed % 2])
    for fact in itertools.chain(*text.said()):
        assert text.body.count(fact) == 1, fact
    for sentence in text.sentences:
        assert text.body.count(sentence) == 1, sentence


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(FREE_KINDS)))
def test_answers_follow_from_the_text(kind: str, seed: int) -> None:
    text = draw(seed)
    question = ask(seed, text, kind)
    assert _answer(text.body, question) == question.answer


def _answer(body: str, question: Question) -> str:
    """Answer a question by reading, with nothing but the text and the words of the question."""
    asked, begun = question.text, question.begun

    def code(place: str) -> str:
        return re.search(rf"The access code of the {place} is (\d+)\.", body)[1]

    match question.kind:
        case "needle":
            return code(re.search(r"code of the (\w+ \w+)", asked)[1])
        case "pair":
            return " and ".join(map(code, re.search(r"codes of the (\w+ \w+) and of the (\w+ \w+)", asked).groups()))
        case "hop":
            return code(re.search(rf"{asked.split()[0]} holds the key to the (\w+ \w+)\.", body)[1])
        case "price":
            return re.search(rf"^{begun} (\d+)$", body, re.MULTILINE)[1]
        case "crew" | "cloze":
            # The answer goes on from where it begins, up to the end of the sentence.
            (_, found) = body.split(begun)
            return re.match(r" ([^.]*)\.", found)[1]
        case "tally":
            return str(body.count("Today's visitor is"))
    raise AssertionError(question.kind)


def test_halves_share_no_sentence() -> None:
    sentences = [{re.sub(r"\W+", " ", s).lower() for run in passages(split) for s in run} for split in SPLITS]
    assert all(sentences)
    assert sentences[0].isdisjoint(sentences[1])


@pytest.mark.parametrize("split", SPLITS)
def test_every_fact_has_all_words_of_its_half(split: str) -> None:
    words = set(re.findall(r"[A-Za-z]+", " ".join(texts.every_fact(split)))) & texts.FACT_WORDS
    others = set(re.findall(r"[A-Za-z]+", " ".join(texts.every_fact(SPLITS[split == DEVELOPMENT])))) & texts.FACT_WORDS
    assert words.isdisjoint(others)
    assert words | others == texts.FACT_WORDS
    drawn = [draw(seed, split=split) for seed in range(10)]
    assert not set(re.findall(r"[A-Za-z]+", repr([text.said() for text in drawn]))) & others


@pytest.mark.parametrize("split", SPLITS)
def test_a_half_has_prose_for_several_of_the_longest_texts(split: str) -> None:
    assert count_tokens("\n".join(s for run in passages(split) for s in run)) > 3 * max(LENGTHS)


@pytest.mark.parametrize("kind", FREE_KINDS)
def test_free_text_is_neither_right_nor_wrong(kind: str) -> None:
    question = ask(0, draw(0), kind)
    assert question.answer == ""
    assert is_right(question, "anything") is None


@pytest.mark.parametrize(
    ("kind", "said", "same"),
    [
        ("needle", " 1234.", "1234"),
        ("needle", " 1234.\n\nThe access code of the red tower is 5678.", "1234"),
        ("needle", " 1234. The access code of the red tower is 5678.", "1234"),
        ("needle", "not known, maybe 1234", "1234"),
        ("needle", "1234, that is 1234", "1234"),
        ("needle", "1234 or 5678", "1234, 5678"),
        ("needle", "not known", ""),
        ("price", " 330\nhook: 123", "330"),
        ("pair", " 1234 and 5678 respectively.", "1234, 5678"),
        ("cloze", ' the rest of it." ', "the rest of it"),
        ("crew", " Anna,  Boris.\n\nMore", "Anna, Boris"),
        ("crew", "", ""),
    ],
)
def test_normalise(kind: str, said: str, same: str) -> None:
    assert normalise(kind, said) == same
    assert normalise(kind, same) == same


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(FREE_KINDS)))
def test_right_answers_are_right_and_their_parts_are_not(kind: str) -> None:
    question = ask(0, draw(0), kind)
    for said in (question.answer, f" {question.answer}.", f" {question.answer}.\n\nAnd more of 17 kinds."):
        assert is_right(question, said) is True
    assert is_right(question, "") is False
    assert is_right(question, question.answer[:-1]) is False
    assert is_right(question, f"{question.answer} or 5678") is False


@pytest.fixture
def fresh_sources():
    passages.cache_clear()
    yield
    passages.cache_clear()


def test_a_source_that_is_not_there_is_named(tmp_path, monkeypatch, fresh_sources) -> None:
    monkeypatch.setattr(texts, "LICENSES", tmp_path)
    with pytest.raises(ValueError, match=r"texts: .*base-files"):
        passages(HELD_OUT)


def test_a_license_that_is_not_there_is_left_out(tmp_path, monkeypatch, fresh_sources) -> None:
    for name in ("GPL-3", "Apache-2.0"):
        (tmp_path / name).write_text((texts.LICENSES / name).read_text())
    everything = [len(passages(split)) for split in SPLITS]
    passages.cache_clear()
    monkeypatch.setattr(texts, "LICENSES", tmp_path)
    assert all(0 < len(passages(split)) < size for split, size in zip(SPLITS, everything, strict=True))
