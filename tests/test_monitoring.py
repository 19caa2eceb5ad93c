"""Monitoring: nothing is lost on the way, nothing is known before its time, and an alarm says what it means."""
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

import postgres as postgresql
from ml_ensemble import FeatureManager, ModelStore, ProductionEnsemble
from ml_ensemble.cli import app
from ml_ensemble.config import load_settings
from ml_ensemble.core import ConfigError, MLEnsembleError, StoreError, iso
from ml_ensemble.drift import feature_reference
from ml_ensemble.feature_manager import input_names
from ml_ensemble.labels import make_labels, next_returns
from ml_ensemble.live_alarms import Condition, alert_unusable, live_state, note_usable, record_conditions, send_alarms
from ml_ensemble.live_performance import bar_returns, live_figures, live_rows, skill_tests
from ml_ensemble.market_data import Market
from ml_ensemble.monitor_database import ALARMS, OUTCOMES, PREDICTIONS, MonitorDatabase
from ml_ensemble.monitor_update import collect_log, open_database, update_monitoring
from ml_ensemble.prediction_log import PredictionLog, append_rows, read_log
from ml_ensemble.recipe import new_learners, training_set
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.training import fit_all, make_ensemble

QUICK = ("n_estimators=15", "learning_rate=0.1", "data.market=sandbox", "max_age_days=100000")
N = 2000                                   # bars of the market; versions were trained on 1300 and 1700 of them


@pytest.fixture(scope="module")
def candles():
    return simulate_market(N, seed=7)[0]


@pytest.fixture(scope="module")
def models(candles):
    """Models and metadata of two versions."""
    settings, found = load_settings(QUICK), []
    for stop in (1300, 1700):
        past = training_set(settings, candles.iloc[:stop])
        model = make_ensemble(past, fit_all(past, new_learners(settings)), settings.ensemble.weights.model_dump(), 0.5, max_age_days=1e5)
        inputs = pd.DataFrame(past.inputs.astype(float), index=past.features.index, columns=input_names(past.manager))
        facts = {"classes": [0, 1], "reference": {"inputs": feature_reference(inputs)},
                 "data": {"market": "sandbox", "source": "sandbox", "interval_minutes": 240, "calendar": "continuous",
                          "to": iso(candles.index[stop - 1]), "labels": settings.labels.model_dump()},
                 "metrics": {"metrics": {"brier": 0.23}, "baselines": {"prior": {"brier": 0.24}}}}
        found.append((model.to_bytes(), facts))
    return found


@pytest.fixture
def store(tmp_path, models, candles):
    """Both versions were promoted when they were trained; the clock is at the newest bar."""
    now = {"at": candles.index[-1].to_pydatetime()}
    kept = ModelStore(tmp_path / "models", clock=lambda: now["at"])
    for model, facts in models:
        kept.promote(model, facts)
    return kept


@pytest.fixture(scope="session")
def server():
    with postgresql.server() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path, server, store):
    name = f"d{abs(hash(request.node.nodeid))}"
    url = f"sqlite:///{tmp_path}/monitor.sqlite" if request.param == "sqlite" else server[0](name)
    return MonitorDatabase(url, store.clock)


def market_of(candles):
    return Market(candles, "sandbox", {}, name="sandbox")


def updated(store, database, candles, **options):
    return update_monitoring(store, load_settings(QUICK), database, market=market_of(candles), **{"replay": True, **options})


# ---- what is joined

def test_outcomes_are_the_labels_of_training_with_their_entry_and_costs_and_a_second_update_adds_nothing(store, database, candles):
    done = updated(store, database, candles)
    assert (done.replayed, done.previous, done.outcomes, done.baselines, done.waiting) == (700, 300, 698, 2 * 698, 2)
    found = database.read(OUTCOMES, "sandbox")
    labels = make_labels(candles, **load_settings(QUICK).labels.model_dump()).iloc[1300:]
    assert found["label"].tolist() == labels["label"].tolist()
    assert (found["end_time"] == labels["end_time"].to_numpy()).all()
    np.testing.assert_allclose(found["next_return"], next_returns(candles)[1300:1998], rtol=1e-12)
    assert (found["cost"] >= load_settings(QUICK).trading.fee).all()
    again = updated(store, database, candles)
    assert (again.replayed, again.previous, again.outcomes, again.baselines, again.repaired) == (0, 0, 0, 0, 0)


def test_nothing_that_an_update_stores_depends_on_later_bars(store, tmp_path, candles):
    """Updates after each of several bars end as one update after all of them, and hold nothing from the future."""
    whole, steps = (MonitorDatabase(f"sqlite:///{tmp_path}/{name}.sqlite", store.clock) for name in ("whole", "steps"))
    for bars in (1705, 1706, 1750, 1900, N):
        updated(store, steps, candles.iloc[:bars])
        known = steps.read(OUTCOMES)
        assert (known["end_time"] <= candles.index[bars - 1]).all() and (known["bar"] < candles.index[bars - 2]).all()
    updated(store, whole, candles)
    for table, columns in ((OUTCOMES, ["label", "end_time", "forward_return", "next_return", "cost"]),
                           (PREDICTIONS, ["p_hold", "p_buy", "decision", "sequence", "features"])):
        pd.testing.assert_frame_equal(steps.read(table)[["bar", *columns]], whole.read(table)[["bar", *columns]], rtol=1e-9)


def test_three_classes_and_labels_over_three_bars(tmp_path, candles):
    settings = load_settings([*QUICK, "labels.classes=3", "labels.horizon=3"])
    past = training_set(settings, candles.iloc[:1700])
    model = make_ensemble(past, fit_all(past, new_learners(settings)), settings.ensemble.weights.model_dump(), 0.5, max_age_days=1e5)
    store = ModelStore(tmp_path / "models", clock=lambda: candles.index[-1].to_pydatetime())
    store.promote(model.to_bytes(), {"classes": [-1, 0, 1], "data": {
        "market": "sandbox", "source": "sandbox", "interval_minutes": 240, "calendar": "continuous",
        "to": iso(candles.index[1699]), "labels": settings.labels.model_dump()}})
    database = MonitorDatabase(f"sqlite:///{tmp_path}/monitor.sqlite", store.clock)
    done = update_monitoring(store, settings, database, replay=True, market=market_of(candles))
    assert (done.replayed, done.outcomes, done.waiting) == (300, 296, 4)
    found = database.read(OUTCOMES)
    assert found["label"].tolist() == make_labels(candles, **settings.labels.model_dump())["label"].iloc[1700:].tolist()
    state = live_state(store, settings, database, market_of(candles))
    assert state.newest.figures["skill"][0] is not None and len(state.tests[0].log_e) == 296
    assert state.rows.proba["volatility"].shape == (300, 3) and not any(test.alarm for test in state.tests)


def test_both_databases_hold_the_same(store, tmp_path, server, candles):
    tables = []
    for url in (f"sqlite:///{tmp_path}/monitor.sqlite", server[0]("same")):
        database = MonitorDatabase(url, store.clock)
        updated(store, database, candles)
        tables.append([database.read(table) for table in (PREDICTIONS, OUTCOMES)])
    for one, other in zip(*tables):
        pd.testing.assert_frame_equal(one, other)


def test_a_repair_changes_the_stated_range_only(store, database, candles):
    updated(store, database, candles)
    revised = candles.copy()
    revised.iloc[1500:1510, 0] = revised[["high", "low"]].iloc[1500:1510].mean(axis=1)
    before = database.read(OUTCOMES).set_index("bar")
    seen = updated(store, database, revised)
    assert (seen.repaired, seen.revised > 0) == (0, True)
    pd.testing.assert_frame_equal(database.read(OUTCOMES).set_index("bar"), before)
    span = {"since": candles.index[1505].to_pydatetime(), "until": candles.index[1600].to_pydatetime()}
    assert updated(store, database, revised, repair=True, **span).repaired > 0
    after = database.read(OUTCOMES).set_index("bar")
    moved = before.index[(before["forward_return"] != after["forward_return"]).to_numpy()]
    assert len(moved) and moved.min() >= candles.index[1505]


# ---- from the bot to the database

def live(store, candles, path, bars, **more):
    """A bot that decides on some bars, with a clock that goes with them."""
    clock = {"now": (candles.index[bars[0]] + pd.Timedelta("1min")).to_pydatetime()}
    bot = ProductionEnsemble(store=store, prediction_log=path, clock=lambda: clock["now"], **more)
    bot.warm_up(candles.iloc[:bars[0]])
    for k in bars:
        clock["now"] = (candles.index[k] + pd.Timedelta("4h1min")).to_pydatetime()
        bot.decide(*candles.iloc[k], time=candles.index[k])
    assert bot.log_status(20)["dropped"] == 0


def test_what_a_bot_logged_is_collected_once_and_equals_what_the_candles_give(store, database, candles, tmp_path):
    log = tmp_path / "log.sqlite"
    live(store, candles, log, range(1800, 1900))
    assert updated(store, database, candles, log=log, replay=False).collected == {str(log): 100}
    live(store, candles, log, range(1900, N))
    assert updated(store, database, candles, log=log, replay=False).collected == {str(log): 100}
    assert updated(store, database, candles, log=log, replay=False).collected == {str(log): 0}
    found = database.read(PREDICTIONS, "sandbox", stage="production")
    assert len(found) == 200 and not found["replayed"].any()
    updated(store, other := MonitorDatabase(f"sqlite:///{tmp_path}/other.sqlite", store.clock), candles)
    replayed = other.read(PREDICTIONS, "sandbox", stage="production").tail(200)
    np.testing.assert_allclose(found["p_buy"], replayed["p_buy"], rtol=1e-6)
    state = live_state(store, load_settings(QUICK), database, market_of(candles))
    assert state.quality.missing == 0 and state.compared.broken == [] and 0.9 < state.quality.newest_delay_minutes < 1.1


def test_bars_that_a_bot_missed_are_counted_and_are_no_decision(store, database, candles, tmp_path):
    log = tmp_path / "log.sqlite"
    live(store, candles, log, range(1800, 1850))
    live(store, candles, log, range(1870, N - 4))
    updated(store, database, candles, log=log, replay=False)
    state = live_state(store, load_settings(QUICK), database, market_of(candles))
    assert (state.quality.bars, state.quality.missing, state.quality.silent) == (200, 24, 4)
    assert [condition.kind for condition in state.conditions] == ["silent"] and len(state.rows) == 176


@pytest.mark.filterwarnings("ignore:prediction log")
def test_predictions_that_could_not_be_logged_are_an_alarm_that_says_why(store, database, candles, tmp_path):
    path = tmp_path / "log.sqlite"
    live(store, candles, path, range(1900, N))
    rows, log = read_log(path), PredictionLog(path, capacity=2, clock=store.clock)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        log.write(rows[0])
        assert not log.flush(0.2)
        for row in rows[:10]:
            log.write(row)
        other.execute("ROLLBACK")
    assert log.flush(20)
    updated(store, database, candles, log=path, replay=False)
    state = live_state(store, load_settings(QUICK), database, market_of(candles))
    assert [condition.key for condition in state.conditions] == [("dropped", "log")]
    assert "8 predictions could not be written" in state.conditions[0].text and "full" in state.conditions[0].text


def test_a_bot_that_never_logged_and_candles_of_another_market_are_noticed(store, database, candles):
    updated(store, database, candles, replay=False)
    state = live_state(store, load_settings(QUICK), database, market_of(candles))
    assert [(condition.kind, condition.since) for condition in state.conditions] == [("silent", iso(candles.index[1700]))]
    with pytest.raises(StoreError, match="trades sandbox"):
        live_state(store, load_settings(QUICK), database, Market(candles, "x", {}, name="ETH"))


def test_a_damaged_row_is_an_abstention_and_stops_nothing(store, database, candles):
    updated(store, database, candles)
    with database.engine.begin() as connection:
        damaged = sa.update(PREDICTIONS).where(PREDICTIONS.c.bar == candles.index[1900].to_pydatetime())
        connection.execute(damaged.values(p_buy=0.9, p_hold=0.9))
    state = live_state(store, load_settings(QUICK), database, market_of(candles))
    assert state.rows.predicted.sum() == 699


def test_a_log_that_was_replaced_is_read_from_its_beginning(store, database, candles, tmp_path):
    log = tmp_path / "log.sqlite"
    live(store, candles, log, range(1800, 1820))
    assert collect_log(database, log) == 20
    for name in ("log.sqlite", "log.sqlite-wal", "log.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    live(store, candles, log, range(1820, 1825))
    assert collect_log(database, log) == 5


def test_a_broken_feature_is_named_after_its_second_bar(store, database, candles, tmp_path):
    log, broken = tmp_path / "log.sqlite", tmp_path / "broken.sqlite"
    live(store, candles, log, range(1800, 1830))
    rows = read_log(log)
    place = FeatureManager().feature_names.index("rsi_14") if hasattr(FeatureManager(), "feature_names") else 3
    stuck = rows[19].features[place]
    append_rows(broken, [row if k < 20 else replace(row, features=(*row.features[:place], stuck, *row.features[place + 1:]))
                         for k, row in enumerate(rows[:22])])
    updated(store, database, candles.iloc[:1822], log=broken, replay=False)
    state = live_state(store, load_settings(QUICK), database, market_of(candles.iloc[:1822]))
    assert [condition.key for condition in state.conditions if condition.kind == "feature"] == [("feature", "rsi_14")]


@pytest.mark.slow
def test_what_is_missing_after_a_kill_is_what_was_not_acknowledged(tmp_path, store):
    from test_prediction_log import WRITER
    path = tmp_path / "log.sqlite"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    made = [int(process.stdout.readline().strip(b"=\n")) for _ in range(500)]
    process.kill()
    made += [int(line.strip(b"=")) for line in process.communicate()[0].split(b"\n")[:-1]]
    database = MonitorDatabase(f"sqlite:///{tmp_path}/monitor.sqlite", store.clock)
    logged = collect_log(database, path)
    bars = pd.date_range("2024-01-01", periods=max(made) + 1, freq="4h", tz="UTC")
    assert len(bars) - logged == int((~bars.isin(database.bars("m", stage="production"))).sum()) >= 0


# ---- the database

def test_an_older_schema_is_migrated_and_keeps_its_rows(store, tmp_path, candles):
    url = f"sqlite:///{tmp_path}/monitor.sqlite"
    updated(store, MonitorDatabase(url, store.clock), candles)
    with closing(sqlite3.connect(tmp_path / "monitor.sqlite")) as connection:
        connection.execute("DROP TABLE alarms")
        connection.execute("UPDATE alembic_version SET version_num = '1'")
        connection.commit()
    again = MonitorDatabase(url, store.clock)
    assert len(again.read(PREDICTIONS, stage="production")) == 700 and len(again.read(ALARMS)) == 0


def test_a_newer_schema_is_refused_and_not_changed(store, database):
    with database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '99'"))
    with pytest.raises(StoreError, match="schema 99, this version of ml_ensemble knows 2. Update ml_ensemble"):
        MonitorDatabase(database.url)
    with database.engine.begin() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "99"


def test_while_the_server_is_down_nothing_is_lost_and_there_is_one_alert(store, server, candles, tmp_path, inbox):
    make, stop, start = server
    database, log = MonitorDatabase(make("down"), store.clock), tmp_path / "log.sqlite"
    live(store, candles, log, range(1800, 1900))
    updated(store, database, candles, log=log, replay=False)
    stop()
    try:
        live(store, candles, log, range(1900, N))                       # decisions go on
        for _ in range(3):
            with pytest.raises(StoreError, match="cannot be used") as error:
                updated(store, database, candles, log=log, replay=False)
            alert_unusable(store, error.value)
    finally:
        start()
    assert [message["title"] for message in inbox] == ["ml_ensemble: monitoring does not work"]
    updated(store, database, candles, log=log, replay=False)
    note_usable(store)
    assert len(database.read(PREDICTIONS, stage="production")) == 200
    assert alert_unusable(store, MLEnsembleError("again", "")) and len(inbox) == 2


# ---- figures, tests, alarms

def test_figures_and_money_are_those_worked_out_by_hand(store, tmp_path, candles):
    database = MonitorDatabase(f"sqlite:///{tmp_path}/monitor.sqlite", store.clock)
    updated(store, database, candles)
    settings = load_settings(QUICK)
    rows = live_rows(database, "sandbox", store.current(), settings)
    used = rows.take(rows.settled("prior", "volatility"))
    found = live_figures(used, settings, replications=100).figures
    p, y = used.proba["production"][:, 1], used.table["label"].to_numpy()
    loss = -np.where(y == 1, np.log(p), np.log(1 - p)).mean()
    q = used.proba["prior"][:, 1]
    prior = -np.where(y == 1, np.log(q), np.log(1 - q)).mean()
    assert found["log_loss"][0] == pytest.approx(loss) and found["skill"][0] == pytest.approx(1 - loss / prior)
    bought = used.table["decision"].to_numpy() == 1
    assert found["hit_rate"][0] == pytest.approx(y[bought].mean())
    wealth, held = 1.0, 0
    for buy, gain, cost in zip(bought, used.table["next_return"], used.table["cost"]):
        wealth *= (1 + buy * gain) * (1 - cost * (buy != held))
        held = buy
    wealth *= 1 - held * used.table["cost"].iloc[-1]
    assert found["net_return"][0] == pytest.approx(wealth - 1)
    assert np.prod(1 + bar_returns(used)["model"]) == pytest.approx(wealth)


def test_a_model_that_is_worse_than_the_one_it_replaced_leads_to_a_proposed_rollback(store, tmp_path, candles):
    database, settings = MonitorDatabase(f"sqlite:///{tmp_path}/monitor.sqlite", store.clock), load_settings(QUICK)
    updated(store, database, candles)
    rows = live_rows(database, "sandbox", store.current(), settings)
    rng, y = np.random.default_rng(0), rows.table["label"].to_numpy()
    good = np.clip(0.5 + 0.3 * (2 * np.nan_to_num(y) - 1) + rng.normal(0, 0.1, len(y)), 0.02, 0.98)
    pair = lambda p: np.column_stack([1 - p, p])
    worse = replace(rows, proba={**rows.proba, "previous": pair(good), "production": pair(1 - good)})
    tests = {test.against: test for test in skill_tests(worse, store, settings)}
    assert tests["previous version"].alarm and tests["prior"].alarm
    state = live_state(store, settings, database, market_of(candles))
    assert state.proposal == "" and not any(test.alarm for test in state.tests)
    assert replace(state, tests=list(tests.values())).proposal.startswith("ml-ensemble rollback --reason")


def test_the_daily_limit_holds_back_alerts_and_the_next_one_names_them(store, tmp_path, candles, inbox):
    day = {"now": candles.index[-1].to_pydatetime()}
    database = MonitorDatabase(f"sqlite:///{tmp_path}/monitor.sqlite", lambda: day["now"])
    settings = load_settings([*QUICK, "monitor.alerts_per_day=2"])
    updated(store, database, candles)
    state = live_state(store, settings, database, market_of(candles))
    for number in range(4):
        day["now"] += pd.Timedelta("1min")
        worse = replace(state, conditions=[Condition("drift", f"feature {k}", f"feature {k} moved.") for k in range(number + 1)])
        send_alarms(database, worse, record_conditions(database, worse, settings))
    assert [message["message"].count("moved.") for message in inbox] == [1, 1]
    day["now"] += pd.Timedelta("25h")
    send_alarms(database, worse, record_conditions(database, worse, settings))
    assert [message["message"].count("moved.") for message in inbox] == [1, 1, 2]


# ---- the commands

@pytest.fixture
def command(store, candles, tmp_path, monkeypatch):
    """The command on a file of the candles."""
    path = tmp_path / "candles.csv"
    candles.to_csv(path)
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(store.root))
    options = [word for text in QUICK for word in ("--set", text)]

    def call(*words, source=True):
        given = ["--source", f"file:{path}", *options] if source else options
        return CliRunner().invoke(app, ["monitor", words[0], *given, *words[1:]])
    return call


def test_the_commands_collect_check_and_export_with_their_exit_codes(command, tmp_path, store):
    done = command("update", "--replay", "--json")
    assert (done.exit_code, json.loads(done.stdout)["outcomes"]) == (0, 698), done.output
    checked = command("check", "--json")
    facts = json.loads(checked.stdout)
    assert (checked.exit_code, facts["conditions"]) == (0, []) and facts["light"] in ("green", "yellow")
    late = command("check", "--set", "production.max_age_days=1", "--json")
    assert late.exit_code == 4 and json.loads(late.stdout)["alarms"] == ["age: live model"]
    assert command("check").exit_code == 4                              # the alarm is open until the condition is gone for long enough
    exported = command("export", "--to", str(tmp_path / "all.parquet"), source=False)
    assert exported.exit_code == 0 and len(pd.read_parquet(tmp_path / "all.parquet")) == 700 + 300 + 2 * 698
    assert isinstance(command("export", "--to", str(tmp_path / "all.csv"), source=False).exception, ConfigError)
    assert isinstance(command("update", "--from", "yesterday").exception, ConfigError)
    assert isinstance(command("update", "--log", str(tmp_path / "none.sqlite")).exception, StoreError)


def test_a_new_alarm_retrains_once_if_that_is_configured_and_is_an_alarm_all_the_same(command, inbox, monkeypatch):
    asked = []
    monkeypatch.setattr("ml_ensemble.retraining.retrain", lambda source, days, overrides, store: asked.append(source) or SimpleNamespace(
        version=None, reason="no new bars"))
    command("update", "--replay")
    old = ["--set", "production.max_age_days=1", "--set", "monitor.reaction=retrain"]
    assert command("check", *old).exit_code == 4 and not asked                       # without --alert nothing is done
    for _ in range(2):
        assert command("check", "--alert", *old).exit_code == 4
    assert len(asked) == 1 and asked[0].startswith("file:")
    assert [message["title"] for message in inbox] == ["ml_ensemble: ALARM about the live model"]
    assert "Run `ml-ensemble retrain`" in inbox[0]["message"]


@pytest.mark.slow
def test_the_report_has_no_script_and_no_path_and_names_the_state(command, store):
    done = command("report", "--replay", "--json")
    assert done.exit_code == 0, done.output
    page = (store.root / "monitor" / "report.html").read_text()
    assert "<script" not in page and str(store.root) not in page and page.count("<img") >= 4
    assert f"Version {store.current()['version']} on sandbox" in page and "Against the validated gain" in page
    assert open_database(load_settings(QUICK), store).read(PREDICTIONS, stage="production").shape[0] == 700


@pytest.mark.parametrize("url", ["postgresql+psycopg://u:s3cr3t@localhost/db", "postgresql://localhost/db?password=s3cr3t"])
def test_a_password_in_the_url_of_the_database_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="holds a password") as error:
        load_settings([f"monitor.database={url}"])
    assert "s3cr3t" not in str(error.value)
