"""Evaluation on real shards: every task, every number of ranks, the loop and the command, and what is refused."""

import io
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from data_pipelines.errors import ConfigError, MissingField, PipelineError
from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp import evals
from vlp.bundle import load_bundle, save_bundle
from vlp.cli import cli
from vlp.evals._encode import Encoded, Encoder
from vlp.recipe import Recipe, validate
from vlp.runlog import RunLog
from vlp.testing import WORDS, micro_bundle, picture, run_ranks
from vlp.train import train

TASKS = evals.tasks()


def options_of(task: str, train: Path | str) -> dict[str, Any]:
    """The options without which a task cannot run, and few steps."""
    few = {"linear-probe": {"iterations": 10, "penalties": [1.0, 0.01]}}
    if task == "backdoor":  # the control has a folder of its own beside the shards
        return {"attacks": [{"name": "badnet"}], "target": "label 1", "control": str(Path(train).parent / "control")}
    return ({"train": str(train)} if "train" in evals.load(task).Config.model_fields else {}) | few.get(task, {})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/: 150 and 77 pictures in shards of 40; uneven shares for 2 and 4 ranks. One picture is damaged.

    Every seventh has no caption, the others one or two; all have one or two of five labels,
    and a box of the first.
    """
    root = tmp_path_factory.mktemp("shards")
    for name, count in (("train", 150), ("test", 77)):
        records = [
            Record(
                picture(n),
                () if n % 7 == 6 else (WORDS[n % 7], f"second {n % 4}")[: 1 + n % 2],
                "test",
                f"{name}-{n}",
                labels=tuple(dict.fromkeys((f"label {n % 5}", f"label {n % 3}"))),
                boxes=((0.1, 0.2, 0.6, 0.9, f"label {n % 5}"),),
            )
            for n in range(count)
        ]
        write_shards(records, root / name, WriteOptions(samples_per_shard=40), kind="test", licences={}, progress=False)
    save_bundle(micro_bundle(2), root / "control")
    tar = root / "test" / "00001.tar"
    with tarfile.open(tar) as archive:
        start = next(member.offset_data for member in archive if member.name.endswith(".jpg"))
    content = bytearray(tar.read_bytes())
    content[start : start + 20] = bytes(20)
    tar.write_bytes(content)
    return root


@pytest.mark.parametrize("task", TASKS)
def test_every_task_keeps_the_contract(task: str, shards: Path) -> None:
    module = evals.load(task)
    assert module.__doc__
    assert module.Config.__doc__
    options = options_of(task, shards / "train")
    first = evals.evaluate(micro_bundle(), task, shards / "test", options)
    assert first["pictures"] in (76.0, 65.0), "65 of the 76 usable ones have a caption"
    assert first["skipped"] == 77 - first["pictures"]
    assert all(math.isfinite(value) for value in first.values()), first
    assert evals.evaluate(micro_bundle(), task, str(shards / "test"), options) == first
    assert evals.evaluate(micro_bundle(3), task, shards / "test", options) != first


def of_rank(rank: int, folder: str) -> list[dict[str, float]]:
    """All tasks, one after the other."""
    encoder = Encoder(micro_bundle())
    return [
        evals.evaluate(encoder, task, f"{folder}/test", options_of(task, f"{folder}/train")) for task in evals.tasks()
    ]


@pytest.fixture(scope="module")
def alone(shards: Path) -> list[dict[str, float]]:
    """What one process finds."""
    return list(run_ranks(of_rank, 1, (str(shards),))[0])


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_returns_what_one_process_does(world: int, alone: list[dict[str, float]], shards: Path) -> None:
    """Exactly. 77 pictures are two batches, so two of four ranks have none."""
    assert len(alone) == len(TASKS) > 0
    for found in run_ranks(of_rank, world, (str(shards),)):
        assert found == alone


def message_of_rank(rank: int, folder: str) -> str:
    with pytest.raises(PipelineError) as error:
        evals.evaluate(micro_bundle(), "retrieval", folder)
    return str(error.value)


def test_a_rank_that_gives_up_takes_the_others_along(tmp_path: Path) -> None:
    """The second half of the samples, so the share of rank 1, cannot be decoded."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(256):
            members = {"jpg": picture(1) if number < 128 else b"no picture", "txt": b"a word"}
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    messages = run_ranks(message_of_rank, 2, (str(folder),))
    assert messages[0] == messages[1]
    assert "100 in a row" in messages[0]


def test_the_loop_and_the_command_agree_to_the_last_digit(
    micro_recipe: Callable[..., Recipe], shards: Path, tmp_path: Path
) -> None:
    """Two steps with every task in the recipe, in the fast matmul mode of training; then `vlp eval` on the run."""
    items = [
        {"name": task, "task": task, "data": str(shards / "test"), "every": 1}
        | {"options": options_of(task, shards / "train")}
        for task in TASKS
        if task != "backdoor"  # `--task all` leaves out what has no attack given
    ]
    recipe = validate({**micro_recipe(steps=2).model_dump(), "evals": items})
    train(recipe, tmp_path / "run", show=False)
    rows = RunLog(tmp_path / "run").rows("evals.jsonl")
    assert {row["step"] for row in rows} == {1, 2}
    in_loop = {key: value for row in rows if row["step"] == 2 for key, value in row.items() if key != "step"}
    command = ["eval", str(tmp_path / "run"), "--data", str(shards / "test"), "--train", str(shards / "train")]
    command += ["--task", "all", "--set", "iterations=10", "--set", "penalties=[1.0, 0.01]", "--json"]
    done = subprocess.run([sys.executable, "-m", "vlp", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"] == in_loop
    assert len(in_loop) > 50


def test_the_fast_matmul_mode_is_left_and_restored(shards: Path) -> None:
    modes = []
    bundle = micro_bundle()
    bundle.model.get_submodule("visual").register_forward_hook(
        lambda *_: modes.append(torch.get_float32_matmul_precision())
    )
    torch.set_float32_matmul_precision("medium")
    try:
        evals.evaluate(bundle, "geometry", shards / "test")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(modes) == {"highest"}


def test_retrieval_counts_every_picture_of_a_caption(starter_shards: Path) -> None:
    metrics = evals.evaluate(micro_bundle(), "retrieval", starter_shards / "val")
    assert metrics["pictures"] == 2 * metrics["captions"], "two vendors draw every concept"
    assert metrics["image_to_text/chance_R@1"] == pytest.approx(1 / metrics["captions"])
    assert metrics["skipped"] == 0
    names = list(metrics)
    assert names[:3] == ["image_to_text/R@1", "image_to_text/R@5", "image_to_text/R@10"]
    assert metrics["image_to_text/R@1"] <= metrics["image_to_text/R@5"] <= metrics["image_to_text/R@10"] <= 1


def test_a_model_that_ties_everything_scores_nothing(starter_shards: Path) -> None:
    bundle = micro_bundle()
    for parameter in bundle.model.get_submodule("visual").parameters():
        torch.nn.init.zeros_(parameter)
    metrics = evals.evaluate(bundle, "retrieval", starter_shards / "unseen_concepts")
    assert metrics["image_to_text/R@10"] == 0.0


def test_zero_shot_reports_the_largest_class_beside_the_accuracy(starter_shards: Path) -> None:
    metrics = evals.evaluate(micro_bundle(), "zero-shot", starter_shards / "unseen_concepts")
    assert metrics["classes"] == 7
    assert metrics["pictures"] == 199
    assert 1 / 7 < metrics["largest_class"] < 1
    assert 0 <= metrics["mean_per_class_top1"] <= 1
    assert metrics["mAP_classes"] > 7, "pictures carry several labels"


# -- protocols, on features chosen by hand -----------------------------------------------------------------------------


class Given(Encoder):
    """Features chosen by hand in the place of a model's: text "x" has the features `texts["x"]`."""

    def __init__(self, pictures: dict[str, Encoded], texts: dict[str, list[float]]) -> None:
        super().__init__(micro_bundle())
        self._pictures, self._texts = pictures, texts

    def pictures(self, data: Any, column: str = "labels", change: Any = None) -> Encoded:
        return self._pictures[str(data)]

    def texts(self, texts: Any) -> Tensor:
        return torch.tensor([self._texts[text] for text in texts])

    def prompts(self, prompts: Any) -> Tensor:
        return torch.stack([self.texts(texts).mean(dim=0) for texts in prompts])


def encoded(
    rows: list[list[float]], captions: list[tuple[str, ...]] | None = None, labels: list[tuple[Any, ...]] | None = None
) -> Encoded:
    empty: list[tuple[Any, ...]] = [()] * len(rows)
    return Encoded(
        torch.tensor(rows), tuple(map(str, range(len(rows)))), tuple(captions or empty), tuple(labels or empty), 0
    )


def test_equal_captions_are_merged_or_kept_by_hand() -> None:
    """Pictures e1, e2, e3; "dog" lies at e1 and belongs to pictures 0 and 1, "cat" at e3 to 2, "far" at -e2 to 1.

    merge: picture 1 sees dog 0, cat 0, far -1: both right and wrong tie at 0, so dog has rank 1, and
    image_to_text/R@1 is 2/3. Text dog finds picture 0 first: right; cat: right; far: last of three. R@1 is 2/3.
    keep: dog of picture 0 ties with dog of picture 1, a wrong one: rank 1; picture 1 sees its dog beside a wrong dog
    and the cat: rank 2; picture 2 is right: R@1 1/3. Of the four texts, dog of picture 0 and cat are right, dog of
    picture 1 sees picture 0 first: R@1 2/4.
    """
    data = encoded(torch.eye(3).tolist(), [("dog",), ("dog", "far"), ("cat",)])
    encoder = Given({"d": data}, {"dog": [1.0, 0, 0], "cat": [0, 0, 1.0], "far": [0, -1.0, 0]})
    merged = evals.evaluate(encoder, "retrieval", "d")
    assert merged["image_to_text/R@1"] == pytest.approx(2 / 3)
    assert merged["text_to_image/R@1"] == pytest.approx(2 / 3)
    assert (merged["captions"], merged["image_to_text/median_rank"]) == (3, 1)
    kept = evals.evaluate(encoder, "retrieval", "d", {"duplicates": "keep"})
    assert kept["image_to_text/R@1"] == pytest.approx(1 / 3)
    assert kept["text_to_image/R@1"] == pytest.approx(1 / 2)
    assert kept["captions"] == 4
    first = evals.evaluate(encoder, "retrieval", "d", {"captions": 1})
    assert first["captions"] == 2


def test_labels_from_a_file_with_synonyms_by_hand(tmp_path: Path) -> None:
    """Classes a, b, c of the file; b has the synonyms u and v, whose mean is its prompt. Pictures: one of a at a,
    one of u at b, one of c at a, which is wrong, one of x that the file lacks. top1 2/3, mean per class 2/3.
    """
    (tmp_path / "labels.json").write_text(json.dumps({"a": [], "b": ["u", "v"], "c": []}))
    texts = {"a": [1.0, 0, 0], "u": [0, 1.0, 0], "v": [0, 0.6, 0.8], "c": [0, 0, 1.0]}
    rows = [[1.0, 0, 0], [0, 0.9, 0.1], [1.0, 0, 0], [1.0, 0, 0]]
    encoder = Given({"d": encoded(rows, labels=[("a",), ("u",), ("c",), ("x",)])}, texts)
    found = evals.evaluate(encoder, "zero-shot", "d", {"labels": str(tmp_path / "labels.json")})
    assert [found["top1"], found["mean_per_class_top1"]] == pytest.approx([2 / 3, 2 / 3])
    assert (found["classes"], found["pictures"], found["without_label"]) == (3, 3, 1)
    assert "mAP" not in found
    assert evals.evaluate(encoder, "zero-shot", "d", {"labels": ["a", "u"], "multi": True})["mAP"] == pytest.approx(1.0)
    with pytest.raises(PipelineError, match=r"labels z \.\.\.; they carry a, c, u, x"):
        evals.evaluate(encoder, "zero-shot", "d", {"labels": ["z"]})


def test_class_numbers_are_places_in_the_label_file() -> None:
    encoder = Given({"d": encoded([[1.0, 0], [0, 1.0]], labels=[(1,), (0,)])}, {"no": [0, 1.0], "yes": [1.0, 0]})
    found = evals.evaluate(encoder, "zero-shot", "d", {"labels": ["no", "yes"], "column": "cls"})
    assert found["top1"] == 1.0


def test_a_cls_member_is_read(tmp_path: Path) -> None:
    """Shards of another tool: a picture and its class number, no caption and no json."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(6):
            for kind, content in {"jpg": picture(number), "cls": str(number % 2 + 4).encode()}.items():
                info = tarfile.TarInfo(f"{number}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    bundle = micro_bundle()
    found = evals.evaluate(bundle, "zero-shot", tmp_path, {"labels": "imagenet", "column": "cls"})
    assert (found["classes"], found["pictures"], found["skipped"]) == (1000, 6, 0)
    assert evals.evaluate(bundle, "knn", tmp_path, {"train": str(tmp_path), "column": "cls", "k": 1})["top1"] == 1.0
    probe = {"train": str(tmp_path), "column": "cls", "penalties": [1e-6]}
    assert evals.evaluate(bundle, "linear-probe", tmp_path, probe)["classes"] == 2
    with pytest.raises(MissingField, match="no sample carries a caption"):
        evals.evaluate(bundle, "retrieval", tmp_path)
    with pytest.raises(MissingField, match="no sample carries a label in 'labels'"):
        evals.evaluate(bundle, "zero-shot", tmp_path)


def test_a_probe_learns_what_the_features_say() -> None:
    """Two directions for two classes: all right; two labels at once, one for each direction: mAP 1."""
    corners = [[a, b] for a in (1.0, -1.0) for b in (1.0, -1.0)] * 10
    one = encoded(corners, labels=[("left" if row[0] > 0 else "right",) for row in corners])
    found = evals.evaluate(Given({"d": one}, {}), "linear-probe", "d", {"train": "d"})
    assert (found["top1"], found["classes"], found["validation"]) == (1.0, 2, 1.0)
    pairs = [("left" if row[0] > 0 else "right", "up" if row[1] > 0 else "down") for row in corners]
    found = evals.evaluate(Given({"d": encoded(corners, labels=pairs)}, {}), "linear-probe", "d", {"train": "d"})
    assert (found["mAP"], found["mAP_classes"]) == (1.0, 4)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"task": "sing"}, ["evals.0.task", "'sing'", "retrieval, segmentation, zero-shot"]),
        ({"options": {"kk": 1}}, ["evals.0.options.kk", "captions, duplicates", "got 1"]),
        ({"options": {"captions": 0}}, ["evals.0.options.captions", "greater than or equal to 1", "got 0"]),
        ({"options": {"duplicates": "drop"}}, ["evals.0.options.duplicates", "'merge' or 'keep'", "'drop'"]),
        ({"task": "knn"}, ["missing key 'evals.0.options.train'"]),
        ({"task": "zero-shot", "options": {"labels": "/nowhere"}}, ["evals.0.options.labels", "/nowhere", "imagenet"]),
        ({"task": "zero-shot", "options": {"labels": ["a", "a"]}}, ["evals.0.options.labels", "occurs twice"]),
        ({"task": "zero-shot", "options": {"labels": {"a": "b"}}}, ["evals.0.options.labels", "list of synonyms"]),
        ({"task": "zero-shot", "options": {"templates": ["a {}", "b"]}}, ["evals.0.options.templates", "needs {}"]),
        ({"task": "zero-shot", "options": {"templates": "imagnet"}}, ["evals.0.options.templates", "imagenet-simple"]),
        ({"task": "linear-probe", "options": {"train": "t", "penalties": [0]}}, ["options.penalties", "positive"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_when_the_recipe_is_read(
    item: dict[str, Any], words: list[str], micro_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(ConfigError) as error:
        validate({**micro_recipe().model_dump(), "evals": [{"name": "x", "data": "d", **item}]})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_templates_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a {}\nthe {}\n")
    counts = {"plain": 1, "imagenet": 80, "imagenet-simple": 7, "a {} there": 1, str(tmp_path / "mine.txt"): 2}
    for name, count in counts.items():
        config: Any = evals.check_options("zero-shot", {"templates": name})
        assert len(config.templates) == count
        assert all("{}" in template for template in config.templates)


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'sing'.*retrieval, segmentation, zero-shot"):
        evals.evaluate(micro_bundle(), "sing", Path())


# -- the command -------------------------------------------------------------------------------------------------------


def vlp_eval(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["eval", *arguments])


def test_all_tasks_at_once(trained: Path, shards: Path) -> None:
    done = vlp_eval(str(trained), "--data", str(shards / "test"), "--task", "all", "--set", "captions=1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (
        result["task"] == "detection, geometry, label-alignment, label-retrieval, retrieval, segmentation, zero-shot"
    ), "knn and linear-probe need --train"
    alone = evals.evaluate(load_bundle(trained), "retrieval", shards / "test", {"captions": 1})
    assert {key: value for key, value in result["metrics"].items() if key.startswith("retrieval/")} == {
        f"retrieval/{key}": value for key, value in alone.items()
    }
    lines = vlp_eval(str(trained), "--data", str(shards / "test"), "--task", "geometry", "--task", "retrieval").stdout
    assert [line.split("/")[0] for line in lines.splitlines()] == ["geometry"] * 12 + ["retrieval"] * 15


def test_all_leaves_out_what_the_data_cannot_answer(trained: Path, tmp_path: Path) -> None:
    records = [Record(picture(n), (), "test", str(n), labels=(f"label {n % 2}",)) for n in range(4)]
    write_shards(records, tmp_path / "s", WriteOptions(), kind="test", licences={}, progress=False)
    done = vlp_eval(str(trained), "--data", str(tmp_path / "s"), "--task", "all", "--json")
    assert json.loads(done.stdout)["task"] == "geometry, label-alignment, label-retrieval, zero-shot"
    assert "\nretrieval is left out" in f"\n{done.stderr}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "sing"], ["'sing'", "zero-shot"]),
        (["--task", "knn"], ["knn needs --train"]),
        (["--set", "kk=1"], ["'kk'", "retrieval: captions, duplicates"]),
        (["--set", "captions"], ["'captions'", "key=value"]),
        (["--set", "captions=many"], ["options.captions", "'many'"]),
        (["--labels", "x"], ["'labels'", "retrieval: captions"]),
    ],
    ids=str,
)
def test_wrong_options_of_the_command_are_named(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    """Before anything is loaded: there is no bundle at all."""
    done = vlp_eval(str(tmp_path), "--data", str(tmp_path), *arguments)
    assert done.exit_code == 1
    assert all(word in done.stderr for word in words), done.stderr
