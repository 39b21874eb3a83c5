"""Entity labels: entities found in captions, linked, and kept where a bundle sees them in the picture.

MOFI (Wu et al. 2023, arXiv 2306.07952), section 2: extraction from the text, linking of ambiguous names by the other
entities of the text, selection by the similarity of picture and entity text. Aliases have one number. Rare entities are
cut, and how many of each survive is written down, because a model keeps what it knows.
Suffixes: N pictures, E entities, P pairs of a picture and an entity, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.files import write_atomic
from data_pipelines.parquet import read_columns
from data_pipelines.sidecar import CLUSTERS, write_sidecar
from vlp.bundle import Bundle
from vlp.curate.gazetteer import Entity, Gazetteer, make_gazetteer, mine, read_entities, words
from vlp.curate.pictures import Advance, Pictures
from vlp.infer import encode_texts

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
PASSES = 3
"""Times that ambiguous names are linked anew by the entities chosen before."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to find and select."""

    entities: Path | None = None
    """Names and aliases; default: phrases mined from the texts."""
    texts: str | None = None
    """Column with the texts; default: the captions."""
    share: float = 0.75
    """Share of the pairs that are kept, those of the highest scores."""
    threshold: float | None = None
    """Keep pairs from this cosine on instead."""
    least: int = 5
    """Pictures that an entity needs, before selection to be mined and after it to stay."""
    prompt: str = "{}"
    """Template around the entity's text."""
    fuzzy: bool = True
    """Whether one letter of a longer name may be wrong."""
    truth: str | None = None
    """Column of labels to compare with; changes nothing but the account."""

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be meant."""
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share {self.share}: must be above 0 and at most 1")
        if self.least < 1:
            raise ConfigError(f"--min-count {self.least}: must be 1 or more")
        if "{}" not in self.prompt:
            raise ConfigError(f"--prompt {self.prompt!r}: needs {{}} in the place of the entity")


@dataclass(frozen=True, slots=True)
class Pairs:
    """Entities of pictures, picture by picture."""

    picture_P: Ids
    entity_P: Ids
    score_P: Floats

    def take(self, which: NDArray[Any]) -> "Pairs":
        """Some of them."""
        return Pairs(self.picture_P[which], self.entity_P[which], self.score_P[which])


def label_entities(
    pictures: Pictures, bundle: Bundle, out: Path, options: Options, advance: Advance = lambda step: None
) -> dict[str, Any]:
    """Label pictures with entities and write the sidecar `out`; the account of it. `advance` is told of pictures done.

    Beside `out`, `<stem>.entities.parquet` has a row for every entity: mentions, pictures kept, share that survived.
    Raises PipelineError, ConfigError.
    """
    options.check()
    gazetteer = _gazetteer(pictures, options)
    entity_ED = encode_texts(bundle, [options.prompt.replace("{}", item.text) for item in gazetteer.entities])
    texts = texts_of(pictures, options.texts)
    raw = find_pairs(pictures, texts, gazetteer, entity_ED, bundle, advance)
    if not len(raw.picture_P):
        raise PipelineError(f"not one of {len(gazetteer.entities)} entities occurs in the texts")
    kept = select(raw, options)
    numbers_E = _numbers(kept, gazetteer.entities, options.least)
    kept = kept.take(numbers_E[kept.entity_P] >= 0)
    if not len(kept.picture_P):
        raise PipelineError(f"no entity is left on {options.least} pictures: lower --min-count or --threshold")
    _write(out, pictures, kept, gazetteer.entities, numbers_E, {**pictures.made_of, **_settings(options)})
    table = survival(raw, kept, gazetteer.entities, numbers_E)
    beside = out.with_name(f"{out.stem}.entities.parquet")
    write_atomic(beside, lambda stream: pq.write_table(table, stream))
    lost = table.filter(pc.equal(table["kept"], 0))
    result = {
        "out": str(out),
        "entities_table": str(beside),
        "pictures": len(pictures),
        "skipped": pictures.skipped,
        "entities": int((numbers_E >= 0).sum()),
        "mentioned": len(table),
        "lost": len(lost),
        "pairs_raw": len(raw.picture_P),
        "pairs": len(kept.picture_P),
        "labelled": len(np.unique(kept.picture_P)),
        "threshold": float(kept.score_P.min()),
    }
    if options.truth is not None:
        result |= agreement(pictures, raw, kept, gazetteer.entities, options.truth)
    return result


def _gazetteer(pictures: Pictures, options: Options) -> Gazetteer:
    if options.entities is not None:
        return make_gazetteer(read_entities(options.entities), options.fuzzy)
    found = mine((text for texts in texts_of(pictures, options.texts) for text in texts), options.least)
    if not found:
        raise PipelineError(f"no phrase occurs in {options.least} texts: lower --min-count, or give --entities")
    return make_gazetteer(found, options.fuzzy)


def texts_of(pictures: Pictures, column: str | None = None) -> Iterator[list[str]]:
    """The texts of every picture: those of a column, or all its captions. Raises ConfigError for a missing column."""
    for values in _column(pictures, column, "--texts") if column else _captions(pictures):
        yield [str(text) for text in (values if isinstance(values, list) else [values]) if text]


def _captions(pictures: Pictures) -> Iterator[Any]:
    for _, path in pictures.parts:
        several = "captions" in pq.read_schema(path).names
        table = read_columns(path, ["caption", "captions"] if several else ["caption"])
        yield from (row.get("captions") or row["caption"] for row in table.to_pylist())


def _column(pictures: Pictures, name: str, option: str) -> Iterator[Any]:
    for _, path in pictures.parts:
        if name not in (known := pq.read_schema(path).names):
            raise ConfigError(f"{option} {name}: the shards have no such column; they have {', '.join(known)}")
        yield from read_columns(path, [name]).column(0).to_pylist()


def find_pairs(
    pictures: Pictures,
    texts: Iterator[list[str]],
    gazetteer: Gazetteer,
    entity_ED: Tensor,
    bundle: Bundle,
    advance: Advance = lambda step: None,
) -> Pairs:
    """Every entity of every picture's texts once; the score is the cosine of picture and entity text."""
    found = [Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    first = 0
    for rows_BD in pictures.blocks():
        linked = [_link(next(texts), gazetteer, entity_ED, bundle) for _ in rows_BD]
        counts = [len(some) for some in linked]
        entity_P = np.array([number for some in linked for number in some], dtype=np.int64)
        row_P = np.repeat(np.arange(len(linked)), counts)
        score_P = (rows_BD[row_P] * entity_ED[entity_P]).sum(1)
        found.append(Pairs(row_P + first, entity_P, score_P.numpy()))
        first += len(linked)
        advance(len(linked))
    columns = ([getattr(part, name) for part in found] for name in Pairs.__slots__)
    return Pairs(*(np.concatenate(column) for column in columns))


def _link(texts: list[str], gazetteer: Gazetteer, entity_ED: Tensor, bundle: Bundle) -> list[int]:
    """Entities of one picture, each once."""
    mentions = list(dict.fromkeys(meant for text in texts for meant in gazetteer.find(text)))
    if all(len(meant) == 1 for meant in mentions):
        return list(dict.fromkeys(meant[0] for meant in mentions))
    context_D = encode_texts(bundle, texts[:1])[0] if len(mentions) == 1 else None
    return list(dict.fromkeys(disambiguate(mentions, entity_ED, context_D)))


def disambiguate(mentions: Sequence[tuple[int, ...]], entity_ED: Tensor, context_D: Tensor | None = None) -> list[int]:
    """One entity for each mention: of those it may mean, the nearest to the others of the text, again and again.

    Begins with the first of each. A mention that stands alone is compared with `context_D`.
    """
    chosen = [meant[0] for meant in mentions]
    for _ in range(PASSES):
        before = list(chosen)
        for place, meant in enumerate(mentions):
            if len(meant) > 1:
                others = [number for at, number in enumerate(chosen) if at != place]
                around_D = F.normalize(entity_ED[others].mean(0), dim=0) if others else context_D
                assert around_D is not None, "a mention alone needs its text"
                chosen[place] = meant[int((entity_ED[list(meant)] @ around_D).argmax())]
        if chosen == before:
            break
    return chosen


def select(pairs: Pairs, options: Options) -> Pairs:
    """The pairs from a score on: `options.threshold`, or the one that keeps `options.share` of them."""
    limit = options.threshold
    if limit is None:
        limit = float(np.sort(pairs.score_P)[-max(1, round(options.share * len(pairs.score_P)))])
    kept = pairs.take(pairs.score_P >= limit)
    if not len(kept.picture_P):
        raise PipelineError(f"--threshold {limit}: the highest score is {pairs.score_P.max():.3f}")
    return kept


def _numbers(kept: Pairs, entities: Sequence[Entity], least: int) -> Ids:
    """E: number of each entity that stays, in the order of their names; -1 for the others."""
    counts = np.bincount(kept.entity_P, minlength=len(entities))
    names = sorted((entities[number].name, number) for number in np.flatnonzero(counts >= least).tolist())
    numbers = np.full(len(entities), -1, dtype=np.int64)
    numbers[[number for _, number in names]] = np.arange(len(names))
    return numbers


def _settings(options: Options) -> dict[str, Any]:
    names = ("texts", "share", "threshold", "least", "prompt", "fuzzy")
    return {"kind": "entity", **{name: getattr(options, name) for name in names}}


def _write(
    out: Path, pictures: Pictures, kept: Pairs, entities: Sequence[Entity], numbers_E: Ids, info: dict[str, Any]
) -> None:
    """One row for every picture, the entity of the highest score first; none is an empty list."""
    order = np.lexsort((-kept.score_P, kept.picture_P))
    kept = kept.take(order)
    starts = np.searchsorted(kept.picture_P, np.arange(len(pictures) + 1))

    def tables() -> Iterator[pa.Table]:
        first = 0
        for keys in pictures.keys():  # noqa: SIM118 - no mapping
            ends = starts[first : first + len(keys) + 1]
            part = slice(ends[0], ends[-1])
            ends = (ends - ends[0]).astype(np.int32)
            names = [entities[number].name for number in kept.entity_P[part].tolist()]
            lists = {
                CLUSTERS: pa.array(numbers_E[kept.entity_P[part]].astype(np.int32)),
                "labels": pa.array(names, pa.string()),
                "scores": pa.array(kept.score_P[part]),
            }
            columns = {name: pa.ListArray.from_arrays(ends, values) for name, values in lists.items()}
            yield pa.table({"key": pa.array(keys, pa.string()), **columns})
            first += len(keys)

    write_sidecar(out, tables(), {"clusters": int(numbers_E.max()) + 1, **info})


def survival(raw: Pairs, kept: Pairs, entities: Sequence[Entity], numbers_E: Ids) -> pa.Table:
    """A row for every entity that is mentioned: its number (-1 = cut), mentions, pictures kept, share that survived."""
    mentions, left = (np.bincount(pairs.entity_P, minlength=len(entities)) for pairs in (raw, kept))
    there = np.flatnonzero(mentions)
    return pa.table({
        "entity": [entities[number].name for number in there.tolist()],
        "number": numbers_E[there],
        "mentions": mentions[there],
        "kept": left[there],
        "survival": left[there] / mentions[there],
    })  # fmt: skip


def agreement(pictures: Pictures, raw: Pairs, kept: Pairs, entities: Sequence[Entity], column: str) -> dict[str, float]:
    """Precision of the pairs before and after selection against a column of labels, and the share of right ones kept.

    A pair is right where the entity's name or an alias is among the labels; pictures without labels do not count.
    """
    names = [{" ".join(words(text)) for text in (item.name, *item.aliases)} for item in entities]
    rows = (
        value if isinstance(value, list) else [value] if value else [] for value in _column(pictures, column, "--truth")
    )
    truth = [{" ".join(words(str(text))) for text in row} for row in rows]

    def count(pairs: Pairs) -> tuple[int, int]:
        judged = [
            bool(names[entity] & truth[picture])
            for picture, entity in zip(pairs.picture_P.tolist(), pairs.entity_P.tolist(), strict=True)
            if truth[picture]
        ]
        return sum(judged), len(judged)

    (right_raw, all_raw), (right, all_kept) = count(raw), count(kept)
    return {
        "precision_raw": right_raw / max(1, all_raw),
        "precision": right / max(1, all_kept),
        "recall": right / max(1, right_raw),
    }
