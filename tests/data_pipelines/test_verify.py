"""Every kind of fault, put into real shards, is found and named with its place."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from data_pipelines.cli import shard
from data_pipelines.errors import PipelineError
from data_pipelines.records import Record
from data_pipelines.store import Store
from data_pipelines.tar_faults import header_size, image_format
from data_pipelines.testing import draw
from data_pipelines.verify import verify
from data_pipelines.write import WriteOptions, write_shards

LONG = "k" * 130
FIRST, SECOND = "00000.tar", "00001.tar"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of six and four samples, pictures of three formats; row 3 failed."""
    out = tmp_path_factory.mktemp("clean")
    kinds = ("JPEG", "PNG", "WEBP")
    records = [
        Record(
            image=b"broken" if n == 3 else draw((40 + n, 30), format=kinds[n % 3], seed=n),
            captions=(f"caption {n}",) if n != 8 else (),
            labels=("a",),
            source="here",
            origin=f"{n}",
        )
        for n in range(11)
    ]
    options = WriteOptions(samples_per_shard=7, max_pixels=10_000)
    write_shards(records, out, options, kind="test", licences={}, progress=False)
    return out


@pytest.fixture
def out(clean: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(clean, tmp_path / "out"))


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def find(out: Path, name: str) -> tarfile.TarInfo:
    return next(member for member in members(out / FIRST) if member.name == name)


def poke(path: Path, offset: int, data: bytes | None = None) -> None:
    """Write bytes at an offset; one flipped bit by default."""
    content = bytearray(path.read_bytes())
    data = data or bytes([content[offset] ^ 4])
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def remake(path: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]], format: int = 0) -> None:
    """Write a tar anew with other members."""
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=format or tarfile.USTAR_FORMAT) as tar:
        for name, data in change(files):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def replace(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda out: remake(out / FIRST, lambda files: [(n, data if n == name else old) for n, old in files])


def cut(out: Path, offset: int) -> None:
    (out / FIRST).write_bytes((out / FIRST).read_bytes()[:offset])


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_parquet(path: Path, column: str, row: int, value: object) -> None:
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[row] = value
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), path)


def swap_index(out: Path) -> None:
    index = np.load(out / "00000.index.npy")
    np.save(out / "00000.index.npy", index[::-1])


def append(out: Path, name: str, data: bytes) -> None:
    remake(out / FIRST, lambda files: [*files, (name, data)])


def bomb() -> bytes:
    return draw((200, 60))


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # what is done, the kind it must be found under, the key it must name
    "cut between samples": (lambda o: cut(o, find(o, "000002.json").offset), "no_end_mark", ""),
    "cut between image and caption": (lambda o: cut(o, find(o, "000001.txt").offset), "missing_member", "000001"),
    "cut inside a picture": (lambda o: cut(o, find(o, "000004.png").offset_data + 9), "cut_short", "000004"),
    "flipped header bit": (lambda o: poke(o / FIRST, find(o, "000002.json").offset + 3), "bad_header", ""),
    "flipped bit of a size": (lambda o: poke(o / FIRST, find(o, "000002.json").offset + 130), "bad_header", ""),
    "flipped bit of a picture": (
        lambda o: poke(o / FIRST, find(o, "000004.png").offset_data + 60), "payload_changed", "000004",
    ),
    "flipped bit of a json": (
        lambda o: poke(o / FIRST, find(o, "000004.json").offset_data + 2), "payload_changed", "000004",
    ),
    "flipped bit of a caption": (
        lambda o: poke(o / FIRST, find(o, "000004.txt").offset_data), "payload_changed", "000004",
    ),
    "flipped bit of padding": (
        lambda o: poke(o / FIRST, find(o, "000004.txt").offset_data + 100), "payload_changed", "000004",
    ),
    "duplicate key": (lambda o: append(o, "000001.png", draw()), "duplicate_key", "000001"),
    "member twice": (
        lambda o: remake(o / FIRST, lambda f: [f[0], f[0], *f[1:]]), "duplicate_key", "000000",
    ),
    "members apart": (lambda o: remake(o / FIRST, lambda f: [*f[1:], f[0]]), "scattered_key", "000000"),
    "long name": (
        lambda o: remake(o / FIRST, lambda f: [*f, (LONG + ".txt", b"x")], tarfile.PAX_FORMAT), "long_name", LONG,
    ),
    "long name of GNU tar": (
        lambda o: remake(o / FIRST, lambda f: [*f, (LONG + ".txt", b"x")], tarfile.GNU_FORMAT), "long_name", LONG,
    ),
    "wrong extension": (replace("000001.png", draw(format="JPEG")), "wrong_extension", "000001"),
    "no picture": (replace("000001.png", b"hello, world, here I am"), "not_an_image", "000001"),
    "empty picture": (replace("000001.png", b""), "empty_member", "000001"),
    "empty json": (replace("000001.json", b""), "empty_member", "000001"),
    "empty caption": (replace("000001.txt", b""), "empty_member", "000001"),
    "caption not UTF-8": (replace("000001.txt", b"caf\xe9"), "bad_utf8", "000001"),
    "json not JSON": (replace("000001.json", b'{"key": '), "bad_json", "000001"),
    "json no object": (replace("000001.json", b"[1]"), "bad_json", "000001"),
    "json of another sample": (replace("000001.json", b'{"key": "000002"}'), "parquet_differs", "000001"),
    "no picture member": (
        lambda o: remake(o / FIRST, lambda f: [x for x in f if x[0] != "000001.png"]), "missing_member", "000001",
    ),
    "no json member": (
        lambda o: remake(o / FIRST, lambda f: [x for x in f if x[0] != "000001.json"]), "missing_member", "000001",
    ),
    "no caption member": (
        lambda o: remake(o / FIRST, lambda f: [x for x in f if x[0] != "000001.txt"]), "missing_member", "000001",
    ),
    "extra member": (lambda o: append(o, "000006.exe", b"MZ"), "extra_member", "000006"),
    "extra sample": (lambda o: append(o, "000009.png", draw()), "parquet_differs", "000009"),
    "pixel bomb": (replace("000001.png", bomb()), "too_many_pixels", "000001"),
    "swapped index": (swap_index, "index_differs", "000000"),
    "short index": (lambda o: np.save(o / "00000.index.npy", np.zeros((2, 6), np.int64)), "index_differs", ""),
    "torn index": (lambda o: (o / "00000.index.npy").write_bytes(b"\x93NUMPY"), "index_differs", ""),
    "no index": (lambda o: (o / "00000.index.npy").unlink(), "missing_file", ""),
    "parquet with another key": (
        lambda o: change_parquet(o / "00000.parquet", "key", 1, "000017"), "parquet_differs", "000001",
    ),
    "parquet with another sha256": (
        lambda o: change_parquet(o / "00000.parquet", "sha256", 1, "0" * 64), "parquet_differs", "000001",
    ),
    "parquet with another stored sha256": (
        lambda o: change_parquet(o / "00000.parquet", "stored_sha256", 1, "0" * 64), "payload_changed", "000001",
    ),
    "parquet with other counts": (
        lambda o: change_parquet(o / "00000.parquet", "status", 1, "failed_to_resize"), "parquet_differs", "000001",
    ),
    "torn parquet": (lambda o: (o / "00000.parquet").write_bytes(b"PAR1"), "parquet_differs", ""),
    "no parquet": (lambda o: (o / "00000.parquet").unlink(), "missing_file", ""),
    "no statistics": (lambda o: (o / "00000_stats.json").unlink(), "missing_file", ""),
    "torn statistics": (lambda o: (o / "00000_stats.json").write_text("{"), "stats_differ", ""),
    "manifest with other counts": (lambda o: change_json(o / "manifest.json", records=99), "manifest_differs", ""),
    "torn manifest": (lambda o: (o / "manifest.json").write_text("{"), "manifest_differs", ""),
    "no manifest": (lambda o: (o / "manifest.json").unlink(), "missing_file", ""),
    "no sizes": (lambda o: (o / "sizes.json").unlink(), "missing_file", ""),
    "other sizes": (lambda o: change_json(o / "sizes.json", **{FIRST: 1}), "manifest_differs", ""),
    "shard of other bytes": (
        lambda o: (o / FIRST).write_bytes((o / FIRST).read_bytes() + bytes(10240)), "manifest_differs", "",
    ),
    "missing shard": (lambda o: (o / SECOND).unlink(), "missing_shard", ""),
    "foreign tar": (lambda o: shutil.copy(o / FIRST, o / "00007.tar"), "foreign_shard", ""),
    "no end mark": (
        lambda o: cut(o, max(-(-m.size // 512) * 512 + m.offset_data for m in members(o / FIRST))), "no_end_mark", "",
    ),
    "half an end mark": (
        lambda o: cut(o, max(-(-m.size // 512) * 512 + m.offset_data for m in members(o / FIRST)) + 512),
        "no_end_mark", "",
    ),
    "trailing garbage": (
        lambda o: (o / FIRST).write_bytes((o / FIRST).read_bytes() + b"garbage"), "trailing_bytes", "",
    ),
    "empty tar file": (lambda o: (o / FIRST).write_bytes(b""), "no_end_mark", ""),
    "unfinished job": (
        lambda o: Store(o).write("_tmp/job.json", b"{}"), "unfinished_job", "",
    ),
}  # fmt: skip


def test_clean_shards_have_no_fault(clean: Path) -> None:
    result = verify(clean, progress=False)
    assert result["faults"] == []
    assert (result["shards"], result["samples"], result["manifest"]) == (2, 10, True)
    assert result["bytes"] == sum(path.stat().st_size for path in clean.glob("*.tar"))


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found(name: str, out: Path) -> None:
    damage, kind, key = FAULTS[name]
    damage(out)
    faults = verify(out, progress=False)["faults"]
    hits = [fault for fault in faults if fault["kind"] == kind and fault["key"] == key]
    assert hits, f"not among {[(fault['kind'], fault['key'], fault['detail']) for fault in faults]}"
    if key and not kind.startswith(("parquet", "index")):
        assert hits[0]["offset"] is not None
        assert hits[0]["shard"] == FIRST


def test_the_place_of_a_changed_bit_is_that_of_its_member(out: Path) -> None:
    member = find(out, "000004.png")
    poke(out / FIRST, member.offset_data + 60)
    faults = [fault for fault in verify(out, progress=False)["faults"] if fault["kind"] == "payload_changed"]
    assert [(fault["key"], fault["offset"]) for fault in faults] == [("000004", member.offset_data)]


def test_any_flipped_bit_is_found(clean: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = (clean / FIRST).read_bytes()
    for offset in rng.integers(0, len(content), 60).tolist():
        out = Path(shutil.copytree(clean, tmp_path / "out", dirs_exist_ok=True))
        poke(out / FIRST, offset)
        assert verify(out, progress=False)["faults"], f"bit at {offset} passed unseen"


def test_nothing_behind_a_damaged_header_is_lost(out: Path) -> None:
    poke(out / FIRST, find(out, "000002.json").offset)
    result = verify(out, progress=False)
    assert result["samples"] == 10
    (header,) = [fault for fault in result["faults"] if fault["kind"] == "bad_header"]
    assert header["offset"] == find_before_damage(out)


def find_before_damage(out: Path) -> int:
    """Where the damaged header lies: behind the last member that tarfile still sees."""
    last = members(out / FIRST)[-1]
    return last.offset_data + -(-last.size // 512) * 512


def test_shards_of_another_tool_are_checked_as_far_as_they_go(out: Path) -> None:
    for path in (*out.glob("*.json"), *out.glob("*.npy"), *out.glob("*.parquet")):
        path.unlink()
    result = verify(out, progress=False)
    assert (result["faults"], result["manifest"], result["samples"]) == ([], False, 10)
    replace("000001.png", draw(format="JPEG"))(out)
    assert [fault["kind"] for fault in verify(out, progress=False)["faults"]] == ["wrong_extension"]
    (out / FIRST).unlink()
    (out / SECOND).unlink()
    with pytest.raises(PipelineError, match=r"holds no \.tar shard"):
        verify(out, progress=False)


def test_the_command_lists_faults_and_fails(out: Path) -> None:
    fine = CliRunner().invoke(shard, ["verify", str(out)])
    assert (fine.exit_code, "0 faults" in fine.stdout) == (0, True)
    poke(out / FIRST, find(out, "000004.png").offset_data + 60)
    result = CliRunner().invoke(shard, ["verify", str(out), "--json"])
    assert result.exit_code == 1
    kinds = {fault["kind"] for fault in json.loads(result.stdout)["faults"]}
    assert kinds == {"payload_changed", "manifest_differs"}
    assert "payload_changed" in CliRunner().invoke(shard, ["verify", str(out)]).stdout


def test_header_checksum_agrees_with_tarfile() -> None:
    info = tarfile.TarInfo("x" * 99)
    info.size, info.mtime, info.uname = 8**11 - 1, 8**11 - 1, "é" * 10
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert header_size(header) == info.size
    for byte in range(512):
        for bit in (1, 128):
            flipped = bytes([*header[:byte], header[byte] ^ bit, *header[byte + 1 :]])
            assert header_size(flipped) != info.size or 148 <= byte < 156


def test_formats_are_known_by_their_first_bytes() -> None:
    for kind, name in {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}.items():
        assert image_format(draw(format=name)[:16]) == kind
    stream = io.BytesIO()
    Image.new("RGB", (3, 3)).save(stream, "BMP")
    assert image_format(stream.getvalue()[:16]) is None
