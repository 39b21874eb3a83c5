"""Texts and pictures as the embedding dialects write them, read into one form.

Understood: plain strings and data URIs (OpenAI, infinity, NV-CLIP), {"text"} / {"image"} (Jina), {"url"} / {"bytes"}
(llama-index), {"type": "text" | "image_url" | "image_base64"} (Voyage, Cohere, vLLM), and {"content": [...]} around
several of the latter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.errors import bad_request
from server.images import is_data_uri
from server.settings import Limits

Kind = Literal["text", "image"]
Modality = Literal["text", "image", "auto"]

TEXT_SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
IMAGE_SCHEMA = {
    "type": "object",
    "properties": {"image": {"type": "string", "description": "base64 or data URI"}},
    "required": ["image"],
}
PART_SCHEMA = {
    "type": "object",
    "description": "A part as Voyage, Cohere and vLLM write it.",
    "properties": {
        "type": {"enum": ["text", "image_url", "image_base64"]},
        "text": {"type": "string"},
        "image_url": {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]},
            ]
        },
        "image_base64": {"type": "string"},
    },
    "required": ["type"],
}
ITEM_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "description": "Text, or a picture as data:image/...;base64,..."},
        TEXT_SCHEMA,
        IMAGE_SCHEMA,
        {"type": "object", "properties": {"bytes": {"type": "string"}}, "required": ["bytes"]},
        {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]},
        PART_SCHEMA,
    ]
}
CONTENT_SCHEMA = {
    "type": "object",
    "properties": {"content": {"type": "array", "items": PART_SCHEMA, "minItems": 1}},
    "required": ["content"],
}
TOKEN_ADVICE = (
    "token ids cannot be read here, because this model has its own vocabulary: send text "
    "(in LangChain: check_embedding_ctx_length=False)"
)
FORMS = '{"text": ...}, {"image": ...}, {"bytes": ...}, {"url": ...} or {"type": ...}'
KEYS: dict[str, Kind] = {"text": "text", "image": "image", "bytes": "image", "url": "image"}
TYPES: dict[str, Kind] = {"text": "text", "image_url": "image", "image_base64": "image"}
PICTURE_ADDRESS = re.compile(r"https?://[^?#]+\.(jpe?g|png|webp|gif)([?#].*)?", re.IGNORECASE)
PICTURE_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/]{40,}")
"""How JPEG, PNG, GIF and WebP begin in base64, and too long a word for any language."""


@dataclass(frozen=True, slots=True)
class Item:
    """One text, or one picture that is still base64 or an address."""

    kind: Kind
    value: str
    param: str
    """Where it stands in the request."""


Entry = tuple[Item, ...]
"""What becomes one vector: one item, or several that are to be fused."""


def read_entry(given: Any, param: str, modality: Modality = "text") -> Entry:
    """One element of an `input` list. Raises ApiError 400."""
    if isinstance(given, dict) and "content" in given:
        return read_content(given["content"], f"{param}.content")
    return (read_item(given, param, modality),)


def read_content(given: Any, param: str) -> Entry:
    """The parts of one input. Raises ApiError 400."""
    if isinstance(given, str):
        return (_filled("text", given, param),)
    if not isinstance(given, list) or not given:
        raise bad_request(f"{param}: expected a list of parts, each {FORMS}", param, "invalid_item")
    return tuple(read_item(part, f"{param}[{number}]") for number, part in enumerate(given))


def read_item(given: Any, param: str, modality: Modality = "text") -> Item:
    """One text or picture. Raises ApiError 400 naming `param`."""
    if isinstance(given, str):
        picture = is_data_uri(given) or modality == "image" or (modality == "auto" and _looks_like_picture(given))
        return _filled("image" if picture else "text", given, param)
    if isinstance(given, dict):
        return _from_object(given, param)
    if isinstance(given, list) and given and all(isinstance(number, int) for number in given):
        raise bad_request(f"{param}: {TOKEN_ADVICE}", param, "token_ids")
    raise bad_request(f"{param}: expected a string or an object: {FORMS}", param, "invalid_item")


def _from_object(given: dict[str, Any], param: str) -> Item:
    if (kind := given.get("type")) is not None:
        if not isinstance(kind, str) or kind not in TYPES:
            known = ", ".join(TYPES)
            raise bad_request(f"{param}.type: one of {known}, not {str(kind)[:40]!r}", f"{param}.type", "invalid_item")
        value = given.get(kind)
        if kind == "image_url" and isinstance(value, dict):
            value = value.get("url")
        if not isinstance(value, str):
            raise bad_request(f"{param}.{kind}: expected a string", f"{param}.{kind}", "invalid_item")
        return _filled(TYPES[kind], value, param)
    found = [(name, given[name]) for name in KEYS if given.get(name) is not None]
    if len(found) != 1 or not isinstance(found[0][1], str):
        advice = f"one of {FORMS}, with a string; text and picture together make one vector with fusion and content"
        raise bad_request(f"{param}: an object needs {advice}", param, "invalid_item")
    name, value = found[0]
    return _filled(KEYS[name], value, param)


def _looks_like_picture(text: str) -> bool:
    return PICTURE_ADDRESS.fullmatch(text) is not None or PICTURE_BASE64.match(text) is not None


def _filled(kind: Kind, value: str, param: str) -> Item:
    if not value:
        raise bad_request(f"{param} is empty", param, "empty_input")
    return Item(kind, value, param)


def check_items(items: Sequence[Item], limits: Limits, where: str) -> None:
    """Refuse too many items and too long texts. `where`: the field that holds them. Raises ApiError 400."""
    for kind, most in (("text", limits.texts), ("image", limits.images)):
        found = sum(item.kind == kind for item in items)
        if found > most:
            raise bad_request(f"{where} holds {found} {kind}s, a request may hold {most}", where, "too_many_items")
    for item in items:
        if item.kind == "text":
            check_text(item.value, item.param, limits)


def check_fusion(entries: Sequence[Entry], fusion: str | None) -> None:
    """Refuse several items for one vector unless the request says how to join them. Raises ApiError 400."""
    for entry in entries:
        if len(entry) > 1 and fusion is None:
            param = entry[1].param
            message = f'{param}: one input gives one vector: send its parts as inputs of their own, or "fusion": "mean"'
            raise bad_request(message, param, "fusion_not_requested")


def check_text(text: str, param: str, limits: Limits) -> None:
    """Refuse a text that is too long. Raises ApiError 400."""
    if (length := len(text.encode())) > limits.text_bytes:
        raise bad_request(f"{param}: {length} bytes of text, limit {limits.text_bytes}", param, "text_too_long")
