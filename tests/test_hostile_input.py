"""What an operator may mistype is a named error within two seconds and 300 MB; a file in the way never runs as code."""
import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import hand_made_payload
from ml_ensemble import ModelStore, cli as command_line
from ml_ensemble.config import load_settings
from ml_ensemble.core import ConfigError, FeatureError, MLEnsembleError
from ml_ensemble.custom_features import load_custom
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.onnx_export import load_with_custom
from ml_ensemble.sandbox import simulate_market
from scratch import FEATURE, ROOT, SLOWED, shadow_modules

SECONDS, MEGABYTES = 2 * SLOWED, 300


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A command with `--json` in this process, in an empty folder: exit code, error and seconds."""
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path / "models"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def here(*words):
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", *words, "--json"])
        with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
            begin = time.process_time()
            code = command_line.run_command(True)
        document = json.loads(stdout.getvalue())
        return SimpleNamespace(code=code, seconds=time.process_time() - begin, error=document["error"],
                               text=f"{document['problem']} {document['remedy']}", err=stderr.getvalue())
    here("rollback", "--reason", "x")                            # imports are not counted
    with contextlib.suppress(ConfigError):
        load_settings()
    return here


def is_named(done, code=2):
    assert done.code == code and done.seconds < SECONDS
    assert done.error not in ("MLEnsembleError", None) and len(done.text) < 5000 and "Traceback" not in done.err
    return done.text


def bomb(levels=9):
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"b{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, levels)]) + "\n"


# --- settings of one run ----------------------------------------------------------------------------------------------

SETS = {
    "5,000 brackets": "labels.horizon=" + "[" * 5000, "5,000 braces": "labels.horizon=" + "{" * 5000,
    "5,000 nested lists": "labels.horizon=" + "[" * 4000 + "]" * 4000, "5,000 dashes": "labels.horizon=" + "- " * 4000,
    "20,000 characters": "labels.horizon=" + "9" * 15_000, "a long key": "x" * 9000 + "=1", "a long number": "labels.horizon=" + "9" * 5000,
    "a long float": "labels.threshold=0." + "1" * 5000, "a hexadecimal number": "labels.horizon=0x" + "f" * 9000,
    "a date that is none": "labels.horizon=2024-13-45", "a date": "labels.horizon=2024-10-01", "a time": "labels.horizon=12:30:45",
    "nan": "labels.threshold=.nan", "inf": "labels.threshold=.inf", "-inf": "gate.min_skill_lower=-.inf",
    "nan of a learner": "lightgbm.path_smooth=.nan", "inf as a share": "learning_rate=.inf", "nan days": "data.days=.nan",
    "an anchor": "labels.horizon=&a 3", "an alias": "labels.horizon=*a", "an alias of itself": "data.repairs=&a [*a]",
    "a tag": "labels.horizon=!!python/object/apply:os.getcwd []", "a date tag": "labels.horizon=!!timestamp x",
    "a binary tag": "data.market=!!binary x", "a merge": "data.columns={<<: {time: 1}}",
    "a duplicate key": "data.columns={time: 1, time: 2}",
    "a list as a key": "data.columns={[1]: 2}",
    "an empty value": "labels.horizon=", "no value": "labels.horizon", "only =": "=", "no text": "",
    "a null byte": 'data.source="file:a\\0b"', "an escape": 'data.market="\\e[31m"', "half a pair": 'data.market="\\ud800"',
    "a control character": "data.market=\x1b[31m", "a broken quote": "data.market='", "an open bracket": "data.repairs=[sort",
    "no digits": "labels.horizon=0b_", "many days": "data.days=999999999999", "negative days": "data.days=-1",
    "a lone %": "labels.horizon=%",
    "a bracket in a key": "labels[0]=1", "dots": "...=1", "a learner without a name": "lightgbm.=1",
    "an unknown section": "label.horizon=1",
    "bars without end": "data.bar=0h", "a bar of years": "data.bar=99999999999h", "a huge sandbox": "data.bar=1min data.days=100000",
}


@pytest.mark.untraced
@pytest.mark.parametrize("name", SETS)
def test_a_malformed_setting_is_a_named_error(call, name):
    texts = SETS[name].split(" ") if name == "a huge sandbox" else [SETS[name]]
    is_named(call("retrain", "--dry-run", *(word for text in texts for word in ("--set", text))))


def test_too_many_settings_are_refused(call):
    assert "overrides" in is_named(call("retrain", "--dry-run", *["--set", "horizon=3"] * 2000))
    assert "overrides" in is_named(call("retrain", "--dry-run", *["--set", f"data.market={'x' * 9000}"] * 100))


# --- other words ------------------------------------------------------------------------------------------------------

WORDS = {
    "many days": ["retrain", "--days", "999999999999"], "days of 5,000 digits": ["retrain", "--days", "9" * 5000],
    "nan days": ["retrain", "--days", "nan"], "many rows": ["predict", "--rows", "99999999999999999999"],
    "many events": ["history", "--limit", "99999999999999999999"], "a negative limit": ["history", "-n", "-5"],
    "an unknown user": ["retrain", "--dry-run", "--source", "file:~nobodyx/x.csv"],
    "an unknown user of candles": ["candles", "~nobodyx/x.csv"], "an unknown user of predict": ["audit", "--source", "file:~nobodyx/x.csv"],
    "half a pair in a source": ["candles", "x\ud800.csv"], "bytes in a source": ["retrain", "--source", "file:caf\udce9.csv"],
    "bytes in a setting": ["retrain", "--set", "data.market=\udcff"], "bytes in a market": ["retrain", "--replace-market", "\udcff"],
    "bytes in a version": ["predict", "--version", "\udcff"], "bytes in an output": ["export", "--output", "\udcff"],
    "bytes as a command": ["\udcff"], "a null byte in a file": ["candles", "a\0b.csv"],
    "a null byte in an output": ["export", "--output", "a\0b"],
    "a null byte in a source": ["retrain", "--dry-run", "--source", "file:a\0b"], "a long word": ["candles", "x" * 30_000],
    "a long file name": ["candles", "x" * 5000], "a long source": ["retrain", "--dry-run", "--source", "file:" + "x" * 9000],
    "a long version": ["export", "--version", "20250101-" + "1" * 5000], "a path as a version": ["export", "--version", "../../x"],
    "an unknown source": ["retrain", "--dry-run", "--source", "ftp:x"], "a source of 9,000 colons": ["candles", "ccxt:" + ":" * 9000],
    "an unknown format": ["export", "--to", "x" * 5000], "an unknown option": ["check", "--" + "x" * 5000],
}


@pytest.mark.parametrize("name", WORDS)
def test_a_malformed_argument_is_a_named_error(call, name):
    is_named(call(*WORDS[name]))


def test_a_deleted_working_directory_is_a_named_error_or_does_not_matter(call, tmp_path, monkeypatch):
    monkeypatch.setenv("ML_ENSEMBLE_ROOT", str(ROOT))
    (tmp_path / "here").rmdir()
    assert "working directory" in is_named(call("retrain", "--dry-run", "--source", "file:x.csv"))
    assert is_named(call("export", "--output", "x.onnx"))
    assert is_named(call("candles", "x.csv"), 2)
    assert call("backup").code == 1
    assert str(command_line._nearby(Path("/a/b"))) == "/a/b"


# --- files in the way -------------------------------------------------------------------------------------------------

def put(path: Path, kind: str) -> None:
    """Something at `path` that is no file of text."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind == "3 GB":
        with open(path, "wb") as file:
            file.truncate(3 * 10**9)
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 100)
    elif kind == "a million lines":
        path.write_text("a:\n" * 300_000)
    elif kind == "bomb":
        path.write_text(bomb())
    elif kind == "deep":
        path.write_text("[" * 100_000)
    elif kind == "deep mapping":
        path.write_text("".join(" " * k + f"k{k}:\n" for k in range(900)))
    elif kind == "list":
        path.write_text("- 1\n- 2\n")
    elif kind == "number as a key":
        path.write_text("1: 2\n")
    elif kind == "twice":
        path.write_text("labels: {horizon: 3}\nlabels: {horizon: 5}\n")
    elif kind == "date":
        path.write_text("labels: {horizon: 2024-13-45}\n")
    elif kind == "null bytes":
        path.write_bytes(b"\0" * 1000)
    elif kind == "many unknown keys":
        path.write_text("".join(f"key{k}: 1\n" for k in range(4000)))


FILES = ["pipe", "device", "folder", "link loop", "3 GB", "binary", "a million lines", "bomb", "deep", "deep mapping", "list",
         "number as a key", "twice", "date", "null bytes", "many unknown keys"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the core configuration of this one and an overlay `live`."""
    core = tmp_path / "project/config/core"
    core.mkdir(parents=True)
    (core.parent / "live").mkdir()
    for path in (ROOT / "config/core").iterdir():
        (core / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("ML_ENSEMBLE_ROOT", str(core.parent.parent))
    return core.parent


@pytest.mark.untraced
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("place", ["core/base.yaml", "core/thresholds.yaml", "live/base.yaml"])
def test_a_settings_file_that_cannot_be_used_is_a_named_error(call, project, monkeypatch, kind, place):
    (project / place).unlink(missing_ok=True)
    put(project / place, kind)
    monkeypatch.setenv("ML_ENSEMBLE_ENV", "live")
    is_named(call("retrain", "--dry-run"))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link loop", "3 GB", "binary", "null bytes", "deep", "list"])
def test_a_candle_file_that_cannot_be_used_is_a_named_error(call, tmp_path, kind):
    put(tmp_path / "x.csv", kind)
    done = call("candles", str(tmp_path / "x.csv"))
    is_named(done, 1)
    assert kind not in ("pipe", "device") or "a device or a pipe" in done.text
    is_named(call("retrain", "--dry-run", "--source", f"file:{tmp_path}/x.csv"), 1)
    assert kind in ("folder", "link loop") or is_named(call("candles", str(tmp_path / "*.csv")), 1)


@pytest.mark.parametrize("packer", [gzip, bz2, lzma], ids=lambda module: module.__name__)
def test_a_packed_candle_file_that_expands_without_end_is_refused(call, tmp_path, packer):
    (tmp_path / "x.csv.packed").write_bytes(packer.compress(packer.compress(b"0" * 60_000_000)))
    assert "10,000,000 bytes" in is_named(call("candles", str(tmp_path / "x.csv.packed")), 1)
    (tmp_path / "y.csv").write_bytes(packer.compress(packer.compress(packer.compress(packer.compress(b"time,open")))))
    assert "three times" in is_named(call("candles", str(tmp_path / "y.csv")), 1)


ENVIRONMENT = {"ML_ENSEMBLE_ENV": ["../x", "/etc", "core/../core", "x" * 5000, "a\x1bb", "..", ".", "\udcff", "no such"],
               "ML_ENSEMBLE_LABELS__HORIZON": ["\udcff", "2024-13-45", "9" * 20_000, "nan", "\x1b", ""],
               "ML_ENSEMBLE_DATA__REPAIRS": ["[" * 5000, "[" * 200_000, "{", "[sort", '["sort", "\\ud800"]', "[&a 1]", "sort"],
               "ML_ENSEMBLE_DATA__COLUMNS": ['{"time": 1, "time": 2}', "[" * 5000, '{"a": 1}'],
               "ML_ENSEMBLE_LEARNERS__LIGHTGBM__PATH_SMOOTH": [".nan", "[" * 5000, "&a 1", "2024-13-45:\tx"],
               "ML_ENSEMBLE_DATA": ["[" * 5000, "{" * 5000, "x"], "ML_ENSEMBLE_LABELS__" + "X__" * 3000 + "Y": ["1"],
               "ML_ENSEMBLE_\udcff": ["1"], "ML_ENSEMBLE_HORIZON": ["1"]}


@pytest.mark.untraced
@pytest.mark.parametrize("name, value", [(name, value) for name, values in ENVIRONMENT.items() for value in values],
                         ids=lambda text: ascii(text)[:40])
def test_a_malformed_variable_is_a_named_error(call, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    is_named(call("retrain", "--dry-run"))


def measured(*words, env, limit=1_200_000_000):
    """A process under a limit of address space: exit code, output, seconds of the processor and peak megabytes."""
    script = ("import atexit, re, resource, sys, time; resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)\n"
              "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
              "atexit.register(lambda: print(time.process_time(), peak(), file=sys.stderr)); sys.argv[1:] = sys.argv[2:]\n"
              "from ml_ensemble.entry_point import main; main()")
    done = subprocess.run([sys.executable, "-c", script, str(limit), *words], capture_output=True, text=True, env=env, timeout=60)
    return done.returncode, json.loads(done.stdout), *map(float, done.stderr.split()[-2:])


@pytest.mark.parametrize("kind", ["bomb", "device", "3 GB", "deep", "setting"])
def test_a_process_ends_early_and_stays_small(tmp_path, project, kind):
    setting = ["--set", "labels.horizon=" + "[" * 5000] if kind == "setting" else []
    if not setting:
        put(project / "live/base.yaml", kind)
    env = {**os.environ, "ML_ENSEMBLE_ENV": "live", "ML_ENSEMBLE_MODELS": str(tmp_path / "models"), "OMP_NUM_THREADS": "1"}
    code, document, seconds, peak = measured("retrain", "--dry-run", *setting, "--json", env=env)
    assert code == 2 and document["error"] == "ConfigError"
    assert seconds < SECONDS and peak < MEGABYTES
    print(f"{kind}: {seconds:.2f} s, {peak:.0f} MB")


def test_a_candle_file_of_3_gigabytes_is_not_read(tmp_path):
    put(tmp_path / "x.csv", "3 GB")
    code, document, seconds, peak = measured("candles", str(tmp_path / "x.csv"), "--json", limit=2_500_000_000,
                                             env={**os.environ, "ML_ENSEMBLE_MODELS": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert code == 1 and "3,000,000,000 bytes" in document["problem"] and peak < MEGABYTES and seconds < 2 * SECONDS
    print(f"{seconds:.2f} s, {peak:.0f} MB")


# --- names in data are not code ---------------------------------------------------------------------------------------


def test_a_custom_feature_of_the_project_folder_is_found_and_the_path_is_left_as_it_was(project, tmp_path):
    (project.parent / "of_the_project.py").write_text(FEATURE.format(marker=str(tmp_path / "ran")))
    (project.parent / "json.py").write_text("raise RuntimeError('not this one')")
    before = list(sys.path)
    assert load_custom("of_the_project:range_4").name == "range_4" and sys.path == before
    assert load_settings(["features.custom=[of_the_project:range_4]"]).features.custom == ["of_the_project:range_4"]
    with pytest.raises(ConfigError, match="cannot be found"):
        load_custom("not_there:range_4")
    assert sys.path == before


@pytest.mark.parametrize("reference", ["", ":", "os", "os:", ":x", "..:x", "a..b:x", "os;x:y", "a b:c", "x" * 5000 + ":y", "a:b:c"])
def test_a_name_that_is_no_reference_is_not_imported(reference):
    with pytest.raises(ConfigError, match="module:name"):
        load_custom(reference)


def test_a_module_that_fails_is_a_named_error(project):
    (project.parent / "failing_module.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match="division by zero"):
        load_custom("failing_module:x")


@pytest.mark.parametrize("command", [["export"], ["rollback", "--reason", "x", "--to", "20250101-0001"]])
def test_a_feature_that_only_the_metadata_name_is_compared_and_not_imported(call, project, tmp_path, monkeypatch, command):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for place in (folder, project.parent, tmp_path / "here"):
        (place / "hostile_module.py").write_text(FEATURE.format(marker=str(tmp_path / "ran")))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    from datetime import datetime, timezone
    store = ModelStore(tmp_path / "models", clock=lambda: datetime(2025, 1, 1, tzinfo=timezone.utc))
    store.promote(restore_ensemble(hand_made_payload()).to_bytes(),
                  {"configuration": {"features": {"custom": ["hostile_module:range_4"]}}})
    if command == ["export"]:
        done = call("export", "--output", str(tmp_path / "x.onnx"))
        assert done.code == 1 and done.error == "FeatureError" and "hostile_module:range_4" in done.text and "declare" in done.text
    else:                                      # the model has no such column: the name alone is no reason to refuse it
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", *command])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert command_line.run_command(False) in (0, 1)
    assert not (tmp_path / "ran").exists() and "hostile_module" not in sys.modules


@pytest.mark.parametrize("configuration", [[], "x", {"features": []}, {"features": {"custom": "os:x"}}, {"features": {"custom": [1]}},
                                           {"features": {"custom": {"a": 1}}}], ids=repr)
def test_metadata_of_another_shape_are_a_named_error_or_name_nothing(store, configuration):
    store.promote(restore_ensemble(hand_made_payload()).to_bytes(), {"created_at": "2025-01-01T00:00:00Z"})
    path = store.production / "production_model_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"configuration": configuration, "data": []}))
    with warnings.catch_warnings(), contextlib.suppress(MLEnsembleError):
        warnings.simplefilter("ignore")                               # the archived copy serves instead
        assert load_with_custom(store=store).get_model_info()["version"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": {}}))
    with warnings.catch_warnings(), contextlib.suppress(MLEnsembleError):
        warnings.simplefilter("ignore")
        assert load_with_custom(store=store).get_model_info()["version"]


def test_an_undeclared_feature_is_named_with_those_that_are_declared(store):
    store.promote(restore_ensemble(hand_made_payload()).to_bytes(), {"configuration": {"features": {"custom": ["a:b"]}}})
    with pytest.raises(FeatureError, match=r"version .* was trained with the custom features 'a:b'; the configuration declares 'c:d'"):
        load_with_custom(store=store, custom=["c:d"])


@pytest.fixture
def shadowed(tmp_path):
    """A project in whose folder files have the names of modules; each leaves a marker if it runs."""
    folder = shadow_modules(tmp_path / "shadowed", tmp_path / "ran")
    simulate_market(300, seed=1)[0].to_csv(folder / "candles.csv")
    return folder


def command(folder, *words):
    """The installed command in this folder."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ML_ENSEMBLE_", "PYTHONPATH"))}
    program = Path(sys.executable).parent / "ml-ensemble"
    return subprocess.run([program, *words], cwd=folder, capture_output=True, text=True, timeout=240,
                          env=env | {"ML_ENSEMBLE_MODELS": str(folder.parent / "models")})


@pytest.mark.slow
def test_no_module_of_the_working_directory_runs(shadowed):
    store = ModelStore(shadowed.parent / "models")
    for _ in range(2):
        store.promote(restore_ensemble(hand_made_payload()).to_bytes(), {"created_at": "2025-01-01T00:00:00Z"})
    for words, code in ((["check"], 1), (["history"], 0), (["predict", "--source", "file:candles.csv"], 0), (["export"], 0),
                        (["candles", "candles.csv"], 0), (["rollback", "--reason", "x"], 0)):
        done = command(shadowed, *words)
        assert done.returncode == code, (words, done.stderr[-2000:])
    assert not (shadowed.parent / "ran").exists(), (shadowed.parent / "ran").read_text()


@pytest.mark.parametrize("words", [["export", "--output"], ["candles", "sandbox", "--to"], ["versions", "--plot"], ["keygen"]])
def test_no_output_goes_into_the_model_store(call, store, monkeypatch, words):
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(store.root))
    store.promote(restore_ensemble(hand_made_payload()).to_bytes(), {"created_at": "2025-01-01T00:00:00Z"})
    before = {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    for name in ("production/production_ensemble.pkl", "archive/new.csv", "archive/new.png"):
        if words[0] == "versions" and not name.endswith("png"):
            continue
        done = call(*words, str(store.root / name))
        assert done.code == 2 and "is in the model store" in done.text
    assert {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()} == before
