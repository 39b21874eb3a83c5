"""The web page in a real Chromium, against a real `vlp serve` with a key, a guard and collections."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from vlp.testing import WORDS, picture

NAMES = [f"tall{n}.jpg" for n in range(4)]
CONTRAST = """(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (e) => {
    const colour = e ? channels(getComputedStyle(e).backgroundColor) : [255, 255, 255];
    return colour[3] === 0 ? ground(e.parentElement) : colour;
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest(":disabled, .old, noscript, .skip, option")) continue;
    const [a, b] = [light(channels(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${e.tagName} ${e.innerText.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found;
})()"""
"""Texts on the page whose contrast with their ground is below what WCAG AA asks."""


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(autouse=True)
def clean(browser: Any) -> Iterator[None]:
    """No page throws, breaks its policy or asks another host."""
    browser.problems.clear()
    browser.requests.clear()
    browser.window(1200, 800)
    yield
    assert browser.js("document.title")  # lets what is still on its way arrive
    assert not browser.problems
    hosts = {url.split("/")[2] for url in browser.requests if url.startswith("http")}
    assert len(hosts) <= 1, hosts


def visit(browser: Any, site: Any, place: str = "search") -> None:
    """A view, with the key given as often as it is asked for."""
    browser.open(f"{site.url}/#{place}")
    browser.wait("!document.querySelector('#key-form').hidden || document.querySelectorAll('#c option').length > 0")
    if browser.js("!document.querySelector('#key-form').hidden"):
        browser.write("#key", site.key)
        browser.press("Enter")
    browser.wait("document.querySelectorAll('#models li').length > 0")


def search(browser: Any, text: str) -> None:
    browser.write("#q", text)
    browser.press("Enter")
    browser.wait(f"document.querySelector('#search-status').innerText.includes({json.dumps(text)})")


def titles(browser: Any) -> list[str]:
    found: list[str] = browser.js("[...document.querySelectorAll('.hit .open')].map((e) => e.innerText)")
    return found


def expected(site: Any, **query: Any) -> list[str]:
    found = site.ask("/v1/collections/photos/search", {"limit": 24, **query})
    return [hit["payload"]["caption"] for hit in found["hits"]]


def test_the_key_is_asked_for_kept_in_the_tab_and_forgotten(browser: Any, site: Any) -> None:
    browser.open(f"{site.url}/#server")
    browser.js("sessionStorage.clear()")
    browser.open(f"{site.url}/#server")
    browser.wait("!document.querySelector('#key-form').hidden")
    assert browser.js("document.activeElement.id") == "key"
    browser.type("not this one")
    browser.press("Enter")
    browser.wait("document.querySelector('#key-problem').innerText.includes('does not know this key')")
    assert browser.count("#models li") == 0
    browser.type(site.key)
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#models li').length > 0")
    assert browser.js("document.querySelector('#key-form').hidden")
    shown = browser.text("#view-server")
    for word in ("micro", "guarded", "photos", "40 pictures", "source (keyword)", "shapes", "Ready"):
        assert word in shown
    assert browser.js("[localStorage.length, document.cookie]") == [0, ""]
    browser.open(f"{site.url}/#server")
    browser.wait("document.querySelectorAll('#models li').length > 0")
    browser.click("#forget")
    browser.wait("document.querySelector('#key-form')?.hidden === false")
    assert browser.js("sessionStorage.length") == 0


def test_search_by_words_pages_filters_and_goes_back(browser: Any, site: Any) -> None:
    visit(browser, site)
    browser.click("#search-form button.main")  # nothing typed
    browser.wait("!document.querySelector('#search-problem').hidden")
    assert "Say what to look for" in browser.text("#search-problem")
    search(browser, "red circle")
    assert titles(browser) == expected(site, text="red circle")
    assert browser.js("document.querySelector('#search-problem').hidden")
    browser.wait("[...document.querySelectorAll('.hit img')].some((i) => i.complete && i.naturalWidth > 0)")
    assert 0 < browser.count(".hit.bare") < 24
    browser.click("#later")
    browser.wait("document.querySelector('#range').innerText === '25–40'")
    assert titles(browser) == expected(site, text="red circle", offset=24)
    assert browser.js("document.activeElement.id") == "search-status"
    assert browser.js("document.querySelector('#later').disabled")
    browser.js("history.back()")
    browser.wait("document.querySelector('#range').innerText === '1–24'")
    assert titles(browser) == expected(site, text="red circle")
    browser.click("#search-more summary")
    browser.write("[name='f.source']", "vendor1, vendor2")
    browser.write("[name='f.year.gte']", "2010")
    browser.write("#not", "tall tree")
    browser.press("Enter")
    browser.wait("location.hash.includes('f.source')")
    browser.wait("document.querySelectorAll('.hit').length === 20")
    where = {"source": ["vendor1", "vendor2"], "year": {"gte": 2010}}
    found = expected(site, text="red circle", filter=where, negative=[{"text": "tall tree"}])
    assert titles(browser) == found
    browser.open(browser.js("location.href"))  # an address that was passed on shows the same
    browser.wait("document.querySelectorAll('.hit').length === 20")
    assert titles(browser) == found


def test_captions_stay_text(browser: Any, site: Any) -> None:
    visit(browser, site)
    browser.click("#search-more summary")
    browser.write("#words", "caption onerror")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('.hit').length > 0")
    assert titles(browser)[0] == site.markup
    assert browser.count(".hit img[src='x']") == 0


def test_search_by_a_dropped_picture_and_by_a_result(browser: Any, site: Any) -> None:
    visit(browser, site)
    browser.drop("main", [site.files / "picture3.jpg"])
    browser.wait("document.querySelectorAll('.hit').length === 24")
    assert browser.text(".hit .foot span") == "cosine 1.000"
    assert titles(browser)[0] == f"{WORDS[3]} number 3"
    assert "picture3.jpg" in browser.text("#search-status")
    assert "Guard:" in browser.text("#search-guard")
    browser.drop("main", [site.files / "notes.txt"])
    browser.wait("!document.querySelector('#search-problem').hidden")
    assert "notes.txt is not a picture" in browser.text("#search-problem")
    browser.drop("main", [site.files / "broken.jpg"])
    browser.wait("document.querySelector('#search-problem').innerText.includes('broken.jpg')")
    assert browser.text("#search-problem") == "broken.jpg: the picture is cut short"
    browser.click(".chip button")
    assert browser.count(".chip") == 0
    browser.paste("pasted.jpg", picture(2))
    browser.wait("document.querySelector('#search-status').innerText.includes('pasted.jpg')")
    assert titles(browser)[0] == f"{WORDS[2]} number 2"
    browser.click(".hit:nth-child(2) .foot button")
    browser.wait("document.querySelector('#search-status').innerText.includes('what is like')")
    assert browser.text(".hit .foot span") == "cosine 1.000"


def test_everything_can_be_done_with_the_keyboard(browser: Any, site: Any) -> None:
    visit(browser, site)
    browser.js("document.activeElement.blur(); scrollTo(0, 0)")
    browser.press("Tab")
    assert browser.js("document.activeElement.className") == "skip"
    stops = []
    while browser.js("document.activeElement.id") != "q":
        browser.press("Tab")
        stops.append(browser.js("document.activeElement.innerText || document.activeElement.id"))
        assert browser.js("getComputedStyle(document.activeElement).outlineStyle") != "none", stops
        assert len(stops) < 12, stops
    assert stops == ["vlp", "Search", "Classify", "Detect", "Server", "Forget key", "q"]
    browser.type("green square")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('.hit').length === 24")
    for _ in range(12):
        browser.press("Tab")
        if browser.js("document.activeElement.className") == "open":
            break
    browser.press("Enter")
    browser.wait("document.querySelector('#details').open")
    assert titles(browser)[0] in browser.text("#details")
    browser.press("Escape")
    browser.wait("!document.querySelector('#details').open")
    assert browser.js("document.activeElement.className") == "open"
    browser.press("Tab")
    browser.press(" ")
    browser.wait("document.querySelector('#search-status').innerText.includes('what is like')")


def test_zero_shot_bars_are_the_servers_numbers(browser: Any, site: Any) -> None:
    visit(browser, site, "classify")
    browser.click("#classify-form button.main")
    assert "Choose a picture" in browser.text("#classify-problem")
    browser.drop("#view-classify", [site.files / name for name in (*NAMES, "broken.jpg")])
    browser.wait("document.querySelectorAll('#view-classify .chip').length === 5")
    browser.write("#labels", "red circle\na bear, sitting\ntall tree")
    browser.press("Enter", "Control")
    browser.wait("document.querySelectorAll('.verdict').length === 5")
    labels = ["red circle", "a bear, sitting", "tall tree"]
    answer = site.ask("/v1/classify", {"images": [b64(data) for data in site.tall], "labels": labels})
    assert sum(row["guard"]["flagged"] for row in answer["data"]) == 2
    for n, row in enumerate(answer["data"], 1):
        card = f".verdict:nth-child({n})"
        assert browser.text(f"{card} h3") == row["predictions"][0]["label"]
        cells = browser.js(
            f"[...document.querySelectorAll('{card} tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
        )
        numbers = [
            [p["label"], f"{p['probability'] * 100:.1f} %", f"{p['cosine']:.4f}".replace("-", "−")]
            for p in row["predictions"]
        ]
        assert cells == numbers
        widths = browser.js(f"[...document.querySelectorAll('{card} .fill')].map((e) => e.style.width)")
        assert [float(width[:-1]) for width in widths] == pytest.approx(
            [p["probability"] * 100 for p in row["predictions"]], abs=0.01
        )
        words = "Guard: suspicious" if row["guard"]["flagged"] else "Guard: nothing unusual"
        assert words in browser.text(f"{card} .badge")
    assert "broken.jpg: the picture is cut short" in browser.text(".verdict:nth-child(5)")
    assert "4 pictures classified, 1 could not be used" in browser.text("#classify-status")
    browser.click("#classify-more summary")
    browser.write("#floor", "0.99")
    browser.press("Enter")
    browser.wait("document.querySelector('.verdict h3').innerText === 'Unknown'")
    browser.set("#label-set", "shapes")
    assert browser.js("document.querySelector('#labels-row').hidden")
    browser.write("#floor", "-1")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('.verdict:nth-child(1) tbody tr').length === 4")


def test_a_model_without_a_detector_says_so(browser: Any, site: Any) -> None:
    visit(browser, site, "detect")
    browser.choose("#detect-file", [site.files / "picture1.jpg"])
    browser.wait("document.querySelectorAll('#view-detect .chip').length === 1")
    browser.write("#things", "bear, red circle")
    browser.press("Enter", "Control")
    browser.wait("!document.querySelector('#detect-problem').hidden")
    assert "no detection parts" in browser.text("#detect-problem")
    assert browser.js("document.querySelector('#found').hidden")


def test_boxes_are_drawn_where_the_detector_found_them(browser: Any, site: Any) -> None:
    visit(browser, site, "detect")
    browser.choose("#detect-file", [site.files / "picture1.jpg"])
    browser.wait("document.querySelectorAll('#view-detect .chip').length === 1")
    browser.write("#things", "bear, red circle")
    browser.set("#detect-model", "finder")
    browser.click("#detect-form button.main")
    browser.wait("!document.querySelector('#found').hidden")
    browser.set("#shown", "0")
    wanted = {
        "images": [b64(picture(1))],
        "labels": ["bear", "red circle"],
        "top_k": 100,
        "threshold": 0,
        "model": "finder",
    }
    (row,) = site.ask("/v1/detect", wanted)["data"]
    best = row["detections"][0]
    assert browser.count("#objects li") == len(row["detections"])
    assert browser.text("#objects li").split() == [*best["label"].split(), f"{best['score']:.2f}"]
    browser.click("#objects button")
    assert browser.js("document.querySelector('#objects button').getAttribute('aria-pressed')") == "true"
    assert f"× {best['label']}" in browser.js("document.querySelector('#boxes').getAttribute('aria-label')")
    paint = browser.js("getComputedStyle(document.querySelector('#objects .swatch')).backgroundColor")
    x, y = best["box"]["xmin"] / row["width"], (best["box"]["ymin"] + best["box"]["ymax"]) / 2 / row["height"]
    drawn = browser.js(
        "((c) => { const d = c.getContext('2d').getImageData("
        f"Math.min(c.width - 1, Math.round({x} * c.width)), Math.round({y} * c.height), 1, 1).data;"
        "return `rgb(${d[0]}, ${d[1]}, ${d[2]})`; })(document.querySelector('#boxes'))"
    )
    assert drawn == paint


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_results_show_the_servers_thumbnails_as_they_come_into_sight(browser: Any, site: Any, dark: bool) -> None:
    name = f"small{dark:d}"
    site.ask("/v1/collections", {"name": name, "thumbnails": 64})
    points: list[dict[str, Any]] = [
        {"id": n, "image": b64(picture(n, (90, 60))), "payload": {"caption": f"{WORDS[n % 7]} number {n}"}}
        for n in range(31)
    ]
    points.append({"id": 99, "text": "red circle", "payload": {"caption": "a text without a picture"}})
    site.ask(f"/v1/collections/{name}/points", {"points": points})
    browser.window(1200, 900, dark=dark)
    visit(browser, site, f"search?c={name}&q=red+circle&size=48")
    browser.wait("document.querySelectorAll('.hit').length === 32")
    browser.wait("[...document.querySelectorAll('.hit img')].some((i) => i.complete && i.naturalWidth === 64)")
    assert titles(browser)[0] == "a text without a picture"
    browser.wait("document.querySelector('.hit').className === 'hit bare'")
    asked = [url for url in browser.requests if url.endswith("/thumbnail")]
    assert 4 <= len(asked) < 32, "those far below the window are not asked for"
    alts = browser.js("[...document.querySelectorAll('.hit img')].map((i) => i.alt)")
    assert alts == titles(browser)[1:], "captions are their other text"
    assert browser.js(CONTRAST) == []
    browser.js("document.querySelector('.hit:last-child').scrollIntoView()")
    browser.wait("document.querySelector('.hit:last-child img').naturalWidth === 64")
    browser.js("document.querySelector('.hit:last-child .open').focus()")
    browser.press("Enter")
    browser.wait("document.querySelector('#details-body img')?.naturalWidth === 64")
    browser.press("Escape")
    browser.wait("document.activeElement.className === 'open'")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_legible_and_no_wider_than_a_small_phone(browser: Any, site: Any, dark: bool) -> None:
    browser.window(360, 740, dark=dark, phone=True)
    visit(browser, site, "search")
    search(browser, "blue triangle")
    browser.click("#search-more summary")
    grounds = set()
    for place in ("search", "classify", "detect", "server"):
        browser.js(f"location.hash = '{place}'")
        browser.wait(f"!document.querySelector('#view-{place}').hidden")
        assert browser.js("document.documentElement.scrollWidth") == 360, place
        assert browser.js(CONTRAST) == [], place
        grounds.add(browser.js("getComputedStyle(document.body).backgroundColor"))
        assert len(browser.screenshot()) > 5_000
    assert grounds == {"rgb(20, 23, 26)" if dark else "rgb(247, 247, 245)"}


def test_a_server_that_cannot_be_reached(browser: Any, site: Any) -> None:
    visit(browser, site)
    condition = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    try:
        browser.call("Network.emulateNetworkConditions", offline=True, **condition)
        browser.write("#q", "anything")
        browser.press("Enter")
        browser.wait("!document.querySelector('#search-problem').hidden")
        assert "cannot be reached" in browser.text("#search-problem")
    finally:
        browser.call("Network.emulateNetworkConditions", offline=False, **condition)
    search(browser, "anything")
    assert browser.js("document.querySelector('#search-problem').hidden")
