"""Which checkpoint serves which task, and the names of a classifier's labels."""

import pytest

from cluster.registry.labels import read_labels, task_mistake


def bert(**config):
    return {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "ham", "1": "spam"}} | config


def test_labels_stand_in_the_order_of_the_logits():
    names = {str(index): f"label {index}" for index in reversed(range(12))}
    assert read_labels({"id2label": names}) == tuple(f"label {index}" for index in range(12))
    assert read_labels({}) == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("config", "task", "words"),
    [
        (bert(), "classify", None),
        (bert(), "embed", None),
        ({"architectures": ["LlamaForCausalLM"]}, "generate", None),
        (bert(), "generate", "writes no text; set task: classify"),
        ({"architectures": ["BertModel"]}, "classify", "BertModel has no classification head"),
        (bert(id2label={"0": "score"}), "classify", "single label"),
        (bert(id2label={"0": "ham", "2": "spam"}), "classify", "must map 0, 1, ... to names"),
        (bert(id2label=["ham", "spam"]), "classify", "must map 0, 1, ... to names"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_said_with_the_remedy(config, task, words):
    mistake = task_mistake(config, task)
    assert (mistake is None) if words is None else (words in mistake)
