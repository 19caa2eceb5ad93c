"""One bad receiver keeps the alert from nobody, and no part of its URL is printed."""
import json
import logging
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import apprise
import pytest

from ml_ensemble.alerts import send_alert


@pytest.fixture
def server():
    """A web server on this machine; `received` are the messages, `status` is its next answer."""
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.received.append(json.loads(body)["message"])
            self.send_response(500 if self.path.startswith("/broken") else 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    running = HTTPServer(("localhost", 0), Receiver)
    running.received = []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def closed_port() -> int:
    with HTTPServer(("localhost", 0), BaseHTTPRequestHandler) as unused:
        return unused.server_port


def alert(monkeypatch, *urls, text="text"):
    """Result of an alert to these URLs, and its warnings."""
    monkeypatch.setenv("ML_ENSEMBLE_ALERT_URLS", " ".join(urls))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = send_alert("title", text, "failure")
    return result, [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


BROKEN = {"unknown service": "secretscheme://token-SECRET", "no URL": "SECRET", "bad host": "json://[SECRET", "empty": "://SECRET",
          "bad port": "json://user-SECRET@localhost:99999/", "not delivered": None, "refused": "broken"}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_broken_receiver_is_counted_and_the_others_get_the_alert(server, monkeypatch, capfd, kind, position):
    good = f"json://localhost:{server.server_port}/"
    url = {None: f"json://user-SECRET@localhost:{closed_port()}/", "broken": f"json://SECRET@localhost:{server.server_port}/broken"
           }.get(BROKEN[kind], BROKEN[kind])
    urls = [good, good]
    urls.insert(position, url)
    result, messages = alert(monkeypatch, *urls)
    assert result is False and server.received.count("text") == (3 if kind == "refused" else 2)
    assert len(messages) == 1 and f"1 of 3 receivers of ML_ENSEMBLE_ALERT_URLS failed (number {position + 1}: " in messages[0]
    printed = capfd.readouterr()
    assert "secret" not in (messages[0] + printed.out + printed.err).lower() and "localhost" not in messages[0]


def test_an_exception_of_a_receiver_is_named_without_its_text(server, monkeypatch):
    real = apprise.Apprise.notify

    def broken(self, *args, **options):
        if "SECRET" in self.urls()[0]:
            raise OSError("cannot reach https://user:SECRET@host")
        return real(self, *args, **options)
    monkeypatch.setattr(apprise.Apprise, "notify", broken)
    good, bad = f"json://localhost:{server.server_port}/", "json://localhost/SECRET"
    result, messages = alert(monkeypatch, bad, good, bad)
    assert result is False and server.received == ["text"]
    assert len(messages) == 1 and "2 of 3 receivers" in messages[0] and "SECRET" not in messages[0]
    assert "(number 1: OSError, number 3: OSError)" in messages[0]


def test_all_receivers_get_the_alert_and_there_is_no_warning(server, monkeypatch):
    url = f"json://localhost:{server.server_port}/"
    assert alert(monkeypatch, url, url) == (True, []) and server.received == ["text", "text"]
    assert alert(monkeypatch) == (False, [])


def test_the_log_of_the_library_does_not_show_a_url(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    alert(monkeypatch, f"json://SECRET@localhost:{closed_port()}/", "secretscheme://SECRET", "json://[SECRET")
    assert not [record for record in caplog.records if record.name.startswith("apprise")]
    assert logging.getLogger("apprise").level == logging.NOTSET


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\n", "  ,  "])
def test_urls_are_separated_by_spaces_or_commas(server, monkeypatch, separator):
    good = f"json://localhost:{server.server_port}/"
    monkeypatch.setenv("ML_ENSEMBLE_ALERT_URLS", separator.join([good, "nonsense://x", good + "?to=a,b"]))
    with pytest.warns(RuntimeWarning, match="1 of 3 receivers"):
        assert not send_alert("title", "text", "failure")
    assert len(server.received) == 2
