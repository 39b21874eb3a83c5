"""A generator that runs in a thread of its own, some items ahead of whoever consumes it."""

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(produce: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """Run a producer in a thread, `depth` items ahead; its errors surface here, and it ends when the consumer does."""
    items: queue.Queue[T | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def offer(item: T | BaseException) -> None:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in produce():
                offer(item)
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            offer(error)

    thread = threading.Thread(target=work, name="vlp-loader", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if not sys.is_finalizing():  # by then the thread is frozen, and would be waited for forever
            thread.join()
