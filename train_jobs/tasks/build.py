"""A task's spec in, the task that the trainer runs out; and what its model is, before any of it is loaded."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from cluster.errors import PlanError
from cluster.registry.adapter import FOLDER
from cluster.registry.positions import max_positions
from train_jobs.tasks.classify import ClassifyTask
from train_jobs.tasks.combinations import check_task
from train_jobs.tasks.dpo import PreferenceTask
from train_jobs.tasks.lm import LanguageTask
from train_jobs.tasks.networks import outline, read_config
from train_jobs.tasks.spec import Checkpoint, TaskSpec
from train_jobs.trainer.layers import repeated_layers, trained_parameters
from train_jobs.trainer.task import Task

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """A task's model as the trainer will hold it, counted without loading it."""

    model_type: str
    num_parameters: int
    """All that a worker holds before they are cut: with the additions of an adapter, and the reference of dpo."""
    num_trained_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_tokens: int | None


def build_task(spec: TaskSpec) -> Task:
    """The task; PlanError when its parts contradict each other, or the model cannot take the data."""
    check_task(spec)
    read_config(spec)
    _check_vocabulary(spec)
    _check_chain(spec)
    match spec.task:
        case "lm" | "sft":
            return LanguageTask(spec)
        case "classify":
            return ClassifyTask(spec)
        case "dpo":
            return PreferenceTask(spec)


def outline_model(spec: TaskSpec) -> ModelOutline:
    """Sizes of the task's model; reads its config only. PlanError as of :func:`build_task`."""
    check_task(spec)
    text = read_config(spec).get_text_config()
    network = outline(spec)
    num_held = sum(parameter.numel() for parameter in network.module.parameters())
    has_reference = spec.task == "dpo" and spec.adapter is None
    return ModelOutline(
        model_type=network.module.config.model_type,
        num_parameters=num_held * (2 if has_reference else 1),
        num_trained_parameters=sum(one.numel() for one in trained_parameters(network.module).values()),
        num_layers=len(repeated_layers(network.module)),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        context_tokens=max_positions(text.to_dict()),
    )


def _check_chain(spec: TaskSpec) -> None:
    """An adapter names one base, whose weights are all there."""
    if spec.adapter is None or spec.adapter.publish == "merged" or not isinstance(spec.base, Checkpoint):
        return
    if (spec.base.directory / FOLDER).is_dir():
        raise PlanError(f"adapter.publish: adapter: {spec.base.name} is an adapter itself; set publish: merged")


def _check_vocabulary(spec: TaskSpec) -> None:
    """The same ids must mean the same tokens to the base and in the data; other files may differ."""
    if not isinstance(spec.base, Checkpoint):
        return
    own, used = spec.base.directory / _TOKENIZER, spec.tokenizer / _TOKENIZER
    if not (own.is_file() and used.is_file()) or own.read_bytes() == used.read_bytes():
        return
    if Tokenizer.from_file(str(own)).get_vocab() != Tokenizer.from_file(str(used)).get_vocab():
        raise PlanError(
            f"base {spec.base.name}: its tokenizer is not the one that the data were prepared with; prepare them "
            f"again with tokenizer: {spec.base.name}"
        )
