"""A PostgreSQL server of one's own for tests and measurements: in a temporary folder, by a socket, gone afterwards."""
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path


def programs() -> Path:
    """Folder of the programs of the newest installed server."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    at = found[-1] if found else Path(shutil.which("initdb") or "")
    assert at.name == "initdb", "PostgreSQL is not installed: run `apt-get install postgresql`, as the README says"
    return at.parent


@contextmanager
def server():
    """Yields a function that makes an empty database and returns its URL, and one that stops and starts the server."""
    owner = {"user": "postgres"} if os.getuid() == 0 else {}             # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if owner:
        shutil.chown(folder, "postgres")
    run = lambda *words: subprocess.run([programs() / words[0], *words[1:]], check=True, capture_output=True, cwd=folder, **owner)
    run("initdb", "--pgdata", folder / "data", "--auth", "trust", "--username", "monitor", "--no-sync")
    state: dict = {}
    settings = [word for text in ("listen_addresses=", "max_connections=20", "fsync=off") for word in ("-c", text)]

    def start() -> None:
        state["process"] = subprocess.Popen(
            [programs() / "postgres", "-D", folder / "data", "-k", folder, *settings],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, **owner)
        for _ in range(200):
            if subprocess.run([programs() / "pg_isready", "-q", "-h", folder], **owner, cwd=folder).returncode == 0:
                return
            time.sleep(0.05)
        raise AssertionError("PostgreSQL did not start")

    def stop() -> None:
        state["process"].send_signal(signal.SIGQUIT)                     # at once, like a machine that is switched off
        state["process"].wait(20)

    def database(name: str) -> str:
        run("createdb", "--host", folder, "--username", "monitor", name)
        return f"postgresql+psycopg://monitor@/{name}?host={folder}"

    start()
    try:
        yield database, stop, start
    finally:
        stop()
        shutil.rmtree(folder, ignore_errors=True)
