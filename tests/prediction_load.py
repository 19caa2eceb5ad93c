"""Decisions with a log of predictions: what they cost, and whether each arrives in PostgreSQL. `make bench-monitor`.

Decides at a steady rate, alternating without and with a log; then collects the log in PostgreSQL and compares row by row.
"""
import argparse
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

import postgres
from conftest import hand_made_payload
from ml_ensemble import ProductionEnsemble
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.monitor_database import PREDICTIONS, MonitorDatabase
from ml_ensemble.monitor_update import collect_log
from ml_ensemble.prediction_log import read_log
from ml_ensemble.versioning import ModelStore

START = datetime(2024, 1, 1, tzinfo=timezone.utc)


def new_store(folder: Path) -> ModelStore:
    """A store with a version that predicts for any bar of one minute."""
    payload = hand_made_payload()
    width = len(payload["range"]["low"])
    payload = {**payload, "max_age_days": 1e5, "range": {"low": [-1e9] * width, "high": [1e9] * width, "margin": 1.0}}
    store = ModelStore(folder)
    store.promote(restore_ensemble(payload).to_bytes(),
                  {"classes": [0, 1], "data": {"market": "load", "to": START.isoformat(), "interval_minutes": 1}})
    return store


def candles(count: int) -> tuple[list, list]:
    """Times in ms and bars."""
    close = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.0005, count)))
    bars = np.column_stack([close, close * 1.001, close * 0.999, close, np.full(count, 5.0)]).tolist()
    first = int(START.timestamp() * 1000)
    return [first + 60_000 * k for k in range(count)], bars


class Bot:
    """An ensemble with its own stream, log and place in the candles."""

    def __init__(self, store, times, bars, log=None):
        self.times, self.bars, self.place = times, bars, 200
        self.ensemble = ProductionEnsemble(store=store, prediction_log=log, clock=lambda: START + timedelta(days=1000))
        self.ensemble.warm_up([[t, *bar] for t, bar in zip(times[:200], bars[:200])])

    def decide(self) -> float:
        """Seconds of the next decision."""
        bar, moment = self.bars[self.place], self.times[self.place]
        begin = time.perf_counter()
        self.ensemble.decide(*bar, time=moment)
        self.place += 1
        return time.perf_counter() - begin


def steady(bots: list[Bot], rate: float, seconds: float) -> np.ndarray:
    """Seconds of the decisions of each bot, which take turns in blocks of a second, each at `rate` a second."""
    taken: list[list[float]] = [[] for _ in bots]
    for _ in range(round(seconds)):
        for bot, own in zip(bots, taken):
            begin = time.perf_counter()
            for k in range(round(rate)):
                while (wait := begin + k / rate - time.perf_counter()) > 0:
                    time.sleep(wait)
                own.append(bot.decide())
    return np.array(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=1000, help="decisions a second")
    parser.add_argument("--seconds", type=float, default=60, help="with the log, and as many without")
    given = parser.parse_args()
    count = round(given.rate) * round(given.seconds)
    with tempfile.TemporaryDirectory() as name, postgres.server() as (make, _, _):
        folder = Path(name)
        store, (times, bars), path = new_store(folder / "models"), candles(count + 200), folder / "log.sqlite"
        plain, logged = Bot(store, times, bars), Bot(store, times, bars, path)
        taken = 1e6 * steady([plain, logged], given.rate, given.seconds)
        begin = time.perf_counter()
        complete = logged.ensemble.log_status(60)
        late = time.perf_counter() - begin
        print(f"{count:,} decisions, {given.rate:,.0f} a second for {given.seconds:g} s; on disk {late:.2f} s later: "
              f"{complete['written']:,} written, {complete['dropped']} dropped, {complete['faults']} faults")
        for share in (50, 90, 99):
            without, beside = np.percentile(taken, share, axis=1)
            print(f"decide, p{share}: {without:.1f} us without a log, {beside:.1f} us with it: {beside - without:+.1f} us")
        begin = time.perf_counter()
        database = MonitorDatabase(make("load"))
        collected = collect_log(database, path)
        print(f"PostgreSQL: {collected:,} rows collected in {time.perf_counter() - begin:.1f} s")
        there = database.read(PREDICTIONS)[["bar", "p_buy"]].sort_values("bar")
        rows = read_log(path)
        same = len(rows) == count == len(there) and there["p_buy"].tolist() == [row.probabilities[1] for row in rows]
        print(f"lost: {count - len(there)}; the probabilities are {'the same' if same else 'NOT the same'}")
    return 0 if same and not complete["dropped"] else 1


if __name__ == "__main__":
    sys.exit(main())
