"""A YAML file, or its text, becomes a ``ClusterConfig``, or a ``ConfigError`` with every mistake in file order."""

from pathlib import Path

from cluster.config.findings import Finding, Place, to_problems
from cluster.config.relations import check_relations
from cluster.config.schema import ClusterConfig
from cluster.config.sections import SectionReader
from cluster.config.yaml_tree import UNREADABLE, read_tree
from cluster.errors import ConfigError


def load_config(path: Path) -> ClusterConfig:
    """The config in the file ``path``; ConfigError when it cannot be read or is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        finding = Finding(
            at=(), message=f"cannot be read: {reason}", remedy="check the path; configs/ holds examples"
        )
        raise ConfigError(to_problems(str(path), [finding], {})) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = Place(line=content.count(b"\n", 0, error.start) + 1, column=1)
        message = f"is not UTF-8 text (byte {content[error.start]:#04x})"
        finding = Finding(at=(), message=message, remedy="save the file as UTF-8", place=place)
        raise ConfigError(to_problems(str(path), [finding], {})) from error
    return load_text(text, str(path))


def load_text(text: str, file_name: str) -> ClusterConfig:
    """The config in ``text``, which came from ``file_name``; ConfigError with every mistake in it."""
    tree = read_tree(text)
    findings = list(tree.findings)
    if tree.data is not UNREADABLE:
        reader = SectionReader()
        config = reader.read(ClusterConfig, tree.data, ())
        findings += [*reader.findings, *check_relations(config)]
    if findings:
        raise ConfigError(to_problems(file_name, findings, tree.places))
    return ClusterConfig.model_validate(tree.data)
