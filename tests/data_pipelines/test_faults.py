"""The fault matrix: damaged tars of every kind at several rates. None passes unseen, none mixes pictures and captions.

A data set is built from members, some of them changed (a bad sample), or its finished files are damaged (a bad shard).
Either the run stops with a message that names the shard, or every sample is delivered or quarantined with its reason.
"""

import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import PipelineError
from data_pipelines.files import sha256_file
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import ImageConfig
from data_pipelines.shard_files import index_path
from data_pipelines.shard_set import ShardSet
from data_pipelines.stream import decoded, stored

Members = list[tuple[str, bytes]]
SIDE = 8


def picture(number: int, form: str = "PNG") -> bytes:
    """A picture whose colour is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (number % 256, number // 256, 77)).save(buffer, form, quality=95)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims to be 30,000 x 30,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + picture(0)[33:]


def sample(number: int) -> Members:
    """Members of a good sample."""
    key = f"{number:06}"
    text = f"picture {number}".encode()
    return [(f"{key}.json", json.dumps({"key": key}).encode()), (f"{key}.png", picture(number)), (f"{key}.txt", text)]


def put(extension: str, content: bytes) -> Callable[[Members], Members]:
    """Replace or add one member."""

    def change(members: Members) -> Members:
        key = members[0][0].partition(".")[0]
        kept = [(name, data) for name, data in members if not name.endswith(f".{extension}")]
        return sorted([*kept, (f"{key}.{extension}", content)])

    return change


def without(extension: str, instead: str = "") -> Callable[[Members], Members]:
    """Drop one member, or store it under another extension."""
    return lambda members: [
        (name.replace(f".{extension}", f".{instead}"), data)
        for name, data in members
        if instead or not name.endswith(f".{extension}")
    ]


def pickle_bytes() -> bytes:
    """Built by hand: the house imports no pickle."""
    return b"\x80\x04K\x01."


def object_npy() -> bytes:
    """An npy member that needs pickle: an array of objects, its content built by hand."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return buffer.getvalue() + pickle_bytes()


BAD_SAMPLES: dict[str, tuple[Callable[[Members], Members], set[str]]] = {
    "truncated jpeg": (
        lambda m: put("jpg", picture(int(m[0][0][:6]), "JPEG")[:-40])(without("png")(m)),
        {"truncated_image", "corrupt_image", "not_an_image"},
    ),
    "truncated png": (lambda m: put("png", m[1][1][:48])(m), {"truncated_image", "corrupt_image"}),
    "zero-byte picture": (put("png", b""), {"empty_image"}),
    "zero-byte caption": (put("txt", b""), {"no_caption"}),
    "zero-byte json": (put("json", b""), {"bad_json"}),
    "text for a picture": (put("png", b"hello"), {"not_an_image"}),
    "pixel bomb": (put("png", bomb()), {"too_many_pixels"}),
    "wrong extension": (without("png", "bin"), {"no_image"}),
    "pickle for a picture": (
        lambda m: put("pkl", pickle_bytes())(without("png")(m)),
        {"no_image"},
    ),
    "missing picture": (without("png"), {"no_image"}),
    "missing caption": (without("txt"), {"no_caption"}),
    "text not UTF-8": (put("txt", b"caf\xe9 \xff"), {"bad_text"}),
    "json cut": (put("json", b'{"key": "0'), {"bad_json"}),
    "json no object": (put("json", b"[1, 2]"), {"bad_json"}),
    "json bottomless": (put("json", b"[" * 100_000), {"bad_json"}),
    "captions no list of texts": (put("json", b'{"captions": [1, null]}'), {"bad_text"}),
    "class no number": (put("cls", b"cat"), {"bad_text"}),
    "npy with pickle": (put("npy", object_npy()), {"bad_text"}),
}


def write_tar(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_sidecars(folder: Path) -> None:
    """Index and manifest of the tars as they are."""
    infos, total = [], 0
    for path in sorted(folder.glob("*.tar")):
        rows: dict[str, list[int]] = {}
        with tarfile.open(path) as tar:
            for info in tar.getmembers():
                key, _, extension = info.name.partition(".")
                column = {"png": 0, "jpg": 0, "json": 2, "txt": 4}.get(extension)
                place = rows.setdefault(key, [0] * 6)
                if column is not None:
                    place[column : column + 2] = [info.offset_data, info.size]
        np.save(index_path(path), np.array(list(rows.values()), dtype=np.int64))
        size, digest = path.stat().st_size, sha256_file(path)
        infos.append({"name": path.name, "samples": len(rows), "bytes": size, "sha256": digest})
        total += len(rows)
    manifest = {
        "kind": "folder", "source_digest": "", "records": total, "samples": total, "failures": {}, "sources": {},
        "licences": {}, "options": {}, "shards": infos,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read_all(folder: Path) -> tuple[list[int], Ledger]:
    """Numbers of the delivered samples, each checked to have its own picture, caption and key; and the account."""
    ledger = Ledger(max_share=1.0, max_in_a_row=10**9)
    numbers = []
    shards = ShardSet(folder)
    for item in decoded(stored(shards, ledger), ImageConfig(size=SIDE), ledger, 10**6):
        red, green, blue = item.pixels[:, 0, 0].tolist()
        number = red + 256 * green
        assert blue == 77
        assert item.captions == (f"picture {number}",), "the caption of another picture"
        assert item.key.rpartition("/")[2].lstrip("k") == f"{number:06}"
        numbers.append(number)
    report = ledger.report()
    assert report["seen"] == len(shards)
    assert report["trained"] == len(numbers)
    return numbers, ledger


def check_bad_samples(folder: Path, fault: str, rate: float, listed: bool, size: tuple[int, int]) -> None:
    change, reasons = BAD_SAMPLES[fault]
    shards, per = size
    bad = set(np.random.default_rng(1).permutation(shards * per)[: max(1, round(rate * shards * per))].tolist())
    for shard in range(shards):
        mine = range(shard * per, (shard + 1) * per)
        write_tar(
            folder / f"{shard:05}.tar",
            [m for n in mine for m in (change(sample(n)) if n in bad else sample(n))],
        )
    if listed:
        write_sidecars(folder)
    numbers, ledger = read_all(folder)
    assert numbers == [n for n in range(shards * per) if n not in bad]
    assert set(ledger.quarantined) <= reasons
    assert ledger.quarantined.total() == len(bad)
    assert {int(item.place.key) for item in ledger.records.values()} == bad
    assert {item.place.shard for item in ledger.records.values()} <= {
        f"{folder.name}/{shard:05}.tar" for shard in range(shards)
    }


RATES = (0.005, 0.02, 0.1)


@pytest.mark.parametrize("listed", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("fault", sorted(BAD_SAMPLES))
def test_bad_samples_are_quarantined_and_only_they(tmp_path: Path, fault: str, listed: bool) -> None:
    check_bad_samples(tmp_path, fault, 0.04, listed, (2, 50))


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("fault", sorted(BAD_SAMPLES))
def test_bad_samples_at_every_rate(tmp_path: Path, fault: str, rate: float, listed: bool) -> None:
    check_bad_samples(tmp_path, fault, rate, listed, (10, 200))


def heads(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [info.offset for info in tar.getmembers()]


def cut_between_samples(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: heads(path)[9]])


def cut_in_a_sample(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: heads(path)[11]])


def cut_in_a_picture(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: heads(path)[10] + 540])


def cut_and_closed(path: Path, _: Path) -> None:
    """What a writer leaves that lost half its input: a sound tar, but fewer samples."""
    path.write_bytes(path.read_bytes()[: heads(path)[9]] + bytes(1024))


def no_end_mark(path: Path, _: Path) -> None:
    path.write_bytes(
        path.read_bytes().rstrip(b"\0").ljust(-(-len(path.read_bytes().rstrip(b"\0")) // 512) * 512, b"\0")
    )


def garbage_between(path: Path, _: Path) -> None:
    content, head = path.read_bytes(), heads(path)[9]
    path.write_bytes(content[:head] + b"\xaa" * 512 + content[head:])


def garbage_instead(path: Path, _: Path) -> None:
    content, head = path.read_bytes(), heads(path)[9]
    path.write_bytes(content[:head] + b"\xaa" * 512 + content[head + 512 :])


def zeros_instead(path: Path, _: Path) -> None:
    """An end mark in the middle: every reader stops there."""
    content, head = path.read_bytes(), heads(path)[9]
    path.write_bytes(content[:head] + bytes(1024) + content[head + 1024 :])


def garbage_behind(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100:-90] = b"0123456789"
    path.write_bytes(content)


def exchanged(path: Path, other: Path) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def same_length_other_content(path: Path, _: Path) -> None:
    """Another data set's shard of equal length: sound, but not what the manifest vouches for."""
    length = path.stat().st_size
    write_tar(path, [member for number in range(900, 925) for member in sample(number)])
    path.write_bytes(path.read_bytes()[:length].ljust(length, b"\0"))


def missing(path: Path, _: Path) -> None:
    path.unlink()


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def wrong_count(path: Path, _: Path) -> None:
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["shards"][0]["samples"] -= 1
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def wrong_length(path: Path, _: Path) -> None:
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] += 512
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def flipped(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[heads(path)[10] + 130] ^= 1
    path.write_bytes(content)


BAD_SHARDS: tuple[Callable[[Path, Path], None], ...] = (
    cut_between_samples, cut_in_a_sample, cut_in_a_picture, cut_and_closed, no_end_mark, garbage_between,
    garbage_instead, zeros_instead, garbage_behind, exchanged, same_length_other_content, missing, empty,
    wrong_count, wrong_length, flipped,
)  # fmt: skip
NEEDS_MANIFEST = {cut_and_closed, exchanged, same_length_other_content, missing, wrong_count, wrong_length}
"""Without a manifest nobody can know."""


def check_bad_shards(folder: Path, damage: Callable[[Path, Path], None], count: int, listed: bool, per: int) -> None:
    """The run stops naming a damaged shard, or what is lost is quarantined as of that shard and the rest delivered."""
    shards = count + 2
    for shard in range(shards):
        write_tar(folder / f"{shard:05}.tar", [m for n in range(shard * per, (shard + 1) * per) for m in sample(n)])
    if listed:
        write_sidecars(folder)
    paths = sorted(folder.glob("*.tar"))
    for path in paths[:count]:
        damage(path, paths[-1])
    try:
        numbers, ledger = read_all(folder)
    except PipelineError as error:
        stopped = str(error)
    else:
        stopped = ""
    if stopped:
        assert any(path.name in stopped for path in paths)
        return
    lost = set(range(shards * per)) - set(numbers)
    assert lost, "the fault passed unseen"
    assert ledger.quarantined.total() >= len(lost) - count * (damage is wrong_count)
    damaged = {f"{folder.name}/{path.name}" for path in (*paths[:count], *paths[-1:])}
    assert {item.place.shard for item in ledger.records.values()} <= damaged
    assert len(numbers) + ledger.quarantined.total() == ledger.seen


@pytest.mark.parametrize("listed", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("damage", BAD_SHARDS)
def test_bad_shards_never_pass_unseen(tmp_path: Path, damage: Callable[[Path, Path], None], listed: bool) -> None:
    if listed or damage not in NEEDS_MANIFEST:
        check_bad_shards(tmp_path, damage, 1, listed, 25)


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("count", [1, 3, 10])
@pytest.mark.parametrize("damage", BAD_SHARDS)
def test_bad_shards_at_every_rate(
    tmp_path: Path, damage: Callable[[Path, Path], None], count: int, listed: bool
) -> None:
    if listed or damage not in NEEDS_MANIFEST:
        check_bad_shards(tmp_path, damage, count, listed, 50)


def orders() -> dict[str, Callable[[Sequence[Members]], Members]]:
    """Ways to store the members of samples in an order that no reader by adjacency survives."""
    return {
        "interleaved": lambda groups: [group[i] for i in range(3) for group in groups],
        "captions at the end": lambda groups: [*(m for g in groups for m in g[:2]), *(g[2] for g in groups)],
        "a key twice": lambda groups: [*(m for g in groups for m in g), *groups[0]],
        "a member twice": lambda groups: [m for g in groups for m in (*g, g[1])],
    }


@pytest.mark.parametrize("order", sorted(orders()))
def test_members_out_of_order_are_refused_and_never_paired(tmp_path: Path, order: str) -> None:
    write_tar(tmp_path / "0.tar", orders()[order]([sample(number) for number in range(20)]))
    with pytest.raises(PipelineError, match=r"0\.tar.*(apart|twice)"):
        read_all(tmp_path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_no_fault(tmp_path: Path, form: int) -> None:
    members = [(f"{'d' * 90}/{'k' * 90}{name}", data) for number in range(30) for name, data in sample(number)]
    write_tar(tmp_path / "0.tar", members, form)
    assert read_all(tmp_path)[0] == list(range(30))


def test_a_flipped_bit_costs_its_own_sample_only_where_there_is_an_index(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [m for number in range(30) for m in sample(number)])
    write_sidecars(tmp_path)
    flipped(tmp_path / "0.tar", tmp_path)
    numbers, ledger = read_all(tmp_path)
    assert numbers == [number for number in range(30) if number != 3]
    assert ledger.quarantined == Counter(damaged_header=1)


def test_members_that_are_never_decoded_are_counted(tmp_path: Path) -> None:
    change = put("pkl", pickle_bytes())
    write_tar(tmp_path / "0.tar", [m for number in range(5) for m in change(sample(number))])
    assert read_all(tmp_path)[0] == list(range(5))
    assert ShardSet(tmp_path).shards[0].ignored == Counter(pkl=5)
