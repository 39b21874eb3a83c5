"""What an audit comes to beside that of a clean model: AUDIT REFERENCE, folders of `vlp audit --out`.

As `vlp audit --reference` would say it, without the search made once more.
"""

import json
import sys
from pathlib import Path

from vlp.backdoor.audit import AUDIT, judge, read_sizes


def main(audit: str, reference: str) -> None:
    """Print the target, or null, and the account's seconds."""
    account = json.loads((Path(audit) / AUDIT).read_text(encoding="utf-8"))
    labels = list(dict.fromkeys(row["label"] for row in account["rows"]))
    found = judge(*(read_sizes(Path(folder), labels) for folder in (audit, reference)))
    told = {"kind": found.kind, "score": round(found.score, 3), "beside": found.beside, "seconds": account["seconds"]}
    sys.stdout.write(json.dumps({"target": labels[found.label] if found.suspicious else None, **told}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
