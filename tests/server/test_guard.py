"""`vlp serve --guard`: verdicts in answers and headers over a real socket, and none without it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from click.testing import CliRunner

from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from server.app import create_app
from server.cli import serve
from server.index.edge import open_index
from server.keys import ENVIRONMENT as KEYS
from server.loading import load_model
from server.serving import Launch, build_app
from server.settings import Settings
from vlp.backdoor.guard import Guard, Info, Profile, fit_guard, load_guard, save_guard
from vlp.bundle import load_bundle, save_bundle
from vlp.embed import weights_digest
from vlp.infer import encode_images
from vlp.testing import WORDS, micro_bundle, picture

B64 = Callable[[bytes], str]


@pytest.fixture(scope="module")
def guard_file(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted on pictures like those of the tests, its threshold set amid their scores so that both verdicts occur."""
    folder = tmp_path_factory.mktemp("guard")
    records = [Record(picture(i), (WORDS[i % 7],), "test", f"{i}.jpg") for i in range(240)]
    write_shards(records, folder / "clean", WriteOptions(), kind="test", licences={}, progress=False)
    bundle = load_bundle(bundle_folder)
    info, profile = fit_guard(bundle, weights_digest(bundle_folder), folder / "clean", "fast", 0.05)
    scores = library_scores(bundle_folder, (info, profile), PICTURES).sort().values
    middle = float((scores[1] + scores[2]) / 2)
    assert scores[1] < middle < scores[2]
    save_guard(folder / "guard.safetensors", info.model_copy(update={"threshold": middle}), profile)
    return folder / "guard.safetensors"


PICTURES = [picture(500 + number, (40, 32 + 90 * number)) for number in range(4)]


def library_scores(bundle_folder: Path, guard: tuple[Info, Profile], pictures: list[bytes]) -> torch.Tensor:
    bundle = load_bundle(bundle_folder)
    return Guard(*guard, bundle).scored(lambda: encode_images(bundle, pictures))[1]


@pytest.fixture(scope="module")
def guarded(
    bundle_folder: Path, guard_file: Path, index_folder: Path, tmp_path_factory: pytest.TempPathFactory, serving: Any
) -> Iterator[str]:
    index = shutil.copytree(index_folder, tmp_path_factory.mktemp("copy") / "index")  # the other is open already
    settings = Settings()
    # loaded as `vlp serve` does it: which towers run decides what the guard gets to see
    loaded = load_model("", bundle_folder, guard_file, "cpu", "torch", settings.limits)
    app = create_app(settings, loaded.engine, open_index(index), loaded.guarding)
    with serving(app) as url:
        yield url


def test_verdicts_are_the_librarys(
    guarded: str, http: httpx2.Client, bundle_folder: Path, guard_file: Path, b64: B64
) -> None:
    guard = load_guard(guard_file, weights_digest(bundle_folder))
    expected = library_scores(bundle_folder, guard, PICTURES).tolist()
    given = [b64(data) for data in PICTURES]
    answer = http.post(f"{guarded}/v1/classify", json={"images": [*given[:2], "!", *given[2:]], "labels": ["a", "b"]})
    rows = answer.json()["data"]
    assert "guard" not in rows.pop(2), "a picture that cannot be used has no verdict"
    assert [row["guard"]["score"] for row in rows] == pytest.approx(expected, abs=1e-3)
    flags = [score > guard[0].threshold for score in expected]
    assert [row["guard"]["flagged"] for row in rows] == flags
    assert sorted(flags) == [False, False, True, True]
    assert answer.headers["x-guard-flagged"] == ",".join(str(int(flag)) for flag in flags)
    assert [float(score) for score in answer.headers["x-guard-score"].split(",")] == pytest.approx(expected, abs=2e-3)
    for data, score in zip(given, expected, strict=True):
        found = http.post(f"{guarded}/v1/search", json={"image": data, "limit": 1}).json()
        assert found["guard"] == {"score": pytest.approx(score, abs=1e-3), "flagged": score > guard[0].threshold}
        assert len(found["hits"]) == 1


def test_others_dialects_get_headers_alone(guarded: str, live: str, http: httpx2.Client, b64: B64) -> None:
    """The body of OpenAI's route has the very same keys and vectors as without a guard."""
    inputs = {"input": [{"image": b64(PICTURES[3])}, {"text": "a red circle"}, {"image": b64(PICTURES[0])}]}
    with_guard, without = (http.post(f"{url}/v1/embeddings", json=inputs) for url in (guarded, live))
    assert with_guard.json().keys() == without.json().keys()
    for mine, other in zip(with_guard.json()["data"], without.json()["data"], strict=True):
        assert mine.keys() == other.keys()
        assert mine["embedding"] == pytest.approx(other["embedding"], abs=1e-6)
        assert len(mine["embedding"]) == 16
    assert len(with_guard.headers["x-guard-flagged"].split(",")) == 2
    texts = http.post(f"{guarded}/v1/embeddings", json={"input": ["a red circle"]})
    assert "x-guard-flagged" not in texts.headers


def test_nothing_without_a_guard(live: str, http: httpx2.Client, b64: B64) -> None:
    classified = http.post(f"{live}/v1/classify", json={"image": b64(PICTURES[0]), "labels": ["a"]})
    assert classified.json()["data"][0].keys() == {"index", "predictions", "error"}
    found = http.post(f"{live}/v1/search", json={"image": b64(PICTURES[0])})
    assert found.json().keys() == {"model", "hits"}
    assert not [name for answer in (classified, found) for name in answer.headers if name.startswith("x-guard")]
    assert "guard" not in http.get(f"{live}/v1/models").json()["data"][0]


def test_verdicts_are_counted(guarded: str, http: httpx2.Client, b64: B64) -> None:
    def state() -> dict[str, Any]:
        found: dict[str, Any] = http.get(f"{guarded}/v1/models").json()["data"][0]["guard"]
        return found

    before = state()
    for _ in range(2):
        http.post(f"{guarded}/v1/classify", json={"images": [b64(data) for data in PICTURES], "labels": ["a"]})
    after = state()
    assert after["pictures"] - before["pictures"] == 8
    assert after["flagged"] - before["flagged"] == 4
    assert (after["mode"], after["fpr"]) == ("fast", 0.05)


def test_the_command_serves_with_a_guard(bundle_folder: Path, guard_file: Path, b64: B64, serving: Any) -> None:
    """All of `vlp serve --guard` but its process, which another test starts and stops."""
    app, info = build_app(Launch(Settings(), (str(bundle_folder),), guard=guard_file, device="cpu"))
    assert info["guard"]["pictures"] == 0
    with serving(app) as url:
        answer = httpx2.post(f"{url}/v1/classify", json={"image": b64(PICTURES[0]), "labels": ["a"]}, timeout=30)
    assert answer.json()["data"][0]["guard"]["flagged"] is bool(int(answer.headers["x-guard-flagged"]))


def test_a_guard_of_another_bundle_is_refused(guard_file: Path, tmp_path: Path) -> None:
    other = save_bundle(micro_bundle(seed=1), tmp_path / "other")
    for path, message in ((guard_file, "with other weights"), (tmp_path / "none", "no guard")):
        done = CliRunner().invoke(serve, [str(other), "--guard", str(path), "--port", "0"], env={KEYS: ""})
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit), "not a readable message"
        assert message in done.output
