"""Several models at once, and one exchanged while requests are under way. With real bundles."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from data_pipelines.errors import PipelineError
from server.app import create_app
from server.loading import load_sources, named
from server.settings import Settings
from vlp.bundle import WEIGHTS, load_bundle, save_bundle
from vlp.infer import encode_texts
from vlp.testing import micro_bundle

TEXT = "a red circle"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: save_bundle(micro_bundle(seed=seed), tmp_path / name) for seed, name in enumerate(("one", "two"))}


def app_of(*given: str) -> Any:
    settings = Settings()
    return create_app(settings, load_sources(given, None, "cpu", "torch", settings.limits))


def vector(url: str, model: str = "") -> list[float]:
    answer = httpx2.post(f"{url}/v1/embeddings", json={"input": TEXT, "model": model}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] in (model, "one")
    found: list[float] = answer.json()["data"][0]["embedding"]
    return found


def expected(folder: Path) -> Any:
    return pytest.approx(encode_texts(load_bundle(folder), [TEXT])[0].tolist(), abs=2e-6)


def test_the_model_is_chosen_by_name(folders: dict[str, Path], serving: Any) -> None:
    with serving(app_of(f"one={folders['one']}", f"two={folders['two']}")) as url:
        assert vector(url, "one") == vector(url) == expected(folders["one"])
        assert vector(url, "two") == expected(folders["two"])
        assert [card["id"] for card in httpx2.get(f"{url}/v1/models").json()["data"]] == ["one", "two"]
        assert httpx2.get(f"{url}/v1/models/two").json()["id"] == "two"
        unknown = httpx2.post(f"{url}/v1/embeddings", json={"input": TEXT, "model": "three"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "model_not_found")
        assert "'one', 'two'" in unknown.json()["message"]
        assert httpx2.get(f"{url}/readyz").status_code == 200


def test_two_of_one_name_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(PipelineError, match="NAME="):
        app_of(str(folders["one"]), str(folders["two"]))


def test_names_of_arguments(tmp_path: Path) -> None:
    assert named(["a=b/c", "runs/x=1"]) == [("a", Path("b/c")), ("", Path("runs/x=1"))]
    for wrong in ("=x", "x="):
        with pytest.raises(PipelineError, match="NAME=FOLDER"):
            named([wrong])


def exchange(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def test_a_reload_takes_the_new_weights_under_the_old_name(folders: dict[str, Path], serving: Any) -> None:
    with serving(app_of(f"one={folders['one']}")) as url:
        before = vector(url)
        exchange(folders["one"], folders["two"])
        assert vector(url) == before
        answer = httpx2.post(f"{url}/v1/models/one/reload", timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "one"
        assert vector(url) == expected(folders["two"])
        assert 'vlp_model_reloads_total{model="one"} 1' in httpx2.get(f"{url}/metrics").text


def test_a_failed_reload_leaves_the_old_model_and_tells_no_path(folders: dict[str, Path], serving: Any) -> None:
    with serving(app_of(f"one={folders['one']}")) as url:
        before = vector(url)
        (folders["one"] / WEIGHTS).write_bytes(b"no weights")
        answer = httpx2.post(f"{url}/v1/models/one/reload", timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "reload_failed")
        assert str(folders["one"].parent) not in answer.text
        assert vector(url) == before
        assert httpx2.post(f"{url}/v1/models/none/reload").status_code == 404


def test_no_request_fails_while_models_are_exchanged(folders: dict[str, Path], serving: Any) -> None:
    """Clients ask without a pause, each time something new, while the weights change under them ten times."""
    stop = threading.Event()

    def ask(url: str, who: int) -> list[int]:
        statuses, number = [], 0
        with httpx2.Client(timeout=30) as client:
            while not stop.is_set():
                number += 1
                body = {"input": [f"{who} {number} {n}" for n in range(4)], "model": "one"}
                statuses.append(client.post(f"{url}/v1/embeddings", json=body).status_code)
        return statuses

    with serving(app_of(f"one={folders['one']}")) as url, ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, url, who) for who in range(4)]
        try:
            for _ in range(10):
                exchange(folders["one"], folders["two"])
                assert httpx2.post(f"{url}/v1/models/one/reload", timeout=60).status_code == 200
        finally:
            stop.set()
        statuses = [status for future in asking for status in future.result()]
    assert set(statuses) == {200}
    assert len(statuses) > 20


def test_threads_of_replaced_models_end(folders: dict[str, Path], serving: Any) -> None:
    def workers() -> int:
        return sum(thread.name == "vlp-model" for thread in threading.enumerate())

    with serving(app_of(f"one={folders['one']}")) as url:
        before = workers()
        for _ in range(3):
            assert httpx2.post(f"{url}/v1/models/one/reload", timeout=30).status_code == 200
        deadline = threading.Event()
        for _ in range(100):
            if workers() == before:
                break
            deadline.wait(0.1)
        assert workers() == before


def test_picture_and_text_rows_are_the_librarys(bundle_folder: Path, serving: Any, b64: Callable[[bytes], str]) -> None:
    """`vlp serve` runs lean towers: the same to rounding."""
    from vlp.infer import encode_images
    from vlp.testing import picture

    with serving(app_of(str(bundle_folder))) as url:
        body = {"input": [{"image": b64(picture(3))}, {"text": TEXT}, {"text": "x"}]}
        data = httpx2.post(f"{url}/v1/embeddings", json=body, timeout=30).json()["data"]
    bundle = load_bundle(bundle_folder)
    wanted = torch.cat([encode_images(bundle, [picture(3)]), encode_texts(bundle, [TEXT, "x"])]).numpy()
    assert np.allclose([json.loads(json.dumps(item["embedding"])) for item in data], wanted, atol=2e-6)
