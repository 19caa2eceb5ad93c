"""Exit code and message tell what happened to production, also when only the output failed or a signal came late."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import hand_made_payload
from ml_ensemble import ModelStore, cli as command_line, retraining
from ml_ensemble.core import MissingExtraError
from ml_ensemble.ensemble import restore_ensemble
from scratch import ROOT

COMMAND = [sys.executable, "-m", "ml_ensemble.cli"]
ROLLBACK = ["rollback", "--reason", "prüfen 試験"]


@pytest.fixture
def pair(store):
    """A store with two versions that a fresh process can load; the second is in production."""
    model = restore_ensemble(hand_made_payload()).to_bytes()
    for _ in range(2):
        store.promote(model, {"created_at": "2025-01-01T00:00:00Z"})
    return store


def environment(store, **more):
    return {**os.environ, "ML_ENSEMBLE_MODELS": str(store.root), **more}


def shell(store, script, **more):
    """A line of shell in which $C is the command."""
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120,
                          env=environment(store, C=" ".join(COMMAND), **more))
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.fixture
def call(pair, monkeypatch):
    """A command in this process on the pair."""
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(pair.root))

    def here(*words, stdout=None, leave=lambda: None):
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", *words])
        output = stdout or io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = command_line.run_command("--json" in words, leave)
        return SimpleNamespace(code=code, out=output.getvalue(), err=" ".join(stderr.getvalue().split()))
    return here


# --- output that fails, as processes ----------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["> /dev/full", "--json > /dev/full", "| true", "--json | true",
                                 "> /dev/full 2>&1"])
def test_a_rollback_whose_output_cannot_be_written_ends_with_5_and_names_the_version(pair, how):
    older, newer = pair.versions()
    code, _, err = shell(pair, f"$C rollback --reason x {how}; exit ${{PIPESTATUS[0]}}")
    assert code == 5 and pair.current()["version"] == older and pair.history()[-1]["kind"] == "rollback"
    assert "2>&1" in how or (f"version {older} is in production, as requested" in " ".join(err.split()) and "not changed" not in err)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("how, locale", [("", {"PYTHONIOENCODING": "ascii"}), ("", C_LOCALE), ("--json", C_LOCALE), (">&-", {}),
                                         ("<&- >&- 2>&-", {}), ("--json >&-", {})])
def test_a_terminal_without_unicode_or_a_closed_output_does_not_fail_a_rollback(pair, how, locale):
    code, _, err = shell(pair, f"$C rollback --reason 'prüfen 試験' {how}", **locale)
    assert (code, err) == (0, "") and pair.current()["version"] == pair.versions()[0]


@pytest.mark.parametrize("words", ["history", "history --json", "backup", "check", "--help", "retrain --help", "rollback --to foo"])
def test_a_command_whose_output_cannot_be_written_says_that_production_was_not_changed(pair, words):
    before = pair.current()
    code, _, err = shell(pair, f"$C {words} > /dev/full")
    assert code == (2 if "foo" in words else 1) and "Traceback" not in err
    assert "foo" in words or "No space left on device (OSError). Production was not changed" in " ".join(err.split())
    assert pair.current() == before


@pytest.mark.parametrize("words", ["history", "history --json", "check", "--help", "retrain --help", "backup --json"])
def test_a_reader_that_closes_the_output_ends_a_command_with_141_and_without_a_message(pair, words):
    code, _, err = shell(pair, f"$C {words} | true; exit ${{PIPESTATUS[0]}}")
    assert (code, err) == (141, "")


def test_ascii_terminals_get_escapes_and_valid_json(pair):
    pair.record("note", reason="prüfen 試験 \x1b[31m")         # a rollback refuses such a reason; a file may hold one
    code, out, _ = shell(pair, "$C history", PYTHONIOENCODING="ascii")
    assert code == 0 and "pr\\xfcfen" in out and out.isascii() and "\x1b" not in out
    code, out, _ = shell(pair, "$C history --json", PYTHONIOENCODING="ascii")
    assert code == 0 and out.isascii() and json.loads(out)["events"][-1]["reason"] == "prüfen 試験 \x1b[31m"


# --- after the change, in this process --------------------------------------------------------------------------------

FAULTS = [KeyboardInterrupt(), BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device"), SystemExit(1),
          UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), RuntimeError("surprise"), MissingExtraError("p", "q"),
          MemoryError()]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("as_json", [False, True])
def test_whatever_happens_after_a_change_the_code_is_5(call, pair, monkeypatch, fault, as_json):
    def broken(*_, **__):
        raise fault
    monkeypatch.setattr(command_line, "readable_json" if as_json else "_nearby", broken)
    monkeypatch.setattr(command_line, "_console", broken)
    monkeypatch.setattr(command_line, "_error_document", lambda error: json.dumps(
        {"error": type(error).__name__, "problem": error.problem, "remedy": error.remedy}), raising=False)
    done = call(*ROLLBACK, *["--json"] * as_json)
    older = pair.versions()[0]
    assert done.code == 5 and pair.current()["version"] == older
    assert f"version {older} is in production, as requested" in done.err and "not changed" not in done.err + done.out
    if as_json:
        assert set(json.loads(done.out)) == {"error", "problem", "remedy"} and older in done.out


@pytest.mark.parametrize("fault, code", [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (OSError(28, "full"), 1),
                                         (RuntimeError("surprise"), 1), (SystemExit(1), 1), (MissingExtraError("p", "q"), 2)],
                         ids=lambda value: type(value).__name__)
def test_before_a_change_the_code_tells_that_nothing_was_changed(call, pair, monkeypatch, fault, code):
    before = pair.current()

    def broken(*_, **__):
        raise fault
    monkeypatch.setattr(ModelStore, "rollback", broken)
    done = call(*ROLLBACK)
    assert done.code == code and pair.current() == before and "in production, as requested" not in done.err
    assert code in (2, 141) or "Production was not changed" in done.err


def test_a_promotion_of_a_retrain_that_ends_early_is_5(call, pair, monkeypatch):
    model = (pair.production / "production_ensemble.pkl").read_bytes()

    def promoted(*_, store, **__):
        store.promote(model, {})
        raise KeyboardInterrupt
    monkeypatch.setattr(retraining, "retrain", promoted)
    done = call("retrain", "--json")
    assert done.code == 5 and pair.current()["version"] in json.loads(done.out)["problem"] and pair.current()["sequence"] == 3


def test_a_signal_after_the_result_was_printed_does_not_change_the_exit_code(call, pair):
    calls = []

    def late():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
    done = call(*ROLLBACK, "--json", leave=late)
    assert done.code == 0 and json.loads(done.out)["version"] == pair.versions()[0] and done.err == ""
    assert call("history", leave=late).code == 0


def test_ctrl_c_is_ignored_once_the_code_is_decided(pair):
    script = ("import os, signal, sys, atexit; sys.argv[:] = ['ml-ensemble', 'history']\n"
              "atexit.register(lambda: [os.kill(os.getpid(), s) for s in (signal.SIGINT, signal.SIGTERM)])\n"
              "from ml_ensemble.cli import cli_main; cli_main()")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(pair), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_sigterm_before_the_change_ends_with_130(pair):
    script = ("import os, signal, sys; sys.argv[:] = ['ml-ensemble', 'rollback', '--reason', 'x']\n"
              "from ml_ensemble import ModelStore\nfrom ml_ensemble.cli import cli_main\n"
              "ModelStore.rollback = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\ncli_main()")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(pair), timeout=60)
    assert done.returncode == 130 and "Production was not changed" in done.stderr
    assert pair.current()["sequence"] == 2


# --- arguments --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    (["--reason", ""], "--reason is empty"), (["--reason", " \n"], "--reason is empty"),
    (["--reason", "x" * 1001], "1,001 characters"), (["--reason", "a\x1b[31m"], "control character"),
    (["--reason", "a\rb"], "control character"), (["--reason", "a\udcffb"], "not UTF-8"),
    (["--reason", "x", "--to", "foo"], "--to is 'foo'"), (["--reason", "x", "--to", "../../etc"], "not a version"),
    (["--reason", "x", "--to", "20250101-" + "1" * 300], "not a version"), (["--reason", "x", "--to", ""], "not a version")])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_argument_of_a_rollback_is_a_usage_error(call, pair, words, message, as_json):
    before = pair.current(), pair.history()
    done = call("rollback", *words, *["--json"] * as_json)
    assert done.code == 2 and (pair.current(), pair.history()) == before
    assert message in (json.loads(done.out)["problem"] if as_json else done.err)


def test_a_reason_may_have_several_lines(call, pair):
    done = call("rollback", "--reason", "first line\nsecond line", "--json")
    assert done.code == 0 and pair.current()["event"]["reason"] == "first line\nsecond line"


def test_bytes_that_are_not_utf8_on_the_command_line_are_a_usage_error(pair):
    words = [*map(os.fsencode, COMMAND), b"rollback", b"--json", b"--reason", b"caf\xe9"]
    done = subprocess.run(words, capture_output=True, env=environment(pair), timeout=60)
    assert done.returncode == 2 and "not UTF-8" in json.loads(done.stdout)["problem"] and pair.current()["sequence"] == 2


def test_the_fields_of_an_error_are_the_same_for_every_command(call, tmp_path):
    (tmp_path / "bad.csv").write_text("time,open\n1,2\n")
    for words in (["candles", str(tmp_path / "bad.csv")], ["predict", "--version", "x"], ["rollback"], ["dance"],
                  ["export", "--to", "pmml"], ["retrain", "--set", "x=1"], ["candles", str(tmp_path / "none.csv")]):
        document = json.loads(call(*words, "--json").out)
        assert all(isinstance(document[field], str) for field in ("error", "problem", "remedy")), words


def test_the_codes_of_the_readme_and_of_the_notebook_are_the_same():
    notebook = "\n".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/70_cli.ipynb").read_text())["cells"])
    codes = lambda text: re.findall(r"^\| (\d+) \|", text, re.M)
    assert codes(notebook) == codes((ROOT / "README.md").read_text()) == ["0", "1", "2", "3", "4", "5", "130", "141"]


# --- outputs ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "missing folder", "link to a device", "link loop", "long name", "socket"])
@pytest.mark.parametrize("command", [["export", "--output"], ["candles", "sandbox", "--days", "50", "--to"]])
def test_an_output_that_is_no_regular_file_is_refused_before_the_work_starts(call, tmp_path, monkeypatch, kind, command):
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "m.csv"
    if kind == "device":
        path = Path("/dev/null")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "missing folder":
        path = folder / "new" / "m.csv"
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind == "long name":
        path = folder / ("x" * 300 + ".csv")
    elif kind == "socket":
        import socket
        monkeypatch.chdir(folder)
        socket.socket(socket.AF_UNIX).bind("m.csv")
    monkeypatch.setattr("ml_ensemble.market_data.load_candles", lambda *_, **__: pytest.fail("the work was started"))
    monkeypatch.setattr("ml_ensemble.onnx_export.export_onnx", lambda *_, **__: pytest.fail("the work was started"))
    before = sorted(folder.rglob("*"))
    done = call(*command, str(path))
    assert done.code == 2 and "Traceback" not in done.err and sorted(folder.rglob("*")) == before
    assert Path("/dev/null").is_char_device()


def test_an_export_through_a_link_replaces_the_file_behind_it(call, tmp_path):
    (tmp_path / "real.onnx").write_text("old")
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    done = call("export", "--output", str(tmp_path / "link.onnx"), "--json")
    assert done.code == 0, done.out
    assert (tmp_path / "link.onnx").is_symlink() and (tmp_path / "real.onnx").stat().st_size > 1000


@pytest.mark.parametrize("target", ["retrain", "lab"])
@pytest.mark.parametrize("given", ["word", "environment"])
def test_neither_make_nor_a_shell_expands_args(tmp_path, target, given):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    for program in ("ml-ensemble", "jupyter"):
        (tmp_path / "bin" / program).write_text('#!/bin/sh\nfor word in "$@"; do printf "<%s>" "$word"; done\nexit 7\n')
        (tmp_path / "bin" / program).chmod(0o755)
    text = "$(shell touch A) $(touch B) `touch C` ; touch D $$(touch E) 'a b' $HOME | touch F > G \\$(touch H)"
    words = ["make", "-f", str(ROOT / "Makefile"), "--old-file=.venv/.installed", "BIN=bin", target]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    if given == "word":
        words.append(f"ARGS={text}")
    else:
        env["ARGS"] = text
    subprocess.run([*words, "-n"], cwd=tmp_path, env=env, capture_output=True, text=True)
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]
    assert "<$(shell><touch><A)>" in done.stdout and "<a b><$HOME><|><touch><F><>><G><$(touch><H)>" in done.stdout
    assert "Error 7" in done.stderr


def test_settings_in_one_text_are_split_and_an_empty_text_is_none(call, pair, monkeypatch):
    seen = []

    def stopped(source, days, overrides, **options):
        seen.append((source, overrides))
        raise MissingExtraError("enough", "Stop.")
    monkeypatch.setattr(retraining, "retrain", stopped)
    for words in ("--settings", "labels.horizon=3  seed=1", "--set", "seed=2"), ("--source", "", "--settings", ""), ("--settings=--force",):
        assert call("retrain", *words).code == 2
    assert seen == [(None, ("labels.horizon=3", "seed=1", "seed=2")), ("", ()), (None, ("--force",))]


def test_the_weekly_workflow_evaluates_no_input(tmp_path):
    import yaml
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            assert not [step for step in job["steps"] if "${{" in step.get("run", "")]
    steps = yaml.safe_load((ROOT / ".github/workflows/weekly-retrain.yml").read_text())["jobs"]["retrain"]["steps"]
    step = next(step for step in steps if step.get("name") == "Retrain")
    assert "make" not in step["run"] and "eval" not in step["run"] and "@Q" not in step["run"]
    assert [s.get("name") for s in steps if "ML_ENSEMBLE_ALERT_URLS" in s.get("env", {})] == ["Retrain", "Diagnose"]
    command = tmp_path / ".venv/bin/ml-ensemble"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\nfor word in "$@"; do printf "<%s>" "$word"; done\n')
    command.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "SOURCE": "file:$(touch A) `touch B`", "SETTINGS": "a=1  b=$(touch C) * ;touch D"}
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "<retrain><--source=file:$(touch A) `touch B`><--settings=a=1  b=$(touch C) * ;touch D>", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".venv"]


def test_the_entry_point_reports_an_interruption_while_it_is_imported(monkeypatch):
    script = ("import sys, builtins, signal, os; sys.argv[:] = ['ml-ensemble', 'history']\n"
              "from ml_ensemble import entry_point\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nreal = builtins.__import__\n"
              "def slow(name, *rest):\n    if name == 'ml_ensemble.cli': os.kill(os.getpid(), signal.SIGINT)\n"
              "    return real(name, *rest)\nbuiltins.__import__ = slow\nentry_point.main()")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and "Production was not changed" in done.stderr and "Traceback" not in done.stderr
