"""Tars nobody thought of: the walk against Python's tarfile, and the index against the walk."""

import contextlib
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from data_pipelines.errors import ShardError
from data_pipelines.reader import Shard
from data_pipelines.shard_files import TarWriter, index_path
from data_pipelines.tar import BLOCK, contents, indexed, split_name, walk_tar

COMMON = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
FORMS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
WORD = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/."), min_size=1, max_size=140)
STEMS = st.lists(st.lists(WORD, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6, unique=True)
EXTENSIONS = st.lists(
    st.sampled_from(["jpg", "png", "txt", "json", "cls", "seg.png", "pkl"]), min_size=1, max_size=4, unique=True
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])


def build(members: list[tuple[str, bytes, bytes]], form: int) -> bytes:
    """A tar of (name, content, type) by Python's tarfile; members whose name the format cannot hold are left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mtime = kind, "x", 1.5 if form == tarfile.PAX_FORMAT else 1
            regular = kind in (tarfile.REGTYPE, tarfile.AREGTYPE)
            info.size = len(content) if regular else 0
            try:
                tar.addfile(info, io.BytesIO(content) if regular else None)
            except ValueError:
                continue
    return buffer.getvalue()


@COMMON
@given(stems=STEMS, extensions=EXTENSIONS, form=FORMS, kind=KINDS, data=st.data())
def test_the_walk_finds_what_tarfile_finds(
    stems: list[str], extensions: list[str], form: int, kind: bytes, data: st.DataObject
) -> None:
    members = [
        (f"{stem}.{extension}", data.draw(st.binary(max_size=1200)), tarfile.REGTYPE)
        for stem in stems
        for extension in extensions
    ]
    members.insert(data.draw(st.integers(0, len(members))), ("other.txt", b"", kind))
    content = build(members, form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [
            (*split_name(info.name), content[info.offset_data : info.offset_data + info.size])
            for info in tar.getmembers()
            if info.isreg()
        ]
    keys = [key for key, *_ in expected]
    runs = [key for number, key in enumerate(keys) if number == 0 or keys[number - 1] != key]
    if len(set(runs)) < len(runs):
        with pytest.raises(ShardError, match="apart"):
            walk_tar(content, "t")
        return
    samples = walk_tar(content, "t")
    found = [
        (key, extension, content[offset : offset + size])
        for key, parts in samples
        for extension, (offset, size) in parts.items()
    ]
    assert found == expected


@COMMON
@given(content=st.binary(max_size=4000), repeat=st.booleans())
def test_the_walk_of_anything_ends_with_an_answer(content: bytes, repeat: bool) -> None:
    head = build([("0.jpg", b"x" * 700, tarfile.REGTYPE)], tarfile.USTAR_FORMAT)[: 3 * BLOCK]
    with contextlib.suppress(ShardError):  # anything else is a failure
        assert len(walk_tar(head + content + bytes(1024) if repeat else content, "t")) <= 1


def shard(count: int, seed: int = 0) -> tuple[bytes, np.ndarray]:
    """A tar and index of our writer, some samples without caption, some with an empty one."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    writer = TarWriter(buffer)
    for number in range(count):
        text = (b"", None, b"words")[number % 3]
        writer.add(f"{number:05}", "png", rng.bytes(int(rng.integers(1, 3000))), b'{"a": 1}', text)
    writer.close()
    return buffer.getvalue(), np.array(writer.index, dtype=np.int64)


def test_the_index_says_what_the_walk_says() -> None:
    content, index = shard(40)
    by_index, by_walk = indexed(content, index), contents(walk_tar(content, "t"))
    assert by_index is not None
    assert by_index.good.all()
    assert np.array_equal(by_index.table, by_walk.table)


@COMMON
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
@example(position=4144, bit=4)  # a leading zero of a checksum becomes a space
@example(position=17823988, bit=4)  # the space behind a checksum's end becomes a zero
def test_no_flipped_header_bit_passes_the_index(position: int, bit: int) -> None:
    content, index = shard(12)
    heads = sorted(int(offset) - BLOCK for row in index for offset, size in row.reshape(-1, 2) if size)
    damaged = bytearray(content)
    head = heads[position % len(heads)]
    damaged[head + position // len(heads) % BLOCK] ^= 1 << bit
    found = indexed(bytes(damaged), index)
    hit = next(number for number, row in enumerate(index) if head + BLOCK in row)
    assert found is not None
    assert np.flatnonzero(~found.good).tolist() == [hit]
    sums = [re.match(rb"[ 0]*([0-7]*)", tar[head + 148 : head + 156])[1] for tar in (content, damaged)]  # type: ignore[index]
    in_sum = position // len(heads) % BLOCK in range(148, 156)
    assume(not in_sum or sums[0] != sums[1])  # other padding, the same number: to a walk a header like any other
    with pytest.raises(ShardError):
        walk_tar(bytes(damaged), "t")


@pytest.mark.parametrize("change", ["other shard", "shifted", "garbage", "huge", "negative", "empty"])
def test_an_index_that_does_not_fit_is_not_used(change: str) -> None:
    content, index = shard(30)
    index = {
        "other shard": shard(30, seed=1)[1],
        "shifted": index + BLOCK,
        "garbage": np.random.default_rng(0).integers(-(2**62), 2**62, index.shape),
        "huge": index * 1000,
        "negative": -index,
        "empty": index * 0,
    }[change]
    assert indexed(content, index) is None


def test_content_behind_the_end_mark_is_refused_where_tarfile_is_silent() -> None:
    content = shard(3)[0] + shard(3, seed=1)[0]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert len({name.partition(".")[0] for name in tar.getnames()}) == 3, "the peer loses the second half"
    with pytest.raises(ShardError, match="behind the end-of-archive mark"):
        walk_tar(content, "t")


def test_a_shard_with_an_index_is_opened_without_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, index = shard(9)
    path = tmp_path / "00000.tar"
    path.write_bytes(content)
    walked = Shard(path)
    np.save(index_path(path), index)
    monkeypatch.setattr("data_pipelines.reader.walk_tar", None)
    opened = Shard(path)
    assert [opened.key(row) for row in range(9)] == [walked.key(row) for row in range(9)]
    assert [opened.read(row) for row in range(9)] == [walked.read(row) for row in range(9)]
    assert [opened.offset(row) for row in range(9)] == [walked.offset(row) for row in range(9)]
