"""The end of a listening socket: nobody new is let in, and nobody who was let in is lost.

When a listening socket closes, the kernel resets the connections that nobody has accepted yet, and those whose
handshake it has answered but not finished. So new handshakes are filtered out first (their clients try again a second
later and are refused in plain words), what is under way is accepted, and only then the socket closes. A shorter queue
instead (`listen(0)`) loses some: clients that connect at the same moment believe they are in while the queue is full.
"""

import contextlib
import ctypes
import socket
import struct
import sys

SO_ATTACH_FILTER = 26
"""Linux's number of the option; Python's socket module has no name for it."""
NO_SYN = (
    (0x30, 0, 0, 13),  # load the byte of flags in the TCP header
    (0x54, 0, 0, 0x12),  # keep SYN and ACK of it
    (0x15, 0, 1, 0x02),  # SYN alone begins a connection:
    (0x06, 0, 0, 0),  # drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # anything else is let through whole
)
"""Classic BPF: (code, jump if true, jump if false, operand)."""
CLOSING = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b'content-length: 36\r\n\r\n{"error": "the server is stopping"}\n'
)
FIRST_BYTES_SECONDS = 1.0
"""A connection that is turned away may take so long to send its request."""


def refuse_new(listener: socket.socket) -> None:
    """Let no further connections in, in all processes that share the socket; those that wait are kept."""
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in NO_SYN))
    option = struct.pack("HP", len(NO_SYN), ctypes.addressof(program))
    try:
        if sys.platform != "linux":
            raise OSError("no such option")
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, option)
    except OSError:  # a kernel without filters: the next best, see above
        listener.listen(0)


def accept_all(listener: socket.socket) -> list[socket.socket]:
    """Connections that are waiting right now."""
    found = []
    with contextlib.suppress(OSError):  # BlockingIOError when there is none left
        listener.setblocking(False)
        while True:
            found.append(listener.accept()[0])
    return found


def turn_away(connection: socket.socket) -> None:
    """503 to whoever came when nobody answers any more; read first, or closing would reset the connection."""
    with connection, contextlib.suppress(OSError):
        connection.settimeout(FIRST_BYTES_SECONDS)
        connection.recv(65_536)
        connection.sendall(CLOSING)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(65_536)
