"""Guarding a model in use: whether a picture came to its embedding on the way that clean pictures take there.

A trigger moves a picture's embedding among those of the target, but the layers before still see another thing, and
units that answer to nothing but the trigger. So the outputs of some normalisation layers, averaged over the picture,
are compared with those of clean pictures whose embeddings lie in the same cluster, by Mahalanobis distance in every
layer (Lee et al. 2018, arXiv 1807.03888, there by labels and for other attacks). Clusters stand in for labels, of which
none are needed. The threshold is that of a share of clean pictures that none of this was fitted on.
A guard finds triggers that the model answers to; a picture that merely carries one is like any other to it.
Suffixes: N pictures, D embedding width, K clusters, L layers, F width of the widest layer's features.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.files import write_atomic
from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.reader import Sample
from data_pipelines.shard_set import ShardSet
from data_pipelines.stream import Decoded, cut, decode, decoded_blocks
from vlp.bundle import Bundle
from vlp.infer import BATCH, encode_pixels

FORMAT = 1
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
CLUSTERS, PER_CLUSTER, ROUNDS = 16, 50, 20
RIDGE = 1e-3
FITTED = 2 / 3
"""Share of the clean pictures that the distances are fitted on; the others set the threshold."""
MOST = 20_000
"""Clean pictures that are looked at; more are thinned out evenly."""
TINY = 1e-12

Mode = Literal["fast", "thorough"]


@dataclass(frozen=True, slots=True)
class Depth:
    """What a mode looks at."""

    layers: int
    """At most so many, evenly spread."""
    start: float
    """Where they begin, as a share of the tower's depth."""
    spread: bool
    """Whether the deviation over the picture counts beside the mean; it costs far more than all the rest."""


MODES: dict[Mode, Depth] = {"fast": Depth(8, 0.5, False), "thorough": Depth(16, 0.0, True)}


class Info(StrictModel):
    """What a guard says about itself; JSON in the header of its file."""

    format: int = FORMAT
    model: str
    weights_sha256: str
    mode: Mode
    fpr: float = Field(gt=0, lt=1)
    """Share of clean pictures that are flagged."""
    threshold: float
    """Scores above it are flagged."""
    layers: tuple[str, ...] = Field(min_length=1)
    """Modules of the image tower."""
    fitted: int
    calibrated: int
    """Clean pictures that the threshold was read from."""


class Watch:
    """Takes down, whenever a tower runs, what some of its layers put out. For one thread."""

    def __init__(self, tower: nn.Module, layers: Sequence[str], spread: bool) -> None:
        self._layers, self._spread = tuple(layers), spread
        self._seen: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        self._hooks = [tower.get_submodule(name).register_forward_hook(self._hook(name)) for name in self._layers]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, _: Any, output: Tensor) -> None:
            self._seen[name].append(pooled(output, width_of(module), self._spread))

        return note

    def take(self) -> list[Tensor]:
        """Features of every layer, NF' each, of all pictures since the last time."""
        found = [torch.cat(self._seen[name]).float().cpu() for name in self._layers]
        self.forget()
        return found

    def forget(self) -> None:
        """Drop what was seen."""
        for parts in self._seen.values():
            parts.clear()

    def close(self) -> None:
        """Leave the tower as it was."""
        for hook in self._hooks:
            hook.remove()


def width_of(norm: nn.Module) -> int:
    """Channels of a normalisation layer."""
    sizes = getattr(norm, "num_features", None) or getattr(norm, "num_channels", None) or norm.normalized_shape
    return int(sizes if isinstance(sizes, int) else sizes[-1])  # type: ignore[index]


def pooled(output: Tensor, width: int, spread: bool) -> Tensor:
    """Mean over places, and the deviation if asked: N x width, or twice that. Channels come last, or second."""
    if output.ndim == 2:
        return torch.cat([output, torch.zeros_like(output)], dim=1) if spread else output
    channels = output.ndim - 1 if output.shape[-1] == width else 1
    places = [axis for axis in range(1, output.ndim) if axis != channels]
    if not spread:
        return output.mean(dim=places)
    variance, mean = torch.var_mean(output, dim=places, correction=0)
    return torch.cat([mean, variance.sqrt()], dim=1)


@torch.inference_mode()
def choose_layers(bundle: Bundle, depth: Depth) -> tuple[str, ...]:
    """Normalisation layers of the image tower, in the order in which they run. Raises ConfigError if there are none."""
    order: list[str] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and len(output) == 2 and width_of(module) in output.shape[1:]:
                order.append(name)

        return hook

    tower = image_tower(bundle)
    hooks = [
        module.register_forward_hook(note(name)) for name, module in tower.named_modules() if isinstance(module, NORMS)
    ]
    size = bundle.image.size
    encode_pixels(bundle, torch.zeros(2, bundle.image.channels, size, size, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    once = [name for name in order if order.count(name) == 1]
    if not once:
        raise ConfigError(f"{bundle.name}: its image tower has no normalisation layers, which a guard looks at")
    later = once[int(len(once) * depth.start) :]
    steps = torch.linspace(0, len(later) - 1, min(depth.layers, len(later))).round().int().tolist()
    return tuple(later[step] for step in steps)


def image_tower(bundle: Bundle) -> nn.Module:
    """The part of the model that pictures go through."""
    tower = bundle.model.get_submodule("visual")
    assert isinstance(tower, nn.Module)
    return tower


@dataclass(frozen=True, slots=True)
class Profile:
    """How clean pictures behave, cluster by cluster; features are whitened, so that distances are Euclidean."""

    centre_KD: Tensor
    whiten_LFF: Tensor
    """Applied from the right; beyond a layer's own width zero."""
    home_LKF: Tensor
    """Whitened mean of each cluster."""
    middle_L: Tensor
    spread_L: Tensor
    """Median of the logarithm of the squared distance among clean pictures, and its distance to the 84th percentile."""

    def distances(self, embedding_ND: Tensor, features: Sequence[Tensor]) -> Tensor:
        """LN: logarithms of squared distances to the picture's own cluster."""
        cluster_N = (embedding_ND @ self.centre_KD.T).argmax(dim=1)
        width = self.whiten_LFF.shape[-1]
        features_LNF = torch.stack([F.pad(part, (0, width - part.shape[1])) for part in features])
        away_LNF = torch.bmm(features_LNF, self.whiten_LFF) - self.home_LKF[:, cluster_N]
        return away_LNF.square().sum(dim=-1).clamp_min(TINY).log()

    def scores(self, embedding_ND: Tensor, features: Sequence[Tensor]) -> Tensor:
        """N: a soft maximum over the layers of how many deviations a picture is further off than clean ones."""
        off_LN = (self.distances(embedding_ND, features) - self.middle_L[:, None]) / self.spread_L[:, None]
        return off_LN.logsumexp(dim=0) - math.log(len(off_LN))


class Guard:
    """Scores the pictures that a bundle embeds. Belongs to the thread that runs the model."""

    def __init__(self, info: Info, profile: Profile, bundle: Bundle) -> None:
        """The bundle's image tower is watched from now on."""
        self.info, self._profile = info, profile
        try:
            self._watch = Watch(image_tower(bundle), info.layers, MODES[info.mode].spread)
        except AttributeError as error:
            raise ConfigError(f"{bundle.name} lacks a layer that the guard looks at ({error})") from error

    @torch.inference_mode()
    def scored(self, encode: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """(what `encode` returns, scores N): it has to run the bundle's image tower and return the embeddings ND."""
        self._watch.forget()  # of a run that failed half-way
        embedding_ND = encode()
        return embedding_ND, self._profile.scores(embedding_ND, self._watch.take())

    def close(self) -> None:
        """Watch no more."""
        self._watch.close()


def fit_guard(
    bundle: Bundle,
    weights_sha256: str,
    data: Path,
    mode: Mode = "fast",
    fpr: float = 0.01,
    advance: Callable[[int], None] = lambda step: None,
) -> tuple[Info, Profile]:
    """A guard from clean pictures. Raises ConfigError where they are too few for the layers or the rate."""
    depth = MODES[mode]
    layers = choose_layers(bundle, depth)
    embedding_ND, features = _look(bundle, layers, depth.spread, data, advance)
    order_N = torch.randperm(len(embedding_ND), generator=torch.Generator().manual_seed(0))
    fitted_N, rest_N = order_N.split([count := int(len(order_N) * FITTED), len(order_N) - count])
    widest = max(part.shape[1] for part in features)
    if count <= widest:
        raise ConfigError(
            f"{data}: {len(order_N)} pictures are too few for layers of {widest} features: give more than "
            f"{math.ceil((widest + 1) / FITTED)}, better ten times as many"
        )
    _rank(len(rest_N), fpr)  # too few pictures for the rate are found before the work
    profile = _profile(embedding_ND[fitted_N], [part[fitted_N] for part in features])
    rest = embedding_ND[rest_N], [part[rest_N] for part in features]
    off_LN = profile.distances(*rest)
    middle_L = off_LN.median(dim=1).values
    spread_L = (off_LN.quantile(0.8413, dim=1) - middle_L).clamp_min(TINY)
    profile = Profile(profile.centre_KD, profile.whiten_LFF, profile.home_LKF, middle_L, spread_L)
    limit = threshold(profile.scores(*rest), fpr)
    info = Info(
        model=bundle.name, weights_sha256=weights_sha256, mode=mode, fpr=fpr, threshold=limit, layers=layers,
        fitted=len(fitted_N), calibrated=len(rest_N),
    )  # fmt: skip
    return info, profile


def threshold(score_N: Tensor, fpr: float) -> float:
    """The score that a further clean picture exceeds with probability `fpr` at most: the one of rank
    ceil((N + 1)(1 - fpr)), as in conformal prediction. Raises ConfigError for fewer scores than that."""
    return float(score_N.sort().values[_rank(len(score_N), fpr) - 1])


def _rank(count: int, fpr: float) -> int:
    if not 0 < fpr < 1:
        raise ConfigError(f"--fpr {fpr:g}: the share of clean pictures to flag lies between 0 and 1")
    rank = math.ceil((count + 1) * (1 - fpr) - 1e-9)
    if rank > count:
        needed = math.ceil((1 / fpr - 1) / (1 - FITTED))
        raise ConfigError(f"--fpr {fpr:g}: {count} clean pictures for the threshold are too few: give {needed} in all")
    return rank


def _look(
    bundle: Bundle, layers: Sequence[str], spread: bool, data: Path, advance: Callable[[int], None]
) -> tuple[Tensor, list[Tensor]]:
    """(ND, features per layer) of the pictures of the shards; bad ones are counted, too many stop."""
    shards, ledger = ShardSet(data), Ledger()
    step = math.ceil(len(shards) / MOST) or 1
    ids = range(0, len(shards), step)
    blocks = [ids[block.start : block.stop] for block in cut(len(ids), BATCH)]

    def read(sample: Sample) -> Decoded:
        return decode(sample, bundle.image, MAX_PIXELS, captions=False)

    watch = Watch(image_tower(bundle), layers, spread)
    rows = [torch.empty(0, bundle.dim)]
    try:
        for block in decoded_blocks(shards, blocks, read, ledger, threads=2):
            if block:
                rows.append(encode_pixels(bundle, torch.stack([sample.pixels for sample in block])))
            advance(len(block))
        ledger.check()
        if not ledger.delivered:
            raise ConfigError(f"{data}: not one picture can be used")
        return torch.cat(rows), watch.take()
    finally:
        watch.close()


def _profile(embedding_ND: Tensor, features: Sequence[Tensor]) -> Profile:
    """Everything but middle and spread."""
    centre_KD = _centres(embedding_ND, max(1, min(CLUSTERS, len(embedding_ND) // PER_CLUSTER)))
    cluster_N = (embedding_ND @ centre_KD.T).argmax(dim=1)
    used_K = torch.bincount(cluster_N, minlength=len(centre_KD)) > 0
    centre_KD = centre_KD[used_K]
    cluster_N = (used_K.cumsum(0) - 1)[cluster_N]
    width = max(part.shape[1] for part in features)
    whiten, homes = [], []
    for part in features:
        scale_F = part.std(dim=0) + 1e-6
        plain_NF = part / scale_F
        mean_KF = torch.stack([plain_NF[cluster_N == cluster].mean(dim=0) for cluster in range(len(centre_KD))])
        away_NF = (plain_NF - mean_KF[cluster_N]).double()
        within_FF = away_NF.T @ away_NF / len(away_NF)
        ridge = RIDGE * within_FF.diagonal().mean().clamp_min(TINY)
        root_FF = torch.linalg.cholesky(within_FF + ridge * torch.eye(len(within_FF), dtype=torch.float64))
        unit_FF = torch.linalg.solve_triangular(root_FF, torch.eye(len(root_FF), dtype=torch.float64), upper=False).T
        gap = width - len(unit_FF)
        whiten.append(F.pad(unit_FF.float() / scale_F[:, None], (0, gap, 0, gap)))
        homes.append(F.pad(mean_KF @ unit_FF.float(), (0, gap)))
    none_L = torch.zeros(len(features))
    return Profile(centre_KD, torch.stack(whiten), torch.stack(homes), none_L, none_L + 1)


def _centres(embedding_ND: Tensor, count: int) -> Tensor:
    """KD: k-means by cosine, the same for the same pictures."""
    chosen = torch.randperm(len(embedding_ND), generator=torch.Generator().manual_seed(0))[:count]
    centre_KD = embedding_ND[chosen]
    for _ in range(ROUNDS):
        cluster_N = (embedding_ND @ centre_KD.T).argmax(dim=1)
        sum_KD = torch.zeros_like(centre_KD).index_add_(0, cluster_N, embedding_ND)
        centre_KD = torch.where(sum_KD.norm(dim=1, keepdim=True) > 0, F.normalize(sum_KD, dim=1), centre_KD)
    return centre_KD


def save_guard(path: Path, info: Info, profile: Profile) -> None:
    """Write a guard as one safetensors file, whole or not at all."""
    tensors = {name: getattr(profile, name).contiguous() for name in Profile.__slots__}
    content = save(tensors, metadata={"guard": info.model_dump_json()})
    write_atomic(path, lambda stream: stream.write(content))


def load_guard(path: Path, weights_sha256: str) -> tuple[Info, Profile]:
    """A guard for the bundle with these weights. Raises BundleError for a file that is none, or another's."""
    try:
        with safe_open(path, "pt") as stream:
            told = json.loads((stream.metadata() or {})["guard"])
            if int(told.get("format", 0)) > FORMAT:
                raise BundleError(f"{path}: written by a newer version: install a newer vlp")
            info = Info.model_validate(told)
            profile = Profile(**{name: stream.get_tensor(name) for name in Profile.__slots__})
    except ValidationError as error:
        raise BundleError(f"{path}: {explain(error)}") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: no guard as `vlp guard` writes it ({error})") from error
    if info.weights_sha256 != weights_sha256:
        raise BundleError(
            f"{path}: made for {info.model!r} with other weights ({info.weights_sha256[:12]}, here "
            f"{weights_sha256[:12]}), whose distances mean nothing here: run `vlp guard` with this bundle"
        )
    return info, profile
