"""The entry points read what files contain, and refuse alike: times, numbers, rows, unfinished bars, age, limits."""
import json
import math
import sys
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from conftest import hand_made_payload
from ml_ensemble import FeatureManager, ProductionEnsemble, cli as command_line
from ml_ensemble.base_learners import make_learners
from ml_ensemble.candle_times import read_times
from ml_ensemble.config import load_settings
from ml_ensemble.core import (ColumnTypeError, DataError, DuplicateError, EmptyDataError, GapError, MissingColumnError,
                              MissingValueError, NotATableError, TimestampError, UnsortedError)
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.feature_manager import INPUT_NAMES, scale_free
from ml_ensemble.inference import range_limits, time_ns, training_range
from ml_ensemble.labels import forward_return_labels
from ml_ensemble.monitoring import diagnose
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.training import fit_all, make_ensemble, parity_error
from ml_ensemble.versioning import ModelStore
from ml_ensemble.walk_forward import make_training_set

STEP = pd.Timedelta("4h")
NOW = datetime(2024, 6, 3, 14, tzinfo=timezone.utc)


def by_hand(to="2024-06-01T00:00:00+00:00", clock=lambda: NOW, minutes=240.0, calendar="continuous"):
    """A model worked out by hand, p = 1 / (1 + exp(-100 returns_1)), which knows its newest training bar."""
    wide = {"low": [-100.0] * 12, "high": [100.0] * 12, "margin": 1.0}
    data = {"to": to, "interval_minutes": minutes, "calendar": calendar}
    return restore_ensemble(hand_made_payload() | {"range": wide}, {"version": "20240601-0001", "data": data,
                            "created_at": "2024-06-03T00:00:00Z"}, clock=clock)


def market(bars=300, end="2024-06-03 08:00", step=STEP):
    """Simulated candles up to the bar that starts at `end`."""
    candles = simulate_market(bars, seed=5)[0].round(2)
    candles["high"], candles["low"] = candles[list(candles)[:4]].max(axis=1), candles[list(candles)[:4]].min(axis=1)
    return candles.set_axis(pd.date_range(end=end, periods=bars, freq=step, tz="UTC").as_unit("ns"))


def rows_of(candles):
    return [[time.value // 10**6, *map(float, bar)] for time, bar in zip(candles.index, candles.to_numpy())]


def state(model):
    feed = model._state.feed
    return feed.stream.to_json(), feed.bars, feed.newest, feed.interval


# --- times ------------------------------------------------------------------------------------------------------------

TEXTS = ("2024-06-03T08:00:00Z", "2024-06-03 08:00", "2024-06-03T17:00:00+09:00", "2024-06-03T08:00:00.000001", "2024-06-03",
         "2024-06-03T08:00:00.123456789Z", "20240603T080000Z", "2024-06", "1717401600", "1717401600.5", "1717401600000")
NUMBERS = (10**8, 9_223_372_036, 10**11, 9_223_372_036_000, 10**14, 9_223_372_036_000_000, 10**17,
           1717401600, 1717401600000, 1717401600000000, 1717401600000000000, 1717401600.25, 1717401600000.5)


@pytest.mark.parametrize("time", TEXTS + NUMBERS)
def test_a_time_is_read_as_in_a_file(time):
    assert time_ns(time) == read_times(pd.Series([time])).asi8[0]


SAME = pd.Timestamp("2024-06-03 08:00", tz="UTC")
FORMS = {"ISO text": SAME.isoformat(), "naive text": "2024-06-03 08:00", "Tokyo": "2024-06-03T17:00+09:00",
         "UTC": "2024-06-03 08:00:00 UTC", "s": 1717401600, "ms": 1717401600000, "us": 1717401600000000, "ns": SAME.value,
         "float": 1717401600.0, "numpy integer": np.int64(1717401600000), "numpy float": np.float64(1717401600000),
         "decimal": Decimal("1717401600"), "digits": "1717401600000", "datetime": SAME.to_pydatetime(), "Timestamp": SAME,
         "naive datetime": datetime(2024, 6, 3, 8), "datetime64": np.datetime64("2024-06-03T08:00")}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_time_gives_the_same_decision(name):
    candles = market()
    expected = by_hand().warm_up(candles[:-1])
    decision = expected.decide(*candles.iloc[-1], time=SAME)
    model = by_hand().warm_up(candles[:-1])
    assert model.decide(*candles.iloc[-1], time=FORMS[name]) == decision and not decision.reason
    assert state(model) == state(expected)
    row = FeatureManager().generate_features(candles).to_numpy()[-1]
    assert model.predict_one(row, time=FORMS[name]) == decision


OUTSIDE = (datetime(2300, 1, 1), datetime(1600, 1, 1), np.datetime64("2300-01-01"), np.datetime64("1600-01-01"),
           np.datetime64("9999-12-31T00:00:00"), pd.Timestamp("2300-01-01"), pd.Timestamp("1600-01-01").as_unit("s"),
           "2300-01-01", "1600-01-01T00:00Z")


@pytest.mark.parametrize("time", [*OUTSIDE, "yesterday", "", "2024-13-01", "03/06/2024", "20240603", 0, 3600, -1717401600, 20240603,
                                  10**11 - 1, 10**14 - 1, 10**17 - 1,
                                  2**63, 10**30, True, math.nan, math.inf, "nan", pd.NaT, np.datetime64("NaT"), b"2024-06-03",
                                  (2024, 6, 3), timedelta(days=3)], ids=repr)
def test_a_time_that_cannot_be_read_is_a_named_error_and_leaves_the_stream_unchanged(time):
    candles = market()
    model = by_hand().warm_up(candles[:-1])
    before = state(model)
    with pytest.raises(TimestampError):
        model.decide(*candles.iloc[-1], time=time)
    assert state(model) == before


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [str, Decimal, np.float64, lambda x: f" {x:e} ", lambda x: np.str_(x)],
                         ids=["text", "Decimal", "numpy", "exponent", "numpy text"])
def test_text_and_decimals_are_numbers(convert):
    candles = market()
    bar, expected, model = candles.iloc[-1].tolist(), by_hand().warm_up(candles[:-1]), by_hand().warm_up(candles[:-1])
    exact = [float(str(convert(value)).strip()) for value in bar]
    texts = [convert(str(value)) if convert is Decimal else convert(value) for value in bar]
    assert model.decide(*texts, time=SAME) == expected.decide(*exact, time=SAME)
    assert state(model) == state(expected)


@pytest.mark.parametrize("value, error", [
    ("abc", ColumnTypeError), ("NaN", ColumnTypeError), ("inf", ColumnTypeError), ("", ColumnTypeError),
    ("1,234.5", ColumnTypeError), ("1_000", ColumnTypeError), ("１２", ColumnTypeError), ("0x10", ColumnTypeError),
    (True, ColumnTypeError), (np.True_, ColumnTypeError), (None, ColumnTypeError), (b"5", ColumnTypeError),
    (Decimal("NaN"), MissingValueError), (Decimal("sNaN"), ColumnTypeError), (math.nan, MissingValueError)], ids=repr)
def test_what_is_no_number_is_a_named_error_alone_and_in_rows(value, error):
    candles = market()
    model = by_hand().warm_up(candles[:-1])
    before = state(model)
    for place in range(5):
        bar = candles.iloc[-1].tolist()
        bar[place] = value
        with pytest.raises(error):
            model.decide(*bar, time=SAME)
        with pytest.raises(error, match="row 299"):
            model.warm_up([*rows_of(candles[:-1]), [1717401600000, *bar]])
    assert state(model) == before


# --- rows -------------------------------------------------------------------------------------------------------------

KINDS = {"ccxt": rows_of, "tuples": lambda c: tuple(map(tuple, rows_of(c))), "array": lambda c: np.array(rows_of(c)),
         "objects": lambda c: np.array(rows_of(c), dtype=object), "seconds": lambda c: [[r[0] // 1000, *r[1:]] for r in rows_of(c)],
         "text": lambda c: [[str(x) for x in r] for r in rows_of(c)], "generator": lambda c: (r for r in rows_of(c)),
         "arrays": lambda c: [np.array(r) for r in rows_of(c)],
         "ISO": lambda c: [[t.isoformat(), *r[1:]] for t, r in zip(c.index, rows_of(c))]}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_the_state_of_the_table_bit_for_bit(kind):
    candles = market()
    expected, model = by_hand().warm_up(candles[:-1]), by_hand()
    assert model.warm_up(KINDS[kind](candles[:-1])) is model and state(model) == state(expected)
    assert model.decide(*candles.iloc[-1], time=SAME) == expected.decide(*candles.iloc[-1], time=SAME)


@pytest.mark.untraced
def test_times_may_be_passed_beside_the_rows_and_long_histories_too():
    candles = market(60_000)
    expected = state(by_hand().warm_up(candles))
    for times in (candles.index, candles.index.as_unit("ns").asi8 // 10**6, [time.isoformat() for time in candles.index]):
        assert state(by_hand().warm_up(candles.to_numpy(), times)) == expected


CANDLES = rows_of(market(60))
WRONG = {"five columns": ([row[1:] for row in CANDLES], MissingColumnError), "no rows": ([], EmptyDataError),
         "an empty array": (np.empty((0, 6)), EmptyDataError), "klines": ([[*row, 1] for row in CANDLES], MissingColumnError),
         "ragged": ([*CANDLES[:-1], CANDLES[-1][:4]], MissingColumnError), "one row": (CANDLES[0], NotATableError),
         "a word": ("candles", MissingColumnError), "nothing": (None, NotATableError), "a number": (5, NotATableError),
         "a gap": ([*CANDLES[:30], *CANDLES[31:]], GapError), "newest first": (CANDLES[::-1], UnsortedError),
         "twice": ([*CANDLES[:30], *CANDLES[29:]], DuplicateError), "another length": (CANDLES[::2], GapError),
         "small times": ([[k, *row[1:]] for k, row in enumerate(CANDLES)], TimestampError)}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_are_no_history_are_a_named_error_and_the_stream_is_kept(name):
    rows, error = WRONG[name]
    model = by_hand().warm_up(market())
    before = state(model)
    with pytest.raises(error) as caught:
        model.warm_up(rows)
    assert isinstance(caught.value, DataError) and caught.value.remedy and state(model) == before


# --- bars that have not closed ----------------------------------------------------------------------------------------


def test_the_running_bar_is_dropped_from_a_history_and_refused_by_decide_until_it_has_closed():
    now = NOW
    candles = market(end="2024-06-03 12:00")                          # closes at 16:00, and it is 14:00
    for history in (candles, rows_of(candles)):
        model = by_hand(clock=lambda: now)
        with pytest.warns(RuntimeWarning, match="2024-06-03 12:00:00 has not closed.*ends before it"):
            model.warm_up(history)
        assert state(model) == state(by_hand().warm_up(candles[:-1]))
    before = state(model)
    with pytest.raises(TimestampError, match="closes at 2024-06-03 16:00:00, and now it is 2024-06-03 14:00:00 UTC"):
        model.decide(*candles.iloc[-1], time="2024-06-03 12:00")
    assert state(model) == before
    now = datetime(2024, 6, 3, 15, 59, 56, tzinfo=timezone.utc)         # four seconds early: clocks differ
    assert not model.decide(*candles.iloc[-1], time="2024-06-03 12:00").reason


def test_bars_of_another_length_up_to_now_are_refused_for_their_length():
    hourly = market(end="2024-06-03 13:00", step=pd.Timedelta("1h"))
    for history in (hourly, rows_of(hourly)):
        with pytest.raises(GapError, match="60 minutes apart, those of the training data 240"):
            by_hand().warm_up(history)


def test_bars_of_the_future_are_refused():
    for later in ("2024-06-03 20:00", "2025-07-08 12:00"):
        with pytest.raises(TimestampError, match="has not closed"):
            by_hand().warm_up(market(end=later))
        with pytest.raises(TimestampError, match="has not closed"):
            by_hand().decide(*market().iloc[-1], time=later)


def test_a_market_with_sessions_only_refuses_times_in_the_future():
    """Its last bar of a day is shorter than the others, so its end is not known."""
    manager = FeatureManager("sessions")
    data = {"to": "2024-06-01T00:00:00+00:00", "interval_minutes": 1440.0, "calendar": "sessions"}
    payload = hand_made_payload() | {"range": {"low": [-100.0] * 12, "high": [100.0] * 12, "margin": 1.0}}
    model = restore_ensemble(payload, {"data": data}, manager, clock=lambda: NOW)
    candles = market(end="2024-06-03", step=pd.Timedelta("1D"))
    model.warm_up(candles[:-1])
    assert not model.decide(*candles.iloc[-1], time="2024-06-03").reason       # today's bar, after the close of the market
    with pytest.raises(TimestampError, match="lies in the future"):
        model.decide(*candles.iloc[-1], time="2024-06-04")


def test_a_replay_of_old_bars_does_not_depend_on_the_clock():
    candles = market(end="2010-01-01")
    model = by_hand(to="2010-01-01").warm_up(candles[:100])
    assert [model.decide(*bar, time=time).reason for time, bar in zip(candles.index[100:], candles.to_numpy()[100:])] == [""] * 200


# --- the same rules for tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, error, message", [
    (lambda f: f.set_axis(pd.date_range("2024-01-01", periods=300, freq="1h", tz="UTC")), GapError,
     "60 minutes apart, those of the training data 240"),
    (lambda f: f.drop(f.index[70]), GapError, "row 70 .* 480 minutes after the previous bar, the others 240"),
    (lambda f: f.iloc[::-1], UnsortedError, "row 1 .* older"),
    (lambda f: pd.concat([f[:100], f[99:]]), DuplicateError, "row 100 .* twice")], ids=["length", "gap", "order", "twice"])
def test_labelled_rows_follow_the_rules_of_the_stream(change, error, message):
    features = FeatureManager().generate_features(market())
    wrong, model = change(features), by_hand()
    labels = (wrong["returns_1"] > 0).astype(int)
    with pytest.raises(error, match=message):
        model.validate_predictions(wrong, labels)
    assert model.validate_predictions(features, (features["returns_1"] > 0).astype(int))["accuracy"] == 1.0


@pytest.fixture
def predict(tmp_path, monkeypatch, capsys):
    """The command `predict` on a file, with a version whose newest training bar is two days old."""
    store = ModelStore(tmp_path / "models")
    wide = {"low": [-100.0] * 12, "high": [100.0] * 12, "margin": 1.0}
    newest = datetime.now(timezone.utc) - timedelta(days=2)
    store.promote(restore_ensemble(hand_made_payload() | {"range": wide}).to_bytes(), {
        "created_at": newest.isoformat(), "data": {"to": newest.isoformat(), "interval_minutes": 240.0}})
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(store.root))

    def call(candles, *words):
        candles.rename_axis("time").to_csv(tmp_path / "candles.csv")
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", "predict", "--source", f"file:{tmp_path}/candles.csv", *words])
        code = command_line.run_command("--json" in words)
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if "--json" in words else printed.out + printed.err
    return call


def test_predict_leaves_out_the_running_bar_and_says_so(predict):
    newest = pd.Timestamp.now(tz="UTC").floor("4h")
    candles = market(end=newest)
    code, output = predict(candles, "--rows", "2", "--json")
    assert code == 0 and [row["time"] for row in output["predictions"]] == [
        (newest - 2 * STEP).isoformat(), (newest - STEP).isoformat()]
    assert len(output["notes"]) == 1 and "has not closed" in output["notes"][0] and "left out" in output["notes"][0]
    proba = by_hand().predict_proba(FeatureManager().generate_features(candles))[-3:-1, 1]
    assert [row["probabilities"]["1"] for row in output["predictions"]] == proba.round(6).tolist()
    assert "left out" in predict(candles)[1].replace("\n", " ")


@pytest.mark.parametrize("minutes", [60, 5])
def test_predict_refuses_bars_of_another_length(predict, minutes):
    step = pd.Timedelta(minutes=minutes)
    code, output = predict(market(end=pd.Timestamp.now(tz="UTC").floor(step) - step, step=step), "--json")
    assert code == 1 and output["error"] == "GapError"
    assert f"{minutes} minutes apart, those of the training data 240" in output["problem"]


def test_predict_refuses_bars_of_the_future(predict):
    code, output = predict(market(end=pd.Timestamp.now(tz="UTC").floor("4h") + pd.Timedelta("400D")), "--json")
    assert code == 1 and output["error"] in ("TimestampError", "DataError")


def test_predict_marks_bars_as_the_stream_does_and_names_old_ones(predict):
    _, output = predict(market(end="2020-05-01"), "--rows", "1", "--json")
    assert "days old (2020-05-01 00:00)" in output["notes"][0]
    assert "1 of 1 bars are not newer than the newest training bar" in output["notes"][1]
    assert output["predictions"][0]["reason"] == "" and output["predictions"][0]["probabilities"]["1"] is not None
    store = ModelStore()
    facts = store.current()
    facts["data"]["to"] = "2024-01-01T00:00:00+00:00"
    (store.production / "production_model_metadata.json").write_text(json.dumps(facts))
    code, output = predict(market(end=pd.Timestamp.now(tz="UTC").floor("4h") - STEP), "--rows", "2", "--json")
    assert code == 0
    for row in output["predictions"]:
        assert "days since the newest training bar, the limit is 14" in row["reason"]
        assert set(row["probabilities"].values()) == {None} and row["decision"] == 0
    assert "expired" in predict(market(end=pd.Timestamp.now(tz="UTC").floor("4h") - STEP))[1]


def test_the_age_of_the_diagnosis_and_of_the_description_is_that_of_the_newest_bar(store):
    now = store.clock()
    store.promote(by_hand().to_bytes(), {"created_at": now.isoformat(), "data": {"to": (now - timedelta(days=689)).isoformat()}})
    finding = next(f for f in diagnose(store).findings if f.part in ("age", "figures"))
    model = ProductionEnsemble(store=store)
    assert model.get_model_info()["newest_bar"][:10] == f"{now - timedelta(days=689):%Y-%m-%d}"
    assert "newest training bar" in model._repr_markdown_() and "expired: 689.0 days" in model.decide(1, 1, 1, 1, 1).reason
    assert finding.status == "fault"


@pytest.mark.parametrize("facts, ahead, status, seen", [
    ({}, timedelta(0), "fault", "contain no valid time"),
    ({"data": {"source": "file:candles.csv"}}, timedelta(0), "fault", "contain no valid time"),
    ({"created_at": "2025-09-01T00:00:00Z"}, timedelta(hours=2), "fault", "before training at 2025-09-01 00:00:00 UTC"),
    ({"created_at": "2025-08-01T00:00:00", "data": {"to": "2025-09-01T00:00:00Z"}}, timedelta(days=400), "fault",
     "the clock reads 2024-07-28 00:00:00 UTC, before the newest training bar at 2025-09-01 00:00:00 UTC"),
    ({"created_at": "2025-09-01T00:00:00Z"}, timedelta(minutes=30), "warning", "before training"),
    ({"created_at": "2025-09-01T00:00:00Z"}, timedelta(days=-1), "ok", "1.0 days since training"),
    ({"created_at": "2025-08-01T00:00:00"}, timedelta(0), "fault", "31.0 days since training")])
def test_the_diagnosis_knows_an_age_only_by_a_date_and_by_a_clock_after_it(tmp_path, facts, ahead, status, seen):
    store = ModelStore(tmp_path, clock=lambda: datetime(2025, 9, 1, tzinfo=timezone.utc) - ahead)
    store.promote(by_hand().to_bytes(), facts)
    finding = next(f for f in diagnose(store).findings if f.part == "age")
    assert finding.status == status and seen in finding.seen


# --- limits of the training range -------------------------------------------------------------------------------------


def inputs_of(candles):
    return scale_free(FeatureManager().generate_features(candles).iloc[49:].to_numpy())


def split(candles):
    """A 20 for 1 split that was not adjusted."""
    return candles.assign(**{name: candles[name] / np.where(np.arange(len(candles)) < 3000, 1, 20)
                             for name in ("open", "high", "low", "close")})


def bad_tick(candles):
    """One high a hundred times too high."""
    return candles.assign(high=candles["high"] * np.where(np.arange(len(candles)) == 2000, 100, 1))


@pytest.mark.parametrize("bar, seed", [("4h", 3), ("1h", 4), ("5min", 5)])
def test_the_range_of_an_ordinary_market_is_its_minimum_and_maximum(bar, seed):
    inputs = inputs_of(simulate_market(6000, seed=seed, bar=bar)[0])
    assert training_range(inputs, 1.0) == {"low": inputs.min(axis=0).tolist(), "high": inputs.max(axis=0).tolist(),
                                           "margin": 1.0}


@pytest.mark.parametrize("spoil", [split, bad_tick])
def test_a_split_or_a_bad_tick_does_not_widen_the_limits_without_bound(spoil):
    clean = simulate_market(6000, seed=3)[0]
    limits = lambda inputs: dict(zip(INPUT_NAMES, range_limits(training_range(inputs, 1.0))))
    before, after, inputs = limits(inputs_of(clean)), limits(inputs_of(spoil(clean))), inputs_of(spoil(clean))
    widest = dict(zip(INPUT_NAMES, range_limits({"low": inputs.min(axis=0), "high": inputs.max(axis=0), "margin": 1.0})))
    assert after["returns_1"] == pytest.approx(before["returns_1"], rel=0.2)
    assert after["atr/close"][1] < 0.6 < widest["atr/close"][1]
    assert after["returns_1"][0] > -0.5 and (spoil is bad_tick or widest["returns_1"][0] < -1)


@pytest.mark.parametrize("spoil", [split, bad_tick])
def test_a_version_trained_beside_outliers_opens_and_abstains_on_them_only(spoil):
    candles, settings = spoil(simulate_market(6000, seed=3)[0]), load_settings(["n_estimators=5"])
    data = make_training_set(FeatureManager(), candles, forward_return_labels(candles, classes=2), 2)
    learners = fit_all(data, make_learners(settings.learners.model_dump(), 1))
    weights = settings.ensemble.weights.model_dump()
    model = make_ensemble(data, learners, weights, 0.5)
    abstained = np.isnan(model.predict_proba(data.features)[:, 0])
    assert 0 < abstained.sum() < 120 and parity_error(model, data, learners, weights) < 1e-5


def test_a_market_that_mostly_stands_still_keeps_its_rare_moves():
    still = np.zeros((2000, 1))
    still[::40] = np.linspace(-0.02, 0.02, 50)[:, None]
    assert training_range(still, 1.0)["high"] == [0.02]
    assert training_range(np.append(still, [[-0.95]], axis=0), 1.0)["low"] == [-0.02]
    assert training_range(np.ones((10, 1)), 1.0) == {"low": [1.0], "high": [1.0], "margin": 1.0}
