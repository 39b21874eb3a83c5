"""The files of the web page over HTTP: types, policy, revalidation, and nothing from elsewhere."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from server.app import create_app
from server.routes.page import FOLDER, KINDS
from server.settings import Key, Settings, hash_key
from server.testing import FakeEngine

FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def page(serving: object) -> Iterator[str]:
    settings = Settings(keys=(Key(name="someone", sha256=hash_key("secret")),))
    assert callable(serving)
    with serving(create_app(settings, FakeEngine())) as url:
        yield url


def test_the_page_needs_no_key_and_runs_nothing_but_its_own_files(page: str, http: httpx2.Client) -> None:
    answer = http.get(page)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert "unsafe" not in policy
    for name, value in {"x-content-type-options": "nosniff", "x-frame-options": "DENY"}.items():
        assert answer.headers[name] == value
    assert http.get(f"{page}/v1/models").status_code == 401


@pytest.mark.parametrize("name", FILES)
def test_browsers_ask_whether_a_file_has_changed(page: str, http: httpx2.Client, name: str) -> None:
    first = http.get(f"{page}/ui/{name}")
    assert first.content == (FOLDER / name).read_bytes()
    assert first.headers["content-type"] == KINDS[Path(name).suffix]
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = http.get(f"{page}/ui/{name}", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert http.get(f"{page}/ui/{name}", headers={"If-None-Match": '"other"'}).status_code == 200
    head = http.head(f"{page}/ui/{name}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize("name", ["nothing.js", "..%2fapp.py", "%2e%2e/app.py", "index.html/", "app.js%00"])
def test_nothing_but_the_page_is_given_out(page: str, http: httpx2.Client, name: str) -> None:
    assert http.get(f"{page}/ui/{name}", follow_redirects=False).status_code in {307, 404}


def test_everything_that_is_named_is_there_and_nothing_is_elsewhere() -> None:
    assert {"index.html", "page.css", "app.js", "icon.svg"} <= {*FILES}
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), (
            name
        )
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in FILES, f"{name} imports {imported}"
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:src|href)="ui/([^"]+)"', html)) <= {*FILES}
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*\ssrc=)", html), "the policy forbids it inline"


def test_every_part_of_the_html_that_scripts_use_is_there() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len({*ids})
    used = {name for path in FOLDER.glob("*.js") for name in re.findall(r'byId\("([^"]+)"\)', path.read_text())}
    assert used <= {*ids}
    assert {*re.findall(r'(?:for|aria-describedby|aria-labelledby)="([^"]+)"', html)} <= {*ids}
