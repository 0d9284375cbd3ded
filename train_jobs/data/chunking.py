"""The files of an input enter, pieces of work leave: a few megabytes each, cut where a row ends.

How an input is cut depends on its bytes only, never on how many workers there are. Columns are looked up here, before
any work is done.
"""

import codecs
import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow
import pyarrow.parquet

from cluster.config.jobs import Format
from cluster.config.jobs_train import JobTask
from cluster.errors import DataError
from train_jobs.data.fetching import Found
from train_jobs.data.spec import TASK_FIELDS, Fields, InputSpec

CHUNK_BYTES = 4 * 2**20
_MAX_FILES_OF_CHUNK = 256
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""In the order to try: UTF-32's little-endian mark begins with UTF-16's."""
_WIDE = ("utf-16", "utf-32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One piece of work: some whole files, or the rows of one file that begin in a range."""

    number: int
    source: int
    """Index of the input."""
    format: Format
    task: JobTask
    fields: Fields
    encoding: str
    root: str
    names: tuple[str, ...]
    start: int = 0
    """First byte; for parquet, the row group."""
    stop: int | None = None
    """Byte after the last; None is the end of the file."""
    first_row: int = 1
    """Number of the first line or row, counted from 1."""


def cut(found: Found, spec: InputSpec, task: JobTask, *, source: int, first_number: int) -> list[Chunk]:
    """The chunks of an input, in order; DataError when a file lacks a column, or cannot be read at all."""
    chunks: list[Chunk] = []
    for names, start, stop, first_row in _cuts(found, spec, task):
        chunks.append(
            Chunk(
                number=first_number + len(chunks),
                source=source,
                format=spec.format,
                task=task,
                fields=spec.fields,
                encoding=spec.encoding,
                root=str(found.root),
                names=names,
                start=start,
                stop=stop,
                first_row=first_row,
            )
        )
    return chunks


_Cut = tuple[tuple[str, ...], int, int | None, int]


def _cuts(found: Found, spec: InputSpec, task: JobTask) -> Iterator[_Cut]:
    columns = [getattr(spec.fields, field) for field in TASK_FIELDS[task]]
    if spec.format in ("folders", "text", "dialogs"):
        yield from _group_files(found)
        return
    for name in found.names:
        path = found.root / name
        if spec.format == "parquet":
            yield from _row_groups(path, name, columns)
        elif spec.format == "csv":
            _check_header(path, name, columns, spec.encoding)
            yield (name,), 0, None, 1
        elif name.endswith(".gz") or file_encoding(path, spec.encoding) in _WIDE:
            yield (name,), 0, None, 1
        else:
            for start, stop, first_row in _line_ranges(path):
                yield (name,), start, stop, first_row


def _group_files(found: Found) -> Iterator[_Cut]:
    group: list[str] = []
    num_bytes = 0
    for name in found.names:
        group.append(name)
        num_bytes += (found.root / name).stat().st_size
        if num_bytes >= CHUNK_BYTES or len(group) == _MAX_FILES_OF_CHUNK:
            yield tuple(group), 0, None, 1
            group, num_bytes = [], 0
    if group:
        yield tuple(group), 0, None, 1


def _line_ranges(path: Path) -> Iterator[tuple[int, int, int]]:
    """Ranges of whole lines, and the number of the first line of each."""
    start, stop, first_row, num_lines = 0, 0, 1, 0
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            last = block.rfind(b"\n")
            if last >= 0:
                end = stop + last + 1
                yield start, end, first_row
                first_row += num_lines + block.count(b"\n")
                start, num_lines = end, 0
            stop += len(block)
    if start < stop:
        yield start, stop, first_row


def _row_groups(path: Path, name: str, columns: list[str]) -> Iterator[_Cut]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(name, columns, file.schema_arrow.names)
            sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{name} is not a parquet file: {error}") from error
    first_row = 1
    for index, size in enumerate(sizes):
        yield (name,), index, None, first_row
        first_row += size


def _check_header(path: Path, name: str, columns: list[str], encoding: str) -> None:
    with open_binary(path) as file:
        raw = file.read(2**20)
    text = raw.decode(file_encoding(path, encoding), errors="replace").lstrip("\ufeff")
    header = next(csv.reader(text.splitlines(keepends=True), delimiter=delimiter(name)), [])
    _check_columns(name, columns, header)


def _check_columns(name: str, columns: list[str], present: list[str]) -> None:
    missing = [column for column in columns if column not in present]
    if missing:
        raise DataError(
            f"{name} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, present)) or 'none'}"
            "; name the right ones under `fields`"
        )


def delimiter(name: str) -> str:
    """What separates the columns of this csv file."""
    return "\t" if name.removesuffix(".gz").endswith(".tsv") else ","


def open_binary(path: Path) -> BinaryIO:
    """A reader of the file's content, unpacked where its name ends with ``.gz``."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def file_encoding(path: Path, encoding: str) -> str:
    """The encoding to read a file with: that of its byte order mark where ``utf-8`` is asked for."""
    if encoding != "utf-8":
        return encoding
    with open_binary(path) as file:
        beginning = file.read(4)
    return next((found for mark, found in _BOMS.items() if beginning.startswith(mark)), encoding)
