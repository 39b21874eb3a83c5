"""What README says is what the code does: generated parts are fresh, its commands run, its ten lines work."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import click
import prove_docs
import pytest
import readme_blocks
import readme_parts
import torch
from bench_kit import RESULTS

import data_pipelines.sources
import server.app
import server.routes
import vlp.objectives
from server.settings import Settings
from server.testing import FakeEngine
from vlp.cli import COMMANDS, cli
from vlp.models import instantiate
from vlp.objectives import base
from vlp.testing import MICRO, full_batch, network_input

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = readme_blocks.blocks(README)
WALK = "Your own data in 15 minutes"


def test_generated_parts_are_fresh() -> None:
    assert readme_parts.renewed(README) == README, "renew them with `make docs`"


def test_the_reference_knows_every_command_and_the_picture_every_floor() -> None:
    table = readme_parts.commands()
    assert all(f"| `vlp {name}" in table for name in COMMANDS)
    assert "| `vlp train` | Train RECIPE" in table
    assert ("data_pipelines", "vlp") in readme_parts.imports()
    assert not {(a, b) for a, b in readme_parts.imports() if a.startswith("server") and not b.startswith("server")}


# -- what is typed -----------------------------------------------------------------------------------------------------


def calls() -> list[str]:
    """Every call of vlp in README's shell blocks, run or not: lines joined, comments and other programs cut."""
    text = "".join(block.text for block in BLOCKS if not block.file).replace("\\\n", " ")
    lines = (line.partition("  # ")[0] for line in text.splitlines())
    parts = (part.strip() for line in lines for part in re.split(r"; | \| | &$|(?:^|\s)#", line))
    return [part for part in parts if re.match(r"vlp\s", part)]


def test_enough_of_them_are_found() -> None:
    assert len(calls()) > 40
    assert any("--remove 0.05" in call for call in calls())


@pytest.mark.parametrize("call", sorted(set(calls())))
def test_every_call_of_vlp_in_readme_parses(call: str) -> None:
    """Names of commands and options exist and their values are allowed; nothing runs."""
    command: click.Command = cli
    words = shlex.split(call, comments=True)[1:]
    while isinstance(command, click.Group) and words:
        context = click.Context(command)
        below = command.get_command(context, words[0])
        if below is None:
            break
        command, words = below, words[1:]
    assert command is not cli, f"no such command: {call}"
    if command.invoke_without_command if isinstance(command, click.Group) else True:
        command.make_context(call, list(words))


PAGE = """## First

<!-- run with: vlp train + run.steps=2 'a b'; make demo + X=1 -->

    vlp train mine

    vlp eval it

```text
of 3 samples
```

```text
no output of a block
```

Write `a/mine.py`:

```python
x = 1
```

<!-- not run: needs a moon -->

    moon
"""


def test_blocks_are_read_with_what_is_said_about_them() -> None:
    typed, file, moon = readme_blocks.blocks(PAGE)
    assert typed.added == {"vlp train": "run.steps=2 'a b'", "make demo": "X=1"}
    assert (typed.text, typed.output) == ("vlp train mine\n\nvlp eval it\n", "of 3 samples\n")
    assert (file.file, file.text) == ("a/mine.py", "x = 1\n")
    assert (moon.reason, moon.section, moon.runs) == ("needs a moon", "First", False)
    with pytest.raises(ValueError, match="no indented block below"):
        readme_blocks.blocks("<!-- not run: why -->\nprose\n")


def test_what_fails_or_is_not_said_is_told(tmp_path: Path) -> None:
    """Output is compared but for its numbers; the first failing command stops the section and is shown."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    page = "## A\n\n    echo of 17 samples\n\n```text\nof 3 samples\n{}```\n"
    assert readme_blocks.run(readme_blocks.blocks(page.format("")), tmp_path)[0] == ""
    assert readme_blocks.run(readme_blocks.blocks(page.format("and more\n")), tmp_path)[0] == "not said: and more\n"
    trouble, _ = readme_blocks.run(readme_blocks.blocks("## A\n\n    true\n    ls no-such-file\n    true\n"), tmp_path)
    assert trouble.startswith("exit code 2 after 0\n")
    assert "no-such-file" in trouble


def test_own_pictures_become_shards_as_written(tmp_path: Path, starter_shards: Path) -> None:
    """The walk up to its training, which is left to `make prove-docs`, with all that README says it prints."""
    place = readme_blocks.checkout(tmp_path / "checkout", starter_shards)
    walk = [block for block in BLOCKS if block.section == WALK]
    before = walk[: next(number for number, block in enumerate(walk) if block.file)]
    assert len(before) == 5
    assert all(block.runs for block in before)
    trouble, _ = readme_blocks.run(before, place)
    assert not trouble, trouble
    assert (place / "star.png").stat().st_size > 100


@pytest.mark.parametrize("section", prove_docs.sections(BLOCKS))
def test_every_section_was_typed_as_it_is_now(section: str) -> None:
    """All its commands ran, as README has them today, and the table says what was left out and why."""
    rows = {row["name"]: row for row in json.loads((RESULTS / "docs-proofs.json").read_text())["rows"]}
    some = prove_docs.sections(BLOCKS)[section]
    assert section in rows, f'type it: make prove-docs ONLY="{section}"'
    assert rows[section]["met"], f'it failed: make prove-docs ONLY="{section}"'
    assert rows[section]["digest"] == readme_blocks.digest(some), f'changed: make prove-docs ONLY="{section}"'
    assert all(f"not run: {block.reason}" in rows[section]["note"] for block in some if block.reason)


# -- ten lines each ----------------------------------------------------------------------------------------------------


def ten_lines(path: str, package: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """README's file, written into a folder that its package looks into as well."""
    (block,) = (block for block in BLOCKS if block.file == path)
    code = [line for line in block.text.splitlines()[1:] if line and not line.startswith(("from", "import"))]
    assert 0 < len(code) <= 10
    (folder / Path(path).name).write_text(block.text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    name = f"{package.__name__}.{Path(path).stem}"
    monkeypatch.setitem(sys.modules, name, package)  # so that it is gone again afterwards
    del sys.modules[name]
    return importlib.import_module(name)


def test_ten_lines_make_an_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is that of pictures to texts."""
    ten_lines("vlp/objectives/mine.py", vlp.objectives, tmp_path, monkeypatch)
    assert "mine" in base.names()
    module, config = base.load({"name": "mine", "smoothing": 0.0})
    torch.manual_seed(0)
    objective = module.build(config, base.Dims(16, 2.0))
    features = objective.encode(instantiate(MICRO), *network_input(full_batch()))
    output = objective(features, torch.tensor(10.0))
    clip, options = base.load({"name": "clip"})
    expected = clip.build(options, base.Dims(16, 2.0))(features, torch.tensor(10.0))
    assert torch.equal(output.loss, expected.parts["image_to_text"])


def test_ten_lines_make_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ten_lines("data_pipelines/sources/album.py", data_pipelines.sources, tmp_path, monkeypatch)
    assert data_pipelines.sources.resolve("any.db", kind="album").name == "album"


def test_ten_lines_make_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the document, with its body, behind a key."""
    module = ten_lines("server/routes/gram.py", server.routes, tmp_path, monkeypatch)
    monkeypatch.setattr(server.app, "KEYED", (module, *server.app.KEYED))
    document = server.app.create_app(Settings(), FakeEngine()).openapi()
    assert "GramRequest" in document["components"]["schemas"]
    assert "401" in document["paths"]["/v1/gram"]["post"]["responses"]
