"""Rows from files of every format, folders, globs and Hub datasets, and what is wrong with them."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poweropd.data import sources
from poweropd.errors import UsageError

ROWS = [{"problem": "1+2", "answer": "3"}, {"problem": "4,5\nor ü?", "answer": "9"}]
Rows = Sequence[dict[str, Any]]


def as_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_json(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_parquet(rows: Rows) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def as_csv(rows: Rows) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "parquet": as_parquet,
    "csv": as_csv,
}


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def read(source: object, split: str = "train") -> list[Any]:
    return [row for _, row in sources.placed_rows(str(source), split)]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_rows(tmp_path: Path, name: str, ending: str) -> None:
    assert read(write(tmp_path / f"rows.{name}{ending}", FORMATS[name](ROWS))) == ROWS


def test_marks_and_line_ends_of_other_systems_change_nothing(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    for name in ("jsonl", "json", "csv"):
        content = FORMATS[name](ROWS[:1]).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n\r\n")
        assert read(write(tmp_path / f"rows.{name}", mark + content + b"\r\n")) == ROWS[:1]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"a": texts, "b": texts}), min_size=1, max_size=4))
def test_any_text_comes_back_from_any_format(tmp_path: Path, rows: Rows) -> None:
    rows = [{"a": f"x{row['a']}", "b": row["b"]} for row in rows]  # no line that is blank
    for name, form in FORMATS.items():
        assert read(write(tmp_path / f"rows.{name}", form(rows))) == rows


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    shards = [[{"problem": f"{shard} {i}"} for i in range(3)] for shard in range(3)]
    for number, rows in reversed(list(enumerate(shards))):
        write(tmp_path / "deep" / f"part-{number}.jsonl.gz", as_jsonl(rows))
    write(tmp_path / ".cache" / "part-9.jsonl", as_jsonl(ROWS))
    write(tmp_path / "README.txt", b"no data")
    everything = [row for rows in shards for row in rows]
    assert read(tmp_path) == everything
    assert read(tmp_path / "deep" / "part-*.gz") == everything
    assert read(tmp_path / "**" / "part-[01]*") == shards[0] + shards[1]


def test_files_of_a_folder_that_are_named_by_splits_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.parquet", as_parquet(ROWS[:1]))
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", as_parquet(ROWS[1:]))
    assert read(tmp_path) == ROWS[:1]
    assert read(tmp_path, "validation") == read(tmp_path, "dev") == ROWS[1:]
    with pytest.raises(UsageError, match="expected files of split 'test', got data/train-0"):
        read(tmp_path, "test")


def test_a_folder_of_several_formats_or_of_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file of \.jsonl, \.json, .* in this folder"):
        read(tmp_path)
    write(tmp_path / "a.jsonl", as_jsonl(ROWS))
    write(tmp_path / "b.csv", as_csv(ROWS))
    with pytest.raises(UsageError, match=r"expected files of one format, got \.csv, \.jsonl"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"x\*\.csv: no file has such a name"):
        read(tmp_path / "x*.csv")
    with pytest.raises(UsageError, match=r"nowhere: cannot read it \(No such file"):
        read(tmp_path / "nowhere")


def test_a_copy_of_a_hub_dataset_is_read_by_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n"
        for name in ("one", "two")
    )
    write(Path("owner/sums/README.md"), f"{card}---\n".encode())
    for name, row in zip(("one", "two"), ROWS, strict=True):
        write(Path(f"owner/sums/{name}.jsonl"), as_jsonl([row]))
    assert [row for _, row in sources.placed_rows("owner/sums", config="two")] == ROWS[1:]
    with pytest.raises(UsageError, match=r"Config name is missing.* \['one', 'two'"):
        read("owner/sums")
    with pytest.raises(UsageError, match="split 'test', revision None"):
        list(sources.placed_rows("owner/sums", "test", "one"))


CUT = gzip.compress(as_jsonl(ROWS) * 100)[:-20]
BAD: dict[str, tuple[str, bytes, str]] = {
    "JSON": ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl:3: expected one JSON object per line"),
    "UTF-8": ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: .*can't decode byte 0xff"),
    "UTF-16": ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), r"a\.jsonl:1: .*"),
    "deep": ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: .*nested too deep"),
    "array": ("a.json", b'[{"a": 1},\n{"a" 2}]', r"a\.json:2: expected a JSON array of objects"),
    "array UTF-8": ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', r"a\.json:2: expected text in UTF-8"),
    "deep array": ("a.json", b"[" * 100_000, r"a\.json: expected a JSON array of objects"),
    "no objects": ("a.json", b"[1, 2]", r"a\.json: row 0: expected a JSON object, got int"),
    "CSV cells": ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: expected 2 cells, .* got 1"),
    "CSV quote": ("a.csv", b'a,b\n"1,2\n3,4\n', r"a\.csv:2: expected a line of CSV"),
    "CSV names": ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: expected names of columns that differ"),
    "CSV UTF-8": ("a.csv", b"a,b\n1,2\n\xff,3\n", r"a\.csv:3: expected text in UTF-8"),
    "Parquet": ("a.parquet", b"PAR1 none", r"a\.parquet: cannot read it as a Parquet file"),
    "gzip": ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: cannot read it \(Not a gzipped file"),
    "cut gzip": ("a.jsonl.gz", CUT, r"a\.jsonl\.gz: cannot read it \(Compressed file ended"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_that_names_the_place(tmp_path: Path, name: str) -> None:
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path / file)
    assert "\n" not in str(caught.value)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", as_jsonl(ROWS) + b"{broken\n")
    rows = sources.placed_rows(path)
    assert [next(rows) for _ in ROWS] == [(f"{path}:{i}", row) for i, row in enumerate(ROWS, 1)]


def test_dots_lead_into_nested_columns() -> None:
    row = {"a": {"b": {"c": 1}, "x": None}, "a.x": 2, "t": '{"b": {"c": 3}}', "list": [1]}
    assert sources.value_at(row, "a.b.c") == 1
    assert sources.value_at(row, "a.x") == 2  # a column of that very name comes first
    assert sources.value_at(row, "t.b.c") == 3
    for absent in ("a.y", "b", "t.z", "list.0", "a.b.c.d", "a..b"):
        with pytest.raises(KeyError):
            sources.value_at(row, absent)
    with pytest.raises(UsageError, match=r"here: expected text in column 'q', .* a\.b, a\.x, t"):
        sources.text_at("here", {"a": {"b": 1, "x": 2}, "t": ""}, "q")


def test_messages_in_a_cell_are_parsed_and_other_texts_are_not(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi, you"}]
    cells = [json.dumps(messages), "[1, 2]", "[not JSON", '[{"a": 1}]', "[]"]
    found = read(write(tmp_path / "a.csv", as_csv([{"prompt": cell} for cell in cells])))
    assert [row["prompt"] for row in found] == [messages, *cells[1:]]
