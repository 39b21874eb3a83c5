"""Reading plain tars: whole ones as webdataset reads them, damaged ones never in silence."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from data_pipelines.errors import BadSample, PipelineError, ShardError
from data_pipelines.reader import Shard, open_shards
from data_pipelines.testing import draw


def make_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def offset_of(path: Path, member: int) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[member].offset


def with_webdataset(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as stream:  # webdataset never closes what it opens itself
        opened = [{"url": path.name, "stream": stream}]
        return list(wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(opened)))


def pairs(count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for number in range(count)
        for member in (
            (f"{number:03}.png", draw((8, 8), seed=number)),
            (f"{number:03}.txt", f"caption {number}".encode()),
        )
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_tars_read_as_webdataset_reads_them(tmp_path: Path, form: int) -> None:
    long = [(f"folder/{'k' * 120}.png", draw((8, 8))), (f"folder/{'k' * 120}.txt", "größer".encode())]
    path = make_tar(tmp_path / "0.tar", pairs(5) + (long if form != tarfile.USTAR_FORMAT else []), form)
    shard = Shard(path)
    ours = [shard.read(row) for row in range(len(shard))]
    theirs = with_webdataset(path)
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    assert [sample.image for sample in ours] == [sample["png"] for sample in theirs]
    assert [sample.captions[0] for sample in ours] == [sample["txt"].decode() for sample in theirs]


@pytest.mark.parametrize("cut", [1, 511, 512, 700, 1536, 5000])
def test_a_cut_tar_is_refused_wherever_the_cut_lies(tmp_path: Path, cut: int) -> None:
    whole = make_tar(tmp_path / "whole.tar", pairs(10)).read_bytes()
    end = whole.rstrip(b"\0")
    (tmp_path / "cut.tar").write_bytes(end[: max(512, len(end) - cut)])
    with pytest.raises(ShardError, match=r"cut\.tar"):
        Shard(tmp_path / "cut.tar")


def test_a_cut_on_a_header_boundary_is_refused_where_webdataset_is_silent(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", pairs(10)).read_bytes()
    boundary = offset_of(tmp_path / "whole.tar", 8)
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[:boundary])
    assert len(with_webdataset(path)) == 4, "the peer loses six samples in silence"
    with pytest.raises(ShardError, match="cut short"):
        Shard(path)


def test_one_flipped_header_bit_is_found_with_its_place(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", pairs(10))
    content = bytearray(path.read_bytes())
    offset = offset_of(path, 6)
    content[offset + 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ShardError, match=f"byte {offset}"):
        Shard(path)


def test_interleaved_and_duplicate_members_are_refused(tmp_path: Path) -> None:
    a, b = draw((8, 8), seed=1), draw((8, 8), seed=2)
    with pytest.raises(ShardError, match="'0'"):
        Shard(make_tar(tmp_path / "0.tar", [("0.png", a), ("1.png", b), ("0.txt", b"x"), ("1.txt", b"y")]))
    with pytest.raises(ShardError, match="twice"):
        Shard(make_tar(tmp_path / "1.tar", [("0.png", a), ("0.png", b), ("0.txt", b"x")]))


def test_samples_without_image_or_with_unreadable_text_are_bad_samples(tmp_path: Path) -> None:
    shard = Shard(make_tar(tmp_path / "0.tar", [("0.txt", b"x"), ("1.png", draw((8, 8))), ("1.txt", b"\xff\xfe\xfa")]))
    with pytest.raises(BadSample, match="no_image"):
        shard.read(0)
    with pytest.raises(BadSample, match="bad_text"):
        shard.read(1)


def test_a_shard_of_another_length_than_its_manifest_is_refused(starter_shards: Path, tmp_path: Path) -> None:
    source = starter_shards / "unseen_concepts"
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert sum(map(len, open_shards(tmp_path))) == 199
    with (tmp_path / "00000.tar").open("ab") as handle:
        handle.write(b"\0" * 512)
    with pytest.raises(ShardError, match="manifest"):
        open_shards(tmp_path)


def test_a_missing_or_empty_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="vlp shard"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(PipelineError, match="vlp shard"):
        open_shards(tmp_path)
