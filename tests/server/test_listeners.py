"""The end of a listening socket: who is in stays in, nobody new comes in, and nobody is reset."""

import socket
import threading

import pytest

from server.cli import listen
from server.listeners import CLOSING, accept_all, refuse_new, turn_away


def test_those_who_wait_are_kept_and_no_others_come_in() -> None:
    with listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        early = [socket.create_connection(address, timeout=5) for _ in range(50)]
        refuse_new(listener)
        with socket.socket() as late:
            late.settimeout(0.3)
            with pytest.raises(TimeoutError):
                late.connect(address)
        accepted = accept_all(listener)
        assert len(accepted) == 50
        for one in early:
            one.sendall(b"still heard")
        assert {one.recv(100) for one in accepted} == {b"still heard"}
        assert accept_all(listener) == []
    for one in (*early, *accepted):
        one.close()


def test_who_waits_for_the_port_to_close_is_refused_and_not_reset() -> None:
    listener = listen("127.0.0.1", 0)
    address = listener.getsockname()
    refuse_new(listener)
    told: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=10).close()
        except OSError as error:
            told.append(type(error).__name__)

    client = threading.Thread(target=connect)
    client.start()
    client.join(0.2)
    listener.close()
    client.join(10)
    assert told == ["ConnectionRefusedError"]


def test_an_answer_for_those_who_came_too_late() -> None:
    ours, client = socket.socketpair()
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    closing = threading.Thread(target=turn_away, args=(ours,))
    closing.start()
    assert client.recv(65536) == CLOSING
    assert int(CLOSING.partition(b"content-length: ")[2].split()[0]) == len(CLOSING.partition(b"\r\n\r\n")[2])
    client.close()
    closing.join(5)
