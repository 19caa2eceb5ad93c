"""Drift of live features: the statistics beside scipy, rare alarms when nothing is wrong, and broken features by name."""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal, stats

from ml_ensemble.core import ValidationError
from ml_ensemble.drift import compare_with_batch, feature_reference, measure_drift
from ml_ensemble.feature_manager import FEATURE_NAMES, FeatureManager
from ml_ensemble.plot_style import ReportFigure
from ml_ensemble.sandbox import simulate_market

YEAR = 2190                # bars of four hours


def series(seed: int, bars: int) -> pd.DataFrame:
    """Autocorrelated features, some with heavy tails, one with many equal values."""
    rng = np.random.default_rng(seed)
    noise = {"quick": rng.standard_t(5, bars), "hours": signal.lfilter([1], [1, -0.8], rng.normal(size=bars)),
             "days": signal.lfilter([1], [1, -0.95], rng.normal(size=bars)),
             "clustered": rng.standard_t(5, bars) * np.exp(signal.lfilter([1], [1, -0.97], rng.normal(0, 0.08, bars))),
             "count": rng.poisson(2, bars), "share": rng.beta(2, 5, bars)}
    return pd.DataFrame(noise, index=pd.date_range("2022-01-01", periods=bars, freq="4h", tz="UTC"), dtype=float)


@pytest.fixture(scope="module")
def example() -> tuple[dict, pd.DataFrame]:
    """A reference and the year after its period."""
    table = series(1, 8000 + YEAR)
    return feature_reference(table.iloc[:8000]), table.iloc[8000:]


def test_alarms_are_rare_in_a_year_in_which_nothing_is_wrong():
    alarmed = []
    for seed in range(50):
        table = series(100 + seed, 6000 + YEAR)
        alarmed.append(bool(measure_drift(feature_reference(table.iloc[:6000]), table.iloc[6000:], interval="4h").alarms))
    assert np.mean(alarmed) <= 0.08                            # 2 x 1.5 % are meant; 8 % are possible by chance in 50 years


def test_the_statistics_are_those_of_scipy_against_the_quantiles_of_the_reference(example):
    reference, year = example
    table = measure_drift(reference, year, interval="4h").table
    for row in table[table["length"] == 42].sample(20, random_state=0).itertuples():
        values = year.loc[row.start:row.end - pd.Timedelta("4h"), row.feature]
        known = reference["features"][row.feature]
        assert len(values) == row.bars
        if row.bars == 42:
            assert row.ks == pytest.approx(stats.ks_2samp(known["grid"], values).statistic, abs=1e-12)
            assert row.wasserstein == pytest.approx(stats.wasserstein_distance(known["grid"], values) / known["scale"], rel=1e-9)


@pytest.mark.parametrize("breakage, finds", [
    (lambda x: x * 0 + x.iloc[0], "stuck"), (lambda x: x * 100, "outside"), (lambda x: x + 50, "outside"),
    (lambda x: x * np.nan, "missing"), (lambda x: x * 4, "wasserstein")], ids=["stuck", "unit", "level", "missing", "scale"])
@pytest.mark.parametrize("name", ["quick", "share"])
def test_a_broken_feature_is_named_and_no_other(example, breakage, finds, name):
    reference, year = example
    broken = year.copy()
    broken.iloc[1000:, broken.columns.get_loc(name)] = breakage(year[name].iloc[1000:])
    report = measure_drift(reference, broken, interval="4h")
    assert report.drifted == [name]
    assert finds in {alarm.statistic for alarm in report.alarms}
    assert all(alarm.value > alarm.limit and alarm.end > year.index[1000] for alarm in report.alarms)
    assert name in report.sentence() and name in repr(report)


def test_one_extreme_bar_is_no_alarm_and_two_are(example):
    reference, year = example
    window = int(np.flatnonzero(year.index.as_unit("ns").asi8 // pd.Timedelta("4h").value % 42 == 0)[3])
    for bars, drifted in ((1, []), (2, ["quick"])):
        crash = year.copy()
        crash.iloc[window:window + bars, 0] = 1.1 * reference["features"]["quick"]["low"]
        assert measure_drift(reference, crash, interval="4h").drifted == drifted


@settings(max_examples=20)
@given(st.integers(50, YEAR))
def test_a_window_is_the_same_whenever_one_looks(example, bars):
    reference, year = example
    whole = measure_drift(reference, year, interval="4h").table.set_index(["length", "end", "feature"])
    part = measure_drift(reference, year.iloc[:bars], interval="4h").table.set_index(["length", "end", "feature"])
    pd.testing.assert_frame_equal(part, whole.loc[part.index])
    assert part.index.get_level_values("end").max() <= year.index[bars - 1] + pd.Timedelta("4h")


def test_a_bar_that_is_not_logged_is_missing_and_not_zero(example):
    reference, year = example
    gaps = year.drop(year.index[[10, 300, *range(500, 560), *range(900, 1000)]])
    report = measure_drift(reference, gaps, interval="4h")
    assert report.alarms == []
    empty = report.table[report.table["bars"] == 0]
    assert len(empty) and empty["ratio"].isna().all()


def test_a_reference_is_small_plain_data_and_the_report_as_well(example):
    reference, year = example
    assert json.loads(json.dumps(reference)) == reference
    assert len(json.dumps(reference)) < 40_000 * len(reference["features"]) / 12
    report = measure_drift(json.loads(json.dumps(reference)), year * 1.5, interval="4h")
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["alarms"] and {"image/png", "image/x-narrow-png"} <= set(ReportFigure(report.plot())._repr_mimebundle_())


def test_a_constant_a_missing_and_a_short_feature_have_a_reference_too():
    times = pd.date_range("2024-01-01", periods=300, freq="1h", tz="UTC")
    table = pd.DataFrame({"constant": 0.123456789, "never": np.nan, "some": np.where(np.arange(300) % 7, 1.0, np.nan)}, index=times)
    reference = feature_reference(table.iloc[:200])
    assert json.loads(json.dumps(reference)) == reference
    assert measure_drift(reference, table.iloc[200:], interval="1h").alarms == []
    moved = table.iloc[200:].assign(constant=3.1)
    assert measure_drift(reference, moved, interval="1h").drifted == ["constant"]
    assert measure_drift(feature_reference(table.iloc[:20]), table.iloc[200:], interval="1h").table.empty


def test_wrong_input_is_a_named_error(example):
    reference, year = example
    for changed, values, interval, problem in (
            ({"version": 2}, year, "4h", "version 2"), ({}, year, "1h", "bars of 1h"), ({}, year.drop(columns="quick"), "4h", "quick"),
            ({}, year.iloc[[1, 0]], "4h", "not increasing"), ({}, year.reset_index(drop=True), "4h", "no time index")):
        with pytest.raises(ValidationError, match=problem):
            measure_drift(reference | changed, values, interval=interval)
    with pytest.raises(ValidationError, match="infinite"):
        feature_reference(year * np.inf)


@pytest.fixture(scope="module")
def features() -> pd.DataFrame:
    """The 12 features of a market."""
    return FeatureManager().generate_features(simulate_market(500, seed=4)[0]).iloc[-400:]


@given(st.integers(0, 399), st.integers(0, 11), st.sampled_from([1 + 1e-6, 1.1, -1.0, np.nan]))
def test_one_wrong_value_in_the_log_is_named_with_its_bar(features, bar, column, factor):
    logged = features.copy()
    logged.iloc[bar, column] *= factor
    compared = compare_with_batch(logged, features)
    if logged.iloc[bar, column] == features.iloc[bar, column]:
        assert compared.broken == []
        return
    assert compared.broken == [FEATURE_NAMES[column]] and compared.revised == []
    row = compared.table.set_index("feature").loc[FEATURE_NAMES[column]]
    assert (row["differing"], row["first"]) == (1, features.index[bar])


@pytest.mark.parametrize("bar", [250, 300, 420])
def test_revised_candles_are_not_reported_as_broken_features(bar):
    candles, _ = simulate_market(1500, seed=4)
    seen = candles.copy()
    seen.iloc[bar, :4] *= 1.002
    logged, recomputed = (FeatureManager().generate_features(frame).iloc[100:] for frame in (seen, candles))
    compared = compare_with_batch(logged, recomputed)
    assert (compared.broken, compared.revised) == ([], [candles.index[bar]])
    logged.iloc[600:, 3] += 1.0                               # long after it, a feature breaks
    again = compare_with_batch(logged, recomputed)
    assert again.broken == ["rsi_14"] and again.revised == [candles.index[bar]]
    assert again.table.set_index("feature").loc["rsi_14", "first"] == logged.index[600]


def test_a_log_of_another_market_is_revised_candles_from_its_first_bar():
    one, other = (FeatureManager().generate_features(simulate_market(600, seed=s)[0]).iloc[100:] for s in (1, 2))
    compared = compare_with_batch(one, other)
    assert compared.broken == [] and compared.revised == [one.index[0]]
    assert compared.table["differing"].min() > 490


def test_features_are_compared_on_common_bars_only(features):
    compared = compare_with_batch(features.iloc[:50], features.iloc[20:])
    assert (compared.bars, compared.unmatched, compared.broken) == (30, 370, [])
    assert compare_with_batch(features.iloc[:0], features).bars == 0
    with pytest.raises(ValidationError, match="zscore"):
        compare_with_batch(features, features.drop(columns="zscore"))
