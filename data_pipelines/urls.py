"""Whether an address of the web may be visited: its spelling, and the number its name stands for.

Two parsers that read one URL differently are how a check is talked past, so every doubtful spelling is refused.
"""

import functools
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from data_pipelines.errors import BadSample

WEB = ("http", "https")
Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A URL whose spelling was checked."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        """Host as the Host header spells it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole address."""
        return f"{self.scheme}://{self.origin}{self.path}"


def parse(url: str, *, any_port: bool = False) -> Target:
    """The parts of a URL. Raises BadSample: bad_url, bad_scheme, and bad_port unless `any_port`."""
    url = url.strip()
    try:
        if "\\" in url or not url.isprintable():
            raise ValueError("backslash or control character")
        parts = urlsplit(url)
        if parts.scheme not in WEB:
            raise BadSample("bad_scheme", f"{url[:200]!r} begins with neither of {', '.join(WEB)}")
        if "@" in parts.netloc:
            raise ValueError("user name or password")
        port = parts.port if parts.port is not None else 443 if parts.scheme == "https" else 80
        host = _host(parts.hostname or "")
        if ("[" in parts.netloc) != (":" in host):
            raise ValueError("brackets around what is no IPv6 address")
    except ValueError as error:  # UnicodeError included
        raise BadSample("bad_url", f"{url[:200]!r}: {error}") from error
    if not any_port and port < 1024 and port not in (80, 443):
        raise BadSample("bad_port", f"port {port} belongs to another protocol; 80, 443 and 1024 to 65535 are allowed")
    safe = "!$%&'()*+,/:;=?@[]~"
    query = f"?{quote(parts.query, safe)}" if parts.query else ""
    return Target(parts.scheme, host, port, (quote(parts.path, safe) or "/") + query)


def _host(name: str) -> str:
    """A host name in ASCII or an address in its one usual spelling; 0x7f.1, 2130706433 and the like are refused."""
    if ":" in name:
        return str(ipaddress.IPv6Address(name if "%" not in name else ""))
    ascii_name = name.encode("idna").decode("ascii").lower()
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", ascii_name):
        raise ValueError(f"host {name!r}")
    if re.fullmatch(r"\d+|0x[0-9a-f]*", ascii_name.rstrip(".").rpartition(".")[2]):
        return str(ipaddress.IPv4Address(ascii_name))
    return ascii_name


@functools.cache
def _special_networks() -> Networks:
    """Address blocks that are not the public internet's, from the IANA registries; IPv6 is listed by exception below.

    Our own list, because `is_global` of the ipaddress module changed its mind between Python versions.
    """
    blocks = (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 "
        "168.63.129.16/32 "  # a public number, and yet a cloud's metadata service
        "2001::/23 2001:db8::/32 2002::/16 3fff::/20"  # Teredo and others, documentation, 6to4, documentation
    )
    return tuple(ipaddress.ip_network(block) for block in blocks.split())


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the public internet's, and wraps no other address.

    >>> is_public("8.8.8.8"), is_public("::ffff:8.8.8.8"), is_public("100.64.0.1")
    (True, False, False)
    """
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address):
        isatap = (int(number) >> 32) & 0xFDFFFFFF == 0x5EFE  # an IPv4 address in the lower half
        if number not in ipaddress.IPv6Network("2000::/3") or isatap:  # mapped, NAT64, local, link, multicast
            return False
    return not any(number in network for network in _special_networks() if network.version == number.version)
