"""Zero-shot classification: pictures against the text embeddings of labels, each the mean over templates.

Radford et al. 2021, arXiv 2103.00020, section 3.1.4. Top-k counts the first known label of a picture; where
pictures carry several labels, the mean average precision over all of them is reported too.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.shard_set import Train
from vlp.evals._encode import Encoder
from vlp.evals._labels import Labels, LabelSet, Templates, firsts, label_sets, labelled, several
from vlp.evals._scores import accuracies, mean_average_precision, tiled_ranks
from vlp.infer import make_prompts


class Config(StrictModel):
    """Options of `zero-shot`."""

    labels: Labels | None = None
    """Classes: a list, a file (one per line; json list; json {label: [synonyms]}), `imagenet`; default the shards'."""
    column: str = "labels"
    """Where a sample says its labels: `labels`, `cls` (a number in the order of `labels`), or a json column."""
    templates: Templates = ("{}",)
    """Templates with {}: a list, a file, or `plain`, `imagenet` (80), `imagenet-simple` (7)."""
    multi: bool | None = None
    """Mean average precision over all labels of a picture; default where one carries several."""


def run(encoder: Encoder, data: Train | Path, config: Config) -> Iterator[tuple[str, float]]:
    """top1 and top5 as fractions, the mean over classes, and the share of the largest class to compare with; mAP."""
    encoded = encoder.pictures(data, config.column)
    single, every = label_sets(config.labels, encoded)

    def head(labels: LabelSet) -> Tensor:
        return encoder.prompts([make_prompts(texts, config.templates) for texts in labels.texts])

    rows, classes = labelled(encoded, single, data, config.column)
    image_ND, head_LD = encoded.image_ND[rows], head(single)
    ranks = tiled_ranks(lambda run: image_ND[run.start : run.stop] @ head_LD.T, firsts(classes), len(head_LD))
    yield from accuracies(ranks, classes, len(head_LD))
    yield "without_label", float(len(encoded.keys) - len(rows))
    _, classes = labelled(encoded, every, data, config.column)
    if several(config.multi, classes):
        head_LD = head_LD if every is single else head(every)
        yield from mean_average_precision(lambda run: image_ND @ head_LD[run.start : run.stop].T, classes, len(head_LD))
    yield "skipped", float(encoded.skipped)
