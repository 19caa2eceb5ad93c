"""Nothing leaves the machine: no connection, and no file outside the store and the caches that SECURITY.md names."""
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import TINY, hand_made_payload
from scratch import FEATURE, shadow_modules

from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.versioning import ModelStore

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).with_name("ml-ensemble")

# Runs a command, in a network namespace of its own if it was started in one: the loopback device is switched on for Jupyter,
# and there is no other. Counters of the kernel see attempts of every library, also of those that are not written in Python.
LAUNCHER = r"""
import fcntl, json, pathlib, re, socket, struct, subprocess, sys
isolated, command = sys.argv[1] == "isolated", sys.argv[2:]
if isolated:
    with socket.socket() as device:
        fcntl.ioctl(device, 0x8914, struct.pack("16sH14x", b"lo", 0x41))      # SIOCSIFFLAGS, up and running
done = subprocess.run(command, capture_output=True, text=True)
counters = {}
if isolated:
    snmp = pathlib.Path("/proc/net/snmp").read_text()
    for section in ("Ip", "Udp"):
        names, values = re.findall(rf"^{section}: (.*)$", snmp, re.M)
        counters |= {section + name: int(value) for name, value in zip(names.split(), values.split())}
    six = pathlib.Path("/proc/net/snmp6")
    counters |= {name: int(value) for name, value in map(str.split, six.read_text().splitlines())} if six.exists() else {}
print(json.dumps({"status": done.returncode, "output": done.stdout[-3000:], "errors": done.stderr[-3000:], "attempts": {
    name: counters[name] for name in ("IpOutNoRoutes", "UdpOutDatagrams", "Ip6OutNoRoutes", "Udp6OutDatagrams") if counters.get(name)}}))
"""

# Imported by every Python process at its start: writes down what it connects to.
AUDIT = r"""
import os, sys
def write_down(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0] if event.startswith("socket.get") else arguments[1]
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(address, tuple) and host in ("127.0.0.1", "::1") or host in (None, "127.0.0.1", "localhost", b"127.0.0.1"):
            return
        if isinstance(address, (str, bytes)) and not event.startswith("socket.get"):
            return                                                              # a path: a socket of this machine
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{event} {address}\n")
sys.addaudithook(write_down)
"""


@cache
def namespaces() -> bool:
    """Whether this machine permits a network namespace without being root."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


@pytest.fixture
def watched(tmp_path):
    """Run a command with an empty home and temporary folder; returns its result, attempts to connect, and the files it left."""
    places = {name: tmp_path / name for name in ("home", "temporary", "here", "audit", "models")}
    for place in places.values():
        place.mkdir()
    (places["audit"] / "sitecustomize.py").write_text(AUDIT)
    connections = tmp_path / "connections"

    def run(*command, folder=None, **variables):
        # Little is inherited: CI=true alone would silence ONNX Runtime.
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if name in os.environ} | {
            "HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "ML_ENSEMBLE_MODELS": str(places["models"]),
            "PYTHONPATH": str(places["audit"]), "CONNECTIONS": str(connections), **variables}
        isolated = ["unshare", "-rn"] if namespaces() else []
        done = subprocess.run([*isolated, sys.executable, "-P", "-c", LAUNCHER, "isolated" if isolated else "shared",
                               *map(str, command)], capture_output=True, text=True, env=environment, cwd=folder or places["here"],
                              timeout=300)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        attempts = [*result["attempts"].items(), *(connections.read_text().splitlines() if connections.exists() else [])]
        left = sorted(str(path.relative_to(tmp_path)) for name in ("home", "temporary", "here")
                      for path in places[name].rglob("*") if path.is_file())
        return result, attempts, left

    run.store, run.here = ModelStore(places["models"]), places["here"]
    return run


# SECURITY.md names them.
CACHES = (r"home/\.cache/matplotlib/fontlist-[^/]*", r"home/\.ipython/profile_default/.*")


def not_named(files):
    return [file for file in files if not any(re.fullmatch(pattern, file) for pattern in CACHES)]


def promoted(store):
    store.promote(restore_ensemble(hand_made_payload()).to_bytes(), {"created_at": store.clock().isoformat()})


SERVE = """
import ml_ensemble, sys
from ml_ensemble import ProductionEnsemble
model = ProductionEnsemble()
for k in range(60):
    model.decide(100 + k % 7, 110, 90, 100 + k % 5, 5.0)
assert "onnxruntime" in sys.modules
"""
IMPORT = """
import importlib, pkgutil
import ml_ensemble
for module in pkgutil.iter_modules(ml_ensemble.__path__):
    importlib.import_module("ml_ensemble." + module.name)
import apprise, ccxt, mistune, onnxruntime, papermill
"""


def test_a_trading_process_connects_to_nothing_and_writes_no_file(watched):
    promoted(watched.store)
    result, attempts, left = watched(sys.executable, "-c", SERVE)
    assert result["status"] == 0, result["errors"]
    assert attempts == [] and left == []


def test_no_module_connects_or_writes_when_it_is_imported(watched):
    result, attempts, left = watched(sys.executable, "-c", IMPORT)
    assert result["status"] == 0, result["errors"]
    assert attempts == [] and not_named(left) == []


@pytest.mark.parametrize("command", [["check"], ["history"], ["predict", "--source", "sandbox", "--rows", "1"], ["--help"]])
def test_a_command_connects_to_nothing(watched, command):
    promoted(watched.store)
    result, attempts, left = watched(COMMAND, *command)
    assert result["status"] in (0, 1) and "Traceback" not in result["errors"]
    assert attempts == [] and not_named(left) == []


@pytest.mark.slow
def test_a_retrain_connects_to_nothing_and_runs_no_module_of_the_working_directory(watched, tmp_path):
    """With its kernel, its probe and its report. The folder is a project: a custom feature that it declares is imported."""
    project = shadow_modules(watched.here / "project", tmp_path / "ran")
    (project / "own_features.py").write_text(FEATURE.format(marker=str(tmp_path / "imported")))
    settings = (*TINY, "days=150", "min_samples=500", "audit.cuts=2", "features.custom=[own_features:range_4]")
    words = [word for setting in settings for word in ("--set", setting)]
    before = {str(path.relative_to(tmp_path)) for path in project.rglob("*")}
    result, attempts, left = watched(COMMAND, "retrain", "--source", "sandbox", *words, folder=project)
    assert result["status"] == 0 and watched.store.current() is not None, result["errors"]
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert (tmp_path / "imported").exists()
    compiled = r"here/project/__pycache__/own_features\.[^/]*\.pyc"
    assert attempts == [] and [file for file in not_named(left) if file not in before and not re.fullmatch(compiled, file)] == []


def test_an_attempt_would_be_seen(watched):
    """The three sensors: Python's audit, counters of the kernel where namespaces are permitted, and files."""
    dial = "import socket, _socket\ntry: {}.socket(2, 1).connect(('192.0.2.1', 80))\nexcept OSError: pass"
    slow = "import socket\nsocket.setdefaulttimeout(1)\n"
    _, attempts, left = watched(sys.executable, "-c", slow + dial.format("socket"))
    assert "socket.connect ('192.0.2.1', 80)" in attempts and left == []
    assert not namespaces() or ("IpOutNoRoutes", 1) in attempts


CLEAR = """
import os, shutil, tempfile
shutil.rmtree(os.path.expanduser("~/.cache"))
os.remove(os.path.join(tempfile.gettempdir(), ".ses"))
"""


def test_onnx_runtime_alone_would_write_an_identifier_of_the_device(watched):
    """What the variable, set by ml_ensemble before the import, prevents; Linux and macOS builds from 1.32 on."""
    _, _, left = watched(sys.executable, "-c", "import onnxruntime")
    _, _, silenced = watched(sys.executable, "-c", CLEAR + "import ml_ensemble.core, onnxruntime")
    assert any("deviceid" in file for file in left) and silenced == []


def test_security_names_the_variable_and_the_caches():
    text = (ROOT / "SECURITY.md").read_text()
    for word in ("ORT_DISABLE_TELEMETRY", "matplotlib", ".ipython", "JupyterLab"):
        assert word in text
    assert "open\npoint" not in text and "open point" not in text
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
