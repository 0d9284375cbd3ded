"""Metrics against closed forms and scikit-learn, sums of parts against the whole, data that cannot be evaluated."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as reference

from train_jobs.evaluation.calibration import CalibrationSums
from train_jobs.evaluation.classes import ClassSums
from train_jobs.evaluation.errors import EvaluationError
from train_jobs.evaluation.exact import as_float, exact_sum
from train_jobs.evaluation.labels import label_numbers
from train_jobs.evaluation.preference import PreferenceSums
from train_jobs.evaluation.text import TextSums

NAMES = ("business", "sport", "tech", "weather")
VOCABULARY = 11


def predictions(num_items: int, num_classes: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Probabilities [B, C] that are often right, and labels [B]."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, num_items)
    logits = random.normal(size=(num_items, num_classes))
    logits[np.arange(num_items), labels] += 1.5
    odds = np.exp(logits)
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32), labels


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_items=st.integers(1, 200), num_classes=st.integers(2, 4))
def test_classes_agree_with_scikit_learn(seed: int, num_items: int, num_classes: int) -> None:
    probabilities, labels = predictions(num_items, num_classes, seed)
    found = ClassSums.of(probabilities, labels).metrics(NAMES[:num_classes])
    predicted = probabilities.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    numbers = list(range(num_classes))
    assert found["confusion"] == reference.confusion_matrix(labels, predicted, labels=numbers).tolist()
    table = reference.precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0)
    rows = found["classes"]
    assert [row["label"] for row in rows] == list(NAMES[:num_classes])
    for column, expected in zip(("precision", "recall", "f1", "support"), table, strict=True):
        assert [row[column] for row in rows] == pytest.approx(list(expected))
    loss = -np.log(probabilities[np.arange(num_items), labels].astype(np.float64)).mean()
    assert found["loss"] == pytest.approx(loss, abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 100), max_size=6))
def test_sums_of_any_parts_are_those_of_the_whole(seed: int, cuts: Sequence[int]) -> None:
    probabilities, labels = predictions(100, 4, seed)
    places = [0, *sorted(cuts), 100]
    parts = [ClassSums.of(probabilities[a:b], labels[a:b]) for a, b in pairwise(places)]
    assert sum(reversed(parts), ClassSums.empty(4)) == ClassSums.of(probabilities, labels)
    nats = np.random.default_rng(seed).exponential(size=100)
    pieces = [TextSums.of(nats[a:b], nats[a:b] < 1, num_bytes=b - a) for a, b in pairwise(places)]
    assert sum(pieces, TextSums()) == TextSums.of(nats, nats < 1, num_bytes=100)


def test_classes_that_occur_nowhere_do_not_count_in_macro_f1() -> None:
    found = ClassSums.of(np.eye(4)[[0, 1, 1]], np.array([0, 1, 0])).metrics(NAMES)
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["classes"][3] == {"label": "weather", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    sums = CalibrationSums.of(np.full(10, 0.75), np.arange(10) < 5)
    assert sums.expected_error() == pytest.approx(0.25)
    assert sums.bins() == [
        {
            "above": pytest.approx(11 / 15),
            "up_to": 0.8,
            "num_predictions": 10,
            "accuracy": 0.5,
            "confidence": pytest.approx(0.75),
        }
    ]


def test_calibration_error_weighs_bins_by_their_predictions() -> None:
    confidences = np.array([0.55] * 30 + [0.95] * 10)
    correct = np.concatenate([np.arange(30) < 15, np.arange(10) < 10])
    expected = (30 * abs(0.5 - 0.55) + 10 * abs(1.0 - 0.95)) / 40
    assert CalibrationSums.of(confidences, correct).expected_error() == pytest.approx(expected)


def test_a_confidence_on_a_border_belongs_to_the_bin_below() -> None:
    [row] = CalibrationSums.of(np.array([1.0]), np.array([True])).bins()
    assert (row["up_to"], row["accuracy"]) == (1.0, 1.0)
    assert CalibrationSums.of(np.array([0.0]), np.array([False])).bins()[0]["above"] == 0.0


def test_confidences_outside_zero_to_one_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"confidence of 1\.5; allowed: 0 to 1"):
        CalibrationSums.of(np.array([0.2, 1.5]), np.array([True, True]))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    found = TextSums.of(np.full(10, math.log(VOCABULARY)), np.ones(10, dtype=bool), num_bytes=20).metrics()
    assert found["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(10 * math.log2(VOCABULARY) / 20)
    assert (found["token_accuracy"], found["num_targets"]) == (1.0, 10)
    assert "bits_per_byte" not in TextSums.of(np.ones(10), np.ones(10, dtype=bool), num_bytes=0).metrics()


def test_pairs() -> None:
    sums = PreferenceSums.of(np.array([2.0, 1.0, 0.5, 0.0]), np.array([1.0, 1.0, 1.0, -3.0]), np.full(4, 0.5))
    assert sums.metrics() == {"loss": 0.5, "accuracy": 0.5, "margin": 0.875, "num_pairs": 4}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), max_size=50))
def test_exact_sums_are_right(values: Sequence[float]) -> None:
    found = as_float(exact_sum(np.array(values), "loss"))
    assert found == pytest.approx(math.fsum(values), abs=len(values) * 2.0**-33 + 1e-9)


def test_labels_are_matched_by_name() -> None:
    assert label_numbers(("tech", "business"), NAMES).tolist() == [2, 0]
    with pytest.raises(EvaluationError, match=r"does not know label 'politics' of the data; it knows labels 'bus"):
        label_numbers(("tech", "politics"), NAMES)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(EvaluationError, match="log-likelihood of 1 of 2 predictions is not a usable number"):
        TextSums.of(np.array([1.0, value]), np.array([True, True]), num_bytes=2)


def test_labels_that_are_no_class_are_refused() -> None:
    with pytest.raises(EvaluationError, match="label number 3; the model has classes 0 to 2"):
        ClassSums.of(np.full((1, 3), 1 / 3), np.array([3]))


@pytest.mark.parametrize("sums", [TextSums(), PreferenceSums()], ids=["text", "pairs"])
def test_nothing_to_evaluate_on_is_an_error(sums: TextSums | PreferenceSums) -> None:
    with pytest.raises(EvaluationError, match="the data have no"):
        sums.metrics()
    with pytest.raises(EvaluationError, match="the data have no items"):
        ClassSums.empty(2).metrics(NAMES[:2])
