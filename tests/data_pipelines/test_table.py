import csv
import gzip
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_pipelines import sources
from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.fetch import FetchOptions
from data_pipelines.records import Record
from data_pipelines.sources import table
from data_pipelines.testing import Web, draw
from data_pipelines.write import WriteOptions, write_shards

Rows = list[dict[str, Any]]
FORMATS = ("csv", "tsv", "json", "jsonl", "ndjson", "parquet")


def encode(rows: Rows, suffix: str) -> bytes:
    """The rows as a file of one format; lists become JSON in the cells of csv and tsv."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if suffix in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="," if suffix == "csv" else "\t")
        writer.writerow(names)
        for row in rows:
            cells = (row.get(name) for name in names)
            writer.writerow(json.dumps(cell) if isinstance(cell, list) else cell for cell in cells)
        return text.getvalue().encode()
    if suffix == "parquet":
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), stream)
        return stream.getvalue()
    if suffix == "json":
        return json.dumps(rows).encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(path: Path | str, **settings: Any) -> list[Record]:
    return list(table.iter_records(table.Config(path=path, **settings)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str, packed: bool) -> None:
    rows: Rows = [
        {"image_path": f"pics/{n}.png", "caption": f'text, {n}\tof "five"', "alt": [f"alt {n}", "ä"], "kind": f"k{n}"}
        for n in range(5)
    ]  # fmt: skip
    path = tmp_path / f"five.{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(encode(rows, suffix)) if packed else encode(rows, suffix))
    records = read(path, caption_col=("caption", "alt"), label_col=("kind",))
    assert [record.image for record in records] == [tmp_path / f"pics/{n}.png" for n in range(5)]
    assert [record.origin for record in records] == [f"pics/{n}.png" for n in range(5)]
    assert [record.captions for record in records] == [(f'text, {n}\tof "five"', f"alt {n}", "ä") for n in range(5)]
    assert [record.labels for record in records] == [(f"k{n}",) for n in range(5)]
    assert {record.source for record in records} == {"five"}
    assert not any(record.problem or record.extra for record in records)
    config = table.Config(path=path)
    assert table.count(config) == (5 if suffix == "parquet" and not packed else None)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
cells = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | words


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(st.tuples(st.lists(words, max_size=3), st.lists(words, max_size=2), cells), min_size=1, max_size=6)
)
@example([(["[]", '["a"]', "\u2028", "\r\n x"], ["\x1f"], None)])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_tables_come_back_as_they_were_written(tmp_path: Path, suffix: str, data: Any) -> None:
    path = tmp_path / f"table.{suffix}"
    rows: Rows = [
        {"url": f"{n}.png", "captions": captions, "labels": labels, "note": note if "json" in suffix else "plain"}
        for n, (captions, labels, note) in enumerate(data)
    ]
    path.write_bytes(encode(rows, suffix))
    records = read(path)
    assert len(records) == len(rows)
    for row, record in zip(rows, records, strict=True):
        expected = tuple(
            tuple(dict.fromkeys(t.strip() for t in row[name] if t.strip())) for name in ("captions", "labels")
        )
        assert (record.captions, record.labels) == expected
        assert record.origin == row["url"]
        assert record.extra == {"note": row["note"]}
        assert record.problem.partition(":")[0] == ("" if any(expected) else "no_caption")


def test_rows_that_are_no_samples_are_counted_and_the_others_stay_in_order(tmp_path: Path) -> None:
    lines = [
        b"url,caption,score", b"a.png,first,1", b"b.png,,2", b",no picture,3", b"c.png,too,many,cells", b"d.png,few",
        b"", b"e.png,caf\xe9,5", b" f.png , last ,6", b"   ,blank,7",
    ]  # fmt: skip
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    records = read(tmp_path / "t.csv")
    assert [(record.origin, record.problem.partition(":")[0]) for record in records] == [
        ("a.png", ""), ("b.png", "no_caption"), ("t.csv#2", "no_image"), ("t.csv#3", "bad_row"), ("t.csv#4", "bad_row"),
        ("e.png", "bad_text"), ("f.png", ""), ("t.csv#7", "no_image"),
    ]  # fmt: skip
    assert "line 5 has 4 cells, the first 3" in records[3].problem
    assert records[0].extra == {"score": "1"}
    assert records[-2].captions == ("last",)


def test_bad_lines_of_jsonl(tmp_path: Path) -> None:
    good = '{"url": "%s", "caption": "c", "score": %s}'
    lines = [
        "{",
        good % ("a", 1),
        "[1]",
        "",
        good % ("b", "NaN"),
        '{"url": 7, "caption": "c"}',
        '{"url": "c", "caption": {}}',
    ]
    lines += ['{"url": "d", "caption": "\\ud800"}', "[" * 100_000, '{"url": "e", "caption": 5, "more": {"x": [1]}}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    records = read(tmp_path / "t.jsonl")
    assert [record.problem.partition(":")[0] for record in records] == [
        "bad_row", "", "bad_row", "", "no_image", "bad_text", "bad_text", "bad_row", "",
    ]  # fmt: skip
    assert records[3].extra == {"score": None}
    assert records[-1].captions == ("5",)
    assert records[-1].extra == {"more": '{"x": [1]}'}


def test_a_list_of_addresses_needs_no_text(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("https://example.org/a.png\n\n  b.png\ns3://bucket/c.png\nfile:///x/d%20e.png\n")
    records = read(tmp_path / "urls.txt")
    assert [record.image for record in records] == [
        "https://example.org/a.png", tmp_path / "b.png", "s3://bucket/c.png", Path("/x/d e.png"),
    ]  # fmt: skip
    assert not any(record.problem or record.captions for record in records)


def test_pictures_inside_parquet(tmp_path: Path) -> None:
    """As Hugging Face's image columns hold them, and as plain bytes."""
    picture = draw()
    cells = [(picture, "a.png"), (picture, None), (None, "c.png"), (None, None)]
    rows = [{"image": {"bytes": content, "path": path}, "text": "t"} for content, path in cells]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hf.parquet")
    records = read(tmp_path / "hf.parquet")
    assert [record.image for record in records] == [picture, picture, tmp_path / "c.png", b""]
    assert [record.origin for record in records] == ["a.png", "hf.parquet#1", "c.png", "hf.parquet#3"]
    assert [record.problem[:8] for record in records] == ["", "", "", "no_image"]
    pq.write_table(pa.table({"jpeg": [picture], "text": ["x"], "raw": [b"\0"]}), tmp_path / "plain.parquet")
    with pytest.raises(ConfigError, match="column 'raw' holds binary data"):
        read(tmp_path / "plain.parquet", image_col="jpeg")
    assert read(tmp_path / "plain.parquet", image_col="jpeg", columns=())[0].image == picture


def test_parquet_is_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BATCH", 10)
    sizes: list[int] = []
    batches = pq.ParquetFile.iter_batches

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in batches(*args, **options):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    pq.write_table(pa.table({"url": [f"{n}" for n in range(995)], "text": ["t"] * 995}), tmp_path / "t.parquet")
    records = table.iter_records(table.Config(path=tmp_path / "t.parquet"))
    assert next(records).origin == "0"
    assert sum(sizes) <= table.HEAD + 10
    assert [record.origin for record in records] == [str(n) for n in range(1, 995)]


def test_boxes_in_their_spellings(tmp_path: Path) -> None:
    box = {"x0": 0.1, "y0": 0.2, "x1": 0.3, "y1": 1, "label": "cat"}
    values = [[box], [[0.1, 0.2, 0.3, 1, "cat"]], "[[0.1, 0.2, 0.3, 1.0]]", [0, 0, 1, 1], None, "", [], [[0, 0, 9, 9]],
              [[0.5, 0, 0.5, 1]], [[0, 0, 1]], 7, [["a", 0, 1, 1]], [[float("nan"), 0, 1, 1]]]  # fmt: skip
    lines = [json.dumps({"url": f"{n}", "caption": "c", "where": value}) for n, value in enumerate(values)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    records = read(tmp_path / "t.jsonl", box_col="where")
    cat = (0.1, 0.2, 0.3, 1.0, "cat")
    assert [record.boxes for record in records[:7]] == [
        (cat,),
        (cat,),
        ((*cat[:4], ""),),
        ((0.0, 0.0, 1.0, 1.0, ""),),
        (),
        (),
        (),
    ]
    assert [record.problem.partition(":")[0] for record in records] == [""] * 7 + ["bad_box"] * 6


def test_columns_template_and_split(tmp_path: Path) -> None:
    lines = [
        "file_name,label,fold,a,b,source",
        "1.png,great_dane,train,x,y,vendor",
        "2.png,cat,../up,x,y,",
        "3.png,,val-2,x,y,",
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    records = read(tmp_path / "t.csv", template="a photo of a {label}", columns=("b",), split_by="fold")
    assert [(record.captions, record.split, record.extra, record.source) for record in records] == [
        (("a photo of a great dane",), "train", {"b": "y"}, "vendor"),
        (("a photo of a cat",), "", {"b": "y"}, "t"),
        ((), "val-2", {"b": "y"}, "t"),
    ]
    assert [record.problem.partition(":")[0] for record in records] == ["", "bad_split", "no_caption"]


@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        ("a,b", {}, "no column holds the picture; columns are 'a', 'b'; name one with --image-col"),
        ("url,image", {}, r"several columns may hold the picture \(url, image\)"),
        ("url,b", {}, "none of the columns 'url', 'b' is a caption or a label"),
        ("url,text", {"caption_col": ("txet",)}, "there is no column 'txet'; columns are 'url', 'text'"),
        ("url,text", {"columns": ("gone", "away")}, "there is no column 'away', 'gone'"),
        ("url,text,sha256", {"columns": ("sha256",)}, "the writer computes sha256 itself"),
        ("url,text", {"template": "a {label}"}, "has no effect without a label column"),
        ("url,text", {"template": "a"}, r"has no \{label\} in it"),
        ("url,url", {}, "two columns have the same name"),
        ("url,text", {"image_col": "picture"}, "no column holds the picture"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_explained(tmp_path: Path, header: str, settings: dict[str, Any], message: str) -> None:
    cells = ",".join("x" for _ in header.split(","))
    (tmp_path / "t.csv").write_text(f"{header}\n{cells}\n")
    with pytest.raises(PipelineError, match=message):
        read(tmp_path / "t.csv", **settings)


def test_damaged_files_stop_the_job_behind_a_row(tmp_path: Path) -> None:
    rows: Rows = [{"url": f"{n}.png", "caption": f"c{n}" * 50} for n in range(3000)]
    cut = {
        name: encode(rows, "jsonl" if "jsonl" in name else name.split(".")[1])
        for name in ("a.csv", "b.parquet", "c.jsonl.gz", "d.json")
    }
    cut["c.jsonl.gz"] = gzip.compress(cut["c.jsonl.gz"], 0)
    for name, content in cut.items():
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "a.csv").write_bytes(cut["a.csv"] + b'x.png,"never closed\n1,2\n')
    for name in cut:
        with pytest.raises(PipelineError, match=rf"{name}: damaged behind row \d+"):
            read(tmp_path / name)
    (tmp_path / "e.json").write_text('{"images": []}')
    (tmp_path / "f.jsonl").write_text("{")
    with pytest.raises(PipelineError, match="COCO annotations are --kind coco"):
        read(tmp_path / "e.json")
    with pytest.raises(PipelineError, match="none of the first 1 rows can be read; bad_row"):
        read(tmp_path / "f.jsonl")
    with pytest.raises(PipelineError, match="no such table"):
        read(tmp_path / "gone.csv")
    with pytest.raises(PipelineError, match="no parquet file"):
        table.count(table.Config(path=tmp_path / "b.parquet"))


def test_a_folder_of_tables_and_its_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    for name, suffix in (("part-1.parquet", "parquet"), ("part-0.csv.gz", "csv")):
        content = encode([{"URL": f"https://e.org/{name}/{n}", "TEXT": "t", "WIDTH": n} for n in range(3)], suffix)
        (folder / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    for name in ("_SUCCESS", ".hidden.csv", "README.txt", "dataset_infos.json"):
        (folder / name).write_text("not a table of pictures")
    found = sources.resolve(str(folder), "table")
    records = read(folder)
    assert [record.origin.rpartition("/")[2] for record in records] == ["0", "1", "2"] * 2
    assert {record.source for record in records} == {"laion"}
    assert records[-1].extra == {"WIDTH": 2}
    before = table.fingerprint(table.Config(path=folder))
    assert table.fingerprint(table.Config(path=folder)) == before
    (folder / "part-2.csv").write_text("URL,TEXT\nx,y\n")
    assert table.fingerprint(table.Config(path=folder)) != before
    assert found.module.count(found.config) is None
    (tmp_path / "none").mkdir()
    with pytest.raises(PipelineError, match="no table in this folder; looked for .csv, .tsv"):
        read(tmp_path / "none")


def test_a_table_in_an_object_store() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/set/a.png", draw())
    files.pipe(
        "/bucket/set/t.csv", b"path,caption\na.png,here\n/etc/passwd,a local file\nmemory://bucket/set/a.png,there\n"
    )
    found = sources.resolve("memory://bucket/set/t.csv")
    assert found.name == "table"
    records = list(found.module.iter_records(found.config))
    assert [record.image for record in records] == ["memory:///bucket/set/a.png", b"", "memory://bucket/set/a.png"]
    assert records[1].problem.startswith("bad_url: ")
    assert len(found.module.fingerprint(found.config)) == 64
    with pytest.raises(PipelineError, match="no such path"):
        sources.resolve("memory://bucket/none.csv")
    with pytest.raises(PipelineError, match="cannot be opened"):
        sources.resolve("nonsense://bucket/none.csv")


def test_a_parquet_of_addresses_becomes_shards(web: Web, tmp_path: Path) -> None:
    for n in range(10):
        web.routes[f"/{n}.png"] = lambda handler, n=n: handler.answer(draw(seed=n))  # type: ignore[misc]
    web.routes["/private.png"] = lambda handler: handler.answer(draw(), X_Robots_Tag="noai")
    names = [*(f"{n}.png" for n in range(10)), "gone.png", "private.png"]
    columns = {"url": [f"{web.url}/{name}" for name in names], "caption": [f"about {name}" for name in names]}
    columns["url"].append("http://127.0.0.1:1/x.png")
    columns["caption"].append("nobody listens")
    pq.write_table(pa.table({**columns, "similarity": [0.5] * 13}), tmp_path / "set.parquet")
    found = sources.resolve(str(tmp_path / "set.parquet"))
    options = WriteOptions(fetch=FetchOptions(allow_private=True, retries=0))
    shard = partial(write_shards, kind="table", licences={}, progress=False)
    manifest = shard(found.module.iter_records(found.config), tmp_path / "out", options)[""]
    assert (manifest.records, manifest.samples) == (13, 10)
    assert manifest.failures == {"connection": 1, "http_404": 1, "opted_out": 1}
    assert pq.read_table(tmp_path / "out" / "00000.parquet")["similarity"].to_pylist() == [0.5] * 13
    with pytest.raises(PipelineError, match=r"none of 13 records became a sample \(private_address 1[23]"):
        shard(found.module.iter_records(found.config), tmp_path / "no", WriteOptions())
