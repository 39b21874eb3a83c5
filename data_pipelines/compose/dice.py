"""Random numbers that every Python gives alike: the seeder and `random()` are the two things it promises to keep."""

import hashlib
import math
from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Draws that depend on a text alone."""

    def __init__(self, seed: str) -> None:
        self._random = Random(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))

    def between(self, low: float, high: float) -> float:
        """Uniform."""
        return low + (high - low) * self._random.random()

    def log_between(self, low: float, high: float) -> float:
        """Uniform in the logarithm."""
        return math.exp(self.between(math.log(low), math.log(high)))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random.random() < probability

    def below(self, count: int) -> int:
        """0 .. count-1."""
        return int(self._random.random() * count)

    def pick(self, items: Sequence[T]) -> T:
        """One of them, uniformly."""
        return items[self.below(len(items))]

    def weighted(self, weights: Sequence[float]) -> int:
        """A place in `weights`, each with its share."""
        left = self._random.random() * sum(weights)
        for place, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return place
        return len(weights) - 1
