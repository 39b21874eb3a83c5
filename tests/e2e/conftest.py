"""A real server with a page, and a real Chromium to look at it, driven over its DevTools pipe: no further package."""

import base64
import importlib
import importlib.util
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp.backdoor.guard import Guard, fit_guard, save_guard
from vlp.bundle import save_bundle
from vlp.embed import weights_digest
from vlp.infer import encode_images
from vlp.testing import WORDS, micro_bundle, picture

ROOT = Path(__file__).parents[2]
KEY = "a-key-for-the-tests-of-the-page"
POINTS = 40
MARKUP = "<img src=x onerror=alert(1)> is a caption"
TALL = [picture(500 + n, (40, 32 + 90 * n)) for n in range(4)]
DETECTS = importlib.util.find_spec("vlp.detection") is not None

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
MISSING = "no Chromium here, and the web page is tested in one: apt-get install -y --no-install-recommends chromium"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio", "--remote-debugging-pipe",
)  # fmt: skip
ON_3_AND_4 = """
import os, sys
given = [os.dup(int(number)) for number in sys.argv[1:3]]
for here, wanted in zip(given, (3, 4)):
    os.dup2(here, wanted)
    os.set_inheritable(wanted, True)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Starts the browser with the pipe on the descriptors where it looks for it."""
PATIENCE = 20.0
"""Seconds; the machine may be busy."""
KEYS = {
    "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, ""), " ": ("Space", 32, " "),
    "ArrowRight": ("ArrowRight", 39, ""),
}  # fmt: skip
MODIFIERS = {"Shift": 8, "Control": 2}


class Browser:
    """One tab of one browser. Mouse, keys and drops are the browser's own events, not calls of the page's functions."""

    def __init__(self, command: str, profile: Path) -> None:
        down, self._out = os.pipe()
        self._in, up = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_3_AND_4, str(down), str(up), command, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(down, up),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down)
        os.close(up)
        self._numbers, self._buffer, self._session = itertools.count(1), b"", ""
        self.problems: list[str] = []
        """What a page threw, and what its policy blocked."""
        self.requests: list[str] = []
        """Addresses that were asked for."""
        try:
            self._attach()
        except BaseException:
            self._process.kill()
            self._process.wait(PATIENCE)
            raise

    def _attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _read(self, waiting: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            assert data, f"the browser did not answer {waiting}; exit code {self._process.poll()}"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(given["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and given["entry"]["source"] in {"security", "violation"}:
            self.problems.append(given["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])

    def js(self, expression: str) -> Any:
        """Value of an expression in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Value of the expression once it is true."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.js(expression)):
            said = self.text("main")
            assert time.monotonic() < deadline, f"{expression} did not come true; the page says:\n{said}"
            time.sleep(0.03)
        return value

    def open(self, url: str) -> None:
        """A page from the start; what the tab kept in its session stays."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def text(self, selector: str) -> str:
        """What people read there; empty where there is nothing."""
        return str(self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def count(self, selector: str) -> int:
        """How many elements there are."""
        return int(self.js(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def point(self, selector: str) -> tuple[float, float]:
        """Middle of an element, scrolled into sight."""
        box = self.js(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f"return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        return float(box[0]), float(box[1])

    def click(self, selector: str) -> None:
        """Press and release the mouse over the middle of an element."""
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def write(self, selector: str, text: str) -> None:
        """Click into a field and replace what it holds."""
        self.click(selector)
        self.js("document.activeElement.select()")
        self.type(text)

    def press(self, key: str, *modifiers: str) -> None:
        """One key, with modifiers held."""
        code, number, text = KEYS[key]
        held = sum(MODIFIERS[name] for name in modifiers)
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": held}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text and not held else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def drop(self, selector: str, files: Sequence[Path]) -> None:
        """Drag files over an element and let them go, as from a file manager."""
        x, y = self.point(selector)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Choose files in a file input."""
        node = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], objectId=node["result"]["objectId"])

    def paste(self, name: str, data: bytes) -> None:
        """A picture out of the clipboard; a headless browser has none to fill, so that the event is made here."""
        held = f"Uint8Array.from(atob('{base64.b64encode(data).decode()}'), (c) => c.charCodeAt(0))"
        self.js(
            f"(held => {{ held.items.add(new File([{held}], {json.dumps(name)}, {{type: 'image/jpeg'}}));"
            "document.activeElement.dispatchEvent("
            "new ClipboardEvent('paste', {clipboardData: held, bubbles: true, cancelable: true}));"
            "})(new DataTransfer())"
        )

    def set(self, selector: str, value: str) -> None:
        """Move a slider or choose from a list, whose own windows are out of reach."""
        self.js(
            f"(e => {{ e.value = {json.dumps(value)}; for (const kind of ['input', 'change'])"
            f"e.dispatchEvent(new Event(kind, {{bubbles: true}})); }})(document.querySelector({json.dumps(selector)}))"
        )

    def window(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Size in CSS pixels and the colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of the window, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def close(self) -> None:
        """End the browser."""
        self._session = ""
        try:
            self.call("Browser.close")
        except (AssertionError, OSError):
            self._process.kill()
        finally:
            self._process.wait(PATIENCE)
            os.close(self._out)
            os.close(self._in)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A fresh Chromium, shared by the tests of a session. Without one they fail and are not skipped."""
    command = next((found for name in NAMES if (found := shutil.which(name))), None)
    assert command is not None, MISSING
    chromium = Browser(command, tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


@dataclass(frozen=True)
class Site:
    """A running server, and pictures to give to its page."""

    url: str
    files: Path
    key: str = KEY
    markup: str = MARKUP
    """A caption."""
    tall: tuple[bytes, ...] = tuple(TALL)
    """Contents of tall0.jpg to tall3.jpg."""

    def ask(self, path: str, content: dict[str, Any]) -> Any:
        """What the API says without a page."""
        answer = httpx2.post(f"{self.url}{path}", json=content, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        assert answer.status_code < 300, answer.text
        return answer.json()


def b64(data: bytes) -> str:
    """Base64 text."""
    return base64.b64encode(data).decode()


def guard_file(bundle: Path, folder: Path) -> Path:
    """A guard that finds two of the four tall pictures suspicious, so that both verdicts are seen."""
    records = [Record(picture(i), (WORDS[i % 7],), "test", f"{i}.jpg") for i in range(240)]
    write_shards(records, folder / "clean", WriteOptions(), kind="test", licences={}, progress=False)
    model = micro_bundle()
    info, profile = fit_guard(model, weights_digest(bundle), folder / "clean", "fast", 0.05)
    scores = Guard(info, profile, model).scored(lambda: encode_images(model, TALL))[1].sort().values
    assert scores[1] < scores[2]
    middle = float((scores[1] + scores[2]) / 2)
    save_guard(folder / "guard.safetensors", info.model_copy(update={"threshold": middle}), profile)
    return folder / "guard.safetensors"


def detector_folder(folder: Path) -> Path:
    """A micro bundle with the parts of a detector, its dense head stirred so that it finds something."""
    model, testing = (importlib.import_module(name) for name in ("vlp.detection.model", "vlp.testing"))
    bundle: Any = micro_bundle()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = model.make_parts(model.PartsConfig(**testing.MICRO_PARTS), bundle.model, 16)
        torch.nn.init.normal_(parts.dense.centre.weight, std=1.0)
        torch.nn.init.normal_(parts.dense.sides.weight, std=0.5)
    parts.info = parts.info.model_copy(update={"stage": "finetune", "base_labels": WORDS[:2]})
    bundle.parts["detection"] = parts.eval()
    return save_bundle(bundle, folder)


def fill(site: Site) -> None:
    """Two collections, one with pictures in most payloads; a label set."""
    fields = {"source": "keyword", "year": "integer"}
    site.ask("/v1/collections", {"name": "photos", "fields": fields})
    site.ask("/v1/collections", {"name": "bare", "captions": ""})
    points: list[dict[str, Any]] = []
    for n in range(POINTS):
        data = picture(n)
        payload: dict[str, Any] = {
            "caption": f"{WORDS[n % 7]} number {n}",
            "source": f"vendor{n % 3}",
            "year": 2000 + n,
        }
        if n % 4:
            payload["thumbnail"] = "data:image/jpeg;base64," + b64(data)
        points.append({"id": n, "image": b64(data), "payload": payload})
    points[0]["payload"]["caption"] = MARKUP
    for some in (points[:25], points[25:]):  # a request may hold 32 pictures
        site.ask("/v1/collections/photos/points", {"points": some})
    site.ask("/v1/label-sets", {"name": "shapes", "labels": list(WORDS[:4])})


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A real `vlp serve` with a key, a guard, collections and, second, a model that detects."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "files").mkdir()
    for n in range(4):
        (folder / "files" / f"picture{n}.jpg").write_bytes(picture(n))
        (folder / "files" / f"tall{n}.jpg").write_bytes(TALL[n])
    (folder / "files" / "broken.jpg").write_bytes(picture(0)[:-200])
    (folder / "files" / "notes.txt").write_text("words")
    bundle = save_bundle(micro_bundle(), folder / "micro")
    bundles = [f"micro={bundle}"]
    if DETECTS:
        bundles.append(f"finder={detector_folder(folder / 'finder')}")
    command = [
        sys.executable, "-m", "vlp", "serve", *bundles, "--guard", str(guard_file(bundle, folder)),
        "--collections", str(folder / "collections"), "--port", "0", "--json", "--log-level", "warning",
        "--drain-wait", "0",
    ]  # fmt: skip
    environment = {**os.environ, "VLP_API_KEYS": KEY, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "the server did not start; its message is above"
            started = Site(json.loads(line)["url"], folder / "files")
            fill(started)
            yield started
        finally:
            process.terminate()
            process.wait(30)
