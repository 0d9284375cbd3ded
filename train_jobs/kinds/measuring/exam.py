"""A language model and names of lm-eval's tasks in, what lm-eval measured out.

EleutherAI's lm-evaluation-harness is an extra, imported here alone, and where it is used: it brings `datasets`.
"""

import difflib
import random
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from cluster.config.wording import either
from cluster.errors import MantaError, PlanError
from cluster.runs.files import HARNESS_LOG
from train_jobs.evaluation.errors import EvaluationError
from train_jobs.job import HarnessSpec
from train_jobs.kinds.measuring.hushed import hushed
from train_jobs.tasks.networks import load_language_model
from train_jobs.tasks.spec import Checkpoint

_SEED, _OTHER_SEED = 0, 1234
"""lm-eval's own defaults, the second for NumPy, torch and the choice of solved examples: numbers compare."""
_BOOTSTRAPS = 1000
"""Draws behind a standard error that has no formula: it is right to some 2 %."""
_NEAR_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """Which model is asked what; pickles."""

    job: str
    harness: HarnessSpec
    checkpoint: Checkpoint
    batch_sequences: int
    threads: int
    gpu: bool


def installed_version(job: str) -> str:
    """lm-eval's version; PlanError when it is not installed."""
    try:
        import lm_eval  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise PlanError(
            f"jobs.{job}.harness needs lm-eval, which is not installed; pip install 'manta-cluster[lm-eval]', or "
            "write `data:` instead"
        ) from error
    version: str = lm_eval.__version__
    return version


def sit_exam(exam: Exam, run_directory: Path) -> dict[str, Any]:
    """lm-eval's results, computed in this process; what it says goes to ``harness.log``.

    PlanError when a task is unknown or cannot be asked so, EvaluationError when its documents cannot be read or it
    breaks on the way.
    """
    installed_version(exam.job)
    with (run_directory / HARNESS_LOG).open("w", encoding="utf-8") as log, hushed(log):
        try:
            return _sit(exam)
        except MantaError:
            raise
        except Exception as error:  # whatever a task's own code raises
            log.write(traceback.format_exc())
            raise EvaluationError(
                f"jobs.{exam.job}.harness: lm-eval stopped with {_first_line(error)}; {run_directory / HARNESS_LOG} "
                "has the rest"
            ) from error


def check_tasks(exam: Exam) -> None:
    """PlanError when lm-eval does not know a task, with the names that are near."""
    with hushed(None):
        _find_tasks(exam)


def _sit(exam: Exam) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate  # noqa: PLC0415 (an extra)

    torch.set_num_threads(exam.threads)
    loaded = _load_tasks(exam, _find_tasks(exam))
    for name, task in loaded["tasks"].items():
        _set_up(exam, name, task)
    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
    results: dict[str, Any] = evaluate(
        lm=_load_model(exam),
        task_dict=loaded,
        limit=exam.harness.limit,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=False,
        apply_chat_template=exam.harness.chat_template,
        fewshot_as_multiturn=exam.harness.chat_template,
    )
    return results


def _load_model(exam: Exam) -> Any:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 (an extra)

    directory = exam.checkpoint.directory
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if exam.harness.chat_template and not tokenizer.chat_template:
        raise PlanError(
            f"jobs.{exam.job}.harness.chat_template: {exam.checkpoint.name} has no chat template; remove it, or give "
            "a model that was trained to chat"
        )
    network = load_language_model(exam.checkpoint).to(torch.device("cuda" if exam.gpu else "cpu")).eval()
    return HFLM(pretrained=network, backend="causal", tokenizer=tokenizer, batch_size=exam.batch_sequences)


def _find_tasks(exam: Exam) -> Any:
    """lm-eval's index of tasks; all of its own take it most of a minute to read, and are left out when not asked."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (an extra)

    names, include = exam.harness.tasks, exam.harness.include
    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    known = TaskManager(include_path=include)
    for name in names:
        if name not in known.all_tasks:
            near = difflib.get_close_matches(name, known.all_tasks, n=_NEAR_NAMES)
            raise PlanError(
                f"jobs.{exam.job}.harness.tasks: lm-eval has no task {name!r}; "
                f"{f'near is {either(near)}' if near else 'list them with `lm-eval ls tasks`'}"
                f"{_of_folder(include, known)}"
            )
    return known


def _of_folder(include: str | None, known: Any) -> str:
    """Which tasks the user's folder defines, and which of its files define none."""
    if include is None:
        return "; a task of your own is a YAML file in the folder that `include` names"
    files = sorted(Path(include).rglob("*.yaml"))
    names = {entry.yaml_path: name for name, entry in known.task_index.items() if entry.yaml_path in files}
    without = [str(path.relative_to(include)) for path in files if path not in names]
    said = f"; {include} has {', '.join(sorted(names.values())) or 'no task'}"
    return f"{said}, and {', '.join(without)} cannot be read as one" if without else said


def _load_tasks(exam: Exam, known: Any) -> Mapping[str, dict[str, Any]]:
    """Tasks with their documents, and the groups they are in."""
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in exam.harness.tasks:
        try:
            found = known.load([name])
        except Exception as error:  # a task runs code of its own, and that of `datasets`
            raise EvaluationError(f"jobs.{exam.job}.harness.tasks: {_why_not(name, error)}") from error
        for kind, entries in loaded.items():
            entries |= found[kind]
    return loaded


def _why_not(name: str, error: Exception) -> str:
    if isinstance(error, OSError):
        return (
            f"the documents of {name} cannot be read: {_first_line(error)}; they come from the Hugging Face hub "
            "unless the task says otherwise: run where it can be reached, or once there with an HF_HOME that "
            "this machine shares, or write a task over files of your own into the folder that `include` names"
        )
    return f"lm-eval cannot make task {name}: {_first_line(error)}; correct its YAML, or leave it out"


def _set_up(exam: Exam, name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise PlanError(
            f"jobs.{exam.job}.harness.tasks: {name} runs code that the model writes, which jobs do not; leave it out"
        )
    own, wanted = task.get_config("num_fewshot"), exam.harness.num_fewshot
    if own == 0 and wanted:
        raise PlanError(
            f"jobs.{exam.job}.harness.num_fewshot: {wanted}, but {name} is a task of 0 solved examples; remove "
            "num_fewshot, or move the task to a job of its own"
        )
    task.set_config(key="num_fewshot", value=(own or 0) if wanted is None else wanted)
    task.set_fewshot_seed(seed=_OTHER_SEED)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
