"""Every error Manta raises on purpose on the control path, as one tree.

    MantaError                  exit status 1
      ConfigError               exit status 2   the YAML is wrong; holds every problem found
      UsageError                exit status 2   the command line is wrong
      PlanError                 exit status 2   the YAML asks for what cannot be: a number breaks a limit
      RegistryError             exit status 1   a version, alias or file in the registry is missing or damaged
        AliasConflict           exit status 1   an alias moved between read and write
      SourceError               exit status 1   a model source cannot be fetched, or is refused
      DataError                 exit status 1   prepared data is missing or damaged, or its inputs cannot be used
      ControlError              exit status 1   Ray, Serve or a process did not do what was asked

A message names the place, the value, the limit and the remedy. All of them pickle.
"""

from dataclasses import dataclass


class MantaError(Exception):
    """Base of all deliberate errors; ``exit_status`` is what the command line returns for it."""

    exit_status = 1


class UsageError(MantaError):
    """The command line asks for something that does not exist."""

    exit_status = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake in a config file.

    ``file`` and ``line`` point at the YAML (line is 1-based), ``path`` is dotted (``models[0].pipeline.stages``),
    ``value`` is what was written, ``limit`` what is allowed, ``remedy`` what to do.
    """

    file: str
    line: int
    path: str
    message: str
    value: str | None = None
    limit: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        """One line, readable by people and by editors (``file:line: path: ...``)."""
        text = f"{self.file}:{self.line}: {self.path}: {self.message}"
        if self.value is not None:
            text += f" (got {self.value})"
        if self.limit is not None:
            text += f"; allowed: {self.limit}"
        if self.remedy is not None:
            text += f"; {self.remedy}"
        return text


class ConfigError(MantaError):
    """The config file is wrong; ``problems`` lists every mistake that was found, in file order."""

    exit_status = 2

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        """One line per problem."""
        return "\n".join(str(problem) for problem in self.problems)


class PlanError(MantaError):
    """The config is well formed but cannot be carried out: a number breaks a limit."""

    exit_status = 2


class RegistryError(MantaError):
    """A version, alias or file of the registry is missing, damaged, or in the way."""


class AliasConflict(RegistryError):
    """The alias was moved by somebody else between read and write."""


class SourceError(MantaError):
    """A model source could not be fetched, or is refused (a pickle file, a wrong digest)."""


class DataError(MantaError):
    """Inputs of a data preparation cannot be used, or prepared data is missing, damaged or does not fit a model."""


class ControlError(MantaError):
    """Ray, Serve or a local process did not do what was asked."""
