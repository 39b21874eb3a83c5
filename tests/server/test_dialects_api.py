"""Embeddings and zero-shot tasks in the words of Cohere, TEI, Hugging Face, Jina, Voyage and vLLM, over a real socket.

Cohere's and Hugging Face's own clients ask here; those that want an environment of their own do in
test_foreign_clients.py.
"""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import httpx2
import huggingface_hub
import numpy as np
import pytest

from server.answers import as_binary, as_int8, as_ubinary, as_uint8
from vlp.bundle import load_bundle
from vlp.infer import classify, encode_images, encode_texts, label_head
from vlp.testing import picture

B64 = Callable[[bytes], str]
Floats = np.ndarray[Any, np.dtype[np.float32]]
TEXTS = ["red circle", "tall tree"]
LABELS = ["red circle", "green square", "tall tree"]
LONG = "red circle " * 100
URI = "data:image/jpeg;base64,"


@pytest.fixture(scope="module")
def texts(bundle_folder: Path) -> Floats:
    found: Floats = encode_texts(load_bundle(bundle_folder), TEXTS).numpy()
    return found


@pytest.fixture(scope="module")
def images(bundle_folder: Path) -> Floats:
    found: Floats = encode_images(load_bundle(bundle_folder), [picture(1), picture(2)]).numpy()
    return found


def data_uri(data: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def test_vectors_in_every_encoding() -> None:
    """Derived by hand: 0.5 x 127 = 63.5 rounds to the even 64; (0.5 + 1) x 127.5 = 191.25; bits 1 0 1 0, then four
    zeros of padding, are 0b10100000 = 160, and 160 - 128 = 32."""
    row = np.array([0.5, -1.0, 1.0, 0.0], np.float32)
    assert as_int8(row).tolist() == [64, -127, 127, 0]
    assert as_uint8(row).tolist() == [191, 0, 255, 128]
    assert as_ubinary(row).tolist() == [160]
    assert as_binary(row).tolist() == [32]
    assert as_int8(np.array([np.nan, np.inf], np.float32)).tolist() == [0, 127]


@pytest.fixture(scope="module")
def session() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as found:  # Cohere's clients never close their own
        yield found


@pytest.fixture(scope="module")
def cohere_v2(live: str, session: httpx.Client) -> cohere.ClientV2:
    return cohere.ClientV2(api_key="unused", base_url=live, httpx_client=session)


def test_the_cohere_client_embeds_texts_in_all_types(cohere_v2: cohere.ClientV2, texts: Floats) -> None:
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = cohere_v2.embed(model="micro", input_type="search_query", texts=TEXTS, embedding_types=kinds)
    found = answer.embeddings
    assert found.float_ is not None
    assert found.base64 is not None
    np.testing.assert_allclose(found.float_, texts, atol=1e-6)
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in found.base64]
    np.testing.assert_array_equal(decoded, np.array(found.float_, np.float32))
    exact = np.array(found.float_, np.float32)
    assert found.int8 == [as_int8(row).tolist() for row in exact]
    assert found.uint8 == [as_uint8(row).tolist() for row in exact]
    assert found.ubinary == [as_ubinary(row).tolist() for row in exact]
    assert found.binary == [as_binary(row).tolist() for row in exact]
    assert answer.texts == TEXTS
    assert answer.meta is not None
    assert answer.meta.billed_units is not None
    assert answer.meta.billed_units.input_tokens


def test_the_cohere_client_embeds_pictures_and_mixed_inputs(cohere_v2: cohere.ClientV2, images: Floats) -> None:
    given = [data_uri(picture(1)), data_uri(picture(2))]
    answer = cohere_v2.embed(model="micro", input_type="image", images=given, embedding_types=["float"])
    assert answer.embeddings.float_ is not None
    np.testing.assert_allclose(answer.embeddings.float_, images, atol=1e-6)
    inputs: Any = [
        {"content": [{"type": "image_url", "image_url": {"url": given[1]}}]},
        {"content": [{"type": "text", "text": "a"}]},
    ]
    mixed = cohere_v2.embed(model="micro", input_type="search_document", inputs=inputs)
    assert mixed.embeddings.float_ is not None
    np.testing.assert_allclose(mixed.embeddings.float_[0], images[1], atol=1e-6)


def test_the_old_cohere_client_gets_a_plain_list(live: str, session: httpx.Client, texts: Floats) -> None:
    client = cohere.Client(api_key="unused", base_url=live, httpx_client=session)
    plain = client.embed(texts=TEXTS, model="micro", input_type="search_document")
    np.testing.assert_allclose(np.array(plain.embeddings, np.float32), texts, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"texts": ["a"], "images": ["b"]}, None),
        ({"texts": []}, "texts"),
        ({"texts": ["a", ""]}, "texts[1]"),
        ({"images": ["data:image/png;base64,aGk="]}, "images[0]"),
        ({"images": ["https://example.com/a.png"]}, "images[0]"),
        ({"inputs": [{"content": []}]}, "inputs[0].content"),
        ({"inputs": [{"text": "a"}]}, "inputs[0]"),
        ({"inputs": [{"content": [{"text": "a"}, {"text": "b"}]}]}, "inputs[0].content[1]"),
        ({"inputs": [{"content": [{"type": "video", "video": "a"}]}]}, "inputs[0].content[0].type"),
        ({"texts": ["a"], "embedding_types": ["int4"]}, "embedding_types[0]"),
        ({"texts": ["a"], "output_dimension": 8}, "output_dimension"),
        ({"texts": [LONG], "truncate": "NONE"}, "texts[0]"),
        ({"texts": ["a"], "truncate": "START"}, None),
        ({"texts": ["a"], "model": "other"}, "model"),
    ],
)  # fmt: skip
def test_bad_requests_to_cohere(body: dict[str, Any], param: str | None, live: str, http: httpx2.Client) -> None:
    answer = http.post(f"{live}/v2/embed", json=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"message", "code", "param"}
    assert param is None or answer.json()["param"] == param


def test_the_cohere_client_understands_our_errors(cohere_v2: cohere.ClientV2) -> None:
    with pytest.raises(cohere.BadRequestError) as caught:
        cohere_v2.embed(model="nope", input_type="search_query", texts=["a"])
    assert "not served here" in caught.value.body["message"]


@pytest.mark.parametrize(
    ("make", "which"),
    [
        (lambda b64: {"input": [{"bytes": b64}]}, "image"),
        (lambda b64: {"input": [{"url": URI + b64}]}, "image"),
        (lambda b64: {"input": [{"type": "image_base64", "image_base64": URI + b64}]}, "image"),
        (lambda b64: {"input": [{"type": "image_url", "image_url": URI + b64}]}, "image"),
        (lambda b64: {"input": [{"content": [{"type": "image_url", "image_url": {"url": URI + b64}}]}]}, "image"),
        (lambda b64: {"messages": [{"content": [{"type": "image_url", "image_url": {"url": URI + b64}}]}]}, "image"),
        (lambda b64: {"messages": [{"role": "user", "content": "red circle"}]}, "text"),
        (lambda b64: {"input": [{"type": "text", "text": "red circle"}]}, "text"),
        (lambda b64: {"input": b64, "modality": "auto"}, "image"),
        (lambda b64: {"input": "red circle", "modality": "auto"}, "text"),
    ],
)  # fmt: skip
def test_every_form_of_an_input(
    make: Any, which: str, live: str, http: httpx2.Client, b64: B64, texts: Floats, images: Floats
) -> None:
    answer = http.post(f"{live}/v1/embeddings", json=make(b64(picture(1))))
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(
        answer.json()["data"][0]["embedding"], (texts if which == "text" else images)[0], atol=1e-6
    )


def test_several_parts_become_one_vector_when_asked(
    live: str, http: httpx2.Client, texts: Floats, images: Floats
) -> None:
    content = [{"type": "text", "text": TEXTS[0]}, {"type": "image_url", "image_url": {"url": data_uri(picture(2))}}]
    body = {"messages": [{"role": "user", "content": content}]}
    refused = http.post(f"{live}/v1/embeddings", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "fusion_not_requested")
    row = http.post(f"{live}/v1/embeddings", json={**body, "fusion": "mean"}).json()["data"][0]["embedding"]
    mean = (texts[0] + images[1]) / 2
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_the_old_route_of_infinity_takes_strings_for_pictures(
    live: str, http: httpx2.Client, b64: B64, images: Floats
) -> None:
    answer = http.post(f"{live}/embeddings_image", json={"input": [b64(picture(1)), data_uri(picture(2))]}).json()
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], images, atol=1e-6)


@pytest.mark.parametrize("name", ["embedding_type", "encoding_type"])
def test_jinas_binary_vectors(name: str, live: str, http: httpx2.Client, texts: Floats) -> None:
    answer = http.post(f"{live}/v1/embeddings", json={"input": TEXTS, name: "ubinary"}).json()
    assert [row["embedding"] for row in answer["data"]] == [np.packbits(row > 0).tolist() for row in texts]


def test_voyages_route(live: str, http: httpx2.Client, texts: Floats) -> None:
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    answer = http.post(f"{live}/v1/multimodalembeddings", json={"inputs": inputs, "output_encoding": "base64"}).json()
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer["data"]]
    np.testing.assert_allclose(rows, texts, atol=1e-6)
    assert answer["usage"]["text_tokens"] == answer["usage"]["total_tokens"] > 0
    long = {"inputs": [{"content": [{"type": "text", "text": LONG}]}], "truncation": False}
    refused = http.post(f"{live}/multimodalembeddings", json=long)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "inputs[0].content[0]")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"input": "a", "normalized": False}, "value_error"),
        ({"input": "a", "encoding_format": "base64", "embedding_type": "float"}, "value_error"),
        ({"input": "https://example.com/a.jpg", "modality": "auto"}, "url_not_allowed"),
        ({"messages": []}, "invalid_item"),
        ({"messages": [{"role": "system", "content": "a"}]}, "invalid_item"),
        ({"input": [{"type": "audio", "audio": "a"}]}, "invalid_item"),
        ({"input": [{"type": "image_url", "image_url": 5}]}, "invalid_item"),
        ({"input": [{"text": ""}]}, "empty_input"),
        ({"input": "a", "dimensions": -1}, "greater_than_equal"),
    ],
)
def test_bad_inputs(body: dict[str, Any], code: str, live: str, http: httpx2.Client) -> None:
    answer = http.post(f"{live}/v1/embeddings", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_own_width_as_dimensions_is_fine(live: str, http: httpx2.Client) -> None:
    assert http.post(f"{live}/v1/embeddings", json={"input": "a", "dimensions": 16}).status_code == 200


@pytest.mark.parametrize("inputs", ["red circle", ["red circle"]])
def test_tei_always_answers_a_list_of_vectors(inputs: Any, live: str, http: httpx2.Client, texts: Floats) -> None:
    np.testing.assert_allclose(http.post(f"{live}/embed", json={"inputs": inputs}).json(), texts[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"inputs": LONG}, 422, "Validation"),
        ({"inputs": []}, 400, "Empty"),
        ({"inputs": ["a", ""]}, 400, "Empty"),
        ({}, 422, "Validation"),
        ({"inputs": "a", "truncate": True, "truncation_direction": "Left"}, 422, "Validation"),
        ({"inputs": "a", "normalize": False}, 422, "Validation"),
        ({"inputs": "a", "prompt_name": "query"}, 422, "Validation"),
        ({"inputs": "a", "dimensions": 4}, 422, "Validation"),
    ],
)
def test_bad_requests_to_tei(body: dict[str, Any], status: int, kind: str, live: str, http: httpx2.Client) -> None:
    answer = http.post(f"{live}/embed", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind), answer.text
    assert set(answer.json()) == {"error", "error_type"}


def test_tei_cuts_when_told(live: str, http: httpx2.Client, bundle_folder: Path) -> None:
    answer = http.post(f"{live}/embed", json={"inputs": LONG, "truncate": True})
    np.testing.assert_allclose(answer.json(), encode_texts(load_bundle(bundle_folder), [LONG]).numpy(), atol=1e-6)
    fits = "red circle " * 5  # the marks at both ends leave ten of twelve tokens: not a word more would fit
    assert http.post(f"{live}/embed", json={"inputs": fits}).status_code == 200
    assert http.post(f"{live}/embed", json={"inputs": fits + "red"}).status_code == 422


def test_tei_says_what_it_is(live: str, http: httpx2.Client) -> None:
    info = http.get(f"{live}/info").json()
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == ("micro", 12, 1024)
    wrong = http.get(f"{live}/embed")
    assert (wrong.status_code, wrong.json()["error_type"]) == (405, "Validation")


def hub(url: str) -> huggingface_hub.InferenceClient:
    return huggingface_hub.InferenceClient(model=url, timeout=30)


@pytest.mark.parametrize("route", ["/embed", "/feature-extraction", "/", "/models/micro"])
def test_the_hub_client_extracts_features(route: str, live: str, texts: Floats) -> None:
    np.testing.assert_allclose(hub(live + route).feature_extraction(TEXTS[0]), texts[:1], atol=1e-6)


@pytest.mark.parametrize("route", ["/similarity", "/"])
def test_the_hub_client_compares_sentences(route: str, live: str, texts: Floats, bundle_folder: Path) -> None:
    found = hub(live + route).sentence_similarity(TEXTS[0], other_sentences=[TEXTS[1], TEXTS[0]])
    np.testing.assert_allclose(found, [texts[0] @ texts[1], 1.0], atol=1e-5)


@pytest.mark.parametrize("route", ["/zero-shot-image-classification", "/"])
@pytest.mark.parametrize("template", [None, "a photo of {}"])
def test_the_hub_client_classifies(
    route: str, template: str | None, live: str, tmp_path: Path, bundle_folder: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    client = hub(live + route)
    found = client.zero_shot_image_classification(
        tmp_path / "a.jpg", candidate_labels=LABELS, hypothesis_template=template
    )
    bundle = load_bundle(bundle_folder)
    head = label_head(bundle, LABELS, [template or "This is a photo of {}."])
    probabilities, _ = classify(bundle, encode_images(bundle, [picture(1)]), head)
    assert [row.score for row in found] == sorted((row.score for row in found), reverse=True)
    expected = dict(zip(LABELS, probabilities[0].tolist(), strict=True))
    assert {row.label: row.score for row in found} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: {**body, "inputs": {"image": body["inputs"]}},
        lambda body: {**body, "inputs": "data:image/jpeg;base64," + body["inputs"]},
        lambda body: {**body, "parameters": {"candidate_labels": "red circle, green square,tall tree"}},
    ],
    ids=["javascript", "uri", "commas"],
)
def test_every_way_to_ask_for_a_class(change: Any, live: str, http: httpx2.Client, b64: B64) -> None:
    route = f"{live}/zero-shot-image-classification"
    body = {"inputs": b64(picture(1)), "parameters": {"candidate_labels": LABELS}}
    assert http.post(route, json=change(body)).json() == http.post(route, json=body).json()


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": None},
        {"inputs": ""},
        {"inputs": "aGk="},
        {"inputs": "https://example.com/a.png"},
        {"parameters": {}},
        {"parameters": {"candidate_labels": []}},
        {"parameters": {"candidate_labels": ["a", "a"]}},
        {"parameters": {"candidate_labels": ["a"], "hypothesis_template": "no place"}},
        {"parameters": {"candidate_labels": [str(n) for n in range(1025)]}},
    ],
)
def test_bad_requests_to_hugging_face(change: dict[str, Any], live: str, http: httpx2.Client, b64: B64) -> None:
    body = {"inputs": b64(picture(1)), "parameters": {"candidate_labels": LABELS}, **change}
    answer = http.post(f"{live}/zero-shot-image-classification", json=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error", "code", "param"}


def test_a_refused_body_is_refused_in_the_dialect(live: str, http: httpx2.Client) -> None:
    for route, words in (("/embed", "error_type"), ("/v2/embed", "message"), ("/", "error"), ("/v1/rank", "detail")):
        answer = http.post(live + route, content=b"{")
        assert answer.status_code in (400, 422)
        assert words in answer.json()
