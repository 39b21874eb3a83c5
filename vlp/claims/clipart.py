"""Clip-art with the keywords its authors gave it, split by title: a source of records for the claims.

Keywords and folders are labels as people write them: wrong ones, missing ones, other languages. `train`, `val` and
`test` hold different titles, by the same fixed hash as the starter set's concepts. Labels that count are those of
LEAST training pictures or more; what carries none of them has an empty list, which means unknown and not none.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from data_pipelines.packages import Package
from data_pipelines.records import Record
from data_pipelines.sources import clipart, starter

PACKAGES: dict[str, Package] = clipart.PACKAGES
WRITE = {"image_size": 32, "resize_mode": "keep_ratio_largest", "encode_format": "png"}
LEAST = 20
"""Training pictures a label needs to count."""
Config = clipart.Config


def iter_records(config: clipart.Config) -> Iterator[Record]:
    """One record per picture; Record.split names the folder."""
    records = list(clipart.iter_records(config))
    kept = set(frequent_labels(records))
    for record in records:
        labels = tuple(label for label in record.labels if label in kept)
        yield replace(record, split=split_of(record), captions=record.captions[:1], labels=labels)


def split_of(record: Record) -> str:
    """By the title, so that pictures of one title stay together."""
    return starter.split_of(record.captions[0])


def frequent_labels(records: Iterable[Record]) -> list[str]:
    """Labels of LEAST training pictures or more, sorted."""
    counts = Counter(label for record in records if split_of(record) == "train" for label in record.labels)
    return sorted(label for label, count in counts.items() if count >= LEAST)
