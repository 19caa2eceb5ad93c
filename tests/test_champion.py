"""The record as lived: who was in production at each bar, and the comparison that grows over promotions."""
import numpy as np
import pandas as pd
import pytest
from conftest import hand_made_payload
from hypothesis import given
from hypothesis import strategies as st

from ml_ensemble.champion import (changed_meaning, compare_recipes, compare_with_record, lived_record, meaning, meaning_of,
                                  production_periods)
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.evaluation import OutOfSample
from ml_ensemble.feature_manager import FeatureManager
from ml_ensemble.labels import forward_return_labels
from ml_ensemble.market_data import simulate_market
from ml_ensemble.versioning import ModelStore

CANDLES, _ = simulate_market(700, seed=4)
MANAGER = FeatureManager()
FEATURES = MANAGER.generate_features(CANDLES).iloc[60:-2]
BARS = FEATURES.index
LABELS = {"method": "forward_return", "horizon": 1, "threshold": 0.003, "classes": 2, "entry": "next_open"}
DATA = {"labels": LABELS, "source": "sandbox", "interval_minutes": 240.0}
TODAY = meaning(DATA, MANAGER.fingerprint, [0, 1])
MODEL = restore_ensemble(hand_made_payload() | {"range": {"low": [-1e9] * 12, "high": [1e9] * 12, "margin": 1.0}},
                         features=MANAGER).to_bytes()


class Clock:
    """A clock that is set by hand."""
    def __init__(self, now="2026-01-01"):
        self.now = pd.Timestamp(now, tz="UTC")

    def __call__(self):
        return self.now.to_pydatetime()


def promote(store, row, **data):
    """A version that learned up to bar `row`."""
    facts = {"data": {**DATA, "to": BARS[row].isoformat(), **data}, "fingerprint": MANAGER.fingerprint, "classes": [0, 1]}
    return store.promote(MODEL, facts)["version"]


def challenger(p) -> OutOfSample:
    y = forward_return_labels(CANDLES)["label"].loc[BARS].to_numpy()
    prior = np.tile([1 - y.mean(), y.mean()], (len(y), 1))
    return OutOfSample(BARS, y, np.column_stack([1 - p, p]), prior, np.ones(len(y), int), np.roll(y, 1))


def hand_made(features=FEATURES):
    """What the hand-made model says."""
    return 1 / (1 + np.exp(-100 * features["returns_1"].to_numpy()))


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 500), st.integers(0, 9)), min_size=1, max_size=9))
def test_each_bar_belongs_to_the_version_in_production_then_and_none_has_seen_its_bars(steps, tmp_path_factory):
    clock = Clock()
    store, learned, events = ModelStore(tmp_path_factory.mktemp("models"), clock=clock), {}, []
    for rollback, row, pick in steps:
        if rollback and len(learned) > 1:
            version = sorted(learned)[pick % len(learned)]
            clock.now = BARS[row]
            store.rollback("test", version)
            events.append((version, "rollback", row))
        else:
            clock.now = pd.Timestamp("2026-01-01", tz="UTC")
            version = promote(store, row)
            learned[version] = row
            events.append((version, "promotion", row))
    owner, since = {}, -1                                  # by brute force: bar by bar, event by event
    for version, kind, row in events:
        since = max(since, learned[version], row if kind == "rollback" else -1)
        owner.update(dict.fromkeys(range(since + 1, len(BARS)), version))
    record = lived_record(store, FEATURES, MANAGER, TODAY)
    assert dict(zip(BARS.get_indexer(record.time).tolist(), record.version.tolist())) == owner
    assert all(row > learned[version] for row, version in owner.items())
    periods = production_periods(store, BARS[-1])
    assert all(a.end == b.start for a, b in zip(periods, periods[1:])) and periods[-1].end is None


def test_evidence_grows_with_every_promotion_until_it_is_enough(store):
    oos, seen = challenger(hand_made()), []
    for week in range(8):
        promote(store, 100 + 42 * week)
        until = FEATURES.iloc[:100 + 42 * (week + 1) + 1]
        seen.append(compare_with_record(oos, lived_record(store, until, MANAGER, TODAY), 1, 250, replications=200))
    assert [c.rows for c in seen] == [42 * (week + 1) for week in range(8)]
    assert [c.low is None for c in seen] == [True] * 5 + [False] * 3
    assert "42 bars were lived by 1 version so far; 250 are needed: about 5 more weeks" in seen[0].note
    assert seen[0].weeks_needed == pytest.approx((250 - 42) / 42, rel=0.01)
    assert seen[-1].difference == pytest.approx(0, abs=1e-5) and "8 versions" in seen[-1].note     # the very same forecasts


def test_the_record_holds_what_each_version_predicts(store):
    promote(store, 100)
    record = lived_record(store, FEATURES, MANAGER, TODAY)
    np.testing.assert_allclose(record.proba[:, 1], hand_made(FEATURES.loc[record.time]), atol=1e-6)


def test_a_worse_challenger_is_told_from_an_equal_one(store):
    promote(store, 100)
    record = lived_record(store, FEATURES, MANAGER, TODAY)
    surer = 1 / (1 + np.exp(-300 * FEATURES["returns_1"].to_numpy()))           # and wrong more often than not
    worse = compare_with_record(challenger(surer), record, 1, 250, replications=300)
    noise = np.clip(hand_made() + np.random.default_rng(0).normal(0, 0.02, len(BARS)), 0.01, 0.99)
    equal = compare_with_record(challenger(noise), record, 1, 250, replications=300)
    assert worse.high < 0 and worse.difference < -0.1 and equal.low < 0 < equal.high
    assert compare_recipes(challenger(hand_made()), challenger(surer), horizon=1, replications=200).low > 0


def test_a_damaged_version_leaves_a_gap_with_its_reason(store):
    first, second, third = promote(store, 100), promote(store, 150), promote(store, 200)
    next(store.archive.glob(f"*ensemble_{second}.pkl")).write_bytes(b"damaged")
    next(store.archive.glob(f"*metadata_{first}.json")).write_text("{")
    record = lived_record(store, FEATURES, MANAGER, TODAY)
    assert set(record.version) == {third} and len(record.gaps) == 2
    assert record.gaps[0].startswith(f"{first} (151 bars)") and second in record.gaps[1]
    assert "left out" in compare_with_record(challenger(hand_made()), record, 1, 250, replications=200).note


@pytest.mark.parametrize("changed, words", [
    ({"labels": {**LABELS, "threshold": 0.005}}, "labels.threshold 0.005 -> 0.003"),
    ({"labels": {k: v for k, v in LABELS.items() if k != "entry"}}, "labels.entry close -> next_open"),
    ({"source": "file:other.csv"}, "market file:other.csv -> sandbox"), ({"interval_minutes": 60.0}, "minutes of a bar 60.0 -> 240.0")])
def test_a_version_that_decided_something_else_is_named_and_not_compared(store, changed, words):
    version = promote(store, 100, **changed)
    assert changed_meaning(meaning_of(store.current()), TODAY) == [words]
    record = lived_record(store, FEATURES, MANAGER, TODAY)
    assert len(record.time) == 0 and words in record.gaps[0] and version in record.gaps[0]
    assert "no bar is newer" in compare_with_record(challenger(hand_made()), record, 1, 250).note


def test_an_empty_store_and_a_history_without_facts_give_an_empty_record(store):
    assert production_periods(store, BARS[-1]) == [] and len(lived_record(store, FEATURES, MANAGER, TODAY).time) == 0
    store.record("promotion", version="20250901-0001")           # its archive is gone
    record = lived_record(store, FEATURES, MANAGER, TODAY)
    assert len(record.time) == 0
