"""Files become rows: every format, odd encodings, and malformed rows told by file and line."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cluster.errors import DataError, SourceError
from cluster.runs.prepared import BadRow
from tests.support.corpora import input_of, read_rows, write_jsonl
from train_jobs.data import chunking, reading
from train_jobs.data.fetching import fetch
from train_jobs.data.reading import Record


def values(rows: list[Record | BadRow]) -> list[Any]:
    return [row.values if isinstance(row, Record) else (row.place, row.reason) for row in rows]


def texts(rows: list[Record | BadRow]) -> list[Any]:
    return [row.values["text"] if isinstance(row, Record) else row.place for row in rows]


def test_a_text_file_is_a_document_and_the_folder_above_it_is_its_label(tmp_path: Path) -> None:
    for name in ("news/sport/b.txt", "news/art/a.txt", "news/README", "news/.git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of\n{name}")
    rows = read_rows(tmp_path / "news", "folders", "classify")
    assert values(rows) == [
        {"text": "text of\nnews/art/a.txt", "label": "art"},
        {"text": "text of\nnews/sport/b.txt", "label": "sport"},
    ]
    assert texts(read_rows(tmp_path / "news", "text", "lm")) == [
        "text of\nnews/art/a.txt",
        "text of\nnews/sport/b.txt",
    ]
    assert texts(read_rows(tmp_path / "news", "text", "lm", files="sport/*")) == ["text of\nnews/sport/b.txt"]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 2**20])
def test_lines_are_the_same_however_a_file_is_cut(
    tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes(
        "\ufeffone\r\n\ntwo é\nthree, a longer line than the others\nbad \xff\nlast".encode("latin-1", "replace")
    )
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo \xc3\xa9\nthree, a longer line\nbad \xff\nlast")
    rows = read_rows(path, "lines", "lm")
    assert texts(rows) == ["one", "two é", "three, a longer line", "a.txt:5", "last"]
    assert [row.place for row in rows] == ["a.txt:1", "a.txt:3", "a.txt:4", "a.txt:5", "a.txt:6"]
    assert isinstance(rows[3], BadRow)
    assert rows[3].reason == "byte 4 (0xFF) is not utf-8; set `encoding` to what it is"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("größer\nzwei".encode(encoding))
    assert texts(read_rows(path, "lines", "lm")) == ["größer", "zwei"]
    assert texts(read_rows(path, "text", "lm")) == ["größer\nzwei"]


def test_another_encoding_is_read_when_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("costs £5".encode("latin-1"))
    assert texts(read_rows(path, "text", "lm", encoding="latin-1")) == ["costs £5"]
    (bad,) = read_rows(path, "text", "lm")
    assert isinstance(bad, BadRow)
    assert (bad.place, bad.reason) == ("a.txt:1", "byte 6 (0xA3) is not utf-8; set `encoding` to what it is")


def test_packed_files_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert texts(read_rows(tmp_path, "jsonl", "lm")) == ["one", "two"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n')[:-6])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        read_rows(tmp_path, "jsonl", "lm")


def test_malformed_lines_of_json_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n[1]\n{"body": "x"}\n{"text": null}\n\n{"text": "fine"}\n')
    rows = values(read_rows(path, "jsonl", "lm"))
    assert rows[0] == {"text": "good"}
    assert rows[1][0] == "rows.jsonl:2"
    assert rows[1][1].startswith("not JSON: Expecting value")
    assert rows[2] == ("rows.jsonl:3", "not a JSON object but list")
    assert rows[3] == ("rows.jsonl:4", "no 'text'; it has 'body'")
    assert rows[4] == ("rows.jsonl:5", "no 'text'; it has 'text'")
    assert rows[5] == {"text": "fine"}


def test_a_huge_line_is_skipped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 20)
    monkeypatch.setattr(reading, "_PIECE_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_text("short\n" + 100 * "x" + "\nshort too\n" + 100 * "y")
    rows = read_rows(path, "lines", "lm")
    assert texts(rows) == ["short", "a.txt:2", "short too", "a.txt:4"]
    assert isinstance(rows[1], BadRow)
    assert rows[1].reason == "a line of more than 20 bytes; cut it into smaller ones"
    assert texts(read_rows(path, "text", "lm")) == ["a.txt:1"]


def test_csv_rows_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text,label\n1,"two\nlines, one row",x\n2,short\n3,"a ""quoted"" word",y\n4,caf\xe9,z\n')
    rows = values(read_rows(path, "csv", "classify"))
    assert rows[0] == {"text": "two\nlines, one row", "label": "x"}
    assert rows[1] == ("a.csv:4", "2 columns, but the header has 3")
    assert rows[2] == {"text": 'a "quoted" word', "label": "y"}
    assert rows[3] == ("a.csv:6", "not utf-8; set `encoding` to what it is")


def test_tabs_separate_tsv_and_columns_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("\ufeffbody\ttopic\nhello, world\tgreeting\n")
    fields = input_of(tmp_path, "csv").fields
    fields = type(fields)(text="body", label="topic", messages="", prompt="", chosen="", rejected="")
    assert values(read_rows(tmp_path, "csv", "classify", fields=fields)) == [
        {"text": "hello, world", "label": "greeting"}
    ]


def test_parquet_is_read_by_row_group(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", None, "c"], "label": [1, 2, 3], "other": [0, 0, 0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    rows = values(read_rows(tmp_path, "parquet", "classify"))
    assert rows[0] == {"text": "a", "label": 1}
    assert rows[1] == ("a.parquet:row 2", "no 'text'; it has 'text', 'label'")
    assert rows[2] == {"text": "c", "label": 3}


def test_missing_columns_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,label\nx,y\n")
    with pytest.raises(DataError, match=r"a\.csv has no column 'text'; it has 'body', 'label'; name the right"):
        read_rows(tmp_path, "csv", "lm")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text', 'label'; it has 'body'"):
        read_rows(tmp_path, "parquet", "classify")
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file"):
        read_rows(tmp_path, "parquet", "lm")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match="it has none"):
        read_rows(tmp_path, "csv", "lm")


def test_dialogs_alternate_and_say_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "talk.yml"
    path.write_text(
        "categories:\n- x\nconversations:\n- - Is it so?\n  - Yes\n- just text\n- - Hm\n  - 1984\n  - Oh\n"
    )
    rows = values(read_rows(path, "dialogs", "sft"))
    assert rows[0] == {
        "messages": [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes"}]
    }
    assert rows[1] == ("talk.yml:6", "a conversation must be a list of texts, the user's first")
    assert [turn["content"] for turn in rows[2]["messages"]] == ["Hm", "1984", "Oh"]
    (tmp_path / "talk.json").write_text('{"conversations": [["a", "b"]]}')
    path.unlink()
    assert len(values(read_rows(tmp_path, "dialogs", "sft"))[0]["messages"]) == 2


def test_broken_dialogs_are_one_malformed_row(tmp_path: Path) -> None:
    path = tmp_path / "talk.yml"
    path.write_text("conversations:\n- - 'open\n")
    ((place, reason),) = values(read_rows(path, "dialogs", "sft"))
    assert place == "talk.yml:3"
    assert reason.startswith("not YAML")
    path.write_text("- a\n- b\n")
    assert values(read_rows(path, "dialogs", "sft")) == [("talk.yml:1", "no list of `conversations`")]


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist on this machine"):
        read_rows(tmp_path / "nowhere", "text", "lm")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"no file for format text \(.*\*\.txt.*\); it has a\.pdf"):
        read_rows(tmp_path, "text", "lm")
    with pytest.raises(SourceError, match="ftp:// is not a scheme of data sources"):
        read_rows(tmp_path, "text", "lm", source="ftp://x")


def test_pinned_bytes_are_checked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(SourceError, match="but 0000 is pinned"):
        read_rows(path, "jsonl", "lm", sha256="0000")


def test_the_digest_is_over_names_and_contents(tmp_path: Path) -> None:
    def digest() -> str:
        spec = input_of(tmp_path, "text")
        return fetch(spec, downloads=tmp_path, work=tmp_path, progress=lambda *_: None).digest

    (tmp_path / "a.txt").write_text("one")
    first = digest()
    (tmp_path / "ignored.pdf").write_text("x")
    assert digest() == first
    (tmp_path / "a.txt").write_text("two")
    second = digest()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, digest()}) == 3
