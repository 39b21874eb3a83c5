"""Time of open-vocabulary detection against a forward pass of the tower alone, in turns, by the clock on the wall."""

import os
import statistics
from pathlib import Path

import torch
from backdoor_rows import Figure
from bench_kit import take_turns, wall

from data_pipelines.preprocess import normalise
from vlp.detection.infer import Detector, load_detector
from vlp.detection.scores import Options

SIDE, LABELS, ROUNDS = 512, 50, 15
GOAL = 1.6


def ratio_of(run: Path, side: int = SIDE, rounds: int = ROUNDS) -> Figure:
    """The row: median of the rounds' ratios, lowest and highest; both on all cores, one picture at a time.

    Detection is all from the uint8 picture to boxes with labels, the texts of the labels known from the first round;
    what it is compared with is normalising the picture and the image tower's own forward pass.
    """
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    detector = load_detector(run)
    # both towers at one size, for a convolutional tower takes any
    detector.bundle.image = detector.bundle.image.model_copy(update={"size": side})
    labels = [f"thing {number}" for number in range(LABELS)]
    picture = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bundle, same = detector.bundle, same_alone(detector, side)

    @torch.inference_mode()
    def forward() -> None:
        bundle.model.encode_image(normalise(picture, bundle.image))  # type: ignore[operator]

    def detect() -> None:
        detector.detect_pixels(picture, labels, Options(threshold=0.0))

    taken = take_turns({"detect": wall(detect), "forward": wall(forward)}, rounds)
    ratios = [a / b for a, b in zip(taken["detect"], taken["forward"], strict=True)]
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    milliseconds = 1000 * statistics.median(taken["detect"])
    note = (
        f"{milliseconds:.0f} ms a picture, tower alone {1000 * statistics.median(taken['forward']):.0f} ms; "
        f"{threads} cores, {LABELS} labels, one pass for both scores: {'yes' if detector.shared else 'no'}; "
        f"a batch gives what pictures alone do: {'yes' if same else 'NO'}"
    )
    value = f"{middle:.2f} ({low:.2f} - {high:.2f})"
    name = f"time of detection at {side} px over the tower's own forward pass"
    return Figure(name, value, f"<= {GOAL}", middle <= GOAL and same, note)


def same_alone(detector: Detector, side: int) -> bool:
    """Whether two pictures get the same scores together and one by one, which is checked before the clock."""
    pictures = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels, options = ["bird", "fruit"], Options(threshold=0.0, top_k=20)
    both = detector.detect_pixels(pictures, labels, options)
    for row in range(2):
        alone = detector.detect_pixels(pictures[row : row + 1], labels, options)
        count = min(int(alone.valid_BT.sum()), 5)
        if not torch.allclose(alone.scores_BT[0, :count], both.scores_BT[row, :count], rtol=1e-3, atol=1e-5):
            return False
    return True
