"""Serving: decisions bar by bar equal the backtest, belong to one version, and are withheld where nobody can know."""
import copy
import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from scratch import clean_environment, run
from sklearn.metrics import accuracy_score, f1_score, log_loss

from ml_ensemble import FeatureManager, ProductionEnsemble, compiled_trees, inference
from ml_ensemble import ensemble as serving
from ml_ensemble.base_learners import make_learners
from ml_ensemble.config import load_settings
from ml_ensemble.core import (ColumnTypeError, ConfigError, DuplicateError, FeatureError, GapError, HighLowError,
                              InfiniteValueError, IntegrityError, MissingValueError, ModelNotFoundError,
                              NegativeValueError, StoreError, TimestampError, UnsafeModelError, UnsortedError,
                              ValidationError)
from ml_ensemble.custom_features import custom_feature
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.inference import BatchGraph, decide_rows, range_violation, run_graph
from ml_ensemble.live import Decision
from ml_ensemble.indicators import COMPILE_FROM
from ml_ensemble.labels import forward_return_labels
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.model_file import read_payload
from ml_ensemble.onnx_export import to_full_onnx
from ml_ensemble.training import fit_all, make_ensemble, trained_proba
from ml_ensemble.tree_graph import READERS
from ml_ensemble.walk_forward import make_training_set
from ml_ensemble.versioning import METADATA_FILE, MODEL_FILE, ModelStore

SETTINGS = load_settings(["n_estimators=40", "learning_rate=0.05"])
WEIGHTS = SETTINGS.ensemble.weights.model_dump()
CALIBRATIONS = {"none": {"kind": "none"}, "platt": {"kind": "platt", "slope": 1.3, "offset": -0.2},
                "isotonic": {"kind": "isotonic", "x": [0.2, 0.4, 0.5, 0.7], "y": [0.1, 0.35, 0.6, 0.9]}}


def learn(candles, classes=2, manager=None, seed=1):
    """A training set and learners fitted on it."""
    manager = manager or FeatureManager()
    data = make_training_set(manager, candles, forward_return_labels(candles, classes=classes), classes)
    return data, fit_all(data, make_learners(SETTINGS.learners.model_dump(), seed))


@cache
def sandbox_learned(classes, seed):
    return learn(simulate_market(3000, seed=3)[0], classes, seed=seed)


def sandbox_ensemble(classes=2, seed=1, calibration="none", threshold=0.45, **limits):
    data, learners = sandbox_learned(classes, seed)
    return make_ensemble(data, learners, WEIGHTS, threshold, calibration=CALIBRATIONS[calibration], **limits)


@pytest.fixture(scope="module")
def model():
    return sandbox_ensemble()


@pytest.fixture(scope="module")
def features(model):
    return FeatureManager().generate_features(simulate_market(3000, seed=3)[0])


def bars(candles):
    return list(zip(*(candles[name].tolist() for name in ("open", "high", "low", "close", "volume"))))


def word(number):
    return {-1: "sell", 0: "hold", 1: "buy"}[int(number)]


# --- decide equals the backtest ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sp500_learned(sp500):
    """Learned on the older half, so that the newer half holds bars out of the known range."""
    manager = FeatureManager("sessions")
    return {classes: learn(sp500.iloc[:2500], classes, manager) for classes in (2, 3)}


@pytest.mark.parametrize("classes, calibration", [(2, "none"), (2, "platt"), (2, "isotonic"), (3, "none")])
def test_a_replay_of_5000_real_bars_equals_the_batch_bit_by_bit(sp500, sp500_learned, classes, calibration):
    data, learners = sp500_learned[classes]
    made = make_ensemble(data, learners, WEIGHTS, 0.4, calibration=CALIBRATIONS[calibration], max_age_days=1e4,
                         range_margin=0.1)
    metadata = {"data": {"to": data.features.index[-1].isoformat(), "calendar": "sessions"}, "version": "20200101-0001"}
    model = restore_ensemble(read_payload(made.to_bytes()), metadata)
    history = sp500.iloc[-5000:]
    assert len(history) == 5000
    table = FeatureManager("sessions").generate_features(history)
    proba, decisions = model.predict_proba(table), model.predict(table)
    answers = [model.decide(*bar, time=time) for bar, time in zip(bars(history), history.index)]
    assert np.array([answer.probabilities for answer in answers]).tobytes() == proba.tobytes()
    assert np.array([answer.probability for answer in answers]).tobytes() == proba[:, -1].tobytes()
    assert [answer.decision for answer in answers] == [word(decision) for decision in decisions]
    withheld = [answer for answer in answers if answer.reason]
    assert [a.reason[:8] for a in withheld[:49]] == ["warm-up:"] * 49 and len(withheld) > 49    # and some out of range
    assert all(a.reason.startswith("outside the training range") for a in withheld[49:])
    assert all(math.isnan(a.probability) and a.decision == "hold" for a in withheld)
    alone = [model.predict_one(row, time=history.index[0]) for row in table.to_numpy()[49:]]
    assert [a.probabilities for a in alone if not a.reason] == [a.probabilities for a in answers if not a.reason]
    assert {a.version for a in answers} == {"20200101-0001"} and len({a.decision for a in answers}) >= 2


def test_prices_multiplied_by_a_thousand_give_the_same_probabilities(model):
    candles = simulate_market(600, seed=8)[0]
    dear = candles.assign(**{name: candles[name] * 1000 for name in ("open", "high", "low", "close")})
    first, second = model.predict_proba(FeatureManager().generate_features(candles)), \
        model.predict_proba(FeatureManager().generate_features(dear))
    assert np.isfinite(first[49:]).all()
    np.testing.assert_allclose(second, first, atol=1e-6)
    one, other = sandbox_ensemble(), sandbox_ensemble()
    for cheap, costly in zip(bars(candles), bars(dear)):
        here, there = one.decide(*cheap), other.decide(*costly)
        assert here.reason == there.reason and (here.reason or abs(here.probability - there.probability) < 1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("piece", [1, 7, 512, 10_000])
def test_a_prediction_does_not_depend_on_the_batch_or_the_thread(features, threads, piece, monkeypatch):
    for calibration in CALIBRATIONS:
        model = sandbox_ensemble(calibration=calibration)
        expected = model.predict_proba(features, threads=1)
        with monkeypatch.context() as patch:
            patch.setattr(inference, "_CHUNK_ROWS", piece)
            assert model.predict_proba(features, threads=threads).tobytes() == expected.tobytes()


def test_warm_up_gives_the_state_of_the_bars_one_by_one(model):
    candles = simulate_market(300, seed=5)[0]
    by_bar, by_table = sandbox_ensemble(), sandbox_ensemble()
    for bar, time in zip(bars(candles[:200]), candles.index):
        by_bar.decide(*bar, time=time)
    assert by_table.warm_up(candles[:200]) is by_table
    for bar, time in zip(bars(candles[200:]), candles.index[200:]):
        assert by_table.decide(*bar, time=time) == by_bar.decide(*bar, time=time)
    with pytest.raises(HighLowError):
        by_table.warm_up(candles.assign(high=1.0))
    assert by_table.decide(*bars(candles)[-1]).reason == ""          # the history before is still there
    by_table.warm_up(candles[:10])
    assert by_table.decide(*bars(candles)[10]).reason == "warm-up: 11 of 49 bars"


# --- abstention -------------------------------------------------------------------------------------------------------

DATED = {"created_at": datetime.now(timezone.utc).isoformat()}     # metadata without a date give no predictions
MADE = datetime(2025, 9, 1, tzinfo=timezone.utc)
NO_DATE = "cannot determine model age: the metadata contain neither data.to nor created_at"
LIMIT = datetime(2025, 9, 13, 20, tzinfo=timezone.utc)       # 14 days after the newest training bar


def dated(clock, **more):
    payload = read_payload(sandbox_ensemble().to_bytes())
    metadata = {"version": "20250901-0001", "created_at": "2025-09-01T00:00:00Z",
            "data": {"to": "2025-08-30T20:00:00+00:00"}}
    return restore_ensemble(payload, {**metadata, **more}, clock=lambda: clock)


@pytest.mark.parametrize("time, clock, more, said", [
    (None, LIMIT, {}, ""),
    (None, LIMIT + timedelta(minutes=15), {}, "expired: 14.0 days since the newest training bar, the limit is 14"),
    (None, MADE + timedelta(days=14), {"data": {}}, ""),
    (None, MADE + timedelta(days=14, minutes=15), {"data": {}}, "expired: 14.0 days since training, the limit is 14"),
    (None, MADE - timedelta(hours=1), {}, ""),
    (None, MADE - timedelta(hours=1, minutes=1), {}, "cannot determine model age: the clock reads 2025-08-31 22:59:00 UTC, "
     "before training at 2025-09-01 00:00:00 UTC"),
    (None, LIMIT - timedelta(days=15), {"created_at": None}, "cannot determine model age: the clock reads 2025-08-29 20:00:00 "
     "UTC, before the newest training bar at 2025-08-30 20:00:00 UTC"),
    (None, datetime(1970, 1, 1, tzinfo=timezone.utc), {"data": {}}, "cannot determine model age: the clock reads 1970-01-01 "
     "00:00:00 UTC, before training at 2025-09-01 00:00:00 UTC"),
    ("2024-01-01T00:00:00Z", MADE + timedelta(days=99), {}, ""),                   # a bar before the training: a replay
    (None, MADE, {"data": {"to": "2023-10-13T00:00:00Z"}}, "expired: 689.0 days since the newest training bar, the limit is 14"),
    ("2025-09-13T20:00:00Z", MADE + timedelta(days=99), {}, ""),
    ("2025-09-13T20:00:01Z", MADE + timedelta(days=99), {}, "expired: 14.0 days since the newest training bar, the limit is 14"),
    ("2025-09-16T00:00:00Z", MADE + timedelta(days=99), {"data": {}}, "expired: 15.0 days since training, the limit is 14"),
    (None, MADE + timedelta(days=99), {"created_at": None, "data": {}}, NO_DATE),
    ("2025-09-13T20:00:00Z", MADE + timedelta(days=99), {"created_at": None, "data": {"to": None, "source": "file:x"}}, NO_DATE)])
def test_the_age_of_a_model_is_counted_in_bars_or_by_the_clock(features, time, clock, more, said):
    model, row = dated(clock, **more), features.iloc[100]
    same = [time and datetime.fromisoformat(time), time and np.datetime64(time[:-1]), time and pd.Timestamp(time)]
    for moment in same:
        answer = model.predict_one(row, time=moment)
        assert answer.reason == said and math.isnan(answer.probability) == bool(said)
        assert not said or (answer.decision, answer.version) == ("hold", "20250901-0001")
    assert ("always: no valid time" in model._repr_markdown_()) == (said == NO_DATE)
    assert model.decide(100, 101, 99, 100, 5, time=same[0]).reason == (said or "warm-up: 1 of 49 bars")
    assert np.isfinite(model.predict_proba(features)[49:]).all()          # a backtest may look anywhere


def test_age_limit_and_margin_are_read_from_the_artefact(features):
    strict = sandbox_ensemble(max_age_days=3, range_margin=0.0)
    info = strict.get_model_info()
    assert info["max_age_days"] == 3.0 and info["range_margin"] == 0.0
    assert info["expires_at"] == {"clock": None, "bars": None}
    expires = dated(MADE).get_model_info()["expires_at"]
    assert expires == {"clock": "2025-09-13T20:00:00Z", "bars": "2025-09-13T20:00:00Z"}
    assert np.isfinite(strict.predict_proba(features)[49:-1]).all()       # the training bars themselves are in range
    other = FeatureManager().generate_features(simulate_market(1500, seed=4)[0])
    withheld = lambda model: np.isnan(model.predict_proba(other)[49:, 0]).sum()
    assert withheld(strict) > withheld(sandbox_ensemble()) == 0


def test_every_column_has_limits_on_both_sides_and_they_are_inclusive():
    model = sandbox_ensemble()
    names, limits = model._state.loaded.payload["view"], model._state.loaded.limits
    data, _ = sandbox_learned(2, 1)
    lowest, highest = (np.array(side) for side in zip(*limits))
    from ml_ensemble.feature_manager import scale_free
    inputs = scale_free(data.features)
    width = inputs.max(axis=0) - inputs.min(axis=0)
    np.testing.assert_allclose(lowest, inputs.min(axis=0) - width, rtol=1e-6)
    np.testing.assert_allclose(highest, inputs.max(axis=0) + width, rtol=1e-6)
    for k, name in enumerate(names):
        middle = inputs[100].copy()
        for value, inside in ((lowest[k], True), (highest[k], True), (np.nextafter(lowest[k], -np.inf), False),
                              (np.nextafter(highest[k], np.inf), False), (np.nan, False)):
            middle[k] = value
            reason = range_violation(model._state.loaded, middle)
            assert (reason == "") == inside and (inside or reason.startswith(f"outside the training range: {name} is"))


@pytest.mark.parametrize("name, value", [("returns_1", 3.0), ("atr_14", 0.0), ("close", 0.0), ("ema_50", 1e-9),
                                         ("volume_ratio", 1e300), ("macd", -1e307)])
def test_an_implausible_row_gives_an_abstention_one_by_one_and_in_a_table(model, features, name, value):
    row = features.iloc[100].copy()
    row[name] = value
    answer, table = model.predict_one(row), model.predict_proba(row.to_frame().T.reset_index(drop=True))
    if name == "atr_14":            # distances measured in it are 0, the rest is as it was: an answer, the same one
        assert answer.probabilities == tuple(table[0]) or (math.isnan(answer.probability) and np.isnan(table).all())
    else:
        assert answer.decision == "hold" and "outside" in answer.reason and np.isnan(table).all()
        assert model.predict(row.to_frame().T)[0] == 0


def test_a_decision_is_immutable_and_complete(model, features):
    answer = model.predict_one(features.iloc[100])
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.decision = "buy"
    said = word(answer.probability >= 0.45)
    assert answer == Decision(answer.probability, said, "", "unversioned", answer.probabilities)
    assert answer.probabilities[1] == answer.probability and abs(sum(answer.probabilities) - 1) < 1e-6
    assert json.dumps(dataclasses.asdict(answer))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bar, error", [
    ((math.nan, 101, 99, 100, 5), MissingValueError), ((100, math.inf, 99, 100, 5), InfiniteValueError),
    ((100, 101, -1, 100, 5), NegativeValueError), ((100, 101, 99, 100, -5), NegativeValueError),
    ((100, 99, 101, 100, 5), HighLowError), ((100, 101, 99, "abc", 5), ColumnTypeError),
    ((100, 101, 99, True, 5), ColumnTypeError), ((100, 101, 99, None, 5), ColumnTypeError)])
def test_an_invalid_bar_is_a_named_error_and_leaves_the_stream_unchanged(bar, error):
    candles = simulate_market(120, seed=5)[0]
    model, untouched = sandbox_ensemble().warm_up(candles[:-1]), sandbox_ensemble().warm_up(candles[:-1])
    with pytest.raises(error):
        model.decide(*bar, time=candles.index[-1])
    last = bars(candles)[-1]
    assert model.decide(*last, time=candles.index[-1]) == untouched.decide(*last, time=candles.index[-1])


@pytest.mark.parametrize("hours, error", [(0, DuplicateError), (-4, UnsortedError), (8, GapError), (2, GapError)])
def test_a_bar_out_of_order_is_a_named_error_and_leaves_the_stream_unchanged(hours, error):
    candles = simulate_market(120, seed=5)[0]
    model, untouched = sandbox_ensemble().warm_up(candles[:-1]), sandbox_ensemble().warm_up(candles[:-1])
    newest, last = candles.index[-2], bars(candles)[-1]
    with pytest.raises(error, match="is refused"):
        model.decide(*last, time=newest + pd.Timedelta(hours=hours))
    for wrong in ("yesterday", 3600, True, pd.NaT, np.datetime64("NaT")):
        with pytest.raises(TimestampError):
            model.decide(*last, time=wrong)
    assert model.decide(*last, time=candles.index[-1]) == untouched.decide(*last, time=candles.index[-1])


def test_a_market_that_closes_may_skip_bars_but_not_their_order(sp500, sp500_learned):
    data, learners = sp500_learned[2]
    model = make_ensemble(data, learners, WEIGHTS, 0.5).warm_up(sp500.iloc[:100])
    assert model._state.loaded.manager.calendar == "sessions"
    last = bars(sp500)[100]
    with pytest.raises(DuplicateError):
        model.decide(*last, time=sp500.index[99])
    assert model.decide(*last, time=sp500.index[99] + pd.Timedelta("9D")).reason == ""


WRONG_ROWS = {
    "too few": (lambda row: row.tolist()[:11], FeatureError), "too many": (lambda row: [*row, 1.0], FeatureError),
    "two rows": (lambda row: [row.tolist()] * 2, FeatureError),
    "three dimensions": (lambda row: np.zeros((1, 1, 12)), FeatureError),
    "text": (lambda row: ["1"] * 12, FeatureError), "mixed": (lambda row: [*row[:11], "1"], FeatureError),
    "truth": (lambda row: [True] * 12, FeatureError), "complex": (lambda row: row.to_numpy() + 0j, FeatureError),
    "times": (lambda row: np.zeros(12, "M8[s]"), FeatureError), "a mapping": (dict, FeatureError),
    "nothing": (lambda row: None, FeatureError), "the order": (lambda row: row[::-1], FeatureError),
    "a missing name": (lambda row: row.drop("macd"), FeatureError),
    "another name": (lambda row: row.rename({"macd": "mcad"}), FeatureError),
    "infinity": (lambda row: [*row[:11], math.inf], InfiniteValueError),
    "a hole": (lambda row: [*row[:3], math.nan, *row[4:]], MissingValueError)}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_row_that_does_not_fit_is_a_named_error(model, features, name):
    make, error = WRONG_ROWS[name]
    wrong = make(features.iloc[100].copy())
    with pytest.raises(error):
        model.predict_one(wrong)
    if name not in ("two rows", "a hole"):          # a table may hold many rows, and begin with a warm-up
        with pytest.raises(error):
            model.predict_proba(wrong)


def test_every_shape_of_one_row_gives_the_same_prediction(model, features):
    row = features.iloc[100]
    table = features.iloc[[100]]
    values = row.to_numpy()
    kinds = (row, table, values, values.tolist(), tuple(row), [values], values.astype(object), np.float64(values))
    assert len({model.predict_one(kind) for kind in kinds}) == 1
    row = features.iloc[100].copy()
    row.attrs["fingerprint"] = "0" * 64
    with pytest.raises(FeatureError, match="made by definition 0000"):
        model.predict_one(row)


def test_rows_of_a_warm_up_are_distinguished_from_rows_with_missing_values(model, features):
    for row in features.to_numpy()[:49]:
        answer = model.predict_one(row)
        assert answer.reason.startswith("warm-up: ") and answer.decision == "hold" and math.isnan(answer.probability)
    assert model.predict_one(features.iloc[49]).reason == ""


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_threads_are_a_whole_number(model, features, threads):
    with pytest.raises(ConfigError, match="the minimum is 1"):
        model.predict_proba(features, threads=threads)


# --- following production ---------------------------------------------------------------------------------------------


def test_a_file_in_place_of_the_models_folder_is_a_named_error(tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ModelNotFoundError, match="ML_ENSEMBLE_MODELS"):
        ProductionEnsemble(store=ModelStore(tmp_path / "models"))


def test_reload_replaces_the_version_and_keeps_the_stream(store):
    first, second = sandbox_ensemble(seed=1), sandbox_ensemble(seed=2)
    store.promote(first.to_bytes(), DATED)
    model = ProductionEnsemble(store=store)
    candles = simulate_market(100, seed=5)[0]
    model.warm_up(candles[:-1])
    assert model.reload_if_changed() is False
    promoted = store.promote(second.to_bytes(), DATED)["version"]
    assert model.reload_if_changed() is True and model.reload_if_changed() is False
    answer = model.decide(*bars(candles)[-1], time=candles.index[-1])
    assert answer.version == promoted and not answer.reason
    assert answer.probability == second.warm_up(candles[:-1]).decide(*bars(candles)[-1]).probability
    store.rollback("worse")
    assert model.reload_if_changed() is True and model.get_model_info()["version"] != promoted


def test_nothing_is_read_while_nothing_changes(store, monkeypatch):
    store.promote(sandbox_ensemble().to_bytes(), DATED)
    model = ProductionEnsemble(store=store)
    monkeypatch.setattr(serving, "read_signed", lambda *path: pytest.fail("the metadata was read"))
    assert model.reload_if_changed() is False
    store.promote(sandbox_ensemble(seed=2).to_bytes(), DATED)
    with pytest.raises(pytest.fail.Exception):
        model.reload_if_changed()


def spoil(kind, store, good):
    if kind == "damaged":
        version = store.promote(good, DATED)["version"]
        for path in (store.production / MODEL_FILE, store.archive / f"production_ensemble_{version}.pkl"):
            path.write_bytes(b"x" * 100)
        return IntegrityError
    if kind == "hostile":
        store.promote(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", {})
        return UnsafeModelError
    if kind == "canary":
        payload = read_payload(good)
        table = payload["canary"]["probabilities"]
        wrong = {**payload, "canary": {**payload["canary"], "probabilities": [[0.5, 0.5]] * len(table)}}
        store.promote(pickled(wrong), DATED)
        return IntegrityError
    if kind == "other features":
        store.promote(pickled({**read_payload(good), "fingerprint": "0" * 64}), DATED)
        return FeatureError
    path = store.production / METADATA_FILE
    path.unlink() if kind == "gone" else path.write_text("{")
    return ModelNotFoundError if kind == "gone" else IntegrityError


def pickled(payload):
    import pickle

    class AsEnsemble:
        def __reduce__(self):
            return restore_ensemble, (payload,)
    return pickle.dumps(AsEnsemble(), protocol=5)


@pytest.mark.parametrize("kind", ["damaged", "hostile", "canary", "other features", "gone", "no metadata"])
def test_an_invalid_new_version_is_reported_each_time_and_the_old_one_keeps_serving(store, features, kind):
    good = sandbox_ensemble().to_bytes()
    version = store.promote(good, DATED)["version"]
    model = ProductionEnsemble(store=store)
    before = model.predict_one(features.iloc[100])
    error = spoil(kind, store, sandbox_ensemble(seed=2).to_bytes())
    for _ in range(2):
        with pytest.raises(error):
            model.reload_if_changed()
        assert model.predict_one(features.iloc[100]) == before and before.version == version
    mended = store.promote(sandbox_ensemble(seed=2).to_bytes(), DATED)["version"]
    assert model.reload_if_changed() is True and model.predict_one(features.iloc[100]).version == mended


def test_during_a_promotion_the_version_named_by_the_metadata_is_served(store, features):
    store.promote(sandbox_ensemble().to_bytes(), DATED)
    model = ProductionEnsemble(store=store)
    named = store.promote(sandbox_ensemble(seed=2).to_bytes(), DATED)["version"]
    (store.production / MODEL_FILE).write_bytes(sandbox_ensemble(seed=3).to_bytes())   # the next one, without metadata
    assert model.reload_if_changed() is True
    answer, expected = (who.predict_one(features.iloc[100]) for who in (model, sandbox_ensemble(seed=2)))
    assert answer.version == named and answer.probability == expected.probability


def test_only_an_ensemble_that_follows_production_reloads(store):
    version = store.promote(sandbox_ensemble().to_bytes(), DATED)["version"]
    by_path = ProductionEnsemble.load(store.production / MODEL_FILE)
    for pinned in (ProductionEnsemble(version, store=store), by_path, sandbox_ensemble()):
        with pytest.raises(StoreError, match="fixed version"):
            pinned.reload_if_changed()


@custom_feature(window=[3, 0], unit="ratio")
def spread_4(bars):
    "highest high over lowest low of 4 bars, minus 1"
    return bars.high.max() / bars.low.min() - 1


def test_a_new_definition_of_the_features_starts_a_new_stream(store):
    candles = simulate_market(1500, seed=3)[0]
    wide = FeatureManager(custom=[spread_4])
    data, learners = learn(candles, manager=wide)
    store.promote(sandbox_ensemble().to_bytes(), DATED)
    model = ProductionEnsemble(store=store).warm_up(candles[:100])
    store.promote(make_ensemble(data, learners, WEIGHTS, 0.5).to_bytes(), DATED)
    with pytest.raises(FeatureError, match="custom features spread_4"):
        model.reload_if_changed()
    assert model.decide(*bars(candles)[100]).reason == ""
    assert model.reload_if_changed(features=wide) is True
    assert model.get_feature_names()[-1] == "spread_4"
    assert model.decide(*bars(candles)[101]).reason == "warm-up: 1 of 49 bars"
    assert model.reload_if_changed() is False


@pytest.mark.untraced
@pytest.mark.slow
def test_80_000_decisions_on_8_threads_each_come_from_one_version_during_50_promotions(store, features):
    """Half of them from rows, half from the shared stream, whose bars are so even that each version has one answer."""
    rows = features.to_numpy()[60:260]
    even, still = (100.0, 101.0, 99.0, 100.0, 5.0), 3000
    expected, versions, files = {}, {}, [sandbox_ensemble(seed=seed) for seed in (1, 2)]
    for which in range(len(files)):
        single = sandbox_ensemble(seed=which + 1)
        settled = [single.decide(*even) for _ in range(still)]
        assert settled[-1] == settled[-1000] and not settled[-1].reason
        expected[which] = [single.predict_one(row).probability for row in rows], settled[-1].probability
    assert expected[0][1] != expected[1][1] and all(a != b for a, b in zip(expected[0][0], expected[1][0]))
    files = [file.to_bytes() for file in files]
    versions[store.promote(files[0], DATED)["version"]] = 0
    model = ProductionEnsemble(store=store)
    for _ in range(still):
        model.decide(*even)
    answers, errors, swaps, swapped = [[] for _ in range(8)], [], 0, threading.Event()

    def decide(mine):
        try:
            while len(mine) < 10_000 or not swapped.is_set():
                k = len(mine) // 2 % 200
                mine.append((k, model.predict_one(rows[k])))
                mine.append((None, model.decide(*even)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=decide, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()
    for swap in range(50):
        versions[store.promote(files[(swap + 1) % 2], DATED)["version"]] = (swap + 1) % 2
        swaps += model.reload_if_changed()
    swapped.set()
    for thread in threads:
        thread.join()
    assert not errors and swaps == 50 and min(map(len, answers)) >= 10_000
    for row, answer in (pair for mine in answers for pair in mine):
        by_row, settled = expected[versions[answer.version]]
        assert answer.probability == (settled if row is None else by_row[row]) and not answer.reason
    assert len({answer.version for mine in answers for _, answer in mine}) >= 49


FORK = """
import os, pickle, signal, sys, threading
from ml_ensemble import ProductionEnsemble
model = ProductionEnsemble.load(sys.argv[1])
bar = (100.0, 101.0, 99.0, 100.0, 5.0)
for _ in range(100):
    model.decide(*bar)
row = model._state.loaded.payload["canary"]["features"][0]
expected, done = model.predict_one(row), threading.Event()
def busy():
    while not done.is_set():
        model.decide(*bar); model.predict_one(row)
threads = [threading.Thread(target=busy) for _ in range(4)]
for thread in threads: thread.start()
failed = 0
for _ in range(30):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        answers = [model.decide(*bar) for _ in range(5)]
        right = model.predict_one(row) == expected and all(a.reason[:7] in ("", "warm-up") for a in answers)
        os._exit(0 if right else 3)
    failed += os.waitpid(child, 0)[1] != 0
done.set()
for thread in threads: thread.join()

inside, leave = threading.Event(), threading.Event()
def hold():
    with model._state.feed.lock:
        inside.set(); leave.wait()
holder = threading.Thread(target=hold); holder.start(); inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if model.decide(*bar).reason == "warm-up: 1 of 49 bars" else 4)
failed += os.waitpid(child, 0)[1] != 0
leave.set(); holder.join()
print("failed:", failed, model.decide(*bar).reason == "")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_decides_even_if_other_threads_held_locks(tmp_path):
    (tmp_path / "model.pkl").write_bytes(sandbox_ensemble().to_bytes())
    # Without coverage, whose own lock stays closed in a child forked while another thread records a line.
    done = run(sys.executable, "-c", FORK, tmp_path / "model.pkl", env=clean_environment())
    assert done.stdout.strip() == "failed: 0 True", done.stderr


def test_the_live_path_imports_nothing_heavy(store):
    store.promote(sandbox_ensemble(calibration="platt").to_bytes(), {"created_at": "2025-09-01T00:00:00Z"})
    script = """
import json, sys
from datetime import datetime
from ml_ensemble import FeatureManager, ProductionEnsemble
model = ProductionEnsemble()
for k in range(60):
    answer = model.decide(100 + k % 7, 110, 90, 100 + k % 5, 5.0, time=datetime(2025, 9, 1, k // 4 % 24, k % 4 * 15))
model.predict_one([float(v) for v in model._state.loaded.payload["canary"]["features"][0]])
model.reload_if_changed(); model.get_model_info(); repr(model)
print(json.dumps([answer.decision, sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          env={**os.environ, "ML_ENSEMBLE_MODELS": str(store.root)})
    _, loaded = json.loads(done.stdout)
    heavy = {"pandas", "sklearn", "lightgbm", "xgboost", "pydantic", "numba", "onnx", "scipy", "yaml", "pickletools"}
    assert heavy & set(loaded) == set() and "onnxruntime" in loaded


# --- the artefact answers as the learners -----------------------------------------------------------------------------


def rows_around_splits(learners, inputs, outputs, count, rng):
    """Rows of the view, and rows placed on each split of each learner and one float32 step to either side."""
    splits = [(feature, threshold) for name, learner in learners.items() for tree in READERS[name](learner, outputs)
              for feature, threshold in zip(tree.feature, tree.threshold) if feature >= 0]
    on = np.repeat(np.array([float(threshold) for _, threshold in splits], dtype=np.float32), 3).reshape(-1, 3)
    on[:, 0], on[:, 2] = np.nextafter(on[:, 0], np.float32(-np.inf)), np.nextafter(on[:, 2], np.float32(np.inf))
    placed = inputs[rng.integers(0, len(inputs), 3 * len(splits))]
    placed[np.arange(len(placed)), np.repeat([feature for feature, _ in splits], 3)] = on.ravel()
    drawn = np.column_stack([rng.choice(inputs[:, column], count) for column in range(inputs.shape[1])])
    return np.concatenate([placed, drawn])[:count], len(placed)


@pytest.mark.parametrize("classes, calibration", [(2, "none"), (2, "platt"), (2, "isotonic"), (3, "none")])
def test_100_000_rows_also_on_and_beside_every_split_get_the_learners_probabilities(classes, calibration):
    data, learners = sandbox_learned(classes, 1)
    model = sandbox_ensemble(classes, calibration=calibration)
    rows, placed = rows_around_splits(learners, data.inputs, 1 if classes == 2 else 3, 100_000, np.random.default_rng(5))
    assert len(rows) == 100_000 > placed > 3000
    loaded = model._state.loaded
    ours, batch = (run_graph(loaded, graph, rows) for graph in (loaded.graph, loaded.graph.for_rows(len(rows))))
    assert batch.tobytes() == ours.tobytes() and loaded.graph.for_rows(1) is not loaded.graph      # compiled, same bits
    theirs = trained_proba(learners, rows, WEIGHTS, CALIBRATIONS[calibration])
    assert np.abs(ours - theirs).max() < 1e-6
    if classes == 2:
        clear = np.abs(theirs[:, 1] - 0.45) > 1e-6
    else:
        ranked = np.sort(theirs, axis=1)
        clear = ranked[:, -1] - ranked[:, -2] > 2e-6
    said = decide_rows(model._state.loaded, theirs)
    assert (decide_rows(model._state.loaded, ours) == said)[clear].all()
    assert clear.mean() > 0.999 and len(np.unique(said)) >= 2


@pytest.mark.untraced
def test_compiled_trees_give_the_bits_of_decide_on_100_000_rows():
    data, learners = sandbox_learned(2, 1)
    loaded = sandbox_ensemble(calibration="platt")._state.loaded
    rows, _ = rows_around_splits(learners, data.inputs, 1, 100_000, np.random.default_rng(6))
    batch = run_graph(loaded, loaded.graph.for_rows(len(rows)), rows)
    one_by_one = np.concatenate([run_graph(loaded, loaded.graph, rows[row:row + 1]) for row in range(len(rows))])
    assert batch.tobytes() == one_by_one.tobytes()


def test_predictions_of_many_rows_are_equal_with_and_without_numba(monkeypatch):
    data, _ = sandbox_learned(2, 1)
    features = np.tile(data.features.to_numpy(), (COMPILE_FROM // len(data) + 1, 1))
    found = []
    for loop in (compiled_trees.compiled_loop, lambda: None):
        monkeypatch.setattr(compiled_trees, "compiled_loop", loop)
        model = sandbox_ensemble(calibration="platt")
        found.append(model.predict_proba(features))
        assert isinstance(model._state.loaded.graph.for_rows(len(features)), BatchGraph) == (len(found) == 1)
    assert found[0].tobytes() == found[1].tobytes()
    assert [model.predict_one(row).probabilities for row in features[:100]] == [tuple(row) for row in found[0][:100].tolist()]


# --- figures, information, export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_of_labelled_rows_equal_those_of_scikit_learn(classes):
    model = sandbox_ensemble(classes)
    candles = simulate_market(900, seed=21)[0]
    labels = forward_return_labels(candles, classes=classes)["label"]
    table = FeatureManager().generate_features(candles).loc[labels.index]
    found = model.validate_predictions(table, labels)
    proba = model.predict_proba(table)
    known = np.isfinite(proba[:, 0])
    truth, said, p = labels[known], model.predict(table)[known], proba[known]
    shares = truth.value_counts(normalize=True).sort_index().to_numpy()
    p = p / p.sum(axis=1, keepdims=True)            # float32 sums to 1 within 1e-7, about which scikit-learn complains
    prior = log_loss(truth, np.tile(shares, (len(truth), 1)))
    assert found["rows"] == len(table) and found["abstained"] == (~known).sum() >= 49
    assert found["log_loss"] == pytest.approx(log_loss(truth, p))
    assert found["log_loss_prior"] == pytest.approx(prior)
    assert found["skill"] == pytest.approx(1 - log_loss(truth, p) / prior)
    assert found["weighted_f1"] == pytest.approx(f1_score(truth, said, average="weighted"))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))
    json.dumps(found, allow_nan=False)


def test_labels_that_do_not_fit_are_named_errors(model, features):
    labels = pd.Series(0, index=features.index)
    assert model.validate_predictions(features, labels)["skill"] is None           # one class only: there is no skill
    for wrong, message in ((labels[:-1], "2999"), (labels.astype(float).where(labels.index != labels.index[7]), "row 7"),
                        (labels + 2, "classes are"), (labels.astype(str), "classes are"),
                        (labels.shift(freq="4h"), "different indexes"), (np.zeros((3000, 2), int), r"shape \(3000, 2\)")):
        with pytest.raises(ValidationError, match=message):
            model.validate_predictions(features, wrong)
    with pytest.raises(ValidationError, match="abstains on all 49"):
        model.validate_predictions(features[:49], labels[:49])


def test_the_information_is_complete_json_and_a_table(store):
    store.promote(sandbox_ensemble(calibration="platt").to_bytes(), {"created_at": "2025-09-01T00:00:00Z"})
    model = ProductionEnsemble(store=store)
    info = model.get_model_info()
    json.dumps(info, allow_nan=False)
    assert info["size_bytes"] == (store.production / MODEL_FILE).stat().st_size > info["graph_bytes"] > 10_000
    assert info["expires_at"]["clock"] == "2025-09-15T00:00:00Z" and len(info["range_limits"]) == 12
    shown = model._repr_markdown_()
    for part in (info["version"], "platt", "0 hold, 1 buy, buy from 0.45", "2025-09-15", "extended by 1 of its width"):
        assert part in shown
    assert "never: no metadata" in sandbox_ensemble()._repr_markdown_()


@pytest.mark.parametrize("change", [{"created_at": "yesterday"}, {"created_at": 7}, {"data": {"to": "later"}}])
def test_a_model_whose_metadata_has_unreadable_times_abstains(features, change):
    model = restore_ensemble(read_payload(sandbox_ensemble().to_bytes()), change)
    for time in (None, datetime(2025, 1, 1)):
        answer = model.predict_one(features.iloc[100], time=time)
        assert answer.decision == "hold" and "is not a valid time" in answer.reason and math.isnan(answer.probability)
    assert np.isfinite(model.predict_proba(features)[49:]).all()


def test_the_exported_graph_takes_raw_features_and_equals_predict_proba(features):
    raw = np.concatenate([features.to_numpy()[49:], features.to_numpy()[100:130] * 1.0])
    raw[-30:, 2] = np.linspace(-3, 3, 30)                         # returns from far below to far above the known range
    for classes, calibration in ((2, "none"), (2, "platt"), (2, "isotonic"), (3, "none")):
        model = sandbox_ensemble(classes, calibration=calibration)
        graph = to_full_onnx(model._state.loaded)
        onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
        proba, decision = onnxruntime.InferenceSession(graph).run(None, {"features": raw})
        expected = model.predict_proba(raw)
        assert np.isnan(expected[-30:]).any() and np.isfinite(expected[:-30]).all()
        np.testing.assert_allclose(proba, expected, atol=1e-6)
        clear = np.isnan(expected[:, -1]) | (np.abs(expected[:, -1] - 0.45) > 1e-6 if classes == 2 else
                                             np.ptp(np.sort(expected, axis=1)[:, 1:], axis=1) > 1e-6)
        np.testing.assert_array_equal(decision[clear], model.predict(raw)[clear])


def test_the_exported_graph_passes_custom_features_through_and_lists_them():
    wide = FeatureManager(custom=[spread_4])
    candles = simulate_market(1500, seed=3)[0]
    data, learners = learn(candles, manager=wide)
    model = make_ensemble(data, learners, WEIGHTS, 0.5)
    session = onnxruntime.InferenceSession(to_full_onnx(model._state.loaded))
    raw = data.features.to_numpy()
    assert session.get_inputs()[0].shape[1] == 13
    np.testing.assert_allclose(session.run(None, {"features": raw})[0], model.predict_proba(raw), atol=1e-6)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["features"])[-1] == {"name": "spread_4", "unit": "ratio", "bars_back": 3,
                                                "formula": "highest high over lowest low of 4 bars, minus 1"}
    assert metadata["fingerprint"] == wide.fingerprint and json.loads(metadata["classes"]) == [0, 1]
    assert "float64" in metadata["how_to_feed"]


# --- what a stranger broke --------------------------------------------------------------------------------------------


def told_rhythm():
    """A model that knows it learned from bars of four hours."""
    data = {"interval_minutes": 240.0, "calendar": "continuous", "to": "2099-01-01T00:00:00+00:00"}
    return restore_ensemble(read_payload(sandbox_ensemble().to_bytes()), {"data": data, "version": "20990101-0001"})


def test_bars_of_another_length_are_refused():
    model, candles = told_rhythm(), simulate_market(300, seed=8)[0]
    with pytest.raises(GapError, match="480 minutes apart, those of the training data 240"):
        model.warm_up(candles.iloc[::2])
    assert model.warm_up(candles.iloc[:200]).decide(*bars(candles)[200], time=candles.index[200]).reason == ""


def test_a_bar_without_a_time_counts_as_the_next_one():
    model, candles = told_rhythm(), simulate_market(300, seed=8)[0]
    rows, times = bars(candles), candles.index
    model.warm_up(candles.iloc[:200]).decide(*rows[200])
    with pytest.raises(GapError, match="247 minutes after the previous bar, the others are 240"):
        model.decide(*rows[201], time=times[201] + timedelta(minutes=7))
    assert model.decide(*rows[201], time=times[201]).reason == ""


def test_a_pickled_copy_keeps_its_version_and_its_age_limit():
    model = told_rhythm()
    row = FeatureManager().generate_features(simulate_market(300, seed=8)[0]).to_numpy()[-1]
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert again.get_model_info() == model.get_model_info()
        late = datetime(2100, 1, 1, tzinfo=timezone.utc)
        assert "expired" in again.predict_one(row, time=late).reason
    assert read_payload(model.to_bytes()) == read_payload(sandbox_ensemble().to_bytes())
