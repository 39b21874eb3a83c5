import json
from pathlib import Path

import pytest

from data_pipelines import sources
from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.records import Record
from data_pipelines.sources import folder
from data_pipelines.testing import draw


def read(path: Path, **settings: object) -> dict[str, Record]:
    return {record.origin: record for record in folder.iter_records(folder.Config(path=path, **settings))}


def test_captions_beside_in_sorted_order(photos: Path) -> None:
    records = read(photos)
    assert list(records) == ["lonely.jpg", *(f"p{n}.png" for n in range(4)), *(f"trip/p{n}.png" for n in range(4, 7))]
    assert records["p1.png"].captions == ("picture 1", "another line 1")
    assert records["p1.png"].source == "photos"
    assert records["trip/p5.png"].labels == ()  # folders are no classes where captions exist
    assert folder.count(folder.Config(path=photos)) == 8


def test_an_image_without_caption_is_a_problem_not_silence(photos: Path) -> None:
    problems = {name: record.problem for name, record in read(photos).items() if record.problem}
    assert list(problems) == ["lonely.jpg"]
    assert problems["lonely.jpg"].startswith("no_caption: no caption in lonely.txt")


def test_json_beside(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(draw())
    (tmp_path / "a.txt").write_text("\ufefffirst\n\n  second \n", encoding="utf-8")
    columns = {
        "caption": "second", "captions": ["third", ""], "label": 7, "labels": ["x"], "score": 0.5, "tags": ["t"],
        "sha256": "forged", "note": None,
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(columns))
    record = read(tmp_path)["a.png"]
    assert record.captions == ("first", "second", "third")
    assert record.labels == ("7", "x")
    assert record.extra == {"score": 0.5, "tags": '["t"]', "note": None}
    assert not record.problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "a.json is not JSON"),
        ("a.json", b"[1]", "a.json holds a JSON list, expected an object"),
        ("a.json", b'{"captions": {"x": 1}}', "captions must be text or a list of texts"),
        ("a.json", b"[" * 100_000, "a.json is not JSON"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8: byte 3"),
    ],
)
def test_a_broken_sidecar_spoils_its_own_image_only(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    for stem in "ab":
        (tmp_path / f"{stem}.png").write_bytes(draw())
    (tmp_path / "b.txt").write_text("fine")
    (tmp_path / name).write_bytes(content)
    records = read(tmp_path)
    assert records["a.png"].problem.startswith(("bad_sidecar: ", "bad_text: "))
    assert message in records["a.png"].problem
    assert not records["b.png"].problem


def test_class_folders(tmp_path: Path) -> None:
    for name in ("cats/1.jpg", "cats/deep/2.JPEG", "great_danes/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(draw())
    records = read(tmp_path, template="a photo of a {label}")
    assert {name: record.labels for name, record in records.items()} == {
        "cats/1.jpg": ("cats",), "cats/deep/2.JPEG": ("deep",), "great_danes/3.png": ("great_danes",)
    }  # fmt: skip
    assert records["great_danes/3.png"].captions == ("a photo of a great danes",)
    without = read(tmp_path)["cats/1.jpg"]
    assert (without.captions, without.problem) == ((), "")  # a label is enough, for probes and zero-shot tests


def test_hidden_files_are_left_out_and_unread_formats_are_not(tmp_path: Path) -> None:
    for name in (".hidden.png", "__x/.y/a.png", "scan.TIFF", "ok.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(draw())
    assert list(read(tmp_path)) == ["ok.png", "scan.TIFF"]


def test_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("no pictures here")
    with pytest.raises(PipelineError, match=r"no images among 1 files; .*\.jpg, \.jpeg, \.png, \.webp, \.gif"):
        read(tmp_path)
    with pytest.raises(PipelineError, match="no such folder"):
        read(tmp_path / "gone")


def test_a_template_without_effect_is_an_error(photos: Path) -> None:
    with pytest.raises(PipelineError, match="template 'a {label}' has no effect"):
        read(photos, template="a {label}")


def test_a_template_must_hold_the_label(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"template 'a photo' has no \{label\} in it"):
        folder.Config(path=tmp_path, template="a photo")


def test_fingerprint_follows_content_names_and_number(photos: Path) -> None:
    config = folder.Config(path=photos)
    seen = [folder.fingerprint(config)]
    (photos / "p0.txt").write_text("longer than before, by far")
    seen.append(folder.fingerprint(config))
    (photos / "p0.png").rename(photos / "q0.png")
    seen.append(folder.fingerprint(config))
    (photos / "p1.png").unlink()
    seen.append(folder.fingerprint(config))
    assert len(set(seen)) == 4
    assert folder.fingerprint(config) == seen[-1]


def test_resolve_by_path_name_and_kind(photos: Path) -> None:
    assert sources.resolve(str(photos)).name == "folder"
    assert sources.resolve(str(photos), "folder").config == folder.Config(path=photos)
    starter = sources.resolve("starter")
    assert starter.name == "starter"
    assert len(starter.packages) == 7
    assert len(sources.resolve("emoji").packages) == 5


def test_resolve_lists_what_exists(photos: Path) -> None:
    with pytest.raises(
        PipelineError, match="nope: no such path, .* clipart, detection-starter, emoji, fashion-mnist, starter"
    ):
        sources.resolve("nope")
    with pytest.raises(
        PipelineError, match="kind 'rar' does not exist; kinds are clipart, coco, detection-starter, emoji, "
    ):
        sources.resolve(str(photos), "rar")
    with pytest.raises(PipelineError, match="no kind reads such a file"):
        sources.resolve(str(photos / "p0.png"))
    with pytest.raises(PipelineError, match="write `starter` alone"):
        sources.resolve(str(photos), "starter")
    with pytest.raises(ConfigError, match="template: source 'starter' has no such option"):
        sources.resolve("starter", template="a {label}")
