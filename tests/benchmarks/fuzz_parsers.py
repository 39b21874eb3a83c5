"""Atheris on what reads strangers' bytes: python fuzz_parsers.py TARGET RUNS SEED, in an environment of atheris' own.

Anything raised but the error that a parser promises is a crash, and ends the process with a code other than 0.
"""

import sys
from collections.abc import Callable
from contextlib import suppress

import atheris

HEADS = (b"\xff\xd8\xff\xe0\0\x10JFIF", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"")


def targets() -> dict[str, Callable[[bytes], None]]:
    """Name -> parser. What is imported here tells atheris which lines it reaches."""
    with atheris.instrument_imports(include=["server", "data_pipelines"]):
        from data_pipelines.errors import BadSample
        from data_pipelines.preprocess import ImageConfig, load_image
        from data_pipelines.urls import parse
        from server.engine import check_picture
        from server.errors import ApiError
        from server.images import image_bytes
        from server.limits import parse_object, validated
        from server.schemas.embeddings import EmbeddingsRequest, read_entries
        from server.settings import Limits
    limits, config = Limits(pixels=1_000_000), ImageConfig(size=32)

    def picture(data: bytes) -> None:
        whole = HEADS[data[0] % len(HEADS)] + data[1:] if data else b""
        with suppress(BadSample):
            check_picture(whole, limits)
            load_image(whole, config, limits.pixels)

    def data_uri(data: bytes) -> None:
        with suppress(ApiError):
            image_bytes(data.decode("utf-8", "surrogateescape"), "input")

    def url(data: bytes) -> None:
        with suppress(BadSample, ValueError):
            parse(data.decode("utf-8", "surrogateescape"))

    def body(data: bytes) -> None:
        with suppress(ApiError):
            read_entries(validated(EmbeddingsRequest, parse_object(data)), limits)

    return {"picture": picture, "data_uri": data_uri, "url": url, "body": body}


def main(target: str, runs: str, seed: str) -> None:
    options = [f"-runs={runs}", f"-seed={seed}", "-timeout=2", "-rss_limit_mb=2048", "-max_len=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options], targets()[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
