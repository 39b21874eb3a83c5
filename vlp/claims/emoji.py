"""The emoji of four vendors with clean labels, split by concept: a source of records for the claims.

`train`, `val` and `test` hold different concepts, all vendors' drawings of them; families (gender, skin, direction)
stay together, by the same fixed hash as the starter set. Labels are category, subcategory and those tags that ten
training families or more carry, so that every label can be learned. Beside the shards' own columns:

- `concept`, `family`, `category`, `subcategory`: for evaluations with one label per picture
- `mentions`: a text as on the web: one of the concept's names and, in six of ten, the name of something that is not in
  the picture; what entity extraction has to sort out
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipelines.config import StrictModel
from data_pipelines.packages import Package
from data_pipelines.records import Record
from data_pipelines.sources import emoji, starter

PACKAGES: dict[str, Package] = emoji.PACKAGES
WRITE = {"image_size": 32, "resize_mode": "keep_ratio_largest", "encode_format": "png"}
FAMILIES = 10
"""Training families a label needs to count."""
FOREIGN = 0.6
"""Share of the pictures whose `mentions` also name something else."""
LINKS = ("and", "with", "next to", "near", "or")


class Config(StrictModel):
    """Nothing to choose but where the packages lie."""

    dir: Path | None = None


def iter_records(config: Config) -> Iterator[Record]:
    """One record per concept and vendor; Record.split names the folder. Only training pictures keep all captions."""
    settings = emoji.Config(dir=config.dir)
    concepts = {concept.code: concept for concept in emoji.load_concepts(settings)}
    kept = set(frequent_labels(concepts.values()))
    peers = defaultdict(list)
    for concept in concepts.values():
        peers[starter.split_of(concept.family)].append(concept)
    for record in emoji.iter_records(settings):
        concept = concepts[str(record.extra["concept"])]
        split = starter.split_of(concept.family)
        columns = {
            "concept": concept.code,
            "family": concept.family,
            "category": concept.category,
            "subcategory": concept.subcategory,
            "mentions": mentions(record.captions, concept, peers[split], record.source),
        }
        yield replace(
            record,
            split=split,
            captions=record.captions if split == "train" else record.captions[:1],
            labels=tuple(label for label in record.labels if label in kept),
            extra=columns,
        )


def labels_of(concept: emoji.Concept) -> tuple[str, ...]:
    """Category, subcategory and tags, each once."""
    return tuple(dict.fromkeys((concept.category, concept.subcategory, *concept.tags)))


def frequent_labels(concepts: Iterable[emoji.Concept]) -> list[str]:
    """Labels that enough training families carry, sorted; what they are depends on training concepts alone."""
    families: defaultdict[str, set[str]] = defaultdict(set)
    for concept in concepts:
        if starter.split_of(concept.family) == "train":
            for label in labels_of(concept):
                families[label].add(concept.family)
    return sorted(label for label, found in families.items() if len(found) >= FAMILIES)


def mentions(names: Sequence[str], concept: emoji.Concept, others: Sequence[emoji.Concept], source: str) -> str:
    """One of the names, and perhaps that of a concept of another family; drawn from a hash of concept and source."""
    digest = hashlib.sha256(f"vlp-claims-1:{source}:{concept.code}".encode()).digest()
    draws = [int.from_bytes(digest[place : place + 6], "big") / 2**48 for place in range(0, 30, 6)]
    own = names[int(draws[0] * len(names))]
    foreign = others[int(draws[1] * len(others))]
    if draws[2] >= FOREIGN or foreign.family == concept.family:
        return own
    pair = (own, foreign.name) if draws[3] < 0.5 else (foreign.name, own)
    return f" {LINKS[int(draws[4] * len(LINKS))]} ".join(pair)
