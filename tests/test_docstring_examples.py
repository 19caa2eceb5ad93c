"""The examples in the docstrings of the front doors run, and print what they show."""
import doctest
from datetime import datetime, timezone
from importlib import import_module
from operator import attrgetter

import numpy as np
import pytest

from conftest import hand_made_payload
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.market_data import load_candles
from ml_ensemble.versioning import ModelStore

# Module and name of each object whose docstring must have an example that runs.
FRONT_DOORS = (
    ("feature_manager", "FeatureManager"),
    ("feature_manager", "FeatureManager.fit"),
    ("feature_manager", "FeatureManager.transform"),
    ("feature_manager", "FeatureManager.fit_transform"),
    ("feature_manager", "FeatureManager.get_feature_names_out"),
    ("feature_manager", "FeatureManager.get_params"),
    ("feature_manager", "FeatureManager.set_params"),
    ("feature_manager", "FeatureManager.set_output"),
    ("feature_manager", "FeatureManager.features"),
    ("feature_manager", "FeatureManager.fingerprint"),
    ("feature_manager", "FeatureManager.warmup"),
    ("feature_manager", "FeatureManager.get_feature_names"),
    ("feature_manager", "FeatureManager.get_feature_count"),
    ("feature_manager", "FeatureManager.get_categories"),
    ("feature_manager", "FeatureManager.describe"),
    ("feature_manager", "FeatureManager.generate_features"),
    ("feature_manager", "FeatureManager.stream"),
    ("feature_manager", "FeatureManager.plot"),
    ("feature_manager", "FeatureStream"),
    ("feature_manager", "FeatureStream.step"),
    ("feature_manager", "FeatureStream.warm_up"),
    ("feature_manager", "FeatureStream.to_json"),
    ("feature_manager", "FeatureStream.from_json"),
    ("versioning", "ModelStore"),
    ("versioning", "ModelStore.current"),
    ("versioning", "ModelStore.read"),
    ("versioning", "ModelStore.versions"),
    ("versioning", "ModelStore.history"),
    ("versioning", "ModelStore.record"),
    ("versioning", "ModelStore.promote"),
    ("versioning", "ModelStore.rollback"),
    ("versioning", "ModelStore.backup"),
    ("versioning", "ModelStore.locked"),
    *(("versioning", f"ModelStore.{name}") for name in (
        "staged", "shadow", "start_shadow", "end_shadow", "promote_shadow", "previous",
        "stage", "promote_staged", "sign", "restore", "pin", "unpin", "pins", "prune", "verify", "repair")),
    ("store_records", "parse_json"),
    ("prediction_log", "from_record"),
    ("prediction_log", "read_log"),
    ("prediction_log", "PredictionLog"),
    ("forecast_comparison", "compare_scores"),
    ("forecast_comparison", "bars_until_decided"),
    ("ensemble", "ProductionEnsemble.log_status"),
    ("forecast_comparison", "brier_bound"),
    ("forecast_comparison", "alarm_evidence"),
    ("forecast_comparison", "alarm_delay"),
    ("forecast_comparison", "least_delay"),
    ("drift", "feature_reference"),
    ("drift", "measure_drift"),
    ("drift", "compare_with_batch"),
    ("store_records", "check_chain"),
    ("signing", "generate_key"),
    ("live", "Decision"),
    ("ensemble", "ProductionEnsemble"),
    ("ensemble", "ProductionEnsemble.load"),
    ("ensemble", "ProductionEnsemble.predict_proba"),
    ("ensemble", "ProductionEnsemble.predict"),
    ("ensemble", "ProductionEnsemble.decide"),
    ("ensemble", "ProductionEnsemble.predict_one"),
    ("ensemble", "ProductionEnsemble.warm_up"),
    ("ensemble", "ProductionEnsemble.validate_predictions"),
    ("ensemble", "ProductionEnsemble.reload_if_changed"),
    ("ensemble", "ProductionEnsemble.get_model_info"),
    ("ensemble", "ProductionEnsemble.get_feature_names"),
    ("ensemble", "ProductionEnsemble.to_bytes"),
    ("ensemble", "closed_bars"),
    ("inference", "time_ns"),
    ("inference", "plain_numbers"),
    ("live", "unfinished_bar"),
    ("market_data", "load_candles"),
    ("retraining", "retrain"),
    ("publishing", "publish"),
    ("remote_copies", "push_store"),
    ("remote_copies", "pull_store"),
    ("publishing", "plain_line"),
    *(("labels", name) for name in (
        "next_returns", "forward_return_labels", "triple_barrier_labels", "average_uniqueness", "make_labels")),
    *(("validation", name) for name in (
        "index_ns", "block_edges", "walk_forward_splits", "PurgedWalkForward", "CombinatorialPurgedSplit",
        "CombinatorialPurgedSplit.get_paths", "assemble_paths")),
    ("classifier", "EnsembleClassifier"),
)


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """What an example may use without a definition: `np`, `candles` (300 bars of 4 hours), and `store`, which has one
    version in production, p = 1 / (1 + exp(-100 returns_1))."""
    candles = load_candles("sandbox", days=50, min_bars=100).candles
    payload = hand_made_payload() | {"range": {"low": [-100.0] * 12, "high": [100.0] * 12, "margin": 1.0}}
    store = ModelStore(tmp_path / "models", clock=lambda: datetime(2025, 9, 1, tzinfo=timezone.utc))
    store.promote(restore_ensemble(payload).to_bytes(),
                  {"created_at": "2025-09-01T00:00:00Z",
                   "data": {"to": candles.index[-1].isoformat(), "interval_minutes": 240, "calendar": "continuous"}})
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(store.root))      # the store that is used by default
    monkeypatch.chdir(tmp_path)
    return {"np": np, "candles": candles, "store": store}


@pytest.mark.parametrize("module, name", FRONT_DOORS, ids=[".".join(pair) for pair in FRONT_DOORS])
def test_the_example_in_a_docstring_runs_and_prints_what_it_shows(module, name, names):
    source = import_module(f"ml_ensemble.{module}")
    documentation = attrgetter(name)(source).__doc__ or ""
    example = doctest.DocTestParser().get_doctest(documentation, vars(source) | names, name, module, 0)
    assert example.examples, f"the docstring of {name} has no example"
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=failures.append)
    assert not failures, "".join(failures)
