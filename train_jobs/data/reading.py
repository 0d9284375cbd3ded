"""A chunk enters, its rows leave: mappings of the fields that the task needs, or why a row is none.

Text is decoded strictly; a row with bytes that are not of the encoding is malformed, never patched.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zlib import error as ZlibError  # noqa: N812 - an exception's name

import pyarrow
import pyarrow.parquet
import yaml

from cluster.errors import DataError
from cluster.runs.prepared import BadRow
from train_jobs.data.chunking import Chunk, delimiter, file_encoding, open_binary
from train_jobs.data.spec import TASK_FIELDS

MAX_ROW_BYTES = 64 * 2**20
"""A longer line is malformed; it is skipped without being held."""
_PARQUET_BATCH_ROWS = 1024
_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row: the task's fields by their own names, as the file has them."""

    place: str
    """``file:line``, or ``file:row N``."""
    values: dict[str, Any]


def read_chunk(chunk: Chunk) -> Iterator[Record | BadRow]:
    """The rows of a chunk, good and bad, in order; DataError for a file that is damaged as a whole."""
    root = Path(chunk.root)
    for name in chunk.names:
        try:
            yield from _READERS[chunk.format](chunk, root / name, name)
        except (OSError, EOFError, ZlibError, gzip.BadGzipFile, pyarrow.ArrowException) as error:
            raise DataError(f"{name} cannot be read: {error}") from error


def _read_document(chunk: Chunk, path: Path, name: str) -> Iterator[Record | BadRow]:
    with open_binary(path) as file:
        raw = file.read(MAX_ROW_BYTES + 1)
    if len(raw) > MAX_ROW_BYTES:
        yield _too_long(f"{name}:1", "a document")
        return
    encoding = file_encoding(path, chunk.encoding)
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        yield BadRow(place=f"{name}:{line}", reason=_not_encoded(raw, error, encoding))
        return
    values = {"text": text}
    if chunk.format == "folders":
        values["label"] = name.split("/")[0]
    yield Record(place=name, values=values)


def _read_lines(chunk: Chunk, path: Path, name: str) -> Iterator[Record | BadRow]:
    for place, line in _decoded_lines(chunk, path, name):
        if isinstance(line, BadRow):
            yield line
        elif line.strip():
            yield Record(place=place, values={"text": line})


def _read_jsonl(chunk: Chunk, path: Path, name: str) -> Iterator[Record | BadRow]:
    for place, line in _decoded_lines(chunk, path, name):
        if isinstance(line, BadRow):
            yield line
        elif line.strip():
            yield _json_row(chunk, place, line)


def _json_row(chunk: Chunk, place: str, line: str) -> Record | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(place=place, reason=f"not JSON: {error}")
    if not isinstance(row, dict):
        return BadRow(place=place, reason=f"not a JSON object but {type(row).__name__}")
    return _pick(chunk, place, row)


def _pick(chunk: Chunk, place: str, row: dict[str, Any]) -> Record | BadRow:
    """The fields that the task needs, by their own names."""
    columns = {field: getattr(chunk.fields, field) for field in TASK_FIELDS[chunk.task]}
    missing = [column for column in columns.values() if row.get(column) is None]
    if missing:
        held = ", ".join(map(repr, list(row)[:10])) or "nothing"
        return BadRow(place=place, reason=f"no {', '.join(map(repr, missing))}; it has {held}")
    return Record(place=place, values={field: row[column] for field, column in columns.items()})


def _read_csv(chunk: Chunk, path: Path, name: str) -> Iterator[Record | BadRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    encoding = file_encoding(path, chunk.encoding)
    with open_binary(path) as file:
        # Bytes that are not of the encoding become lone surrogates, so that they spoil their own row only.
        text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter(name), strict=True)
        header = [column.removeprefix("\ufeff") for column in next(reader)]
        while True:
            place = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(place=place, reason=f"not CSV: {error}")
                continue
            except UnicodeDecodeError as error:  # of two or four bytes a character: nothing after it is readable
                yield BadRow(place=place, reason=f"not {encoding}: {error.reason}")
                return
            if cells:
                yield _csv_row(chunk, place, header, cells, encoding)


def _csv_row(chunk: Chunk, place: str, header: list[str], cells: list[str], encoding: str) -> Record | BadRow:
    if len(cells) != len(header):
        return BadRow(place=place, reason=f"{len(cells)} columns, but the header has {len(header)}")
    if any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell):
        return BadRow(place=place, reason=f"not {encoding}; set `encoding` to what it is")
    return _pick(chunk, place, dict(zip(header, cells, strict=True)))


def _read_parquet(chunk: Chunk, path: Path, name: str) -> Iterator[Record | BadRow]:
    columns = [getattr(chunk.fields, field) for field in TASK_FIELDS[chunk.task]]
    row = chunk.first_row
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[chunk.start], columns=columns):
            for values in batch.to_pylist():
                yield _pick(chunk, f"{name}:row {row}", values)
                row += 1


def _read_dialogs(chunk: Chunk, path: Path, name: str) -> Iterator[Record | BadRow]:
    for record in _read_document(chunk, path, name):
        if isinstance(record, BadRow):
            yield record
            return
        try:
            document = yaml.compose(record.values["text"], Loader=yaml.CSafeLoader)  # JSON is YAML
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = 1 if mark is None else mark.line + 1
            yield BadRow(place=f"{name}:{line}", reason=f"not YAML: {getattr(error, 'problem', error)}")
            return
        yield from _conversations(document, name)


def _conversations(document: yaml.Node | None, name: str) -> Iterator[Record | BadRow]:
    nodes = _entry(document, "conversations")
    if not isinstance(nodes, yaml.SequenceNode):
        yield BadRow(place=f"{name}:1", reason="no list of `conversations`")
        return
    for node in nodes.value:
        place = f"{name}:{node.start_mark.line + 1}"
        turns = node.value if isinstance(node, yaml.SequenceNode) else None
        if turns is None or not all(isinstance(turn, yaml.ScalarNode) for turn in turns):
            yield BadRow(place=place, reason="a conversation must be a list of texts, the user's first")
            continue
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": turn.value} for index, turn in enumerate(turns)]
        yield Record(place=place, values={"messages": messages})


def _entry(node: yaml.Node | None, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), None)


def _decoded_lines(chunk: Chunk, path: Path, name: str) -> Iterator[tuple[str, str | BadRow]]:
    """The chunk's lines without their ends, each with its place."""
    encoding = file_encoding(path, chunk.encoding)
    with open_binary(path) as file:
        source = file
        if encoding in ("utf-16", "utf-32"):
            try:
                source = io.BytesIO(file.read().decode(encoding).encode())
            except UnicodeDecodeError as error:
                yield name, BadRow(place=f"{name}:1", reason=f"not {encoding}: {error.reason}")
                return
            encoding = "utf-8"
        source.seek(chunk.start)
        for number, raw in enumerate(_raw_lines(source, chunk.stop), start=chunk.first_row):
            place = f"{name}:{number}"
            if raw is None:
                yield place, _too_long(place, "a line")
                continue
            try:
                line = raw.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield place, BadRow(place=place, reason=_not_encoded(raw, error, encoding))
                continue
            yield place, line.removeprefix("\ufeff") if number == 1 else line


def _raw_lines(file: BinaryIO, stop: int | None) -> Iterator[bytes | None]:
    """Lines that begin before ``stop``; None for one that is too long."""
    while stop is None or file.tell() < stop:
        line = file.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_PIECE_BYTES)
            yield None
        else:
            yield line


def _too_long(place: str, what: str) -> BadRow:
    return BadRow(place=place, reason=f"{what} of more than {MAX_ROW_BYTES} bytes; cut it into smaller ones")


def _not_encoded(raw: bytes, error: UnicodeDecodeError, encoding: str) -> str:
    wrong = raw[error.start : error.start + 1].hex().upper()
    return f"byte {error.start} (0x{wrong}) is not {encoding}; set `encoding` to what it is"


_READERS = {
    "folders": _read_document,
    "text": _read_document,
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "dialogs": _read_dialogs,
}
