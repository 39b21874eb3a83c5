"""Entities in texts: a list of names and aliases, found in captions, plurals and slips of a letter included.

A gazetteer and a forgiving matcher stand for the named-entity recognition of MOFI (Wu et al. 2023, arXiv 2306.07952).
Needs no model.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import ConfigError

WORD = re.compile(r"\w+", re.UNICODE)
SLIP = 6
"""Letters from which on a phrase may differ from an alias by one slip."""
LONGEST = 3
"""Words of the longest phrase that is mined."""
STOP_WORDS = (
    " a about above after all an and any are as at be been before being below between both but by can did do does down "
    "during each few for from further had has have he her here hers him his how i if in into is it its just me more "
    "most my no nor not of off on once one only or other our out over own same she so some such than that the their "
    "them then there these they this those through to too two under until up very was we were what when where which "
    "while who whom why will with you your "
)


@dataclass(frozen=True, slots=True)
class Entity:
    """One thing with its names."""

    name: str
    aliases: tuple[str, ...] = ()
    description: str = ""

    @property
    def text(self) -> str:
        """What stands for the entity in a text tower: its name, enriched with the description."""
        return f"{self.name}, {self.description}" if self.description else self.name


@dataclass(frozen=True, slots=True)
class Gazetteer:
    """Entities by phrase."""

    entities: tuple[Entity, ...]
    phrases: Mapping[str, tuple[int, ...]]
    """Normalised name or alias -> numbers of the entities it may mean, in the order of the list."""
    slips: Mapping[str, tuple[str, ...]]
    """A phrase without one of its letters -> the phrases it comes from."""
    longest: int
    """Words of the longest phrase."""

    def find(self, text: str) -> list[tuple[int, ...]]:
        """What each mention in a text may mean; of mentions that overlap, the longest and then the first."""
        found, at = [], 0
        text_words = words(text)
        while at < len(text_words):
            for size in range(min(self.longest, len(text_words) - at), 0, -1):
                meant = self.look_up(" ".join(text_words[at : at + size]))
                if meant:
                    found.append(meant)
                    at += size
                    break
            else:
                at += 1
        return list(dict.fromkeys(found))

    def look_up(self, phrase: str) -> tuple[int, ...]:
        """The entities a normalised phrase may mean; empty if none."""
        known = self.phrases.get(phrase)
        if known or not self.slips or len(phrase) < SLIP:
            return known or ()
        near = {alias for form in (phrase, *_without_one(phrase)) for alias in self.slips.get(form, ())}
        meant = [number for alias in sorted(near) if one_slip(phrase, alias) for number in self.phrases[alias]]
        return tuple(dict.fromkeys(meant))


def make_gazetteer(entities: Sequence[Entity], fuzzy: bool = True) -> Gazetteer:
    """Index of the names and aliases; `fuzzy` lets one letter be wrong, missing, doubled or swapped."""
    phrases: dict[str, list[int]] = {}
    for number, entity in enumerate(entities):
        for name in dict.fromkeys(" ".join(words(text)) for text in (entity.name, *entity.aliases)):
            if name:
                phrases.setdefault(name, []).append(number)
    slips: dict[str, list[str]] = {}
    for phrase in phrases if fuzzy else ():
        if len(phrase) >= SLIP:
            for form in {phrase, *_without_one(phrase)}:
                slips.setdefault(form, []).append(phrase)
    return Gazetteer(
        tuple(entities),
        {phrase: tuple(numbers) for phrase, numbers in phrases.items()},
        {form: tuple(found) for form, found in slips.items()},
        max((phrase.count(" ") + 1 for phrase in phrases), default=0),
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case and, as far as English spelling tells, in the singular."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("’", "").replace("_", " ")
    return [singular(word) for word in WORD.findall(plain)]


def singular(word: str) -> str:
    """`cat` for `cats`; both sides of a comparison go through it, so a wrong form does no harm."""
    if len(word) < 4 or word[-1] != "s" or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    return word[:-2] if word.endswith(("ches", "shes", "xes", "sses", "zes")) else word[:-1]


def one_slip(a: str, b: str) -> bool:
    """Whether two texts differ by at most one letter: put in, left out, exchanged, or swapped with the next."""
    if len(a) > len(b):
        a, b = b, a
    if len(b) - len(a) > 1:
        return False
    same = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) < len(b):
        return a[same:] == b[same + 1 :]
    swapped = a[same : same + 2] == b[same : same + 2][::-1] and a[same + 2 :] == b[same + 2 :]
    return a[same + 1 :] == b[same + 1 :] or swapped


def _without_one(phrase: str) -> Iterator[str]:
    return (phrase[:at] + phrase[at + 1 :] for at in range(len(phrase)))


def read_entities(path: Path) -> list[Entity]:
    """One name per line; or json: a list of names, {name: [aliases]}, or {name: {aliases, description}}.

    Raises ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--entities {path}: cannot be read ({error})") from error
    if isinstance(content, list):
        content = {str(name): [] for name in content}
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--entities {path}: names nothing; give one name per line, or json {{name: [aliases]}}")
    return [_entity(str(name).strip(), value, path) for name, value in content.items()]


def _entity(name: str, value: Any, path: Path) -> Entity:
    named = value if isinstance(value, dict) else {"aliases": value}
    aliases, description = named.get("aliases", []), named.get("description", "")
    texts = isinstance(aliases, list) and all(isinstance(text, str) for text in [*aliases, description])
    if not texts or set(named) - {"aliases", "description"}:
        raise ConfigError(
            f"--entities {path}: {name!r} has {str(value)[:80]}: give a list of aliases, or aliases and description"
        )
    return Entity(name, tuple(aliases), description)


def mine(captions: Iterable[str], least: int) -> list[Entity]:
    """Phrases of up to LONGEST words in at least `least` captions that neither begin nor end with a common word.

    A phrase that hardly stands without a longer one around it is left out.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for caption in captions:
        text = words(caption)
        counts.update({
            tuple(text[at : at + size])
            for size in range(1, LONGEST + 1)
            for at in range(len(text) - size + 1)
            if _may_name(text[at]) and _may_name(text[at + size - 1])
        })  # fmt: skip
    kept = {phrase: count for phrase, count in counts.items() if count >= least}
    inside: Counter[tuple[str, ...]] = Counter()
    for phrase, count in kept.items():
        for size in range(1, len(phrase)):
            for at in range(len(phrase) - size + 1):
                part = phrase[at : at + size]
                inside[part] = max(inside[part], count)
    return [Entity(" ".join(phrase)) for phrase in sorted(kept) if inside[phrase] < 0.9 * kept[phrase]]


def _may_name(word: str) -> bool:
    return len(word) > 2 and f" {word} " not in STOP_WORDS and not word.isdigit()
