"""Clusters: a fixed point of k-means, the closest centres by brute force, bounds that hold, files that train."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from data_pipelines.errors import ConfigError
from data_pipelines.sidecar import CLUSTERS, load_sidecar
from vlp.bundle import load_bundle
from vlp.cli import cli
from vlp.curate import cluster as curation
from vlp.curate import pictures as pictures_module
from vlp.curate.cluster import Options, assign, bounded, closest_centres, cluster, fit
from vlp.curate.pictures import Pictures, embed_pictures
from vlp.recipe import Recipe, validate
from vlp.run import prepare

CPU = torch.device("cpu")


def stored(rows: torch.Tensor, folder: Path, parts: int = 3) -> Pictures:
    """Embeddings as they lie on disk, in parts of unequal size."""
    folder.mkdir(exist_ok=True)
    cuts = np.linspace(0, 1, parts + 1) ** 2 * len(rows)
    found = []
    for number, (first, last) in enumerate(itertools.pairwise(cuts.astype(int).tolist())):
        path = folder / f"{number}.parquet"
        pq.write_table(pa.table({"image_path": [f"{row:05}" for row in range(first, last)]}), path)
        found.append((rows[first:last].numpy(), path))
    return Pictures(tuple(found), 0, {"model": "none"})


def blobs(count: int, per: int, width: int = 8, noise: float = 0.1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(count, width, generator=generator), dim=1).repeat(per, 1)
    return F.normalize(centres + noise * torch.randn(centres.shape, generator=generator), dim=1)


def test_three_groups_are_three_clusters(tmp_path: Path) -> None:
    """Rows 0, 3, 6 ... lie around one direction, 1, 4, 7 ... around another: each residue class is one cluster."""
    result = cluster(stored(blobs(3, 20), tmp_path), tmp_path / "c.parquet", Options(k=3), CPU)
    table = load_sidecar(tmp_path / "c.parquet", CLUSTERS)
    found = [int(row[0]) for row in table.find([f"{row:05}" for row in range(60)])]
    assert [set(found[start::3]) for start in range(3)] == [{found[start]} for start in range(3)]
    assert len(set(found)) == 3
    assert result["sizes"] == {"min": 20, "median": 20.0, "max": 20}
    assert (table.clusters, table.info["kind"], table.info["model"]) == (3, "cluster", "none")


def test_the_result_is_a_fixed_point_of_k_means(tmp_path: Path) -> None:
    """By loops: every picture is at its nearest centre, every centre is the direction of the sum of its pictures."""
    rows = F.normalize(torch.randn(211, 9, generator=torch.Generator().manual_seed(1)), dim=1)
    pictures = stored(rows, tmp_path)
    centres, iterations = fit(pictures, Options(k=7, iterations=200), CPU)
    assert 1 < iterations < 200
    ids = np.concatenate([found for found, _ in assign(pictures, centres, 1)])[:, 0]
    for row, own in enumerate(ids.tolist()):
        cosines = [float(rows[row] @ centre) for centre in centres]
        assert cosines[own] == pytest.approx(max(cosines), abs=1e-6)
    for number in range(7):
        members = [rows[row].double() for row in range(211) if ids[row] == number]
        torch.testing.assert_close(centres[number].double(), F.normalize(sum(members), dim=0), atol=1e-6, rtol=0)  # type: ignore[arg-type]


def test_blocks_and_tiles_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = stored(blobs(6, 31, noise=0.3), tmp_path)
    whole, _ = fit(pictures, Options(k=11), CPU)
    labels = [np.concatenate(part) for part in zip(*assign(pictures, whole, 4), strict=True)]
    monkeypatch.setattr(pictures_module, "BLOCK", 17)
    monkeypatch.setattr(curation, "BLOCK", 17)
    monkeypatch.setattr(curation, "TILE", 3)
    parts, _ = fit(pictures, Options(k=11), CPU)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    again = [np.concatenate(part) for part in zip(*assign(pictures, whole, 4), strict=True)]
    assert np.array_equal(labels[0], again[0])
    np.testing.assert_allclose(labels[1], again[1], atol=1e-6)


@pytest.mark.parametrize("tile", [2, 5, 100])
def test_closest_centres_are_those_of_a_full_sort(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    rows, centres = torch.randn(13, 6, generator=generator), F.normalize(torch.randn(9, 6, generator=generator), dim=1)
    scores, ids = closest_centres(rows, centres, 4)
    full = F.normalize(rows, dim=1) @ centres.T
    assert torch.equal(ids, full.argsort(dim=1, descending=True)[:, :4])
    torch.testing.assert_close(scores, full.gather(1, ids))


def test_a_bound_holds_and_nobody_could_swap(tmp_path: Path) -> None:
    """Stable: whatever centre a picture is nearer to than to its own is full of pictures nearer still."""
    rows = F.normalize(torch.randn(100, 5, generator=torch.Generator().manual_seed(2)) + torch.ones(5), dim=1)
    pictures = stored(rows, tmp_path)
    centres, _ = fit(pictures, Options(k=9), CPU)
    plain = np.concatenate([ids for ids, _ in assign(pictures, centres, 1)])[:, 0]
    assert np.bincount(plain, minlength=9).max() > 14
    found = np.concatenate([ids for ids, _ in bounded(pictures, centres, 3, 14)])
    own = found[:, 0]
    assert np.bincount(own, minlength=9).max() == 14
    cosines = (rows @ centres.T).numpy()
    for row, other in itertools.product(range(100), range(9)):
        if cosines[row, other] > cosines[row, own[row]] + 1e-6:
            members = np.flatnonzero(own == other)
            assert len(members) == 14
            assert cosines[members, other].min() >= cosines[row, other] - 1e-6
    for row in range(100):
        others = [number for number in np.argsort(-cosines[row]).tolist() if number != own[row]]
        assert found[row, 1:].tolist() == others[:2], "the further labels are the closest others"


def test_pictures_that_all_candidates_refuse_still_find_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 40 pictures are nearest to the same two of eight centres and try no third in order: still five each."""
    monkeypatch.setattr(curation, "CANDIDATES", 2)
    rows = F.normalize(torch.tensor([1.0, 0.5]) + 0.01 * blobs(4, 10, width=2), dim=1)
    angles = torch.linspace(0.4, 3.0, 8)
    centres = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = list(bounded(stored(rows, tmp_path), centres, 1, 5))
    ids, cosines = (np.concatenate([part[side] for part in found]) for side in (0, 1))
    assert np.bincount(ids[:, 0], minlength=8).tolist() == [5] * 8
    expected = (rows @ centres.T).numpy()[np.arange(40), ids[:, 0]]
    np.testing.assert_allclose(cosines[:, 0], expected, atol=1e-6)


def test_copies_of_few_pictures_leave_clusters_empty_and_say_so(tmp_path: Path) -> None:
    rows = blobs(3, 1).repeat(10, 1)
    result = cluster(stored(rows, tmp_path), tmp_path / "c.parquet", Options(k=5, closest=2), CPU)
    assert result["empty"] == 2
    assert result["cosine"] == pytest.approx(1, abs=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    pictures = stored(F.normalize(torch.randn(90, 6, generator=torch.Generator().manual_seed(3)), dim=1), tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cluster(pictures, tmp_path / f"{name}.parquet", Options(k=8, closest=2, seed=seed, fit_rows=50), CPU)
    first, second, third = ((tmp_path / f"{name}.parquet").read_bytes() for name in "abc")
    assert first == second != third


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(k=1), "--k 1: must be 2 to 60"),
        (Options(k=61), "--k 61"),
        (Options(k=4, closest=5), "--closest 5"),
        (Options(k=4, capacity=0.9), "--capacity 0.9"),
        (Options(k=4, fit_rows=3), "--fit-rows 3"),
        (Options(k=4, iterations=0), "--iterations 0"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster(stored(blobs(3, 20), tmp_path), tmp_path / "c.parquet", options, CPU)


def test_embeddings_are_kept_and_equal_keys_refused(trained: Path, starter_shards: Path, tmp_path: Path) -> None:
    bundle, data = load_bundle(trained), starter_shards / "unseen_concepts"
    steps: list[int] = []
    first = embed_pictures(trained, bundle, [data], tmp_path / "store", steps.append)
    assert sum(steps) == len(first) > 100
    (array,) = (tmp_path / "store").rglob("img_emb_*.npy")
    before = array.stat().st_mtime_ns
    again = embed_pictures(trained, bundle, [data], tmp_path / "store")
    assert array.stat().st_mtime_ns == before, "nothing is computed twice"
    assert not list((tmp_path / "store").rglob("text_emb*")), "nobody asked for the captions"
    assert torch.equal(torch.cat(list(first.blocks())), torch.cat(list(again.blocks())))
    with pytest.raises(ConfigError, match="occurs twice"):
        embed_pictures(trained, bundle, [data, data], tmp_path / "store")


def test_clusters_of_a_run_train_the_next(
    trained: Path, starter_shards: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    out, data = tmp_path / "clusters.parquet", starter_shards / "val"
    arguments = [
        "curate",
        "cluster",
        str(trained),
        "--data",
        str(data),
        "--k",
        "12",
        "--closest",
        "3",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(cli, [*arguments, "--embeddings", str(tmp_path / "store"), "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["clusters"] == 12
    settings = micro_recipe().model_dump()
    settings["data"] |= {"clusters": out, "sampler": {"name": "label_paired", "by": "clusters"}}
    run = prepare(validate(settings), tmp_path / "run")
    batch = next(iter(run.loader))
    found = batch.require("cluster_ids", "test")
    assert found.shape == (len(batch.keys), 3)
    assert (found >= 0).all(), "every picture has its clusters"
    assert all(set(pair[0].tolist()) & set(pair[1].tolist()) for pair in found.view(-1, 2, 3))


def test_an_objective_learns_how_many_classes_and_clusters_there_are(
    tmp_path: Path, micro_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlp.objectives import base, clip

    seen: list[base.Dims] = []

    def build(config: clip.Config, dims: base.Dims) -> clip.Clip:
        seen.append(dims)
        return clip.Clip(config)

    monkeypatch.setattr(clip, "build", build)
    settings = micro_recipe().model_dump()
    keys = [f"{number:08}" for number in range(50)]
    pq.write_table(pa.table({"key": keys, CLUSTERS: [[number % 6] for number in range(50)]}), tmp_path / "c.parquet")
    settings["data"] |= {"clusters": tmp_path / "c.parquet", "labels": {"names": ["a", "b", "c", "d"]}}
    prepare(validate(settings), tmp_path / "run")
    prepare(micro_recipe(), tmp_path / "plain")
    assert [(dims.classes, dims.clusters) for dims in seen] == [(4, 6), (0, 0)]
