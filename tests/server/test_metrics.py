"""Prometheus' text: escaped, complete, summed over workers; and rates by token bucket."""

import json
import os
import subprocess
import sys
from pathlib import Path

from server.metrics import Metrics, others, text, write_state
from server.rates import MOST, Buckets
from server.settings import Rate


def lines(*states: Metrics) -> list[str]:
    return [line for line in text([state.state() for state in states]).splitlines() if not line.startswith("#")]


def test_counters_and_histograms_of_two_workers_are_summed() -> None:
    first, second = Metrics(), Metrics()
    first.add("vlp_requests_total", route="/a", status="200")
    first.add("vlp_requests_total", 2, status="200", route="/a")
    second.add("vlp_requests_total", route="/a", status="200")
    first.observe("vlp_batch_items", 3, (2.0, 4.0), kind="text")
    second.observe("vlp_batch_items", 9, (2.0, 4.0), kind="text")
    second.gauge("vlp_ready", 1)
    assert lines(first, second) == [
        'vlp_requests_total{route="/a",status="200"} 4',
        'vlp_batch_items_bucket{kind="text",le="2"} 0',
        'vlp_batch_items_bucket{kind="text",le="4"} 1',
        'vlp_batch_items_bucket{kind="text",le="+Inf"} 2',
        'vlp_batch_items_sum{kind="text"} 12',
        'vlp_batch_items_count{kind="text"} 2',
        "vlp_ready 1",
    ]  # fmt: skip


def test_a_bound_belongs_to_its_bucket_and_labels_are_escaped() -> None:
    metrics = Metrics()
    metrics.observe("vlp_batch_items", 2, (2.0, 4.0), model='a"b\\c\nd')
    assert lines(metrics)[0] == 'vlp_batch_items_bucket{model="a\\"b\\\\c\\nd",le="2"} 1'


def test_an_ended_worker_leaves_its_counters_and_takes_its_gauges(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.add("vlp_requests_total", 5)
    metrics.gauge("vlp_ready", 1)
    write_state(tmp_path, metrics)
    assert others(tmp_path) == []  # its own
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (tmp_path / f"{os.getpid()}.json").rename(tmp_path / f"{int(ended.stdout)}.json")
    (tmp_path / "half.json").write_text('{"counters": [')
    assert others(tmp_path) == [{"counters": [["vlp_requests_total", [], 5]], "gauges": []}]
    assert json.loads((tmp_path / f"{int(ended.stdout)}.json").read_text())["gauges"]


def test_a_bucket_refills_and_belongs_to_one() -> None:
    now = 0.0
    buckets = Buckets(clock=lambda: now)
    rate = Rate(per_second=2, burst=3)
    assert [buckets.take("a", rate) for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a", rate) == 0.5
    assert buckets.take("b", rate) == 0
    now = 0.5
    assert buckets.take("a", rate) == 0
    assert buckets.take("a", rate) == 0.5
    now = 1000.0
    assert [buckets.take("a", rate) for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_worker_grants_its_share() -> None:
    buckets = Buckets(0.25, clock=lambda: 0.0)
    rate = Rate(per_second=2, burst=8)
    assert [buckets.take("a", rate) for _ in range(3)] == [0, 0, 2]


def test_inventing_names_costs_no_memory() -> None:
    buckets = Buckets()
    for number in range(MOST + 100):
        buckets.take(str(number), Rate(per_second=1))
    assert len(buckets._buckets) == MOST
