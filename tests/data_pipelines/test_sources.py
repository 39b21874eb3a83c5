"""Which kind a path is taken for, and what every source module offers."""

import inspect
from pathlib import Path

import pytest

from data_pipelines import sources
from data_pipelines.errors import PipelineError
from data_pipelines.testing import draw

CASES = {
    "table": [["t.csv"], ["t.TSV.gz"], ["urls.txt"], ["t.jsonl.gz"], ["t.parquet"], ["set/a.parquet", "set/b.parquet"],
              ["set/metadata.csv", "set/1.png"], ["rows.json=[]"], ["rows.json= \n[{}]"], ["t.json.gz"]],
    "coco": [["a.json={"], ["a.json=\ufeff {\"images\": []}"]],
    "tars": [["a.tar"], ["set/00000.tar", "set/00000.parquet", "set/sizes.json"], ["set/train/0.tar", "set/val/0.tar"]],
    "idx": [["train-images-idx3-ubyte"], ["t10k-images-idx3-ubyte.gz"], ["set/train-images-idx3-ubyte.gz"]],
    "folder": [["set/a.png", "set/a.txt"], ["set/cats/a.png", "set/dogs/b.png"], ["set/a.jpg", "set/a.json={}"],
               ["set/readme.txt", "set/a.png", "set/log.csv"], ["set/.hidden.csv", "set/a.png"]],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "files"), [(kind, files) for kind, cases in CASES.items() for files in cases])
def test_kinds_are_recognised(tmp_path: Path, kind: str, files: list[str]) -> None:
    for file in files:
        name, _, content = file.partition("=")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if content else draw())
    name = files[0].partition("=")[0]
    assert sources.resolve(str(tmp_path / "set" if name.startswith("set/") else tmp_path / name)).name == kind


def test_what_is_recognised_as_nothing_lists_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(PipelineError, match="no kind reads such a file; kinds are coco, folder, idx, table, tars"):
        sources.resolve(str(tmp_path / "a.docx"))
    with pytest.raises(PipelineError, match=r"nor tables; other kinds are read from a local disk|no such path"):
        sources.resolve("memory://empty-place/")


@pytest.mark.parametrize("name", sorted(sources.names()))
def test_every_source_keeps_the_contract(name: str) -> None:
    module = sources.names()[name]
    assert module.__doc__
    assert inspect.isgeneratorfunction(module.iter_records)
    fields = module.Config.model_fields
    assert ("path" in fields) != hasattr(module, "PACKAGES"), "files of the user's, or a data set by name"
    assert hasattr(module, "fingerprint") == ("path" in fields), "a changed file must not pass for the old one"
    assert name == module.__name__.rpartition(".")[2].replace("_", "-")
