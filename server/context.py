"""What belongs to one request and is needed far from where it is read: its id, who asks, what has to be let go."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.fetching import Fetcher
    from server.guarding import Verdict


@dataclass(slots=True)
class RequestState:
    """State of one request; the outermost middleware makes it and ends it."""

    id: str = "-"
    client: str = "-"
    """Name of the API key, `anonymous` without keys; `-` until it is known."""
    model: str = "-"
    """Name of the model that was asked; a name this server knows, never one that a client made up."""
    audited: bool = False
    """Whether the request changes something, so that its answer waits for a line of the audit log."""
    code: str = ""
    """Machine-readable code of the error that is answered."""
    verdicts: "list[Verdict]" = field(default_factory=list)
    """Of the guard, in the order of the request's pictures; they become headers."""
    fetcher: "Fetcher | None" = None
    """What fetches pictures given as URLs; None where that is not allowed."""
    releases: list[Callable[[], None]] = field(default_factory=list)
    """Called when the answer is out, whatever happened."""

    def release(self) -> None:
        """Let go of everything the request held."""
        while self.releases:
            self.releases.pop()()


STATE: ContextVar[RequestState | None] = ContextVar("STATE", default=None)
"""State of the request that is being answered; None outside of requests."""
