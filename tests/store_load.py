"""Promotions by two processes while four others read: our store, two plain files, and MLflow's registry in files (`make bench`).

Prints a table; then the seconds of `ml-ensemble rollback` for a model of 7 MB, and those and the memory of reading a long history.
MLflow is no dependency: `--mlflow PYTHON` names an interpreter that has mlflow or mlflow-skinny.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

MODEL = os.urandom(1 << 20)


class OwnStore:
    """ModelStore: promotion, and a verified read."""

    def __init__(self, folder: Path):
        from ml_ensemble.versioning import ModelStore
        self.store = ModelStore(folder)

    def promote(self, model: bytes) -> int:
        return self.store.promote(model, {})["sequence"]

    def read(self) -> tuple[str, bytes]:
        metadata, model = self.store.read()
        return metadata["sha256"], model


class PlainFiles:
    """Model and metadata, each written in place, as a script would do it."""

    def __init__(self, folder: Path):
        self.model, self.facts = folder / "model.pkl", folder / "model.json"

    def promote(self, model: bytes) -> int:
        number = json.loads(self.facts.read_text())["number"] + 1 if self.facts.exists() else 1
        self.model.write_bytes(model)
        self.facts.write_text(json.dumps({"sha256": hashlib.sha256(model).hexdigest(), "number": number}))
        return number

    def read(self) -> tuple[str, bytes]:
        return json.loads(self.facts.read_text())["sha256"], self.model.read_bytes()


class MLflowFiles:
    """A registered model of MLflow in files: a version for each model, with its hash as a tag, and the alias `production`."""

    def __init__(self, folder: Path):
        os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
        from mlflow import MlflowClient
        self.folder, place = folder, (folder / "mlruns").as_uri()
        self.client = MlflowClient(tracking_uri=place, registry_uri=place)
        if not (folder / "mlruns" / "models").exists():
            self.client.create_registered_model("model")

    def promote(self, model: bytes) -> int:
        digest = hashlib.sha256(model).hexdigest()
        path = self.folder / f"{digest}.pkl"
        path.write_bytes(model)
        version = self.client.create_model_version("model", path.as_uri(), tags={"sha256": digest})
        self.client.set_registered_model_alias("model", "production", version.version)
        return int(version.version)

    def read(self) -> tuple[str, bytes]:
        version = self.client.get_model_version_by_alias("model", "production")
        return version.tags["sha256"], Path(version.source.removeprefix("file://")).read_bytes()


KINDS = {"ml_ensemble": OwnStore, "plain files": PlainFiles, "MLflow, files": MLflowFiles}


def promote(kind, folder: Path, count: int, number: int, queue) -> None:
    place, numbers, failed = kind(folder), [], 0
    for k in range(count):
        try:
            numbers.append(place.promote(MODEL + b"%d %d" % (number, k)))
        except Exception:
            failed += 1
    queue.put((numbers, failed))


def read(kind, folder: Path, stop, queue) -> None:
    place, seen = kind(folder), Counter()
    while not stop.is_set():
        try:
            expected, model = place.read()
            seen["whole" if hashlib.sha256(model).hexdigest() == expected else "torn"] += 1
        except Exception:
            seen["failed"] += 1
    queue.put(seen)


def under_load(name: str, promotions: int, promoters: int = 2, readers: int = 4) -> dict:
    """Counts of promotions and reads of one kind of store."""
    kind, context = KINDS[name], multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        kind(folder).promote(MODEL)
        done, seen, stop = context.Queue(), context.Queue(), context.Event()
        processes = [context.Process(target=read, args=(kind, folder, stop, seen)) for _ in range(readers)]
        processes += [context.Process(target=promote, args=(kind, folder, promotions // promoters, number, done))
                      for number in range(promoters)]
        start = time.perf_counter()
        for process in processes:
            process.start()
        results = [done.get() for _ in range(promoters)]
        took = time.perf_counter() - start
        stop.set()
        reads = sum((seen.get() for _ in range(readers)), Counter())
        for process in processes:
            process.join()
    numbers = [number for made, _ in results for number in made]
    return {"store": name, "promoted": len(numbers), "failed": sum(failed for _, failed in results),
            "numbers given twice": len(numbers) - len(set(numbers)),
            "gaps": max(numbers, default=1) - 1 - len(set(numbers)), "whole reads": reads["whole"],
            "torn reads": reads["torn"], "failed reads": reads["failed"], "seconds": round(took, 1)}


def large_model(trees: int) -> bytes:
    """A real model file; 1,750 trees of each learner make about 7 MB."""
    from ml_ensemble.base_learners import make_learners
    from ml_ensemble.config import load_settings
    from ml_ensemble.feature_manager import FeatureManager
    from ml_ensemble.labels import forward_return_labels
    from ml_ensemble.sandbox import simulate_market
    from ml_ensemble.training import fit_all, make_ensemble
    from ml_ensemble.walk_forward import make_training_set
    settings, candles = load_settings([f"n_estimators={trees}"]), simulate_market(6600)[0]
    data = make_training_set(FeatureManager(), candles, forward_return_labels(candles, classes=2), 2)
    learners = fit_all(data, make_learners(settings.learners.model_dump(), 1))
    return make_ensemble(data, learners, settings.ensemble.weights.model_dump(), 0.5).to_bytes()


def rollback_seconds(model: bytes, repeats: int) -> list[float]:
    """Seconds of rollbacks by the command, each with its verification in a fresh process."""
    from ml_ensemble.versioning import ModelStore
    with tempfile.TemporaryDirectory() as folder:
        store = ModelStore(folder)
        for _ in range(2):
            store.promote(model, {"created_at": store.clock().isoformat()})
        command = (Path(sys.executable).with_name("ml-ensemble"), "rollback", "--reason", "measured")
        times = []
        for number in range(repeats):
            start = time.perf_counter()
            subprocess.run([*command, "--to", store.versions()[number % 2]], env={**os.environ, "ML_ENSEMBLE_MODELS": folder},
                           check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    return times


HISTORY = """
import pathlib, re, sys, time
from ml_ensemble.versioning import ModelStore
store = ModelStore(sys.argv[1])
start = time.perf_counter()
events = store.history()
took = time.perf_counter() - start
print(len(events), took, int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1e3)
"""


def history_figures(lines: int) -> list[float]:
    """Lines, seconds and peak megabytes of a process that reads a long history of refusals."""
    from ml_ensemble.store_records import history_line
    with tempfile.TemporaryDirectory() as folder:
        path, previous = Path(folder) / "archive" / "history.jsonl", b""
        path.parent.mkdir()
        with path.open("wb") as file:
            for number in range(lines):
                event = {"at": "2025-09-01T00:00:00Z", "kind": "refusal", "version": "20250901-0001", "reason": f"skill {number}"}
                line = history_line(event, previous)
                file.write(line)
                previous = line.rstrip(b"\n")
        done = subprocess.run([sys.executable, "-c", HISTORY, folder], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--promotions", type=int, default=200)
    parser.add_argument("--mlflow", metavar="PYTHON", help="an interpreter that has mlflow or mlflow-skinny")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.only:
        print(json.dumps(under_load(words.only, words.promotions)))
        return
    rows = []
    for name in KINDS:
        python = words.mlflow if name.startswith("MLflow") else sys.executable
        if not python:
            print(f"{name}: not measured; pass --mlflow PYTHON")
            continue
        done = subprocess.run([python, __file__, "--only", name, "--promotions", str(words.promotions)], capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"store": name, "failed": done.stderr[-300:]})
    print(f"{words.promotions} promotions of 1 MB by two processes, four readers")
    for row in rows:
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    model = large_model(1750)
    times = rollback_seconds(model, 7)
    print(f"ml-ensemble rollback, {len(model) / 1e6:.1f} MB: median {sorted(times)[3]:.2f} s, slowest {max(times):.2f} s")
    lines, took, peak = history_figures(100_000)
    print(f"history of {lines:,.0f} lines: {took:.2f} s, peak memory of the process {peak:.0f} MB")


if __name__ == "__main__":
    main()
