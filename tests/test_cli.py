"""The command line: exit codes, JSON, and errors a person can act on. Life as a process, wrong calls inside this one."""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from conftest import QUICK, TINY
from ml_ensemble import FeatureManager, ModelStore, ProductionEnsemble, cli as command_line
from ml_ensemble.sandbox import simulate_market
from scratch import run

SETS = [word for override in QUICK for word in ("--set", override)]
REFUSED = [word for override in (*TINY, "min_weighted_f1=0.99") for word in ("--set", override)]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A command in this process, on an empty store or that of `models`."""
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path / "models"))

    def here(*words, models=None):
        if models:
            monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(models))
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", *words])
        with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = command_line.run_command("--json" in words)
        return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())
    return here


def test_a_dry_run_and_questions_to_an_empty_store_write_nothing(call, tmp_path):
    dry = call("retrain", "--dry-run", *SETS)
    assert dry.returncode == 0 and "nothing was written" in dry.stdout
    assert call("check").returncode == 1 and not (tmp_path / "models").exists()
    nowhere = call("rollback", "--reason", "too early", "--json")
    assert nowhere.returncode == 1 and json.loads(nowhere.stdout)["error"] == "ModelNotFoundError"


@pytest.mark.slow
def test_a_refused_retrain_ends_with_3_where_a_promotion_is_required(trained_copy):
    words = [sys.executable, "-m", "ml_ensemble.cli", "retrain", *REFUSED, "--json", "--require-promotion", "--verbose"]
    refused = run(*words, env={**os.environ, "ML_ENSEMBLE_MODELS": str(trained_copy.root)})
    assert refused.returncode == 3 and "fold 1: lightgbm" in refused.stderr
    answer = json.loads(refused.stdout)
    assert answer["promoted"] is False and answer["version"] is None and answer["current"].endswith("-0002")
    assert "REFUSES" in Path(answer["html"]).read_text()
    assert trained_copy.history()[-1]["kind"] == "refusal"


@pytest.mark.slow
def test_check_history_and_backup_of_a_store(call, trained_copy):
    path = trained_copy.production / "production_model_metadata.json"
    facts = json.loads(path.read_text())
    old = call("check", "--json", models=trained_copy.root)
    assert old.returncode == 1 and "days since the newest training bar" in old.stdout      # the bars end years ago
    facts["data"]["to"] = (datetime.now(timezone.utc) - timedelta(hours=4)).isoformat()
    path.write_text(json.dumps(facts))
    practice = call("check", "--json", models=trained_copy.root)
    faults = [finding["part"] for finding in json.loads(practice.stdout)["findings"] if finding["status"] == "fault"]
    assert practice.returncode == 1 and faults == ["market"]                    # trained on the sandbox: never fit to trade
    facts["data"]["source"] = facts["data"]["market"] = "file:candles.csv"
    path.write_text(json.dumps(facts))
    check = call("check", "--json", models=trained_copy.root)
    assert check.returncode == 0, check.stdout
    parts = {finding["part"] for finding in json.loads(check.stdout)["findings"]}
    assert parts == {"configuration", "production", "market", "age", "figures", "last run", "history", "signature", "store",
                     "training", "disk"}
    assert "Fit to trade" in call("check").stdout
    events = json.loads(call("history", "--json").stdout)["events"]
    assert [event["kind"] for event in events] == ["promotion", "promotion"]
    assert "promotion" in call("history").stdout
    backups = lambda: len(list(trained_copy.root.glob("production_backup_*")))
    assert "production_backup_" in call("backup").stdout and backups() == 2
    again = json.loads(call("backup", "--json").stdout)["backup"]
    assert os.path.isdir(again) and backups() == 3 and call("check").returncode == 0


@pytest.mark.slow
def test_predictions_and_exports_are_those_of_the_version_in_production(call, trained_copy, tmp_path, monkeypatch):
    shown = call("predict", "--days", "100", "--rows", "3", "--json", models=trained_copy.root)
    rows = json.loads(shown.stdout)["predictions"]
    assert len(rows) == 3 and all(abs(sum(row["probabilities"].values()) - 1) < 1e-5 for row in rows)
    assert "p(buy)" in call("predict", "--days", "100").stdout
    exported = call("export", "--to", "onnx", "--output", str(tmp_path / "m.onnx"), "--json")
    facts = json.loads(exported.stdout)
    assert exported.returncode == 0 and facts["version"].endswith("-0002") and facts["columns"][0] == "close"
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    model = ProductionEnsemble(store=trained_copy)
    features = FeatureManager().generate_features(simulate_market(300, seed=2)[0]).to_numpy()[49:]
    proba, decision = session.run(None, {"features": features})
    np.testing.assert_allclose(proba, model.predict_proba(features), atol=1e-6)
    assert (decision == model.predict(features)).all() and len(set(decision)) == 2
    monkeypatch.chdir(tmp_path)
    here = call("export", "--version", facts["version"])
    assert f"ml_ensemble_{facts['version']}.onnx" in here.stdout and "metadata" in here.stdout
    assert (tmp_path / f"ml_ensemble_{facts['version']}.onnx").exists()


@pytest.mark.parametrize("words, message", [
    (["retrain", "--set", "horizn=3"], "Did you mean horizon"), (["retrain", "--source", "ftp:x"], "data.source"),
    (["retrain", "--dry-run", "--source", "file:missing.csv"], "there is no file"),
    (["retrain", "--days", "0"], "Invalid value"), (["predict", "--version", "../x"], "is not a version"),
    (["export", "--to", "pmml"], "--to is 'pmml'"), (["export", "--version", "20200101-0001"], "There are: "),
    (["rollback"], "Missing option"), (["dance"], "No such command")])
def test_a_wrong_call_prints_a_remedy_and_no_traceback(call, words, message):
    done = call(*words)
    assert done.returncode in (1, 2) and message in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr


def test_a_store_that_cannot_be_written_is_an_error_not_a_traceback(call, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path / "file" / "models"))
    done = call("retrain", *SETS)
    assert done.returncode == 1 and "Production was not changed" in done.stderr and "Traceback" not in done.stderr
    assert str(tmp_path / "file") in done.stderr


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


def test_text_of_the_user_is_printed_unchanged(call, tmp_path):
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
    while not (tmp_path / "models" / "reports").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)                                                           # the kernel executes cells
    running.send_signal(signal.SIGTERM)
    _, message = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted" in message
    events = [json.loads(line) for line in (tmp_path / "models/archive/history.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["failure"] and "interrupted" in events[0]["reason"]
    assert not list((tmp_path / "models" / ".staging").iterdir()) and not (tmp_path / "models/production").exists()


def test_an_unexpected_error_is_text_or_json_and_no_traceback(call, monkeypatch):
    def broken(self):
        raise KeyError("surprise")
    monkeypatch.setattr(ModelStore, "versions", broken)
    done = call("history", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["problem"] == "KeyError: 'surprise'"
    assert "Traceback" not in call("versions").stderr and "-X dev" in call("versions").stderr
