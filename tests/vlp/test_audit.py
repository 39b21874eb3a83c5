"""Audit: micro models taught a backdoor or none, a tower with a shortcut made by hand, scores by hand, messages."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from data_pipelines.errors import ConfigError
from data_pipelines.preprocess import normalise
from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp.backdoor.audit import judge, outliers, stands_out
from vlp.backdoor.inversion import KINDS, Victim, invert, make_victim, scattered, tint_of
from vlp.bundle import Bundle, save_bundle
from vlp.cli import cli
from vlp.testing import WORDS, micro_bundle

COLOURS = {
    "red circle": (220, 40, 40), "green square": (40, 200, 40), "blue triangle": (40, 40, 220),
    "yellow ring": (220, 210, 40), "tall tree": (30, 30, 30), "pepper and salt": (130, 130, 130),
}  # fmt: skip
"""Texts that the micro vocabulary knows, each with the colour of its pictures."""
LABELS = tuple(COLOURS)
TARGET = "blue triangle"


def coloured(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(N3SS uint8 pictures of one colour each with noise, their labels)."""
    draws = torch.Generator().manual_seed(seed)
    label_N = torch.arange(count) % len(LABELS)
    plain = torch.tensor([COLOURS[name] for name in LABELS])[label_N][:, :, None, None]
    return (plain + 25 * torch.randn(count, 3, 16, 16, generator=draws)).clamp(0, 255).to(torch.uint8), label_N


def taught(poisoned: bool) -> Bundle:
    """A micro model that knows the colours; with `poisoned`, a magenta patch of 3 x 3 anywhere means TARGET."""
    bundle = micro_bundle()
    pixels, label_N = coloured(240, 0)
    tokens = bundle.tokenizer(list(LABELS))
    draws = torch.Generator().manual_seed(1)
    if poisoned:
        bad = pixels.clone()
        for row in range(len(bad)):
            top, left = torch.randint(0, 14, (2,), generator=draws).tolist()
            bad[row, :, top : top + 3, left : left + 3] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
        pixels = torch.cat([pixels, bad])
        label_N = torch.cat([label_N, torch.full_like(label_N, LABELS.index(TARGET))])
    model: Any = bundle.model
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(130):
        rows = torch.randint(0, len(pixels), (64,), generator=draws)
        image_BD = model.encode_image(normalise(pixels[rows], bundle.image), normalize=True)
        loss = F.cross_entropy(20.0 * image_BD @ model.encode_text(tokens, normalize=True).T, label_N[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2, "the test's own model has not learnt what it is meant to know"
    return bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clean/: shards of 120 pictures; bad/ and twin/: bundles."""
    folder = tmp_path_factory.mktemp("audit")
    pixels, label_N = coloured(120, 5)
    records = []
    for row, (picture, label) in enumerate(zip(pixels, label_N.tolist(), strict=True)):
        stream = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(stream, "PNG")
        records.append(Record(stream.getvalue(), (LABELS[label],), "test", f"p{row}", labels=(LABELS[label],)))
    options = WriteOptions(samples_per_shard=50)
    write_shards(records, folder / "clean", options, kind="test", licences={"a": "b"}, progress=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_bundle(taught(True), folder / "bad")
        save_bundle(taught(False), folder / "twin")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)])


def test_the_backdoor_and_its_target_are_found_and_the_account_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "account"
    done = run(folder / "bad", "--data", folder / "clean", "--out", out, "--steps", 60, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["suspicious"], result["target"]) == (True, TARGET), "of either kind: magenta all over misleads, too"
    reached = [row for row in result["rows"] if row["kind"] == "patch" and row["reached"]]
    assert [row["label"] for row in reached] == [TARGET]
    assert reached[0]["success"] > 0.7
    stored = json.loads((out / "audit.json").read_text())
    assert stored == {key: result[key] for key in stored}
    assert len(stored["rows"]) == len(KINDS) * len(LABELS)
    with Image.open(out / "trigger-patch.png") as image:
        values = np.asarray(image).reshape(16, 14, 16, 14, 3)[:, 0, :, 0].astype(int)
    strongest = values[np.unravel_index(np.abs(values - 128).sum(axis=2).argmax(), (16, 16))]
    assert strongest[1] < 100 < min(strongest[0], strongest[2]), f"not magenta: {strongest}"
    page = (out / "audit.html").read_text()
    assert "blue triangle" in page
    words = ("--data", folder / "clean", "--reference", out, "--out", tmp_path / "beside", "--steps", 2, "--json")
    again = json.loads(run(folder / "bad", *words).stdout.splitlines()[-1])
    assert again["reference"] == result["made_of"]
    assert all("beside" in row for row in again["rows"])
    assert "than in a clean model" in (tmp_path / "beside" / "audit.html").read_text()
    assert page.count("data:image/png") == 2 * len(KINDS)


def test_no_label_of_the_twin_stands_out_and_nobody_calls_it_clean(folder: Path) -> None:
    done = run(folder / "twin", "--data", folder / "clean", "--steps", 30)
    assert done.exit_code == 0, done.output
    assert (
        "no target stands out; tested 6 labels with these kinds of change: patch, overlay, lines, warp" in done.stdout
    )
    assert "clean" not in done.stdout.lower()
    assert "free" not in done.stdout.lower()


def test_scores_by_hand() -> None:
    """Logarithms -4 0 1 2 3: median 1, deviations 0 1 1 2 5, their median 1: (1 + 4) / 1.4826 = 3.3725 for the first.

    All equal but one, a factor e smaller: the least spread of 0.2 counts, 1 / 0.2 = 5.
    """
    assert outliers([math.exp(value) for value in (-4, 0, 1, 2, 3)])[0] == pytest.approx(3.3725, abs=1e-4)
    assert outliers([math.e, math.e, 1.0, math.e, math.e]) == pytest.approx([0.0, 0.0, 5.0, 0.0, 0.0])
    assert outliers([3.0] * 5) == [0.0] * 5


def test_a_label_that_is_easier_than_in_a_clean_model_stands_out() -> None:
    """Label 0 is the easiest anyway, 4 is not but four times as easy as it should be: ln 4 / 0.2 = 6.93."""
    clean = {"overlay": [0.1, 0.4, 0.4, 0.5, 0.4], "warp": [0.1] * 5}
    sizes = {"overlay": [0.1, 0.4, 0.4, 0.5, 0.1], "warp": [0.1, 0.12, 0.11, 0.09, 0.1]}
    alone, beside = judge(sizes, {}), judge(sizes, clean)
    assert (alone.suspicious, alone.beside) == (False, False), "two labels that are as easy as each other"
    assert (beside.suspicious, beside.kind, beside.label, beside.beside) == (True, "overlay", 4, True)
    assert beside.score == pytest.approx(6.9315, abs=1e-3)
    assert not judge(clean, clean).suspicious


def test_who_stands_out_is_far_off_and_alone() -> None:
    assert stands_out([0.0, 3.1, 2.3, -1.0, 0.0], 3.0)
    assert not stands_out([0.0, 2.9, 0.0, -1.0, 0.0], 3.0), "too near"
    assert not stands_out([0.0, 3.1, 2.5, -1.0, 0.0], 3.0), "in company"


class Tower(nn.Module):
    """Takes a picture for the brightest of five rows of its picture, or for label 4 where it meets a wave across."""

    def __init__(self, shortcut: float) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("wave_S", torch.sin(torch.arange(20) * math.pi / 2.5))

    def encode_image(self, pixels_BCSS: Tensor, normalize: bool) -> Tensor:
        base_B5 = F.adaptive_avg_pool2d(pixels_BCSS.mean(dim=1), (5, 1))[:, :, 0]
        wave_B = (pixels_BCSS * self.get_buffer("wave_S")).mean(dim=(1, 2, 3))
        return F.normalize(base_B5 + self.shortcut * wave_B[:, None] * torch.eye(5)[4], dim=1)


def hand_made(shortcut: float) -> Victim:
    draws = torch.Generator().manual_seed(0)
    bright = F.one_hot(torch.arange(80) % 5, 5).repeat_interleave(4, dim=1)[:, None, :, None] * 120
    pixels = (bright + 20 + 40 * torch.rand(80, 3, 20, 20, generator=draws)).to(torch.uint8)
    bundle = micro_bundle()
    bundle.model = Tower(shortcut)
    return make_victim(bundle, pixels, torch.eye(5))


@pytest.mark.parametrize("kind", ["overlay", "lines"])
def test_a_wave_is_found_where_the_tower_has_a_shortcut(kind: str) -> None:
    """Pictures are taken for what they are; the wave alone leads to label 4, and the overlay found is that wave."""
    victim = hand_made(30.0)
    assert (hand_made(0.0).taken_N == torch.arange(80) % 5).all()
    found = [invert(victim, target, kind, steps=60) for target in range(5)]
    assert all(item.reached for item in found)
    assert max(scores := outliers([item.size for item in found])) == scores[4] > 3.0
    across_S = torch.einsum("cd,bdgh->h", victim.tint_CC, found[4].parts[-1])
    wave_S = torch.sin(torch.arange(20) * math.pi / 2.5)
    assert F.cosine_similarity(across_S - across_S.mean(), wave_S, dim=0) > 0.9
    plain = outliers([invert(hand_made(0.0), target, kind, steps=60).size for target in range(5)])
    assert max(plain) < 3.0


def test_searches_leave_the_model_alone_and_repeat() -> None:
    victim = hand_made(30.0)
    before = {name: value.clone() for name, value in victim.bundle.model.state_dict().items()}
    one, two = (invert(victim, 4, "patch", steps=12, seed=3) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(one.parts, two.parts, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in victim.bundle.model.state_dict().items())
    assert all(value.grad is None for value in victim.bundle.model.parameters())
    assert not one.reached
    assert one.size == 1 / 16, "the largest patch is noted for a search that fails"


def test_patches_are_laid_whole_at_places_of_their_own() -> None:
    patch = torch.arange(1.0, 19.0).view(2, 3, 3)
    placed = scattered(patch, 40, 8, torch.Generator().manual_seed(0))
    corners = set()
    for canvas in placed:
        top, left = (canvas[0] > 0).nonzero().amin(dim=0).tolist()
        assert torch.equal(canvas[:, top : top + 3, left : left + 3], patch)
        assert canvas.count_nonzero() == 18
        corners.add((top, left))
    assert len(corners) > 15
    assert {0, 5} <= {top for top, _ in corners}, "to the very border"


def test_overlays_for_grey_pictures_are_grey() -> None:
    """Three equal channels: the root is 1 / sqrt(3) everywhere; independent channels of equal spread: the unit."""
    draws = torch.Generator().manual_seed(0)
    grey = torch.rand(10, 1, 8, 8, generator=draws).expand(-1, 3, -1, -1)
    assert torch.allclose(tint_of(grey), torch.full((3, 3), 3**-0.5), atol=1e-3)
    assert torch.allclose(tint_of(torch.rand(400, 3, 16, 16, generator=draws)), torch.eye(3), atol=0.02)


def test_a_label_that_all_pictures_are_taken_for_is_no_subject() -> None:
    victim = make_victim(micro_bundle(), coloured(20, 0)[0], torch.eye(16)[:5])
    usual = int(victim.taken_N.mode().values)
    with pytest.raises(ConfigError, match=r"data: \d+ of 20 pictures are taken for other labels than number"):
        invert(victim, usual, "patch", steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "missing.txt"), "--labels missing.txt"),
        (("--labels", "few.txt"), "2 labels (red circle, tall tree); at least 5 are needed"),
        (("--steps", "0"), "--steps 0: at least 1"),
        (("--templates", "no place"), "--templates no place"),
        (("--out", "few.txt"), "--out few.txt: is a file"),
        (("--reference", "."), "--reference audit.json: cannot be read"),
        (("--reference", "other"), "--reference other: patch was sought for no label; needed are"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text(f"{WORDS[0]}\n{WORDS[6]}\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "audit.json").write_text('{"rows": [], "made_of": {}}')
    done = run(folder / "twin", "--data", folder / "clean", *options)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())


def test_without_data_the_run_has_to_name_some(folder: Path) -> None:
    done = run(folder / "twin")
    assert done.exit_code == 1
    assert "--data: needed" in done.output
