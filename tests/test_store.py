"""The model store under faults, and model files that mean harm."""
import builtins
import copyreg
import io
import os
import pickle
import subprocess
import sys
from datetime import datetime, timezone

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_ensemble import core
from ml_ensemble.core import IntegrityError, LFSPointerError, MLEnsembleError, StoreError, UnsafeModelError, sha256_hex
from ml_ensemble.ensemble import ProductionEnsemble, read_payload
from ml_ensemble.versioning import METADATA_FILE, MODEL_FILE, ModelStore, archived

MODEL = bytes(range(256)) * 8


def contents(store: ModelStore) -> dict:
    files = (path for path in sorted(store.root.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(store.root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_model_is_not_read_and_the_archive_serves(store, share):
    store.promote(MODEL, {})
    (store.production / MODEL_FILE).write_bytes(MODEL[:int(len(MODEL) * share)])
    with pytest.warns(RuntimeWarning, match="from the archive serves instead"):
        assert store.read()[1] == MODEL


@given(place=st.integers(0, len(MODEL) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path_factory, place, bit):
    store = ModelStore(tmp_path_factory.mktemp("store"))
    store.promote(MODEL, {})
    damaged = bytearray(MODEL)
    damaged[place] ^= 1 << bit
    for path in (store.production / MODEL_FILE, *store.archive.glob("*.pkl")):
        path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="its metadata recorded"):
        store.read()


def test_the_version_before_serves_when_both_copies_are_damaged(store):
    store.promote(MODEL, {})
    newest = store.promote(MODEL[::-1], {})["version"]
    (store.production / MODEL_FILE).write_bytes(b"x")
    (store.archive / f"production_ensemble_{newest}.pkl").unlink()
    with pytest.warns(RuntimeWarning):
        facts, model = store.read()
    assert model == MODEL and facts["version"] != newest


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}',
                                  '{"version": "20250901-0001", "sequence": 1, "sha256": NaN}',
                                  '{"version": "../x", "sequence": 1, "sha256": "0"}', "\x00"])
def test_damaged_metadata_is_a_named_error_and_the_last_good_version_serves(store, text):
    store.promote(MODEL, {})
    (store.production / METADATA_FILE).write_text(text)
    with pytest.raises(StoreError):
        store.current()
    if '"../x"' not in text:
        with pytest.warns(RuntimeWarning):
            assert store.read()[1] == MODEL
    assert store.promote(MODEL[::-1], {})["sequence"] == 2          # and the next promotion repairs it
    assert store.read()[1] == MODEL[::-1]


def test_an_lfs_pointer_is_called_by_its_name(store):
    store.promote(MODEL, {})
    for path in (store.production / MODEL_FILE, *store.archive.glob("*.pkl")):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(LFSPointerError, match="git lfs pull"):
        store.read()


CRASH = """
import os, sys
from ml_ensemble import core, versioning
from ml_ensemble.versioning import ModelStore
limit, calls = int(sys.argv[2]), 0
def crash_at(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == limit:
            os._exit(9)
        return function(*args, **kwargs)
    return wrapped
for name in ("fsync", "replace"):
    setattr(os, name, crash_at(getattr(os, name)))
ModelStore(sys.argv[1]).promote(b"new" * 500, {})
"""


def test_a_crash_at_any_sync_or_rename_leaves_the_old_or_the_new_version(tmp_path):
    """`os._exit` at each step in turn: a fresh reader sees one whole version, and the next promotion works."""
    outcomes = set()
    for step in range(1, 40):
        store = ModelStore(tmp_path / str(step))
        store.promote(b"old" * 500, {})
        code = subprocess.run([sys.executable, "-c", CRASH, str(store.root), str(step)]).returncode
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")       # the archive may have to step in, which is its purpose
            facts, model = store.read()
        assert model in (b"old" * 500, b"new" * 500) and sha256_hex(model) == facts["sha256"]
        outcomes.add(model[:3])
        assert store.promote(b"next", {})["sequence"] in (2, 3)
        assert store.read()[1] == b"next"
        if code == 0:
            break
    assert code == 0 and outcomes == {b"old", b"new"}


@pytest.mark.filterwarnings("ignore:version .* is in production, but")
@pytest.mark.parametrize("step", range(1, 15))
def test_a_full_disk_is_an_error_only_where_production_is_unchanged(store, step, monkeypatch):
    """Each sync fails in turn. Before the commit: an error, the old files. After it: the new version, and no error."""
    store.promote(MODEL, {})
    before, calls, whole = contents(store), 0, os.fsync

    def full(handle):
        nonlocal calls
        calls += 1
        if calls == step:
            raise OSError(28, "No space left on device")
        whole(handle)

    monkeypatch.setattr(os, "fsync", full)
    try:
        store.promote(MODEL[::-1], {})
        failed = False
    except OSError:
        failed = True
    monkeypatch.setattr(os, "fsync", whole)
    assert calls >= step and not list(store.root.rglob("*.tmp"))
    assert failed == (step <= 11) and store.current()["sequence"] == (1 if failed else 2)
    assert store.read()[1] == (MODEL if failed else MODEL[::-1])
    if failed:
        kept = {name: data for name, data in contents(store).items() if not name.startswith("production_backup_")}
        assert kept == before
    assert store.promote(b"again", {})["sequence"] == (2 if failed else 3)


def test_order_does_not_depend_on_the_clock(tmp_path):
    moments = iter(range(10**9, 0, -10**6))
    store = ModelStore(tmp_path, clock=lambda: datetime.fromtimestamp(next(moments), timezone.utc))
    made = [store.promote(bytes([k]), {})["version"] for k in range(5)]
    assert store.versions() == made and [e["sequence"] for e in store.history()] == [1, 2, 3, 4, 5]
    assert store.rollback("clock")["version"] == made[3]


@pytest.mark.parametrize("version", ["../x", "/etc/passwd", "%2e%2e", "20250901-0001/../../x", "", "20250901-1\n"])
def test_a_version_that_is_a_path_is_refused(store, version):
    store.promote(MODEL, {})
    with pytest.raises(StoreError):
        store.read(version)
    with pytest.raises(StoreError):
        archived(store, version)


def test_two_promoters_never_share_a_number(tmp_path):
    script = ("import sys; from ml_ensemble.versioning import ModelStore\n"
              "for k in range(15): ModelStore(sys.argv[1]).promote(sys.argv[2].encode(), {})")
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name]) for name in "ab"]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [event["sequence"] for event in ModelStore(tmp_path).history()] == list(range(1, 31))


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def persistent(marker):
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return "secret" if isinstance(thing, set) else None
    buffer = io.BytesIO()
    Pickler(buffer).dump({"format": {1}})
    return buffer.getvalue()


def by_extension_code(marker):
    copyreg.add_extension("os", "system", 240)
    try:
        return pickle.dumps(Call(os.system, f"touch {marker}"), protocol=2)
    finally:
        copyreg.remove_extension("os", "system", 240)


HOSTILE = {
    "os.system": lambda m: pickle.dumps(Call(os.system, f"touch {m}")),
    "eval": lambda m: pickle.dumps(Call(eval, f"open({str(m)!r}, 'w')")),
    "exec": lambda m: pickle.dumps(Call(exec, f"open({str(m)!r}, 'w')")),
    "open": lambda m: pickle.dumps(Call(open, str(m), "w")),
    "subprocess": lambda m: pickle.dumps(Call(subprocess.call, ["touch", str(m)])),
    "getattr": lambda m: pickle.dumps(Call(getattr, "x", "upper")),
    "__import__": lambda m: pickle.dumps(Call(builtins.__import__, "os")),
    "nested": lambda m: pickle.dumps({"format": 1, "canary": {"x": [Call(os.system, f"touch {m}")]}}),
    "numpy": lambda m: pickle.dumps({"format": np.float64(1)}),
    "pandas": lambda m: pickle.dumps(pd.Series([1])),
    "our own open": lambda m: b"cml_ensemble.core\nwrite_atomic\n(V" + str(m).encode() + b"\nVx\ntR.",
    "our own class": lambda m: b"cml_ensemble.ensemble\nProductionEnsemble\n.",
    "dotted": lambda m: b"\x80\x04\x8c\x14ml_ensemble.ensemble\x94\x8c\x0eio.open_code.x\x94\x93.",
    "extension code": by_extension_code,
    "persistent id": persistent,
    "truncated frame": lambda m: b"\x80\x05\x95\xff\x00\x00\x00\x00\x00\x00\x00}.",
    "memo out of range": lambda m: b"\x80\x04j\xff\xff\xff\x7f.",
    "not a pickle": lambda m: b"GIF89a",
    "a bare number": lambda m: pickle.dumps(7),
    "endless": lambda m: b"(" * 10_000,
}


NO_PICKLE = {"truncated frame", "memo out of range", "not a pickle", "a bare number", "endless"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused_and_nothing_of_it_runs(store, tmp_path, name):
    marker = tmp_path / "ran"
    model = HOSTILE[name](marker)
    store.promote(model, {})                      # its hash is right: only the loader stands between it and the process
    refusal = IntegrityError if name in NO_PICKLE else UnsafeModelError
    with pytest.raises(refusal):
        ProductionEnsemble(store=store)
    with pytest.raises(refusal):
        read_payload(model)
    assert not marker.exists()


def test_every_error_says_what_to_do():
    kinds = [kind for kind in vars(core).values() if isinstance(kind, type) and issubclass(kind, MLEnsembleError)]
    assert len(kinds) > 15
    for kind in kinds:
        assert str(kind("value 3 is above the limit 2", "Use 2.")) == "value 3 is above the limit 2. Use 2."


def test_damaged_metadata_after_a_rollback_does_not_bring_back_what_was_rolled_back(store):
    first = store.promote(b"good", {})["version"]
    store.promote(b"bad", {})
    store.rollback("it lost money")
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(store.production / METADATA_FILE)
        with pytest.warns(RuntimeWarning, match=f"Version {first} from the archive serves"):
            assert store.read()[1] == b"good"
    (store.archive / "history.jsonl").unlink()
    with pytest.raises(StoreError):           # nobody knows any more what was in production: nothing serves
        store.read()


def test_an_archived_version_is_never_overwritten(store):
    first = store.promote(b"first", {})["version"]
    (store.production / METADATA_FILE).write_text("{")
    (store.archive / "history.jsonl").unlink()
    assert store.promote(b"second", {})["sequence"] == 2
    assert store.read(first)[1] == b"first"


def test_a_stump_or_a_stranger_in_the_history_is_passed_over(store):
    store.promote(b"first", {})
    with open(store.archive / "history.jsonl", "a") as file:
        file.write('[1]\n{"sequence": 99}\n{"at": "2025-09-0')
    assert [event["kind"] for event in store.history()] == ["promotion"]
    assert store.promote(b"second", {})["sequence"] == 2
    assert [event["sequence"] for event in store.history()] == [1, 2]


def test_the_remedy_for_a_damaged_model_works_as_it_is_written(store):
    version = store.promote(MODEL, {})["version"]
    (store.production / MODEL_FILE).write_bytes(b"x")
    with pytest.warns(RuntimeWarning, match=f'rollback --reason "damaged file" --to {version}'):
        store.read()
    store.rollback("damaged file", version)
    assert store.read()[1] == MODEL and (store.production / MODEL_FILE).read_bytes() == MODEL
