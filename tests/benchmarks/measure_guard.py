"""How many triggered and clean pictures a guard flags; one JSON object as a line.

[--column NAME] BUNDLE GUARD SHARDS TRUTH
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from data_pipelines.reader import Sample
from vlp.backdoor.guard import Guard, load_guard
from vlp.backdoor.poison import load_truth, names_target, repainted
from vlp.backdoor.triggers import Config, Trigger
from vlp.bundle import load_bundle
from vlp.embed import weights_digest
from vlp.evals._encode import Change, encode_shards


def main(*words: str) -> None:
    """Print the shares of test pictures above the threshold: clean ones, and triggered ones of other labels."""
    column, words = (words[1], words[2:]) if words[0] == "--column" else ("labels", words)
    model, guard, shards, truth_file = words
    bundle, truth = load_bundle(Path(model)), load_truth(Path(truth_file))
    info, profile = load_guard(Path(guard), weights_digest(Path(model)))
    watch, trigger = Guard(info, profile, bundle), Trigger(Config.model_validate(truth["trigger"]))
    labels: list[tuple[str, ...]] = []

    def flagged(change: Change | None) -> list[bool]:
        def encode() -> object:
            found = encode_shards(bundle, Path(shards), column, change=change)
            labels[:] = [tuple(map(str, own)) for own in found.labels]
            return found.image_ND

        return [bool(flag) for flag in watch.scored(encode)[1] > info.threshold]  # type: ignore[arg-type]

    def triggered(sample: Sample) -> Sample:
        return replace(sample, image=repainted(sample.image, trigger, sample.key))

    clean = flagged(None)
    others = [
        flag for flag, own in zip(flagged(triggered), labels, strict=True) if not names_target(own, truth["target"])
    ]
    rates = {"false_positive_rate": sum(clean) / len(clean), "true_positive_rate": sum(others) / len(others)}
    sys.stdout.write(json.dumps(rates) + "\n")
