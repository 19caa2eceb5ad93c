"""The log of predictions: what was acknowledged stays, what was not is counted, and no fault reaches a decision."""
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_ensemble import FeatureManager, ProductionEnsemble
from ml_ensemble.core import StoreError
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.prediction_log import COLUMNS, PredictionLog, PredictionRow, append_rows, from_record, read_log, to_record
from ml_ensemble.versioning import ModelStore
from conftest import hand_made_payload

ROW = PredictionRow("m", "2024-01-01T00:00:00Z", "20250901-0001", 1, "production", (0.4, 0.6), "buy", features=(1.0, -2.5))
# Writes a row after the other, each 4 hours later; prints its number after making it, and `=` with it after it is on disk.
WRITER = """
import os, sys
from datetime import datetime, timedelta, timezone
from ml_ensemble.prediction_log import PredictionLog, PredictionRow
log, start = PredictionLog(sys.argv[1]), datetime(2024, 1, 1, tzinfo=timezone.utc)
for k in range(10**6):
    moment = (start + timedelta(hours=4 * k)).isoformat()
    log.write(PredictionRow("m", moment, "v", 1, "production", (0.4, 0.6), "buy", features=(float(k), -1.5)))
    os.write(1, b"%d\\n" % k)
    if k % 50 == 49 and log.flush():
        os.write(1, b"=%d\\n" % k)
"""


def rows_on_days(count):
    start = datetime(2024, 1, 1, tzinfo=timezone.utc)
    return [replace(ROW, bar=(start + timedelta(hours=4 * k)).isoformat()) for k in range(count)]


probabilities = st.one_of(st.none(), st.tuples(*[st.floats(0, 1)] * 2), st.tuples(*[st.floats(0, 1)] * 3))
numbers = st.floats(allow_nan=False)


@given(probabilities, st.one_of(st.none(), st.lists(numbers, max_size=20).map(tuple)), st.text(max_size=20), st.one_of(st.none(), numbers))
def test_a_row_that_is_written_is_read_with_the_same_bits(p, features, text, latency):
    row = replace(ROW, probabilities=p, features=features, reason=text.replace("\0", ""), latency_us=latency)
    assert from_record(to_record(row)) == row
    with closing(sqlite3.connect(":memory:")) as connection:
        record = connection.execute(f"SELECT {', '.join('?' * len(COLUMNS))}", to_record(row)).fetchone()
    assert repr(from_record(record)) == repr(row)


def test_rows_of_several_processes_are_all_there_and_each_key_counts_once(tmp_path):
    path = tmp_path / "log.sqlite"
    code = ("import sys; from ml_ensemble.prediction_log import *\n"
            "log = PredictionLog(sys.argv[1])\n"
            "for k in range(300): log.write(PredictionRow('m', f'2024-01-01T00:00:{k % 60:02}Z', f'v{k // 60}', 1, 'shadow',"
            " (0.5, 0.5), 'hold', sys.argv[2]))\n"
            "log.close(); print(log.status()['written'], log.status()['repeated'], log.status()['dropped'])")
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    counts = np.array([list(map(int, process.communicate(timeout=60)[0].split())) for process in both])
    assert len(read_log(path)) == 300
    assert counts.sum(axis=0).tolist() == [300, 300, 0]


def test_the_log_goes_on_in_a_forked_child(tmp_path):
    log = PredictionLog(tmp_path / "log.sqlite")
    log.write(ROW)
    assert log.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        log.write(replace(ROW, version="20250901-0009"))
        os._exit(0 if log.flush() else 1)
    assert os.waitpid(child, 0)[1] == 0
    log.write(replace(ROW, version="20250901-0010"))
    log.close()
    assert len(read_log(tmp_path / "log.sqlite")) == 3


@pytest.mark.slow
def test_kill_at_20_random_moments_loses_nothing_that_was_acknowledged_and_what_is_lost_is_the_newest(tmp_path):
    rng, lost = random.Random(17), 0
    for number in range(20):
        path = tmp_path / f"log{number}.sqlite"
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.communicate()[0].split(b"\n")[:-1]
        acknowledged = max((int(line[1:]) for line in lines if line.startswith(b"=")), default=-1)
        made = max((int(line) for line in lines if not line.startswith(b"=")), default=0) + 1
        rows = read_log(path) if path.exists() else []
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert [row.features[0] for row in rows] == list(range(len(rows))), "a row is missing before the newest"
        assert acknowledged < len(rows) <= made + 1
        lost += made - min(len(rows), made)
    assert lost > 0                                                   # else nobody was killed in the middle of something


def test_a_locked_database_delays_no_decision_and_nothing_that_fits_is_lost(tmp_path):
    path, rows = tmp_path / "log.sqlite", rows_on_days(50)
    append_rows(path, rows[:1])
    log = PredictionLog(path, capacity=30)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log.write(rows[1])
            assert not log.flush(0.2)                                 # the thread is at work on that row
            begin = time.perf_counter()
            for row in rows[2:]:
                log.write(row)
            assert time.perf_counter() - begin < 1
            time.sleep(1.2)                                           # longer than SQLite waits
        other.execute("ROLLBACK")
    assert log.flush(20)
    status = log.status()
    log.close()
    assert status["written"] + status["dropped"] == 49 and status["dropped"] == 18
    assert [row.bar for row in read_log(path)] == [row.bar for row in rows[:32]]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and all(any(part in text for text in messages) for part in ("locked", "queue of 30 jobs is full"))


FULL_DISK = """
import resource, sqlite3, sys, time, warnings
from ml_ensemble.prediction_log import PredictionLog, PredictionRow
warnings.simplefilter("ignore")
log = PredictionLog(sys.argv[1])
row = lambda k: PredictionRow("m", f"{2000 + k}-01-01T00:00:00Z", "v", 1, "production", (0.4, 0.6), "buy", "x" * 500)
log.write(row(0))
assert log.flush(20)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))           # like a full disk: no file grows above 60 kB
for k in range(1, 400):
    log.write(row(k))
acknowledged = log.flush(1.0)
print(acknowledged, log.status()["faults"] > 0, bool(log.status()["last_fault"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))             # there is space again
print(log.flush(20), log.status()["dropped"])
log.close()
"""


def test_after_a_full_disk_the_rows_that_waited_are_written(tmp_path):
    path = tmp_path / "log.sqlite"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "True", "True", "0"], done.stdout + done.stderr
    assert len(read_log(path)) == 400
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 60_000


@pytest.mark.filterwarnings("ignore:prediction log")
def test_a_file_that_was_removed_or_moved_away_is_written_anew(tmp_path):
    path, rows = tmp_path / "log.sqlite", rows_on_days(3)
    log = PredictionLog(path)
    log.write(rows[0])
    assert log.flush()
    for name in ("log.sqlite", "log.sqlite-wal", "log.sqlite-shm"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    log.write(rows[1])
    assert log.flush(10)
    log.close()
    assert (read_log(tmp_path / "moved-log.sqlite"), read_log(path)) == ([rows[0]], [rows[1]])
    assert log.status()["faults"] == 1 and "removed or replaced" in log.status()["last_fault"]


@pytest.mark.filterwarnings("ignore:prediction log")
@pytest.mark.parametrize("content", ["garbage", "newer", "another table"])
def test_a_file_that_is_no_log_is_not_touched_and_after_it_is_moved_away_nothing_is_missing(tmp_path, content):
    path = tmp_path / "log.sqlite"
    if content == "garbage":
        path.write_bytes(b"no database" * 1000)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE predictions (x NOT NULL)" if content == "newer" else "CREATE VIEW predictions AS SELECT 1")
            connection.execute(f"PRAGMA user_version={99 if content == 'newer' else 0}")
    before = path.read_bytes() if content != "another table" else None
    log = PredictionLog(path)
    log.write(ROW)
    assert not log.flush(0.3)
    assert before is None or path.read_bytes() == before
    path.rename(tmp_path / "elsewhere")
    assert log.flush(15)
    log.close()
    assert read_log(path) == [ROW]
    with pytest.raises(StoreError):
        read_log(tmp_path / "elsewhere")


def test_a_log_of_an_older_version_gets_the_columns_it_lacks(tmp_path):
    path = tmp_path / "log.sqlite"
    append_rows(path, [ROW])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE predictions DROP COLUMN features")
        connection.execute("ALTER TABLE predictions DROP COLUMN latency_us")
        connection.execute("PRAGMA user_version=0")
    assert read_log(path) == [replace(ROW, features=None)]
    later = replace(ROW, bar="2024-01-01T04:00:00Z", latency_us=5.0)
    append_rows(path, [later])
    assert read_log(path) == [replace(ROW, features=None), later]


def test_each_process_counts_what_it_dropped_in_the_file(tmp_path):
    path = tmp_path / "log.sqlite"
    log = PredictionLog(path)
    log.submit(lambda: 1 / 0)
    with pytest.warns(RuntimeWarning, match="division"):
        log.flush()
    log.write(ROW)
    log.close()
    with closing(sqlite3.connect(path)) as connection:
        session = connection.execute("SELECT pid, written, dropped, faults, last_fault FROM sessions").fetchone()
    assert session == (os.getpid(), 1, 0, 1, "ZeroDivisionError: division by zero")


def test_features_and_latency_of_a_decision_are_those_of_the_bar(tmp_path):
    payload = hand_made_payload()
    width = len(payload["range"]["low"])
    model = restore_ensemble({**payload, "range": {"low": [-1e9] * width, "high": [1e9] * width, "margin": 1.0}}).to_bytes()
    store = ModelStore(tmp_path / "models")
    store.promote(model, {"classes": [0, 1], "data": {"market": "m", "to": "2024-01-25T00:00:00+00:00", "interval_minutes": 240}})
    close = 100 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.01, 200)))
    bars = pd.DataFrame({"open": close, "high": close * 1.01, "low": close * 0.99, "close": close, "volume": 5.0},
                        index=pd.date_range("2024-01-01", periods=200, freq="4h", tz="UTC"))
    ensemble = ProductionEnsemble(store=store, prediction_log=tmp_path / "log.sqlite")
    for moment, bar in zip(bars.index, bars.to_numpy()):
        ensemble.decide(*bar, time=moment)
    assert ensemble.log_status(10)["written"] == 200
    rows = read_log(tmp_path / "log.sqlite")
    features = FeatureManager().generate_features(bars)
    assert [row.features is None for row in rows] == features.isna().any(axis=1).tolist()
    logged = np.array([row.features for row in rows if row.features])
    np.testing.assert_allclose(logged, features.dropna().to_numpy(), rtol=1e-9)
    assert all(0 < row.latency_us < 1e6 for row in rows)
