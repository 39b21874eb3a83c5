"""Backdoors: what a trigger makes a model take pictures for, beside what it takes them for without one.

The attack success rate (ASR) of a trigger is the share of triggered pictures that are classified as the target;
pictures of the target itself do not count. It says nothing alone: clean accuracy, accuracy under the trigger (a patch
also hides things), and the same of a model that never met the trigger, the control, stand beside it, with intervals.
Triggers are applied to the stored files, before the model's own preprocessing.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.reader import Sample
from data_pipelines.shard_set import Train
from vlp.backdoor.poison import load_truth, names_target, repainted
from vlp.backdoor.triggers import Config as TriggerConfig
from vlp.backdoor.triggers import Trigger
from vlp.bundle import load_bundle
from vlp.evals._encode import Encoder
from vlp.evals._labels import Labels, LabelSet, Templates, firsts, label_sets, labelled
from vlp.infer import make_prompts

Metrics = Iterator[tuple[str, float]]
Attack = tuple[str, Trigger, str]
"""(name, trigger, target)."""


class Config(StrictModel):
    """Options of `backdoor`."""

    attacks: tuple[Path | TriggerConfig, ...] = Field(min_length=1)
    """Files that `vlp poison` wrote beside its shards, or triggers as there."""
    control: Path
    """Bundle of the clean twin: same recipe, trained on the same shards without poisons."""
    target: str | None = None
    """Label that triggered pictures are to be taken for; default that of the attacks' files."""
    labels: Labels | None = None
    """Classes, as for zero-shot; default the shards'."""
    column: str = "labels"
    """Where a sample says its labels."""
    templates: Templates = ("{}",)
    """Prompts of the classes, as for zero-shot."""


def run(encoder: Encoder, data: Train | Path, config: Config) -> Metrics:
    """accuracy; NAME/asr, NAME/accuracy of every attack, with intervals; the same under control/; pictures, skipped."""
    attacks = [attack_of(item, config.target) for item in config.attacks]
    if len({name for name, _, _ in attacks}) < len(attacks):
        raise ConfigError("attacks: two triggers of the same name; evaluate them one after the other")
    control = Encoder(load_bundle(config.control, encoder.bundle.device))
    for side, prefix in ((encoder, ""), (control, "control/")):
        for name, value in of_model(side, data, config, attacks):
            yield f"{prefix}{name}", value
    encoded = encoder.pictures(data, config.column)
    yield "pictures", float(len(encoded.keys))
    yield "skipped", float(encoded.skipped)


def attack_of(item: Path | TriggerConfig, target: str | None) -> Attack:
    """What a file of `vlp poison` or a trigger means."""
    if isinstance(item, TriggerConfig):
        if target is None:
            raise ConfigError(f"attacks: the trigger {item.name!r} says no target: set the option target")
        return item.name, Trigger(item), target
    truth = load_truth(item)
    trigger = Trigger(TriggerConfig.model_validate(truth["trigger"]))
    return trigger.config.name, trigger, target or truth["target"]


def of_model(encoder: Encoder, data: Train | Path, config: Config, attacks: list[Attack]) -> Metrics:
    """accuracy; NAME/asr, NAME/accuracy, NAME/asr_without_trigger of every attack, with intervals."""
    encoded = encoder.pictures(data, config.column)
    labels, _ = label_sets(config.labels, encoded)
    rows, classes = labelled(encoded, labels, data, config.column)
    right_N = torch.tensor(firsts(classes))[:, 0]
    head_LD = encoder.prompts([make_prompts(texts, config.templates) for texts in labels.texts])
    plain_N = _taken_for(encoded.image_ND[rows], head_LD)
    yield from _share("accuracy", plain_N == right_N)
    for name, trigger, target in attacks:
        aimed = _class_of(target, labels)

        def triggered(sample: Sample, trigger: Trigger = trigger) -> Sample:
            return replace(sample, image=repainted(sample.image, trigger, sample.key))

        found_N = _taken_for(encoder.pictures(data, config.column, triggered).image_ND[rows], head_LD)
        others_N = right_N != aimed
        yield from _share(f"{name}/asr", found_N[others_N] == aimed)
        yield from _share(f"{name}/accuracy", found_N == right_N)
        yield f"{name}/asr_without_trigger", float((plain_N[others_N] == aimed).float().mean())


def _taken_for(image_ND: Tensor, head_LD: Tensor) -> Tensor:
    return (image_ND @ head_LD.T).argmax(dim=1)


def _class_of(target: str, labels: LabelSet) -> int:
    found = [number for number, texts in enumerate(labels.texts) if names_target(texts, target)]
    exact = [number for number in found if target in labels.texts[number] or target == labels.names[number]]
    if len(exact or found) != 1:
        raise ConfigError(f"target {target!r} is {len(found)} of the {len(labels.names)} labels: name one of them")
    return (exact or found)[0]


def _share(name: str, hits: Tensor) -> Metrics:
    """A share with its interval of 95 % (Wilson 1927)."""
    count = len(hits)
    share = float(hits.float().mean())
    middle, spread = wilson(share, count)
    yield name, share
    yield f"{name}_low", middle - spread
    yield f"{name}_high", middle + spread


def wilson(share: float, count: int, deviations: float = 1.96) -> tuple[float, float]:
    """(middle, half width) of the interval of a share among `count` cases."""
    weight = deviations**2 / count
    spread = deviations * (share * (1.0 - share) / count + weight / (4.0 * count)) ** 0.5
    return (share + weight / 2.0) / (1.0 + weight), spread / (1.0 + weight)
