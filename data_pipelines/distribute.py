"""Where shards are written: threads of this process, or tasks of a Ray cluster. Same work items, same bytes.

Threads, because every decoder, encoder and resampler in use releases the GIL; what they share costs well below a
tenth of a millisecond per picture.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from data_pipelines.console import Advance
from data_pipelines.errors import PipelineError
from data_pipelines.pictures import WriteOptions
from data_pipelines.shards import Done, Pools, Work, write_shard
from data_pipelines.store import Store

Executor = tuple[Callable[[Work], "Future[Done]"], int]
"""How to submit a shard, and how many further ones to have under way."""


def executor(store: Store, options: WriteOptions, advance: Advance) -> AbstractContextManager[Executor]:
    """The place that `options.on` names; leaving it ends what it started."""
    return _ray(store, options, advance) if options.on else _threads(store, options, advance)


@contextmanager
def _threads(store: Store, options: WriteOptions, advance: Advance) -> Iterator[Executor]:
    pools = Pools(options)
    shards = ThreadPoolExecutor(2)  # so that the pictures of one are prepared while the other is made durable
    try:
        yield lambda work: shards.submit(write_shard, work, store, options, pools, advance), 2
    finally:
        pools.close()
        shards.shutdown(cancel_futures=True)


@contextmanager
def _ray(store: Store, options: WriteOptions, advance: Advance) -> Iterator[Executor]:
    try:
        import ray
    except ImportError as error:
        raise PipelineError("--on ray needs Ray: pip install 'vlp[ray]'") from error
    address = (options.on or "").partition(":")[2] or os.environ.get("RAY_ADDRESS")
    ours = not ray.is_initialized()
    if ours:
        where_to: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
        try:
            if address and ":" in address:  # Ray itself would try for minutes, and then end the process
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where_to)
        except (OSError, ValueError, RuntimeError) as error:
            raise PipelineError(f"--on {options.on}: no Ray cluster answers ({error})") from error
    try:
        where = str(store.local.absolute()) if store.local else store.where
        task = ray.remote(num_cpus=1)(_task)

        def submit(work: Work) -> "Future[Done]":
            future: Future[Done] = task.remote(work, where, options).future()
            future.add_done_callback(lambda _: advance(len(work.records)))
            return future

        yield submit, 2 * int(ray.cluster_resources().get("CPU", 1))
    finally:
        if ours:
            ray.shutdown()


def _task(work: Work, where: str, options: WriteOptions) -> Done:
    """One shard on a machine of the cluster, which must reach the same files and the same output."""
    pools = Pools(options.model_copy(update={"workers": options.workers or 1}))
    try:
        return write_shard(work, Store(Path(where) if "://" not in where else where), options, pools, _quiet)
    finally:
        pools.close()


def _quiet(step: int) -> None:
    """Progress is shown where the job was started."""
