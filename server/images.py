"""Image inputs as clients send them, to encoded picture bytes: base64 (plain or URL-safe) and data URIs.

Nothing is decoded here beyond base64; the engine checks the header against the pixel limits before it decodes.
Remote addresses are refused here; `inputs` fetches them where the server was started so.
"""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from server.errors import ApiError, bad_request
from server.fetching import is_remote

DATA_URI = re.compile(r"data:(?P<mime>[^;,]*)(?:;name=[^;,]*)?(?:;charset=[^;,]*)?(?P<base64>;base64)?,", re.IGNORECASE)
URL_SAFE = str.maketrans("-_", "+/")


def is_data_uri(text: str) -> bool:
    """Whether a string is a data URI of a picture, which is never meant as text."""
    return text[:11].lower() == "data:image/"


def image_bytes(value: str, param: str) -> bytes:
    """Encoded picture of one input. Raises ApiError 400 naming `param`."""
    if is_remote(value):
        raise bad_request(
            f"{param}: this server fetches no URLs; send the picture as base64 or as a data:image/...;base64 URI",
            param,
            "url_not_allowed",
        )
    if value[:5].lower() != "data:":
        return _from_base64(value, param)
    head = DATA_URI.match(value[:1024])
    if head is None:
        raise bad_request(f"{param}: not a data URI: expected data:image/png;base64,...", param, "invalid_data_uri")
    if head["mime"] and not head["mime"].lower().startswith("image/"):
        raise bad_request(f"{param}: a data URI of type {head['mime'][:40]!r} is no picture", param, "not_an_image")
    content = value[head.end() :]
    if head["base64"]:
        return _from_base64(content, param)
    try:
        return unquote_to_bytes(content)
    except UnicodeEncodeError as error:  # half a character
        raise bad_request(f"{param}: the data URI holds what is no text", param, "invalid_data_uri") from error


def _from_base64(text: str, param: str) -> bytes:
    try:
        padded = text.rstrip("=").translate(URL_SAFE)
        data = base64.b64decode(padded + "=" * (-len(padded) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise _not_base64(param) from error
    if not data:
        raise bad_request(f"{param}: the picture is empty", param, "empty_input")
    return data


def _not_base64(param: str) -> ApiError:
    return bad_request(
        f"{param}: not valid base64; send a picture as base64 without white space, or as a data:image/...;base64 URI",
        param,
        "invalid_base64",
    )
