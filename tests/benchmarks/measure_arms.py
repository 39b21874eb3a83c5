"""What a trigger does to several models, as `vlp eval --task backdoor` counts it.

    [--column NAME] SHARDS TRUTH TEMPLATES NAME=BUNDLE...

One JSON object: NAME/asr, NAME/accuracy and so on. Together in one process, for one after the other each would load
the clean twin and encode what it sees again.
"""

import json
import sys
from pathlib import Path

from vlp.bundle import load_bundle
from vlp.evals._encode import Encoder
from vlp.evals.backdoor import Config, attack_of, of_model


def main(*words: str) -> None:
    """Print shares of every model, control included, for it is one of them."""
    column, words = (words[1], words[2:]) if words[0] == "--column" else ("labels", words)
    shards, truth, templates, *arms = words
    attack = attack_of(Path(truth), None)
    found: dict[str, float] = {}
    for arm in arms:
        name, _, bundle = arm.partition("=")
        options = {"templates": tuple(json.loads(templates)), "column": column}
        config = Config(attacks=(Path(truth),), control=Path(bundle), **options)
        for key, value in of_model(Encoder(load_bundle(Path(bundle))), Path(shards), config, [attack]):
            group, _, what = key.rpartition("/")
            found[f"{name}/{'triggered_' if group and what.startswith('accuracy') else ''}{what}"] = value
    sys.stdout.write(json.dumps(found) + "\n")
