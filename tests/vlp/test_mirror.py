"""Runs and bundles on a store: what counts there, torn uploads, faults, resume on another machine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from data_pipelines import mirror as folders
from data_pipelines.errors import BundleError, ConfigError, PipelineError
from data_pipelines.mirror import LISTING, as_url, listing, pull, push
from data_pipelines.store import Store
from server.loading import load_sources
from server.settings import Limits
from vlp.bundle import load_bundle
from vlp.checkpoint import checkpoints
from vlp.cli import cli
from vlp.mirror import Mirror
from vlp.models import build_model
from vlp.models.config import ModelConfig
from vlp.models.folders import WEIGHTS
from vlp.models.weights import read_weights
from vlp.recipe import Recipe
from vlp.train import train

URL = "memory://bucket/runs/a"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """An empty store and an empty cache; no waiting between tries."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "PAUSE", 0)
    system = fsspec.filesystem("memory")
    yield system
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)


def fail(monkeypatch: pytest.MonkeyPatch, when: Callable[[str], bool], times: int) -> list[str]:
    """The next so many writes to matching names break off half way, as a cut connection does."""
    hit: list[str] = []
    put, pipe = MemoryFileSystem.put_file, MemoryFileSystem.pipe_file

    def broken(self: Any, name: str, content: bytes) -> None:
        hit.append(name)
        pipe(self, name, content[: len(content) // 2])
        raise ConnectionResetError("cut")

    def put_file(self: Any, local: str, name: str, **options: Any) -> None:
        if when(name) and len(hit) < times:
            broken(self, name, Path(local).read_bytes())
        put(self, local, name, **options)

    def pipe_file(self: Any, name: str, content: bytes, **options: Any) -> None:
        if when(name) and len(hit) < times:
            broken(self, name, content)
        pipe(self, name, content, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    return hit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    (path / "a.txt").write_text("first")
    (path / "inner/b.txt").write_text("second")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_urls_survive_being_paths(tmp_path: Path) -> None:
    assert as_url(Path("s3://bucket/run/")) == "s3://bucket/run"
    assert as_url("gs://bucket/run") == "gs://bucket/run"
    assert [as_url(name) for name in ("runs/a", "/s3:/x", "a:b", "file:///tmp/x", str(tmp_path))] == [None] * 5


def test_a_folder_comes_back_as_it_was_and_a_second_push_sends_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, Store(URL), "x")
    pull(Store(URL), "x", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    fail(monkeypatch, lambda name: True, 99)
    push(folder, Store(URL), "x")


def test_an_error_that_passes_is_waited_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hit = fail(monkeypatch, lambda name: True, folders.TRIES - 1)
    push(folder, Store(URL), "x")
    assert len(hit) == folders.TRIES - 1
    pull(Store(URL), "x", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


@pytest.mark.parametrize("torn", ["a.txt", "inner/b.txt", LISTING])
def test_a_torn_upload_never_counts(torn: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New or in the place of another: after the first missing byte there is no such folder."""
    with monkeypatch.context() as broken:
        push(folder, Store(URL), "x")
        (folder / "a.txt").write_text("changed")
        fail(broken, lambda name: name.endswith(torn), 99)
        with pytest.raises(OSError, match="cut"):
            push(folder, Store(URL), "x")
        with pytest.raises((OSError, PipelineError)):
            pull(Store(URL), "x", tmp_path / "back")
        assert not (tmp_path / "back").exists()
    push(folder, Store(URL), "x")
    pull(Store(URL), "x", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_changed_bytes_and_hostile_lists_are_refused(folder: Path, tmp_path: Path, store: MemoryFileSystem) -> None:
    push(folder, Store(URL), "x")
    store.pipe("/bucket/runs/a/x/a.txt", b"other")
    with pytest.raises(OSError, match="sha256"):
        pull(Store(URL), "x", tmp_path / "back")
    store.pipe(f"/bucket/runs/a/x/{LISTING}", json.dumps({"files": {"../../up": "0"}}).encode())
    with pytest.raises(PipelineError, match="outside"):
        listing(Store(URL), "x")


def elsewhere(monkeypatch: pytest.MonkeyPatch, path: Path) -> Mirror:
    """The same run as another machine sees it: nothing of it lies there yet."""
    monkeypatch.setenv("VLP_CACHE", str(path))
    return Mirror(URL)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_elsewhere_from_the_store_alone(
    micro_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every save at step 10 fails: the checkpoint of step 5 counts, and the run resumed from it ends as a whole one."""
    recipe = micro_recipe()
    train(recipe, tmp_path / "whole", show=False)
    first = Mirror(URL)
    with monkeypatch.context() as broken:
        fail(broken, lambda name: "step-00000010/optimizer" in name or "step-00000012/optimizer" in name, 99)
        train(recipe, first.folder, show=False, mirror=first)
    second = elsewhere(monkeypatch, tmp_path / "other")
    second.fetch()
    assert [path.name for path in checkpoints(second.folder / "checkpoints")] == ["step-00000005"]
    train(recipe, second.folder, resume=True, show=False, mirror=second)
    second.finish()
    assert losses(second.folder) == losses(tmp_path / "whole")
    third = elsewhere(monkeypatch, tmp_path / "third")
    assert third.exists()
    (source,) = load_sources([URL], None, "cpu", "torch", Limits())
    assert source.loaded.engine.dim == 16
    ours, whole = load_bundle(Path(URL)), load_bundle(tmp_path / "whole")
    assert all(value.equal(whole.model.state_dict()[name]) for name, value in ours.model.state_dict().items())


def test_a_run_starts_from_weights_on_a_store(
    micro_recipe: Callable[..., Recipe], trained: Path, tmp_path: Path, store: MemoryFileSystem
) -> None:
    """From a bundle there, one file of it, and its image tower alone: the same start as from the folder here."""
    push(trained / "bundle", Store(URL), "bundle")
    inner = f"bundle/{WEIGHTS}"
    expected = load_file(trained / inner)
    starts: list[dict[str, Any]] = [
        {"weights": URL, "name": f"local-dir:{URL}"},
        {"weights": f"{URL}/{inner}", "name": f"local-dir:{trained}"},
        {"image_weights": f"{URL}/{inner}", "name": f"local-dir:{trained}"},
    ]
    for start in starts:
        model, _ = build_model(ModelConfig.model_validate(start), 16, 12, 512)
        for name, value in model.state_dict().items():
            if "image_weights" not in start or name.startswith("visual."):
                assert value.equal(expected[name]), (start, name)
    recipe = micro_recipe()
    changed = {"model": {"weights": URL, "name": f"local-dir:{URL}"}, "tokenizer": {"kind": "weights"}}
    summary = train(
        recipe.model_copy(
            update={key: type(getattr(recipe, key)).model_validate(value) for key, value in changed.items()}
        ),
        tmp_path / "on",
        show=False,
    )
    assert summary["steps"] == 12
    store.pipe(f"/bucket/runs/a/{inner}", b"other")
    with pytest.raises(BundleError, match="cannot be read as plain tensors"):
        read_weights(f"{URL}/{inner}", "model.weights")
    for missing in (f"{URL}/none.pt", "memory://bucket/none"):
        with pytest.raises(PipelineError, match="none"):
            read_weights(missing, "model.weights")


def test_commands_refuse_a_run_that_is_there_and_a_bundle_that_is_not(
    folder: Path, trained: Path, store: MemoryFileSystem
) -> None:
    store.pipe("/bucket/runs/a/recipe.yaml", b"x")
    result = CliRunner().invoke(cli, ["train", str(trained / "recipe.yaml"), "--run-dir", URL])
    assert (result.exit_code, "--resume" in result.stderr) == (1, True)
    with pytest.raises(BundleError, match="sent whole"):
        load_bundle(URL)
    with pytest.raises((ConfigError, PipelineError), match="nosuch"):
        load_bundle("nosuch://bucket/a")
