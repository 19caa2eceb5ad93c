"""The 12 features against TA-Lib, and what makes them safe: causal, the same in batch and stream, light to import."""
import copy
import functools
import json
import pickle
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import talib
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ml_ensemble import candles as candles_module
from ml_ensemble import core, feature_manager, indicators
from ml_ensemble.candles import VALUE_RULES, all_valid, fault_of, ohlcv_rules
from ml_ensemble.core import FeatureError
from ml_ensemble.custom_features import CustomFeature, custom_feature
from ml_ensemble.feature_manager import FEATURE_NAMES, FeatureManager, FeatureStream, scale_free
from ml_ensemble.indicators import WARMUP, compute

OHLCV = ["open", "high", "low", "close", "volume"]


def oracle(high, low, close, volume) -> np.ndarray:
    """The features by TA-Lib's own functions."""
    upper, middle, lower = talib.BBANDS(close, 20, 2, 2)
    macd, signal, _ = talib.MACD(close)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.column_stack([
            close, volume, talib.ROCP(close, 1), talib.RSI(close, 14), macd, signal, talib.ATR(high, low, close, 14),
            (close - lower) / (upper - lower), talib.EMA(close, 20), talib.EMA(close, 50),
            volume / talib.SMA(volume, 20), (close - middle) / talib.STDDEV(close, 20)])


@pytest.mark.parametrize("market", ["nasdaq", "sp500", "sandbox"])
def test_every_column_equals_talib_from_its_first_defined_bar(market, request):
    candles = request.getfixturevalue(market)
    made = FeatureManager("sessions").generate_features(candles)
    wanted = oracle(*(candles[name].to_numpy() for name in OHLCV[1:]))
    assert (made.isna().to_numpy() == np.isnan(wanted)).all()
    for column, name in enumerate(FEATURE_NAMES):
        got, want = made[name].to_numpy()[WARMUP:], wanted[WARMUP:, column]
        # A difference of two averages has no more correct digits than the averages themselves.
        scale = made["close"].to_numpy()[WARMUP:] if name.startswith("macd") else 1.0
        near_zero = {"bb_position", "zscore", "returns_1"}
        atol = 1e-9 if name in near_zero else 1e-12 * np.max(scale)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=atol, err_msg=name)


@st.composite
def series(draw):
    """High, low, close, volume with quiet stretches, jumps and bars without trade."""
    n = draw(st.integers(60, 160))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    moves = rng.normal(0, draw(st.sampled_from([0.001, 0.01, 0.2])), n)
    moves *= rng.random(n) > draw(st.sampled_from([0.0, 0.5]))
    close = draw(st.sampled_from([0.05, 100.0, 5e6])) * np.exp(np.cumsum(moves))
    spread = draw(st.sampled_from([0.0, 1.0]))     # 0: every bar has one price
    high, low = close * (1 + spread * rng.exponential(0.003, n)), close * (1 - spread * rng.random(n) * 0.01)
    volume = rng.lognormal(2, 1, n) * (rng.random(n) > draw(st.sampled_from([0.0, 0.3])))
    return high, low, close, volume


@settings(max_examples=1000, deadline=None)
@given(series())
def test_plotted_series_equal_talib(bars):
    high, low, close, volume = bars
    made, wanted = compute(*bars), oracle(*bars)
    np.testing.assert_array_equal(made[:, :3], wanted[:, :3])
    for column in (3, 6, 8, 9):
        np.testing.assert_allclose(made[:, column], wanted[:, column], rtol=1e-9)
    # A difference of two averages has no more correct digits than the averages themselves.
    np.testing.assert_allclose(made[:, 4:6], wanted[:, 4:6], rtol=1e-9, atol=1e-12 * close.max())
    # TA-Lib sums squares of prices: its digits are gone where the deviation is small against the price.
    deviation = exact_deviation(close)
    steady = deviation[19:] ** 2 > 1e-5 * close.max() ** 2
    for column in (7, 11):
        np.testing.assert_allclose(made[19:, column][steady], wanted[19:, column][steady], rtol=1e-9, atol=1e-9)
    # TA-Lib's running sum of volumes keeps the rounding of the largest it has seen.
    traded = talib.SMA(volume, 20)[19:] > 1e-3 * volume.max()
    np.testing.assert_allclose(made[19:, 10][traded], wanted[19:, 10][traded], rtol=1e-9)
    assert np.isfinite(made[WARMUP:]).all()


@settings(max_examples=300, deadline=None)
@given(series())
def test_plotted_series_equal_the_definition_where_talib_loses_precision(bars):
    high, low, close, volume = bars
    made, exact = compute(*bars)[19:], exact_windows(close)
    flat = exact_deviation(close)[19:] == 0
    assert (made[flat, 7] == 0.5).all() and (made[flat, 11] == 0).all()
    law = 1e-14 * (np.ptp(close) / np.where(flat, np.inf, exact_deviation(close)[19:])) ** 2
    assert (np.abs(made[:, 11] - exact) <= 1e-9 + law).all()
    np.testing.assert_allclose(made[:, 7], 0.5 + made[:, 11] / 4, rtol=1e-12, atol=1e-12)
    windows = np.lib.stride_tricks.sliding_window_view(volume.astype(np.longdouble), 20)
    share = np.divide(windows[:, -1], windows.mean(axis=1), out=np.zeros(len(windows)), where=windows.any(axis=1))
    np.testing.assert_allclose(made[:, 10], share.astype(float), rtol=1e-9)


def test_degenerate_windows_have_their_stated_values():
    flat, quiet = np.full(80, 123.456), np.zeros(80)
    row = compute(flat, flat, flat, quiet)[-1]
    assert dict(zip(FEATURE_NAMES, row)) == {
        "close": 123.456, "volume": 0.0, "returns_1": 0.0, "rsi_14": talib.RSI(flat, 14)[-1],
        "macd": pytest.approx(0, abs=1e-9), "macd_signal": pytest.approx(0, abs=1e-9),
        "atr_14": 0.0, "bb_position": 0.5, "ema_20": pytest.approx(123.456), "ema_50": pytest.approx(123.456),
        "volume_ratio": 0.0, "zscore": 0.0}


def test_no_feature_looks_ahead(sandbox):
    """The last row over a prefix is that row of the whole, bit for bit; a poisoned future changes nothing before it."""
    candles = sandbox.iloc[:260]
    whole = FeatureManager().generate_features(candles).to_numpy()
    for t in range(len(candles)):
        assert FeatureManager().generate_features(candles.iloc[:t + 1]).to_numpy()[-1].tobytes() == whole[t].tobytes()
    poisoned = candles.copy()
    poisoned.iloc[200:] *= 1e6
    assert FeatureManager().generate_features(poisoned).to_numpy()[:200].tobytes() == whole[:200].tobytes()


@settings(max_examples=25)
@given(series(), st.integers(0, 159))
def test_the_stream_equals_the_batch_bit_for_bit_also_over_a_restart(bars, stop):
    high, low, close, volume = bars
    assume((low <= close).all() and (close <= high).all())
    whole, stream = compute(*bars), FeatureManager().stream()
    for t in range(len(close)):
        if t == stop:
            stream = FeatureStream.from_json(stream.to_json())
        assert stream.step(close[t], high[t], low[t], close[t], volume[t]).tobytes() == whole[t].tobytes()


def test_the_compiled_loop_equals_plain_python_bit_for_bit(nasdaq):
    bars = [nasdaq[name].to_numpy() for name in OHLCV[1:]]
    assert compute(*bars, compile=True).tobytes() == compute(*bars, compile=False).tobytes()


@pytest.mark.parametrize("prices, volumes", [(1000.0, 1.0), (1e-6, 37.0), (3.7, 0.01)])
def test_scale_free_inputs_do_not_depend_on_the_price_level(sandbox, prices, volumes):
    scaled = sandbox.copy()
    scaled[OHLCV[:4]] *= prices
    scaled["volume"] *= volumes
    inputs = lambda candles: scale_free(FeatureManager().generate_features(candles).to_numpy())[WARMUP:]
    np.testing.assert_allclose(inputs(scaled), inputs(sandbox), rtol=1e-9, atol=1e-9)


def spoil(candles: pd.DataFrame, row: int, column: str, value) -> pd.DataFrame:
    spoiled = candles.copy()
    spoiled.iloc[row, spoiled.columns.get_loc(column)] = value
    return spoiled


FAULTS = {
    "NaN": (lambda c: spoil(c, 7, "close", np.nan), core.MissingValueError, "row 7 (1999-01-04 11:00:00): close is nan"),
    "infinite": (lambda c: spoil(c, 7, "volume", np.inf), core.InfiniteValueError, "row 7"),
    "infinite price": (lambda c: spoil(c, 7, "high", np.inf), core.InfiniteValueError, "row 7"),
    "price 0": (lambda c: spoil(c, 7, "low", 0.0), core.NegativeValueError, "row 7"),
    "negative volume": (lambda c: spoil(c, 7, "volume", -1.0), core.NegativeValueError, "row 7"),
    "high below low": (lambda c: spoil(c, 7, "high", 1e-3), core.HighLowError, "row 7"),
    "low above close": (lambda c: spoil(c, 7, "low", 1e9), core.HighLowError, "row 7"),
    "unsorted": (lambda c: c.iloc[[0, 1, 3, 2, *range(4, len(c))]], core.UnsortedError, "row 3"),
    "duplicate": (lambda c: c.iloc[[0, 1, 1, *range(2, len(c))]], core.DuplicateError, "row 2"),
    "gap": (lambda c: c.drop(c.index[7]), core.GapError, "row 7"),
    "no time": (lambda c: c.set_axis(c.index.where(c.index != c.index[7])), core.TimestampError, "row 7 (NaT)"),
    "rows by number": (lambda c: c.reset_index(drop=True), core.TimestampError, "RangeIndex"),
    "durations": (lambda c: c.set_axis(c.index - c.index[0]), core.TimestampError, "TimedeltaIndex"),
    "column missing": (lambda c: c.drop(columns="open"), core.MissingColumnError, "missing column 'open'"),
    "column twice": (lambda c: pd.concat([c, c["low"]], axis=1), core.MissingColumnError, "'low' (2 occurrences)"),
    "text": (lambda c: c.astype({"close": object}).assign(close="dear"), core.ColumnTypeError, "column close"),
    "empty": (lambda c: c.iloc[:0], core.EmptyDataError, "no rows"),
    "no table": (lambda c: c.to_numpy(), core.NotATableError, "ndarray"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["short", "compiled", "one of many"])
def test_invalid_candles_raise_a_named_error_with_the_row(sandbox, fault, way, monkeypatch):
    spoil_it, error, message = FAULTS[fault]
    candles = sandbox.iloc[:300].set_axis(pd.date_range("1999-01-03 07:00", periods=300, freq="4h", tz="UTC"))
    if way == "compiled":
        monkeypatch.setattr(indicators, "COMPILE_FROM", 1)
    bad = {"A": candles, "B": spoil_it(candles)} if way == "one of many" else spoil_it(candles)
    with pytest.raises(error) as caught:
        FeatureManager().generate_features(bad)
    assert message in caught.value.problem and caught.value.remedy
    assert caught.value.problem.startswith("market 'B': ") == (way == "one of many")


@pytest.mark.parametrize("fault", ["NaN", "price 0", "high below low", "unsorted", "duplicate", "gap"])
@pytest.mark.parametrize("by", [None, "market"])
def test_a_long_table_names_the_market_and_the_row_in_it(sandbox, fault, by):
    spoil_it, error, message = FAULTS[fault]
    candles = sandbox.iloc[:300].set_axis(pd.date_range("1999-01-03 07:00", periods=300, freq="4h", tz="UTC"))
    long = pd.concat({"A": candles, "B": spoil_it(candles)}, names=["market", "time"])
    with pytest.raises(error, match=re.escape(f"market 'B': {message}")):
        FeatureManager().generate_features(long.reset_index("market") if by else long, by=by)


def test_a_market_that_closes_may_skip_bars(nasdaq):
    with pytest.raises(core.GapError, match=r"row 3 \(1999-01-08"):
        FeatureManager().generate_features(nasdaq.drop(nasdaq.index[3]).iloc[:5])
    assert len(FeatureManager("sessions").generate_features(nasdaq.iloc[:60])) == 60


VALUES = st.sampled_from([1.0, 2.0, 3.0, 2.0, 2.0, 0.0, -1.0, np.nan, np.inf, -np.inf])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(*[VALUES] * 5), min_size=1, max_size=4), st.lists(st.sampled_from([0, 5, 5, 5, 7, -5])),
       st.sampled_from(["continuous", "sessions"]))
def test_the_quick_check_the_rules_and_the_stream_agree(bars, steps, calendar):
    bars = [*bars, *[(2.0, 3.0, 1.0, 2.0, 1.0)] * 4]
    time = np.cumsum([10**18, *(steps + [5] * 8)[:len(bars) - 1]])
    columns = dict(zip(OHLCV, np.array(bars).T)) | {"time": time}
    assert indicators.compiled() is not None   # from here on it is used for short histories too
    named = [rule.name for rule in ohlcv_rules(calendar) if fault_of(rule, columns) is not None]
    if all_valid(columns, calendar):
        assert not named
    elif not named:                             # the quick check knows only evenly spaced bars
        assert calendar == "continuous" and len(set(np.diff(time))) > 1
    stream = FeatureManager().stream()
    for bar in bars:
        broken = [rule for rule in VALUE_RULES if rule.find({name: np.array([x]) for name, x in zip(OHLCV, bar)})[0]]
        if broken:
            with pytest.raises(broken[0].error):
                stream.step(*bar)
        else:
            stream.step(*bar)


def many(sandbox) -> dict:
    return {f"M{k}": sandbox.iloc[50 * k:50 * k + 120 + 17 * k] * (1 + k) for k in range(9)}


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("loops", ["plain", "compiled"])
def test_many_markets_equal_each_alone(sandbox, threads, loops, monkeypatch):
    if loops == "plain":
        monkeypatch.setattr(indicators, "pays_to_compile", lambda bars: False)
        monkeypatch.setattr(candles_module, "pays_to_compile", lambda bars: False)
    else:
        indicators.compiled()
    manager, tables = FeatureManager(), many(sandbox)
    alone = {name: manager.generate_features(candles) for name, candles in tables.items()}
    for name, features in manager.generate_features(tables, threads=threads).items():
        pd.testing.assert_frame_equal(features, alone[name], check_exact=True)
    long, wanted = pd.concat(tables, names=["market", "time"]), pd.concat(alone, names=["market", "time"])
    pd.testing.assert_frame_equal(manager.generate_features(long, threads=threads), wanted, check_exact=True)
    order = np.random.default_rng(1).permutation(len(long))          # rows of all markets in any order of markets
    order = order[np.argsort(long.index.get_level_values("time")[order], kind="stable")]
    for mixed in (long.iloc[order], long.iloc[order].swaplevel()):
        made = manager.generate_features(mixed, threads=threads)
        pd.testing.assert_index_equal(made.index, mixed.index)
        np.testing.assert_array_equal(made, wanted.iloc[order])
    column = long.iloc[order].reset_index("market")
    np.testing.assert_array_equal(manager.generate_features(column, by="market", threads=threads), wanted.iloc[order])


def test_markets_with_equal_names_are_refused(sandbox):
    make = FeatureManager().generate_features
    assert make({}) == {}
    long = pd.concat(many(sandbox), names=["market", "time"])
    with pytest.raises(core.MissingColumnError, match="column 'symbol' occurs 0 times"):
        make(long.reset_index("market"), by="symbol")
    with pytest.raises(core.MissingValueError, match="row 3 has no market"):
        make(spoil(long.reset_index("market"), 3, "market", None), by="market")
    with pytest.raises(core.TimestampError, match="0 of them times"):
        make(long.set_axis(pd.MultiIndex.from_product([["A"], range(len(long))])))
    with pytest.raises(core.ConfigError, match="threads is 0"):
        make(many(sandbox), threads=0)


def test_without_numba_the_batch_gives_the_same_bits_in_pieces(sandbox, monkeypatch):
    whole = FeatureManager().generate_features(sandbox)
    monkeypatch.setattr(indicators, "COMPILE_FROM", 1)
    compiled = FeatureManager().generate_features(sandbox)
    monkeypatch.setattr(indicators, "pays_to_compile", lambda bars: False)
    monkeypatch.setattr(indicators, "_CHUNK_BARS", 77)
    pieces = FeatureManager().generate_features(sandbox)
    assert whole.to_numpy().tobytes() == compiled.to_numpy().tobytes() == pieces.to_numpy().tobytes()


@custom_feature(window=[11, 0])
def slope(bars):
    "mean move over 12 bars, in units of the range"
    return np.diff(bars.close).mean() / max(np.ptp(bars.close), 1e-9)


@custom_feature(window=[69, 0])
def spread(bars):
    "deviation of 70 closes over their mean"
    return bars.close.std() / bars.close.mean()


def test_custom_features_are_causal_and_the_same_in_batch_and_stream(sandbox):
    manager, candles = FeatureManager(custom=[slope, spread]), sandbox.iloc[:160]
    whole = manager.generate_features(candles).to_numpy()
    assert np.isnan(whole[:69, 13]).all() and np.isfinite(whole[69:]).all() and manager.warmup == 69
    np.testing.assert_array_equal(whole[:, :12], FeatureManager().generate_features(candles))
    poisoned = candles.copy()
    poisoned.iloc[100:] *= 1e6
    assert manager.generate_features(poisoned).to_numpy()[:100].tobytes() == whole[:100].tobytes()
    for stop in (0, 5, 69, 120):
        stream = manager.stream()
        for t, bar in enumerate(candles.itertuples(index=False)):
            if t == stop:
                stream = FeatureStream.from_json(stream.to_json(), manager)
            assert stream.step(*bar).tobytes() == whole[t].tobytes()
    long = manager.generate_features(pd.concat({"A": candles, "B": candles}))
    np.testing.assert_array_equal(long.loc["B"], whole)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
@pytest.mark.parametrize("custom", [[], [slope, spread]])
def test_a_copy_of_a_stream_is_independent(sandbox, custom, again):
    manager, bars = FeatureManager(custom=custom), list(sandbox.iloc[:130].itertuples(index=False))
    whole = manager.generate_features(sandbox.iloc[:130]).to_numpy()
    stream = manager.stream().warm_up(sandbox.iloc[:100])
    twin = again(stream)
    for t in range(100, 130):
        assert twin.step(*bars[t]).tobytes() == whole[t].tobytes()
    assert stream.step(*bars[100]).tobytes() == whole[100].tobytes()


def test_a_manager_with_custom_features_can_be_pickled(sandbox):
    manager = pickle.loads(pickle.dumps(FeatureManager(custom=[slope, CustomFeature("last", [0, 0], plain_last)])))
    assert manager.get_feature_names()[12:] == ["slope", "last"] and manager.custom[0] is slope


def plain_last(bars):
    return bars.close[-1]


def test_a_list_of_features_changed_after_construction_has_no_effect(sandbox):
    custom = [slope]
    manager = FeatureManager(custom=custom)
    before = manager.fingerprint
    custom.append(spread)
    assert manager.get_feature_count() == 13 and manager.fingerprint == before
    assert manager.generate_features(sandbox.iloc[:80]).shape[1] == 13


def test_a_custom_feature_that_fails_changes_nothing(sandbox):
    @custom_feature(window=[0, 0])
    def picky(bars):
        return [1.0][int(bars.close[-1] == 7.0)]
    stream, other = (FeatureManager(custom=[picky]).stream().warm_up(sandbox.iloc[:60]) for _ in range(2))
    with pytest.raises(FeatureError, match="picky failed: IndexError"):
        stream.step(7.0, 7.0, 7.0, 7.0, 1.0)
    history = sandbox.iloc[60:80].copy()
    history.iloc[9] = 7.0
    with pytest.raises(FeatureError, match=r"row 9 \(.*picky failed"):
        stream.warm_up(history)
    bar = sandbox.iloc[60]
    assert stream.step(*bar).tobytes() == other.step(*bar).tobytes()


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, as in a program of a user; a parallel test process ignores it otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_inside_a_custom_feature_leaves_the_stream_unchanged(interruptible, sandbox):
    @custom_feature(window=[3, 0])
    def interrupted(bars):
        if bars.volume[-1] == 4.25:
            signal.raise_signal(signal.SIGINT)
        return bars.close[-1] / bars.close[0]
    stream, other = (FeatureManager(custom=[interrupted]).stream().warm_up(sandbox.iloc[:60]) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        stream.step(7.0, 7.0, 7.0, 7.0, 4.25)
    for t in range(60, 66):
        assert stream.step(*sandbox.iloc[t]).tobytes() == other.step(*sandbox.iloc[t]).tobytes()


@pytest.mark.untraced
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["bars", "flat", "close", "gain", "atr", "squares", "closes", "volumes", "custom_bars", "fingerprint"]),
       st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers(-10**40, 10**40),
                 st.lists(st.floats(), max_size=21)))
def test_a_saved_stream_that_was_tampered_with_is_refused_or_harmless(key, value):
    close = np.linspace(100, 101, 80)
    table = pd.DataFrame({"open": close, "high": close, "low": close, "close": close, "volume": 1.0},
                         index=pd.date_range("2024-01-01", periods=80, freq="4h", tz="UTC"))
    saved = json.loads(FeatureManager(custom=[slope]).stream().warm_up(table).to_json())
    try:
        stream = FeatureStream.from_json(json.dumps(saved | {key: value}), FeatureManager(custom=[slope]))
    except FeatureError:
        return
    assert np.isfinite(stream.step(101, 102, 100, 101, 1)).all()


@pytest.mark.parametrize("column, kind", [("close", str), ("volume", bool), ("close", complex),
                                          ("close", "datetime64[ns]"), ("close", "string")])
def test_a_column_that_does_not_hold_numbers_is_refused_though_it_could_be_cast(sandbox, column, kind):
    candles = sandbox.iloc[:60].round()
    with pytest.raises(core.ColumnTypeError, match=f"column {column} has dtype"):
        FeatureManager().generate_features(candles.assign(**{column: candles[column].astype(kind)}))


@pytest.mark.parametrize("kind", ["float32", "int64", "Int64", "Float64", "object", "double[pyarrow]"])
def test_columns_of_any_numeric_dtype_are_accepted(sandbox, kind):
    candles = sandbox.iloc[:60].round()
    wanted = FeatureManager().generate_features(candles.astype("float32") if kind == "float32" else candles)
    np.testing.assert_array_equal(FeatureManager().generate_features(candles.astype(kind)), wanted)


@pytest.mark.parametrize("calendar", ["continuous", "sessions"])
def test_a_missing_time_is_refused_also_with_compiled_loops(sandbox, calendar):
    indicators.compiled()
    bad = sandbox.iloc[:1].set_axis(pd.DatetimeIndex([pd.NaT], tz="UTC"))
    for candles in (bad, {"A": sandbox.iloc[:60], "B": bad}):
        with pytest.raises(core.TimestampError, match="NaT"):
            FeatureManager(calendar).generate_features(candles)


@pytest.mark.parametrize("fails", ["always", "with its cache"])
def test_a_broken_numba_is_replaced_by_plain_python(sandbox, fails, monkeypatch):
    whole, compile_kernel = FeatureManager().generate_features(sandbox), indicators.compile_kernel

    def broken(cached):
        if cached or fails == "always":
            raise OSError(28, "No space left on device")
        return compile_kernel(False)
    fresh = functools.cache(indicators.compiled.__wrapped__)
    monkeypatch.setattr(indicators, "compile_kernel", broken)
    monkeypatch.setattr(indicators, "COMPILE_FROM", 1)
    for module in (indicators, candles_module, feature_manager):
        monkeypatch.setattr(module, "compiled", fresh)
    with warnings.catch_warnings(record=True) as message:
        warnings.simplefilter("always")
        made = FeatureManager().generate_features(sandbox)
    assert made.to_numpy().tobytes() == whole.to_numpy().tobytes()
    assert ("No space left" in str([w.message for w in message])) == (fails == "always")


def test_the_fingerprint_depends_on_every_part_of_a_custom_feature():
    base = FeatureManager().fingerprint
    assert FeatureManager(custom=[]).fingerprint == base
    kinds = [[slope], [spread], [slope, spread], [spread, slope],
             [CustomFeature("slope", [12, 0], slope.function, slope.formula)],
             [CustomFeature("slope", [11, 0], spread.function, slope.formula)],
             [CustomFeature("slope_2", [11, 0], slope.function, slope.formula)]]
    prints = [FeatureManager(custom=kind).fingerprint for kind in kinds]
    assert len({base, *prints}) == len(kinds) + 1


def test_the_index_is_kept_and_the_input_untouched(sandbox):
    before = sandbox.copy()
    features = FeatureManager().generate_features(sandbox)
    pd.testing.assert_index_equal(features.index, sandbox.index)
    pd.testing.assert_frame_equal(sandbox, before)


def test_production_imports_stay_light():
    script = ("import json, sys\nfrom ml_ensemble import ProductionEnsemble, FeatureManager\nFeatureManager()\n"
              "print(json.dumps(sorted(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"pandas", "pydantic", "sklearn", "lightgbm", "xgboost", "numba", "scipy", "matplotlib", "yaml", "typer"}
    assert not heavy & set(json.loads(done.stdout))


def exact_deviation(close: np.ndarray) -> np.ndarray:
    """Population standard deviations over 20 bars, in extended precision; 0 in front."""
    windows = np.lib.stride_tricks.sliding_window_view(close.astype(np.longdouble), 20)
    exact = np.where(np.ptp(windows, axis=1) > 0, windows.std(axis=1), 0).astype(np.float64)
    return np.concatenate([np.zeros(19), exact])


def exact_windows(close: np.ndarray) -> np.ndarray:
    """z-scores over 20 bars by definition, in extended precision."""
    windows = np.lib.stride_tricks.sliding_window_view(close.astype(np.longdouble), 20)
    mean, deviation = windows.mean(axis=1), windows.std(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.ptp(windows, axis=1) > 0, (windows[:, -1] - mean) / deviation, 0).astype(np.float64)


@pytest.mark.parametrize("jump", [0.0, 0.2, 7.0])
@pytest.mark.parametrize("quiet", [1e-2, 1e-4, 1e-5])
def test_carried_sums_stay_exact_over_a_long_history_with_jumps(jump, quiet):
    rng = np.random.default_rng(4)
    moves = rng.normal(0, quiet, 20_000)
    moves[::997] += jump * rng.choice([-1, 1], len(moves[::997]))
    close = 5e6 * np.exp(np.cumsum(moves - moves.mean()))
    volume = rng.lognormal(0, 1, len(close))
    volume[::1499] *= 1e9
    got = compute(close, close, close, volume)[19:]
    # A window that holds the jump itself has a large deviation, and the others are taken afresh: no law is needed.
    np.testing.assert_allclose(got[:, 11], exact_windows(close), rtol=0, atol=2e-9 + 1e-15 / quiet)
    windows = np.lib.stride_tricks.sliding_window_view(volume.astype(np.longdouble), 20)
    np.testing.assert_allclose(got[:, 10], (windows[:, -1] / windows.mean(axis=1)).astype(float), rtol=1e-9)


@pytest.mark.parametrize("unit", [1.0, 2.5e-12, 1e60])
def test_a_quiet_market_is_the_same_in_any_unit(unit):
    close = 100 * np.exp(np.cumsum(np.random.default_rng(5).normal(0, 2e-5, 400)))
    inputs = lambda close: scale_free(compute(close * 1.00001, close * 0.99998, close, np.ones(400)))[WARMUP:]
    np.testing.assert_allclose(inputs(close * unit), inputs(close), rtol=1e-9, atol=1e-9)


def test_a_constant_window_gives_0_even_after_a_jump():
    close = np.concatenate([[1.0, 1e7, 3.3], np.full(60, 0.1), [7e5], np.full(60, 0.3)])
    zscore = compute(close, close, close, np.ones(len(close)))[:, 11]
    assert (zscore[22:63] == 0).all() and (zscore[83:] == 0).all()
