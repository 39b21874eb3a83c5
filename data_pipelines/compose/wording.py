"""Captions of a composed picture: all its objects by name, by class, and by both, with and without the background."""

from collections import Counter
from collections.abc import Sequence

from data_pipelines.compose.dice import Dice
from data_pipelines.compose.objects import Thing

PLURALS = {
    "fish": "fish", "sheep or goat": "sheep or goats", "deer": "deer", "horse or camel": "horses or camels",
    "rodent or rabbit": "rodents or rabbits", "kitchenware": "pieces of kitchenware",
}  # fmt: skip
"""Those that do not just take an s."""
NUMBERS = ("no", "one", "two", "three", "four", "five")
FRAMES = ("{}", "a photo of {}", "a picture of {}", "here we see {}", "this is {}")
"""Around the objects, or around the objects and the background."""


def captions(things: Sequence[Thing], scene: str, dice: Dice) -> tuple[str, ...]:
    """Four captions, the first the one that names each object most closely; order and frames are drawn."""
    order = _shuffled(things, dice)
    named = _joined([_article(thing.name) for thing in order])
    again = _joined([_article(thing.name) for thing in _shuffled(things, dice)])
    kinds = _joined(_counted(order))
    both = _joined([f"{_article(_one(thing.kind))} ({thing.name})" for thing in order])
    found = (
        _framed(named, scene, dice),
        _framed(kinds, scene, dice),
        _framed(both, "", dice),
        f"{again} {scene}",
    )
    return tuple(dict.fromkeys(found))


def _framed(objects: str, scene: str, dice: Dice) -> str:
    return dice.pick(FRAMES).format(f"{objects} {scene}" if scene and dice.chance(0.5) else objects)


def _shuffled(things: Sequence[Thing], dice: Dice) -> list[Thing]:
    left = list(things)
    return [left.pop(dice.below(len(left))) for _ in things]


def _article(name: str) -> str:
    """The name after a or an."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _one(kind: str) -> str:
    return "piece of kitchenware" if kind == "kitchenware" else kind


def _counted(things: Sequence[Thing]) -> list[str]:
    """Every class once, with its number: a bird, two fish."""
    counts = Counter(thing.kind for thing in things)
    return [
        _article(_one(kind)) if count == 1 else f"{NUMBERS[count]} {PLURALS.get(kind, kind + 's')}"
        for kind, count in counts.items()
    ]


def _joined(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
