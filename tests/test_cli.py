"""The command line: exit codes, JSON, and errors a person can act on. Life as a process, wrong calls inside this one."""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from conftest import QUICK, TINY
from ml_ensemble import FeatureManager, ModelStore, ProductionEnsemble, cli as command_line
from ml_ensemble.market_data import simulate_market

SETS = [word for override in QUICK for word in ("--set", override)]
REFUSED = [word for override in (*TINY, "min_weighted_f1=0.99") for word in ("--set", override)]


@pytest.fixture
def cli(trained_copy):
    def call(*words, env=None, cwd=None):
        return subprocess.run([sys.executable, "-m", "ml_ensemble.cli", *words], capture_output=True, text=True,
                              cwd=cwd, env={**os.environ, "ML_ENSEMBLE_MODELS": str(trained_copy.root), **(env or {})})
    call.models = trained_copy.root
    return call


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The same in this process, with a store of its own."""
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path / "models"))

    def here(*words):
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", *words])
        with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = command_line.run("--json" in words)
        return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())
    return here


@pytest.mark.slow
def test_a_life_on_the_command_line(cli, tmp_path):
    empty = {"ML_ENSEMBLE_MODELS": str(tmp_path / "empty")}
    dry = cli("retrain", "--dry-run", *SETS, env=empty)
    assert dry.returncode == 0 and "nothing was written" in dry.stdout
    assert cli("check", env=empty).returncode == 1
    assert not (tmp_path / "empty").exists()
    nowhere = cli("rollback", "--reason", "too early", "--json", env=empty)
    assert nowhere.returncode == 1 and json.loads(nowhere.stdout)["error"] == "ModelNotFoundError"

    refused = cli("retrain", *REFUSED, "--json", "--require-promotion", "--verbose")
    assert refused.returncode == 3 and "fold 1: lightgbm" in refused.stderr
    answer = json.loads(refused.stdout)
    assert answer["promoted"] is False and answer["version"] is None and answer["current"].endswith("-0002")
    assert "REFUSES" in Path(answer["html"]).read_text()

    check = cli("check", "--json")
    assert check.returncode == 0, check.stdout
    parts = {finding["part"] for finding in json.loads(check.stdout)["findings"]}
    assert parts == {"configuration", "production", "age", "figures", "last run", "disk"}
    assert "Fit to trade" in cli("check").stdout

    events = json.loads(cli("history", "--json").stdout)["events"]
    assert [event["kind"] for event in events] == ["promotion", "promotion", "refusal"]
    assert "promotion" in cli("history").stdout
    assert "production_backup_" in cli("backup").stdout and len(list(cli.models.glob("production_backup_*"))) == 2
    again = json.loads(cli("backup", "--json").stdout)["backup"]
    assert os.path.isdir(again) and len(list(cli.models.glob("production_backup_*"))) == 3

    rows = json.loads(cli("predict", "--days", "100", "--rows", "3", "--json").stdout)["predictions"]
    assert len(rows) == 3 and all(abs(sum(row["probabilities"].values()) - 1) < 1e-5 for row in rows)
    assert "p(buy)" in cli("predict", "--days", "100").stdout
    exported = cli("export", "--to", "onnx", "--output", str(cli.models.parent / "m.onnx"), "--json")
    told = json.loads(exported.stdout)
    assert exported.returncode == 0 and told["version"].endswith("-0002") and told["columns"][0] == "close"
    session = onnxruntime.InferenceSession(cli.models.parent / "m.onnx")
    model = ProductionEnsemble(store=ModelStore(cli.models))
    rows_of_it = FeatureManager().generate_features(simulate_market(300, seed=2)[0]).to_numpy()[49:]
    proba, decision = session.run(None, {"features": rows_of_it})
    np.testing.assert_allclose(proba, model.predict_proba(rows_of_it), atol=1e-6)
    assert (decision == model.predict(rows_of_it)).all() and len(set(decision)) == 2
    here = cli("export", "--version", told["version"], cwd=cli.models.parent)
    assert f"ml_ensemble_{told['version']}.onnx" in here.stdout and "metadata" in here.stdout
    assert (cli.models.parent / f"ml_ensemble_{told['version']}.onnx").exists()
    assert cli("check").returncode == 0


@pytest.mark.parametrize("words, told", [
    (["retrain", "--set", "horizn=3"], "Did you mean horizon"), (["retrain", "--source", "ftp:x"], "data.source"),
    (["retrain", "--dry-run", "--source", "file:missing.csv"], "there is no file"),
    (["retrain", "--days", "0"], "Invalid value"), (["predict", "--version", "../x"], "is not a version"),
    (["export", "--to", "pmml"], "--to is 'pmml'"), (["export", "--version", "20200101-0001"], "There are: "),
    (["rollback"], "Missing option"), (["dance"], "No such command")])
def test_a_wrong_call_is_answered_with_a_remedy_and_no_traceback(call, words, told):
    done = call(*words)
    assert done.returncode in (1, 2) and told in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr


def test_a_store_that_cannot_be_written_is_an_error_not_a_traceback(call, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path / "file" / "models"))
    done = call("retrain", *SETS)
    assert done.returncode == 1 and "NotADirectoryError" in done.stderr and "Traceback" not in done.stderr


def test_help_is_quick_to_load_and_names_every_command():
    script = ("import sys; from typer.testing import CliRunner; from ml_ensemble.cli import app\n"
              "print(CliRunner().invoke(app, ['--help']).output)\n"
              "print('heavy:', sorted({'pandas', 'sklearn', 'lightgbm', 'xgboost', 'matplotlib'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert all(command in shown for command in ("retrain", "check", "history", "rollback", "backup", "predict", "export"))
    assert "heavy: []" in shown


@pytest.mark.parametrize("words", [["rollback"], ["retrain", "--days", "0"], ["dance"], ["retrain", "--set", "horizn=1"],
                                   ["predict", "--version", "20200101-0001"]])
def test_json_answers_are_json_also_for_wrong_calls(call, words):
    done = call(*words, "--json")
    answer = json.loads(done.stdout)
    assert done.returncode in (1, 2) and {"error", "problem", "remedy"} == set(answer)


def test_what_a_user_writes_is_shown_as_written(call, tmp_path):
    """Square brackets are markup to the library that prints; a reason, a path or a setting is not."""
    store = ModelStore(tmp_path / "models")
    store.promote(b"a", {})
    store.promote(b"b", {})
    store.rollback("see [/tmp/x] and [red]")
    assert "see [/tmp/x] and [red]" in call("history").stdout
    assert "'foo[/b]'" in call("retrain", "--set", "foo[/b]=3").stderr


@pytest.mark.slow
def test_an_interrupted_retrain_says_so_records_it_and_leaves_production(tmp_path):
    env = {**os.environ, "ML_ENSEMBLE_MODELS": str(tmp_path / "models")}
    running = subprocess.Popen([sys.executable, "-m", "ml_ensemble.cli", "retrain"], env=env, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "models" / "reports").glob("*.ipynb")) and time.monotonic() < deadline:
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted" in told
    events = [json.loads(line) for line in (tmp_path / "models/archive/history.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["failure"] and "interrupted" in events[0]["reason"]
    assert not list((tmp_path / "models" / ".staging").iterdir()) and not (tmp_path / "models/production").exists()
