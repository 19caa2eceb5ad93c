"""The weekly retrain through papermill, end to end, and what a deployment relies on afterwards."""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from papermill.cli import papermill

from conftest import QUICK, TINY, hand_made_payload
from ml_ensemble import FeatureManager, ModelStore, ProductionEnsemble, retrain, retraining
from ml_ensemble.config import core_tree, load_settings
from ml_ensemble.core import ConfigError, FeatureError, IntegrityError, RetrainError, sha256_hex
from ml_ensemble.custom_features import load_custom
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.monitoring import diagnose
from ml_ensemble.recipe import blend_learners, training_set
from ml_ensemble.recipe import out_of_fold
from ml_ensemble.retrain_steps import compare_with_production, evaluate_result
from ml_ensemble.retraining import execute
from ml_ensemble.run_settings import get_market

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
silent = lambda text: None


def run(store, *more, base=TINY, **options):
    return retrain(overrides=(*base, *more), store=store, show_progress=False, **options)


def test_the_store_has_the_documented_layout(trained):
    store, first, second = trained
    assert first.promoted and second.promoted
    here = {p.relative_to(store.root).as_posix() for p in store.root.rglob("*") if p.is_file()}
    expected = {"production/production_ensemble.pkl", "production/production_model_metadata.json",
                "archive/history.jsonl", "training/training_metadata.json",
                *(f"training/{name}_model.pkl" for name in ("lightgbm", "xgboost", "random_forest"))}
    for outcome in (first, second):
        expected |= {f"archive/production_ensemble_{outcome.version}.pkl",
                     f"archive/production_model_metadata_{outcome.version}.json"}
        expected |= {f"reports/{outcome.report.stem}{suffix}" for suffix in (".ipynb", ".html")}
    backup = r"production_backup_\d{8}T\d{6}Z/production_(ensemble\.pkl|model_metadata\.json)"
    backups = {name for name in here if re.fullmatch(backup, name)}
    assert len(backups) == 2                                   # one backup, of the first version, before the second
    assert here - {".lock", ".lock_holder"} == expected | backups


@pytest.mark.untraced
def test_the_configuration_as_it_stands_passes_its_gate_on_the_documented_market(store, in_this_process):
    outcome = run(store, base=("allow_simulated=true",))
    assert outcome.promoted, str(outcome.verdict)
    assert outcome.metadata["configuration"]["learners"]["xgboost"]["n_estimators"] == 900


def test_a_custom_feature_and_a_calibration_go_all_the_way_into_production(store, tmp_path, monkeypatch):
    project = tmp_path / "project"                              # the module lies in the project folder
    shutil.copytree(Path(__file__).resolve().parent.parent / "config", project / "config")
    monkeypatch.setenv("ML_ENSEMBLE_ROOT", str(project))
    (project / "my_features.py").write_text(
        "from ml_ensemble.custom_features import custom_feature\n\n"
        "@custom_feature(window=[11, 0], unit=\"ratio\")\n"
        "def range_12(bars):\n    \"high over low of 12 bars\"\n    return bars.high.max() / bars.low.min() - 1\n")
    outcome = run(store, "features.custom=[my_features:range_12]", "calibration=platt", "n_estimators=40")
    assert outcome.promoted and outcome.metadata["features"][12:] == ["range_12"]
    parity = next(c for c in outcome.verdict.criteria if c.name == "artefact parity")
    assert parity.status == "pass" and outcome.metadata["artefact"]["parity_error"] > 0
    with pytest.raises(FeatureError, match=r"custom features range_12.*FeatureManager\(custom"):
        ProductionEnsemble(store=store)
    manager = FeatureManager(custom=[load_custom("my_features:range_12")])
    model = ProductionEnsemble(store=store, features=manager)
    assert model.get_model_info()["calibration"]["kind"] == "platt"
    candles, _ = simulate_market(200, seed=5)
    features = manager.generate_features(candles)
    assert np.isfinite(model.predict_proba(features)[49:]).all()
    with pytest.raises(FeatureError, match="missing: range_12"):
        model.predict_proba(FeatureManager().generate_features(candles))


def test_the_same_data_and_seed_give_the_same_figures(trained):
    store, first, second = trained
    assert first.metadata["metrics"] == second.metadata["metrics"]
    assert first.metadata["data"]["hash"] == second.metadata["data"]["hash"]
    learners = lambda outcome: store.read(outcome.version)[1]
    assert sha256_hex(learners(first)) == sha256_hex(learners(second))


def test_the_metadata_holds_the_documented_fields(trained):
    store, _, second = trained
    facts = store.current()
    assert facts["version"] == second.version and facts["sequence"] == 2
    model = (store.production / "production_ensemble.pkl").read_bytes()
    assert (facts["sha256"], facts["size_bytes"]) == (sha256_hex(model), len(model))
    report = store.root / facts["report"]["path"]
    assert facts["report"]["sha256"] == sha256_hex(report.read_bytes())
    assert facts["fingerprint"] == FeatureManager().fingerprint and len(facts["features"]) == 12
    assert facts["weights"] == {"lightgbm": 0.4, "xgboost": 0.4, "random_forest": 0.2} and facts["classes"] == [0, 1]
    assert facts["data"]["bars"] == 4200 and facts["data"]["samples"] == 4200 - 49 - 2
    assert facts["configuration"]["learners"]["lightgbm"]["n_estimators"] == 40
    assert {"numpy", "lightgbm", "xgboost", "scikit-learn", "python"} <= set(facts["packages"])
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert facts["git"]["commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    low, high = facts["metrics"]["intervals"]["skill"]
    assert low < facts["metrics"]["metrics"]["skill"] < high
    assert set(facts["metrics"]["baselines"]) == {"majority", "prior", "persistence"}
    assert facts["gate"]["passed"] and facts["gate"]["outcome"] == "passed"
    assert {c["status"] for c in facts["gate"]["criteria"]} <= {"pass", "not applicable"}
    sources = facts["skill_sources"]
    assert sources["direction"][1] > 0 and "direction adds" in sources["sentence"] and len(sources["close"]) == 3
    assert facts["backtest"]["model"]["probabilistic_sharpe"] > 0.95 and facts["money"]["net"] < facts["money"]["gross"]
    assert facts["label_economics"]["warning"] == "" and facts["configuration"]["labels"]["entry"] == "next_open"
    training = json.loads((store.root / "training/training_metadata.json").read_text())
    for learner in training["learners"].values():
        data = (store.root / "training" / learner["file"]).read_bytes()
        assert (learner["sha256"], learner["size_bytes"]) == (sha256_hex(data), len(data))
        assert hasattr(pickle.loads(data), "predict_proba") and learner["metrics"]["intervals"]["skill"]


def compared(store, *more):
    """Record, recipe and changes of meaning against production, as a retrain with these settings would find them."""
    settings = load_settings((*QUICK, *more))
    market = get_market(settings)
    data = training_set(settings, market.candles)
    blended = blend_learners(settings, out_of_fold(settings, data, silent))
    return compare_with_production(settings, market, data, blended, store, silent)


def test_a_changed_recipe_is_compared_with_the_champions_on_the_same_folds(trained, trained_copy, monkeypatch):
    store, first = trained_copy, trained[1]              # the comparison keeps checkpoints in the store
    lived, unchanged, changes = compared(store)
    assert unchanged.rows == 0 and unchanged.note == f"same recipe as champion {store.current()['version']}"
    assert lived.rows == 0 and "no bar is newer" in lived.note and "more weeks" in lived.note and changes == []
    _, worse, _ = compared(store, "lightgbm.n_estimators=1", "xgboost.n_estimators=1", "random_forest.max_depth=1")
    assert worse.rows == first.metadata["metrics"]["metrics"]["samples"] and worse.high < 0
    lived, recipes, changes = compared(store, "labels.threshold=0.004")
    assert changes == ["labels.threshold 0.003 -> 0.004"] and lived.rows == recipes.rows == 0
    assert "not comparable with champion" in lived.note
    facts = json.loads(json.dumps(store.current()))
    facts["configuration"]["learners"]["lightgbm"]["num_leaves"] = "many"
    monkeypatch.setattr("ml_ensemble.retrain_steps.present_or_damaged", lambda store: facts)
    _, broken, _ = compared(store)
    assert broken.rows == 0 and "with current code" in broken.note and "cannot run the recipe of champion" in broken.note


def test_early_stopping_and_weights_reach_the_learners_and_the_report(trained):
    store, first, _ = trained
    plain = {name: learner["parameters"]["n_estimators"] for name, learner in
             json.loads((store.root / "training/training_metadata.json").read_text())["learners"].items()}
    assert set(plain.values()) == {40}
    settings = load_settings((*QUICK, "horizon=3", "labels.threshold=0.012", "learning_rate=0.3", "early_stopping=3",
                              "class_weight=balanced",
                              "overlap_weight=true"))
    data = training_set(settings, get_market(settings).candles)
    walk = out_of_fold(settings, data, silent)
    assert {name: learner.n_estimators < 40 for name, learner in walk.newest().items()} == {
        "lightgbm": True, "xgboost": True, "random_forest": False}
    raw = np.mean([p[:, 1].mean() for p in walk.proba.values()])
    blended = blend_learners(settings, walk).oos.proba[:, 1].mean()
    share = (walk.y == 1).mean()
    assert raw - share > 0.1 and abs(blended - share) < (raw - share) / 3            # balanced, and brought back
    with pytest.raises(ConfigError, match="class_weight is balanced"):
        load_settings(["class_weight=balanced", "calibration=none"])


def test_too_few_data_give_the_verdict_not_enough_evidence(tmp_path, inbox, in_this_process):
    outcome = run(ModelStore(tmp_path / "models"), "min_samples=5000")
    assert not outcome.promoted and outcome.verdict.outcome == "not enough evidence"
    assert outcome.to_dict()["gate"]["bars_needed"] == 5000 and outcome.version is None
    assert "not enough evidence, about 5,000 bars" in inbox[0]["title"]


def test_a_fresh_process_uses_it_as_the_readme_says(trained, sandbox, tmp_path):
    store, *_ = trained
    sandbox.to_parquet(tmp_path / "candles.parquet")
    script = """
import pandas as pd, sys
from ml_ensemble import FeatureManager, ProductionEnsemble
candles = pd.read_parquet(sys.argv[1])
features = FeatureManager().generate_features(candles)
model = ProductionEnsemble()
print(len(model.predict(features)), model.predict_proba(features).shape, model.get_model_info()["weights"]["lightgbm"])
print(sorted({"sklearn", "lightgbm", "xgboost", "numba", "pydantic"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "candles.parquet")], capture_output=True,
                          text=True, env={**os.environ, "ML_ENSEMBLE_MODELS": str(store.root)}, cwd=tmp_path)
    assert done.stdout.splitlines() == ["1500 (1500, 2) 0.4", "[]"], done.stderr


def test_the_report_shows_every_step_and_is_self_contained(trained):
    _, first, _ = trained
    notebook = nbformat.read(first.report, 4)
    html = first.report.with_suffix(".html").read_text()
    assert "skip_exec" not in html                                                  # a note to nbdev_test, not to readers
    titles = re.findall(r"^## (.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.M)
    assert titles == ["Settings", "Candles", "Features", "Labels", "Walk-forward", "Out-of-sample metrics",
                      "Sources of skill", "Further analysis", "Leakage audit", "Candidate", "Verdict", "Provenance"]
    assert "The gate passes this candidate" in html and html.count("data:image/png;base64") >= 6
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", html)
    assert not re.search(r"(import|from) [\"']https?:", html)


def test_rollback_restores_the_version_before(trained_copy, monkeypatch, sandbox):
    features = FeatureManager().generate_features(sandbox)
    champion, before = trained_copy.current()["version"], ProductionEnsemble(store=trained_copy).predict_proba(features)
    other = trained_copy.promote(restore_ensemble(hand_made_payload()).to_bytes(), {"fingerprint": FeatureManager().fingerprint})
    assert not np.allclose(before, ProductionEnsemble(store=trained_copy).predict_proba(features), equal_nan=True)
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(trained_copy.root))
    command = [sys.executable, "-m", "ml_ensemble.cli", "rollback", "--reason", "test", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = {"version": champion, "sequence": 4, "replaced": other["version"], "reason": "test"}
    assert json.loads(done.stdout) == answer
    np.testing.assert_array_equal(ProductionEnsemble(store=trained_copy).predict_proba(features), before)
    assert trained_copy.history()[-1]["reason"] == "test"


def log_loss_with(*more) -> float:
    settings = load_settings((*TINY, *more))
    walk = out_of_fold(settings, training_set(settings, get_market(settings).candles), silent)
    return evaluate_result(settings, blend_learners(settings, walk)).metrics["log_loss"]


def test_each_setting_takes_effect():
    changed = ("learners.xgboost.n_estimators=25", "horizon=3", "labels.threshold=0.005")
    assert len({log_loss_with(), *map(log_loss_with, changed)}) == 4


@pytest.mark.parametrize("override", ["horizn=3", "horizon=-1", "source=nowhere", "horizon"])
def test_a_wrong_setting_fails_before_any_work(store, override):
    with pytest.raises(ConfigError):
        run(store, override)
    assert not store.root.exists()


def test_nasdaq_is_refused_with_reasons_and_production_stays(trained_copy, nasdaq, tmp_path, inbox, in_this_process):
    nasdaq.to_csv(tmp_path / "nasdaq.csv")
    store, champion = trained_copy, trained_copy.current()["version"]
    before = {p.name: p.read_bytes() for p in store.production.iterdir()}
    outcome = run(store, "calendar=sessions", "days=null", base=QUICK, source=f"file:{tmp_path}/nasdaq.csv")
    assert not outcome.promoted and outcome.current == champion
    assert outcome.metadata["data"]["samples"] == 5031 - 49 - 2
    failed = {criterion.name for criterion in outcome.verdict.failures}
    assert "samples" not in failed and "skill, lower end of 95 %" in failed
    assert {p.name: p.read_bytes() for p in store.production.iterdir()} == before
    assert store.history()[-1]["kind"] == "refusal" and "skill" in store.history()[-1]["reason"]
    assert [message["title"] for message in inbox] == ["ml_ensemble: F1 below the limit, candidate refused"]
    assert "skill" in inbox[0]["message"] and champion in inbox[0]["message"]
    assert "market sandbox -> file:" in inbox[0]["message"] and "--accept-change" in inbox[0]["message"]
    assert ProductionEnsemble(store=store).get_model_info()["version"] == champion


def test_a_run_that_fails_half_way_leaves_a_report_an_alert_and_production_untouched(tmp_path, sandbox, inbox):
    holes = sandbox.drop(sandbox.index[100:150])
    holes.to_csv(tmp_path / "holes.csv")
    store = ModelStore(tmp_path / "models")
    with pytest.raises(RetrainError, match="GapError.*bars are missing"):
        run(store, "days=null", source=f"file:{tmp_path}/holes.csv")
    report, = store.root.glob("reports/*.ipynb")
    assert "GapError" in report.with_suffix(".html").read_text()
    assert store.current() is None and not list((store.root / ".staging").iterdir())
    assert store.history()[-1]["kind"] == "failure" and "GapError" in inbox[0]["message"]
    assert "models/reports/" in store.history()[-1]["reason"] and str(tmp_path / "models") not in json.dumps(store.history())
    text = re.sub("<[^>]+>", "", report.with_suffix(".html").read_text())
    for fact in ("Answers for the model:", "Market:", "Started:", "In production: nothing yet"):
        assert fact in text


def test_a_damaged_champion_does_not_stop_a_retrain(trained_copy, in_this_process):
    store = trained_copy
    for path in (*store.production.glob("*.pkl"), *store.archive.glob("*.pkl")):
        path.write_bytes(b"damaged")
    with pytest.raises(IntegrityError):
        ProductionEnsemble(store=store)
    (store.production / "production_model_metadata.json").write_text("{")
    assert run(store).promoted
    assert ProductionEnsemble(store=store).get_model_info()["sequence"] == 3


def test_a_passed_parameter_takes_effect_in_the_notebook(trained):
    """nbdev_clean can strip the tag; papermill then writes its values above the defaults, which win, and exits 0."""
    notebook = nbformat.read(trained[1].report, 4)
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    injected = [i for i, cell in enumerate(notebook.cells) if "injected-parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == len(injected) == 1 and injected[0] == tagged[0] + 1


def test_three_classes_and_triple_barrier_reach_production(tmp_path, sandbox, in_this_process):
    store = ModelStore(tmp_path / "models")
    labels = {"classes": 3, "method": "triple_barrier", "horizon": 4, "threshold": 0.015}
    outcome = run(store, *(f"{name}={value}" for name, value in labels.items()))
    assert outcome.promoted, str(outcome.verdict)
    assert outcome.metadata["configuration"]["labels"].items() >= labels.items()
    assert outcome.metadata["configuration"]["learners"]["xgboost"]["n_estimators"] == 10
    model = ProductionEnsemble(store=store)
    proba = model.predict_proba(FeatureManager().generate_features(sandbox))
    assert proba.shape == (1500, 3) and np.allclose(proba[49:].sum(axis=1), 1)
    assert set(np.unique(model.predict(FeatureManager().generate_features(sandbox)))) <= {-1, 0, 1}


def test_the_diagnosis_of_a_healthy_store_and_of_a_damaged_one(trained, trained_copy):
    store = trained[0]
    newest = datetime.fromisoformat(store.current()["data"]["to"])
    faults = lambda diagnosis: [finding.part for finding in diagnosis.findings if finding.status == "fault"]
    old = diagnose(store)                                        # trained minutes ago, on candles of years ago
    assert not old.healthy and faults(old) == ["market", "age"]
    path = trained_copy.production / "production_model_metadata.json"
    real = path.read_text()
    for key in ("source", "market"):
        real = real.replace(f'"{key}": "sandbox"', f'"{key}": "file:candles.csv"')
    created = store.current()["created_at"]
    simulated = path.read_text().replace(created, (newest + timedelta(hours=5)).isoformat())       # not years later
    path.write_text(simulated)
    assert faults(diagnose(ModelStore(trained_copy.root, clock=lambda: newest + timedelta(days=13)))) == ["market"]
    path.write_text(real)
    set_back = diagnose(ModelStore(trained_copy.root, clock=lambda: newest + timedelta(days=13)))
    assert faults(set_back) == ["age"] and "the clock reads" in next(f.seen for f in set_back.findings if f.part == "age")
    path.write_text(real.replace(created, (newest + timedelta(hours=5)).isoformat()))
    assert diagnose(ModelStore(trained_copy.root, clock=lambda: newest + timedelta(days=13))).healthy
    assert "days since the newest training bar" in next(f.seen for f in old.findings if f.part == "age")
    (trained_copy.production / "production_ensemble.pkl").write_bytes(b"damaged")
    sick = diagnose(trained_copy)
    assert not sick.healthy and "serves instead" in next(f.seen for f in sick.findings if f.part == "production")


def test_the_model_does_not_depend_on_the_price_level(trained, sandbox):
    model, scaled = ProductionEnsemble(store=trained[0]), sandbox.copy()
    scaled[["open", "high", "low", "close"]] *= 1000
    proba = lambda candles: model.predict_proba(FeatureManager().generate_features(candles))[49:]
    np.testing.assert_allclose(proba(scaled), proba(sandbox), atol=1e-6)


@pytest.mark.parametrize("text", ["- a", "hello", "1: 2", "data:\n\tsource: x", "", "labels: 3"])
def test_a_broken_configuration_is_reported_and_an_alert_is_sent(tmp_path, monkeypatch, inbox, text):
    for folder in ("config", "nbs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "config/core/base.yaml").write_text(text)
    monkeypatch.setenv("ML_ENSEMBLE_ROOT", str(tmp_path))
    with pytest.raises(ConfigError):
        run(ModelStore(tmp_path / "models"))
    assert [message["title"] for message in inbox] == ["ml_ensemble: retrain FAILED"]


def test_a_change_of_the_settings_tree_is_not_seen_by_the_next_reader_and_a_changed_file_is(tmp_path, monkeypatch):
    """A text is parsed once in a process."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.setenv("ML_ENSEMBLE_ROOT", str(tmp_path))
    threshold = core_tree()["labels"]["threshold"]
    core_tree()["labels"]["threshold"] = 0.5
    assert core_tree()["labels"]["threshold"] == load_settings().labels.threshold == threshold
    base = tmp_path / "config/core/base.yaml"
    base.write_text(base.read_text().replace(f"threshold: {threshold}", "threshold: 0.5"))
    assert core_tree()["labels"]["threshold"] == load_settings().labels.threshold == 0.5


def test_an_environment_variable_can_be_null_or_wrong(monkeypatch):
    monkeypatch.setenv("ML_ENSEMBLE_DATA__DAYS", "null")
    assert load_settings(["days=3"]).data.days == 3 and load_settings().data.days is None
    monkeypatch.setenv("ML_ENSEMBLE_DATA__REPAIRS", "sort")
    with pytest.raises(ConfigError, match="as JSON"):
        load_settings()


def test_metadata_that_is_wrong_or_without_figures_is_a_finding_and_no_crash(trained_copy):
    path = trained_copy.production / "production_model_metadata.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "created_at": "yesterday", "metrics": None}))
    production = {finding.part: finding for finding in diagnose(trained_copy).findings}["production"]
    assert production.status == "fault" and "created_at is yesterday" in production.seen and "check --repair" in production.remedy
    path.write_text(json.dumps({name: value for name, value in facts.items() if name != "metrics"}))
    assert {f.part: f.status for f in diagnose(trained_copy).findings}["figures"] == "fault"


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device", "models/reports/x.ipynb"), RuntimeError("the kernel died")])
def test_a_full_disk_is_named_wherever_it_strikes(store, monkeypatch, fault):
    def run(*args, **kwargs):
        raise fault
    free = iter([10**12, 0])                                                     # another program fills it meanwhile
    monkeypatch.setattr(retraining, "execute", run)                              # papermill, or the kernel that it starts
    monkeypatch.setattr(retraining.shutil, "disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    with pytest.raises(RetrainError, match=r"disk .*is full.*Production was not changed.*Free some space"):
        retrain(overrides=TINY, store=store, show_progress=False)
    assert store.history()[-1]["kind"] == "failure" and not list((store.root / ".staging").iterdir())


# --- without new bars -------------------------------------------------------------------------------------------------


class Began(Exception):
    """The notebook was about to be executed."""


@pytest.fixture
def stopped_at_the_notebook(monkeypatch):
    def execute(*arguments):
        raise Began
    monkeypatch.setattr("ml_ensemble.retraining.execute", execute)


def test_the_same_bars_with_the_same_settings_promote_nothing(trained_copy, inbox, stopped_at_the_notebook):
    store, before = trained_copy, trained_copy.current()
    versions = store.versions()
    outcome = run(store, base=QUICK)
    assert (outcome.promoted, outcome.version, outcome.reason) == (False, None, "no new bars")
    assert outcome.current == before["version"] and store.current() == before and store.versions() == versions
    answer = json.loads(json.dumps(outcome.to_dict()))
    assert answer["reason"] == "no new bars" and answer["newest_bar"] == before["data"]["to"] and not answer["promoted"]
    event = store.history()[-1]
    assert event["kind"] == "no_new_bars" and event["version"] == before["version"]
    assert [message["title"] for message in inbox] == ["ml_ensemble: no new bars"] and "days ago" in inbox[0]["message"]
    last = next(f for f in diagnose(store).findings if f.part == "last run")
    assert last.status == "warning" and "no new bars" in last.seen and "source" in last.remedy


def test_equal_candles_of_another_source_are_no_new_bars(trained_copy, tmp_path, stopped_at_the_notebook):
    get_market(load_settings(QUICK)).candles.to_parquet(tmp_path / "copy.parquet")
    outcome = run(trained_copy, "days=null", base=QUICK, source=f"file:{tmp_path}/copy.parquet")
    assert outcome.reason == "no new bars"


@pytest.mark.parametrize("change", [["seed=1"], ["days=701"], ["labels.threshold=0.004"], ["min_samples=100"]])
def test_a_changed_recipe_or_more_bars_are_trained(trained_copy, change, stopped_at_the_notebook):
    with pytest.raises(RetrainError, match="Began"):
        run(trained_copy, *change, base=QUICK)


def test_force_and_a_damaged_version_are_trained_on_the_same_bars(trained_copy, stopped_at_the_notebook):
    with pytest.raises(RetrainError, match="Began"):
        run(trained_copy, base=QUICK, force=True)
    (trained_copy.production / "production_ensemble.pkl").write_bytes(b"damaged")
    with pytest.raises(RetrainError, match="Began"):
        run(trained_copy, base=QUICK)


def test_the_command_ends_well_without_new_bars(trained_copy):
    words = [word for override in QUICK for word in ("--set", override)]
    done = subprocess.run([sys.executable, "-m", "ml_ensemble.cli", "retrain", "--json", "--require-promotion", *words],
                          capture_output=True, text=True, env={**os.environ, "ML_ENSEMBLE_MODELS": str(trained_copy.root)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reason"] == "no new bars"


# --- the kernel and the parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", ["HOME", "JUPYTER_PATH", "JUPYTER_PREFER_ENV_PATH"])
def test_the_kernel_is_this_interpreter_whatever_is_installed(tmp_path, monkeypatch, variables):
    data = tmp_path / ".local/share/jupyter"
    (data / "kernels/python3").mkdir(parents=True)
    (data / "kernels/python3/kernel.json").write_text(json.dumps(
        {"argv": ["/bin/false", "{connection_file}"], "display_name": "another", "language": "python"}))
    if variables == "JUPYTER_PATH":
        monkeypatch.setenv("JUPYTER_PATH", str(data))
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("JUPYTER_DATA_DIR", str(data))
    if variables == "JUPYTER_PREFER_ENV_PATH":
        monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("ML_ENSEMBLE_ALERT_URLS", "json://a-secret")
    monkeypatch.setenv("ML_ENSEMBLE_SIGNING_KEY", "/a-secret")
    source = f"import os, sys; print(*os.environ.items()); print(sys.executable == {sys.executable!r})"
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    page.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(page, tmp_path / "page.ipynb")
    execute(tmp_path / "page.ipynb", tmp_path / "report.ipynb", {}, False, False)
    environment, same = nbformat.read(tmp_path / "report.ipynb", 4).cells[-1].outputs[0].text.strip().split("\n")[-2:]
    assert same == "True" and "a-secret" not in environment and "PATH" in environment


def test_an_error_of_a_library_is_named_recorded_and_reported(store, monkeypatch, inbox):
    def execute(*arguments):
        raise RuntimeError("Kernel didn't respond in 60 seconds")
    monkeypatch.setattr("ml_ensemble.retraining.execute", execute)
    with pytest.raises(RetrainError, match="RuntimeError: Kernel didn't respond.*Production was not changed"):
        run(store)
    assert store.history()[-1]["kind"] == "failure" and "Kernel didn't respond" in inbox[0]["message"]


def test_papermill_itself_gets_a_named_error_for_a_wrong_parameter(tmp_path):
    done = subprocess.run([sys.executable, "-m", "papermill", "nbs/weekly_retrain.ipynb", str(tmp_path / "report.ipynb"),
                           "-p", "models", str(tmp_path / "models"), "-p", "days", "abc"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0 and "ConfigError: parameter days is 'abc' of type str" in done.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("words, message", [
    (["-p", "overrides", "labels.horizon=-3"], "labels.horizon"),
    (["-y", "days: 2024-01-01"], "parameter days is"),
    (["-p", "day", "300"], "weekly_retrain.ipynb has no parameter 'day'")])
def test_the_cells_that_papermill_writes_for_a_wrong_parameter_end_in_a_named_error(tmp_path, words, message):
    page = tmp_path / "report.ipynb"
    done = CliRunner().invoke(papermill, ["nbs/weekly_retrain.ipynb", str(page), "--prepare-only", "-p", "models",
                                          str(tmp_path / "models"), *words])
    assert done.exit_code == 0, done.output
    names = {"display": lambda *shown: None, "In": []}
    with pytest.raises(ConfigError, match=re.escape(message)):
        for cell in nbformat.read(page, 4).cells:
            if cell.cell_type == "code":
                names["In"].append(cell.source)
                exec(cell.source.replace("%matplotlib inline", ""), names)
    assert len(names["In"]) == 4 and not (tmp_path / "models").exists()


def test_a_report_that_cannot_be_rendered_does_not_stop_a_run(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("no converter")
    monkeypatch.setattr("mistune.create_markdown", broken)
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    page.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(page, tmp_path / "page.ipynb")
    with pytest.warns(RuntimeWarning, match="could not be converted to HTML .ValueError: no converter"):
        execute(tmp_path / "page.ipynb", tmp_path / "report.ipynb", {}, False, False)
    assert (tmp_path / "report.ipynb").exists()
