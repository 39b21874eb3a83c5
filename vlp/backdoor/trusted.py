"""Which of a few trusted pairs one would rather do without: five poisons among a thousand undo a cleaning.

They are too few for `vlp scan`, and the model that holds the backdoor sees nothing wrong in their embeddings. Two signs
are left, both from what its layers put out before: a patch moves a picture far off the others of its class in the later
half (Mahalanobis distance, as in `vlp.backdoor.guard`), and in all layers a poison's neighbours are pictures of what it
really shows, whose captions say another thing than its own. Neither tells for certain, clean pairs between two classes
have the second as well; so a fixed share of the most doubtful ones is left out, which costs a cleaning next to nothing.
A poison whose caption is right and whose patch the model takes for a part of the target is not found.
Suffixes: N pairs, S of the sample, D embedding width, K clusters, F width of a layer's features, L layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.reader import Sample
from data_pipelines.shard_set import ShardSet
from data_pipelines.stream import Decoded, cut, decode, decoded_blocks
from vlp.backdoor.density import SMALL
from vlp.backdoor.guard import CLUSTERS, MODES, PER_CLUSTER, Watch, centres, choose_layers, image_tower, whitening
from vlp.backdoor.scan import spreads_of
from vlp.bundle import Bundle
from vlp.infer import BATCH, encode_pixels, encode_texts

SHARE = 0.1
"""Of the pairs are left out."""
SAMPLE = 2048
"""Pairs that neighbours and classes are taken from, a random choice of a larger set."""
NEIGHBOURS = 10
RIDGE = 0.1
"""Of the covariances, large because the pairs are few for the widths of layers."""
THREADS = 2


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model makes of some pairs."""

    keys: list[str]
    image_ND: Tensor
    text_ND: Tensor
    features: list[Tensor]
    """NF of every layer."""


@dataclass(frozen=True, slots=True)
class Layer:
    """How the pairs of the sample look in a layer."""

    whiten_FF: Tensor
    home_KF: Tensor
    """Whitened mean of each cluster."""
    sample_SF: Tensor
    """Whitened."""


def doubtful(bundle: Bundle, data: Path, share: float = SHARE) -> dict[str, float]:
    """Key -> doubt of the share of the pairs that is left out, the most doubtful first; 0 is the middle of all pairs.

    Raises PipelineError for shards that cannot be read, ConfigError for a model without normalisation layers.
    """
    shards = ShardSet(data)
    chosen_S = torch.randperm(len(shards), generator=torch.Generator().manual_seed(0))[:SAMPLE].sort().values
    layers = choose_layers(bundle, MODES["thorough"])
    parts = list(_seen(bundle, layers, shards, chosen_S.tolist()))
    sample = Seen(
        [key for part in parts for key in part.keys], torch.cat([part.image_ND for part in parts]),
        torch.cat([part.text_ND for part in parts]),
        [torch.cat(rows) for rows in zip(*(part.features for part in parts), strict=True)],
    )  # fmt: skip
    ground = Ground(sample)
    keys: list[str] = []
    signs: list[Tensor] = []
    for part in _seen(bundle, layers, shards, range(len(shards))):
        keys += part.keys
        signs.append(ground.signs(part))
    doubt_N = doubts(torch.cat(signs, dim=1))
    order = doubt_N.argsort(descending=True, stable=True)[: round(share * len(keys))].tolist()
    return {keys[row]: float(doubt_N[row]) for row in order}


def doubts(sign_2N: Tensor) -> Tensor:
    """N: sum of both signs in spreads of their bulk above its middle; what lies below does not speak for a pair."""
    spreads = spreads_of({"far": sign_2N[0], "odd": sign_2N[1]})
    return torch.stack([spread_N.clamp_min(0.0) for spread_N in spreads.values()]).sum(dim=0)


def _seen(bundle: Bundle, layers: Sequence[str], shards: ShardSet, ids: Sequence[int]) -> Iterator[Seen]:
    """Pairs of these ids, block by block; bad ones are left out, too many stop."""
    ledger = Ledger()

    def read(sample: Sample) -> Decoded:
        return decode(sample, bundle.image, MAX_PIXELS, captions=False)

    blocks = [ids[block.start : block.stop] for block in cut(len(ids), BATCH)]
    watch = Watch(image_tower(bundle), layers, spread=True)
    try:
        for block in decoded_blocks(shards, blocks, read, ledger, THREADS):
            if not block:
                continue
            image_ND = encode_pixels(bundle, torch.stack([sample.pixels for sample in block])).cpu()
            text_ND = encode_texts(bundle, [next(iter(sample.captions), "") for sample in block]).cpu()
            yield Seen([sample.key for sample in block], image_ND, text_ND, watch.take())
        ledger.check()
    finally:
        watch.close()


class Ground:
    """What pairs of a set are compared with: a sample of them."""

    def __init__(self, sample: Seen) -> None:
        image_SD = sample.image_ND
        count = max(1, min(CLUSTERS, len(image_SD) // PER_CLUSTER))
        centre_KD = centres(image_SD, count)
        used = (image_SD @ centre_KD.T).argmax(dim=1).unique()
        self._row = {key: row for row, key in enumerate(sample.keys)}
        self._centre_KD = centre_KD[used]
        self._mean_D = sample.text_ND.mean(dim=0)
        self._said_SD = F.normalize(sample.text_ND - self._mean_D, dim=1)
        own_S = (image_SD @ self._centre_KD.T).argmax(dim=1)
        self._layers = [_layer(feature_SF, own_S, len(used)) for feature_SF in sample.features]
        far_LS = self._far(sample)
        self._middle_L1 = far_LS.median(dim=1, keepdim=True).values
        self._spread_L1 = (far_LS.quantile(0.8413, dim=1, keepdim=True) - self._middle_L1).clamp_min(SMALL)

    def signs(self, seen: Seen) -> Tensor:
        """2N: how far pairs are from their cluster, a soft maximum over layers; how unlike their neighbours' captions
        theirs are."""
        far_N = ((self._far(seen) - self._middle_L1) / self._spread_L1).logsumexp(dim=0)
        itself_N = torch.tensor([self._row.get(key, -1) for key in seen.keys])
        inside = (itself_N >= 0).nonzero()[:, 0]
        said_ND = F.normalize(seen.text_ND - self._mean_D, dim=1)
        odd = []
        for layer, feature_NF in zip(self._layers, seen.features, strict=True):
            away_NS = torch.cdist(feature_NF @ layer.whiten_FF, layer.sample_SF)
            away_NS[inside, itself_N[inside]] = torch.inf
            near_NK = away_NS.topk(min(NEIGHBOURS, len(layer.sample_SF) - 1), largest=False).indices
            odd.append(1.0 - torch.einsum("nkd,nd->nk", self._said_SD[near_NK], said_ND).mean(dim=1))
        return torch.stack([far_N, torch.stack(odd).mean(dim=0)])

    def _far(self, seen: Seen) -> Tensor:
        """LN, of the later half of the layers: logarithm of the squared distance to the own cluster."""
        own_N = (seen.image_ND @ self._centre_KD.T).argmax(dim=1)
        later = range(len(self._layers) // 2, len(self._layers))
        away = [seen.features[at] @ self._layers[at].whiten_FF - self._layers[at].home_KF[own_N] for at in later]
        return torch.stack([away_NF.square().sum(dim=1).clamp_min(SMALL).log() for away_NF in away])


def _layer(feature_SF: Tensor, own_S: Tensor, count: int) -> Layer:
    scale_F = feature_SF.std(dim=0) + SMALL
    plain_SF = feature_SF / scale_F
    mean_KF = torch.stack([plain_SF[own_S == cluster].mean(dim=0) for cluster in range(count)])
    unit_FF = whitening(plain_SF - mean_KF[own_S], RIDGE)
    return Layer(unit_FF / scale_F[:, None], mean_KF @ unit_FF, plain_SF @ unit_FF)
