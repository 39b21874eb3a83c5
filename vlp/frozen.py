"""Training heads on frozen trunks: every trunk output is computed once and kept, then only the projections run.

FrozenHeads stands in for the model, FeatureLoader for the loader; plan, captions and resume stay the same.
Suffixes: N samples, V views, F trunk features, L tokens.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.augment import AugmentConfig, augment
from data_pipelines.batch import Batch
from data_pipelines.console import Advance
from data_pipelines.errors import ConfigError
from data_pipelines.loader import VIEWS, Loader, LoaderState
from data_pipelines.preprocess import normalise
from data_pipelines.stream import Decoded
from vlp.models import trunk_of
from vlp.models.lean import maybe_normalise
from vlp.phases import phase

CHUNK = 64


def trunks_frozen(model: nn.Module) -> bool:
    """Whether both towers have a trunk of their own and neither is trained."""
    trunks = [trunk_of(tower) for tower in (getattr(model, "visual", None), getattr(model, "text", None)) if tower]
    return len(trunks) == 2 and all(t is not None and not any(p.requires_grad for p in t.parameters()) for t in trunks)


class FrozenHeads(nn.Module):
    """The projections of a model behind the model's own interface; inputs are trunk features."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.image_head, self.text_head, self.logit_scale = model.visual.head, model.text.proj, model.logit_scale

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """BF trunk features to BD."""
        with phase("forward_image"):
            return maybe_normalise(self.image_head(image), normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """BF trunk features to BD."""
        with phase("forward_text"):
            return maybe_normalise(self.text_head(text), normalize)


class FeatureLoader:
    """A loader whose batches carry trunk features; holds one table per modality."""

    def __init__(self, loader: Loader, model: Any, device: torch.device) -> None:
        """Computes nothing yet; `fill` does."""
        if loader.config.views > 1 or loader.config.texts > 1:
            raise ConfigError(
                "data.views and data.texts above 1 have no effect with both trunks frozen: leave them out"
            )
        if loader.config.boxes:
            raise ConfigError("data.boxes has no effect with both trunks frozen: leave it out")
        self.loader, self.plan, self.ledger = loader, loader.plan, loader.ledger
        self._model, self._device = model, device
        self._images: dict[tuple[int, int], Tensor] = {}
        self._texts: dict[str, Tensor] = {}

    def state_dict(self) -> LoaderState:
        """The wrapped loader's."""
        return self.loader.state_dict()

    def load_state_dict(self, state: LoaderState) -> None:
        """The wrapped loader's."""
        self.loader.load_state_dict(state)

    @torch.inference_mode()
    def fill(self, advance: Advance) -> None:
        """Trunk features of `data.cached_views` views of every picture. The first view is the picture itself."""
        config = self.loader.config
        plain = AugmentConfig()
        with ThreadPoolExecutor(config.threads) as pool:
            for start in range(0, len(self.loader.shards), CHUNK):
                span = range(start, min(start + CHUNK, len(self.loader.shards)))
                # repetitions of a sample share its features
                fresh = {self.loader.shards.original(i): i for i in span}
                ids = [i for original, i in fresh.items() if original not in self._images]
                found = list(pool.map(self.loader.fetch, ids))
                good = [(i, item) for i, item in zip(ids, found, strict=True) if isinstance(item, Decoded)]
                if not good:
                    advance(len(span))
                    continue
                views: list[Tensor] = []
                for view in range(config.cached_views):
                    generator = self.plan.generator(start * config.cached_views + view, VIEWS)
                    pixels = torch.stack([item.pixels for _, item in good])
                    strength = config.augment if view else plain
                    views.append(self._trunk(augment(pixels, strength, generator, len(good), range(len(good)))))
                for row, (sample_id, _) in enumerate(good):
                    self._images[self.loader.shards.original(sample_id)] = torch.stack([view[row] for view in views])
                advance(len(span))

    def _trunk(self, pixels_BCHW: Tensor) -> Tensor:
        trunk = self._model.visual.trunk.eval()
        features: Tensor = trunk(normalise(pixels_BCHW.to(self._device), self.loader.config.image))
        return features.float().cpu()

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Tensor:
        """Text trunk features, computed once per distinct text."""
        new = sorted({text for text in texts if text not in self._texts}, key=len)
        for start in range(0, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            tower = self._model.text
            tokens_BL = self.loader.tokenizer(chunk)
            real_BL = tokens_BL != tower.config.pad_token_id
            length = int(real_BL.sum(dim=1).max())
            tokens_BL, mask_BL = tokens_BL[:, :length].to(self._device), real_BL[:, :length].long().to(self._device)
            output = tower.transformer.eval()(input_ids=tokens_BL, attention_mask=mask_BL)
            for text, row in zip(chunk, tower.pooler(output, mask_BL).float().cpu(), strict=True):
                self._texts[text] = row.clone()
        return torch.stack([self._texts[text] for text in texts])

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._batch(self.loader.step)
            self.loader.settle(self.loader.step)
            self.loader.step += 1
            yield batch

    def _batch(self, step: int) -> Batch:
        drawn = self.loader.draw(step)
        views = self.plan.generator(step, VIEWS).random(self.plan.batch_size)
        images = [self._images[self.loader.shards.original(sample_id)] for sample_id in drawn.ids]
        chosen = [table[int(views[row] * len(table))] for table, row in zip(images, drawn.rows, strict=True)]
        return Batch(
            keys=tuple(sample.key for sample in drawn.samples),
            pixels=torch.empty(len(chosen), 0, dtype=torch.uint8),
            tokens=torch.empty(len(chosen), 0, dtype=torch.int64),
            phrase_ids=drawn.known,
            text_phrase_ids=drawn.chosen,
            image_features=torch.stack(chosen).clone(),
            text_features=self._embed(drawn.texts).clone(),
            **self.loader.fields(drawn),
        )
