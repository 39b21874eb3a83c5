"""The main job, end to end, on real data: every step is the command a user would type, and is printed as such."""

import base64
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipelines.errors import PipelineError
from data_pipelines.reader import open_shards
from vlp.report import write_report
from vlp.runlog import RunLog

TESTS = ("unseen_vendor", "unseen_concepts")
SHOWN = ("image_to_text/R@1", "image_to_text/R@10", "text_to_image/R@1", "text_to_image/R@10")
LABELS = ("fruit", "animal", "vehicle", "building", "face", "tool")
QUESTIONS = ("red apple", "a dog", "sailing boat")

Say = Callable[[str], None]


def vlp(arguments: Sequence[str], say: Say) -> dict[str, Any]:
    """Run one `vlp` command with --json and return its object. Raises PipelineError with its message."""
    say("$ vlp " + " ".join(arguments))
    done = subprocess.run(
        [sys.executable, "-m", "vlp", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise PipelineError(
            f"`vlp {' '.join(arguments)}` failed with exit code {done.returncode}; see its message above"
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run_demo(folder: Path, shards: Path, recipe: str, overrides: Sequence[str], say: Say) -> dict[str, Any]:
    """Shards, training, test figures, report, export, index, server and its answers. Returns summary.json's content."""
    vlp(["shard", "starter", "--out", str(shards), "--overwrite"], say)  # nothing is done where they are up to date
    data = [f"data.train={shards / 'train'}", f"evals.0.data={shards / 'val'}"]
    vlp(["train", recipe, *data, *overrides, "--run-dir", str(folder)], say)
    metrics: dict[str, float] = {}
    for name in TESTS:
        found = vlp(["eval", str(folder), "--data", str(shards / name)], say)["metrics"]
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    vlp(["export", str(folder), "--format", "open_clip", "--out", str(folder / "open_clip")], say)
    vlp(
        ["embed", str(folder), "--data", str(shards / TESTS[0]), "--out", str(folder / "embeddings"), "--overwrite"],
        say,
    )
    vlp(["index", "build", str(folder / "embeddings"), "--out", str(folder / "index")], say)
    runlog = RunLog(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary["metrics"] |= metrics
    summary["commands"] = [
        f"vlp serve {folder} --index {folder / 'index'}",
        f"vlp train {recipe} {data[0]} {data[1]} run.seed=1",
    ]
    runlog.write("summary.json", summary)
    with server(folder, say) as url:
        summary["answers"] = ask(url, shards / TESTS[0], say)
    runlog.write("summary.json", summary)
    write_report(folder, shards / TESTS[0])
    return dict(summary)


@contextmanager
def server(folder: Path, say: Say) -> Iterator[str]:
    """A real `vlp serve` on a free port of this machine; yields its address, ends it afterwards."""
    arguments = ["serve", str(folder), "--index", str(folder / "index"), "--port", "0", "--json"]
    say("$ vlp " + " ".join(arguments[:-1]))
    process = subprocess.Popen([sys.executable, "-m", "vlp", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise PipelineError(f"the server did not start (exit code {process.wait()}); see its message above")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(url: str, data: Path, say: Say) -> dict[str, Any]:
    """Embed a picture and a text, classify the picture, search by text: real requests, answers as they came."""
    sample = open_shards(data)[0].read(0)
    picture = "data:image/*;base64," + base64.b64encode(sample.image).decode()
    embedded = _post(url, "/v1/embeddings", {"input": [f"a {sample.captions[0]}", picture]})
    first, second = (item["embedding"] for item in embedded["data"])
    cosine = sum(a * b for a, b in zip(first, second, strict=True))
    say(f"POST /v1/embeddings  text and picture of {sample.captions[0]!r}: width {len(first)}, cosine {cosine:.3f}")
    request = {"image": picture, "labels": [sample.captions[0], *LABELS], "top_k": 3}
    predictions = _post(url, "/v1/classify", request)["data"][0]["predictions"]
    best = ", ".join(f"{item['label']} {item['probability']:.2f}" for item in predictions)
    say(f"POST /v1/classify    the same picture: {best}")
    found = {}
    for text in QUESTIONS:
        hits = _post(url, "/v1/search", {"text": text, "limit": 4})["hits"]
        found[text] = [hit["caption"] for hit in hits]
        say(f"POST /v1/search      {text!r}: " + ", ".join(f"{hit['caption']} {hit['score']:.2f}" for hit in hits))
    return {"cosine": cosine, "classify": predictions, "search": found}


def _post(url: str, route: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
