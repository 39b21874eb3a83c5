"""The step's clock: nothing is counted twice, nothing is lost, nothing costs while nobody records."""

import threading
import time

import pytest

from vlp.phases import OTHER, Recorder, phase, recording


def test_every_moment_belongs_to_the_innermost_phase_and_the_sum_is_the_wall_time() -> None:
    """0.02 s of data, a loss of 0.05 s with 0.03 s of gather in it (0.02 s its own), 0.02 s of nothing named."""
    recorder = Recorder()
    begun = time.perf_counter()
    with recording(recorder):
        recorder.step()
        with phase("data"):
            time.sleep(0.02)
        with phase("loss"):
            time.sleep(0.01)
            with phase("gather"):
                time.sleep(0.03)
            time.sleep(0.01)
        time.sleep(0.02)
        row = recorder.step()
    passed = time.perf_counter() - begun
    assert set(row) == {"data", "loss", "gather", OTHER}
    for name, least in {"data": 0.02, "loss": 0.02, "gather": 0.03, OTHER: 0.02}.items():
        assert least <= row[name], name
    assert 0.09 <= sum(row.values()) <= passed
    assert sum(sum(row.values()) for row in recorder.rows) == pytest.approx(passed, abs=0.005)


def test_a_phase_that_fails_is_closed() -> None:
    recorder = Recorder()
    with recording(recorder):
        with pytest.raises(RuntimeError), phase("loss"):
            raise RuntimeError
        time.sleep(0.01)
    assert recorder.step()[OTHER] >= 0.01


def test_other_threads_and_other_times_are_not_counted() -> None:
    recorder = Recorder()

    def load() -> None:
        with phase("data"):
            time.sleep(0.02)

    with phase("loss"):
        pass
    with recording(recorder):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    with phase("backward"):
        pass
    assert set(recorder.step()) == {OTHER}


def test_a_recorder_within_a_recorder_takes_over() -> None:
    outer, inner = Recorder(), Recorder()
    with recording(outer):
        with recording(inner), phase("loss"):
            pass
        with phase("backward"):
            pass
    assert set(inner.step()) == {OTHER, "loss"}
    assert set(outer.step()) == {OTHER, "backward"}


def test_an_unrecorded_phase_costs_next_to_nothing() -> None:
    begun = time.perf_counter()
    for _ in range(10_000):
        with phase("loss"):
            pass
    assert (time.perf_counter() - begun) / 10_000 < 50e-6, "a step has a dozen of them"


def test_a_misspelt_phase_is_found() -> None:
    with recording(Recorder()), pytest.raises(AssertionError, match="forwards"), phase("forwards"):
        pass
