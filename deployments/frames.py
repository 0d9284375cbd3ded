"""One message to the bytes of one frame, and back. No I/O.

::

    0      4          8            12            16            20          24                    payload
    | MNT2 | head crc | length crc | payload crc | message len | buffers n | n u32 lengths | message | buffers ..

All integers are little-endian; each CRC-32 covers a part of its own: the rest of the head, the lengths, the payload.
So a damaged length is refused at once and never waited for. The message is msgpack (never pickle), checked against
:data:`deployments.messages.AnyMessage`; buffers are raw bytes (tensors).
"""

import struct
import zlib
from collections.abc import Sequence

import msgspec

from deployments.messages import AnyMessage

Buffer = bytes | bytearray | memoryview

MAGIC = b"MNT2"
MAX_FRAME_BYTES = 256 * 2**20

_MARK = struct.Struct("<4sI")
_HEAD = struct.Struct("<IIII")
_HEAD_BYTES = _MARK.size + _HEAD.size
_MAX_BUFFERS = 64
_JOINED_BYTES = 64 * 2**10  # up to here one write of a copy is cheaper than several

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


class CorruptFrame(Exception):
    """What arrived is not a frame of ours: wrong magic, length, checksum or type."""


def encode(message: AnyMessage, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """The parts of one frame, in order; buffers are not copied."""
    body = _encoder.encode(message)
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    lengths = struct.pack(f"<{len(views)}I", *(len(view) for view in views))
    total = _HEAD_BYTES + len(lengths) + len(body) + sum(len(view) for view in views)
    if total > MAX_FRAME_BYTES:
        raise ValueError(f"a {type(message).__name__} of {total} bytes exceeds the frame limit {MAX_FRAME_BYTES}")
    checksum = zlib.crc32(body)
    for view in views:
        checksum = zlib.crc32(view, checksum)
    rest = _HEAD.pack(zlib.crc32(lengths), checksum, len(body), len(views))
    head = _MARK.pack(MAGIC, zlib.crc32(rest)) + rest + lengths
    if total <= _JOINED_BYTES:
        return [b"".join((head, body, *views))]
    return [head, body, *views]


def measure(view: memoryview) -> tuple[int, tuple[int, ...]] | None:
    """Length of the frame that begins ``view`` and of its message and buffers; None before that much has arrived.

    Raises CorruptFrame for what is no beginning of a frame.
    """
    if len(view) < _HEAD_BYTES:
        return None
    magic, head_checksum = _MARK.unpack_from(view)
    lengths_checksum, _, body_bytes, num_buffers = _HEAD.unpack_from(view, _MARK.size)
    if magic != MAGIC or zlib.crc32(view[_MARK.size : _HEAD_BYTES]) != head_checksum or num_buffers > _MAX_BUFFERS:
        raise CorruptFrame("sent something that is not a frame")
    stop = _HEAD_BYTES + 4 * num_buffers
    if len(view) < stop:
        return None
    if zlib.crc32(view[_HEAD_BYTES:stop]) != lengths_checksum:
        raise CorruptFrame("sent a frame whose lengths do not match their checksum")
    lengths = (body_bytes, *struct.unpack_from(f"<{num_buffers}I", view, _HEAD_BYTES))
    if sum(lengths) > MAX_FRAME_BYTES:
        raise CorruptFrame(f"announced a frame above the limit of {MAX_FRAME_BYTES} bytes")
    return stop + sum(lengths), lengths


def decode(view: memoryview, lengths: tuple[int, ...]) -> tuple[AnyMessage, list[bytes]]:
    """Message and buffers of a whole frame; raises CorruptFrame."""
    start = len(view) - sum(lengths)
    _, checksum, _, _ = _HEAD.unpack_from(view, _MARK.size)
    if zlib.crc32(view[start:]) != checksum:
        raise CorruptFrame("sent a frame whose checksum does not match")
    parts = []
    for length in lengths:
        parts.append(view[start : start + length])
        start += length
    try:
        return _decoder.decode(parts[0]), [bytes(part) for part in parts[1:]]
    except msgspec.MsgspecError as error:
        raise CorruptFrame(f"sent a message that does not decode: {error}") from error
