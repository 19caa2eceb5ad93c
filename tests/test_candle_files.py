"""Candle files as people have them: every layout gives the same candles, every fault its error, and no bar is invented."""
import bz2
import gzip
import io
import json
import zipfile

import numpy as np
import pandas as pd
import pytest

from ml_ensemble import core
from ml_ensemble.candle_times import TimeFormat, read_times
from ml_ensemble.candles import OHLCV, PRICES
from ml_ensemble.config import load_settings
from ml_ensemble.market_data import inspect_candles, load_candles
from ml_ensemble.sandbox import simulate_market

CANDLES = simulate_market(bars=700, seed=5)[0].round({**dict.fromkeys(PRICES, 2), "volume": 4})
TIME = CANDLES.index


def table(candles=CANDLES, time=None, **extra) -> pd.DataFrame:
    return pd.DataFrame({"time": candles.index if time is None else time, **{name: candles[name].to_numpy() for name in OHLCV}, **extra})


def same(found: pd.DataFrame, expected: pd.DataFrame = CANDLES) -> None:
    expected = expected.set_axis(expected.index.as_unit("ns").rename("time"))
    pd.testing.assert_frame_equal(found, expected, check_exact=True, check_freq=False)


def accepted(path, content, **settings) -> pd.DataFrame:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_candles(f"file:{path}", **settings).candles


def refused(path, content, error, match, **settings) -> core.DataError:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=match) as caught:
        load_candles(f"file:{path}", **settings)
    return caught.value


def milliseconds(time=TIME) -> np.ndarray:
    return time.as_unit("ms").asi8


def klines(unit: int = 1) -> pd.DataFrame:
    open_ms = milliseconds() * unit
    prices = {name: CANDLES[name].to_numpy() for name in OHLCV}
    return pd.DataFrame({"open_time": open_ms, **prices, "close_time": open_ms + 14_400_000 * unit - 1,
                         "quote_volume": (CANDLES["volume"] * CANDLES["close"]).to_numpy(), "count": 9, "taker_buy_volume": 1.0,
                         "taker_buy_quote_volume": 2.0, "ignore": 0})


def capitals(**columns) -> pd.DataFrame:
    return table().rename(columns=str.capitalize).assign(**columns)


CSV = {   # layouts of public files, each written without this package
    "Binance klines without headings": lambda: klines().to_csv(index=False, header=False),
    "Binance klines in microseconds": lambda: klines(1000).to_csv(index=False, header=False),
    "Binance klines with headings": lambda: klines().to_csv(index=False),
    "Kraken OHLCVT": lambda: table(time=milliseconds() // 1000, trades=7).to_csv(index=False, header=False),
    "CryptoDataDownload": lambda: "https://www.vendor.test\n" + table(time=milliseconds()).rename(columns={
        "time": "unix", "volume": "Volume BTC"}).assign(date=TIME.strftime("%Y-%m-%d %H:%M:%S"), symbol="BTC/JPY", **{
            "Volume JPY": (CANDLES["volume"] * CANDLES["close"]).to_numpy()})[::-1].to_csv(index=False),
    "MetaTrader 5": lambda: pd.DataFrame({
        "<DATE>": TIME.strftime("%Y.%m.%d"), "<TIME>": TIME.strftime("%H:%M:%S"), "<OPEN>": CANDLES["open"], "<HIGH>": CANDLES["high"],
        "<LOW>": CANDLES["low"], "<CLOSE>": CANDLES["close"], "<TICKVOL>": CANDLES["volume"], "<VOL>": 0, "<SPREAD>": 4}).to_csv(
            index=False, sep="\t"),
    "MetaTrader 4": lambda: table(time=TIME.strftime("%Y.%m.%d")).assign(clock=TIME.strftime("%H:%M"))[
        ["time", "clock", *OHLCV]].to_csv(index=False, header=False),
    "HistData": lambda: table(time=TIME.strftime("%Y%m%d %H%M%S")).to_csv(index=False, header=False, sep=";"),
    "Dukascopy": lambda: table(time=TIME.strftime("%d.%m.%Y %H:%M:%S.000 GMT+0000")).rename(
        columns={"time": "Gmt time"}).to_csv(index=False),
    "yfinance with three lines of headings": lambda: "Price,Close,High,Low,Open,Volume\nTicker,X,X,X,X,X\nDate,,,,,\n" + table(
        time=TIME.strftime("%Y-%m-%d %H:%M:%S"))[["time", "close", "high", "low", "open", "volume"]].to_csv(index=False, header=False),
    "German spreadsheet": lambda: table(time=TIME.strftime("%d.%m.%Y %H:%M")).rename(columns={
        "time": "Datum", "open": "Erster", "high": "Hoch", "low": "Tief", "close": "Schlusskurs", "volume": "Volumen"}).to_csv(
            index=False, sep=";", decimal=","),
    "Japanese": lambda: table(time=TIME.strftime("%Y/%m/%d %H:%M")).rename(columns={
        "time": "日時", "open": "始値", "high": "高値", "low": "安値", "close": "終値", "volume": "出来高"}).to_csv(index=False),
    "investing.com": lambda: capitals(Time=TIME.strftime("%b %d, %Y %H:%M"), Volume=[f"{v / 1000:.7f}K" for v in CANDLES["volume"]]).rename(
        columns={"Time": "Date", "Close": "Price", "Volume": "Vol."}).assign(**{
            name: CANDLES[of].map("{:,.2f}".format).to_numpy()
            for name, of in (("Price", "close"), ("Open", "open"), ("High", "high"), ("Low", "low"))})[
                ["Date", "Price", "Open", "High", "Low", "Vol."]][::-1].to_csv(index=False, quoting=1),
    "American with am and pm": lambda: capitals(Time=TIME.strftime("%m/%d/%Y %I:%M %p")).to_csv(index=False),
    "date and time in two columns": lambda: pd.DataFrame({
        "Date": TIME.strftime("%Y-%m-%d"), "Time": TIME.strftime("%H:%M"),
        **{name.capitalize(): CANDLES[name].to_numpy() for name in OHLCV}}).to_csv(index=False),
    "index without a name": lambda: CANDLES.rename_axis(None).to_csv(),
    "R with one heading less": lambda: "open high low close volume\n" + CANDLES.set_axis(
        TIME.strftime("%Y-%m-%dT%H:%M:%SZ")).to_csv(header=False, sep=" "),
    "spreadsheet days": lambda: table(time=milliseconds() / 86_400_000 + 25_569).to_csv(index=False),
    "numbered names": lambda: table().rename(columns={
        "open": "1. open", "high": "2. high", "low": "3. low", "close": "4. close", "volume": "5. volume",
        "time": "timestamp"}).to_csv(index=False),
    "footer and blank lines": lambda: "\n\n" + table().to_csv(index=False) + "\n\nSource: vendor\n",
    "two headings": lambda: table()[:300].to_csv(index=False) + table()[300:].to_csv(index=False),
    "vertical bars and quotes": lambda: table().astype(str).to_csv(index=False, sep="|", quoting=1),
    "units that change": lambda: table(time=np.where(np.arange(700) < 300, milliseconds(), milliseconds() * 1000)).to_csv(index=False),
}


@pytest.mark.parametrize("layout", CSV)
def test_every_public_layout_gives_the_same_candles(tmp_path, layout):
    found = accepted(tmp_path / "history.csv", CSV[layout]())
    if layout == "investing.com":
        pd.testing.assert_frame_equal(found, CANDLES, rtol=1e-12, check_freq=False)
    else:
        same(found)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp932"])
@pytest.mark.parametrize("layout", ["Japanese", "Binance klines without headings", "MetaTrader 5"])
def test_every_encoding_gives_the_same_candles(tmp_path, layout, encoding):
    same(accepted(tmp_path / "history.csv", CSV[layout]().encode(encoding)))


def test_a_western_heading_in_its_own_encoding(tmp_path):
    text = CSV["German spreadsheet"]().replace("Erster", "Eröffnung").replace("Hoch", "Höchst")
    same(accepted(tmp_path / "history.csv", text.encode("cp1252")))


def zipped(text: str, *names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, text)
    return data.getvalue()


@pytest.mark.parametrize("name", ["a.csv", "a.zip", "a", "a.txt"])
def test_a_container_is_known_by_its_content_and_not_by_its_name(tmp_path, name):
    text = CSV["Kraken OHLCVT"]()
    for content in (gzip.compress(text.encode()), bz2.compress(text.encode()), zipped(text, "__MACOSX/x", "BTC.csv")):
        same(accepted(tmp_path / name, content))
    parquet = io.BytesIO()
    table().to_parquet(parquet)
    same(accepted(tmp_path / name, parquet.getvalue()))


def test_monthly_archives_are_read_together(tmp_path):
    for month, part in klines().groupby(TIME.strftime("%Y-%m").to_numpy()):
        (tmp_path / f"BTCJPY-4h-{month}.zip").write_bytes(zipped(part.to_csv(index=False, header=False), "part.csv"))
    market = load_candles(f"file:{tmp_path}/BTCJPY-4h-*.zip")
    same(market.candles)
    assert len(market.layouts) > 3


def rows(order: str) -> list[list]:
    columns = {"t": milliseconds().tolist(), **{name[0]: CANDLES[name].tolist() for name in OHLCV}}
    return [list(row) for row in zip(*(columns[name] for name in order))]


JSON = {
    "ccxt": lambda: rows("tohlcv"),
    "bitbank": lambda: {"success": 1, "data": {"candlestick": [
        {"type": "4hour", "ohlcv": [[str(x) for x in row[:5]] + [row[5]] for row in rows("ohlcvt")]}]}},
    "Kraken": lambda: {"error": [], "result": {"last": 1, "XXBTZJPY": [
        [row[0] // 1000, *map(str, row[1:5]), str((row[2] + row[3]) / 2), str(row[5]), 7] for row in rows("tohlcv")]}},
    "Coinbase": lambda: [[r[0] // 1000, *r[1:]] for r in rows("tlhocv")][::-1],
    "Bitfinex": lambda: rows("tochlv"),
    "TradingView": lambda: {"s": "ok"} | {name: [row[k] for row in rows("tohlcv")] for k, name in enumerate("tohlcv")},
    "Polygon": lambda: {"ticker": "X", "results": [dict(zip("tohlcv", row)) | {"vw": row[1], "n": 9} for row in rows("tohlcv")]},
    "Alpha Vantage": lambda: {"Meta Data": {"1. Information": "x"}, "Time Series (Daily)": {
        f"{time:%Y-%m-%d %H:%M:%S}": {f"{k}. {name}": str(value) for k, (name, value) in enumerate(zip(OHLCV, values), start=1)}
        for time, values in zip(TIME[::-1], CANDLES[::-1].to_numpy().tolist())}},
}


@pytest.mark.parametrize("exchange", JSON)
def test_every_json_of_an_exchange_gives_the_same_candles(tmp_path, exchange):
    same(accepted(tmp_path / "history.json", json.dumps(JSON[exchange]())))
    if isinstance(JSON[exchange](), list):
        same(accepted(tmp_path / "history.jsonl", "\n".join(map(json.dumps, JSON[exchange]()))))


def test_what_the_values_leave_open_is_an_error_that_names_the_setting(tmp_path):
    path = tmp_path / "history.csv"
    first_days = CANDLES.set_axis(pd.date_range("2024-01-01", periods=700, freq="20min", tz="UTC"))       # days 1 to 10
    short = table(first_days, time=first_days.index.strftime("%d/%m/%Y %H:%M")).to_csv(index=False)
    refused(path, short, core.AmbiguousDataError, "data.time_format")
    same(accepted(path, short, time_format="%d/%m/%Y %H:%M"), first_days.rename_axis("time"))
    small = (CANDLES[list(PRICES)] / 10_000).round(3)
    texts = {name: [f"{value:.3f}".replace(".", ",") for value in small[name]] for name in PRICES}
    commas = table().assign(**texts, volume=7).to_csv(index=False, quoting=1)
    refused(path, commas, core.AmbiguousDataError, "data.decimal")
    same(accepted(path, commas, decimal=",")[list(PRICES)], small)
    named = table().rename(columns={"close": "Kurs"}).to_csv(index=False)
    assert "data.columns={close: NAME}" in refused(path, named, core.MissingColumnError, "missing column 'close'").remedy
    same(accepted(path, named, columns={"close": "Kurs"}))
    numbers = {name: k for k, name in enumerate(("time", *OHLCV))}
    same(accepted(path, table().to_csv(index=False, header=False), columns=numbers))
    zoned = table(time=TIME.tz_convert("Asia/Tokyo").strftime("%Y-%m-%d %H:%M JST")).to_csv(index=False)
    refused(path, zoned, core.AmbiguousDataError, "JST.*data.timezone")
    same(accepted(path, zoned, timezone="Asia/Tokyo"))
    same(accepted(path, zoned.replace(" JST", ""), timezone="Asia/Tokyo"))


def test_several_instruments_need_a_choice_whatever_their_times(tmp_path):
    path, other = tmp_path / "history.csv", (CANDLES / 5000).round(6)
    for one, two in ((CANDLES, other), (CANDLES[::2], other[1::2]), (CANDLES, other[350:])):
        both = pd.concat([table(one).assign(symbol="BTC"), table(two).assign(symbol="ADA")]).sort_values("time", kind="stable")
        assert "data.symbol=" in refused(path, both.to_csv(index=False), core.AmbiguousDataError, "2 instruments").remedy
        unnamed = both.drop(columns="symbol").to_csv(index=False)
        error = refused(path, unnamed, core.DataError, "contradict each other|several markets alternate")
        assert "repairs" not in error.remedy
    same(accepted(path, pd.concat([table().assign(symbol="BTC"), table(other).assign(symbol="ADA")]).to_csv(index=False), symbol="BTC"))


def test_a_local_hour_that_occurs_twice_names_the_zone(tmp_path):
    for zone, same_change in (("America/New_York", {"America/New_York"}), ("Europe/Berlin", {"Europe/Berlin"})):
        index = pd.date_range("2023-10-10", periods=700, freq="h", tz=zone)
        hourly = CANDLES.set_axis(index.tz_convert("UTC").rename("time"))
        text = table(hourly, time=index.tz_localize(None)).to_csv(index=False)
        path = tmp_path / f"{zone[:3]}.csv"
        error = refused(path, text, core.DataError, ".")
        assert error.remedy.startswith("Set data.timezone=") and "drop_duplicates" not in error.remedy
        named = error.remedy.split("=")[1].split()[0]
        assert named in same_change
        same(accepted(path, text, timezone=named), hourly)


def test_daily_bars_at_local_midnight_are_labelled_by_their_date(tmp_path):
    days = pd.date_range("2022-01-01", periods=700, freq="D", tz="Europe/Berlin")
    epoch = table(time=days.as_unit("ms").asi8).to_csv(index=False)
    error = refused(tmp_path / "daily.csv", epoch, core.GapError, "minutes after")
    assert "data.timezone=Europe/Berlin" in error.remedy
    found = accepted(tmp_path / "daily.csv", epoch, timezone="Europe/Berlin")
    same(found, CANDLES.set_axis(pd.date_range("2022-01-01", periods=700, freq="D", tz="UTC", name="time")))


def test_digits_lost_in_a_spreadsheet_are_named_and_never_repaired(tmp_path):
    text = table(time=[f"{value:.5E}" for value in milliseconds()]).to_csv(index=False)
    for settings in ({}, {"repairs": ["sort", "drop_duplicates", "fill_gaps"], "max_fill": 1.0}):
        refused(tmp_path / "history.csv", text, core.TimestampError, "only 6 significant digits, such as 1.6", **settings)


@pytest.mark.parametrize("name, content, match", [
    ("page.csv", "<!DOCTYPE html><html><body>Please log in</body></html>", "web page"),
    ("sheet.csv", zipped("x", "[Content_Types].xml", "xl/workbook.xml"), "office document"),
    ("two.zip", zipped("x", "a.csv", "b.csv"), "2 files: a.csv, b.csv"),
    ("empty.zip", zipped("x"), "0 files"),
    ("cut.csv", table().to_csv(index=False)[:-30], "line 701 has .* fields, the others have 6.*cut off"),
    ("middle.csv", table().to_csv(index=False).replace(f"\n{TIME[99]}", f"\nx,{TIME[99]}"), "line 101 has 7 fields"),
    ("error.json", '{"error": ["EQuery:Unknown asset pair"]}', "no table of candles"),
    ("cut.json", json.dumps(rows("tohlcv"))[:-9], "cannot be read"),
    ("words.csv", "no candles in this file\nnor here\n", "no separator"),
    ("blank.csv", " \n\n", "empty"), ("zero.csv", "", "empty"),
])
def test_what_is_no_table_of_candles_is_named(tmp_path, name, content, match):
    error = refused(tmp_path / name, content, core.DataError, match)
    assert name in error.problem and error.remedy


def test_rounding_is_mended_and_counted_and_nothing_else(tmp_path):
    factor = 0.9716253
    adjusted = CANDLES.assign(**{name: CANDLES[name] * factor for name in PRICES})
    adjusted.iloc[[200, 500], 1] = np.nextafter(adjusted[["open", "close"]].max(axis=1).iloc[[200, 500]], 0)
    adjusted.iloc[300, 2] = np.nextafter(adjusted[["open", "close"]].min(axis=1).iloc[300], np.inf)
    (tmp_path / "history.csv").write_text(table(adjusted).to_csv(index=False))
    market = load_candles(f"file:{tmp_path / 'history.csv'}")
    changed = (market.candles != adjusted).any(axis=1)
    assert market.repairs == {"rounding": 3} and changed.sum() == 3
    assert np.abs(market.candles / adjusted - 1).max().max() < 1e-15
    tick = CANDLES.copy()
    tick.iloc[9, 1] = max(tick["open"].iloc[9], tick["close"].iloc[9]) * 0.9999
    refused(tmp_path / "history.csv", table(tick).to_csv(index=False), core.HighLowError, "row 9 ")


def test_a_bar_that_has_not_closed_is_dropped_and_the_future_refused(tmp_path):
    path, newest = tmp_path / "history.csv", TIME[-1]
    path.write_text(table().to_csv(index=False))
    for late, count in (("3h59min", 1), ("4h", 0)):
        market = load_candles(f"file:{path}", now=(newest + pd.Timedelta(late)).to_pydatetime())
        assert len(market.candles) == 700 - count and market.repairs == ({"unfinished": 1} if count else {})
    with pytest.raises(core.TimestampError, match="2 bars begin after the current time"):
        load_candles(f"file:{path}", now=(newest - pd.Timedelta("5h")).to_pydatetime())


def test_a_price_below_zero_names_a_history_without_it(tmp_path):
    oil = CANDLES.copy()
    oil.iloc[100, :4] = [17.73, 17.85, -40.32, -37.63]
    error = refused(tmp_path / "oil.csv", table(oil).to_csv(index=False), core.NegativeValueError, "row 100")
    assert error.remedy.startswith("Set data.days=99")
    assert len(accepted(tmp_path / "oil.csv", table(oil).to_csv(index=False), days=99)) == 594


def test_what_was_understood_is_shown_even_if_refused(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text(CSV["CryptoDataDownload"]().replace("\n" + CSV["CryptoDataDownload"]().splitlines()[40], ""))
    report = inspect_candles(f"file:{path}")
    assert report.market is None and isinstance(report.error, core.GapError)
    stored = json.loads(core.canonical_json(report.to_dict()))
    assert stored["layouts"][0]["columns"]["volume"] == "Volume BTC" and stored["layouts"][0]["newest_first"]
    assert stored["quality"]["faults"] == {"gap": 1} and stored["error"] == "GapError" and "fill_gaps" in stored["remedy"]


def test_times_of_text_need_not_have_the_same_precision():
    times = ["2024-01-31 04:00", "2024-01-31 08:00:00", "2024-01-31T12:00:00.000Z", "2024-01-31 16:00+00:00"]
    assert (read_times(pd.Series(times)).hour == [4, 8, 12, 16]).all()
    assert read_times(pd.Series(["31/01/24 4:05"]), TimeFormat()).strftime("%Y-%m-%d %H:%M")[0] == "2024-01-31 04:05"


ZONES = ("America/New_York", "Europe/Berlin", "Asia/Tokyo")
FORMATS = ("%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%SZ", "%Y.%m.%d %H:%M:%S", "%Y/%m/%d %H:%M", "%d.%m.%Y %H:%M",
           "%m/%d/%Y %I:%M %p", "%b %d, %Y %H:%M", "%d-%b-%Y %H:%M", "%Y%m%d %H%M%S", "%Y%m%d%H%M")


def damage(rng, rows: pd.DataFrame) -> pd.DataFrame:
    "Rows with some of the faults that files have; the columns are time and OHLCV."
    kinds = rng.choice(["none", "order", "reverse", "double", "partial", "contradict", "holes", "splinter", "missing", "two markets"],
                       size=rng.integers(1, 4), replace=False)
    for kind in kinds:
        some = rng.choice(len(rows) - 2, 4, replace=False) + 1
        if kind == "order":
            rows = rows.iloc[rng.permutation(len(rows))]
        elif kind == "reverse":
            rows = rows[::-1]
        elif kind in ("double", "partial", "contradict"):
            again = rows.iloc[some].copy()
            if kind == "partial":
                again[["high", "low", "close"]] = np.column_stack([again["open"]] * 3)
                again["volume"] /= 50
            elif kind == "contradict":
                again["close"] = again["close"] * 1.0003
            rows = pd.concat([rows.iloc[:300], again, rows.iloc[300:]])
        elif kind == "holes":
            rows = rows.drop(rows.index[some])
        elif kind == "splinter":
            rows = rows.copy()
            rows.iloc[some[0], 0] += pd.Timedelta(minutes=int(rng.integers(1, 200)))
        elif kind == "missing":
            rows = rows.copy()
            rows.iloc[some, rng.integers(1, 6)] = np.nan
        elif kind == "two markets":
            other = rows.iloc[:: int(rng.integers(1, 4))].copy()
            other[list(PRICES)] /= rng.choice([3.0, 700.0])
            rows = pd.concat([rows, other]) if rng.random() < 0.5 else pd.concat([rows, other]).sort_values("time", kind="stable")
    return rows.reset_index(drop=True)


def written(rng, rows: pd.DataFrame) -> tuple[bytes, dict]:
    "The rows as a file in a layout drawn at random, and the settings with which a careful user reads it."
    rows, settings, time = rows.copy(), {}, pd.DatetimeIndex(rows["time"])
    kind = rng.choice(["format", "epoch", "mixed", "local", "columns"])
    if kind == "format":
        rows["time"] = time.strftime(str(rng.choice(FORMATS)))
    elif kind == "epoch":
        rows["time"] = time.as_unit("ns").asi8 // 10 ** int(rng.choice([0, 3, 6, 9]))
    elif kind == "mixed":
        rows["time"] = np.where(np.arange(len(rows)) < 350, time.as_unit("ms").asi8, time.as_unit("us").asi8)
    elif kind == "local":
        settings["timezone"] = str(rng.choice(ZONES))
        rows["time"] = time.tz_convert(settings["timezone"]).strftime("%Y-%m-%d %H:%M:%S")
    else:
        rows.insert(1, "clock", time.strftime("%H:%M"))
        rows["time"] = time.strftime("%d.%m.%Y")
    names = dict(zip(("time", "clock", *OHLCV), [("time", "clock", *OHLCV), ("Date", "Time", "Open", "High", "Low", "Close", "Vol."),
                                                 ("日付", "時刻", "始値", "高値", "安値", "終値", "出来高")][rng.integers(0, 3)]))
    if rng.random() < 0.3:
        text = rows.astype(object).where(rows.notna(), None).rename(columns=names).to_json(orient="records", force_ascii=False)
        return text.encode(), settings
    separator = str(rng.choice([",", ";", "\t", "|"]))
    decimal = "," if separator != "," and rng.random() < 0.5 else "."
    text = rows.rename(columns=names).to_csv(index=False, sep=separator, decimal=decimal, header=rng.random() < 0.8)
    text = ("Downloaded from a vendor\n" if rng.random() < 0.3 else "") + text
    data = text.encode(str(rng.choice(["utf-8", "utf-8-sig", "utf-16", "cp932"])))
    return (gzip.compress(data) if rng.random() < 0.3 else data), settings


def check_bars(found: pd.DataFrame, seed: int) -> int:
    "Number of bars without trades, after comparing all others with the known market."
    filled = (found["volume"] == 0) & (found["open"] == found["close"].shift()) & (found["high"] == found["low"])
    expected = CANDLES.reindex(found.index[~filled]).rename_axis("time")
    pd.testing.assert_frame_equal(found[~filled], expected, rtol=1e-12, check_freq=False, obj=f"seed {seed}")
    return int(filled.sum())


@pytest.mark.untraced
@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(8))
def test_no_accepted_file_and_no_named_remedy_yields_a_bar_that_is_not_in_the_file(tmp_path, chunk):
    accepted_files = tried_remedies = 0
    for seed in range(25 * chunk, 25 * chunk + 25):
        rng = np.random.default_rng(seed)
        data, settings = written(rng, damage(rng, table(CANDLES[:400])))
        repairs = list(rng.permutation(["sort", "drop_duplicates", "drop_missing", "drop_off_grid", "fill_gaps"])[:rng.integers(0, 6)])
        source = f"file:{tmp_path / 'history'}"
        (tmp_path / "history").write_bytes(data)
        try:
            found = load_candles(source, repairs=repairs, max_fill=0.05, min_bars=100, **settings).candles
            assert check_bars(found, seed) <= (20 if "fill_gaps" in repairs else 0)
            accepted_files += 1
        except core.DataError as error:
            assert error.problem and error.remedy, seed
            if "(tried" in error.remedy:
                overrides = error.remedy.removeprefix("Set ").split(" (tried")[0].split(" and ")
                named = load_settings([f"data.repairs=[{','.join(repairs)}]", "data.max_fill=0.05", *overrides]).data
                zone = {"timezone": named.timezone} if named.timezone else {}
                found = load_candles(source, named.days, repairs=named.repairs, calendar=named.calendar, max_fill=named.max_fill,
                                     min_bars=100, **settings | zone).candles
                check_bars(found, seed)
                tried_remedies += 1
    assert accepted_files >= 2 and tried_remedies >= 3      # the test is not empty


@pytest.mark.parametrize("heading, values, timezone", [
    ("MTS", lambda: milliseconds(), None), ("Date (UTC)", lambda: TIME.strftime("%Y-%m-%d %H:%M"), None),
    ("Zeitpunkt", lambda: TIME.strftime("%Y-%m-%d %H:%M"), None),
    ("Time (EST)", lambda: TIME.tz_convert("Etc/GMT+5").strftime("%Y-%m-%d %H:%M"), "Etc/GMT+5"),
    ("Local time", lambda: TIME.tz_convert("Asia/Tokyo").strftime("%d.%m.%Y %H:%M:%S.000 GMT+0900"), None)])
def test_a_heading_of_times_may_be_unknown_but_a_zone_in_it_is_not_ignored(tmp_path, heading, values, timezone):
    text = table(time=values()).rename(columns={"time": heading}).to_csv(index=False)
    if timezone:
        refused(tmp_path / "history.csv", text, core.AmbiguousDataError, "names the zone EST.*data.timezone")
    same(accepted(tmp_path / "history.csv", text, timezone=timezone))


def test_two_columns_of_times_that_disagree_need_a_choice(tmp_path):
    path, later = tmp_path / "history.csv", table(timestamp=milliseconds() + 1)
    refused(path, later.to_csv(index=False), core.AmbiguousDataError, "'timestamp' and 'time' have different times")
    same(accepted(path, later.to_csv(index=False), columns={"time": "time"}))
    local = table(time=TIME.tz_convert("Asia/Tokyo").strftime("%Y-%m-%d %H:%M"), unix=milliseconds())       # an offset of a zone
    same(accepted(path, local.to_csv(index=False)))


def test_a_column_without_values_is_no_reason_to_drop_every_row(tmp_path):
    error = refused(tmp_path / "history.csv", table().assign(close="").to_csv(index=False), core.MissingValueError, "row 0 .*close is nan")
    assert "drop_missing" not in error.remedy


@pytest.mark.parametrize("text, name, value", [
    ("data.columns={close: Kurs, time: 0}", "columns", {"close": "Kurs", "time": 0}),
    ("data.symbol=BTC/USDT:USDT", "symbol", "BTC/USDT:USDT"), ("data.symbol=7203", "symbol", "7203"),
    ("data.time_format=%d/%m/%Y %H:%M", "time_format", "%d/%m/%Y %H:%M"),
    ("data.timezone=America/New_York", "timezone", "America/New_York"), ("data.decimal=,", "decimal", ","),
    ('data.decimal=","', "decimal", ","),
    ("data.decimal=.", "decimal", "."), ("data.repairs=[drop_off_grid, fill_gaps]", "repairs", ["drop_off_grid", "fill_gaps"])])
def test_the_settings_that_errors_name_are_accepted_as_they_are_written(text, name, value):
    assert getattr(load_settings([text]).data, name) == value


def german(row: int, text: str) -> str:
    lines = CSV["German spreadsheet"]().splitlines()
    lines[row] = lines[row].rsplit(";", 1)[0] + ";" + text
    return "\n".join(lines)


def test_thousands_in_one_column_follow_the_decimals_of_the_others(tmp_path):
    whole = CANDLES.assign(volume=np.arange(700) * 37.0 + 900)
    rows = table(whole, time=TIME.strftime("%d.%m.%Y %H:%M")).assign(volume=[f"{v:,.0f}".replace(",", ".") for v in whole["volume"]])
    same(accepted(tmp_path / "history.csv", rows.to_csv(index=False, sep=";", decimal=",")), whole)
    american = table(whole).assign(volume=[f"{v:,.0f}" for v in whole["volume"]]).to_csv(index=False, quoting=1)
    same(accepted(tmp_path / "history.csv", american), whole)


def test_a_separator_of_thousands_that_makes_no_groups_is_no_number(tmp_path):
    refused(tmp_path / "history.csv", german(50, "30002.91"), core.DataError, "contradict each other|volume is '30002.91'")
    text = CSV["German spreadsheet"]()
    refused(tmp_path / "history.csv", text, core.ColumnTypeError, "not a number", decimal=".")


@pytest.mark.parametrize("row", [5, 100, 351, 600])
def test_a_layout_that_changes_half_way_is_refused(tmp_path, row):
    lines = table().to_csv(index=False).splitlines()
    for changed in ([line.replace(",", ";") for line in lines[row:]], [line.replace(",", ",BTC,", 1) for line in lines[row:]]):
        refused(tmp_path / "history.csv", "\n".join(lines[:row] + changed), core.DataError,
                "layout changes|fields, the others have|no separator")


def test_columns_before_the_prices_are_not_taken_for_prices(tmp_path):
    quote = (CANDLES["volume"] * CANDLES["close"]).to_numpy()
    order = ("close", "high", "low", "open", "volume")
    gate = pd.DataFrame({"t": milliseconds() // 1000, "quote": quote, **{name: CANDLES[name].to_numpy() for name in order},
                         "done": "true"})
    same(accepted(tmp_path / "gate.csv", gate.to_csv(index=False, header=False)))
    numbered = table(time=milliseconds() // 1000).reset_index()
    same(accepted(tmp_path / "numbered.csv", numbered.to_csv(index=False, header=False)))
    heading, *lines = table().to_csv(index=False).splitlines()
    trailing = "\n".join([heading, *(f"{line}," for line in lines)])
    same(accepted(tmp_path / "trailing.csv", trailing))
    with pytest.raises(core.DataError):
        wrong = {"time": 0, "open": 1, "high": 1, "low": 4, "close": 2, "volume": 6}
        load_candles(f"file:{tmp_path / 'gate.csv'}", columns=wrong)


def test_a_table_with_the_prices_of_two_markets_side_by_side_needs_a_choice(tmp_path):
    other = simulate_market(bars=700, seed=6)[0] / 5000
    wide = pd.DataFrame({"time": TIME, **{f"{name}_BTC": CANDLES[name].to_numpy() for name in OHLCV},
                         **{f"{name}_ETH": other[name].to_numpy() for name in OHLCV}})
    refused(tmp_path / "wide.csv", wide.to_csv(index=False), core.AmbiguousDataError, "data.columns")
    same(accepted(tmp_path / "wide.csv", wide.to_csv(index=False), columns={name: f"{name}_BTC" for name in OHLCV}))


def test_prices_as_large_as_the_days_of_a_spreadsheet_are_not_times(tmp_path):
    dollars = CANDLES.assign(**{name: (CANDLES[name] / 120).round(2) for name in PRICES})          # about 40,000
    texts = [[*map(str, row[:5]), time] for row, time in zip(dollars.to_numpy().tolist(), milliseconds().tolist())]
    same(accepted(tmp_path / "bitbank.json", json.dumps(texts)), dollars)
    bare = table(dollars, time=milliseconds())[[*OHLCV, "time"]].to_csv(index=False, header=False)
    same(accepted(tmp_path / "bare.csv", bare), dollars)
