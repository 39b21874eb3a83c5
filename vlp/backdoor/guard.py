"""Guarding a model in use: whether a picture came to its embedding on the way that clean pictures take there.

A trigger moves a picture's embedding among those of the target, but the layers before still see another thing, and
units that answer to nothing but the trigger. So the outputs of some normalisation layers, averaged over the picture,
are compared in every layer with those of clean pictures by Mahalanobis distance (Lee et al. 2018, arXiv 1807.03888,
against other attacks). Two things count: how far a picture is from the clean ones of its own class, which finds patches
and patterns, and how much farther than from the nearest class, which finds warps and other triggers that leave no trace
but the disagreement. Classes are what the embedding is nearest to: texts of labels, or clusters of clean embeddings.
The threshold comes from clean pictures that none of this was fitted on. A guard finds triggers that the model answers
to; a picture that merely carries one is like any other to it.
Suffixes: N pictures, D embedding width, K classes, L layers, F width of the widest layer's features.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
FEWEST = 10
"""A class with fewer clean pictures is left out."""
RIDGE = 1e-3
FITTED = 2 / 3
"""Share of the clean pictures that the distances are fitted on; the others set the threshold."""
MOST = 20_000
"""Clean pictures that are looked at; more are thinned out evenly."""
TINY = 1e-12
TAIL = 0.9
"""Quantile of clean values below which nothing is suspicious."""
DISAGREEMENT = 0.5
"""Weight of the second measure: clean pictures between two classes are far more common than those far from all."""

Mode = Literal["fast", "standard", "thorough"]


@dataclass(frozen=True, slots=True)
class Depth:
    """What a mode looks at."""

    layers: int
    """At most so many, evenly spread."""
    start: float
    """Where they begin, as a share of the tower's depth."""
    spread: bool
    """Whether the deviation over the picture counts beside the mean."""


STANDARD = Depth(8, 0.5, True)
MODES: dict[Mode, Depth] = {"fast": Depth(8, 0.5, False), "standard": STANDARD, "thorough": Depth(16, 0.0, True)}


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
    classes: int
    fitted: int
    """Clean pictures that the distances come from."""
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
    output = output.float()
    channels = output.ndim - 1 if output.shape[-1] == width else 1
    places = [axis for axis in range(1, output.ndim) if axis != channels]
    if not spread:
        return output.mean(dim=places)
    mean = output.mean(dim=places)
    # by the squares, whose digits suffice for what a normalisation layer puts out: var_mean takes ten times as long
    variance = output.square().mean(dim=places) - mean.square()
    return torch.cat([mean, variance.clamp_min(0.0).sqrt()], dim=1)


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
    return bundle.model.get_submodule("visual")


@dataclass(frozen=True, slots=True)
class Profile:
    """How clean pictures behave, class by class; features are whitened, so that distances are Euclidean."""

    centre_KD: Tensor
    """What embeddings are compared with to find their class; of length one."""
    whiten_LFF: Tensor
    """Applied from the right; beyond a layer's own width zero."""
    home_LKF: Tensor
    """Whitened mean of each class."""
    middle_2L: Tensor
    spread_2L: Tensor
    """Of both measures among clean pictures: median, and how far a high quantile lies above it."""
    start_2: Tensor
    excess_2: Tensor
    """Of both measures after the layers are joined: the quantile TAIL, and the mean excess of those above it."""

    def measures(self, embedding_ND: Tensor, features: Sequence[Tensor]) -> Tensor:
        """2LN: logarithm of the squared distance to the own class; how much more it is than to the nearest one."""
        own_N = (embedding_ND @ self.centre_KD.T).argmax(dim=1)
        square_LNK = torch.stack([*map(_squares, features, self.whiten_LFF, self.home_LKF)])
        own_LN = square_LNK.gather(2, own_N.expand(len(features), -1)[..., None])[..., 0]
        return torch.stack([own_LN.clamp_min(TINY).log(), own_LN - square_LNK.amin(dim=2)])

    def joined(self, measure_2LN: Tensor) -> Tensor:
        """2N: for each measure a soft maximum over the layers."""
        return ((measure_2LN - self.middle_2L[..., None]) / self.spread_2L[..., None]).logsumexp(dim=1)

    def scores(self, embedding_ND: Tensor, features: Sequence[Tensor]) -> Tensor:
        """N: excesses over what is usual, in units of the mean excess, which makes them logarithms of tail shares."""
        joined_2N = self.joined(self.measures(embedding_ND, features))
        far_N, torn_N = ((joined_2N - self.start_2[:, None]) / self.excess_2[:, None]).clamp_min(0.0)
        score_N: Tensor = far_N + DISAGREEMENT * torn_N
        return score_N


def _squares(feature_NF: Tensor, whiten_FF: Tensor, home_KF: Tensor) -> Tensor:
    """NK: squared distances in one layer. Not by products: squares are large beside the differences of distances."""
    width, exact = feature_NF.shape[1], "donot_use_mm_for_euclid_dist"
    return torch.cdist(feature_NF @ whiten_FF[:width, :width], home_KF[:, :width], compute_mode=exact).square()


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
    mode: Mode = "standard",
    fpr: float = 0.01,
    head_KD: Tensor | None = None,
    advance: Callable[[int], None] = lambda step: None,
) -> tuple[Info, Profile]:
    """A guard from clean pictures; `head_KD`: embeddings of labels, else classes are clusters of the pictures.

    Raises ConfigError where the pictures are too few for the layers or the rate.
    """
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
    profile = _profile(embedding_ND[fitted_N], [part[fitted_N] for part in features], head_KD)
    rest = embedding_ND[rest_N], [part[rest_N] for part in features]
    profile = _calibrated(profile, profile.measures(*rest))
    info = Info(
        model=bundle.name, weights_sha256=weights_sha256, mode=mode, fpr=fpr,
        threshold=threshold(profile.scores(*rest), fpr), layers=layers, classes=len(profile.centre_KD),
        fitted=len(fitted_N), calibrated=len(rest_N),
    )  # fmt: skip
    return info, profile


def _calibrated(profile: Profile, measure_2LN: Tensor) -> Profile:
    """The profile with the numbers that clean pictures give."""
    middle_2L = measure_2LN.median(dim=2).values
    # most pictures lie nearest to their own class: only a far quantile of the second measure is above 0 for sure
    high_2L = torch.stack([measure_2LN[0].quantile(0.8413, dim=1), measure_2LN[1].quantile(0.99, dim=1)])
    profile = replace(profile, middle_2L=middle_2L, spread_2L=(high_2L - middle_2L).clamp_min(RIDGE))
    joined_2N = profile.joined(measure_2LN)
    start_2 = joined_2N.quantile(TAIL, dim=1)
    excess_2 = (joined_2N - start_2[:, None]).clamp_min(0.0).mean(dim=1) / (1.0 - TAIL)
    return replace(profile, start_2=start_2, excess_2=excess_2.clamp_min(RIDGE))


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


def _profile(embedding_ND: Tensor, features: Sequence[Tensor], head_KD: Tensor | None) -> Profile:
    """Classes and distances, not calibrated."""
    if head_KD is None:
        head_KD = centres(embedding_ND, max(1, min(CLUSTERS, len(embedding_ND) // PER_CLUSTER)))
    sizes_K = torch.bincount((embedding_ND @ head_KD.T).argmax(dim=1), minlength=len(head_KD))
    centre_KD = head_KD[sizes_K >= min(FEWEST, int(sizes_K.max()))]
    cluster_N = (embedding_ND @ centre_KD.T).argmax(dim=1)
    width = max(part.shape[1] for part in features)
    whiten, homes = [], []
    for part in features:
        scale_F = part.std(dim=0) + 1e-6
        plain_NF = part / scale_F
        mean_KF = torch.stack([plain_NF[cluster_N == cluster].mean(dim=0) for cluster in range(len(centre_KD))])
        unit_FF = whitening(plain_NF - mean_KF[cluster_N], RIDGE)
        gap = width - len(unit_FF)
        whiten.append(F.pad(unit_FF / scale_F[:, None], (0, gap, 0, gap)))
        homes.append(F.pad(mean_KF @ unit_FF, (0, gap)))
    none_2L, none_2 = torch.zeros(2, len(features)), torch.zeros(2)
    return Profile(centre_KD, torch.stack(whiten), torch.stack(homes), none_2L, none_2L + 1, none_2, none_2 + 1)


def whitening(away_NF: Tensor, ridge: float) -> Tensor:
    """FF, applied from the right: makes the covariance of these deviations, and a share of its mean, the unit."""
    away_NF = away_NF.double()
    within_FF = away_NF.T @ away_NF / len(away_NF)
    unit_FF = torch.eye(len(within_FF), dtype=torch.float64)
    root_FF = torch.linalg.cholesky(within_FF + ridge * within_FF.diagonal().mean().clamp_min(TINY) * unit_FF)
    inverse_FF: Tensor = torch.linalg.solve_triangular(root_FF, unit_FF, upper=False)
    return inverse_FF.T.float()


def centres(embedding_ND: Tensor, count: int) -> Tensor:
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
        other = f"made for {info.model!r} with other weights ({info.weights_sha256[:12]}, here {weights_sha256[:12]})"
        raise BundleError(f"{path}: {other}, whose distances mean nothing here: run `vlp guard` with this bundle")
    return info, profile
