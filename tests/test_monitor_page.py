"""The served page of the live model as a browser shows it, wide and narrow, light and dark; and the server that ends on a signal."""
import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from tornado.websocket import websocket_connect

import monitored
from scratch import SLOWED, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.untraced]


class Serving:
    """A process of `ml-ensemble monitor serve` on a free port."""

    def __init__(self, models: Path, *words: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ml_ensemble.cli", "monitor", "serve", "--port", "0", *words], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=clean_environment(ML_ENSEMBLE_MODELS=str(models)))
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", self.process.stdout.readline())[1])
        self.url = f"http://127.0.0.1:{self.port}/"

    def ask(self, path: str = "/", method: str = "GET", **headers: str):
        """Status, headers and text of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, dict(response.getheaders()), text

    def wait_for(self, status: str, seconds: float = 120) -> dict:
        """What /healthz reports once it has a status."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            health = json.loads(self.ask("/healthz")[2])
            if health["status"] == status:
                return health
            assert self.process.poll() is None
            time.sleep(0.1)
        raise AssertionError(health)

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Exit code and what was printed on standard error."""
        self.process.send_signal(number)
        errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    monitored.make_store(path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    serving = Serving(folder / "models", "--replay", "--every", "3600", *monitored.options_of(folder))
    yield serving
    if serving.process.poll() is None:
        serving.stop()


def test_requests_are_served_while_the_first_report_is_made(server):
    status, headers, text = server.ask("/")
    assert status == 503 and "The first report is being made" in text and int(headers["Refresh"]) <= 15
    assert server.ask("/metrics")[0] == server.ask("/state.json")[0] == server.ask("/healthz")[0] == 503
    assert server.wait_for("ok")["updated"]


def test_the_paths_hold_page_state_metrics_and_health_of_one_update(server, folder):
    server.wait_for("ok")
    page, state, metrics = (server.ask(path) for path in ("/", "/state.json", "/metrics"))
    assert page[0] == state[0] == metrics[0] == server.ask("/healthz")[0] == 200
    found = json.loads(state[2])
    assert found["version"] in page[2] and f'version="{found["version"]}"' in metrics[2]
    assert f'ml_ensemble_light{{light="{found["light"]}",market="sandbox"}} 1.0' in metrics[2]
    assert re.sub(r"<p [^>]*>Updated [-\d]+ [:\d]+ UTC\.</p>\n", "", page[2]) == (folder / "models/monitor/report.html").read_text()
    assert "<script" not in page[2] and int(page[1]["Refresh"]) > 3000
    assert metrics[1]["Content-Type"].startswith("text/plain; version=0.0.4") and "Last-Modified" in state[1]


def test_only_this_machine_may_read_and_nothing_can_be_written(server):
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        status, headers, _ = server.ask("/", method)
        assert status == 405 and headers["Allow"] == "GET, HEAD"
    status, headers, text = server.ask("/", "HEAD")
    assert (status, text) == (200, "") and int(headers["Content-Length"]) > 10_000
    for host in ("example.org", f"example.org:{server.port}", "127.0.0.1.example.org", ""):
        assert server.ask("/", Host=host)[0] in (400, 403), host
    assert server.ask("/healthz", Host="localhost:9000")[0] == 200                          # through ssh -L
    for path in ("/report.html", "/monitor.sqlite", "/../monitor.sqlite", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd"):
        assert server.ask(path)[0] == 404, path
    for path in ("/", "/state.json", "/metrics", "/healthz", "/nothing"):
        headers = server.ask(path)[1]
        assert "script-src" not in headers["Content-Security-Policy"] and "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store" and "Server" not in headers
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [row[1] for row in rows if row[1].endswith(f":{server.port:04X}") and row[3] == "0A"]
    assert listening == [f"0100007F:{server.port:04X}"]


# --- in a browser -----------------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium, driven through its DevTools protocol."""

    def __init__(self, folder: Path):
        program = shutil.which("chromium")
        assert program, "Chromium is not installed: apt-get install chromium"
        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
             f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        place, end = folder / "DevToolsActivePort", time.monotonic() + 30 * SLOWED
        while not (place.exists() and place.read_text().strip()):
            assert time.monotonic() < end and self.process.poll() is None, "Chromium has not started"
            time.sleep(0.05)
        self.port = place.read_text().split()[0]

    def show(self, url: str, width: int, dark: bool = False) -> dict:
        """What a page looks like: see `LOOK`; and its errors."""
        target = json.load(urlopen(Request(f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT"), timeout=30))
        return asyncio.run(self._show(target["webSocketDebuggerUrl"], url, width, dark))

    async def _show(self, socket: str, url: str, width: int, dark: bool) -> dict:
        connection, number, events = await websocket_connect(socket, max_message_size=2**26), 0, []

        async def call(method: str, **parameters) -> dict:
            nonlocal number
            number += 1
            await connection.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
            while True:
                message = json.loads(await asyncio.wait_for(connection.read_message(), 60))
                if message.get("id") == number:
                    return message["result"]
                events.append(message)
        for domain in ("Page", "Log", "Runtime", "Network"):
            await call(f"{domain}.enable")
        await call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        await call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        await call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in events):
            events.append(json.loads(await asyncio.wait_for(connection.read_message(), 60)))
        found = (await call("Runtime.evaluate", expression=LOOK, returnByValue=True))["result"]["value"]
        connection.close()
        kinds = [event for event in events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
        asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {**found, "errors": kinds, "asked": [address for address in asked if not address.startswith("data:")]}

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)


LOOK = """(() => {
  const root = document.documentElement, box = each => each.getBoundingClientRect();
  const lead = document.querySelector(".lead"), style = getComputedStyle(document.body);
  const wide = [...document.querySelectorAll("main *")].filter(each => box(each).width > 0 && box(each).right > root.clientWidth + 1
    && !each.closest(".wide, .scroll, pre"));
  return {
    scrolls: root.scrollWidth - root.clientWidth, beyond: wide.map(each => each.outerHTML.slice(0, 100)),
    lead: lead ? lead.innerText : "", top: lead ? box(lead).top : null, alert: document.querySelector('[role=alert]')?.innerText ?? "",
    titles: [...document.querySelectorAll("h2")].filter(each => box(each).height > 0).map(each => each.innerText),
    figures: [...document.querySelectorAll("figure img")].map(
      each => [each.complete && each.naturalWidth > 0, box(each).width, box(each).height]),
    paper: style.backgroundColor, ink: style.color, letters: parseFloat(style.fontSize),
  };
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (390, False), (390, True)])
def test_the_page_is_shown_without_errors_and_without_sideways_scrolling(server, browser, width, dark):
    server.wait_for("ok")
    shown = browser.show(server.url, width, dark)
    assert shown["errors"] == [] and shown["asked"] == [server.url]
    assert shown["scrolls"] == 0 and shown["beyond"] == []
    assert re.search("Version .* on sandbox", shown["lead"]) and 0 <= shown["top"] < 300                     # on the first screen
    assert {"What is wrong, and what to do", "Drift", "Alarms"} <= set(shown["titles"])
    assert len(shown["figures"]) >= 3
    assert all(complete and wide > 200 and high > 100 for complete, wide, high in shown["figures"])
    brightness = [sum(map(int, re.findall(r"\d+", shown[name])[:3])) for name in ("paper", "ink")]
    assert (brightness[0] < brightness[1]) is dark and shown["letters"] >= 15


def test_an_update_that_fails_is_shown_in_the_browser_and_ctrl_c_ends_the_server(tmp_path, browser):
    serving = Serving(tmp_path / "models", "--every", "3600")
    health = serving.wait_for("failing", 60)
    assert "no version in production" in health["reason"] and health["since"] and serving.ask("/healthz")[0] == 503
    assert serving.ask("/metrics")[0] == 503
    shown = browser.show(serving.url, 390)
    assert "Not up to date since" in shown["alert"] and "no version in production" in shown["alert"] and shown["scrolls"] == 0
    code, errors = serving.stop()
    assert code == 130 and "interrupted" in errors and "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_update_ends_its_process_as_well(folder, number):
    serving = Serving(folder / "models", *monitored.options_of(folder))
    children = Path(f"/proc/{serving.process.pid}/task/{serving.process.pid}/children")
    end = time.monotonic() + 30
    while not children.read_text().split() and time.monotonic() < end:
        time.sleep(0.02)
    (child,) = children.read_text().split()
    time.sleep(1.5)                                       # its imports, or the kernel of the report
    code, errors = serving.stop(number)
    assert code == 130 and "Traceback" not in errors
    assert not Path(f"/proc/{child}").exists()


def test_a_port_that_is_in_use_is_an_error_of_the_call(server, folder):
    words = [sys.executable, "-m", "ml_ensemble.cli", "monitor", "serve", "--port", str(server.port)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60,
                          env=clean_environment(ML_ENSEMBLE_MODELS=str(folder / "models")))
    assert done.returncode == 2 and "cannot be used (Address already in use)" in done.stderr and "--port" in done.stderr
