"""Candles from exchanges: a local server uses the formats of bitbank, Binance and Kraken, with their faults."""
import json
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from datetime import datetime, timezone
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest

from ml_ensemble import core
from ml_ensemble.candle_schema import validate
from ml_ensemble.candles import OHLCV
from ml_ensemble.exchange import (
    CandleCacheError, ExchangeAccessError, ExchangeDataError, ExchangeUnavailableError, MarketNotFoundError, cache_folder,
    exchange_client, fetch_candles,
)

HOUR = 3_600_000
STEP = 4 * HOUR
START = 1_693_526_400_000        # 2023-09-01, so that a year ends in every history
BARS = 1200
PLACES = {"bitbank": "bitbank:BTC/JPY:4h", "binance": "binance:BTC/USDT:4h", "kraken": "kraken:BTC/USD:4h"}
KINDS = list(PLACES)


def walk(bars: int = BARS) -> dict[int, list[float]]:
    """Candles of a random walk, as an exchange stores them: by time, with two decimals."""
    random = np.random.default_rng(5)
    close = np.round(30_000 + np.cumsum(random.normal(0, 50, bars)), 2)
    opens = np.concatenate([close[:1], close[:-1]])
    high, low = np.maximum(opens, close) + 10, np.minimum(opens, close) - 10
    volume = np.round(random.uniform(1, 9, bars), 4)
    return {START + STEP * i: list(map(float, row)) for i, row in enumerate(np.column_stack([opens, high, low, close, volume]))}


class Server:
    """An exchange behind HTTP; `faults` are used up one a request for candles, `edit` changes every page."""

    def __init__(self, kind: str, bars: int = BARS):
        self.kind, self.rows, self.active, self.markets = kind, walk(bars), True, True
        self.now = max(self.rows) + 60_000                 # one minute into the last candle
        self.faults: deque = deque()
        self.forever = None                                # a fault of every request
        self.edit = lambda page: page
        self.log: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True               # 40 ms a request otherwise

            def log_message(self, *words):
                pass

            def date_time_string(self, timestamp=None):
                return formatdate(server.now / 1000, usegmt=True)

            def send(self, body, status=200, kind="application/json", **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                server.log.append(self.path)
                fault = server.forever or (server.faults.popleft() if server.is_candles(self.path) and server.faults else None)
                if fault is None or fault(self) is self:
                    server.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    @property
    def candle_requests(self) -> list[str]:
        return [path for path in self.log if self.is_candles(path)]

    def is_candles(self, path: str) -> bool:
        return any(word in path for word in ("candlestick", "klines", "OHLC"))

    def visible(self) -> list[tuple[int, list[float]]]:
        return sorted((moment, row) for moment, row in self.rows.items() if moment <= self.now)

    def answer(self, handler):
        url = urlsplit(handler.path)
        getattr(self, self.kind)(handler, url.path, {name: values[0] for name, values in parse_qs(url.query).items()})

    def bitbank(self, handler, path, query):
        if path == "/spot/pairs":
            pairs = [{"name": f"{base}_jpy", "base_asset": base, "quote_asset": "jpy", "maker_fee_rate_base": "0",
                      "taker_fee_rate_base": "0", "maker_fee_rate_quote": "-0.0002", "taker_fee_rate_quote": "0.0012",
                      "unit_amount": "0.0001", "limit_max_amount": "1000", "market_max_amount": "10", "price_digits": 0,
                      "amount_digits": 4, "is_enabled": base != "btc" or self.active, "stop_order": False}
                     for base in ("btc", "eth", "xrp") if base != "btc" or self.markets]
            return handler.send({"success": 1, "data": {"pairs": pairs}})
        _, pair, _, kind, name = path.split("/")
        year = lambda moment: f"{datetime.fromtimestamp(moment / 1000, timezone.utc):%Y}"
        page = self.edit([(moment, row) for moment, row in self.visible() if year(moment) == name])
        if (pair, kind) != ("btc_jpy", "4hour") or not page:
            return handler.send({"success": 0, "data": {"code": 10000}}, status=404)
        rows = [[*map(str, row), moment] for moment, row in page]
        return handler.send({"success": 1, "data": {"candlestick": [{"type": kind, "ohlcv": rows}], "timestamp": self.now}})

    def binance(self, handler, path, query):
        if path == "/api/v3/time":
            return handler.send({"serverTime": self.now})
        if path == "/api/v3/exchangeInfo":
            symbols = [{"symbol": f"{base}USDT", "status": "TRADING" if self.active else "BREAK", "baseAsset": base,
                        "baseAssetPrecision": 8, "quoteAsset": "USDT", "quotePrecision": 8, "quoteAssetPrecision": 8,
                        "orderTypes": ["LIMIT", "MARKET"], "isSpotTradingAllowed": True, "isMarginTradingAllowed": True,
                        "filters": [{"filterType": "PRICE_FILTER", "minPrice": "0.01", "maxPrice": "1000000", "tickSize": "0.01"},
                                    {"filterType": "LOT_SIZE", "minQty": "0.00001", "maxQty": "9000", "stepSize": "0.00001"}],
                        "permissions": ["SPOT"], "permissionSets": [["SPOT"]]}
                       for base in ("BTC", "ETH") if base != "BTC" or self.markets]
            return handler.send({"timezone": "UTC", "serverTime": self.now, "rateLimits": [], "exchangeFilters": [],
                                 "symbols": symbols})
        assert path == "/api/v3/klines" and query["interval"] == "4h", path
        since, end = int(query.get("startTime", 0)), int(query.get("endTime", self.now))
        page = self.edit([(m, row) for m, row in self.visible() if since <= m <= end][:min(1000, int(query.get("limit", 500)))])
        return handler.send([[m, *map(str, row), m + STEP - 1, "1.0", 7, "1.0", "1.0", "0"] for m, row in page])

    def kraken(self, handler, path, query):
        result = lambda value: handler.send({"error": [], "result": value})
        if path == "/0/public/Time":
            return result({"unixtime": self.now // 1000, "rfc1123": formatdate(self.now / 1000, usegmt=True)})
        if path == "/0/public/AssetPairs":
            return result({f"X{base}ZUSD": {
                "altname": f"{base}USD", "wsname": f"{base}/USD", "aclass_base": "currency", "base": f"X{base}",
                "aclass_quote": "currency", "quote": "ZUSD", "lot": "unit", "pair_decimals": 1, "lot_decimals": 8,
                "lot_multiplier": 1, "leverage_buy": [2], "leverage_sell": [2], "fees": [[0, 0.26]], "fees_maker": [[0, 0.16]],
                "fee_volume_currency": "ZUSD", "margin_call": 80, "margin_stop": 40, "ordermin": "0.0001",
                "status": "online" if self.active else "cancel_only"}
                for base in ("XBT", "ETH") if base != "XBT" or self.markets})
        assert path == "/0/public/OHLC" and query["interval"] == "240", path
        since = int(query.get("since", 0)) * 1000
        page = self.edit([(m, row) for m, row in self.visible()[-720:] if m > since])
        o = [[m // 1000, *(f"{x}" for x in row[:4]), f"{row[3]}", f"{row[4]}", 12] for m, row in page]
        return result({query["pair"]: o, "last": self.visible()[-2][0] // 1000})

    def finished(self, days: float | None = None) -> pd.DataFrame:
        """What an honest source must return."""
        since = 0 if days is None else (self.now - days * 24 * HOUR) // STEP * STEP
        kept = [(m, row) for m, row in self.visible() if m + STEP <= self.now and m >= since]
        index = pd.DatetimeIndex([m * 10**6 for m, _ in kept], tz="UTC", name="time")
        return pd.DataFrame([row for _, row in kept], index=index, columns=list(OHLCV))


@pytest.fixture
def start():
    servers = []

    def begin(kind: str = "bitbank", bars: int = BARS) -> Server:
        servers.append(Server(kind, bars))
        return servers[-1]
    yield begin
    for server in servers:
        server.close()


class Fetcher:
    """Fetches into one cache without sleeping; notes waits and lines of progress."""

    def __init__(self, folder):
        self.folder, self.waits, self.lines = folder, [], []

    def __call__(self, server, days=None, *, client=None, ahead=0, place=None, timeout=5.0, **more):
        if client is None:
            client = exchange_client(server.kind, server.url, timeout)
            client.rateLimit = 0
        return fetch_candles(place or PLACES[server.kind], days, cache=self.folder, client=client, sleep=self.waits.append,
                             jitter=lambda: 0.5, progress=self.lines.append, clock=self.clock(server, ahead), **more)

    @staticmethod
    def clock(server, ahead=0):
        return lambda: datetime.fromtimestamp((server.now + ahead) / 1000, timezone.utc)


@pytest.fixture
def fetch(tmp_path):
    return Fetcher(tmp_path / "cache")


def same(left: pd.DataFrame, right: pd.DataFrame):
    pd.testing.assert_frame_equal(left, right, check_freq=False, check_exact=True)


# ---- each exchange, as it should be ----

@pytest.mark.parametrize("kind", KINDS)
def test_finished_candles_of_each_exchange_arrive_whole_in_the_schema_and_with_their_facts(kind, start, fetch):
    server = start(kind)
    history = fetch(server, days=119)                       # within Kraken's 720 candles
    same(history.candles, server.finished(119))
    validate(history.candles)
    assert history.market == PLACES[kind] and history.new_bars == len(history.candles) == 714
    assert not history.offline and history.gaps == history.revisions == history.notes == []
    assert history.clock_source == ("Date header" if kind == "bitbank" else "fetch_time")
    assert history.newest_age == pd.Timedelta(1, "min") and fetch.waits == []
    assert PLACES[kind] in repr(history)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_week_asks_for_what_is_new_and_an_overlap(kind, start, fetch):
    server = start(kind)
    server.now -= 42 * STEP
    fetch(server, days=100)
    before = len(server.candle_requests)
    server.now += 42 * STEP
    history = fetch(server, days=100)
    assert history.new_bars == 42 and len(server.candle_requests) == before + 1
    same(history.candles, server.finished(100))
    query = parse_qs(urlsplit(server.candle_requests[-1]).query)
    if kind == "binance":
        assert int(query["startTime"][0]) == server.now - 60_000 - (42 + 24) * STEP
    if kind == "kraken":
        assert int(query["since"][0]) * 1000 == server.now - 60_000 - (42 + 25) * STEP   # ccxt asks one bar early


def test_three_weeks_grow_one_history(start, fetch):
    server = start("bitbank")
    end, new = server.now, []
    for week in range(3, -1, -1):
        server.now = end - 42 * STEP * week
        new.append(fetch(server, days=150).new_bars)
    assert new == [900, 42, 42, 42]
    same(fetch(server, days=171, offline=True).candles, server.finished(171))


def test_bitbank_is_asked_for_one_file_a_year(start, fetch):
    server = start("bitbank")
    same(fetch(server, days=199).candles, server.finished(199))
    assert server.candle_requests == ["/btc_jpy/candlestick/4hour/2023", "/btc_jpy/candlestick/4hour/2024"]


@pytest.mark.parametrize("kind", ["bitbank", "binance"])
def test_the_whole_history_begins_at_the_listing_and_is_found_in_few_requests(kind, start, fetch):
    server = start(kind)
    same(fetch(server).candles, server.finished())
    assert len(server.candle_requests) <= 8


def test_more_days_than_before_add_the_older_part_once(start, fetch):
    server = start("binance", bars=BARS)
    assert fetch(server, days=30).new_bars == 180
    longer = fetch(server, days=180)
    same(longer.candles, server.finished(180))
    assert longer.new_bars == 900
    asked = len(server.candle_requests)
    assert fetch(server, days=180).new_bars == 0 and len(server.candle_requests) == asked + 1
    same(fetch(server, days=30).candles, server.finished(30))


def test_kraken_keeps_720_candles_and_the_cache_keeps_them_longer(start, fetch):
    server = start("kraken")
    server.now -= 300 * STEP
    first = fetch(server, days=190)
    assert len(first.candles) == 719 and any("history begins at 2023-10-01 00:00" in note for note in first.notes)
    server.now += 300 * STEP
    second = fetch(server, days=190)
    assert second.new_bars == 300 and len(second.candles) == 1019 and second.gaps == []
    same(second.candles, server.finished().iloc[-1019:])


# ---- faults that pass ----

def reply(status=200, body=b"", kind="application/json", **headers):
    return lambda handler: handler.send(body, status, kind, **headers)


def truncated(handler):
    handler.send(b'{"success":1,"data":{"candlestick":[{"type":"4hour","ohlcv":[["1","2"')


def broken_off(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{\"suc")
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def hang(handler):
    time.sleep(0.6)
    handler.close_connection = True


BITBANK_CODE = lambda code, status=200: reply(status, {"success": 0, "data": {"code": code}})
PASSING = {
    "429": reply(429, b"{}"), "429 of a proxy": reply(429, b"slow down", "text/html"), "500": reply(500, b"{}"),
    "500 page": reply(500, b"<html>", "text/html"), "502": reply(502, b"<html>", "text/html"), "503": reply(503, b""),
    "truncated JSON": truncated, "connection broken off": broken_off,
    "page with status 200": reply(200, b"<html>maintenance</html>", "text/html"),
    "empty body": reply(200, b""),
}
CASES = [(kind, name) for kind in KINDS for name in PASSING]
OWN = {
    ("bitbank", "maintenance 10007"): BITBANK_CODE(10007), ("bitbank", "maintenance 10007 with 503"): BITBANK_CODE(10007, 503),
    ("bitbank", "too many 10009"): BITBANK_CODE(10009), ("bitbank", "too many 10009 with 429"): BITBANK_CODE(10009, 429),
    ("bitbank", "system error 10001"): BITBANK_CODE(10001, 500), ("bitbank", "busy 70011"): BITBANK_CODE(70011),
    ("binance", "banned 418"): reply(418, {"code": -1003, "msg": "Way too many requests"}),
    ("kraken", "rate limit"): reply(200, {"error": ["EGeneral:Too many requests"]}),
    ("kraken", "unavailable"): reply(200, {"error": ["EService:Unavailable"]}),
}


@pytest.mark.parametrize("kind, name", [*CASES, *OWN], ids=lambda value: value)
def test_a_fault_that_passes_is_asked_again_and_changes_nothing(kind, name, start, fetch):
    server = start(kind)
    server.faults.append(OWN.get((kind, name)) or PASSING[name])
    same(fetch(server, days=90).candles, server.finished(90))
    assert fetch.waits == [1.0] and "attempt 2 of 6" in fetch.lines[0]


def test_a_blank_line_before_the_json_is_no_fault(start, fetch):
    server = start("binance")
    rows = [[m, *map(str, row), m + STEP - 1, "1.0", 7, "1.0", "1.0", "0"] for m, row in server.visible()[-190:]]
    server.faults.append(reply(200, b"\r\n " + json.dumps(rows).encode()))
    same(fetch(server, days=30).candles, server.finished(30))
    assert fetch.waits == [] and len(server.candle_requests) == 1


def test_a_time_out_is_asked_again(start, fetch):
    server = start("bitbank")
    server.faults.append(hang)
    same(fetch(server, days=90, timeout=0.3).candles, server.finished(90))
    assert fetch.waits == [1.0] and "RequestTimeout" in fetch.lines[0]


def test_the_waits_double_and_follow_the_exchanges_own_request(start, fetch):
    server = start("kraken")
    server.faults.extend([reply(500), reply(500), reply(429, b"{}", Retry_After="42"), reply(500)])
    same(fetch(server, days=90).candles, server.finished(90))
    assert fetch.waits == [1.0, 2.0, 42.0, 8.0]


# ---- faults that do not pass ----

@pytest.mark.parametrize("fault", [reply(500), BITBANK_CODE(10007), truncated], ids=["500", "maintenance", "truncated"])
def test_an_exchange_that_stays_away_is_a_named_error_after_six_attempts(fault, start, fetch):
    server = start("bitbank")
    server.forever = fault
    with pytest.raises(ExchangeUnavailableError, match="holds no candles"):
        fetch(server, days=90)
    assert fetch.waits == [1.0, 2.0, 4.0, 8.0, 16.0] and len(server.log) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_without_network_a_warm_cache_is_returned_with_its_age(kind, start, fetch):
    server = start(kind)
    candles = fetch(server, days=90).candles
    server.close()
    server.now += 30 * HOUR
    history = fetch(server, days=91.25)
    same(history.candles, candles)
    assert history.offline and history.new_bars == 0 and history.clock_source == "own clock"
    assert history.newest_age == pd.Timedelta(30, "h") + pd.Timedelta(1, "min")
    assert "cannot be reached" in history.notes[-1] and "30.0 h ago" in history.notes[-1]
    server.now += 365 * 24 * HOUR
    same(fetch(server, days=30, offline=True).candles, candles[-180:])         # the newest days that there are


def test_without_network_and_without_cache_there_is_a_named_error(start, fetch):
    server = start("bitbank")
    server.close()
    with pytest.raises(ExchangeUnavailableError, match="bitbank:BTC/JPY:4h: bitbank cannot be reached"):
        fetch(server, days=90)


def test_a_first_download_that_breaks_keeps_its_candles_and_goes_on_from_there(start, fetch):
    server = start("binance", bars=2500)
    server.faults.extend([lambda handler: handler, *[reply(503)] * 6])       # the first page arrives
    with pytest.raises(ExchangeUnavailableError, match="after 1,000 candles"):
        fetch(server, days=416)
    history = fetch(server, days=416)
    same(history.candles, server.finished(416))
    assert history.new_bars == len(history.candles) - 1000


def test_an_older_part_that_breaks_leaves_no_hole(start, fetch):
    server = start("binance", bars=2500)
    recent = fetch(server, days=30).candles
    server.faults.extend([lambda handler: handler, lambda handler: handler, *[reply(503)] * 6])
    history = fetch(server, days=416)
    assert history.offline
    same(history.candles, recent)
    same(fetch(server, days=416).candles, server.finished(416))


def test_only_the_cache_is_read_offline(start, fetch, monkeypatch):
    server = start("bitbank")
    candles = fetch(server, days=90).candles
    asked = len(server.log)
    monkeypatch.setitem(sys.modules, "ccxt", None)
    history = fetch_candles(PLACES["bitbank"], cache=fetch.folder, offline=True, clock=fetch.clock(server))
    same(history.candles, candles)
    assert history.offline and len(server.log) == asked


def test_ccxt_that_is_not_installed_is_named_with_its_extra(fetch, monkeypatch):
    monkeypatch.setitem(sys.modules, "ccxt", None)
    with pytest.raises(core.MissingExtraError, match=r'pip install "ml_ensemble\[exchange\]"'):
        fetch_candles(PLACES["bitbank"], cache=fetch.folder)


# ---- which market ----

@pytest.mark.parametrize("kind", KINDS)
def test_a_delisted_market_is_a_named_error_even_with_a_cache(kind, start, fetch):
    server = start(kind)
    fetch(server, days=30)
    server.active = False
    with pytest.raises(MarketNotFoundError, match="not traded on"):
        fetch(server, days=30)
    server.active, server.markets = True, False
    with pytest.raises(MarketNotFoundError, match="delisted"):
        fetch(server, days=30)


@pytest.mark.parametrize("place, words", [
    ("bitbank:BTC/JPX:4h", "Use one of BTC/JPY"), ("bitbank:btc/jpy:4h", "BTC/JPY"), ("bitbank:BTCJPY:4h", "BTC/JPY"),
    ("bitbank:BTC/JPY:3h", "Use one of 1m, 5m, 15m, 30m, 1h, 4h"), ("bitbank:BTC/JPY:1M", "no fixed length"),
    ("bitbank:BTC/JPY:0h", "no fixed length")])
def test_a_market_that_does_not_exist_is_named_with_those_that_do(place, words, start, fetch):
    with pytest.raises(MarketNotFoundError) as caught:
        fetch(start("bitbank"), days=30, place=place)
    assert words in str(caught.value)


def test_an_exchange_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    with pytest.raises(MarketNotFoundError, match="Did you mean bitbank"):
        fetch_candles("bitbnk:BTC/JPY:4h", cache=tmp_path)
    for place in ("bitbank", "bitbank:BTC/JPY", "bitbank:../x:4h", ":BTC/JPY:4h", "sandbox:"):
        with pytest.raises(core.ConfigError, match="EXCHANGE:SYMBOL:TIMEFRAME"):
            fetch_candles(place, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf")])
def test_days_must_be_a_length(days, tmp_path):
    with pytest.raises(core.ConfigError, match="days is"):
        fetch_candles(PLACES["bitbank"], days, cache=tmp_path)


def test_an_exchange_that_refuses_is_not_asked_again(start, fetch):
    server = start("kraken")
    server.faults.append(reply(200, {"error": ["EGeneral:Permission denied"]}))
    with pytest.raises(ExchangeAccessError, match="PermissionDenied"):
        fetch(server, days=30)
    server.faults.append(reply(200, {"error": ["EQuery:Unknown asset pair"]}))
    with pytest.raises(core.MLEnsembleError, match="Unknown asset pair"):
        fetch(server, days=30)
    assert fetch.waits == []


def test_a_response_of_another_shape_is_a_named_error(start, fetch):
    for rows in ([["now", 1, 1, 1, 1, 1]], [[1, 2]], 5):
        with pytest.raises(ExchangeDataError, match="ccxt cannot read the response"):
            fetch(server := start("bitbank"), days=30, client=Odd(server, lambda *words, rows=rows: rows), place="odd:A/B:4h")


# ---- pages ----

def test_reordered_and_overlapping_pages_become_one_history(start, fetch):
    server = start("binance", bars=2500)
    shuffle = np.random.default_rng(1).permutation

    def edit(page):
        edge = [(m, server.rows[m]) for m in (page[0][0] - STEP, page[0][0] - 2 * STEP) if m in server.rows] if page else []
        page = page[:400] + page[350:400] + edge
        return [page[i] for i in shuffle(len(page))]
    server.edit = edit
    same(fetch(server, days=416).candles, server.finished(416))


def test_a_market_without_candles_is_a_named_error(start, fetch):
    for kind in KINDS:
        server = start(kind)
        server.edit = lambda page: []
        with pytest.raises(ExchangeDataError, match="no finished candle from"):
            fetch(server, days=90)
        assert len(server.candle_requests) < 20


def test_the_same_candle_for_ever_ends(start, fetch):
    server = start("binance", bars=6000)
    server.edit = lambda page: [(START + 10 * STEP, server.rows[START + 10 * STEP])]
    history = fetch(server, days=999)                       # ccxt hides what lies before the time that was asked for
    assert len(history.candles) == 1 and len(server.candle_requests) < 20
    assert any("5,988 newest finished candles" in note for note in history.notes)
    client = Odd(server, lambda rows, since, limit, params: rows[10:11])
    with pytest.raises(ExchangeDataError, match="repeats older candles at"):
        fetch(server, days=999, client=client, place="odd:A/B:4h")
    assert client.calls < 20


def test_one_candle_a_page_ends_and_is_kept(start, fetch):
    server = start("binance")
    server.edit = lambda page: page[:1]
    with pytest.raises(ExchangeDataError, match="one candle a page"):
        fetch(server, days=190)
    assert len(server.candle_requests) < 30
    server.edit = lambda page: page
    assert fetch(server, days=190).new_bars == len(server.finished(190)) - 20


class Odd:
    """A client whose pages follow `rule(rows, since, limit, params)`."""

    def __init__(self, server, rule, limit=100):
        self.has, self.timeframes, self.last_response_headers = {"fetchOHLCV": True, "fetchTime": True}, {"4h": "4h"}, {}
        self.server, self.rule, self.calls, self.limit = server, rule, 0, limit

    def load_markets(self, reload):
        return {"A/B": {"active": True}}

    def fetch_time(self):
        return self.server.now

    def feature_value(self, symbol, method, name):
        return self.limit

    def fetch_ohlcv(self, symbol, timeframe, since, limit, params):
        self.calls += 1
        return self.rule([[m, *row] for m, row in self.server.visible()], since, limit, params)


AFTER = lambda rows, since: [row for row in rows if row[0] >= since]
ODD = {
    "the oldest of all when asked for a limit (ccxt #8445)":
        lambda rows, since, limit, params: rows[:limit] if limit else AFTER(rows, since)[:150],
    "the newest between since and now":
        lambda rows, since, limit, params: AFTER([r for r in rows if r[0] <= params.get("until", 1e18)], since)[-100:],
    "the newest left out when asked for a limit":
        lambda rows, since, limit, params: AFTER(rows, since)[:100][:-5] if limit else AFTER(rows, since),
    "the edge twice, newest first":
        lambda rows, since, limit, params: (AFTER(rows, since - STEP)[:100] + AFTER(rows, since)[:1])[::-1],
    "a window without candles before the listing":
        lambda rows, since, limit, params: [r for r in rows if since <= r[0] < since + 100 * STEP],
}


@pytest.mark.parametrize("name", ODD)
def test_known_deviations_of_exchanges_are_handled(name, start, fetch):
    server = start("bitbank")
    client = Odd(server, ODD[name])
    history = fetch(server, days=190 if "window" not in name else 2000, client=client, place="odd:A/B:4h")
    same(history.candles, server.finished(190 if "window" not in name else None))
    assert client.calls < 40 and history.gaps == []


def test_prices_between_the_bars_and_rows_without_numbers_are_dropped_and_counted(start, fetch):
    def rule(rows, since, limit, params):
        return [*AFTER(rows, since)[:50], [since + 77, 1.0, 1.0, 1.0, 1.0, 1.0], [since + STEP, None, 1.0, 1.0, 1.0, 1.0]]
    server = start("bitbank")
    history = fetch(server, days=30, client=Odd(server, rule), place="odd:A/B:4h")
    same(history.candles, server.finished(30))
    assert any("between two bars" in note for note in history.notes) and any("without a price" in note for note in history.notes)


def test_an_exchange_that_lags_behind_is_noted(start, fetch):
    server = start("binance")
    last = max(server.rows) - 3 * STEP
    server.edit = lambda page: [row for row in page if row[0] <= last]
    history = fetch(server, days=30)
    assert any("2 newest finished candles" in note for note in history.notes)
    assert history.newest_age == pd.Timedelta(8, "h") + pd.Timedelta(1, "min")


# ---- gaps, clocks, revisions ----

HOLE = [START + STEP * i for i in range(1000, 1010)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_that_is_there_the_second_time_is_reported_and_asked_for_once(kind, start, fetch):
    server = start(kind)
    for moment in HOLE:
        del server.rows[moment]
    history = fetch(server, days=60)
    expected = [(pd.Timestamp(HOLE[0], unit="ms", tz="UTC"), pd.Timestamp(HOLE[-1], unit="ms", tz="UTC"))]
    assert history.gaps == expected and len(server.candle_requests) == 2
    same(history.candles, server.finished(60))
    assert fetch(server, days=60).gaps == expected and len(server.candle_requests) == 3      # believed: not asked for again


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_that_is_gone_the_second_time_is_filled(kind, start, fetch):
    server, holes = start(kind), iter([HOLE])
    server.edit = lambda page: (lambda hole: [row for row in page if row[0] not in hole])(next(holes, []))
    history = fetch(server, days=60)
    assert history.gaps == [] and len(server.candle_requests) == 2
    same(history.candles, server.finished(60))


@pytest.mark.parametrize("kind", KINDS)
def test_our_clock_five_minutes_ahead_takes_no_unfinished_candle(kind, start, fetch):
    server = start(kind)
    server.now = max(server.rows) - 2 * 60_000           # two minutes before the end of a candle; by our clock it is over
    history = fetch(server, days=30, ahead=5 * 60_000)
    assert history.candles.index[-1].value // 10**6 == max(server.rows) - 2 * STEP
    assert any("our clock is 300 s ahead" in note for note in history.notes)
    assert history.fetched_at.value // 10**6 == server.now


def test_the_clock_of_the_exchange_decides_when_ours_is_behind(start, fetch):
    server = start("bitbank")
    server.now = max(server.rows) + 60_000
    history = fetch(server, days=30, ahead=-5 * 60_000)
    same(history.candles, server.finished(30))
    assert any("300 s behind" in note for note in history.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_revised_candle_keeps_both_values_and_says_which_is_in_the_history(kind, start, fetch):
    server = start(kind)
    old = fetch(server, days=90).candles
    moment = max(server.rows) - 5 * STEP
    server.rows[moment] = [*server.rows[moment][:4], server.rows[moment][4] + 1.5]
    server.now += STEP
    history = fetch(server, days=90)
    row = pd.Timestamp(moment, unit="ms", tz="UTC")
    (revision,) = history.revisions
    assert pd.Timestamp(revision["time"]) == row and revision["kept"] == "after"
    assert revision["before"] == old.loc[row].to_dict() and revision["after"] == history.candles.loc[row].to_dict()
    assert revision["after"]["volume"] == revision["before"]["volume"] + 1.5
    assert pd.Timestamp(revision["seen"]) == history.fetched_at
    assert fetch(server, days=90).revisions == [revision]                      # written once
    assert fetch(server, days=0.5).revisions == []                             # it lies before these days


def test_another_market_under_the_same_name_is_not_joined(start, fetch):
    server = start("binance")
    candles = fetch(server, days=90).candles
    server.rows = {moment: [*(price / 1000 for price in row[:4]), row[4]] for moment, row in server.rows.items()}
    with pytest.raises(ExchangeDataError, match="another market under the same name"):
        fetch(server, days=90)
    same(fetch(server, days=90, offline=True).candles, candles)


# ---- the cache ----

def process(server, folder, before="", days=90) -> subprocess.Popen:
    script = f"""
import os, sys
from datetime import datetime, timezone
from ml_ensemble.exchange import exchange_client, fetch_candles
client = exchange_client({server.kind!r}, {server.url!r})
client.rateLimit = 0
{before}
history = fetch_candles({PLACES[server.kind]!r}, {days}, cache={str(folder)!r}, client=client, progress=lambda text: None)
print(history.new_bars, len(history.candles))
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_fetch_once(start, fetch):
    server = start("binance", bars=2500)
    server.edit = lambda page: (time.sleep(0.1), page)[1]
    both = [process(server, fetch.folder, days=416) for _ in range(2)]
    ends = [one.communicate(timeout=60) for one in both]
    assert [one.returncode for one in both] == [0, 0], ends
    assert sorted(end[0].split()[0] for end in ends) == ["0", "2496"]
    assert len(server.candle_requests) == 3 + 1
    same(fetch(server, days=416, offline=True).candles, server.finished(416))


def test_a_crash_between_write_and_rename_leaves_the_old_cache(start, fetch):
    server = start("bitbank")
    server.now -= 50 * STEP
    old = fetch(server, days=90).candles
    server.now += 50 * STEP
    revised = int(old.index[-3].value) // 10**6
    server.rows[revised][4] += 1.5
    killed = process(server, fetch.folder, before="""
rename = os.replace
os.replace = lambda old, new: os._exit(9) if "candles" in str(new) else rename(old, new)""")
    killed.communicate(timeout=60)
    assert killed.returncode == 9
    assert [path.suffix for path in fetch.folder.rglob(".candles*")] == [".tmp"]           # what it had written
    assert fetch(server, days=90, offline=True).candles.index[-1] == old.index[-1]
    history = fetch(server, days=90)
    same(history.candles, server.finished(90))
    assert history.new_bars == 50 and not list(fetch.folder.rglob("*.tmp"))
    assert len(history.revisions) == 1                       # written before the crash, and not once more after it


def test_a_market_that_another_process_holds_is_a_named_error(start, fetch):
    from filelock import FileLock
    server = start("bitbank")
    fetch(server, days=30)
    (folder,) = [path.parent for path in fetch.folder.rglob("candles.parquet")]
    with FileLock(folder / ".lock"), pytest.raises(CandleCacheError, match="another process"):
        fetch(server, days=30, lock_seconds=0.05)


def test_a_damaged_cache_and_one_that_cannot_be_written_are_named_errors(start, fetch, tmp_path):
    server = start("bitbank")
    fetch(server, days=30)
    (file,) = fetch.folder.rglob("candles.parquet")
    content = file.read_bytes()
    for damaged in (b"", content[:500], content[:-20] + b"x" * 20, b"not parquet at all"):
        file.write_bytes(damaged)
        with pytest.raises(CandleCacheError, match="Delete it"):
            fetch(server, days=30)
    file.unlink()
    assert fetch(server, days=30).new_bars == 180
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CandleCacheError, match="ML_ENSEMBLE_CACHE"):
        Fetcher(tmp_path / "file")(server, days=30)


def test_markets_do_not_share_a_folder(start, fetch):
    server = start("bitbank")
    for symbol in ("A/B", "A-B", "A_B", "A%2FB", "A/B:C", "a/b"):
        client = Odd(server, lambda rows, since, limit, params: AFTER(rows, since))
        client.load_markets = lambda reload, symbol=symbol: {symbol: {"active": True}}
        assert fetch(server, days=10, client=client, place=f"odd:{symbol}:4h").new_bars == 60


def test_the_folder_of_the_cache_is_named_by_a_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("ML_ENSEMBLE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("ML_ENSEMBLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ml_ensemble" or sys.platform != "linux"


def test_the_own_client_keeps_to_the_exchanges_rate(start):
    assert exchange_client("bitbank").enableRateLimit and exchange_client("kraken").rateLimit > 0
