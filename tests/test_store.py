"""The model store under faults, and model files that mean harm."""
import builtins
import contextlib
import copyreg
import io
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from datetime import datetime, timezone

import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import hand_made_payload
from ml_ensemble import core
from ml_ensemble.core import IntegrityError, LFSPointerError, MLEnsembleError, StoreError, UnsafeModelError, sha256_hex
from ml_ensemble.ensemble import ProductionEnsemble
from ml_ensemble.model_file import read_payload
from ml_ensemble.versioning import METADATA_FILE, MODEL_FILE, ModelStore, archived, remedy_for_damage

MODEL = bytes(range(256)) * 8


def contents(store: ModelStore) -> dict:
    files = (path for path in sorted(store.root.rglob("*")) if path.is_file() and path.name not in (".lock", ".lock_holder"))
    return {path.relative_to(store.root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_model_is_not_read_and_the_archive_serves(store, share):
    store.promote(MODEL, {})
    (store.production / MODEL_FILE).write_bytes(MODEL[:int(len(MODEL) * share)])
    with pytest.warns(RuntimeWarning, match="from the archive serves instead"):
        assert store.read()[1] == MODEL


@given(place=st.integers(0, len(MODEL) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_detected(tmp_path_factory, place, bit):
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


def test_an_lfs_pointer_is_reported_as_such(store):
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
@pytest.mark.parametrize("step", range(1, 16))
def test_a_full_disk_is_an_error_only_where_production_is_unchanged(store, step, monkeypatch):
    """Each sync fails in turn. Before the commit: an error, the old files. After it: the new version, and no error."""
    store.promote(MODEL, {})
    before, calls, whole = contents(store), 0, os.fsync

    def full(handle):
        nonlocal calls
        if not os.readlink(f"/proc/self/fd/{handle}").startswith(str(store.root)):
            return whole(handle)                           # a file of somebody else in this process
        calls += 1
        if calls == step:
            raise OSError(28, "No space left on device")
        return whole(handle)

    monkeypatch.setattr(os, "fsync", full)
    try:
        store.promote(MODEL[::-1], {})
        failed = False
    except OSError:
        failed = True
    monkeypatch.setattr(os, "fsync", whole)
    assert calls >= step and not list(store.root.rglob("*.tmp"))
    assert failed == (step <= 12) and store.current()["sequence"] == (1 if failed else 2)
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


def test_two_concurrent_promotions_never_share_a_number(tmp_path):
    script = ("import sys; from ml_ensemble.versioning import ModelStore\n"
              "for k in range(15): ModelStore(sys.argv[1]).promote(sys.argv[2].encode(), {})")
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name]) for name in "ab"]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [event["sequence"] for event in ModelStore(tmp_path).history()] == list(range(1, 31))


class Call:
    """Pickles as a call of `function(*args)`, and with `state` as one that sets it afterwards."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce_ex__(self, protocol):
        return self.call

    def __call__(self):
        """So that the answer of one call can be what the next one calls."""


class NewObject:
    """Pickles by NEWOBJ_EX: a class is called with arguments and keywords."""

    def __getnewargs_ex__(self):
        return (1,), {"b": 2}


class Text(str):
    """A text that is more than one."""


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


def name(module, name):
    """The instructions that look up a global."""
    text = b"".join(pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, name))
    return text + pickle.STACK_GLOBAL


def program(*parts):
    """A pickle from instructions."""
    return b"\x80\x05" + b"".join(parts) + pickle.STOP


def data(value):
    """The instructions that put plain data on the stack."""
    return pickle.dumps(value, protocol=5)[2:-1]


OURS = name("ml_ensemble.ensemble", "restore_ensemble")
GOOD = data(hand_made_payload())
CALL = pickle.TUPLE1 + pickle.REDUCE


def changed(**parts):
    """A complete model with some parts changed."""
    return program(OURS, data({**hand_made_payload(), **parts}), CALL)


def bomb(levels=40, width=9):
    """Lists of references to lists: small to write down, endless to walk through."""
    steps = [pickle.EMPTY_LIST + pickle.MEMOIZE]
    for level in range(levels):
        references = (pickle.BINGET + bytes([level])) * width
        steps.append(pickle.EMPTY_LIST + pickle.MEMOIZE + pickle.MARK + references + pickle.APPENDS)
    return b"".join(steps)


def mass(rows=40_000):
    """One row of 12 numbers, referred to 40,000 times."""
    row, references = data([1.0] * 12) + pickle.MEMOIZE, (pickle.BINGET + b"\0") * rows
    return pickle.EMPTY_LIST + row + pickle.APPEND + pickle.MARK + references + pickle.APPENDS


RUN = {     # these ask for code
    "os.system": lambda m: pickle.dumps(Call(os.system, f"touch {m}")),
    "os.system, old protocol": lambda m: pickle.dumps(Call(os.system, f"touch {m}"), protocol=0),
    "eval": lambda m: pickle.dumps(Call(eval, f"open({str(m)!r}, 'w')")),
    "exec": lambda m: pickle.dumps(Call(exec, f"open({str(m)!r}, 'w')")),
    "open": lambda m: pickle.dumps(Call(open, str(m), "w")),
    "subprocess": lambda m: pickle.dumps(Call(subprocess.call, ["touch", str(m)])),
    "subprocess.Popen": lambda m: pickle.dumps(Call(subprocess.Popen, ["touch", str(m)])),
    "getattr": lambda m: pickle.dumps(Call(getattr, "x", "upper")),
    "getattr chain": lambda m: pickle.dumps(Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {m}")),
    "__import__": lambda m: pickle.dumps(Call(builtins.__import__, "os")),
    "nested": lambda m: pickle.dumps({"format": 1, "canary": {"x": [Call(os.system, f"touch {m}")]}}),
    "in a complete model": lambda m: changed(weights={"by_hand": Call(os.system, f"touch {m}")}),
    "as an argument of ours": lambda m: program(OURS, data(Call(os.system, f"touch {m}")), CALL),
    "state on a nested object": lambda m: pickle.dumps([Call(dict, state={"x": Call(os.system, f"touch {m}")})]),
    "numpy": lambda m: pickle.dumps({"format": np.float64(1)}),
    "numpy array": lambda m: changed(canary={"features": np.ones((1, 12)), "probabilities": [[0.5, 0.5]]}),
    "numpy.load": lambda m: pickle.dumps(Call(np.load, str(m), None, True)),
    "pandas": lambda m: pickle.dumps(pd.Series([1])),
    "pandas.read_pickle": lambda m: pickle.dumps(Call(pd.read_pickle, str(m))),
    "our own open": lambda m: b"cml_ensemble.core\nwrite_atomic\n(V" + str(m).encode() + b"\nVx\ntR.",
    "our own class": lambda m: b"cml_ensemble.ensemble\nProductionEnsemble\n.",
    "our own module, another name": lambda m: program(name("ml_ensemble.ensemble", "load_file"), GOOD, CALL),
    "dotted": lambda m: b"\x80\x04\x8c\x14ml_ensemble.ensemble\x94\x8c\x0eio.open_code.x\x94\x93.",
    "dotted from our own name": lambda m: program(name("ml_ensemble.ensemble", "restore_ensemble.__globals__"), GOOD,
                                                  CALL),
    "dotted module": lambda m: program(name("ml_ensemble.ensemble.os", "system"), data("true"), CALL),
    "extension code": by_extension_code,
    "extension code, 2 and 4 bytes": lambda m: program(pickle.EXT2, b"\xf0\0", pickle.EXT4, b"\xf0\0\0\0"),
    "persistent id": persistent,
    "persistent id, old protocol": lambda m: b"Psecret\n.",
    "INST": lambda m: b"(Vtouch " + str(m).encode() + b"\nios\nsystem\n.",
    "OBJ": lambda m: program(pickle.MARK, OURS, GOOD, pickle.OBJ),
    "NEWOBJ": lambda m: program(OURS, pickle.EMPTY_TUPLE, pickle.NEWOBJ),
    "NEWOBJ_EX": lambda m: pickle.dumps(NewObject(), protocol=4),
    "BUILD on our own": lambda m: program(OURS, GOOD, CALL, data({"__class__": 1}), pickle.BUILD),
    "BUILD on our own name": lambda m: program(OURS, data({"__code__": 1}), pickle.BUILD, GOOD, CALL),
    "called twice": lambda m: program(OURS, OURS, GOOD, CALL, CALL),
    "called with two arguments": lambda m: program(OURS, GOOD, pickle.EMPTY_DICT, pickle.TUPLE2, pickle.REDUCE),
    "called with a text": lambda m: program(OURS, data("x"), CALL),
    "called with itself": lambda m: program(OURS, OURS, CALL),
    "called with a deep nest": lambda m: program(OURS, pickle.EMPTY_LIST * 50_000, pickle.APPEND * 49_999, CALL),
    "data is called": lambda m: program(data({"x": 1}), GOOD, CALL),
    "text subclass": lambda m: changed(fingerprint=Text(hand_made_payload()["fingerprint"])),
    "text subclass as a key": lambda m: changed(weights={Text("by_hand"): 1.0}),
    "a set": lambda m: changed(classes={0, 1}),
    "out-of-band buffer": lambda m: program(pickle.NEXT_BUFFER),
    "writable bytes": lambda m: program(pickle.BYTEARRAY8, b"\xff" * 8),
    "oversized memo": lambda m: program(pickle.EMPTY_DICT, pickle.LONG_BINPUT, b"\xff\xff\xff\x7f"),
    "huge integer": lambda m: program(pickle.LONG4, b"\xff\xff\xff\x7f"),
}
DAMAGED = {     # these are no model
    "truncated frame": lambda m: b"\x80\x05\x95\xff\x00\x00\x00\x00\x00\x00\x00}.",
    "truncated model": lambda m: program(OURS, GOOD, CALL)[:-40],
    "half a length": lambda m: b"\x80\x05" + pickle.BINBYTES8 + b"\xff" * 3,
    "huge bytes": lambda m: program(OURS, pickle.BINBYTES8, b"\xff" * 7 + b"\x3f", CALL),
    "huge text": lambda m: program(OURS, pickle.BINUNICODE8, b"\xff" * 7 + b"\x3f", CALL),
    "bytes of 4 GB": lambda m: program(OURS, pickle.BINBYTES, b"\xff" * 4, CALL),
    "text that is none": lambda m: program(OURS, pickle.SHORT_BINUNICODE, b"\x01\xff", CALL),
    "memo out of range": lambda m: b"\x80\x04j\xff\xff\xff\x7f.",
    "not a pickle": lambda m: b"GIF89a",
    "nothing": lambda m: b"",
    "a bare number": lambda m: pickle.dumps(7),
    "a bare dictionary": lambda m: pickle.dumps(hand_made_payload()),
    "a name and no call": lambda m: program(OURS),
    "endless": lambda m: b"(" * 10_000,
    "more steps than any model": lambda m: b"(" * 3_000_000,
    "deep nesting in a part": lambda m: program(OURS, pickle.EMPTY_DICT, data("format"), pickle.EMPTY_LIST * 50_000,
                                                pickle.APPEND * 49_999, pickle.SETITEM, CALL),
    "a list in itself": lambda m: program(OURS, pickle.EMPTY_DICT, data("format"), pickle.EMPTY_LIST, pickle.MEMOIZE,
                                          pickle.BINGET, b"\0", pickle.APPEND, pickle.SETITEM, CALL),
    "a list of lists of lists as a name": lambda m: program(bomb(), data("x"), pickle.STACK_GLOBAL),
    "a list of lists of lists as a key": lambda m: program(OURS, pickle.EMPTY_DICT, bomb(), data("x"), pickle.SETITEM,
                                                           CALL),
    "a part twice": lambda m: program(OURS, GOOD, pickle.MARK, data("format"), data(3), pickle.SETITEMS, CALL),
    "items below a mark": lambda m: program(OURS, pickle.EMPTY_DICT, data("a"), pickle.MARK, data(1), pickle.SETITEM,
                                            CALL),
    "items of a list": lambda m: program(OURS, pickle.EMPTY_LIST, data("a"), data(1), pickle.SETITEM, CALL),
    "elements of a dictionary": lambda m: program(OURS, pickle.EMPTY_DICT, data("a"), pickle.APPEND, CALL),
    "something behind it": lambda m: program(OURS, GOOD, CALL) + b"x",
    "two things": lambda m: program(OURS, GOOD, CALL, data(1)),
    "a mark left": lambda m: program(OURS, GOOD, CALL, pickle.MARK),
    "a part too many": lambda m: changed(more=1),
    "another format": lambda m: changed(format=2),
    "a text for a number": lambda m: changed(decision_threshold="0.5"),
    "truth for classes": lambda m: changed(classes=[0.0, 1.0]),
    "other classes": lambda m: changed(classes=[0, 2]),
    "a name twice": lambda m: changed(features=["close"] * 12),
    "a weight that is none": lambda m: changed(weights={"by_hand": float("nan")}),
    "an endless age": lambda m: changed(max_age_days=float("nan")),
    "an unknown calibration": lambda m: changed(calibration={"kind": "cubic"}),
    "a curve that turns back": lambda m: changed(calibration={"kind": "isotonic", "x": [0.5, 0.2], "y": [0.1, 0.2]}),
    "a range upside down": lambda m: changed(range={"low": [2.0] * 12, "high": [1.0] * 12, "margin": 1.0}),
    "a range too short": lambda m: changed(range={"low": [0.0] * 11, "high": [1.0] * 11, "margin": 1.0}),
    "no canaries": lambda m: changed(canary={"features": [], "probabilities": []}),
    "a canary too short": lambda m: changed(canary={"features": [[1.0] * 11], "probabilities": [[0.5, 0.5]]}),
    "canaries that refer to one list": lambda m: program(
        OURS, data({k: v for k, v in hand_made_payload().items() if k != "canary"}), data("canary"), pickle.EMPTY_DICT,
        pickle.MARK, data("features"), mass(), data("probabilities"), data([[0.5, 0.5]]), pickle.SETITEMS,
        pickle.SETITEM, CALL),
    "no graph": lambda m: changed(model=b"no graph"),
    "another graph": lambda m: changed(model=other_graph()),
}
HOSTILE = RUN | DAMAGED


def other_graph():
    """A sound graph that is no ensemble: other names, other shapes."""
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (make.make_tensor_value_info(name, kind, [None, 2]) for name in "xy")
    graph = make.make_graph([make.make_node("Identity", ["x"], ["y"])], "other", [x], [y])
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused_and_none_of_its_code_runs(store, tmp_path, name):
    marker = tmp_path / "ran"
    model = HOSTILE[name](marker)
    store.promote(model, {})                      # its hash is right: only the loader stands between it and the process
    refusal = UnsafeModelError if name in RUN else IntegrityError
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(refusal):
            ProductionEnsemble(store=store)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not marker.exists() and peak < 10 * len(model) + 20e6 and time.perf_counter() - start < 20


def test_the_hostile_models_are_hostile(tmp_path):
    """What they would do is done by Python's own unpickler: the refusals above refuse something."""
    for name in ("os.system", "os.system, old protocol", "eval", "open", "subprocess", "getattr chain", "nested",
                 "in a complete model", "as an argument of ours", "state on a nested object", "INST"):
        marker = tmp_path / name.replace(" ", "_").replace(",", "")
        with contextlib.suppress(Exception):
            pickle.loads(HOSTILE[name](marker))
        assert marker.exists(), name


def test_a_valid_model_is_read_as_pickle_would_read_it():
    payload = hand_made_payload()
    model = program(OURS, data(payload), CALL)
    assert read_payload(model) == payload
    ensemble = pickle.loads(model)
    assert read_payload(ensemble.to_bytes()) == payload and type(ensemble) is ProductionEnsemble
    big = {**payload, "weights": {f"learner {k}": k / 100 for k in range(300)},
           "calibration": {"kind": "isotonic", "x": [k / 500 for k in range(500)], "y": [k / 500 for k in range(500)]}}
    assert read_payload(program(OURS, data(big), CALL)) == big


def test_every_error_has_a_remedy():
    kinds = [kind for kind in vars(core).values() if isinstance(kind, type) and issubclass(kind, MLEnsembleError)]
    assert len(kinds) > 15
    for kind in kinds:
        assert str(kind("value 3 is above the limit 2", "Use 2.")) == "value 3 is above the limit 2. Use 2."


def test_damaged_metadata_after_a_rollback_does_not_restore_the_rejected_version(store):
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


def test_truncated_and_foreign_entries_in_the_history_are_skipped(store):
    store.promote(b"first", {})
    with open(store.archive / "history.jsonl", "a") as file:
        file.write('[1]\n{"sequence": 99}\n{"at": "2025-09-0')
    assert [event["kind"] for event in store.history()] == ["promotion"]
    assert store.promote(b"second", {})["sequence"] == 2
    assert [event["sequence"] for event in store.history()] == [1, 2]


@pytest.mark.parametrize("damage, remedy", [
    (lambda store, first, second: None, "check --repair"),
    (lambda store, first, second: archived(store, second)[0].unlink(), 'rollback --reason "damaged files"`'),
    (lambda store, first, second: (archived(store, second)[1].unlink(), (store.production / METADATA_FILE).write_text("{")),
     'rollback --reason "damaged files"`'),
    (lambda store, first, second: [archived(store, v)[0].unlink() for v in (first, second)], "ml-ensemble retrain"),
], ids=["one copy", "both copies", "metadata and the archived copy", "everything"])
def test_the_remedy_for_damaged_files_is_the_one_that_works(store, damage, remedy):
    first, second = (store.promote(model, {})["version"] for model in (MODEL, MODEL[::-1]))
    (store.production / MODEL_FILE).write_bytes(b"x")
    damage(store, first, second)
    assert remedy in remedy_for_damage(store)
    if "repair" in remedy:
        assert len(store.repair()) == 1 and store.read()[1] == MODEL[::-1]
    elif "rollback" in remedy:
        assert store.rollback("damaged files")["version"] == first
        assert store.read()[1] == MODEL == (store.production / MODEL_FILE).read_bytes()
    else:
        with pytest.raises(IntegrityError):
            store.read()
