"""The Hugging Face hub: a snapshot of the wanted files of a model or dataset repository, in the hub's own cache.

The hub library's settings (``HF_ENDPOINT`` for a mirror, ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``) apply.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.config.sources import HfSource
from cluster.errors import SourceError
from cluster.registry.progress import Progress
from cluster.registry.sources.screen import PICKLE_SUFFIXES, TAKEN_PATTERNS


def download_snapshot(source: HfSource, progress: Progress) -> Path:
    """A local directory with the wanted files of ``source``; SourceError saying what to do when it cannot be had.

    Only files that may be published are downloaded, so a pickle never reaches this machine.
    """
    # Imported here, and below: half a second that no other command needs.
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415

    label = f"downloading {source.repo}"
    progress(label, 0, None, "B")
    try:
        folder = Path(
            snapshot_download(
                source.repo,
                revision=source.revision,
                allow_patterns=list(TAKEN_PATTERNS),
                tqdm_class=_bar_class(label, progress),
            )
        )
        has_weights = any(folder.rglob("*.safetensors"))
        listed = [] if has_weights else HfApi().list_repo_files(source.repo, revision=source.revision)
    except Exception as error:  # the library passes on whatever its HTTP client raises
        raise SourceError(_explain(source, error)) from error
    if not has_weights:
        pickles = [path for path in listed if path.endswith(PICKLE_SUFFIXES)]
        raise SourceError(
            f"{source} has no safetensors weights; its pickle files ({', '.join(pickles) or 'none'}) are refused, "
            "because they can run code when they are read; choose a repository or revision with .safetensors files"
        )
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    progress(label, num_bytes, num_bytes, "B")
    return folder


def download_dataset(source: HfSource, patterns: Sequence[str], progress: Progress) -> Path:
    """A local directory with the files of a dataset repository whose paths match ``patterns``; SourceError else."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    label = f"downloading {source.repo}"
    progress(label, 0, None, "B")
    try:
        folder = Path(
            snapshot_download(
                source.repo,
                repo_type="dataset",
                revision=source.revision,
                allow_patterns=list(patterns),
                tqdm_class=_bar_class(label, progress),
            )
        )
    except Exception as error:  # the library passes on whatever its HTTP client raises
        raise SourceError(_explain(source, error)) from error
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    progress(label, num_bytes, num_bytes, "B")
    return folder


def download_tokenizer(source: HfSource, progress: Progress) -> Path:
    """A local directory with tokenizer and configuration of a model repository, without its weights."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    label = f"downloading the tokenizer of {source.repo}"
    progress(label, 0, None, "B")
    try:
        folder = snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=["*.json", "*.txt", "*.model", "*.jinja"],
            ignore_patterns=["*.index.json", "*/*"],
            tqdm_class=_bar_class(label, progress),
        )
    except Exception as error:  # the library passes on whatever its HTTP client raises
        raise SourceError(_explain(source, error)) from error
    progress(label, 1, 1, "steps")
    return Path(folder)


def _bar_class(label: str, progress: Progress) -> type:
    """A tqdm class that shows nothing and passes its byte counts to ``progress``."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415

    class ReportingBar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread of its own

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **(options | {"file": io.StringIO()}))

        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B" and self.n and "Reconstruct" in str(self.desc):
                progress(label, int(self.n), int(self.total) if self.total else None, "B")

    return ReportingBar


def _explain(source: HfSource, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{source} could not be downloaded: {reason}\n"
        "without access to the hub: download the repository elsewhere and use path:///its/directory; or fill the hub "
        "cache (HF_HOME) on this machine, or set HF_ENDPOINT to a mirror; for a private repository set HF_TOKEN"
    )
