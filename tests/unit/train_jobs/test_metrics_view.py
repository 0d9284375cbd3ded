"""Metrics for people: every number, and a row for each class."""

import io

import numpy as np
from rich.console import Console

from train_jobs.evaluation.classes import ClassSums
from train_jobs.views.metrics import metrics_view


def test_metrics_of_a_classifier_are_a_list_and_a_table() -> None:
    metrics = ClassSums.of(np.eye(2)[[0, 1, 1, 0]], np.array([0, 1, 0, 0])).metrics(("ham", "spam"))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(metrics_view("inbox@v1 on mails", metrics))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["accuracy", "0.7500"] in lines
    assert ["num_items", "4"] in lines
    assert ["ham", "1.000", "0.667", "0.800", "3"] in lines
    assert ["spam", "0.500", "1.000", "0.667", "1"] in lines


def test_metrics_of_tasks_keep_their_names_and_counts_are_whole() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(
        metrics_view("m@v1 on boolq", {"boolq/acc": 0.5, "boolq/num_documents": 3270}, ["boolq: version 2."])
    )
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["boolq/acc", "0.5000"] in lines
    assert ["boolq/num_documents", "3,270"] in lines
    assert ["Note:", "boolq:", "version", "2."] in lines
