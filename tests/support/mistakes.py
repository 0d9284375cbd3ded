"""Mistakes in a YAML that is otherwise right: what each becomes, and what must be said of it where."""

from dataclasses import dataclass

import pytest

from cluster.config.load import load_text
from cluster.errors import ConfigError, Problem

JARGON = ("pydantic", "input should", "value error", "instance of", "dict", "tuple", "nonetype", "int_")


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """``old`` of the right text becomes ``new``; the problem is where ``#!`` stands, else where ``old`` was."""

    old: str
    new: str
    path: str
    says: str
    remedy: str

    def made_in(self, right: str) -> str:
        assert right.count(self.old) >= 1
        return right.replace(self.old, self.new, 1)

    def line_in(self, right: str) -> int:
        text = self.made_in(right)
        marker = text.find("#!")
        return text.count("\n", 0, marker if marker >= 0 else right.index(self.old)) + 1


def problems_of(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_text(text, "manta.yaml")
    return caught.value.problems


def check_explained(mistake: Mistake, right: str) -> None:
    """The mistake is told where it is, with what is wrong and what to do."""
    problems = problems_of(mistake.made_in(right))
    found = [problem for problem in problems if problem.path == mistake.path]
    assert found, [str(problem) for problem in problems]
    problem = found[0]
    assert mistake.says in problem.message
    assert mistake.remedy in (problem.remedy or "")
    assert problem.remedy
    assert problem.file == "manta.yaml"
    assert problem.line == mistake.line_in(right)


def check_plain_words(mistake: Mistake, right: str) -> None:
    """No message speaks the language of the validator."""
    shown = "\n".join(map(str, problems_of(mistake.made_in(right)))).lower()
    for jargon in JARGON:
        assert jargon not in shown
