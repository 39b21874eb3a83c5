"""Figures of sharding and verification: whole commands, by the clock on the wall, taking turns on the same cores."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bench_kit import ROOT, Row, compare, missing, take_turns, wall
from PIL import Image, __version__

IMG2DATASET = Path(sys.prefix) / "peers/img2dataset/bin/img2dataset"
PER_SHARD = 500
WORKERS = 2


def call(*words: str | Path) -> bytes:
    """Output of a command. Raises CalledProcessError."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, env=environment, check=True, capture_output=True)
    return done.stdout


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a line per request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a loopback server of a folder."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def by_us(folder: Path, out: Path) -> None:
    """Shards of a folder at 256 pixels by our command."""
    shutil.rmtree(out, ignore_errors=True)
    call(
        sys.executable, "-m", "vlp", "shard", folder, "--out", out, "--image-size", "256",
        "--resize-mode", "keep_ratio", "--encode-format", "jpg", "--encode-quality", "95",
        "--samples-per-shard", str(PER_SHARD), "--workers", str(WORKERS),
    )  # fmt: skip


def by_script(folder: Path, out: Path) -> None:
    """The same by forty lines of Pillow and tarfile."""
    shutil.rmtree(out, ignore_errors=True)
    call(sys.executable, Path(__file__).with_name("peer_tarfile.py"), folder, out, str(PER_SHARD), str(WORKERS))


def by_img2dataset(table: Path, out: Path) -> None:
    """The same by img2dataset from a table of URLs."""
    shutil.rmtree(out, ignore_errors=True)
    call(
        IMG2DATASET, "--url_list", table, "--input_format", "csv", "--url_col", "url", "--caption_col", "caption",
        "--output_folder", out, "--output_format", "webdataset", "--image_size", "256", "--resize_mode", "keep_ratio",
        "--encode_quality", "95", "--number_sample_per_shard", str(PER_SHARD), "--processes_count", str(WORKERS),
        "--thread_count", "16", "--enable_wandb", "False", "--disallowed_header_directives", "[]",
    )  # fmt: skip


def contents(out: Path) -> list[tuple[tuple[int, int], str]]:
    """(width, height) and caption of every sample, in the order of the captions."""
    found: dict[str, list[bytes]] = {}
    sizes: list[tuple[tuple[int, int], str]] = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                handle = tar.extractfile(member)
                assert handle is not None
                if extension == "jpg":
                    found[f"{path}/{stem}"] = [str(Image.open(handle).size).encode()]
                elif extension == "txt":
                    width, height = found[f"{path}/{stem}"][0].decode().strip("()").split(",")
                    sizes.append(((int(width), int(height)), handle.read().decode().strip()))
    return sorted(sizes, key=lambda pair: pair[1])


def url_table(folder: Path, address: str, path: Path) -> Path:
    """A csv of the folder's pictures as URLs, with their captions."""
    quoted = [(p.name, p.with_suffix(".txt").read_text().replace('"', '""')) for p in sorted(folder.glob("*.jpg"))]
    path.write_text("url,caption\n" + "".join(f'{address}/{name},"{text}"\n' for name, text in quoted))
    return path


def shard_rows(folder: Path, scratch: Path, goal: str, rounds: int) -> list[Row]:
    """Two rows: our sharding of a folder against img2dataset and against the script."""
    scratch.mkdir(parents=True, exist_ok=True)
    with served(folder) as address:
        table = url_table(folder, address, scratch / "urls.csv")
        runs: dict[str, Callable[[], None]] = {
            "ours": lambda: by_us(folder, scratch / "ours"),
            "script": lambda: by_script(folder, scratch / "script"),
        }
        if IMG2DATASET.exists():
            runs["img2dataset"] = lambda: by_img2dataset(table, scratch / "img2dataset")
        taken = take_turns({name: wall(run) for name, run in runs.items()}, rounds)
    wanted = contents(scratch / "ours")
    complete = len(wanted) == len(list(folder.glob("*.jpg")))
    note = f"{len(wanted)} pictures, {len(wanted) / min(taken['ours']):.0f}/s, start of the command included"
    rows = []
    for name, peer in (
        ("img2dataset", ("img2dataset", "1.47.0")),
        ("script", ("PIL + tarfile, 2 processes", __version__)),
    ):
        if name in taken:
            equal = complete and contents(scratch / name) == wanted
            rows.append(compare(f"shard_{name}", peer, taken["ours"], taken[name], goal, equal, note))
        else:
            rows.append(missing(f"shard_{name}", peer, goal, "img2dataset is not installed: make bench-data does it"))
    return rows


def verify_row(name: str, shards: Path, goal: str, rounds: int) -> Row:
    """Our verification against `sha256sum` and `tar -t` of the same files."""
    peer = ("sha256sum + tar -t", "coreutils, GNU tar")
    tars = sorted(shards.glob("*.tar"))

    def by_tools() -> None:
        call("sha256sum", *tars)
        for path in tars:
            call("tar", "-tf", path)

    command: Sequence[str | Path] = (sys.executable, "-m", "vlp", "shard", "verify", shards, "--json")
    try:
        found = json.loads(call(*command).splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return missing(name, peer, goal, f"vlp shard verify failed: {error.stderr.decode().strip().splitlines()[-1:]}")
    listed = b"".join(call("tar", "-tf", path) for path in tars).splitlines()
    equal = found["faults"] == [] and 3 * found["samples"] == len(listed)
    taken = take_turns({"ours": wall(lambda: call(*command)), "peer": wall(by_tools)}, rounds)
    size = sum(path.stat().st_size for path in tars) / 1e6
    note = f"{size:,.0f} MB in {min(taken['ours']):.2f} s, start of the command included"
    return compare(name, peer, taken["ours"], taken["peer"], goal, equal, note)
