"""What browsers are told, and the Host header that pages cannot forge: none may use a server through its visitor."""

import ipaddress
from collections.abc import Mapping

from server.settings import Settings

HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
}
"""Of every answer that does not set its own."""
DOCS = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' "
    "https://cdn.jsdelivr.net; img-src data: https://fastapi.tiangolo.com; connect-src 'self'; frame-ancestors 'none'"
)
"""FastAPI's /docs takes its script from there."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def security_headers(path: str) -> Mapping[str, str]:
    """What an answer to this path carries if it says nothing itself."""
    return {**HEADERS, "Content-Security-Policy": DOCS} if path == "/docs" else HEADERS


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def accepted_hosts(settings: Settings) -> frozenset[str] | None:
    """Host names that are answered, lower case; None answers all.

    On a loopback address only this machine's own names: a page whose name a rebinding resolver points at 127.0.0.1
    would otherwise speak with the server as its own origin.
    """
    if settings.hosts:
        return None if "*" in settings.hosts else frozenset(host.lower() for host in settings.hosts)
    return frozenset((*LOOPBACK, settings.host.lower())) if is_loopback(settings.host) else None


def host_name(header: str) -> str:
    """Name in a Host header, without port and brackets, lower case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    head, colon, port = name.rpartition(":")
    return (head if colon and port.isdecimal() else name).removesuffix(".")
