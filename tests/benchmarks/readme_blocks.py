"""README's blocks, read as a reader would: indented ones are shell, typed in order; files are written where it says.

A block of commands stands indented by four spaces; everything else (output, code, pictures) is fenced. Before a block a
comment may say what is done otherwise when README is tried:

    <!-- not run: REASON -->
    <!-- run with: vlp train + run.steps=2; vlp clean + --steps 2 -->     words added to commands that begin so

A ```text fence below a block is its output: its lines must come, whatever their numbers. A ```python or ```yaml fence
below a line that ends with a path in backquotes and a colon is the content of that file.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench_kit import ROOT

NOT_RUN, RUN_WITH = "not run", "run with"
LEFT_OUT = (".git", ".venv", "runs", "shards", "dist", "build", "__pycache__", ".*_cache", ".hypothesis")
NO_NETWORK = "ip link set lo up && exec bash -euo pipefail steps.sh"

SHELL = r"""
set -o pipefail
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
added() { :; }
typed() {  # a command with the words that README's comment adds; a server in the foreground is stopped when it is ready
  local words=("$@") more=()
  mapfile -t more < <(added "$*")
  if [[ $1 == make ]]; then words+=(--old-file .venv/.ready); fi
  words+=("${more[@]}")
  if (( BASHPID != $$ )); then exec "${words[@]}"; fi
  if [[ "$1 $2" != "vlp serve" ]]; then command "${words[@]}"; return; fi
  rm -f ready.json
  command "${words[@]}" --json > ready.json &
  local server=$!
  until [[ -s ready.json ]]; do kill -0 $server; sleep 0.2; done
  curl -fsS "$(python -c 'import json; print(json.load(open("ready.json"))["url"])')/readyz" > /dev/null
  kill -TERM $server
  wait $server
}
vlp() { typed vlp "$@"; }
make() { typed make "$@"; }
torchrun() { typed torchrun "$@"; }
"""


@dataclass(slots=True)
class Block:
    """Commands, or the content of `file`, with what README's comment says about them."""

    section: str
    text: str
    file: str = ""
    reason: str = ""
    """Why it is not run; empty when it is."""
    added: dict[str, str] = field(default_factory=dict)
    """Beginning of a command -> words added to it."""
    output: str = ""
    """Lines that README shows as its output."""

    @property
    def runs(self) -> bool:
        """Whether these are commands that are run."""
        return not (self.file or self.reason)


def blocks(readme: str) -> list[Block]:
    """All blocks in order. Raises ValueError for a comment that says nothing about a block."""
    found: list[Block] = []
    section, said, last, before = "", "", "", ""
    for kind, text in _pieces(readme):
        if kind == "heading":
            section = text.removeprefix("## ")
        elif kind == "comment":
            said = text
            continue
        elif kind == "shell":
            found.append(_commented(Block(section, text), said))
            said = ""
        elif kind == "text" and last == "shell":
            found[-1].output = text
        elif kind in ("python", "yaml") and (path := re.search(r"`([\w./-]+)`:$", before)):
            found.append(Block(section, text, file=path[1]))
        if said:
            raise ValueError(f"README, {section}: no indented block below the comment {said!r}")
        last, before = kind, text if kind == "prose" else ""
    return found


def _commented(block: Block, said: str) -> Block:
    kind, _, what = said.partition(": ")
    if kind == NOT_RUN:
        block.reason = what
    elif kind == RUN_WITH:
        block.added = dict(part.split(" + ", 1) for part in what.split("; "))
    return block


def _pieces(readme: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of the page's paragraphs: heading, comment, shell, prose, or the language of a fence."""
    fence = ""
    lines: list[str] = []
    for line in [*readme.splitlines(), "#"]:  # a last line, so that nothing is left open
        if fence:
            if line.startswith("```"):
                yield fence, "\n".join(lines) + "\n"
                fence, lines = "", []
            else:
                lines.append(line)
        elif line.startswith("    ") or (not line and lines and lines[0].startswith("    ")):
            lines.append(line)
        else:
            if lines:
                yield "shell", "\n".join(line[4:] for line in lines).strip("\n") + "\n"
                lines = []
            if line.startswith("```"):
                fence = line[3:] or "plain"
            elif line.startswith("## "):
                yield "heading", line
            elif said := re.fullmatch(rf"<!-- ((?:{NOT_RUN}|{RUN_WITH}): .+) -->", line):
                yield "comment", said[1]
            elif line:
                yield "prose", line


def digest(some: Sequence[Block]) -> str:
    """Changes with anything that is typed or said about it."""
    parts = [[block.text, block.file, block.reason, block.added, block.output] for block in some]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def checkout(folder: Path, shards: Path | None = None) -> Path:
    """A copy of this checkout with an environment, and with `shards` of the starter data as if written there before."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    (folder / ".venv").symlink_to(sys.prefix)
    if shards:
        shutil.copytree(shards, folder / "shards" / "starter")
    return folder


def script(some: Sequence[Block]) -> str:
    """What a reader types, in one shell, with a line between blocks."""
    lines = []
    for number, block in enumerate(some):
        if block.file:
            lines.append(f"mkdir -p {shlex.quote(str(Path(block.file).parent))}")
            lines.append(f"cat > {shlex.quote(block.file)} <<'END_OF_FILE'\n{block.text}END_OF_FILE")
        elif block.runs:
            cases = [
                f"  {shlex.quote(start)}*) printf '%s\\n' {' '.join(map(shlex.quote, shlex.split(words)))} ;;"
                for start, words in block.added.items()
            ]
            lines += ['added() { case "$1 " in', *cases, "  *) ;;", "esac; }"]
            lines += [f"echo '@@ {number}'", block.text]
    return "\n".join([*lines, "echo '@@ end'", ""])


def run(some: Sequence[Block], folder: Path) -> tuple[str, float]:
    """Type the blocks of one section in `folder`: what went wrong, if anything, and seconds. Output goes to steps.log.

    There is no network but the loopback where the system allows that, so that nothing is fetched and no port is taken.
    """
    (folder / "steps.sh").write_text(script(some))
    (folder / "functions.sh").write_text(SHELL)
    environment = {
        **os.environ, "PATH": f"{folder / '.venv/bin'}:{os.environ['PATH']}", "PYTHONPATH": str(folder),
        "BASH_ENV": str(folder / "functions.sh"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200",
    }  # fmt: skip
    alone = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    able = subprocess.run([*alone, "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode == 0
    command = [*alone, "bash", "-c", NO_NETWORK] if able else ["bash", "-euo", "pipefail", "steps.sh"]
    began = time.monotonic()
    with (folder / "steps.log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    text = (folder / "steps.log").read_text(errors="replace")
    seconds = time.monotonic() - began
    if done.returncode or "@@ end\n" not in text:
        return f"exit code {done.returncode} after {text.rpartition('@@ ')[2][-3000:]}", seconds
    return "".join(f"not said: {line}\n" for line in _unsaid(some, text)), seconds


def _unsaid(some: Sequence[Block], log: str) -> Iterator[str]:
    """Lines of output that README shows and that did not come."""
    said = dict(part.split("\n", 1) for part in re.split(r"^@@ ", log, flags=re.MULTILINE)[1:])
    for number, block in enumerate(some):
        came = {_masked(line) for line in said.get(str(number), "").splitlines()} if block.runs else set()
        yield from (line for line in block.output.splitlines() if block.runs and _masked(line) not in came)


def _masked(line: str) -> str:
    return " ".join(re.sub(r"[\d.,]+", "#", line).split())
