"""The wheel outside a clone: what it holds, production on two packages, training into a folder of one's own."""
import ast
import json
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement

from conftest import hand_made_payload
from ml_ensemble import cli as command_line
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.versioning import ModelStore
from scratch import PYTHON, ROOT, clean_environment, copy_repository, run

EXTRA = 'pip install "ml_ensemble[train]"'
# Modules that import with numpy and onnxruntime alone.
PRODUCTION = {"alerts", "audit_report", "candles", "compiled_trees", "core", "custom_features", "ensemble", "entry_point",
              "feature_manager", "indicators", "inference", "learner_parameters", "live", "metrics", "model_file",
              "model_graph", "prediction_log", "remote_copies", "signing", "store_records", "verdict", "verification",
              "versioning"}
SMALL = {f"ML_ENSEMBLE_{name}": value for name, value in {
    "DATA__DAYS": "100", "VALIDATION__N_SPLITS": "2", "EVALUATION__REPLICATIONS": "100", "AUDIT__CUTS": "1",
    **{f"LEARNERS__{name}__N_ESTIMATORS": "10" for name in ("LIGHTGBM", "XGBOOST", "RANDOM_FOREST")},
    **{f"LEARNERS__{name}__LEARNING_RATE": "0.2" for name in ("LIGHTGBM", "XGBOOST")}}.items()}
# Promoted whatever its figures: where the verdict is not the point.
PROMOTED = {"ML_ENSEMBLE_PRODUCTION__ALLOW_SIMULATED": "true", **{f"ML_ENSEMBLE_GATE__{name}": value for name, value in {
    "MIN_SAMPLES": "1", "MIN_CLASS_ROWS": "1", "MIN_WEIGHTED_F1": "-1", "MIN_F1_OVER_MAJORITY": "-1", "MIN_SKILL_LOWER": "-1",
    "MIN_DIRECTION_LOWER": "-1", "MIN_PROBABILISTIC_SHARPE": "1e-9", "MAX_CALIBRATION_ERROR": "1"}.items()}}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    clone = copy_repository(tmp_path_factory.mktemp("clone"))
    done = run(PYTHON, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--wheel-dir", clone / "dist", ".", cwd=clone, env=clean_environment())
    assert done.returncode == 0, done.stderr
    return next((clone / "dist").glob("*.whl"))


def declared(name: str) -> set[str]:
    """A distribution and all that it requires, without extras."""
    found, left = set(), [name]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            requirements = map(Requirement, distribution(name).requires or [])
            left += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


class Installed:
    """The wheel in a virtual environment of its own, and an empty directory to work in."""

    def __init__(self, folder, wheel):
        self.folder, self.here, self.models = folder / "venv", folder / "here", folder / "models"
        self.here.mkdir()
        assert run(PYTHON, "-m", "venv", "--without-pip", self.folder).returncode == 0
        self.packages = next(self.folder.glob("lib/python*/site-packages"))
        done = run(PYTHON, "-m", "pip", "--python", self.folder / "bin/python", "install", "--quiet", "--no-deps",
                   "--no-index", "--no-compile", wheel, env=clean_environment())
        assert done.returncode == 0, done.stderr
        self.variables = {"JUPYTER_DATA_DIR": str(folder / "jupyter")}

    def __call__(self, command, *words, **variables):
        return run(self.folder / "bin" / command, *words, cwd=self.here, env=clean_environment(**self.variables, **variables))

    def python(self, script, **variables):
        done = self("python", "-c", script, **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """numpy, onnxruntime and what these two declare; a store with a version worked out by hand."""
    installed = Installed(tmp_path_factory.mktemp("bare"), wheel)
    for name in declared("numpy") | declared("onnxruntime"):
        files = distribution(name).files
        for top in {file.parts[0] for file in files} - {".."}:
            (installed.packages / top).symlink_to(distribution(name).locate_file(top))
    knows_all = {"low": [-1e6] * 12, "high": [1e6] * 12, "margin": 1.0}
    model = restore_ensemble(hand_made_payload() | {"range": knows_all})
    ModelStore(installed.models).promote(model.to_bytes(), {"created_at": "2025-09-01T00:00:00Z"})
    return installed


@pytest.fixture(scope="module")
def training(wheel, tmp_path_factory):
    """Everything that is installed here, behind the wheel."""
    installed = Installed(tmp_path_factory.mktemp("training"), wheel)
    places = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    (installed.packages / "all_that_is_here.pth").write_text("\n".join(sorted(places)))
    return installed


def test_the_wheel_holds_the_configuration_and_the_notebooks_that_commands_execute_and_no_others(wheel):
    inside = zipfile.ZipFile(wheel)
    names = {name.removeprefix("ml_ensemble/") for name in inside.namelist() if name.startswith("ml_ensemble/")}
    core = {f"defaults/core/{path.name}" for path in (ROOT / "config/core").iterdir()}
    others = {"py.typed", "pages/weekly_retrain.ipynb", "pages/monitor.ipynb", "pages/report.css", "defaults/grafana/live-model.json"}
    assert {name for name in names if not name.endswith(".py")} == core | others
    assert {name for name in names if name.endswith(".py")} == {path.name for path in (ROOT / "ml_ensemble").glob("*.py")}
    for name, source in (("defaults/core", "config/core"), ("pages", "nbs")):
        for path in (name_ for name_ in names if name_.startswith(name)):
            assert inside.read(f"ml_ensemble/{path}") == (ROOT / source / path.rsplit("/", 1)[1]).read_bytes()


def test_production_needs_numpy_onnxruntime_and_the_folder_of_the_store(bare):
    seen = bare.python("""
import json, sys
from datetime import datetime, timezone
import numpy as np
import ml_ensemble
from ml_ensemble import ProductionEnsemble
model = ProductionEnsemble(clock=lambda: datetime(2025, 9, 2, tzinfo=timezone.utc))
close = 100 * 1.001 ** np.arange(60)
answers = [model.decide(c, c, c, c, 5.0) for c in close]
print(json.dumps([ml_ensemble.__file__, answers[-1].decision, answers[-1].probability, answers[0].reason,
                  sorted({"pandas", "sklearn", "yaml", "typer"} & set(sys.modules))]))
""", ML_ENSEMBLE_MODELS=str(bare.models))
    assert seen[0].startswith(str(bare.folder)) and seen[1] == "buy" and seen[4] == []
    assert seen[2] == pytest.approx(1 / (1 + 2.718281828 ** -0.1), abs=1e-4) and "warm-up" in seen[3]
    assert list(bare.here.iterdir()) == []


def test_a_bot_of_numpy_and_onnxruntime_warms_up_from_ccxt_rows_and_decides_below_95_mb(bare):
    seen = bare.python("""
import json, math, random, re, resource, sys
from datetime import datetime, timezone
from ml_ensemble import ProductionEnsemble
step, start, draw = 4 * 3600 * 1000, 1735689600000, random.Random(0)
close = [100 * math.exp(0.01 * draw.gauss(0, 1)) for _ in range(3000)]
rows = [[start + k * step, str(c), c, c, str(c), 5.0] for k, c in enumerate(close)]
model = ProductionEnsemble(clock=lambda: datetime(2026, 6, 1, tzinfo=timezone.utc))
model.warm_up(rows[:2000])
decisions = [model.decide(*bar, time=time) for time, *bar in rows[2000:]]
try:                     # getrusage would include the memory of the process that started this one
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**10
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
print(json.dumps([len(decisions), sorted({d.reason[:7] for d in decisions}), peak,
                  sorted({"pandas", "sklearn", "numba"} & set(sys.modules))]))
""", ML_ENSEMBLE_MODELS=str(bare.models))
    assert seen[0] == 1000 and seen[3] == [] and set(seen[1]) <= {"", "expired"}
    assert seen[2] < 95


@pytest.mark.parametrize("variables", [{}, {"ML_ENSEMBLE_MODELS": "nowhere"}], ids=["not set", "an empty store"])
def test_a_store_that_is_missing_is_named_by_its_variable(bare, variables):
    done = bare("python", "-c", "from ml_ensemble import ProductionEnsemble; ProductionEnsemble()", **variables)
    assert done.returncode == 1 and "ML_ENSEMBLE_MODELS" in done.stderr.splitlines()[-1]
    assert list(bare.here.iterdir()) == []


def test_the_command_without_the_training_extra_names_it(bare):
    done = bare("ml-ensemble", "history", ML_ENSEMBLE_MODELS=str(bare.models))
    assert (done.returncode, done.stdout) == (2, "")
    assert EXTRA in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    as_json = bare("ml-ensemble", "check", "--json")
    assert as_json.returncode == 2 and as_json.stderr == ""
    assert json.loads(as_json.stdout)["error"] == "MissingExtraError" and EXTRA in json.loads(as_json.stdout)["remedy"]


def test_a_package_that_is_missing_later_ends_the_command_alike(monkeypatch, capsys, tmp_path):
    """typer is there, what one command needs is not."""
    monkeypatch.setitem(sys.modules, "papermill", None)
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ml-ensemble", "retrain", "--json"])
    assert command_line.run_command(as_json=True) == 2 and ModelStore(tmp_path).history() == []   # it was no run
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == "MissingExtraError" and "'papermill'" in error["problem"] and EXTRA in error["remedy"]


def test_every_module_and_name_imports_or_names_the_extra(bare):
    seen = bare.python("""
import importlib, json, pkgutil, sys
import ml_ensemble
from ml_ensemble import FeatureManager, ModelStore
seen = {}
def attempt(name, call):
    try:
        call()
        seen[name] = ""
    except ImportError as error:
        seen[name] = str(error)
for module in pkgutil.iter_modules(ml_ensemble.__path__):
    attempt(module.name, lambda: importlib.import_module("ml_ensemble." + module.name))
for name in ml_ensemble.__all__:
    attempt("from " + name, lambda: getattr(ml_ensemble, name))
attempt("describe", FeatureManager().describe)
attempt("plot", lambda: FeatureManager().plot(None, "rsi_14"))
attempt("backup", ModelStore().backup)
print(json.dumps(seen))
""", ML_ENSEMBLE_MODELS=str(bare.models))
    names = {path.stem for path in (ROOT / "ml_ensemble").glob("*.py")} - {"__init__"}
    assert {name for name in names if seen[name] == ""} == PRODUCTION | {"_modidx"}
    assert all(EXTRA in seen[name] for name in names - PRODUCTION - {"_modidx"})
    assert [name for name in ("EnsembleClassifier", "FeatureManager", "ModelStore", "ProductionEnsemble", "retrain")
            if seen[f"from {name}"]] == ["EnsembleClassifier", "retrain"]
    assert all(EXTRA in seen[name] for name in ("from EnsembleClassifier", "from retrain", "describe", "plot", "backup"))


def test_no_import_of_the_training_extra_is_left_unguarded():
    """Also inside functions, where no test of imports would come by."""
    free = {"numpy", "onnxruntime", "ml_ensemble", "numba"}              # numba: looked for before it is imported

    def unguarded(node, guarded=False):
        guarded |= isinstance(node, ast.With) and "requires_extra" in ast.dump(node.items[0])
        if isinstance(node, ast.Import | ast.ImportFrom) and not guarded and getattr(node, "level", 0) == 0:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (name for name in names if name.split(".")[0] not in free | set(sys.stdlib_module_names))
        for child in ast.iter_child_nodes(node):
            yield from unguarded(child, guarded)

    found = {path.name: list(unguarded(ast.parse(path.read_text()))) for path in (ROOT / "ml_ensemble").glob("*.py")}
    reached = {"feature_manager.py": ["sklearn.utils", "pandas"], "compiled_trees.py": ["onnx", "onnx"]}   # where they are there
    assert {name: modules for name, modules in found.items() if modules} == reached


@pytest.mark.slow
def test_a_retrain_and_a_fit_in_an_empty_directory_leave_nothing_but_the_store(training):
    done = training("ml-ensemble", "retrain", "--json", ML_ENSEMBLE_MODELS=str(training.models), **SMALL, **PROMOTED)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["promoted"] and outcome["report"].startswith(str(training.models / "reports"))
    assert {path.name for path in (training.models / "training").iterdir()} == {
        "lightgbm_model.pkl", "xgboost_model.pkl", "random_forest_model.pkl", "training_metadata.json"}
    facts = json.loads((training.models / "training/training_metadata.json").read_text())
    assert facts["git"] == {"commit": None, "dirty": None}               # not that of the working directory
    seen = training.python("""
import json
import numpy as np
import ml_ensemble
from ml_ensemble import EnsembleClassifier
X = np.random.default_rng(0).normal(size=(300, 3))
model = EnsembleClassifier(random_forest={"min_samples_leaf": 5}).fit(X, X[:, 0] > 0)
print(json.dumps([ml_ensemble.__file__, model.score(X, X[:, 0] > 0), model.parameters_["lightgbm"]["num_leaves"]]))
""", **SMALL)
    assert seen[0].startswith(str(training.folder)) and seen[1] > 0.9 and seen[2] == 9
    assert list(training.here.iterdir()) == []


def test_a_deployment_folder_changes_settings_of_the_installed_package(training):
    root = training.folder.parent / "deployment"
    (root / "config/night").mkdir(parents=True)
    (root / "config/night/base.yaml").write_text("labels: {horizon: 3}")
    seen = training.python("""
import json
from ml_ensemble.config import load_settings
from ml_ensemble.core import models_dir
print(json.dumps([load_settings().labels.horizon, load_settings().labels.threshold, str(models_dir())]))
""", ML_ENSEMBLE_ROOT=str(root), ML_ENSEMBLE_ENV="night")
    assert seen == [3, 0.003, str(root / "models")]
    lost = training("ml-ensemble", "history")
    assert lost.returncode == 2 and "Set ML_ENSEMBLE_MODELS to the folder of the model store" in lost.stderr.replace("\n", " ")
