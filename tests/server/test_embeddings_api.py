"""POST /v1/embeddings over a real socket, with the official client and by hand."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from server.errors import ApiError
from server.images import image_bytes
from vlp.bundle import load_bundle
from vlp.infer import encode_images, encode_texts
from vlp.testing import picture

B64 = Callable[[bytes], str]


@pytest.fixture(scope="module")
def client(live: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live}/v1", api_key="unused", max_retries=0)


def vectors(answer: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([row.embedding for row in answer.data], np.float32)


def test_openai_client_gets_equal_vectors_in_both_encodings(client: openai.OpenAI, bundle_folder: Path) -> None:
    texts = ["red circle", "tall tree", "a photo of a cat"]
    as_base64 = client.embeddings.create(model="micro", input=texts)  # the client's own default
    as_float = client.embeddings.create(model="micro", input=texts, encoding_format="float")
    expected = encode_texts(load_bundle(bundle_folder), texts).numpy()
    assert [row.index for row in as_base64.data] == [0, 1, 2]
    np.testing.assert_array_equal(vectors(as_base64), vectors(as_float))
    np.testing.assert_allclose(vectors(as_float), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors(as_float), axis=1), 1, atol=1e-6)


def test_usage_counts_the_tokens_of_texts_without_padding(client: openai.OpenAI, bundle_folder: Path) -> None:
    tokenizer = load_bundle(bundle_folder).tokenizer
    texts = ["red", "a photo of a cat"]
    expected = int((tokenizer(texts) != tokenizer.config.pad_id).sum())
    usage = client.embeddings.create(model="micro", input=texts).usage
    assert usage.prompt_tokens == usage.total_tokens == expected


def test_one_jpeg_gives_the_same_vector_over_http_as_in_the_library(
    live: str, http: httpx2.Client, bundle_folder: Path, b64: B64
) -> None:
    jpeg = picture(3, size=(97, 61))
    answer = http.post(f"{live}/v1/embeddings", json={"input": b64(jpeg), "modality": "image"}).json()
    expected = encode_images(load_bundle(bundle_folder), [jpeg]).numpy()
    np.testing.assert_allclose([answer["data"][0]["embedding"]], expected, atol=1e-6)
    assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize("route", ["/v1/embeddings", "/embeddings"])
def test_texts_and_pictures_mix_and_keep_their_order(
    route: str, live: str, http: httpx2.Client, bundle_folder: Path, b64: B64
) -> None:
    jpeg, png = picture(1), picture(2, form="PNG")
    given = ["red circle", {"image": b64(jpeg)}, {"text": "tall tree"}, f"data:image/png;base64,{b64(png)}"]
    answer = http.post(f"{live}{route}", json={"input": given, "encoding_format": "float", "unknown": 1}).json()
    bundle = load_bundle(bundle_folder)
    images, texts = encode_images(bundle, [jpeg, png]), encode_texts(bundle, ["red circle", "tall tree"])
    expected = np.stack([texts[0], images[0], texts[1], images[1]])
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], expected, atol=1e-6)
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "write",
    [
        lambda data: base64.b64encode(data).decode(),
        lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
        lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode(),
        lambda data: "data:;base64," + base64.b64encode(data).decode(),
        lambda data: "DATA:image/jpeg;name=a.jpg;charset=x;BASE64," + base64.b64encode(data).decode(),
        lambda data: "data:image/jpeg," + "".join(f"%{byte:02x}" for byte in data),
    ],
    ids=["plain", "url-safe-unpadded", "uri", "uri-without-type", "uri-with-parameters", "uri-percent"],
)
def test_every_way_to_write_a_picture(write: Callable[[bytes], str], live: str, http: httpx2.Client) -> None:
    jpeg = picture(5)
    plain = base64.b64encode(jpeg).decode()
    both = http.post(f"{live}/v1/embeddings", json={"input": [plain, write(jpeg)], "modality": "image"}).json()["data"]
    np.testing.assert_allclose(both[0]["embedding"], both[1]["embedding"], atol=1e-6)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}])
def test_the_content_type_does_not_matter(headers: dict[str, str], live: str, http: httpx2.Client) -> None:
    assert http.post(f"{live}/v1/embeddings", content=b'{"input": "red"}', headers=headers).status_code == 200


def test_a_url_is_text_unless_it_is_called_an_image(live: str, http: httpx2.Client) -> None:
    address = "https://example.com/cat.jpg"
    assert http.post(f"{live}/v1/embeddings", json={"input": address}).status_code == 200
    refused = http.post(f"{live}/v1/embeddings", json={"input": address, "modality": "image"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "url_not_allowed")


def bomb() -> bytes:
    """A PNG header that promises 20,990 x 29,700 pixels, and little else."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20990, 29700, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def narrow() -> bytes:
    """A picture of few pixels with one side longer than any limit."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (16_385, 2)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: b"GIF89a, or so they say", "not_an_image"),
        (lambda: b"hello", "not_an_image"),
        (lambda: picture(1)[:-200], "truncated_image"),
        (lambda: picture(1, form="PNG")[:-200], "truncated_image"),
        (bomb, "too_many_pixels"),
        (narrow, "too_many_pixels"),
    ],
    ids=["text", "short", "cut-jpeg", "cut-png", "bomb", "narrow"],
)
def test_a_bad_picture_is_named_and_explained(
    make: Callable[[], bytes], code: str, live: str, http: httpx2.Client, b64: B64
) -> None:
    given = [{"image": b64(picture(1))}, {"image": b64(make())}]
    answer = http.post(f"{live}/v1/embeddings", json={"input": given})
    body = answer.json()
    assert answer.status_code == 400
    assert body["error"]["param"] == "input[1]"
    assert body["error"]["code"] == code
    assert body["message"] == body["detail"] == body["error"]["message"]
    assert not any(secret in answer.text for secret in ("Traceback", "/", ".py", "0x"))


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing", "input"),
        ({"input": []}, "empty_input", "input"),
        ({"input": ""}, "empty_input", "input"),
        ({"input": ["a", ""]}, "empty_input", "input[1]"),
        ({"input": [1, 2]}, "token_ids", "input"),
        ({"input": [[1, 2], [3]]}, "token_ids", "input[0]"),
        ({"input": ["a", 1]}, "invalid_item", "input[1]"),
        ({"input": 7}, "invalid_item", "input"),
        ({"input": {"text": "a", "image": "b"}}, "invalid_item", "input"),
        ({"input": [{"image": 5}]}, "invalid_item", "input[0]"),
        ({"input": [{"image": "white space"}]}, "invalid_base64", "input[0]"),
        ({"input": [{"image": "é" * 8}]}, "invalid_base64", "input[0]"),
        ({"input": [{"image": "data:image/png"}]}, "invalid_data_uri", "input[0]"),
        ({"input": [{"image": "data:text/plain;base64,aGk="}]}, "not_an_image", "input[0]"),
        ({"input": [{"image": "file:///etc/hosts"}]}, "url_not_allowed", "input[0]"),
        ({"input": [{"image": "="}]}, "empty_input", "input[0]"),
        ({"input": ["a"] * 1025}, "too_many_items", "input"),
        ({"input": ["/9j/"] * 33, "modality": "image"}, "too_many_items", "input"),
        ({"input": "a" * 8193}, "text_too_long", "input"),
        ({"input": "a", "model": "gpt"}, "model_not_found", "model"),
        ({"input": "a", "dimensions": 8}, "invalid_value", "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "literal_error", "encoding_format"),
        ({"input": "a", "modality": "smell"}, "literal_error", "modality"),
    ],
)
def test_bad_requests(body: dict[str, Any], code: str, param: str, live: str, http: httpx2.Client) -> None:
    answer = http.post(f"{live}/v1/embeddings", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"input": "\\ud800"}', b'{"input": "\xed\xa0\x80"}', b"[" * 100_000],
)
def test_bodies_that_are_no_json_object(content: bytes, live: str, http: httpx2.Client) -> None:
    answer = http.post(f"{live}/v1/embeddings", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_half_a_character_in_a_data_uri_is_refused() -> None:
    """No body that is JSON has one; whoever calls the parser otherwise gets the error that it promises."""
    with pytest.raises(ApiError, match=r"input\[0\]: the data URI"):
        image_bytes("data:,\udcff", "input[0]")


@pytest.mark.parametrize("off", [None, 0])
def test_dimensions_may_be_switched_off(off: int | None, live: str, http: httpx2.Client) -> None:
    answer = http.post(f"{live}/v1/embeddings", json={"input": "a", "dimensions": off, "model": None})
    assert len(answer.json()["data"][0]["embedding"]) == 16


def test_a_long_text_is_cut_to_the_context_like_everywhere(live: str, http: httpx2.Client, bundle_folder: Path) -> None:
    text = "red circle " * 100
    answer = http.post(f"{live}/v1/embeddings", json={"input": text}).json()
    expected = encode_texts(load_bundle(bundle_folder), [text]).numpy()
    np.testing.assert_allclose([answer["data"][0]["embedding"]], expected, atol=1e-6)
    assert answer["usage"]["prompt_tokens"] == 12


def test_the_openai_client_understands_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="nope", input="a")
    assert caught.value.code == "model_not_found"
    assert client.models.list().data[0].id == "micro"
    assert client.models.retrieve("micro").owned_by == "vlp"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
