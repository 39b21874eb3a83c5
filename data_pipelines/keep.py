"""Keep-lists: which samples of a data set to use, by key."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.errors import PipelineError


def load_keys(path: Path) -> frozenset[str]:
    """Keys of a text file (one a line) or of a parquet file's column `key`."""
    try:
        if path.suffix == ".parquet":
            return frozenset(pq.read_table(path, columns=["key"])["key"].to_pylist())
        return frozenset(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError, pa.ArrowException) as error:
        raise PipelineError(f"{path}: no list of keys can be read from it ({error})") from error
