"""The Hugging Face hub: a snapshot of a repository's safetensors, tokenizer and configuration in the hub's own cache.

The hub library's settings (``HF_ENDPOINT`` for a mirror, ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``) apply.
"""

from pathlib import Path

import requests

from cluster.errors import SourceError
from cluster.registry.progress import Progress
from cluster.registry.sources.screen import TAKEN_PATTERNS
from cluster.registry.sources.uri import HubSource


def download_snapshot(source: HubSource, progress: Progress) -> Path:
    """A local directory with the wanted files of ``source``; SourceError saying what to do when it cannot be had."""
    # Imported here: half a second that no other command needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    label = f"downloading {source.repo}"
    progress(label, 0, None, "B")
    try:
        folder = Path(
            snapshot_download(source.repo, revision=source.revision, allow_patterns=list(TAKEN_PATTERNS), tqdm_class=None)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, requests.RequestException) as error:
        raise SourceError(_explain(source, error)) from error
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    progress(label, num_bytes, num_bytes, "B")
    return folder


def _explain(source: HubSource, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"hf://{source.repo}@{source.revision or 'main'} could not be downloaded: {reason}\n"
        "without access to the hub: download the repository elsewhere and use path:///its/directory; or fill the hub cache "
        "(HF_HOME) on this machine, or set HF_ENDPOINT to a mirror; for a private repository set HF_TOKEN"
    )
