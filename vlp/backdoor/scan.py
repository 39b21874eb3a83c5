"""Which samples look planted: signs of poison for every sample, joined to one suspicion, a keep-list and weights.

A scan sees keys, pictures and captions, never what `vlp poison` wrote beside them. Signs are numbers that are higher
for what is suspicious. The suspicion of a sample is how rare its signs are together; flagged is what lies far off the
bulk of all samples by one of them, next to nothing in data without poison. Nothing is deleted: `keep.txt` leaves out
what is flagged, `scores.parquet` has a weight for each sample. Suffixes: N samples, D width.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.dedup import perceptual_hash
from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.files import write_atomic
from data_pipelines.parquet import read_columns
from data_pipelines.reader import Shard, open_shards
from data_pipelines.stream import cut, in_blocks
from vlp import __version__
from vlp.backdoor.density import MEASURES, SMALL, Reference, densities, refer
from vlp.backdoor.layers import strangeness
from vlp.bundle import Bundle
from vlp.curate.cluster import assign
from vlp.curate.pictures import BLOCK, Advance, Pictures, embed_pictures
from vlp.embed_files import own_caption

SCORES, KEEP, ACCOUNT = "scores.parquet", "keep.txt", "scan.json"
ALL = (*MEASURES, "similarity", "reference", "layers", "copies", "isolation")
"""Signs. similarity: picture and caption are unlike; reference: so says another model; layers: the model's layers see
the picture in another way than trusted ones, as in `vlp.backdoor.guard`; copies: many samples of one caption and one
picture; isolation: an isolation forest over all other signs."""
DEFAULT = ("slof", "copies")
"""With a reference model `reference` as well, with trusted pictures `layers`. Own similarity is not among them: a model
that has learned a backdoor finds its poisons more alike than others."""
SMOOTHED = ("similarity", "reference", "layers")
"""Signs of a picture alone, which its neighbours can tell more of."""
COPIES = 3
"""So many samples of one picture and caption are as suspicious as one spread of another sign: flagged from 30 on."""
SUSPECTS = 48
"""Samples that the account names."""
THREADS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """How to scan."""

    methods: tuple[str, ...] = DEFAULT
    k: int = 16
    """Neighbours. Poisons are found while fewer than k of them are in the reference sample."""
    sample: int = 2048
    """Samples of the reference that densities are measured against."""
    limit: float = 10.0
    """Flagged from so many spreads of the bulk above its middle on, by any sign."""
    remove: float | None = None
    """Share of the samples to leave out, the most suspicious ones, in place of `limit`."""
    seed: int = 0
    smooth: int = 0
    """Neighbours whose median takes the place of the signs in SMOOTHED; 0: a picture's own signs."""

    def check(self, reference: bool, trusted: bool = False) -> None:
        """Raise ConfigError for what cannot be meant."""
        if unknown := sorted(set(self.methods) - set(ALL)):
            raise ConfigError(f"--method {unknown[0]!r} is unknown; known: {', '.join(ALL)}")
        if not self.methods:
            raise ConfigError("--method: name one at least")
        if "reference" in self.methods and not reference:
            raise ConfigError("--method reference needs --reference, a model that did not see these data")
        if "layers" in self.methods and not trusted:
            raise ConfigError("--method layers needs --trusted, shards of clean pictures other than these")
        if self.methods == ("isolation",):
            raise ConfigError("--method isolation looks at the other signs: name some of them as well")
        if not 1 <= self.k < self.sample:
            raise ConfigError(f"--k {self.k}: must be 1 to {self.sample - 1}, fewer than --sample")
        if self.smooth < 0:
            raise ConfigError(f"--smooth {self.smooth}: name a number of neighbours, or 0 for none")
        if self.remove is not None and not 0 < self.remove < 1:
            raise ConfigError(f"--remove {self.remove}: must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle and where it was loaded from."""

    path: Path
    bundle: Bundle


def scan(
    data: Path,
    out: Path,
    model: Model,
    reference: Model | None,
    options: Options,
    advance: Advance,
    trusted: Path | None = None,
) -> dict[str, Any]:
    """Write the scan of a folder of shards below `out`; its account. `advance` is told of embedded pictures.

    `trusted`: shards of clean pictures, other than these, for the sign `layers`. Raises ConfigError for options that
    cannot be meant, PipelineError for shards that cannot be read.
    """
    options.check(reference is not None, trusted is not None)
    pictures = embed_pictures(model.path, model.bundle, [data], advance=advance, captions=True)
    others = None
    if reference is not None:
        others = embed_pictures(reference.path, reference.bundle, [data], advance=advance, captions=True)
    ways: dict[str, float] = {}
    if trusted is not None and "layers" in options.methods:
        ways = strangeness(model.path, model.bundle, trusted, data, advance)
    alone = measure(data, pictures, others, options, ways)
    signs = smoothed(alone, pictures, options.smooth, advance)
    spread_N = torch.stack([*spreads_of(signs, alone).values()]).amax(dim=0)
    suspicion_N = suspicion(signs)
    flagged_N = spread_N >= options.limit
    if options.remove is not None:
        flagged_N = torch.zeros_like(flagged_N)
        flagged_N[suspicion_N.argsort(descending=True, stable=True)[: round(options.remove * len(pictures))]] = True
    weight_N = (2.0 - 2.0 * spread_N / options.limit).clamp(0.0, 1.0).where(~flagged_N, 0.0)
    table = {**signs, "spread": spread_N, "suspicion": suspicion_N, "weight": weight_N}
    keys = [key for part in pictures.keys() for key in part]  # noqa: SIM118 - no mapping
    _write_tables(out, keys, table, flagged_N)
    order = suspicion_N.argsort(descending=True, stable=True)[:SUSPECTS].tolist()
    account = {
        "version": __version__, "data": str(data), "pictures": len(keys), "flagged": int(flagged_N.sum()),
        "share": float(flagged_N.float().mean()), "skipped": pictures.skipped,
        "methods": [*signs], "options": {"k": options.k, "sample": options.sample, "limit": options.limit,
                                         "remove": options.remove, "seed": options.seed,
                                         "smooth": options.smooth},
        "trusted": str(trusted) if ways else None,
        "made_of": pictures.made_of, "reference": others.made_of if others else None,
        "suspects": [
            {"key": keys[row], "suspicion": round(float(suspicion_N[row]), 3), "flagged": bool(flagged_N[row]),
             "signs": {name: round(float(sign_N[row]), 4) for name, sign_N in signs.items()}}
            for row in order
        ],
        "keep": str(out / KEEP), "scores": str(out / SCORES),
    }  # fmt: skip
    write_atomic(out / ACCOUNT, lambda stream: stream.write(json.dumps(account, indent=1, ensure_ascii=False).encode()))
    return account


def measure(
    data: Path, pictures: Pictures, others: Pictures | None, options: Options, ways: Mapping[str, float] = {}
) -> dict[str, Tensor]:
    """Sign -> N, higher for what is suspicious; `isolation` last, it looks at the others. `ways`: key -> `layers`."""
    found: dict[str, Tensor] = {}
    chosen = [name for name in options.methods if name in MEASURES]
    if chosen:
        found |= densities(_placed(pictures), _reference(pictures, options), chosen)
    if "similarity" in options.methods:
        found["similarity"] = unlikeness(pictures)
    if others is not None and "reference" in options.methods:
        found["reference"] = unlikeness(others)
    if ways:
        found["layers"] = torch.tensor([ways[key] for part in pictures.keys() for key in part])  # noqa: SIM118
    if "copies" in options.methods:
        found["copies"] = copies(data, pictures)
    if "isolation" in options.methods:
        found["isolation"] = isolation(found, options.seed)
    return {name: found[name] for name in ALL if name in found}


def _placed(pictures: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for block_ND in pictures.blocks():
        yield block_ND, torch.arange(start, start + len(block_ND))
        start += len(block_ND)


def _reference(pictures: Pictures, options: Options) -> Reference:
    if len(pictures) <= options.k + 1:
        raise ConfigError(f"--k {options.k}: the shards hold {len(pictures)} pictures, fewer than neighbours")
    chooser = torch.Generator().manual_seed(options.seed)
    number_R = torch.randperm(len(pictures), generator=chooser)[: options.sample].sort().values
    return refer(pictures.take(number_R.numpy()), number_R, options.k)


def smoothed(signs: dict[str, Tensor], pictures: Pictures, k: int, advance: Advance) -> dict[str, Tensor]:
    """The signs, each of SMOOTHED by the median of a picture's k nearest ones; as they are for k = 0."""
    chosen = [name for name in SMOOTHED if name in signs]
    if not (k and chosen):
        return signs
    near_NK = fellows(pictures, k, advance)
    return signs | {name: signs[name][near_NK].median(dim=1).values for name in chosen}


def fellows(pictures: Pictures, k: int, advance: Advance) -> Tensor:
    """NK: the k pictures nearest to each, itself left out. Compares all with all, so its time grows as N squared."""
    if k >= len(pictures):
        raise ConfigError(f"--smooth {k}: the shards hold {len(pictures)} pictures, too few for as many neighbours")
    everything_ND = F.normalize(torch.cat([*pictures.blocks()]), dim=1)
    parts: list[Tensor] = []
    start = 0
    for ids_BL, _ in assign(pictures, everything_ND, k + 1, advance):
        near_BL = torch.from_numpy(ids_BL)
        itself_BL = near_BL == torch.arange(start, start + len(near_BL))[:, None]
        last_BL = itself_BL.int().argsort(dim=1, stable=True)  # of many copies a picture may not be its own nearest
        parts.append(near_BL.gather(1, last_BL)[:, :k])
        start += len(near_BL)
    return torch.cat(parts)


def unlikeness(pictures: Pictures) -> Tensor:
    """N: how unlike a picture and its first caption are, 0 to 2; that of a sample without caption is the median."""
    parts = []
    for (image_ND, table), text_ND in zip(pictures.parts, pictures.texts, strict=True):
        runs = [slice(run.start, run.stop) for run in cut(len(image_ND), BLOCK)]
        product_N = np.concatenate([
            np.einsum("nd,nd->n", image_ND[run].astype(np.float32), text_ND[run].astype(np.float32)) for run in runs
        ])  # fmt: skip
        said_N = pc.greater(pc.utf8_length(read_columns(table, ["caption"]).column(0)), 0).to_numpy()
        parts.append(np.where(said_N, 1.0 - product_N, np.nan).astype(np.float32))
    found_N = torch.from_numpy(np.concatenate(parts))
    return found_N.nan_to_num(float(found_N.nanmedian()))


def copies(data: Path, pictures: Pictures) -> Tensor:
    """N: the logarithm of how many samples have the same first caption and the same perceptual hash."""
    counts: Counter[tuple[str, int | None]] = Counter()
    seen: dict[str, tuple[str, int | None]] = {}
    for shard in open_shards(data):
        for found in in_blocks(partial(_told, shard), cut(len(shard), BLOCK), THREADS):
            for key, caption, code in found:
                seen[key] = caption, code
                counts[caption, code] += 1
    keys = [key for part in pictures.keys() for key in part]  # noqa: SIM118 - no mapping
    return torch.tensor([math.log(counts[seen[key]]) if seen[key][1] is not None else 0.0 for key in keys])


def _told(shard: Shard, row: int) -> tuple[str, str, int | None]:
    """(key, first caption, hash); no hash for a picture that cannot be read or has no structure."""
    sample = shard.read(row)
    try:
        return sample.key, own_caption(sample), perceptual_hash(sample.image)
    except BadSample:
        return sample.key, own_caption(sample), None


def isolation(signs: dict[str, Tensor], seed: int) -> Tensor:
    """N: how few cuts part a sample from the others by its signs (Liu, Ting and Zhou 2008, isolation forest)."""
    try:
        from sklearn.ensemble import IsolationForest  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError("--method isolation needs scikit-learn: pip install 'vlp[scan]'") from error
    table = torch.stack([*signs.values()], dim=1).numpy()
    return torch.from_numpy(-IsolationForest(random_state=seed).fit(table).score_samples(table)).float()


def spreads_of(signs: dict[str, Tensor], bulk: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every sign in deviations above its median, such that a tenth of a normal bulk is above 1.28.

    `bulk`: signs whose deviations and medians these are, if not their own: smoothing would make small ones of them.
    """
    scaled = {}
    for name, sign_N in signs.items():
        if name == "copies":  # most samples have none: no bulk to measure by
            scaled[name] = sign_N.exp() / COPIES
            continue
        own_N = (bulk or signs)[name]
        middle, upper = (own_N.kthvalue(max(1, round(share * len(own_N)))).values for share in (0.5, 0.9))
        scaled[name] = (sign_N - middle) / ((upper - middle) / 1.2816).clamp(min=SMALL)
    return scaled


def suspicion(signs: dict[str, Tensor]) -> Tensor:
    """N: for every sign minus the decimal logarithm of the share of samples that have it as strongly; their sum (after
    Fisher's method, although signs are not independent: a rank, no probability)."""
    total_N = torch.zeros(len(next(iter(signs.values()))))
    for sign_N in signs.values():
        _, where_N, count_U = sign_N.unique(return_inverse=True, return_counts=True)
        above_U = count_U.flip(0).cumsum(0).flip(0)
        total_N -= (above_U[where_N].float() / len(sign_N)).log10()
    return total_N


def _write_tables(out: Path, keys: Sequence[str], table: dict[str, Tensor], flagged_N: Tensor) -> None:
    columns: dict[str, Any] = {"key": pa.array(keys, pa.string()), "flagged": pa.array(flagged_N.numpy())}
    columns |= {name: pa.array(values.float().numpy()) for name, values in table.items()}
    write_atomic(out / SCORES, lambda stream: pq.write_table(pa.table(columns), stream))
    kept = "".join(f"{key}\n" for key, flagged in zip(keys, flagged_N.tolist(), strict=True) if not flagged)
    write_atomic(out / KEEP, lambda stream: stream.write(kept.encode()))
