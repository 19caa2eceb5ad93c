"""The 12 features against TA-Lib, and what makes them safe: causal, the same in batch and stream, light to import."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import talib
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ml_ensemble.core import GapError, UnsortedError
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
    high, low = close * (1 + rng.exponential(0.003, n)), close * (1 - rng.random(n) * 0.01)
    volume = rng.lognormal(2, 1, n) * (rng.random(n) > draw(st.sampled_from([0.0, 0.3])))
    return high, low, close, volume


@settings(max_examples=200)
@given(series())
def test_drawn_series_equal_talib(bars):
    high, low, close, volume = bars
    made, wanted = compute(*bars), oracle(*bars)
    steady = talib.STDDEV(close, 20) > 1e-4 * close      # below, TA-Lib's own running sums have lost the digits
    for column in (3, 6, 8, 9):
        np.testing.assert_allclose(made[:, column], wanted[:, column], rtol=1e-9)
    np.testing.assert_allclose(made[:, 4:6], wanted[:, 4:6], rtol=1e-9, atol=1e-12 * close.max())
    for column in (7, 11):
        np.testing.assert_allclose(made[steady, column], wanted[steady, column], rtol=1e-9, atol=1e-7)
    traded = talib.SMA(volume, 20) > 1e-6
    np.testing.assert_allclose(made[traded, 10], wanted[traded, 10], rtol=1e-9, atol=1e-9)
    assert np.isfinite(made[WARMUP:]).all()


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
    for t in range(1, len(candles)):
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
def test_the_scale_free_view_does_not_know_the_price_level(sandbox, prices, volumes):
    scaled = sandbox.copy()
    scaled[OHLCV[:4]] *= prices
    scaled["volume"] *= volumes
    view = lambda candles: scale_free(FeatureManager().generate_features(candles).to_numpy())[WARMUP:]
    np.testing.assert_allclose(view(scaled), view(sandbox), rtol=1e-9, atol=1e-9)


def test_bad_candles_are_refused_with_the_offending_row(sandbox, nasdaq):
    with pytest.raises(UnsortedError, match=r"row 3 .*older than the row before.*repair sort"):
        FeatureManager().generate_features(sandbox.iloc[[0, 1, 3, 2, 4]])
    with pytest.raises(GapError, match=r"row 3 \(1999-01-08"):
        FeatureManager().generate_features(nasdaq.drop(nasdaq.index[3]).iloc[:5])
    assert len(FeatureManager("sessions").generate_features(nasdaq.iloc[:60])) == 60


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


def exact_windows(close: np.ndarray) -> np.ndarray:
    """z-scores over 20 bars by definition, in extended precision."""
    windows = np.lib.stride_tricks.sliding_window_view(close.astype(np.longdouble), 20)
    mean, deviation = windows.mean(axis=1), windows.std(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.ptp(windows, axis=1) > 0, (windows[:, -1] - mean) / deviation, 0).astype(np.float64)


@pytest.mark.parametrize("jump", [0.0, 0.2, 5.0])
@pytest.mark.parametrize("quiet", [1e-2, 1e-4])
def test_carried_sums_stay_exact_over_a_long_history_with_jumps(jump, quiet):
    rng = np.random.default_rng(4)
    moves = rng.normal(0, quiet, 20_000)
    moves[::997] += jump * rng.choice([-1, 1], len(moves[::997]))
    close = 5e6 * np.exp(np.cumsum(moves - moves.mean()))
    got = compute(close, close, close, np.ones(len(close)))[19:, 11]
    # The stated law: rounding, times the square of (largest move of the last 40 bars / deviation).
    law = 4 * np.finfo(float).eps * (np.expm1(jump) / quiet) ** 2
    np.testing.assert_allclose(got, exact_windows(close), rtol=0, atol=1e-9 + law)


def test_a_window_that_stands_still_is_0_also_after_a_jump():
    close = np.concatenate([[1.0, 1e7, 3.3], np.full(60, 0.1), [7e5], np.full(60, 0.3)])
    zscore = compute(close, close, close, np.ones(len(close)))[:, 11]
    assert (zscore[22:63] == 0).all() and (zscore[83:] == 0).all()
