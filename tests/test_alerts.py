"""One bad receiver keeps the alert from nobody, and no part of its URL is printed."""
import email
import email.policy
import json
import logging
import socketserver
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import apprise
import pytest

from ml_ensemble import alerts
from ml_ensemble.alerts import Alert, send_alert


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


# --- limits of services, mail, secrets --------------------------------------------------------------------------------

LONG = "ml_ensemble: Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft, candidate refused, " * 3


LIMITS = ("title_maxlen", "body_maxlen", "body_max_line_count", "overflow_buffer", "overflow_amalgamate_title",
          "overflow_display_title_once")


def services():
    """An object with the limits of each service that apprise knows; limits that depend on a URL are left out."""
    from apprise.manager_plugins import NotificationManager
    for plugin in sorted(NotificationManager().plugins(), key=lambda plugin: plugin.__name__):
        limits = {name: getattr(plugin, name) for name in LIMITS}
        if not any(isinstance(limit, property) for limit in limits.values()):
            yield type(plugin.__name__, (apprise.NotifyBase,), limits)()


def test_no_service_cuts_a_title_or_a_text():
    """apprise's own preparation of a message, with the limits of each service."""
    known = list(services())
    assert len(known) > 100
    for service in known:
        title, body = alerts._within_limits(service, LONG, f"{'weighted F1 is 0.55. ' * 40}Sharpe")
        if service.body_max_line_count:                                     # pagers of one line show its beginning
            continue
        parts = service._apply_overflow(body=body, title=title, body_format=apprise.NotifyFormat.TEXT)
        letters = "".join("".join(f"{part['title']} {part['body']}" for part in parts).split())
        assert "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" in letters, type(service)
        assert letters.count("weightedF1is0.55.") >= 38 and "Sharpe" in letters, type(service)


class Mailbox(socketserver.StreamRequestHandler):
    """A mail server that accepts every message (RFC 5321: the answers that a client waits for)."""

    def handle(self):
        self.wfile.write(b"220 local\r\n")
        for line in self.rfile:
            word = line.split(maxsplit=1)[0].upper() if line.strip() else b""
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                self.server.messages.append(email.message_from_bytes(b"".join(lines), policy=email.policy.default))
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
            if word == b"QUIT":
                return


def test_an_alert_arrives_by_mail(monkeypatch):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mailbox) as server:
        server.messages, port = [], server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("ML_ENSEMBLE_ALERT_URLS",
                           f"mailto://127.0.0.1:{port}?from=bot@example.invalid&to=owner@example.invalid&mode=insecure")
        warning = Alert(event="stale model", happened="The model is 20 days old, the limit is 14.", figures=["trained 2026-11-06"],
                        action="Run `ml-ensemble retrain`.")
        assert warning.send() is True
        server.shutdown()
    (mail,) = server.messages
    assert mail["subject"] == "ml_ensemble: the model is too old" and "owner@example.invalid" in mail["to"]
    text = mail.get_body(("plain", "html")).get_content()
    for part in ("The model is 20 days old", "trained 2026-11-06", "What to do: Run `ml-ensemble retrain`."):
        assert part in text


def test_each_event_has_a_title_that_fits_most_services_and_says_what_to_do():
    titles = {Alert(event=event, happened="It happened.", action="Do this.").title for event in alerts._EVENTS}
    assert len(titles) == len(alerts._EVENTS) and max(map(len, titles)) <= 60
