"""One vector store in a process of its own, which builds itself and then searches as often as it is told.

python peer_search.py ENGINE FOLDER: the folder holds base.npy (ND, of length 1), group.npy (N, the payload field) and
queries.npy. Every line of the standard input, `MODE REPEATS`, is answered by a line of JSON: seconds on the wall and of
all processors per query, and the ids found. The modes are `plain` and `filtered` (group == 3), and for ours `exact`.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Search = Callable[[Any], list[int]]
LIMIT, GROUP, STEP = 10, 3, 1000
QUERIES = {"milvus": 10}
"""Of an engine that takes over a second for each, only the first ones are asked."""


def edge(base_ND: NDArray[np.float32], group_N: NDArray[np.int64], folder: Path) -> dict[str, Search]:
    """Ours, as the server opens it, but without the hop to the engine's own process."""
    from server.index import IndexInfo
    from server.index.edge import create_index
    from server.index.scan import ScanIndex

    index = create_index(folder, IndexInfo(dim=base_ND.shape[1], fields={"group": "integer"}))
    for at in range(0, len(base_ND), STEP):
        groups = group_N[at : at + STEP].tolist()
        index.add(range(at, at + len(groups)), base_ND[at : at + STEP], [{"group": group} for group in groups])
    index.finish()
    scan = ScanIndex(index)

    def ids(hits: Any) -> list[int]:
        return [hit.id for hit in hits]

    return {
        "plain": lambda query: ids(index.search(query, LIMIT)),
        "exact": lambda query: ids(scan.search(query, LIMIT, exact=True)),
        "filtered": lambda query: ids(index.search(query, LIMIT, {"group": GROUP})),
    }


def faiss(base_ND: NDArray[np.float32], group_N: NDArray[np.int64], folder: Path) -> dict[str, Search]:
    """IndexFlatIP, one thread."""
    import faiss as library

    library.omp_set_num_threads(1)
    index = library.IndexFlatIP(base_ND.shape[1])
    index.add(base_ND)
    return {"plain": lambda query: index.search(query[None], LIMIT)[1][0].tolist()}


def lancedb(base_ND: NDArray[np.float32], group_N: NDArray[np.int64], folder: Path) -> dict[str, Search]:
    """IVF_PQ with refinement, and a bitmap of the field that the filter is applied to before the search."""
    import lancedb as library
    import pyarrow as pa

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(base_ND.ravel()), base_ND.shape[1])
    rows = pa.table({"id": np.arange(len(base_ND)), "group": group_N, "vector": vectors})
    table = library.connect(str(folder)).create_table("base", rows)
    table.create_index(metric="dot", num_partitions=256, num_sub_vectors=64, index_type="IVF_PQ")
    table.create_scalar_index("group", index_type="BITMAP")

    def search(query: Any, where: str | None) -> list[int]:
        asked = table.search(query).distance_type("dot").limit(LIMIT).nprobes(48).refine_factor(10).select(["id"])
        found = (asked.where(where, prefilter=True) if where else asked).to_arrow()
        return [int(id) for id in found.column("id").to_pylist()]

    return {"plain": lambda query: search(query, None), "filtered": lambda query: search(query, f"`group` = {GROUP}")}


def milvus(base_ND: NDArray[np.float32], group_N: NDArray[np.int64], folder: Path) -> dict[str, Search]:
    """milvus-lite in one file, FLAT: its graph was not in use when it was asked for."""
    from pymilvus import DataType, MilvusClient

    client = MilvusClient(str(folder / "base.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("group", DataType.INT64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=base_ND.shape[1])
    params = client.prepare_index_params()
    params.add_index("vector", index_type="FLAT", metric_type="IP")
    client.create_collection("base", schema=schema, index_params=params)
    for at in range(0, len(base_ND), STEP):
        rows = zip(group_N[at : at + STEP].tolist(), base_ND[at : at + STEP].tolist(), strict=True)
        client.insert("base", [{"id": at + n, "group": g, "vector": v} for n, (g, v) in enumerate(rows)])
    client.load_collection("base")

    def search(query: Any, where: str) -> list[int]:
        (found,) = client.search("base", [query.tolist()], limit=LIMIT, filter=where)
        return [int(hit["id"]) for hit in found]

    return {"plain": lambda query: search(query, ""), "filtered": lambda query: search(query, f"group == {GROUP}")}


ENGINES: dict[str, Callable[..., dict[str, Search]]] = {
    "edge": edge, "faiss": faiss, "lancedb": lancedb, "milvus": milvus,
}  # fmt: skip


def cpu() -> float:
    """Seconds of all processors, in this process and those that it has started and waited for."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, whose))


def main(engine: str, folder: Path) -> None:
    base_ND, group_N, queries_QD = (np.load(folder / f"{name}.npy") for name in ("base", "group", "queries"))
    queries_QD = queries_QD[: QUERIES.get(engine)]
    own = folder / engine
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    began = time.perf_counter()
    modes = ENGINES[engine](base_ND, group_N, own)
    sys.stdout.write(json.dumps({"built": time.perf_counter() - began}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        mode, repeats = line.split()
        search = modes[mode]
        wall, busy = time.perf_counter(), cpu()
        for _ in range(int(repeats)):
            found = [search(query_D) for query_D in queries_QD]
        count = int(repeats) * len(queries_QD)
        told = {"wall": (time.perf_counter() - wall) / count, "cpu": (cpu() - busy) / count, "ids": found}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
