"""What several test files share: real candles, a small quick configuration, a store of one's own."""
import json
import os
import pickle
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import arch.data.nasdaq
import arch.data.sp500
import nbformat
import numpy as np
import onnx
import pandas as pd
import pytest
from filelock import FileLock
from hypothesis import settings

from ml_ensemble import retrain, retraining
from ml_ensemble.feature_manager import FEATURE_NAMES, FeatureManager, input_names
from ml_ensemble.candle_columns import tidy
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.model_file import FORMAT
from ml_ensemble.versioning import ModelStore

for name in [name for name in os.environ if name.startswith("ML_ENSEMBLE_")]:
    del os.environ[name]          # no test reads this machine's settings, or sends an alert

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

# A retrain small enough for a test: every part runs, with fewer bars, trees and replications.
QUICK = ("allow_simulated=true", "days=700", "lightgbm.n_estimators=40", "xgboost.n_estimators=40", "random_forest.n_estimators=40",
         "learning_rate=0.1", "n_splits=3",
         "replications=200", "min_samples=4000", "audit.cuts=4")
# Still smaller, and promoted whatever its figures: where the verdict is not the point.
TINY = (*QUICK, "days=300", "n_estimators=10", "replications=100", "audit.cuts=2", "min_samples=1000", "min_class_rows=1",
        "min_weighted_f1=-1", "min_f1_over_majority=-1", "min_skill_lower=-1", "min_direction_lower=-1", "min_probabilistic_sharpe=1e-9",
        "max_calibration_error=1")


def daily(frame: pd.DataFrame) -> pd.DataFrame:
    """arch's daily candles under our column names."""
    return tidy(frame.rename_axis("date").reset_index())


def hand_made_payload() -> dict:
    """The plain data of a model whose one unit is p = 1 / (1 + exp(-100 returns_1))."""
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node("MatMul", ["view", "w"], ["z"]), make.make_node("Sigmoid", ["z"], ["p"]),
         make.make_node("Sub", ["one", "p"], ["q"]), make.make_node("Concat", ["q", "p"], ["probabilities"], axis=1)],
        "by_hand", [make.make_tensor_value_info("view", onnx.TensorProto.FLOAT, [None, 12])],
        [make.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, [None, 2])],
        [make.make_tensor("w", onnx.TensorProto.FLOAT, [12, 1], [100.0] + [0.0] * 11),
         make.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    rows = np.ones((3, 12))
    rows[:, 2] = [-0.01, 0.0, 0.02]
    p = 1 / (1 + np.exp(-100 * rows[:, 2]))
    return {"format": FORMAT, "model": model.SerializeToString(), "features": list(FEATURE_NAMES),
            "view": input_names(FeatureManager()), "fingerprint": FeatureManager().fingerprint, "classes": [0, 1],
            "weights": {"by_hand": 1.0}, "calibration": {"kind": "none"}, "decision_threshold": 0.5,
            "max_age_days": 14.0, "range": {"low": [-2.0] * 12, "high": [2.0] * 12, "margin": 1.0},
            "canary": {"features": rows.tolist(), "probabilities": np.column_stack([1 - p, p]).tolist()}}


@pytest.fixture(scope="session")
def nasdaq() -> pd.DataFrame:
    return daily(arch.data.nasdaq.load())


@pytest.fixture(scope="session")
def sp500() -> pd.DataFrame:
    return daily(arch.data.sp500.load())


@pytest.fixture(scope="session")
def sandbox() -> pd.DataFrame:
    return simulate_market(1500, seed=3)[0]


@pytest.fixture
def store(tmp_path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Coverage doubles the time of a test; those that are marked reach hardly any line that no other test reaches."""
    if not item.get_closest_marker("untraced"):
        return (yield)
    own, of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(own)
        threading.settrace(of_threads)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, worker_id):
    """A store after two retrains on the same data and seed, and their results. All test processes read the same one."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "trained"
    store, results = ModelStore(folder / "models"), folder / "results.pkl"
    with FileLock(f"{folder}.lock"):
        if not results.exists():
            made = [retrain(overrides=QUICK, store=store, show_progress=False),
                    retrain(overrides=QUICK, store=store, show_progress=False, force=True)]               # no new bars
            results.write_bytes(pickle.dumps(made))
    return store, *pickle.loads(results.read_bytes())


def execute_here(notebook, report, parameters, verbose, show_progress):
    """The cells of a retrain in this process, which draw nothing."""
    names = {"display": lambda *shown: None}
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code":
            exec(cell.source.replace("%matplotlib inline", "").replace("from IPython.display import display", ""), names)
            names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(notebook.read_text())


@pytest.fixture
def in_this_process(monkeypatch):
    """The cells of a retrain run in this process and draw nothing: where the report is not the point."""
    monkeypatch.setattr(retraining, "execute", execute_here)


@pytest.fixture
def trained_copy(trained, tmp_path) -> ModelStore:
    """That store, to write to."""
    return ModelStore(shutil.copytree(trained[0].root, tmp_path / "trained"))


class Inbox(list):
    """The messages that a receiver of alerts got, and its address."""
    address = ""


@pytest.fixture
def inbox(monkeypatch):
    """A real receiver of alerts."""
    messages = Inbox()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    messages.address = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ML_ENSEMBLE_ALERT_URLS", f"json://{messages.address}/")
    yield messages
    server.shutdown()
    server.server_close()
