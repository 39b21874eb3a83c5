"""Cross-modal retrieval R@k with several captions per picture: the protocol of COCO and Flickr30k.

A picture is answered right at k if one of its captions is among its k nearest; a caption is, if its picture is. Ties
count against the model. Captions that several pictures share are handled in one of two ways:

- `duplicates: merge` (default): equal captions are one candidate and one query, right for every picture that carries
  it. No answer is called wrong that is right.
- `duplicates: keep`: every caption is a candidate and a query of its own that belongs to one picture, as published
  figures on COCO and Flickr30k count (Karpathy & Fei-Fei 2015, arXiv 1412.2306; CLIP_benchmark). An equal caption of
  another picture is then a tie that comes first, so a set full of duplicates scores lower.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from data_pipelines.config import StrictModel
from data_pipelines.shard_set import Train
from vlp.evals._encode import Encoder, with_captions
from vlp.evals._scores import tiled_ranks

KS = (1, 5, 10)


class Config(StrictModel):
    """Options of `retrieval`."""

    captions: int | None = Field(None, ge=1)
    """Captions of a picture that count, the first ones; default all. COCO's protocol takes 5."""
    duplicates: Literal["merge", "keep"] = "merge"
    """What becomes of equal captions: one candidate, or one for each picture."""


def run(encoder: Encoder, data: Train | Path, config: Config) -> Iterator[tuple[str, float]]:
    """image_to_text/R@k and text_to_image/R@k as fractions, ranks from 1, sizes and chance."""
    encoded = encoder.pictures(data)
    rows = with_captions(encoded, data)
    image_ND = encoded.image_ND[rows]
    carried = [list(dict.fromkeys(encoded.captions[row][: config.captions])) for row in rows]
    distinct = sorted({caption for captions in carried for caption in captions})
    numbers = {text: number for number, text in enumerate(distinct)}
    text_TD = encoder.texts(distinct)
    if config.duplicates == "keep":
        text_TD = text_TD[[numbers[caption] for captions in carried for caption in captions]]
        counter = iter(range(len(text_TD)))
        of_picture = [[next(counter) for _ in captions] for captions in carried]
    else:
        of_picture = [[numbers[caption] for caption in captions] for captions in carried]
    of_text: list[list[int]] = [[] for _ in range(len(text_TD))]
    for row, texts in enumerate(of_picture):
        for number in texts:
            of_text[number].append(row)
    for name, query, candidate, right in (
        ("image_to_text", image_ND, text_TD, of_picture),
        ("text_to_image", text_TD, image_ND, of_text),
    ):
        ranks = tiled_ranks(
            lambda run, query=query, candidate=candidate: query[run.start : run.stop] @ candidate.T,  # type: ignore[misc]
            right,
            len(candidate),
        )
        yield from ((f"{name}/R@{k}", float((ranks < k).double().mean())) for k in KS)
        yield f"{name}/median_rank", float(ranks.median()) + 1
        yield f"{name}/mean_rank", float(ranks.double().mean()) + 1
        yield f"{name}/chance_R@1", sum(map(len, right)) / len(right) / len(candidate)
    yield "pictures", float(len(rows))
    yield "captions", float(len(text_TD))
    yield "skipped", float(encoded.skipped + len(encoded.keys) - len(rows))
