"""The report: self-contained, with pictures that hold something."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp.report import write_report
from vlp.testing import picture


def test_a_data_set_without_captions_gives_a_report_without_sheets(trained: Path, tmp_path: Path) -> None:
    records = [Record(picture(n), (), "test", str(n), labels=("a",)) for n in range(150)]
    write_shards(records, tmp_path / "bare", WriteOptions(), kind="test", licences={}, progress=False)
    shutil.copytree(trained, tmp_path / "run")
    page = write_report(tmp_path / "run", tmp_path / "bare").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2


def test_report_is_one_file_with_pictures_beside_it(trained: Path) -> None:
    page = write_report(trained, commands=["vlp serve x"]).read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert page.count("data:image/png;base64,") == 4
    assert "vlp serve x" in page
    places = [page.index(f"val/image_to_text/R@{k}<") for k in (1, 5, 10)]
    assert places == sorted(places)
    for name in ("curves", "evaluation", "text_queries", "picture_queries"):
        image = Image.open(io.BytesIO((trained / f"{name}.png").read_bytes()))
        pixels = np.asarray(image.convert("L"))
        assert min(image.size) > 300
        assert pixels.std() > 10, f"{name} is nearly empty"
