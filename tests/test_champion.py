"""The record as lived: who was in production at each bar, and the comparison that grows over promotions."""
import json
import numpy as np
import onnx
import pandas as pd
import pytest
from conftest import hand_made_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_ensemble.champion import compare_recipes, compare_with_record, production_periods, production_record
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.walk_forward import Predictions
from ml_ensemble.feature_manager import FeatureManager
from ml_ensemble.labels import forward_return_labels
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.store_records import changed_meaning, decision_settings, meaning
from ml_ensemble.versioning import ModelStore, archived

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


def promote(store, row, model=MODEL, **data):
    """A version that learned up to bar `row`."""
    facts = {"data": {**DATA, "to": BARS[row].isoformat(), **data}, "fingerprint": MANAGER.fingerprint, "classes": [0, 1]}
    return store.promote(model, facts)["version"]


def shifted(offset) -> bytes:
    """The hand-made model with `offset` added to its log odds."""
    payload = hand_made_payload() | {"range": {"low": [-1e9] * 12, "high": [1e9] * 12, "margin": 1.0}}
    p = odds(np.array(payload["canary"]["probabilities"])[:, 1], offset)
    payload["canary"]["probabilities"] = np.column_stack([1 - p, p]).tolist()
    payload["calibration"] = {"kind": "platt", "slope": 1.0, "offset": float(offset)}
    return restore_ensemble(payload, features=MANAGER).to_bytes()


def odds(p, offset):
    """A probability with `offset` added to its log odds."""
    return 1 / (1 + np.exp(-np.log(p / (1 - p)) - offset))


SHIFTED = [shifted(offset) for offset in range(10)]


def challenger(p) -> Predictions:
    y = forward_return_labels(CANDLES)["label"].loc[BARS].to_numpy()
    prior = np.tile([1 - y.mean(), y.mean()], (len(y), 1))
    return Predictions(time=BARS, y=y, proba=np.column_stack([1 - p, p]), prior=prior, fold=np.ones(len(y), int),
                       previous=np.roll(y, 1))


def hand_made(features=FEATURES):
    """What the hand-made model says."""
    return 1 / (1 + np.exp(-100 * features["returns_1"].to_numpy()))


@settings(max_examples=50)
@given(steps=st.lists(st.tuples(st.sampled_from(["promotion", "rollback", "rollback in a replay"]), st.integers(0, 500),
                                st.integers(0, 9)), min_size=1, max_size=9))
def test_bars_belong_to_the_version_in_production_and_no_version_is_scored_on_its_training_bars(steps, tmp_path_factory):
    clock = Clock()
    store, learned, events = ModelStore(tmp_path_factory.mktemp("models"), clock=clock), {}, []
    for kind, row, pick in steps:
        clock.now = BARS[row] if kind == "rollback" else pd.Timestamp("2026-01-01", tz="UTC")
        if kind == "promotion" or len(learned) < 2:
            version = promote(store, row, SHIFTED[len(learned)])
            learned[version] = row
            events.append((version, row))                       # from this bar on, whatever was there
        else:
            version = list(learned)[pick % len(learned)]
            store.rollback("test", version)
            before = events[-1][1]                              # a rollback does not come before what it takes back
            events.append((version, max(before, row) if kind == "rollback" else before))
    owner = {}                                                  # by brute force: each bar asks the events, newest first
    for bar in range(len(BARS)):
        version = next((version for version, since in reversed(events) if bar > since), None)
        if version is not None and bar > learned[version]:
            owner[bar] = version
    record = production_record(store, FEATURES, MANAGER, TODAY)
    rows = BARS.get_indexer(record.time)
    assert dict(zip(rows.tolist(), record.version.tolist())) == owner and record.gaps == ()
    assert all(row > learned[version] for row, version in zip(rows, record.version))
    offset = np.array([list(learned).index(version) for version in record.version])
    np.testing.assert_allclose(record.proba[:, 1], odds(hand_made()[rows], offset), atol=1e-5)      # its own forecasts
    periods = production_periods(store, BARS[-1])
    assert all(a.end == b.start for a, b in zip(periods, periods[1:])) and periods[-1].end is None


def test_evidence_grows_with_every_promotion_until_it_is_enough(store):
    oos, seen = challenger(hand_made()), []
    for week in range(8):
        promote(store, 100 + 42 * week)
        until = FEATURES.iloc[:100 + 42 * (week + 1) + 1]
        seen.append(compare_with_record(oos, production_record(store, until, MANAGER, TODAY), 1, 250, replications=200))
    assert [c.rows for c in seen] == [42 * (week + 1) for week in range(8)]
    assert [c.low is None for c in seen] == [True] * 5 + [False] * 3
    assert "42 bars of 1 production version so far; 250 are needed: about 5 more weeks" in seen[0].note
    assert seen[0].weeks_needed == pytest.approx((250 - 42) / 42, rel=0.01)
    assert [c.versions for c in seen] == list(range(1, 9))
    assert seen[-1].difference == pytest.approx(0, abs=1e-5) and "8 versions" in seen[-1].note     # the very same forecasts


def test_the_record_holds_what_each_version_predicts(store):
    promote(store, 100)
    record = production_record(store, FEATURES, MANAGER, TODAY)
    np.testing.assert_allclose(record.proba[:, 1], hand_made(FEATURES.loc[record.time]), atol=1e-6)


def test_a_worse_challenger_is_distinguished_from_an_equal_one(store):
    promote(store, 100)
    record = production_record(store, FEATURES, MANAGER, TODAY)
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
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert set(record.version) == {third} and len(record.gaps) == 2
    assert record.gaps[0].startswith(f"{first} (151 bars)") and second in record.gaps[1]
    assert "omitted" in compare_with_record(challenger(hand_made()), record, 1, 250, replications=200).note


@pytest.mark.parametrize("changed, words", [
    ({"labels": {**LABELS, "threshold": 0.005}}, "labels.threshold 0.005 -> 0.003"),
    ({"labels": {k: v for k, v in LABELS.items() if k != "entry"}}, "labels.entry close -> next_open"),
    ({"source": "file:other.csv"}, "market file:other.csv -> sandbox"), ({"interval_minutes": 60.0}, "minutes of a bar 60.0 -> 240.0")])
def test_a_version_with_a_different_decision_meaning_is_named_and_not_compared(store, changed, words):
    version = promote(store, 100, **changed)
    assert changed_meaning(decision_settings(store.current()), TODAY) == [words]
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert len(record.time) == 0 and words in record.gaps[0] and version in record.gaps[0]
    assert "no bar has a comparable production version" in compare_with_record(challenger(hand_made()), record, 1, 250).note


def test_an_empty_store_and_a_history_without_metadata_give_an_empty_record(store):
    assert production_periods(store, BARS[-1]) == [] and len(production_record(store, FEATURES, MANAGER, TODAY).time) == 0
    store.record("promotion", version="20250901-0001")           # its archive is gone
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert len(record.time) == 0


def test_after_a_rollback_bars_are_assigned_to_the_restored_version(tmp_path):
    clock = Clock()
    store = ModelStore(tmp_path, clock=clock)
    first, second = promote(store, 100, shifted(1)), promote(store, 200, shifted(-1))
    clock.now = BARS[230]
    store.rollback("worse", first)
    record = production_record(store, FEATURES, MANAGER, TODAY)
    rows = {version: BARS.get_indexer(record.time[record.version == version]).tolist() for version in (first, second)}
    assert rows == {first: [*range(101, 201), *range(231, len(BARS))], second: [*range(201, 231)]}
    for version, offset in ((first, 1), (second, -1)):         # and each row is what that version predicts, not another
        lived = record.version == version
        np.testing.assert_allclose(record.proba[lived, 1], odds(hand_made(FEATURES.loc[record.time[lived]]), offset), atol=1e-6)


def test_in_a_replay_a_rollback_counts_from_the_newest_bar_of_what_it_replaced(store):
    first, _ = promote(store, 100), promote(store, 200)
    store.rollback("worse")                                     # by a clock long after the last bar
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert set(record.version) == {first} and len(record.time) == len(BARS) - 101


@pytest.mark.parametrize("facts", [
    {"data": "lost"}, {"data": None}, {"data": {"to": "now"}}, {"data": {"to": 5}}, {}, {"classes": 2},
    {"data": {**DATA, "labels": ["horizon"], "to": BARS[50].isoformat()}}, {"fingerprint": None}])
def test_incomplete_metadata_gives_a_reason_and_no_error(store, facts):
    whole = {"data": {**DATA, "to": BARS[50].isoformat()}, "fingerprint": MANAGER.fingerprint, "classes": [0, 1]}
    odd = store.promote(MODEL, whole if facts else {})["version"]
    good = promote(store, 100)
    path = archived(store, odd)[1]                              # a promotion would refuse most of these
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert set(record.version) == {good} and len(record.gaps) == 1 and odd in record.gaps[0]
    assert "unreadable metadata" in record.gaps[0] or "not recorded" in record.gaps[0] or "classes [] ->" in record.gaps[0]


def test_a_model_with_other_classes_than_its_metadata_is_left_out(store):
    payload = hand_made_payload()
    graph = onnx.load_model_from_string(payload["model"])
    graph.graph.node.insert(3, onnx.helper.make_node("Mul", ["q", "half"], ["h"]))
    graph.graph.initializer.append(onnx.helper.make_tensor("half", onnx.TensorProto.FLOAT, [1], [0.5]))
    del graph.graph.node[-1].input[:]
    graph.graph.node[-1].input.extend(["h", "h", "p"])
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, [None, 3]))
    p = np.array(payload["canary"]["probabilities"])
    payload |= {"model": graph.SerializeToString(), "classes": [-1, 0, 1]}
    payload["canary"]["probabilities"] = np.column_stack([p[:, 0] / 2, p[:, 0] / 2, p[:, 1]]).tolist()
    three, two = promote(store, 100, restore_ensemble(payload).to_bytes()), promote(store, 200)
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert set(record.version) == {two} and "the classes in model file and metadata differ" in record.gaps[0] and three in record.gaps[0]


def test_the_order_of_events_is_that_of_their_sequence_and_not_of_their_lines(store):
    for row in (100, 200, 300):
        promote(store, row)
    before, history = production_record(store, FEATURES, MANAGER, TODAY), store.archive / "history.jsonl"
    history.write_text("\n".join(history.read_text().splitlines()[::-1]) + "\n")
    after = production_record(store, FEATURES, MANAGER, TODAY)
    assert after.version.tolist() == before.version.tolist() and len(set(after.version)) == 3


def test_the_record_survives_the_loss_of_the_history(store):
    """The archived metadata has each promotion as well; a staged version was never in production."""
    first, second = promote(store, 100), promote(store, 200)
    store.stage(MODEL, store.current())
    (store.archive / "history.jsonl").unlink()
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert set(record.version) == {first, second} and record.gaps == ()


def test_times_without_a_zone_are_utc_and_no_bars_are_no_error(store):
    promote(store, 100)
    aware, naive = (production_record(store, table, MANAGER, TODAY) for table in (FEATURES, FEATURES.tz_localize(None)))
    assert naive.time.equals(aware.time) and len(naive.time) == len(BARS) - 101
    assert len(production_record(store, FEATURES.iloc[:0], MANAGER, TODAY).time) == 0


def test_a_first_version_has_nothing_to_be_compared_with(store):
    nothing = compare_with_record(challenger(hand_made()), production_record(store, FEATURES, MANAGER, TODAY), 1, 250)
    assert (nothing.rows, nothing.low, nothing.note) == (0, None, "first version: nothing in production to compare with")
    promote(store, len(BARS) - 1)
    none_yet = compare_with_record(challenger(hand_made()), production_record(store, FEATURES, MANAGER, TODAY), 1, 250)
    assert none_yet.note.startswith("no bar is newer than the training data of the version in production; 250 are needed")


def test_a_note_names_the_newest_gaps_and_counts_the_others(store):
    versions = [promote(store, row, source="file:other.csv") for row in range(100, 105)]
    note = compare_with_record(challenger(hand_made()), production_record(store, FEATURES, MANAGER, TODAY), 1, 250).note
    assert note.endswith("and 2 earlier ones") and [version in note for version in versions] == [False, False, True, True, True]


def test_the_last_week_of_waiting_is_one_week(store):
    promote(store, len(BARS) - 1 - 230)
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert "230 bars of 1 production version so far; 250 are needed: about 1 more week" == compare_with_record(
        challenger(hand_made()), record, 1, 250).note


def test_a_replay_on_older_bars_starts_the_record_of_these_bars_anew(store):
    versions = [promote(store, row) for row in (50, 400, 100, 142, 184)]       # to bar 400, then again from bar 100 on
    record = production_record(store, FEATURES.iloc[:227], MANAGER, TODAY)
    lived = {version: int((record.version == version).sum()) for version in versions}
    assert list(lived.values()) == [50, 0, 42, 42, 42]


def test_training_bars_of_a_restored_version_are_left_out(tmp_path):
    clock = Clock()
    store = ModelStore(tmp_path, clock=clock)
    newer, older = promote(store, 300), promote(store, 100)
    clock.now = BARS[200]
    store.rollback("the newer one after all", newer)
    record = production_record(store, FEATURES, MANAGER, TODAY)
    rows = {version: BARS.get_indexer(record.time[record.version == version]).tolist() for version in (older, newer)}
    assert rows == {older: [*range(101, 201)], newer: [*range(301, len(BARS))]}


def test_after_a_rollback_of_this_morning_the_last_week_stays_with_the_version_that_was_in_production(tmp_path):
    clock = Clock()
    clock.now = BARS[-1] + pd.Timedelta("3h")                   # live: hours after the newest bar
    store = ModelStore(tmp_path / "models", clock=clock)
    first, second = promote(store, 100), promote(store, 500)
    store.rollback("worse", first)
    record = production_record(store, FEATURES, MANAGER, TODAY)
    assert set(record.version[record.time > BARS[500]]) == {second}
