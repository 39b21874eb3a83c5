"""Key lists beside the shards: which samples to use, and how much each counts."""

import math
from pathlib import Path

from data_pipelines.errors import ConfigError
from data_pipelines.parquet import read_columns


def load_keys(path: Path) -> frozenset[str]:
    """Keys of a keep-list: a parquet with a column `key`, or a text file with one key per line. Raises ConfigError."""
    if path.suffix == ".parquet":
        return frozenset(map(str, _columns(path, ("key",))[0]))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a list of keys ({error})") from error
    return frozenset(stripped for line in lines if (stripped := line.strip()))


def load_weights(path: Path) -> dict[str, float]:
    """Key -> weight of a parquet with the columns `key` and `weight`. Raises ConfigError."""
    keys, weights = _columns(path, ("key", "weight"))
    bad = next((w for w in weights if not isinstance(w, int | float) or not math.isfinite(w) or w < 0), None)
    if bad is not None:
        raise ConfigError(f"{path}: weight {bad!r} is no number from 0 on")
    return {str(key): float(str(weight)) for key, weight in zip(keys, weights, strict=True)}


def _columns(path: Path, names: tuple[str, ...]) -> list[list[object]]:
    try:
        table = read_columns(path, names)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read as parquet ({error})") from error
    if missing := set(names) - set(table.column_names):
        raise ConfigError(f"{path}: lacks the column(s) {', '.join(sorted(missing))}; it has {table.column_names}")
    return [table.column(name).to_pylist() for name in names]
