"""The script that people write instead of a sharding tool: pictures of a folder at 256 pixels into tars.

python peer_tarfile.py FOLDER OUT PER_SHARD PROCESSES
"""

import io
import sys
import tarfile
from multiprocessing import Pool
from pathlib import Path

from PIL import Image


def resized(path: Path) -> tuple[bytes, bytes]:
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), path.with_suffix(".txt").read_bytes()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def main(folder: str, out: str, per_shard: str, processes: str) -> None:
    paths = sorted(Path(folder).glob("*.jpg"))
    Path(out).mkdir(parents=True)
    with Pool(int(processes)) as pool:
        for first in range(0, len(paths), int(per_shard)):
            part = paths[first : first + int(per_shard)]
            with tarfile.open(f"{out}/{first // int(per_shard):05d}.tar", "w") as tar:
                for path, (picture, text) in zip(part, pool.imap(resized, part, chunksize=16), strict=True):
                    add(tar, f"{path.stem}.jpg", picture)
                    add(tar, f"{path.stem}.txt", text)


if __name__ == "__main__":
    main(*sys.argv[1:])
