"""Scores of answers as the benchmarks define them, each from 0 to 1.

ROUGE-L and CIDEr are computed by the libraries rouge-score and pycocoevalcap. They come with
``pip install sglang-hybridkv[quality]`` and are loaded when a metric needs them.
"""

from __future__ import annotations

import importlib
import re
import shutil
import string
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

INSTALL = "pip install sglang-hybridkv[quality]"
LARGEST_CIDER = 10.0

References = tuple[str, ...]
"""Right answers to one question. For `multiple_choice`: the right choice, then all choices in order."""

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation that VQA's evaluation removes, which MileBench uses."""


def _load(module: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"metric = {metric!r}: {error.name} is missing; {INSTALL}") from None


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: as SQuAD, and SlideVQA after it, compare answers."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def normalise_choice(text: str) -> str:
    """Normalise as VQA and MileBench do: punctuation goes or becomes a space, depending on where it stands."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    original = text
    has_comma_in_number = re.search(r"\d,\d", original) is not None
    for mark in PUNCTUATION:
        stands_apart = mark + " " in original or " " + mark in original or has_comma_in_number
        text = text.replace(mark, "" if stands_apart else " ")
    return re.sub(r"\.(?!\d)", "", text).strip("'").strip('"').strip().lower()


def extract_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Tell which choice an answer names, by MileBench's rules; None when it names none.

    The first that is found wins: a letter with its choice ("B. red"), a choice, a letter alone; else the only letter of
    a choice that occurs anywhere in the answer. An empty answer names no choice (MileBench takes it for C).
    """
    answer, normalised = normalise_choice(answer), [normalise_choice(choice) for choice in choices]
    letters = string.ascii_lowercase[: len(choices)]
    found = _first_of(answer, [f"{letter} {choice}" for letter, choice in zip(letters, normalised, strict=False)])
    if found is None:
        found = _first_of(answer.replace(" ", ""), [choice.replace(" ", "") for choice in normalised])
    if found is None:
        named = [character for character in answer if character in letters]
        found = letters.index(named[0]) if len(named) == 1 else None
    return found


def _first_of(text: str, needles: Sequence[str]) -> int | None:
    places = [(text.find(needle), i) for i, needle in enumerate(needles) if needle and needle in text]
    return min(places)[1] if places else None


def exact_match(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Share of answers equal to one of their references after `normalise_answer`."""
    pairs = zip(predictions, references, strict=True)
    return fmean(normalise_answer(said) in {normalise_answer(answer) for answer in right} for said, right in pairs)


def contains(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Share of answers in which a reference occurs: MileBench's rule for MMCoQA."""
    pairs = zip(predictions, references, strict=True)
    return fmean(any(normalise_choice(r) in normalise_choice(said) for r in right) for said, right in pairs)


def multiple_choice(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Share of answers that name the right choice; see `extract_choice` and `References`."""
    return fmean(_names_right(said, right) for said, right in zip(predictions, references, strict=True))


def _names_right(said: str, references: References) -> bool:
    answer, choices = normalise_choice(references[0]), [normalise_choice(choice) for choice in references[1:]]
    if answer not in choices:
        raise ValueError(f"references = {references!r}: expected the right choice, then all choices with it among them")
    return extract_choice(said, references[1:]) == choices.index(answer)


def rouge_l(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Mean ROUGE-L F1, the best of each question's references; no stemming."""
    scorer = _load("rouge_score.rouge_scorer", "rouge_l").RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(predictions, references, strict=True)
    return fmean(scorer.score_multi(list(right), said)["rougeL"].fmeasure for said, right in pairs)


def cider(predictions: Sequence[str], references: Sequence[References]) -> float:
    """CIDEr-D of pycocoevalcap after its PTB tokenizer, over its largest value 10. Needs Java, and many answers:
    n-grams are weighted by how few questions they occur in.
    """
    scorer = _load("pycocoevalcap.cider.cider", "cider").Cider()
    tokenizer = _load("pycocoevalcap.tokenizer.ptbtokenizer", "cider").PTBTokenizer()
    if shutil.which("java") is None:
        raise ValueError("metric = 'cider': java is missing; its tokenizer needs a Java runtime on the PATH")
    said = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
    right = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
    return float(scorer.compute_score(right, said)[0]) / LARGEST_CIDER


METRICS: dict[str, Callable[[Sequence[str], Sequence[References]], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "multiple_choice": multiple_choice,
    "rouge_l": rouge_l,
    "cider": cider,
}


def score(metric: str, predictions: Sequence[str], references: Sequence[References]) -> float:
    """Score answers.

    Parameters
    ----------
    metric : a key of `METRICS`.
    predictions : one answer a question.
    references : the right answers of each question; see `References`.

    Returns
    -------
    float
        From 0 to 1, larger is better.

    Raises
    ------
    ValueError
        Unknown metric, nothing to score, lengths differ, a question without references, or a library is missing.
    """
    if metric not in METRICS:
        raise ValueError(f"metric = {metric!r}: expected one of {', '.join(METRICS)}")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"predictions: expected one for each of the {len(references)} references, got {len(predictions)}"
        )
    for question_idx, right in enumerate(references):
        if isinstance(right, str) or not right or not all(isinstance(text, str) for text in right):
            raise ValueError(f"references[{question_idx}] = {right!r}: expected a tuple of at least one text")
    return METRICS[metric](predictions, references)
