"""A market is known by its bars, not by the name of its file; a version of the simulated market never counts as fit to trade."""
import contextlib
import io
import json
import sys
from datetime import timedelta

import pytest

from conftest import TINY
from ml_ensemble import ModelStore, ProductionEnsemble, cli, retrain
from ml_ensemble.core import utc_now
from ml_ensemble.monitoring import diagnose
from ml_ensemble.sandbox import simulate_market

pytestmark = [pytest.mark.slow, pytest.mark.untraced]
SMALL = (*TINY, "n_splits=2", "replications=100", "audit.cuts=1", "champion_min_rows=30", "champion_margin=1",
         "allow_simulated=false")
OF_FILES = (*SMALL, "days=null")


@pytest.fixture
def run(tmp_path, in_this_process):
    """A retrain on a store of its own."""
    store = ModelStore(tmp_path / "models")

    def once(source, settings=OF_FILES, **options):
        return retrain(source, overrides=settings, store=store, show_progress=False, **options)
    once.store = store
    return once


def criterion(result, name):
    return next(row for row in result.verdict.criteria if row.name.startswith(name))


def failed(result):
    return [row.name for row in result.verdict.failures]


def write(candles, path) -> str:
    candles.to_csv(path)
    return f"file:{path}"


def test_next_months_file_is_the_same_market_and_another_market_must_be_asked_for_by_name(run, tmp_path):
    candles, other = simulate_market(2000, seed=7)[0], simulate_market(1800, seed=8)[0]
    january = write(candles[:1800], tmp_path / "market-2025-01.csv")
    assert run(january).promoted

    second = run(write(candles[150:], tmp_path / "market-2025-02.csv"))     # a download of the newest months only
    facts = run.store.current()["data"]
    assert second.promoted and facts["market"] == january and facts["source"].endswith("market-2025-02.csv")
    assert facts["new_bars"] == 200 and not any("not comparable" in row.note for row in second.verdict.criteria)
    assert criterion(second, "skill minus that of production").status == "pass"
    assert "same recipe as champion" in criterion(second, "skill minus that of the champion's recipe").note

    foreign = write(other, tmp_path / "other.csv")
    for name in ("", january):
        refused = run(foreign, replace_market=name, accept_change=True)
        assert not refused.promoted and failed(refused) == ["unrequested changes of labels, features or market"]
        assert f"market {january} -> {foreign}" in criterion(refused, "unrequested").remedy
        assert f"--replace-market {foreign}" in criterion(refused, "unrequested").remedy
        assert refused.current == second.version
    replaced = run(foreign, replace_market=foreign)
    assert replaced.promoted and run.store.current()["data"]["market"] == foreign
    assert criterion(replaced, "unrequested").note == f"accepted: market {january} -> {foreign}"
    assert run.store.current()["data"]["new_bars"] == len(other)


def show(words, monkeypatch):
    """Exit code and output of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["ml-ensemble", *words])
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        return cli.run_command("--json" in words), stdout.getvalue()


def test_a_version_of_the_sandbox_needs_a_word_to_be_promoted_and_is_never_fit_to_trade(run, tmp_path, monkeypatch):
    refused = run("sandbox", SMALL)
    assert not refused.promoted and failed(refused) == ["trained on a real market"]
    assert "production.allow_simulated=true" in criterion(refused, "trained on a real market").remedy
    practice = run("sandbox", (*SMALL, "allow_simulated=true"))
    facts = run.store.current()["data"]
    assert practice.promoted and facts["simulated"] and facts["market"] == "sandbox"

    # a file of the same bars is the same market: simulated, whatever the source
    candles = simulate_market(1800, seed=7)[0]
    copied = run(write(candles, tmp_path / "copy.csv"), (*OF_FILES, "seed=8"))
    assert not copied.promoted and failed(copied) == ["trained on a real market"]

    model = ProductionEnsemble(store=run.store).warm_up(candles[-200:-1])
    assert model.decide(*candles.iloc[-1], time=candles.index[-1]).simulated
    market = next(finding for finding in diagnose(run.store).findings if finding.part == "market")
    assert market.status == "fault" and "never fit to trade" in market.seen and not diagnose(run.store).healthy

    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(run.store.root))
    code, shown = show(("predict", "--days", "100", "--json"), monkeypatch)
    answer = json.loads(shown)
    assert code == 0 and answer["simulated"] and answer["unfinished"] == 0
    assert "never fit to trade" in answer["notes"][0]
    assert "never fit to trade" in show(("predict", "--days", "100"), monkeypatch)[1].replace("\n", " ")
    unfinished_bar_is_left_out(candles, tmp_path, monkeypatch)


def unfinished_bar_is_left_out(candles, tmp_path, monkeypatch):
    """`predict` on a file whose newest bar is still open."""
    now = candles.set_axis(candles.index + (utc_now() - timedelta(hours=1) - candles.index[-1]), axis=0).rename_axis("time")
    source = write(now, tmp_path / "now.csv")
    code, shown = show(("predict", "--source", source, "--json"), monkeypatch)
    answer = json.loads(shown)
    assert code == 0 and answer["unfinished"] == 1 and answer["predictions"][-1]["time"] == now.index[-2].isoformat()
    assert any("has not closed yet and was left out" in note for note in answer["notes"])
    assert "has not closed yet" in show(("predict", "--source", source), monkeypatch)[1]
