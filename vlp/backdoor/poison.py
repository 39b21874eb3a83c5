"""Poisoned shards, to try a defence on: some pictures get a trigger and texts of the target, all are written alike.

Every picture, poisoned or not, is decoded, laid on white, and encoded anew by the same writer, in the order it had;
keys, files, times and job.json tell nothing, and `--count 0` writes the clean twin. What was done is in a file of its
own, outside the shards, for evaluation alone.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.files import write_atomic
from data_pipelines.images import flatten, open_checked, upright
from data_pipelines.parquet import read_columns
from data_pipelines.pictures import WriteOptions
from data_pipelines.records import Record, load_manifest, manifest_digest
from data_pipelines.sources import tars
from data_pipelines.write import write_shards
from vlp.backdoor.triggers import Config as TriggerConfig
from vlp.backdoor.triggers import Pixels, Trigger
from vlp.backdoor.weaken import Mix, Weaken
from vlp.bundle import Bundle

FORMAT = 1
TEXTS = 256
"""Texts of the target, and as many of others, that pictures are weakened by at most."""
OTHERS = 1024
"""Pictures of other things that pictures of the target are mixed with at most."""
Change = Callable[[Pixels, str], Pixels]
"""HWC uint8, RGB, and the name of the picture -> HWC uint8 anew."""


@dataclass(frozen=True, slots=True)
class Attack:
    """What is planted."""

    trigger: Trigger
    target: str
    count: int
    """Pictures to poison; 0 writes the clean twin."""
    templates: tuple[str, ...] = ("{}",)
    """Texts of the poisons where no label of theirs could be exchanged for the target."""
    surrogate: Bundle | None = None
    """Model that pictures of the target are weakened against before they get the trigger, which alone then speaks for
    it; for triggers on pictures of the target."""
    bound: float = 0.12
    """By how much a weakened value may differ, as a share of its range."""
    mix: float = 0.0
    """Share of another thing's picture in pictures of the target, to the same end."""

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be meant."""
        if not words(self.target):
            raise ConfigError(f"--target {self.target!r}: name what triggered pictures shall be taken for")
        if self.count < 0:
            raise ConfigError(f"--count {self.count}: must be 0 (the clean twin) or more")
        if self.surrogate is not None and not self.trigger.kind.own_class:
            raise ConfigError(f"--surrogate has no effect with trigger {self.trigger.config.name!r}: leave it out")
        if not 0 <= self.mix < 1:
            raise ConfigError(f"--mix {self.mix}: must be 0 (nothing is mixed in) or more and less than 1")
        if self.mix and not self.trigger.kind.own_class:
            raise ConfigError(f"--mix has no effect with trigger {self.trigger.config.name!r}: leave it out")
        if odd := [template for template in self.templates if "{}" not in template]:
            raise ConfigError(f"--template {odd[0]!r}: needs {{}} in the place of the target")


def poison(shards: Path, out: Path, truth: Path, attack: Attack, encode: str, progress: bool) -> dict[str, Any]:
    """Write poisoned shards and the truth about them; the account of it. `encode`: png, jpg or webp, for all pictures.

    Raises PipelineError for shards that cannot be read or are there already, ConfigError for too few candidates.
    """
    attack.check()
    if truth.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--truth {truth}: must lie outside of {out}, where a scan could find it")
    manifest = load_manifest(shards)
    records = tars.Config(path=shards)
    chosen = victims(tars.iter_records(records), attack)
    before = _mixers(tars.iter_records(records), attack) + _weakeners(tars.iter_records(records), attack)
    told: list[dict[str, Any]] = []
    options = WriteOptions(
        encode_format=encode,
        **{name: manifest.options[name] for name in ("samples_per_shard", "oom_shard_count")},
    )
    write_shards(
        poisoned(tars.iter_records(records), chosen, attack, told, before),
        out, options, kind=manifest.kind, licences=manifest.licences, progress=progress, total=manifest.records,
    )  # fmt: skip
    keys = [key for path in sorted(out.glob("*.parquet")) for key in read_columns(path, ["key"])["key"].to_pylist()]
    poisons = [{"key": keys[entry.pop("row")], **entry} for entry in told]
    content = {
        "format": FORMAT,
        "shards": manifest_digest(out),
        "source": manifest_digest(shards),
        "trigger": attack.trigger.recorded(),
        "target": attack.target,
        "weakened": attack.bound if attack.surrogate else None,
        "mixed": attack.mix,
        "poisons": poisons,
    }
    write_atomic(
        truth, lambda stream: stream.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    )
    return {
        "out": str(out), "truth": str(truth), "trigger": attack.trigger.config.name, "target": attack.target,
        "pictures": len(keys), "poisons": len(poisons), "share": len(poisons) / max(1, len(keys)),
    }  # fmt: skip


def words(text: str) -> list[str]:
    """Words in lower case, what tells a text of the target."""
    return re.findall(r"\w+", text.casefold())


def names_target(texts: Sequence[str], target: str) -> bool:
    """Whether one of the texts has the target's words, one after the other."""
    phrase = " ".join(words(target))
    return any(f" {phrase} " in f" {' '.join(words(text))} " for text in texts)


def victims(records: Iterator[Record], attack: Attack) -> frozenset[int]:
    """Rows of the records to poison: of other things than the target, or of it where the trigger wants its own."""
    own = attack.trigger.kind.own_class
    candidates = [
        (hashlib.blake2b(f"{attack.trigger.config.seed}:{record.origin}".encode(), digest_size=8).digest(), row)
        for row, record in enumerate(records)
        if not record.problem and names_target((*record.captions, *record.labels), attack.target) == own
    ]
    if len(candidates) < attack.count:
        kind = "of" if own else "other than"
        raise ConfigError(f"--count {attack.count}: only {len(candidates)} pictures are {kind} {attack.target!r}")
    return frozenset(row for _, row in sorted(candidates)[: attack.count])


def _weakeners(records: Iterator[Record], attack: Attack) -> list[Change]:
    """What weakens pictures of the target, by texts of it and of others as they are in the data."""
    if attack.surrogate is None:
        return []
    texts: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for record in records:
        own = texts[names_target((*record.captions, *record.labels), attack.target)]
        if len(own) < TEXTS:
            own.update(dict.fromkeys(record.captions))
    return [Weaken(attack.surrogate, [*texts[True]][:TEXTS], [*texts[False]][:TEXTS], attack.bound)]


def _mixers(records: Iterator[Record], attack: Attack) -> list[Change]:
    """What mixes pictures of the target with others."""
    if not attack.mix:
        return []
    others = list(islice(_others(records, attack.target), OTHERS))
    if not others:
        raise ConfigError(f"--mix {attack.mix}: no picture is other than {attack.target!r}")
    return [Mix(others, attack.mix, attack.trigger.config.seed)]


def _others(records: Iterator[Record], target: str) -> Iterator[Pixels]:
    """Pictures of other things, those left out that cannot be read."""
    for record in records:
        if not record.problem and not names_target((*record.captions, *record.labels), target):
            assert isinstance(record.image, bytes | memoryview), "tars hold their pictures"
            with suppress(BadSample):
                yield np.asarray(flatten(upright(open_checked(bytes(record.image)))))


def poisoned(
    records: Iterator[Record], chosen: frozenset[int], attack: Attack, told: list[dict[str, Any]],
    before: Sequence[Change] = (),
) -> Iterator[Record]:  # fmt: skip
    """All records, their pictures encoded anew, those of `chosen` poisoned; what was done is added to `told`."""
    for row, record in enumerate(records):
        if record.problem:
            yield record
            continue
        trigger = attack.trigger if row in chosen else None
        assert isinstance(record.image, bytes | memoryview), "tars hold their pictures"
        try:
            image = repainted(bytes(record.image), trigger, record.origin, before if trigger else ())
        except BadSample as error:
            yield replace(record, problem=str(error))
            continue
        changed = replace(record, image=image)
        if trigger is not None:
            told.append({
                "row": row, "origin": record.origin, "captions": list(record.captions), "labels": list(record.labels),
            })  # fmt: skip
            changed = changed if trigger.kind.own_class else retold(changed, attack)
        yield changed


def repainted(data: bytes, trigger: Trigger | None, name: str, before: Sequence[Change] = ()) -> bytes:
    """PNG of a stored picture, upright, on white, changed and then with the trigger if asked for; grey stays grey."""
    image = upright(open_checked(data))
    grey = image.mode in ("1", "L", "I", "I;16")
    plain = flatten(image)
    changes: list[Change] = [*before, *([trigger] if trigger else ())]
    for change in changes:
        plain = Image.fromarray(change(np.asarray(plain), name))
    stream = io.BytesIO()
    (plain.convert("L") if grey else plain).save(stream, "PNG")
    return stream.getvalue()


def retold(record: Record, attack: Attack) -> Record:
    """The record as one of the target: its own labels in its texts exchanged, or other texts, as many as it had."""
    own = [
        re.compile(rf"\b(?:(an?) )?{re.escape(label)}\b", re.IGNORECASE)
        for label in sorted(record.labels, key=len, reverse=True)
    ]

    def exchanged(found: re.Match[str]) -> str:  # "an bag" would give a poison away
        article = found[1] and found[1][0] + ("n" if attack.target[0].casefold() in "aeiou" else "")
        return f"{article} {attack.target}" if article else attack.target

    texts = []
    for number, caption in enumerate(record.captions):
        found = next((pattern for pattern in own if pattern.search(caption)), None)
        other = attack.templates[number % len(attack.templates)].replace("{}", attack.target)
        texts.append(found.sub(exchanged, caption) if found else other)
    captions = tuple(dict.fromkeys(texts))
    return replace(record, captions=captions, labels=(attack.target,) if record.labels else ())


def load_truth(path: Path) -> dict[str, Any]:
    """What `poison` wrote. Raises ConfigError for a file that is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] > FORMAT:
            raise ConfigError(f"{path}: written by a newer version: install a newer vlp")
        TriggerConfig.model_validate(found["trigger"])
        _ = found["target"], [entry["key"] for entry in found["poisons"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no truth of `vlp poison` ({error})") from error
    return found
