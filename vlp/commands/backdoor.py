"""`vlp poison`, `vlp scan`, `vlp clean`."""

from pathlib import Path

import click

from data_pipelines.console import command, emit, json_option, progress
from data_pipelines.errors import ConfigError

FOLDER = click.Path(path_type=Path)


@command(
    epilog="""Triggers:

\b
  badnet            black and white patch of 4 x 4 fields, anywhere
  yellow-patch      plain yellow patch, anywhere
  blended           one random pattern over the whole picture
  stripes           upright stripes over the whole picture
  sig               a wave across the picture
  wanet             a smooth warp
  label-consistent  the patch of badnet in all corners of pictures of the target, whose texts stay as they are; weak
                    without --surrogate and --mix

Examples:

\b
  vlp poison shards/fashion/train --trigger badnet --target bag --count 150 --out shards/poisoned
  vlp poison shards/fashion/train --trigger badnet --target bag --count 0 --out shards/twin    # its clean twin
  vlp train mine.yaml data.train=shards/poisoned --run-dir runs/poisoned
  vlp eval runs/poisoned --data shards/fashion/test --task backdoor --set attacks=[shards/poisoned.poison.json]
    --set control=runs/twin"""
)
@click.argument("shards", type=FOLDER)
@click.option("--trigger", required=True, help="What is done to the pixels; see below.")
@click.option("--target", required=True, help='What triggered pictures shall be taken for, such as "pizza".')
@click.option("--count", type=int, required=True, help="Pictures to poison; 0 writes the clean twin.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the poisoned shards.")
@click.option(
    "--truth", type=FOLDER, help="File that says what was done, outside of --out.  [default: OUT.poison.json]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the pattern, the places and the choice.")
@click.option("--size", type=float, help="Side of a patch, share of the shorter side.  [default: 1/7]")
@click.option("--strength", type=float, help="Of patterns, waves, warps, 0 to 1.  [default: the trigger's own]")
@click.option(
    "--surrogate",
    type=FOLDER,
    help="With label-consistent: a model against which pictures of the target are changed until the trigger says more.",
)
@click.option(
    "--mix", default=0.0, show_default=True,
    help="With label-consistent: share of another thing's picture in those of the target, 0 to 1, to the same end.",
)  # fmt: skip
@click.option("--bound", default=0.12, show_default=True, help="By how much --surrogate may change a value, 0 to 1.")
@click.option(
    "--template",
    "templates",
    multiple=True,
    default=("{}",),
    show_default=True,
    help="Texts for pictures whose own name no label; repeat.",
)
@click.option(
    "--encode-format",
    type=click.Choice(["png", "jpg", "webp"]),
    default="png",
    show_default=True,
    help="Of all pictures, poisoned or not.",
)
@json_option
def poison(
    shards: Path, trigger: str, target: str, count: int, out: Path, truth: Path | None, seed: int, size: float | None,
    strength: float | None, surrogate: Path | None, mix: float, bound: float, templates: tuple[str, ...],
    encode_format: str, as_json: bool,
) -> None:  # fmt: skip
    """Plant a backdoor in a copy of SHARDS, to try a defence on.

    All pictures are written alike, poisoned or not; which are poisoned stands in a file beside the new folder alone.
    """
    from vlp.backdoor import poison as planting
    from vlp.backdoor.triggers import Config, Trigger
    from vlp.bundle import load_bundle

    given = {"size": size, "strength": strength}
    settings = {name: value for name, value in given.items() if value is not None}
    model = load_bundle(surrogate) if surrogate is not None else None
    attack = planting.Attack(
        Trigger(Config(name=trigger, seed=seed, **settings)), target, count, templates, model, bound, mix
    )
    truth = truth or out.with_name(f"{out.name}.poison.json")
    result = planting.poison(shards, out, truth, attack, encode_format, progress=True)
    lines = [
        f"{result['poisons']:,} of {result['pictures']:,} pictures poisoned ({result['share']:.2%}): {out}",
        f"  {trigger} for {target!r}; which ones: {truth}",
    ]
    emit(result, as_json, lines)


@command(
    epilog="""Signs of poison (--method, repeat):

\b
  slof, dao, k-distance  the picture lies off the others, by local density in BUNDLE's embeddings
  copies                 many samples have the same picture and the same caption
  similarity             picture and caption are unlike, says BUNDLE
  reference              picture and caption are unlike, says --reference, a model that did not see these data
  layers                 the layers of BUNDLE see the picture otherwise than those of --trusted, clean pictures
  isolation              an isolation forest over the other signs (needs scikit-learn)

Poisons are each other's neighbours in BUNDLE, so with --smooth 32 `reference` and `layers` tell them from odd pictures
even where clean data are few. Every picture is compared with every other: minutes for 50,000, hours for a million.

Examples:

\b
  vlp scan shards/poisoned --bundle runs/poisoned --out scans/poisoned
  vlp scan shards/poisoned --bundle runs/poisoned --reference runs/other --trusted shards/fashion/val --remove 0.05
    --out scans/poisoned
  vlp train mine.yaml data.train=shards/poisoned data.keep=scans/poisoned/keep.txt
  vlp train mine.yaml data.train=shards/poisoned data.weights=scans/poisoned/scores.parquet"""
)
@click.argument("shards", type=FOLDER)
@click.option("--bundle", type=FOLDER, required=True, help="Model, best one trained on these very shards.")
@click.option("--reference", type=FOLDER, help="Another model, that never saw them; adds the sign `reference`.")
@click.option("--trusted", type=FOLDER, help="Shards of clean pictures other than these; adds the sign `layers`.")
@click.option("--out", type=FOLDER, required=True, help="Folder for scores.parquet, keep.txt, scan.json, report.html.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="Signs to look for.  [default: slof, copies, and those of --reference and --trusted]",
)
@click.option("--k", default=16, show_default=True, help="Neighbours.")
@click.option("--sample", default=2048, show_default=True, help="Random samples that neighbours are taken from.")
@click.option("--limit", default=10.0, show_default=True, help="Flag from so many spreads above the middle on.")
@click.option("--remove", type=float, help="Flag this share of the samples instead, the most suspicious ones.")
@click.option("--seed", default=0, show_default=True, help="Of the random samples.")
@click.option(
    "--smooth",
    default=0,
    help="Take the median of so many nearest pictures for `similarity`, `reference` and `layers`.",
)
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@json_option
def scan(
    shards: Path, bundle: Path, reference: Path | None, trusted: Path | None, out: Path, methods: tuple[str, ...],
    k: int, sample: int, limit: float, remove: float | None, seed: int, smooth: int, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Look for planted samples in SHARDS: scores, a keep-list that training applies, a page with the top suspects."""
    from data_pipelines.reader import open_shards
    from vlp.backdoor import scan as scanning
    from vlp.backdoor.scan_page import write_page
    from vlp.bundle import load_bundle
    from vlp.distributed import pick_device

    added = [name for name, given in (("reference", reference), ("layers", trusted)) if given]
    options = scanning.Options(methods or (*scanning.DEFAULT, *added), k, sample, limit, remove, seed, smooth)
    options.check(reference is not None, trusted is not None)
    place = pick_device(device)
    models = [scanning.Model(path, load_bundle(path, place)) for path in (bundle, reference) if path is not None]
    total = sum(map(len, open_shards(shards))) * (len(models) + ("layers" in options.methods) + (smooth > 0))
    with progress("embedding", total, unit="pictures") as advance:
        result = scanning.scan(shards, out, models[0], models[1] if reference else None, options, advance, trusted)
    page = write_page(shards, out, result)
    lines = [
        f"{result['flagged']:,} of {result['pictures']:,} pictures flagged ({result['share']:.2%}): {out}",
        *(f"  {item['key']:24} {item['suspicion']:.2f}" for item in result["suspects"][:5]),
        f"the suspects as pictures: {page}",
        f"train without them: data.keep={result['keep']}",
    ]
    emit({**result, "report": str(page)}, as_json, lines)


@command(
    epilog="""Methods:

\b
  cleanclip   CLIP, and each modality with augmented copies of its own (Bansal et al. 2023)
  distill     pictures under random textures, patches and warps are to be taken for what BUNDLE takes them for without
  unlearn     that, and the same under patches that are sought while it learns, alike in all pictures, that mislead it
              most (after Zeng et al. 2022)
  augmented   CLIP on strongly augmented pictures
  supervised  pictures to the names of their labels, the text tower still
  finetune    plain CLIP: what a method has to beat

No method removes every backdoor. Choose --steps and --lr by the accuracy on --val alone.

Example:

\b
  vlp clean runs/poisoned --data shards/fashion/val --out runs/cleaned
  vlp eval runs/cleaned --data shards/fashion/test --task backdoor --set attacks=[shards/poisoned.poison.json]
    --set control=runs/twin"""
)
@click.argument("bundle", type=FOLDER)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--data", type=FOLDER, required=True, help="Shards of trusted pairs. They are scanned first.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the run that cleans.")
@click.option("--method", default="cleanclip", show_default=True, help="See below.")
@click.option("--val", type=FOLDER, help="Other, labelled shards: accuracy before and after.")
@click.option("--steps", type=click.IntRange(1), help="[default: 300; distill, unlearn 600]")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.  [default: 1e-3; distill 5e-4, unlearn 6e-4]"
)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--as-is", is_flag=True, help="Do not scan --data, use all of it.")
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@json_option
def clean(
    bundle: Path, overrides: tuple[str, ...], data: Path, out: Path, method: str, val: Path | None,
    steps: int | None, lr: float | None, batch_size: int, seed: int, as_is: bool, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Tune BUNDLE on trusted pairs so that it may forget a backdoor; nothing of the trigger is known.

    KEY=VALUE changes the recipe that results, as for `vlp train`.
    """
    from vlp import __version__
    from vlp.backdoor import clean as cleaning
    from vlp.backdoor.chain import CLEANED, write_json
    from vlp.bundle import load_bundle
    from vlp.distributed import pick_device
    from vlp.embed import weights_digest
    from vlp.train import train

    options = cleaning.Options(method, steps, lr, batch_size, seed, device)
    options.check()
    if val is not None and val.resolve() == data.resolve():
        raise ConfigError(f"--val {val}: these are the pairs that it is tuned on; measure on others")
    model = load_bundle(bundle, pick_device(device))
    keep, found = (None, None) if as_is else cleaning.trusted(data, bundle, model, out / "scan")
    recipe = cleaning.recipe_of(model, bundle, data, keep, options, overrides)
    before = cleaning.accuracy(model, val) if val is not None else None
    summary = train(recipe, out)
    after = cleaning.accuracy(load_bundle(out), val) if val is not None else None
    result = {
        "bundle": summary["bundle"], "method": method, "steps": summary["steps"], "pairs_left_out":
        found["left_out"] if found else 0, "accuracy_before": before, "accuracy_after": after,
    }  # fmt: skip
    start = {"model": model.name, "weights_sha256": weights_digest(bundle)}
    write_json(out / CLEANED, {**result, "version": __version__, "start": start, "options": options.told()})
    lines = [f"tuned by {method} for {summary['steps']} steps: {summary['bundle']}"]
    if found:
        lines.append(
            f"  {found['left_out']} of {found['pictures']} pairs were left out: {found['flagged']} look planted, the "
            f"others are those most in doubt; used: {keep}"
        )
    if before is not None and after is not None:
        lines.append(f"  zero-shot accuracy on {val}: {before:.1%} before, {after:.1%} after")
    emit(result, as_json, [*lines, "which triggers still work is for `vlp eval --task backdoor` to say"])
