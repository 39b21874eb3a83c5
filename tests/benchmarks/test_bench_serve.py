"""The parts of the server's figures and proofs that need no peer, at small size. Nothing here reads a clock."""

import asyncio
import io
import random
from collections import Counter
from itertools import count
from pathlib import Path

import click
import numpy as np
import prove_server
import pytest
from hostile_images import EITHER, OK, hostile_images
from mutants import fault_of, send_mutants, spoilt
from overload_rows import Seen, _rows, stream
from peer_search import LIMIT
from PIL import Image
from rebinding import rebind, serving_urls
from search_rows import nearest, recall, write_vectors
from serve_rows import LOADS, Items
from serve_sides import infinity, open_clip, ours

from data_pipelines.errors import BadSample
from data_pipelines.preprocess import ImageConfig, load_image
from server.engine import check_picture
from server.settings import Limits


def test_hostile_pictures_are_what_they_say() -> None:
    """The image gate alone: statuses as over HTTP, but for what the data URI claims."""
    cases = list(hostile_images(120))
    assert len({case.kind for case in cases}) > 50
    for case in cases:
        try:
            check_picture(case.data, Limits())
            load_image(case.data, ImageConfig(size=32), Limits().pixels)
            status = 200
        except BadSample:
            status = 400
        assert case.mime or status in case.right, case.kind
    assert sum(case.right == OK for case in cases) > 20, "too many are refused for the right ones to be seen"
    assert sum(case.right == EITHER for case in cases) < 40, "too little is demanded"
    assert [case.data for case in hostile_images(40)] == [case.data for case in cases[:40]]


def test_names_that_rebind_lead_nowhere() -> None:
    assert rebind(8) == (8, 0)


def test_a_fetcher_that_asks_twice_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign can fail: without the check of addresses the inside is dialled, by half of the kinds at least."""
    monkeypatch.setattr("data_pipelines.fetch.is_public", lambda _address: True)
    right, inside = rebind(8)
    assert right < 8
    assert inside >= 2


def test_spoilt_requests_break_nothing() -> None:
    with serving_urls() as url:
        met = send_mutants(int(url.rpartition(":")[2]), 60)
    assert met.sent == sum(met.statuses.values()) == 60
    assert met.failures == []
    assert {"200", "400"} <= set(met.statuses)


def test_faults_of_answers_are_seen() -> None:
    head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n\r\n"
    assert fault_of(b"") is None
    assert fault_of(head % 200 + b"{") is None
    assert fault_of(head % 404 + b"{}") is None
    assert fault_of(head % 404 + b"{") == "no JSON: b'{'"
    assert fault_of(head % 500 + b"{}") == "status 500: b'{}'"
    assert "no HTTP" in str(fault_of(b"SSH-2.0"))
    assert spoilt(random.Random(3)) == spoilt(random.Random(3)) != spoilt(random.Random(4))


def test_an_open_stream_counts_from_when_a_request_was_due() -> None:
    """A server that answers one request after the other, each in 20 ms: of ten at once the last waits 200 ms."""

    async def run() -> tuple[Seen, Seen]:
        turn = asyncio.Lock()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while head := await reader.read(1000):
                async with turn:
                    await asyncio.sleep(0.02)
                late = b"HTTP/1.1 429 X\r\nContent-Length: 2\r\n%s\r\n{}"
                writer.write(
                    late % (b"Retry-After: 1\r\n" if b"polite" in head else b"")
                    if b"late" in head or b"polite" in head
                    else b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\n{}"
                )
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            quick = await stream(port, "/", [b"a"] * 10, 1e6)
            mixed = await stream(port, "/", [b"late", b"polite", b"a"], 1e6)
            await asyncio.sleep(0.05)  # for the server to see that the clients have gone
        return quick, mixed

    quick, mixed = asyncio.run(run())
    assert quick.statuses == Counter({"200": 10})
    assert max(quick.accepted) >= 0.2
    assert min(quick.accepted) < max(quick.accepted) / 2
    assert mixed.statuses == Counter({"200": 1, "429": 1, "429 without Retry-After": 1})


def test_overload_rows_by_hand() -> None:
    """Peak 10/s; 36 accepted in 4 s are goodput 0.9; p99 of equal latencies is that latency: 0.3 over 0.2 s."""
    quiet = Seen([0.2] * 5, [], Counter({"200": 5}), 1.0)
    busy = Seen([0.3] * 36, [0.025] * 9, Counter({"200": 36, "429": 9}), 4.0)
    goodput, latency, refusals = _rows(10.0, [quiet], [busy])
    assert [(row.ratio, row.met) for row in (goodput, latency, refusals)] == [(0.9, True), (1.5, True), (0.5, True)]
    rude = Seen(busy.accepted, busy.refused, Counter({"200": 36, "429 without Retry-After": 9}), 4.0)
    assert not any(row.met for row in _rows(10.0, [quiet], [rude]))


def test_recall_is_against_an_exact_search(tmp_path: Path) -> None:
    write_vectors(tmp_path, rows=500, dim=16, queries=4, centres=20)
    base_ND, group_N = np.load(tmp_path / "base.npy"), np.load(tmp_path / "group.npy")
    np.testing.assert_allclose(np.linalg.norm(base_ND, axis=1), 1, atol=1e-6)
    best_QK = nearest(tmp_path, filtered=True)
    assert best_QK.shape == (4, LIMIT)
    assert set(group_N[best_QK].ravel().tolist()) == {3}
    found = best_QK.tolist()
    assert recall(found, best_QK) == 1.0
    found[0] = [-1] * LIMIT
    assert recall(found, best_QK) == 0.75


def test_every_item_is_new_and_every_side_gets_the_same() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    items = Items([buffer.getvalue()], ["a cat"], count())
    sides = (ours(), open_clip(), infinity())
    bodies = [items.take("image", 2, side) for side in sides for _ in range(2)] + [items.take("text", 2, ours())]
    assert len(set(bodies)) == 7
    assert bodies[-1] == b'{"input": ["a cat 12", "a cat 13"]}'
    assert {load.kind for load in LOADS.values()} == {"image", "text"}


def test_campaigns_are_chosen_with_their_numbers() -> None:
    assert prove_server.numbers(()) == {
        "requests": 50_000, "parsers": 1_000_000, "images": 2_000, "addresses": 1_000, "kills": 200, "sigterms": 100,
    }  # fmt: skip
    assert prove_server.numbers(("kills=3", "images")) == {"kills": 3, "images": 2_000}
    for wrong in ("kill", "kills=0", "kills=x", "kills=-1"):
        with pytest.raises(click.UsageError, match="NAME or NAME=CASES"):
            prove_server.numbers((wrong,))
