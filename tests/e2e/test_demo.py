"""`vlp demo` from shards to served answers, with a training of a few steps."""

import json
import re
import subprocess
import sys
from pathlib import Path


def test_the_demo_runs_through_and_says_how_to_go_on(starter_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [
        sys.executable, "-m", "vlp", "demo", "--run-dir", str(folder), "--shards", str(starter_shards), "--json",
        "model.name=starter-micro", "run.steps=3", "data.batch_size=64", "data.image.size=32",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(done.stdout.strip().splitlines()[-1]) == summary
    for test, captions in (("unseen_vendor", 784), ("unseen_concepts", 199)):
        for way in ("image_to_text", "text_to_image"):
            assert 0 <= summary["metrics"][f"{test}/{way}/R@1"] <= summary["metrics"][f"{test}/{way}/R@10"] <= 1
        assert summary["metrics"][f"{test}/captions"] == captions
    assert summary["train_seconds"] > 0
    assert [line.split()[:2] for line in summary["commands"]] == [["vlp", "serve"], ["vlp", "train"]]
    assert set(summary["answers"]) == {"cosine", "classify", "search"}
    assert len(summary["answers"]["search"]["red apple"]) == 4
    assert {"report.html", "curves.png", "text_queries.png", "picture_queries.png", "open_clip", "index"} <= {
        path.name for path in folder.iterdir()
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "unseen_vendor/image_to_text/R@1" in page
    assert all(re.search(re.escape(line), page) for line in summary["commands"])
