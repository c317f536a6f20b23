"""Metrics of real benchmarks: laws that all keep, then values worked out by hand."""

import random
import sys
import types

import pytest
import torch

from benchmarks import metrics
from benchmarks.metrics import METRICS, extract_choice, normalise_answer, normalise_choice, score
from tests.builders import fresh_generator

LOCAL_METRICS = ["exact_match", "contains", "rouge_l"]
VOCABULARY = ("red", "fox", "jumps", "over", "lazy", "dogs", "seven", "times", "blue", "owl")


def random_texts(count, num_words=6):
    rng = random.Random(int(torch.randint(2**31, (1,), generator=fresh_generator())))
    return [" ".join(rng.choice(VOCABULARY) for _ in range(num_words)) for _ in range(count)]


@pytest.mark.parametrize("metric", LOCAL_METRICS)
class TestLaws:
    def test_right_answers_score_highest_and_foreign_ones_nothing(self, metric):
        texts = random_texts(8)
        assert score(metric, texts, [(text,) for text in texts]) == pytest.approx(1)
        assert score(metric, ["zzz qqq kkk vvv"] * 8, [(text,) for text in texts]) < 0.01

    def test_scores_lie_between_0_and_1_and_more_references_never_hurt(self, metric):
        said, right, more = random_texts(10), random_texts(10), random_texts(10)
        one = score(metric, said, [(text,) for text in right])
        # Questions may differ in how many references they have.
        two = score(metric, said, [(a, b) if i else (a,) for i, (a, b) in enumerate(zip(right, more, strict=True))])
        assert 0 <= one <= two + 1e-9 <= 1 + 1e-9


class TestValues:
    def test_exact_match_ignores_case_articles_and_punctuation(self):
        assert normalise_answer("  The Fox, (an owl)!") == "fox owl"
        references = [("The fox.",), ("fox", "owl"), ("fox",)]
        assert score("exact_match", ["fox", "An owl", "foxes"], references) == pytest.approx(2 / 3)

    def test_contains_is_mile_bench_s_rule(self):
        assert score("contains", ["It is Paris, France.", "London"], [("paris",), ("paris",)]) == 0.5

    def test_rouge_l_by_hand(self):
        # Longest common subsequence "red jumps": precision 2/3, recall 2/4.
        assert score("rouge_l", ["red jumps high"], [("red fox jumps over",)]) == pytest.approx(
            2 * 2 / 3 * 0.5 / (7 / 6)
        )

    def test_cider_passes_tokenized_captions_and_divides_by_10(self, monkeypatch):
        class Tokenizer:
            def tokenize(self, captions):
                return {key: [entry["caption"].lower() for entry in entries] for key, entries in captions.items()}

        class Cider:
            def compute_score(self, right, said):
                assert right == {0: ["a fox", "fox"], 1: ["owl"]}
                assert said == {0: ["fox"], 1: ["an owl"]}
                return 2.5, [5.0, 0.0]

        scorer, tokenizer = types.ModuleType("cider"), types.ModuleType("ptbtokenizer")
        scorer.Cider, tokenizer.PTBTokenizer = Cider, Tokenizer
        monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", scorer)
        monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer.ptbtokenizer", tokenizer)
        monkeypatch.setattr(metrics.shutil, "which", lambda name: "/usr/bin/java")
        assert score("cider", ["Fox", "An owl"], [("A fox", "fox"), ("owl",)]) == 0.25


class TestChoices:
    CHOICES = ("A red fox", "a blue owl", "Nothing at all", "7,000 dogs")

    @pytest.mark.parametrize(
        ("answer", "choice"),
        [
            ("B", 1),
            ("(C)", 2),
            ("d.", 3),
            ("B. a blue owl", 1),
            ("The answer is: a blue owl!", 1),
            ("a blueowl", 1),
            ("7000 dogs", 3),
            ("A. A red fox, not B. a blue owl", 0),
            ("", None),
            ("I cannot tell", None),
            ("AB", None),
        ],
    )
    def test_choices_are_found_as_mile_bench_finds_them(self, answer, choice):
        assert extract_choice(answer, self.CHOICES) == choice

    def test_every_letter_and_every_choice_finds_itself(self):
        rng = random.Random(int(torch.randint(2**31, (1,), generator=fresh_generator())))
        choices = tuple(f"{word} {word[::-1]} {i}" for i, word in enumerate(rng.sample(VOCABULARY, 5)))
        for i, choice in enumerate(choices):
            letter = "ABCDE"[i]
            for answer in (letter, f"{letter}.", f"({letter})", f"{letter}. {choice}", choice, choice.upper()):
                assert extract_choice(answer, choices) == i

    def test_accuracy(self):
        references = [(choice, *self.CHOICES) for choice in self.CHOICES]
        assert score("multiple_choice", ["A", "B", "C", "D"], references) == 1
        assert score("multiple_choice", ["A", "A", "A", ""], references) == 0.25
        with pytest.raises(ValueError, match="the right choice, then all choices"):
            score("multiple_choice", ["A"], [("cat", "dog", "owl")])

    def test_punctuation_goes_as_in_vqa(self):
        assert normalise_choice("'Well-known', 1.5 (x)\n") == "well known' 1.5 x"
        assert normalise_choice("7,000 well-known, or -5") == "7000 wellknown or 5"


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("f1", ["a"], [("a",)]), "metric = 'f1': expected one of exact_match, contains"),
            (("rouge_l", [], []), "predictions: expected one for each of the 0 references, got 0"),
            (("rouge_l", ["a"], [("a",), ("b",)]), "expected one for each of the 2 references, got 1"),
            (("rouge_l", ["a"], [()]), r"references\[0\] = \(\): expected a tuple"),
            (("rouge_l", ["a"], ["abc"]), r"references\[0\] = 'abc': expected a tuple"),
        ],
    )
    def test_is_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            score(*arguments)

    @pytest.mark.parametrize(
        ("metric", "module"),
        [("rouge_l", "rouge_score.rouge_scorer"), ("cider", "pycocoevalcap.cider.cider")],
    )
    def test_a_missing_library_is_named_with_what_to_install(self, monkeypatch, metric, module):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"{module} is missing; pip install sglang-hybridkv\[quality\]"):
            score(metric, ["red"], [("red",)])

    def test_every_metric_is_tested(self):
        assert set(METRICS) == {*LOCAL_METRICS, "multiple_choice", "cider"}
