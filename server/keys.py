"""The file of API keys: names, hashes and scopes. A key itself is shown once, when it is made."""

import json
import os
import secrets
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_pipelines.config import explain
from data_pipelines.errors import PipelineError
from data_pipelines.files import write_atomic
from server.settings import Key, Rate, Scope, hash_key

ENVIRONMENT = "VLP_API_KEYS"
KEYS = TypeAdapter(tuple[Key, ...])


def read_keys(path: Path | None) -> tuple[Key, ...]:
    """Keys of the file and of the environment, where they stand in clear and may do everything.

    Raises PipelineError for a file that cannot be read or names one key twice.
    """
    given = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",")]
    plain = tuple(
        Key(name=f"environment-{number}", sha256=hash_key(key), scope="admin")
        for number, key in enumerate(filter(None, given), 1)
    )
    return plain + (read_file(path) if path else ())


def read_file(path: Path) -> tuple[Key, ...]:
    """Keys of a file. Raises PipelineError."""
    try:
        keys = KEYS.validate_json(path.read_bytes())
    except OSError as error:
        raise PipelineError(f"--keys {path}: {error.strerror}") from error
    except ValidationError as error:
        raise PipelineError(f"--keys {path}: {explain(error)}") from error
    names = [key.name for key in keys]
    if len({*names}) < len(names):
        raise PipelineError(f"--keys {path}: a name occurs twice")
    return keys


def add_key(path: Path, name: str, scope: Scope, rate: Rate | None) -> str:
    """Put a new key into the file, which need not exist, and return it: 256 random bits."""
    known = read_file(path) if path.exists() else ()
    if any(key.name == name for key in known):
        raise PipelineError(f"{path} has a key named {name!r}: choose another name, or remove that one first")
    value = f"vlp_{secrets.token_urlsafe(32)}"
    _write(path, (*known, Key(name=name, sha256=hash_key(value), scope=scope, rate=rate)))
    return value


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file. Raises PipelineError when it is not there."""
    known = read_file(path)
    if all(key.name != name for key in known):
        raise PipelineError(f"{path} has no key named {name!r}")
    _write(path, tuple(key for key in known if key.name != name))


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    content = json.dumps(KEYS.dump_python(keys, mode="json", exclude_none=True), indent=2).encode()
    write_atomic(path, lambda stream: stream.write(content))
    path.chmod(0o600)
