"""From what the stages of bench_detection printed to the rows of its table: means, spreads, goals."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from backdoor_rows import Figure, points, shares
from stages import Results

GAIN = 0.05
"""Points that regions and the ensemble have to gain."""
NOVEL = 0.25
"""AP50 of categories without boxes in training."""
STEADIER = 0.3
"""Share of the change under a shift that has to go."""


Column = Sequence[Mapping[str, float]]
"""What one stage printed, seed by seed."""
Line = tuple[str, str, str, bool, str]
"""Name, value, goal, whether it is met, note."""


def rows_of(bench: str, seeds: int, results: Results) -> list[Figure]:
    """The rows of which all stages of at least one seed are known; a note says how many seeds are."""
    makers: list[tuple[tuple[str, ...], Callable[..., Line]]] = [
        (("longer/read", "regions/read"), _regions),
        (("fixed/tuned/read", "shifted/tuned/read"), _shifted),
        (("regions/tuned/read",), _ensemble),
        (("longer/tuned/read", "regions/tuned/read"), _oriented),
        (("regions/tuned/read",), _novel),
    ]
    rows = []
    for stages, make in makers:
        known = [n for n in range(seeds) if all(f"{bench}/{n}/{stage}" in results for stage in stages)]
        if known:
            columns = [[results[f"{bench}/{n}/{stage}"] for n in known] for stage in stages]
            count = "" if len(known) == seeds else f"{len(known)} of {seeds} seeds; "
            name, value, goal, met, note = make(*columns)
            rows.append(Figure(f"{bench}: {name}", value, goal, met, count + note))
    return rows


def _of(column: Column, key: str) -> list[float]:
    return [float(row[key]) for row in column]


def _over(more: Sequence[float], less: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(more, less, strict=True)]


def _regions(longer: Column, regions: Column) -> Line:
    """The box head after pretraining by captions, and regions pooled from the tower of the image-level model."""
    own, pooled = _of(regions, "region_top1"), _of(longer, "region_top1_image")
    gain = _over(own, pooled)
    note = f"{shares(own)} of ground-truth boxes named, from the image-level tower {shares(pooled)}"
    name = "regions named after pretraining by captions alone, over the image-level tower"
    return name, points(gain), ">= 5 points", min(gain) >= GAIN, note


def _shifted(fixed: Column, shifted: Column) -> Line:
    before, after = _of(fixed, "shift_sensitivity"), _of(shifted, "shift_sensitivity")
    drop = [1.0 - b / a for a, b in zip(before, after, strict=True)]
    gain = _over(_of(shifted, "AP"), _of(fixed, "AP"))
    note = f"1 - cos {statistics.fmean(before):.3f} -> {statistics.fmean(after):.3f}; AP {points(gain)} higher"
    met = min(drop) >= STEADIER and statistics.fmean(gain) >= 0
    name = "change of features under a shift that shifted windows take away"
    return name, shares(drop), ">= 30 %, AP not lower", met, note


def _ensemble(found: Column) -> Line:
    both, alone = _of(found, "AP50_novel"), _of(found, "alone/AP50_novel")
    gain = _over(both, alone)
    base = _over(_of(found, "AP50_base"), _of(found, "alone/AP50_base"))
    note = f"{shares(alone)} -> {shares(both)}; base categories {points(base)} higher"
    name = "AP50 of novel categories, geometric ensemble over the detector alone"
    return name, points(gain), ">= 5 points", min(gain) >= GAIN, note


def _oriented(longer: Column, regions: Column) -> Line:
    gain = _over(_of(regions, "AP50_novel"), _of(longer, "AP50_novel"))
    won = sum(value > 0 for value in gain)
    base = _over(_of(regions, "AP50_base"), _of(longer, "AP50_base"))
    note = f"{points(gain)} AP50 of novel categories higher; base {points(base)}"
    name = "seeds in which pretraining by regions is better than by pictures at equal steps"
    return name, f"{won} of {len(gain)}", "3 of 3", won == len(gain) == 3, note


def _novel(found: Column) -> Line:
    novel, base = _of(found, "AP50_novel"), _of(found, "AP50_base")
    note = f"unseen cut-outs and backgrounds; base categories {shares(base)}, AP {shares(_of(found, 'AP'))}"
    return "AP50 of novel categories", shares(novel), ">= 25 %", min(novel) >= NOVEL, note
