"""The hash of a document enters, the split it belongs to leaves; adding or removing others moves nobody.

Every label is held out at the same rate, since hash and label have nothing to do with each other. Equal documents
have equal hashes, so none is in both splits.
"""

import hashlib

from cluster.runs.prepared import Split
from train_jobs.data.spec import SplitSpec


def content_hash(*parts: str) -> bytes:
    """16 bytes that identify a document by its text."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def split_of(key: bytes, spec: SplitSpec) -> Split:
    """The split of the document whose hash (or whose prompt's hash) is ``key``."""
    drawn = hashlib.blake2b(key, digest_size=8, salt=(spec.seed % 2**64).to_bytes(8, "little")).digest()
    return "eval" if int.from_bytes(drawn, "little") < spec.eval_fraction * 2**64 else "train"
