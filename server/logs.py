"""Log lines for people or for machines. Neither holds payloads, and no client can begin a line of its own."""

import datetime
import json
import logging
import sys
from typing import Any, Literal

Format = Literal["text", "json"]


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger and message, then a request's fields."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        content: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"), "level": record.levelname.lower(),
            "logger": record.name, "process": record.process,
        }  # fmt: skip
        content |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=True, default=str)


class OneLine(logging.Formatter):
    """Text; what could move the cursor or begin another line is escaped, but for tracebacks of our own."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        moment = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in record.getMessage())
        line = f"{moment} {record.levelname.lower()} {record.name}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(form: Format, level: str) -> None:
    """Send everything to standard error. uvicorn's own lines below warnings are left out: ours say it all."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else OneLine())
    # ONNX Runtime's quantiser tells the root logger of every product that it leaves alone
    handler.addFilter(lambda record: record.name != "root" or record.levelno >= logging.WARNING)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
