"""Promotions by two processes while four others read: our store, two plain files, and MLflow's registry in files (`make bench`).

Prints a table; then the seconds of `ml-ensemble rollback` for a model of 7 MB, and those and the memory of reading a long history.
MLflow is no dependency: `--mlflow PYTHON` names an interpreter that has mlflow or mlflow-skinny.
"""
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


def rollback_seconds(megabytes: int) -> list[float]:
    """Seconds of three rollbacks by the command; the model is padded to the size, so that it loads as a real one does."""
    from conftest import hand_made_payload
    from ml_ensemble.ensemble import restore_ensemble
    from ml_ensemble.versioning import ModelStore
    with tempfile.TemporaryDirectory() as folder:
        store = ModelStore(folder)
        for threshold in (0.5, 0.6):
            payload = hand_made_payload() | {"decision_threshold": threshold}
            model = restore_ensemble(payload).to_bytes()
            model = restore_ensemble(payload | {"padding": os.urandom(megabytes * 10**6 - len(model))}).to_bytes() \
                if "padding" in payload else model
            store.promote(model, {"created_at": store.clock().isoformat()})
        command = (Path(sys.executable).with_name("ml-ensemble"), "rollback", "--reason", "measured")
        times = []
        for version in [*store.versions(), store.versions()[0]]:
            start = time.perf_counter()
            subprocess.run([*command, "--to", version], env={**os.environ, "ML_ENSEMBLE_MODELS": folder}, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    return times
