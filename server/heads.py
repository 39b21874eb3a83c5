"""Text heads: the normalised mean over templates of each label's prompts, computed once and kept while they are used.

Belongs to one model, and ends with it, so that a reloaded model never meets the texts of the old one.
Suffixes: L labels, P prompts, D embedding width.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import torch

from server.engine import Vectors
from vlp.infer import make_prompts, pool_prompts

KEPT_BYTES = 64 << 20
PROMPTS_AT_ONCE = 64
"""Prompts per turn in the model's queue: a long list lets others in between, and each turn has the time limit alone."""

EmbedTexts = Callable[[Sequence[str]], Awaitable[tuple[Vectors, int]]]


class Heads:
    """The heads used last, up to KEPT_BYTES. Belongs to one event loop."""

    def __init__(self, embed: EmbedTexts) -> None:
        self._embed = embed
        self._kept: OrderedDict[bytes, Vectors] = OrderedDict()
        self._bytes = 0
        self.computed = 0
        """Heads that were not found here."""

    async def get(self, labels: Sequence[str], templates: Sequence[str]) -> Vectors:
        """LD, rows of length 1; not to be written to."""
        key = hashlib.sha256(json.dumps([labels, templates]).encode()).digest()
        if (head := self._kept.get(key)) is None:
            head = await self._make(labels, templates)
            if key not in self._kept:
                self._kept[key] = head
                self._bytes += head.nbytes
        self._kept.move_to_end(key)
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return head

    async def _make(self, labels: Sequence[str], templates: Sequence[str]) -> Vectors:
        self.computed += 1
        step = max(1, PROMPTS_AT_ONCE // len(templates))
        parts: list[Vectors] = []
        for at in range(0, len(labels), step):
            some = labels[at : at + step]
            prompts = make_prompts(some, templates)
            rows = [
                (await self._embed(prompts[row : row + PROMPTS_AT_ONCE]))[0]
                for row in range(0, len(prompts), PROMPTS_AT_ONCE)
            ]
            parts.append(pool_prompts(torch.from_numpy(np.concatenate(rows)), len(some)).numpy())
        head: Vectors = np.concatenate(parts)
        return head
