"""A retrain killed by SIGKILL at random moments; run as a script it prints a table (`make faults`).

After each kill production has to load, as the old version or the new one. The next retrain has to succeed without help, with the
figures of a retrain that was never killed, and to leave nothing behind but what that one leaves.
"""
import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import TINY
from scratch import clean_environment

from ml_ensemble.ensemble import ProductionEnsemble
from ml_ensemble.versioning import ModelStore

COMMAND = (Path(sys.executable).with_name("ml-ensemble"), "retrain", "--source", "sandbox", "--force",
           *(word for setting in TINY for word in ("--set", setting)))
# What a store consists of, README.md, "Files".
KNOWN = (r"production/production_(ensemble\.pkl|model_metadata\.json)|archive/production_(ensemble|model_metadata)_\d{8}-\d{4}\.(pkl|json)|"
         r"archive/(history\.jsonl|pinned\.json)|training/.*|reports/[^/]*\.(ipynb|html|json)|"
         r"production_backup_[0-9TZ-]+/production_(ensemble\.pkl|model_metadata\.json)|\.lock|\.lock_holder")


def retrain(models: Path, kill_after: float | None = None, whole_group: bool = False) -> tuple[int, str]:
    """Run the command, to its end or until it is killed; returns its code and what it printed on standard error.

    `whole_group` kills its kernel as well, as a machine that stops does; else the kernel finds itself without a parent.
    """
    process = subprocess.Popen(COMMAND, cwd=models.parent, env=clean_environment(ML_ENSEMBLE_MODELS=str(models)), text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.stderr.close()
        process.wait()
        errors = ""
    return process.returncode, errors


def judge(models: Path, versions_before: set[str]) -> list[str]:
    """What is wrong with a store after a kill: sentences."""
    store = ModelStore(models)
    try:
        ProductionEnsemble(store=store)                       # it repeats its stored predictions, or raises an error
    except Exception as error:
        return [f"production does not load: {type(error).__name__}: {error}"]
    version = store.current()["version"]
    known = versions_before | set(store.versions())
    return [] if version in known else [f"version {version} in production is neither an old nor a new one"]


def judge_next(models: Path, code: int, errors: str, sequence: int, undisturbed: dict) -> list[str]:
    """What is wrong after the next retrain."""
    store = ModelStore(models)
    files = [str(path.relative_to(models)) for path in models.rglob("*") if not path.is_dir()]
    unknown = [name for name in files if not re.fullmatch(KNOWN, name)]
    folders = [path.name for path in (models / ".staging").glob("*")]
    return [text for text in (
        f"the next retrain ended with {code}: {errors[-300:]}" if code else "",
        "the figures are not those of an undisturbed retrain" if store.current()["metrics"] != undisturbed else "",
        f"the sequence is {store.current()['sequence']} after {sequence}" if store.current()["sequence"] <= sequence else "",
        f"left behind: {', '.join(unknown + folders)}" if unknown + folders else "", *store.verify()) if text]


def trials(models: Path, count: int, seed: int):
    """Kill `count` retrains, each at a random moment of its whole length; yields moment, kind and what was wrong."""
    rng, start = random.Random(seed), time.monotonic()
    code, errors = retrain(models)
    assert code == 0, errors
    length, undisturbed = time.monotonic() - start, ModelStore(models).current()["metrics"]
    for number in range(count):
        moment, group = rng.uniform(0, length), bool(number % 2)
        store = ModelStore(models)
        before, sequence = set(store.versions()), store.current()["sequence"]
        killed, _ = retrain(models, moment, group)
        wrong = judge(models, before)
        committed = ModelStore(models).current()["sequence"]
        wrong += judge_next(models, *retrain(models), committed, undisturbed)
        kind = ("ended before" if killed == 0 else "command and kernel killed" if group else "command killed") + \
            (", committed" if killed and committed > sequence else "")
        yield moment, kind, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    words = parser.parse_args()
    kinds, faults = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for moment, kind, wrong in trials(Path(folder) / "models", words.count, words.seed):
            kinds[kind] += 1
            faults += [f"{kind} after {moment:.2f} s: {text}" for text in wrong]
            print(f"  {moment:6.2f} s  {kind:<40} {'; '.join(wrong) or 'ok'}", flush=True)
    print(f"{sum(kinds.values())} retrains ({', '.join(f'{number} {kind}' for kind, number in kinds.items())}): {len(faults)} wrong")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
