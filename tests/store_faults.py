"""Faults injected into promotions, rollbacks and backups of a store; run as a script it prints a table (`make faults`).

Each trial is a forked process that works on a copy of a small store. A fault strikes at one of its system calls, or a signal at
a random moment. Then a reader, the report of the process (if it lived to make one) and the next command are compared with what is
on the disk.
"""
import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ml_ensemble.core import StoreError
from ml_ensemble.versioning import ModelStore, read_pair

CALLS = ("write", "fsync", "replace", "link", "unlink", "mkdir", "open", "chmod", "fchmod", "rmdir")
FAULTS = ("exit", "SIGKILL", "SIGINT", "SIGTERM", "ENOSPC", "EIO")
OPERATIONS = {"promote": lambda store: store.promote(b"new" * 5000, {"note": "new"}, verify=lambda path: path.read_bytes()),
              "rollback": lambda store: store.rollback("a reason"), "backup": lambda store: store.backup()}


def new_store(root: Path) -> ModelStore:
    """A store of two versions, the second in production."""
    store = ModelStore(root)
    store.promote(b"first" * 3000, {})
    store.promote(b"second" * 3000, {})
    return store


class Injector:
    """Counts system calls, and lets a fault strike at one of them."""

    def __init__(self, fault: str | None, at: int):
        self.fault, self.at, self.count = fault, at, 0

    def strike(self) -> None:
        self.count += 1
        if self.count == self.at:
            if self.fault == "exit":
                os._exit(9)
            if self.fault in ("ENOSPC", "EIO"):
                number = getattr(errno, self.fault)
                raise OSError(number, os.strerror(number))
            os.kill(os.getpid(), getattr(signal, self.fault))

    def patch(self) -> None:
        """Replace the calls in `os`; the process is a fork and ends with the trial."""
        def wrapped(original):
            def call(*args, **kwargs):
                self.strike()
                return original(*args, **kwargs)
            return call

        def opened(*args, **kwargs):
            file = original_fdopen(*args, **kwargs)
            return Writer(file, self) if "r" not in args[1] else file
        original_fdopen, os.fdopen = os.fdopen, opened
        for name in CALLS[1:]:
            setattr(os, name, wrapped(getattr(os, name)))


class Writer:
    """A file whose writes may fail."""

    def __init__(self, file, injector: Injector):
        self.file, self.injector = file, injector

    def write(self, data: bytes):
        self.injector.strike()
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *fault):
        self.file.close()


def work(root: Path, operation: str, injector: Injector | None, report: int, repeat: int = 1) -> None:
    """What a trial's process does; it never returns."""
    warnings.simplefilter("ignore")
    for number in (signal.SIGTERM, signal.SIGINT):             # a job in the background may ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    store, outcome = ModelStore(root), "done"
    if injector:
        injector.patch()
    try:
        for _ in range(repeat):
            OPERATIONS[operation](store)
    except KeyboardInterrupt:
        outcome = "interrupted"
    except (OSError, StoreError):
        outcome = "error"
    except BaseException as error:
        outcome = f"unexpected {type(error).__name__}: {error}"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    said = {"outcome": outcome, "sequence": store.last_change and store.last_change["sequence"],
            "calls": injector.count if injector else 0}
    os.write(report, json.dumps(said).encode())
    os._exit(0)


def run_child(root: Path, operation: str, injector: Injector | None = None, *, repeat: int = 1, kill: tuple = ()) -> dict | None:
    """Run a trial's process, kill it with (signal, seconds) if given; what it reported, or None."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(root, operation, injector, writing, repeat)
        finally:
            os._exit(8)
    os.close(writing)
    if kill:
        time.sleep(kill[1])
        os.kill(child, kill[0])
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None


def judge(root: Path, said: dict | None, operation: str, fault: str) -> list[str]:
    """What is wrong after a trial: a reader, the report of the process, and the next command against the files."""
    store, wrong = ModelStore(root), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            facts, _ = store.read()
        except StoreError:
            return ["unreadable"]
        sequence = facts["sequence"]
        if said and said["outcome"].startswith("unexpected"):
            wrong.append(said["outcome"])
        if said and (said["sequence"] or 2) != sequence or said and said["outcome"] == "done" and \
                operation != "backup" and sequence == 2:
            wrong.append("told wrongly")
        if store.repair() and fault in ("SIGINT", "SIGTERM"):
            wrong.append("incomplete after an interrupt")
        try:
            if read_pair(store)[0]["sequence"] != sequence:
                wrong.append("changed by the repair")
        except StoreError:
            wrong.append("not intact after the next command")
        events = [event for event in store.history() if event["kind"] in ("promotion", "rollback")]
        if not set(store.versions()) <= {event["version"] for event in events} or \
                [event["sequence"] for event in events] != list(range(1, sequence + 1)):
            wrong.append("versions that never were in production")
        if [*root.rglob("*.tmp"), *(root / ".staging").glob("*")] or \
                len([*store.archive.glob("*.pkl")]) != len(store.versions()):
            wrong.append("files left")
        if store.promote(b"next", {})["sequence"] != sequence + 1 or store.read()[1] != b"next":
            wrong.append("next promotion failed")
    return wrong


def injected(template: Path, folder: Path, step: int = 1) -> Iterator[tuple[str, str, list[str]]]:
    """Every fault at every `step`-th call of every operation: operation, fault, and what was wrong."""
    for operation in OPERATIONS:
        calls = run_child(shutil.copytree(template, folder / f"count-{operation}"), operation, Injector(None, 0))["calls"]
        for number, fault in enumerate(FAULTS):
            for at in range(1 + number % step, calls + 1, step):
                root = shutil.copytree(template, folder / f"{operation}-{fault}-{at}")
                said = run_child(root, operation, Injector(fault, at))
                yield operation, fault, judge(root, said, operation, fault)
                shutil.rmtree(root)


def at_random(template: Path, folder: Path, name: str, count: int, seed: int = 1) -> Iterator[tuple[str, str, list[str]]]:
    """A signal at a random moment of promotions that follow each other: operation, signal, and what was wrong."""
    choose = random.Random(seed)
    for number in range(count):
        root = shutil.copytree(template, folder / f"{name}-{number}")
        said = run_child(root, "promote", repeat=1000, kill=(getattr(signal, name), choose.uniform(0.002, 0.08)))
        yield "promotions", f"{name} at random", judge(root, said, "promote", name)
        shutil.rmtree(root)


def main() -> int:
    """Run all trials and print the table; exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, default=1, help="inject at every n-th call only")
    parser.add_argument("--signals", type=int, default=300, help="signals of each kind at random moments")
    options, results = parser.parse_args(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = new_store(folder / "template").root
        trials = [injected(template, folder, options.step),
                  *(at_random(template, folder, kind, options.signals) for kind in ("SIGINT", "SIGTERM", "SIGKILL"))]
        for operation, fault, wrong in (trial for part in trials for trial in part):
            counts = results.setdefault((operation, fault), Counter())
            counts["trials"] += 1
            counts.update(wrong)
    print(f"{'operation':<12}{'fault':<20}{'trials':>7}  wrong")
    for (operation, fault), counts in results.items():
        wrong = ", ".join(f"{problem}: {n}" for problem, n in counts.items() if problem != "trials") or "0"
        print(f"{operation:<12}{fault:<20}{counts['trials']:>7}  {wrong}")
    total = sum(counts["trials"] for counts in results.values())
    failed = sum(sum(counts.values()) - counts["trials"] for counts in results.values())
    print(f"{total} trials, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
