import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

COUNTED = """
import os, sys
import pyarrow.parquet as pq
from data_pipelines.parquet import read_batches, read_columns

def threads(): return len(os.listdir("/proc/self/task"))

before = threads()
path = sys.argv[1]
assert read_columns(path).num_rows == read_columns(open(path, "rb").read(), ["a"]).num_rows == 1000
with open(path, "rb") as stream:
    assert [batch.num_rows for batch in read_batches(stream, 400)] == [400, 400, 200]
ours = threads()
pq.read_table(path)
print(ours - before, threads() - ours)
"""


def test_reading_starts_no_thread_that_could_abort_the_process_at_its_exit(tmp_path: Path) -> None:
    """The control: pyarrow's own reader does start some."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": range(1000), "b": ["x"] * 1000}), path, row_group_size=500)
    done = subprocess.run([sys.executable, "-c", COUNTED, str(path)], capture_output=True, text=True, check=True)
    ours, theirs = map(int, done.stdout.split())
    assert ours == 0
    assert theirs > 0
