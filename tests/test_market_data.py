"""Market data across modules: files in and out, named faults, repairs, and the sandbox's truth against its candles."""
import gzip
import math
from functools import cache

import arch.data.nasdaq
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_ensemble import core
from ml_ensemble.candles import OHLCV, check_ohlcv, ohlcv_columns
from ml_ensemble.feature_manager import FeatureManager
from ml_ensemble.candle_columns import tidy
from ml_ensemble.candle_schema import REPAIRS, ohlcv_schema, quality_table, repair, validate
from ml_ensemble.candle_times import read_times
from ml_ensemble.market_data import Market, load_candles
from ml_ensemble.sandbox import best_skill, simulate_market, true_probability

BARS = 600
CANDLES, TRUTH = simulate_market(bars=BARS, seed=1)

SUFFIXES = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".csv.gz": lambda table, path: table.to_csv(path, index=False),
    ".parquet": lambda table, path: table.to_parquet(path),
    ".feather": lambda table, path: table.to_feather(path),
}
NAMES = {
    "plain": ("date", "open", "high", "low", "close", "volume"),
    "capitals": ("Timestamp", "Open", "High", "Low", "Close", "Volume"),
    "shouting": ("OPEN_TIME", "OPEN", "HIGH", "LOW", "CLOSE", "VOLUME"),
    "spaces": (" time ", " open", "high ", " low ", "close", " Volume "),
    "datetime": ("DateTime", "open", "high", "low", "close", "volume"),
}
TIMES = {
    "zoned": lambda t: t,
    "tokyo": lambda t: t.tz_convert("Asia/Tokyo"),
    "naive": lambda t: t.tz_convert(None),
    "naive s": lambda t: t.tz_convert(None).as_unit("s"),
    "iso text": lambda t: t.strftime("%Y-%m-%dT%H:%M:%SZ"),
    "offset text": lambda t: [moment.isoformat() for moment in t.tz_convert("America/New_York")],
    "naive text": lambda t: t.strftime("%Y-%m-%d %H:%M"),
    "s": lambda t: t.asi8 // 10**9, "ms": lambda t: t.asi8 // 10**6, "us": lambda t: t.asi8 // 10**3,
    "ns": lambda t: t.asi8,
    "float s": lambda t: t.asi8 / 1e9,
    "text ms": lambda t: [str(value // 10**6) for value in t.asi8],
}


def export(names=NAMES["plain"], times=TIMES["zoned"], candles=CANDLES) -> pd.DataFrame:
    table = candles.reset_index(drop=True).set_axis(names[1:], axis=1)
    table.insert(0, names[0], times(candles.index))
    return table.assign(**{"Adj Close": 1.0, "trades": "many"})


def load(table, folder, suffix=".csv", **options) -> Market:
    path = folder / f"history{suffix}"
    SUFFIXES[suffix](table, path)
    return load_candles(f"file:{path}", **options)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("times", TIMES)
def test_every_time_format_in_every_file_type_gives_the_same_table(tmp_path, suffix, times):
    market = load(export(times=TIMES[times]), tmp_path, suffix)
    pd.testing.assert_frame_equal(market.candles, CANDLES, check_exact=True, check_freq=False)
    assert market.data_hash == Market(CANDLES, "memory", {}).data_hash
    assert market.truth is None


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("names", NAMES)
def test_every_column_naming_in_every_file_type_gives_the_same_table(tmp_path, suffix, names):
    market = load(export(NAMES[names]), tmp_path, suffix)
    pd.testing.assert_frame_equal(market.candles, CANDLES, check_exact=True, check_freq=False)


def test_an_index_of_times_needs_no_column():
    as_text = CANDLES.set_axis(CANDLES.index.astype(str)).rename_axis("Date")
    for table in (CANDLES.rename_axis(None), CANDLES.tz_convert(None), as_text):
        pd.testing.assert_frame_equal(tidy(table), CANDLES, check_exact=True, check_freq=False)


@given(st.lists(st.datetimes(min_value=pd.Timestamp("1973-03-04"), max_value=pd.Timestamp("2200-01-01")), min_size=1),
       st.sampled_from([1, 10**3, 10**6, 10**9]))
def test_the_unit_of_an_epoch_number_follows_from_its_size(moments, factor):
    expected = pd.DatetimeIndex(moments, tz="UTC").as_unit("ns").floor(pd.Timedelta(factor, unit="ns"))
    assert (read_times(pd.Series(expected.asi8 // factor)) == expected).all()
    assert (read_times(pd.Series([str(value // factor) for value in expected.asi8])) == expected).all()


def test_units_may_change_within_a_file():
    mixed = np.where(np.arange(BARS) < 200, CANDLES.index.asi8 // 10**6, CANDLES.index.asi8 // 10**3)
    assert (read_times(pd.Series(mixed)) == CANDLES.index).all()


@pytest.mark.parametrize("value", ["soon", "", None, 17, 20240101, 50_000_000_000, -1.7e9, math.inf, True,
                                   "3000-01-01"])
def test_a_time_that_cannot_be_read_names_its_row(value):
    sound = CANDLES.index.astype(str) if isinstance(value, str) else CANDLES.index.asi8 // 10**6
    column = pd.Series(list(sound), dtype=object)
    column[3] = value
    with pytest.raises(core.TimestampError, match="row 3"):
        tidy(export().assign(date=column))


def change(row, column, value):
    def damage(table):
        table = table.astype({column: object})
        table.loc[row, column] = value
        return table
    return damage


FAULTS = {   # what happens to the table -> the error, and what its message must hold
    "text": (change(7, "close", "n/a!"), core.ColumnTypeError, r"row 7 \(2022-01-02 04:00:00\): close is 'n/a!'"),
    "time": (change(9, "date", "soon"), core.TimestampError, "row 9: the time 'soon'"),
    "no time": (lambda t: t.drop(columns="date"), core.TimestampError, "among .*'open'.* date, timestamp, time"),
    "two times": (lambda t: t.assign(Date=t["date"]), core.TimestampError, r"duplicate column 'date' \(2 occurrences\)"),
    "no column": (lambda t: t.drop(columns="low"), core.MissingColumnError, "missing column 'low'"),
    "twice": (lambda t: t.assign(CLOSE=1.0), core.MissingColumnError, r"duplicate column 'close' \(2 occurrences\)"),
    "empty": (lambda t: t.iloc[:0], core.EmptyDataError, "no rows"),
    "unsorted": (lambda t: t.iloc[[0, 1, 3, 2, *range(4, BARS)]], core.UnsortedError, r"row 3 \(2022-01-01 08:00:00\)"),
    "duplicate": (lambda t: t.iloc[[0, 1, 1, *range(2, BARS)]], core.DuplicateError, r"row 2 \(2022-01-01 04:00:00\)"),
    "gap": (lambda t: t.drop(index=5), core.GapError, r"row 5 \(2022-01-02 00:00:00\): it is 480 minutes"),
    "missing": (change(11, "volume", None), core.MissingValueError, r"row 11 .*volume is nan"),
    "infinite": (change(12, "high", math.inf), core.InfiniteValueError, "row 12 .*high is inf"),
    "negative": (change(13, "low", -1.0), core.NegativeValueError, "row 13 .*low is -1"),
    "volume": (change(13, "volume", -2.0), core.NegativeValueError, "row 13 .*volume is -2"),
    "high low": (change(14, "high", 1.0), core.HighLowError, "row 14 .*high 1 "),
    "short": (lambda t: t.iloc[:499], core.TooShortError, "499 bars, the minimum is 500"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_file_has_its_name_and_its_row(tmp_path, fault):
    damage, error, message = FAULTS[fault]
    with pytest.raises(error, match=message) as caught:
        load(damage(export()), tmp_path)
    assert type(caught.value) is error and caught.value.remedy


def test_several_faults_are_reported_at_once(tmp_path):
    table = change(14, "high", 1.0)(change(11, "volume", None)(export().drop(index=5).reset_index(drop=True)))
    with pytest.raises(core.GapError, match=r"row 5 .*Also broken: missing_value \(rows: 1\), high_low \(rows: 1\)\.$"):
        load(table, tmp_path)
    verdicts = quality_table(tidy(table))["verdict"]
    assert set(verdicts[verdicts == "fault"].index) == {"gap", "missing_value", "high_low"}


def test_unsorted_rows_are_not_reported_as_a_gap():
    with pytest.raises(core.UnsortedError) as caught:
        validate(CANDLES.iloc[[0, 1, 3, 2, *range(4, BARS)]])
    assert "gap" not in str(caught.value)


@pytest.mark.parametrize("name, content", [
    ("h.csv", b""), ("h.csv", b"\xff\xfe\x00\x01"), ("h.csv.gz", b"no gzip"),
    ("h.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-20]),
    ("h.parquet", b"PAR1"), ("h.feather", b"feather"), ("h.xlsx", b""), ("h", b"")])
def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(core.DataError, match=name):
        load_candles(f"file:{tmp_path / name}")


def test_paths_count_from_the_current_folder_and_from_home(tmp_path, monkeypatch):
    export().to_csv(tmp_path / "here.csv", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_candles("file:here.csv").data_hash == load_candles("file:~/here.csv").data_hash
    with pytest.raises(core.DataError, match="there is no file .*there.csv"):
        load_candles("file:there.csv")


@pytest.mark.parametrize("options", [
    {"source": "binance"}, {"source": "file"}, {"source": "file:"}, {"source": "sandbox:x"},
    {"source": "sandbox", "days": 0}, {"source": "sandbox", "days": math.nan}, {"source": "sandbox", "bar": "soon"},
    {"source": "sandbox", "bar": "-4h"},
    {"source": "sandbox", "strength": -1}, {"source": "sandbox", "strength": math.nan},
    {"source": "sandbox", "calendar": "lunar"}, {"source": "sandbox", "repairs": ["smooth"]}])
def test_a_setting_out_of_range_is_a_config_error(options):
    with pytest.raises(core.ConfigError):
        load_candles(**options)


def test_the_newest_days_are_kept_and_old_holes_forgotten(tmp_path):
    market = load(export().drop(index=5), tmp_path, days=90)
    assert market.candles.equals(CANDLES.iloc[-540:])


def test_a_market_that_closes(tmp_path):
    daily = arch.data.nasdaq.load()
    daily.to_csv(tmp_path / "nasdaq.csv")
    market = load_candles(f"file:{tmp_path / 'nasdaq.csv'}", calendar="sessions")
    expected = daily[["Open", "High", "Low", "Close", "Volume"]].to_numpy(float)
    np.testing.assert_array_equal(market.candles.to_numpy(), expected)
    with pytest.raises(core.GapError, match="sessions"):
        load_candles(f"file:{tmp_path / 'nasdaq.csv'}")


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(40)))
def test_sorting_undoes_any_permutation(order):
    part = CANDLES.iloc[:40]
    mended, log = repair(part.iloc[list(order)], ["sort"])
    assert mended.equals(part)
    assert log == {"sort": sum(row != place for place, row in enumerate(order))}


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(1, 58)), st.lists(st.integers(0, 59), max_size=10), st.sets(st.integers(1, 58), max_size=5),
       st.randoms(use_true_random=False))
def test_all_repairs_together_give_valid_candles(gone, doubled, incomplete, random):
    part = CANDLES.iloc[:60].copy()
    if len(gone | incomplete) > 20:   # the interval must stay the most common distance
        gone, incomplete = set(list(gone)[:10]), set(list(incomplete)[:5])
    rows = [row for row in range(60) if row not in gone] + [row for row in doubled if row not in gone]
    random.shuffle(rows)
    mess = part.copy()
    mess.iloc[list(incomplete), 0] = np.nan
    mended, log = repair(mess.iloc[rows], reversed(REPAIRS), max_fill=1)
    assert list(log) == list(REPAIRS)
    validate(mended)
    assert (mended.index == part.index).all()
    for row in range(60):
        if row in gone | incomplete:
            assert (mended.iloc[row][["open", "high", "low", "close"]] == mended["close"].iloc[row - 1]).all()
            assert mended["volume"].iloc[row] == 0
        else:
            assert (mended.iloc[row] == part.iloc[row]).all()


def test_of_a_partial_bar_and_its_final_one_the_final_is_kept_in_any_order():
    bar = CANDLES.iloc[[1]]
    partial = bar.assign(close=bar["open"], high=bar["open"] * 1.0001, low=bar["open"] * 0.9999, volume=bar["volume"] / 9)
    for order in ([partial, bar], [bar, partial], [bar, partial, bar]):
        mended, log = repair(pd.concat([CANDLES.iloc[:1], *order, CANDLES.iloc[2:5]]), ["sort", "drop_duplicates"])
        pd.testing.assert_frame_equal(mended, CANDLES.iloc[:5], check_exact=True, check_freq=False)
        assert log["drop_duplicates"] == len(order) - 1


@pytest.mark.parametrize("other", [
    lambda bar: bar.assign(close=bar["close"] * 1.001), lambda bar: bar / 5000, lambda bar: bar.assign(open=bar["low"]),
    lambda bar: bar.assign(high=bar["high"] * 1.1, volume=bar["volume"] / 2)])
def test_duplicates_that_contradict_each_other_are_refused_and_no_remedy_drops_one(tmp_path, other):
    table = pd.concat([CANDLES.iloc[:5], other(CANDLES.iloc[[4]]), CANDLES.iloc[5:]])
    with pytest.raises(core.DuplicateError, match="rows 4 and 5 .*contradict each other"):
        repair(table, ["drop_duplicates"])
    with pytest.raises(core.DuplicateError, match="contradict each other") as caught:
        load(export(candles=table), tmp_path)
    assert "data.repairs" not in caught.value.remedy


def test_a_bar_off_the_grid_is_not_repaired_by_filling_gaps():
    time = CANDLES.index[:10].to_series().reset_index(drop=True)
    time[7:] += pd.Timedelta(9, unit="h")
    mended, log = repair(CANDLES.iloc[:10].set_axis(pd.DatetimeIndex(time, name="time")), ["fill_gaps"], max_fill=1)
    assert log == {"fill_gaps": 3}   # 4, 8 and 12 hours after the bar before; the next stands at 13
    with pytest.raises(core.GapError):
        validate(mended)


def test_the_repairs_leave_their_input_alone():
    before = CANDLES.iloc[[3, 1, 1, 9]].copy()
    after = before.copy()
    repair(after, REPAIRS, max_fill=1)
    pd.testing.assert_frame_equal(before, after, check_exact=True)


def test_the_hash_sees_every_bit():
    hashes = {Market(CANDLES, "memory", {}).data_hash}
    for name in OHLCV:
        table = CANDLES.copy()
        table.loc[table.index[100], name] = np.nextafter(table[name].iloc[100], 0)
        hashes.add(Market(table, "memory", {}).data_hash)
    hashes.add(Market(CANDLES.set_axis(CANDLES.index + pd.Timedelta(1, unit="ns")), "memory", {}).data_hash)
    assert len(hashes) == 7


def test_the_schema_and_the_rules_of_the_features_agree():
    for name in ("unsorted", "duplicate", "gap", "missing", "infinite", "negative", "high low"):
        table = tidy(FAULTS[name][0](export()))
        with pytest.raises(core.DataError) as ours:
            check_ohlcv(ohlcv_columns(table))
        with pytest.raises(type(ours.value)) as theirs:
            validate(table)
        assert theirs.value.problem == ours.value.problem
    assert ohlcv_schema().validate(CANDLES) is not None


# The sandbox

KINDS = {"documented": {}, "noise": {"strength": 0, "spread": 0, "clustering": 0}, "volatility": {"strength": 0, "spread": 0},
         "bounce": {"strength": 0, "spread": 0.006, "volatility": 0.003}}
MARKETS = [simulate_market(seed=seed) for seed in range(6)]


def labels(candles, threshold, entry):
    """(T - 2,) bool, whether the return from the entry over one bar is above the threshold."""
    price = (candles["open"].shift(-1) if entry == "next_open" else candles["close"]).to_numpy()
    return (price[1:] / price[:-1] - 1 > threshold)[:len(price) - 2]


@cache
def markets_of(kind):
    """Six markets of a kind, simulated once for all thresholds and entries."""
    return MARKETS if kind == "documented" else [simulate_market(seed=seed, **KINDS[kind]) for seed in range(6)]


@pytest.mark.parametrize("entry", ["next_open", "close"])
@pytest.mark.parametrize("threshold", [0.003, -0.01, 0.0, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_the_true_probability_is_calibrated_at_any_threshold_and_entry(kind, threshold, entry):
    markets = markets_of(kind)
    p = np.concatenate([true_probability(*market, threshold, entry).to_numpy()[:-2] for market in markets])
    y = np.concatenate([labels(candles, threshold, entry) for candles, _ in markets])
    for part in np.array_split(np.argsort(p, kind="stable"), 10):
        error = math.sqrt((p[part] * (1 - p[part])).sum()) / len(part)
        assert abs(y[part].mean() - p[part].mean()) < 4 * error


def test_without_signal_spread_and_clustering_there_is_no_skill():
    market = simulate_market(seed=5, **KINDS["noise"])
    for threshold, classes, entry in ((0.003, 2, "next_open"), (0.01, 2, "close"), (0.003, 3, "next_open")):
        assert abs(best_skill(*market, threshold, classes, entry)) < 1e-12


def test_volatility_alone_gives_skill_and_bounce_gives_skill_only_at_the_close():
    wild = [simulate_market(seed=seed, **KINDS["volatility"]) for seed in range(3)]
    assert min(best_skill(*market) for market in wild) > 0.003
    assert wild[0][1]["volatility"].autocorr(10) > 0.5 and abs(wild[0][1]["drift"]).max() < 0.01
    for seed in range(3):
        market = simulate_market(seed=seed, **KINDS["bounce"])
        assert best_skill(*market, entry="close") > 0.1 > 0.02 > best_skill(*market)


def test_the_signal_is_in_the_features():
    for candles, truth in MARKETS[:2]:
        features = FeatureManager().generate_features(candles)
        shown = -np.tanh(features["zscore"]) + 0.4 * np.tanh(np.log(features["volume_ratio"]))
        planted = truth["drift"] / truth["volatility"]
        known = shown.notna()
        assert np.corrcoef(shown[known], planted[known])[0, 1] > 0.98       # of recorded closes, not of efficient ones


def test_the_drift_is_the_mean_and_the_volatility_the_standard_deviation_of_the_next_return():
    candles, truth = simulate_market(20_000, seed=9, strength=0.3)
    moved = np.log(truth["efficient"]).diff().to_numpy()[1:]
    surprise = (moved - truth["drift"].to_numpy()[:-1]) / truth["volatility"].to_numpy()[:-1]
    assert abs(surprise.mean()) < 4 / math.sqrt(len(surprise)) and abs(surprise.std() - 1) < 0.03
    signal = (truth["drift"] + truth["volatility"]**2 / 2) / truth["volatility"]
    assert abs(np.corrcoef(moved / truth["volatility"].to_numpy()[:-1], signal.to_numpy()[:-1])[0, 1] - 0.3) < 0.03


@pytest.mark.parametrize("spread", [0.0, 0.002, 0.008])
def test_opens_and_closes_are_a_bid_or_an_ask_of_the_efficient_price(spread):
    candles, truth = simulate_market(3000, seed=2, spread=spread)
    side = np.log(candles["close"] / truth["efficient"])
    np.testing.assert_allclose(abs(side), spread / 2, atol=1e-12)
    opened = np.log(candles["open"].iloc[1:].to_numpy() / truth["efficient"].iloc[:-1].to_numpy())
    np.testing.assert_allclose(abs(opened), spread / 2, atol=1e-12)
    if spread:
        assert abs(np.sign(side).mean()) < 4 / math.sqrt(3000)
        assert abs(np.corrcoef(np.sign(side[:-1]), np.sign(opened))[0, 1]) < 4 / math.sqrt(3000)


def test_candles_hold_nothing_but_candles_and_no_future():
    candles, truth = MARKETS[0]
    assert tuple(candles.columns) == OHLCV and not candles.attrs
    validate(candles)
    assert candles.index.equals(truth.index) and truth.notna().all(axis=None)
    short = simulate_market(3000, seed=0)          # draws differ with the length, but never what is known of them
    assert short[0].index.equals(candles.index[:3000])


@pytest.mark.untraced
@pytest.mark.slow
def test_prices_stay_within_limits_over_many_years():
    for seed in range(8):
        for strength in (0, 0.25):
            candles, _ = simulate_market(20_000, seed, strength)
            assert 5e6 / 3000 < candles["low"].min() and candles["high"].max() < 5e6 * 3000
            validate(candles)


def test_the_same_seed_is_the_same_market_and_another_is_not():
    one, two = load_candles("sandbox", days=200, seed=4), load_candles("sandbox", days=200, seed=4)
    assert one.data_hash == two.data_hash and one.truth.equals(two.truth)
    assert one.data_hash != load_candles("sandbox", days=200, seed=5).data_hash
    assert len(one.candles) == 1200 and len(load_candles("sandbox", days=30, bar="1h").candles) == 720


def test_level_scales_prices_and_nothing_else():
    candles, truth = simulate_market(300, seed=2, level=2.0**-3)
    reference, expected = simulate_market(300, seed=2, level=2.0**10)
    prices = list(OHLCV[:4])
    np.testing.assert_allclose(candles[prices] * 2**13, reference[prices], rtol=1e-9)
    np.testing.assert_allclose(truth["p_up"], expected["p_up"], rtol=1e-9)


def test_fill_gaps_refuses_to_invent_nights_and_does_nothing_where_they_are_normal():
    opening_hours = CANDLES[CANDLES.index.hour < 16]
    with pytest.raises(core.GapError, match="fill_gaps fills at most 1.00%"):
        repair(opening_hours, ["fill_gaps"])
    same, log = repair(opening_hours, ["fill_gaps"], calendar="sessions")
    assert same.equals(opening_hours) and log == {"fill_gaps": 0}
