"""Two weeks of the weekly command on candles of an exchange: a local server that speaks bitbank's format, and the real kernel."""
import inspect
import json
import subprocess
import sys

import pandas as pd
import pytest

from conftest import TINY
from ml_ensemble import ModelStore, exchange, market_data, retrain
from test_exchange import PLACES, STEP, Server

pytestmark = [pytest.mark.slow, pytest.mark.untraced]
WEEK = 42                     # bars
SOURCE = f"ccxt:{PLACES['bitbank']}"
SMALL = (*TINY, "n_splits=2", "replications=100", "audit.cuts=1", "labels.threshold=0.001", "champion_min_rows=30",
         "champion_margin=1", "allow_simulated=false")


def redirected(module, url):
    """Let `fetch_candles` of ml_ensemble.exchange ask a local server, without waiting between two requests."""
    fetch, client = module.fetch_candles, module.exchange_client

    def fetch_from_server(place, days=None, **options):
        local = client("bitbank", url, timeout=5)
        local.rateLimit = 0
        return fetch(place, days, client=local, sleep=lambda seconds: None, **options)
    return fetch_from_server


# Every process that starts with this file on its path is redirected: the command, and the kernel of its notebook.
REDIRECT = inspect.getsource(redirected) + """

import importlib.abc, importlib.machinery, os, sys

class Redirect(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "ml_ensemble.exchange":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            module.fetch_candles = redirected(module, os.environ["LOCAL_EXCHANGE"])
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Redirect())
"""


class Weeks:
    """The weekly retrain against a local exchange, with a store and a cache of its own."""

    def __init__(self, folder, monkeypatch):
        self.server, self.store = Server("bitbank", bars=2100), ModelStore(folder / "models")
        self.server.now -= WEEK * STEP
        self.asked = 0
        (folder / "path").mkdir()
        (folder / "path" / "sitecustomize.py").write_text(REDIRECT)
        for name, value in (("ML_ENSEMBLE_MODELS", self.store.root), ("ML_ENSEMBLE_CACHE", folder / "cache"),
                            ("PYTHONPATH", folder / "path"), ("LOCAL_EXCHANGE", self.server.url)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(market_data, "fetch_candles", redirected(exchange, self.server.url))

    def retrain(self) -> dict:
        """JSON of the result, from this process and the kernel that it starts."""
        return retrain(SOURCE, overrides=SMALL, show_progress=False).to_dict()

    def command(self, *more: str) -> tuple[int, dict]:
        """Exit code and JSON of the command."""
        words = [word for setting in (*SMALL, *more) for word in ("--set", setting)]
        done = subprocess.run([sys.executable, "-m", "ml_ensemble.cli", "retrain", "--json", "--source", SOURCE, *words],
                              capture_output=True, text=True)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def files_asked_for(self) -> list[str]:
        """The files of candles that the exchange was asked for since the last call; bitbank has one a year."""
        requests = self.server.candle_requests[self.asked:]
        self.asked += len(requests)
        return [path.rsplit("/")[-1] for path in requests]


@pytest.fixture
def weeks(tmp_path, monkeypatch):
    made = Weeks(tmp_path, monkeypatch)
    yield made
    made.server.close()


def time_of(moment: int) -> str:
    return pd.Timestamp(moment, unit="ms", tz="UTC").isoformat()


def criterion(result: dict, name: str) -> dict:
    return next(row for row in result["gate"]["criteria"] if row["name"].startswith(name))


def test_two_weeks_on_an_exchange_fetch_what_is_new_compare_the_champion_and_name_what_was_seen(weeks):
    server, store = weeks.server, weeks.store
    newest = max(moment for moment in server.rows if moment + STEP <= server.now)
    hole = [newest - k * STEP for k in (302, 301, 300)]
    for moment in hole:
        del server.rows[moment]

    first = weeks.retrain()
    assert first["promoted"], first["reason"]
    assert set(weeks.files_asked_for()) == {"2023", "2024"}
    facts = store.current()["data"]
    assert facts["market"] == "bitbank:BTC/JPY:4h" and facts["source"] == "ccxt:bitbank:BTC/JPY:4h"
    assert not facts["simulated"] and criterion(first, "trained on a real market")["status"] == "pass"
    assert facts["gaps"] == [[time_of(hole[0]), time_of(hole[-1])]] and facts["repairs"] == {"fill_gaps": 3}
    assert facts["to"] == time_of(newest) and facts["revisions"] == [] and facts["bars"] == facts["new_bars"] == 1800

    revised = newest - 5 * STEP
    before = server.rows[revised]
    server.rows[revised] = [*before[:4], before[4] + 1.5]
    server.now, newest = server.now + WEEK * STEP, newest + WEEK * STEP
    result = weeks.retrain()
    assert result["promoted"], result["reason"]
    assert weeks.files_asked_for() == ["2024", "2024"]     # once to see whether there are new bars, once by the notebook
    facts = store.current()["data"]
    assert facts["market"] == "bitbank:BTC/JPY:4h" and facts["new_bars"] == WEEK
    assert (facts["from"], facts["to"]) == (time_of(newest - 1799 * STEP), time_of(newest))
    assert facts["gaps"] == [[time_of(hole[0]), time_of(hole[-1])]]
    (revision,) = facts["revisions"]
    assert revision["time"] == time_of(revised) and revision["kept"] == "after"
    assert (revision["before"]["volume"], revision["after"]["volume"]) == (before[4], before[4] + 1.5)
    assert not any("not comparable" in row["note"] for row in result["gate"]["criteria"])
    assert criterion(result, "skill minus that of production")["status"] == "pass"
    assert "same recipe as champion" in criterion(result, "skill minus that of the champion's recipe")["note"]
    assert len(store.versions()) == 2

    production = store.current()
    code, result = weeks.command()
    assert (code, result["promoted"], result["reason"]) == (0, False, "no new bars") and weeks.files_asked_for() == ["2024"]
    assert result["newest_bar"] == time_of(newest) and store.current() == production

    server.close()
    code, error = weeks.command("data.max_staleness=6")
    assert (code, error["error"]) == (1, "StaleDataError"), error
    assert "bars ago, the limit is 6 (no network: only the cache was read)" in error["problem"]
    assert time_of(newest)[:16].replace("T", " ") in error["problem"] and "data.max_staleness" in error["remedy"]
    assert store.current() == production and store.history()[-1]["kind"] == "failure"
