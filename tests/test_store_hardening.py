"""The store as an attacker, a killed process or a clumsy copy leaves it: what serves, what is refused, what is repaired."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest

import retrain_faults
from conftest import TINY
from scratch import SLOWED

from ml_ensemble import retrain
from ml_ensemble.core import IntegrityError, ModelNotFoundError, StoreError
from ml_ensemble.monitoring import diagnose
from ml_ensemble.versioning import METADATA_FILE, MODEL_FILE, ModelStore, archived

MODEL = bytes(range(256)) * 8


def promoted(store: ModelStore, *models: bytes) -> list[str]:
    return [store.promote(model, {})["version"] for model in models]


def quiet_read(store: ModelStore) -> tuple[dict, bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return store.read()


def damage_production(store: ModelStore) -> None:
    version = store.current()["version"]
    for path in (store.production / MODEL_FILE, archived(store, version)[0]):
        path.write_bytes(b"damaged")


# --- "before" is what was in production before ------------------------------------------------------------------------


def test_a_rollback_does_not_bring_back_a_version_that_was_withdrawn(store):
    first, second, _ = promoted(store, b"first", b"second", b"third")
    assert store.rollback("lost money")["version"] == second
    promoted(store, b"fourth")
    assert store.previous() == second
    assert [store.rollback("again")["version"] for _ in range(2)] == [second, first]
    with pytest.raises(ModelNotFoundError, match="was in production before"):
        store.rollback("once more")


def test_the_fallback_of_a_damaged_version_is_the_one_that_was_in_production_before(store):
    _, second, _ = promoted(store, b"first", b"second", b"third")
    store.rollback("lost money")
    promoted(store, b"fourth")
    damage_production(store)
    with pytest.warns(RuntimeWarning, match=f"Version {second} from the archive serves"):
        assert store.read()[1] == b"second"


def test_a_version_named_in_a_rollback_is_followed_by_what_it_replaced(store):
    first, _, third = promoted(store, b"first", b"second", b"third")
    store.rollback("both are bad", first)
    fourth, = promoted(store, b"fourth")
    store.rollback("the third was right", third)
    assert store.previous() == fourth


@pytest.mark.parametrize("lose", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-30]),
                                  lambda path: path.write_text("")], ids=["deleted", "last line cut off", "emptied"])
def test_the_order_survives_the_loss_of_history(store, lose):
    _, second, _ = promoted(store, b"first", b"second", b"third")
    store.rollback("lost money")
    promoted(store, b"fourth")
    lose(store.archive / "history.jsonl")
    assert store.previous() == second


KILLED = """
import os, sys
from ml_ensemble.versioning import ModelStore
ModelStore(sys.argv[1]).promote(b"candidate", {}, verify=lambda path: os._exit(9))
"""


def test_a_candidate_whose_promotion_was_killed_never_serves_and_is_removed_by_the_next(store):
    first, second = promoted(store, b"first", b"second")
    assert subprocess.run([sys.executable, "-c", KILLED, str(store.root)]).returncode == 9
    assert (store.root / ".staging" / "promotion" / MODEL_FILE).read_bytes() == b"candidate"
    assert store.versions() == [first, second] and store.previous() == first
    damage_production(store)
    assert quiet_read(store)[1] == b"first"
    promoted(store, b"third")
    assert not (store.root / ".staging" / "promotion").exists()
    assert b"candidate" not in {path.read_bytes() for path in store.root.rglob("*.pkl")}


# --- faults at every step ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_fault_at_any_step_leaves_a_mixed_store_or_a_wrong_report():
    """A sample, in a process that is small and therefore quick to fork; `make faults` runs all of them."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("store_faults.py")), "--step", "11", "--signals", "8"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and " trials, 0 wrong" in done.stdout, done.stdout + done.stderr


def test_text_that_cannot_be_stored_is_found_before_anything_is_replaced(store):
    promoted(store, b"first", b"second")
    files = lambda: {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file() and path.name[:5] != ".lock"}
    before = files()
    for attempt in (lambda: store.rollback("bad \udcff"), lambda: store.rollback("x" * 1001), lambda: store.rollback("a\0b"),
                    lambda: store.promote(MODEL, {"note": "\ud800"}), lambda: store.promote(MODEL, {"x": float("nan")}),
                    lambda: store.promote(MODEL, {"data": []}), lambda: store.promote(MODEL, {"x": "y" * 5_000_000}),
                    lambda: store.promote(b"0" * (2**26 + 1), {})):
        with pytest.raises((StoreError, ValueError)):
            attempt()
        assert files() == before


def test_the_fields_that_identify_a_version_cannot_be_passed_in(store):
    facts = store.promote(MODEL, {"version": "19990101-0001", "sequence": 99, "sha256": "0" * 64, "event": {"kind": "x"}})
    assert facts["sequence"] == 1 and facts["event"]["kind"] == "promotion" and store.read()[1] == MODEL


# --- what is optional cannot stop what is essential -------------------------------------------------------------------


HISTORY = {
    "a directory": lambda path: path.mkdir(),
    "a named pipe": lambda path: os.mkfifo(path),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a million lines": lambda path: path.write_bytes(b'{"at": "2025-09-01T00:00:00Z", "kind": "note"}\n' * 10**6),
    "nested 100,000 deep": lambda path: path.write_bytes(b"[" * 100_000 + b"\n"),
    "a sparse file of 3 GB": lambda path: (path.touch(), os.truncate(path, 3 * 2**30)),
    "zeros without a line": lambda path: path.write_bytes(b"\0" * 2**20),
    "random bytes": lambda path: path.write_bytes(bytes(range(256)) * 4000),
    "a number of 10,000 digits": lambda path: path.write_bytes(b'{"at": 1, "sequence": ' + b"9" * 10_000 + b"}\n"),
}


@pytest.mark.untraced
@pytest.mark.filterwarnings("ignore:version .* is in production, but the history", "ignore:the store could not be repaired")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if "million" in kind else kind for kind in HISTORY])
def test_an_intact_pair_is_read_and_replaced_whatever_the_state_of_the_history(store, kind):
    promoted(store, b"first", b"second")
    (store.archive / "history.jsonl").unlink()
    HISTORY[kind](store.archive / "history.jsonl")
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read()[1] == b"second"                  # and without any warning
    assert isinstance(store.history(), list)
    assert store.promote(b"third", {})["sequence"] == 3 and store.rollback("works too")["sequence"] == 4
    assert store.read()[1] == b"second" and time.perf_counter() - start < 20


def test_what_is_in_training_and_reports_does_not_matter(store):
    promoted(store, b"first")
    (store.root / "training").symlink_to("/dev")
    (store.root / "reports").write_text("a file")
    assert store.read()[1] == b"first" and store.promote(b"second", {})["sequence"] == 2


FILES = {
    "a named pipe": lambda path, outside: os.mkfifo(path),
    "a directory": lambda path, outside: path.mkdir(),
    "a sparse file of 3 GB": lambda path, outside: (path.touch(), os.truncate(path, 3 * 2**30)),
    "a link to /dev/zero": lambda path, outside: path.symlink_to("/dev/zero"),
    "a link out of the store": lambda path, outside: path.symlink_to(outside),
    "a link to itself": lambda path, outside: path.symlink_to(path),
    "nothing": lambda path, outside: None,
}


@pytest.mark.filterwarnings("ignore:production/.* is not in the backup")
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", [MODEL_FILE, METADATA_FILE])
def test_only_regular_files_of_limited_size_inside_the_store_are_opened(store, tmp_path, name, kind):
    promoted(store, b"first", b"second")
    path = store.production / name
    outside = shutil.copy(path, tmp_path / "outside")            # what the link names is intact, but not ours
    path.unlink()
    FILES[kind](path, outside)
    start = time.perf_counter()
    with pytest.warns(RuntimeWarning, match="from the archive serves instead"):
        assert store.read()[1] == b"second"
    assert store.promote(b"third", {})["version"] and store.read()[1] == b"third"
    displaced = list(store.root.glob("displaced_*"))             # not deleted: somebody may have made it on purpose
    assert len(displaced) == (kind in ("a named pipe", "a directory"))
    assert Path(outside).read_bytes() != b"third" and time.perf_counter() - start < 10


def test_a_folder_that_is_a_link_out_of_the_store_is_refused(store, tmp_path):
    promoted(store, b"first")
    shutil.move(store.production, tmp_path / "elsewhere")
    store.production.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="outside"):
        assert store.read()[1] == b"first"
    before = (tmp_path / "elsewhere" / MODEL_FILE).read_bytes()
    with pytest.raises(StoreError, match="outside the store"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.promote(b"second", {})
    assert (tmp_path / "elsewhere" / MODEL_FILE).read_bytes() == before


# --- metadata and history, field by field -----------------------------------------------------------------------------


NOT_A_TIME = [5, "", "soon", "0001-01-01", "0999-12-31T00:00:00", "9999-12-31", "2025-13-45", "2025-01-01" * 99, None, []]
NOT_AN_OBJECT = [None, [], "x", 7, True]
NOT_A_TEXT = [None, 7, [], {}, True]
MALFORMED = {
    "version": ["../x", "/etc/passwd", "%2e%2e", "20250901", "20250901-" + "9" * 400, "٢٠٢٥٠٩٠١-٠٠٠١", 7, None, []],
    "sequence": [0, -1, 10**300, 1.5, 1e300, True, "1", None, []],
    "sha256": ["", "0" * 63, "g" * 64, "0" * 65, 7, None, []],
    "size_bytes": [-1, 1e9, "9", None, True],
    "created_at": NOT_A_TIME,
    "event": NOT_AN_OBJECT, "data": NOT_AN_OBJECT, "metrics": NOT_AN_OBJECT, "configuration": NOT_AN_OBJECT, "gate": NOT_AN_OBJECT,
    "report": NOT_AN_OBJECT, "artefact": NOT_AN_OBJECT, "backtest": NOT_AN_OBJECT, "skill_sources": NOT_AN_OBJECT,
    "event.at": NOT_A_TIME, "event.replaced": ["../x", 7, []], "event.kind": ["", "a b", 7, "x" * 99], "event.reason": NOT_A_TEXT,
    "data.to": NOT_A_TIME, "data.from": NOT_A_TIME, "data.source": NOT_A_TEXT, "data.market": NOT_A_TEXT,
    "data.interval_minutes": [1e300, 0, -4, "240", None, True], "data.bars": [-1, 1.5, "9", None],
    "data.simulated": [1, "true", None], "data.notes": [None, "x", [7], ["x"] * 2000],
    "configuration.features": NOT_AN_OBJECT, "configuration.features.custom": [None, "os:system", [7], ["x"] * 2000],
    "metrics.metrics": [None, [], {"skill": "high"}, {"skill": []}],
    "metrics.intervals": [{"skill": 1}, {"skill": [1]}, {"skill": ["a", "b"]}],
    "features": [None, "close", [7]], "weights": [None, [], {"a": -1}, {"a": "1"}], "classes": [None, [0, 2], [0.5], "01"],
    "decision_threshold": [-0.1, 1.1, "0.5", None, True], "fingerprint": NOT_A_TEXT, "packages": [None, {"numpy": 2}],
}
RAW = {"empty": b"", "truncated": b'{"version": "2025', "not an object": b"[1]", "null": b"null", "a NUL": b"\0",
       "not UTF-8": b"\xff\xfe{}",
       "NaN": b'{"x": NaN}', "infinity by size": b'{"x": 1e999}', "a key twice": b'{"x": 1, "x": 2}',
       "nested 100,000 deep": b"[" * 100_000, "lone surrogate": b'{"x": "\\ud800"}', "10,000 digits": b'{"x": ' + b"1" * 10_000 + b"}",
       "5 MB": b'{"x": "' + b"y" * 5_000_000 + b'"}'}
CASES = {**{f"{field} {number}": (field, value) for field, values in MALFORMED.items() for number, value in enumerate(values)},
         **{f"raw: {name}": (None, content) for name, content in RAW.items()}}


def with_field(record: dict, field: str, value) -> dict:
    name, _, rest = field.partition(".")
    return {**record, name: with_field(record.get(name, {}), rest, value) if rest else value}


def test_malformed_metadata_is_a_named_error_and_the_archived_copy_serves(store):
    assert len(CASES) > 180
    store.promote(MODEL, {"created_at": "2025-09-01T00:00:00Z"})
    sound = store.current()
    tracemalloc.start()
    for name, (field, value) in CASES.items():
        content = value if field is None else json.dumps(with_field(sound, field, value)).encode()
        (store.production / METADATA_FILE).write_bytes(content)
        start = time.process_time()
        with pytest.raises(IntegrityError) as caught:
            store.current()
        assert len(str(caught.value)) < 3000 and (field is None or field.split(".")[0] in caught.value.problem), name
        assert quiet_read(store)[1] == MODEL, name
        assert time.process_time() - start < 2 * SLOWED, name
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()


def test_malformed_history_lines_are_skipped_and_reported(store):
    promoted(store, b"first")
    path, line = store.archive / "history.jsonl", (store.archive / "history.jsonl").read_bytes()
    event = json.loads(line)
    wrong = [*RAW.values(), *(json.dumps({**event, "at": value}).encode() for value in NOT_A_TIME),
             *(json.dumps({**event, field: value}).encode() for field, values in (
                 ("kind", ["", 7, None, "x" * 99]), ("sequence", [10**300, "1", True, 0]), ("version", ["../x", 7]),
                 ("replaced", ["../x", []]), ("reason", [7, "x" * 9999])) for value in values)]
    path.write_bytes(line + b"\n".join(text for text in wrong if text.strip()) + b"\n" + line)
    assert [event["sequence"] for event in store.history()] == [1, 1]
    report = {finding.part: finding for finding in diagnose(store).findings}["history"]
    assert report.status == "warning" and f"{len(wrong) - 1} that cannot be read" in report.seen and len(report.seen) < 1000


# --- permissions, policy, repair --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o077, 0o000, 0o027])
def test_what_a_trading_process_reads_is_readable_under_any_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        store = ModelStore(tmp_path / "deep" / "models")
        promoted(store, b"first", b"second")
        store.rollback("x")
        store.backup()
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in store.root.rglob("*") if path.name not in (".lock", ".lock_holder", ".staging")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755} == {store.root.stat().st_mode & 0o777}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o644}


def test_nothing_piles_up_and_what_is_needed_is_kept(tmp_path):
    store = ModelStore(tmp_path, keep_versions=5, keep_backups=3)
    first, = promoted(store, b"model 0")
    promoted(store, *(f"model {number}".encode() for number in range(1, 30)))
    store.rollback("back to an old one", store.versions()[0])
    kept = store.versions()
    promoted(store, *(f"model {number}".encode() for number in range(30, 38)))
    assert first not in kept and len(kept) == 5 and len(store.versions()) <= 6 and len(list(tmp_path.glob("production_backup_*"))) == 3
    assert len(list(store.archive.iterdir())) == 2 * len(store.versions()) + 1
    before = store.previous()
    assert before in store.versions() and store.rollback("still works")["version"] == before


def test_repair_is_idempotent_and_does_not_change_the_version(store):
    promoted(store, b"first", b"second")
    version = store.current()["version"]
    (store.production / MODEL_FILE).write_bytes(b"first")                       # as a rollback that was cut off leaves it
    (store.archive / "history.jsonl").write_text("")
    (store.archive / f"production_model_metadata_{version}.json").unlink()
    archived(store, version)[0].write_bytes(b"second")
    (store.production / f".{MODEL_FILE}.12345678.tmp").write_bytes(b"half")
    done = store.repair()
    assert len(done) >= 2 and store.repair() == [] and store.current()["version"] == version
    assert not list(store.root.rglob("*.tmp")) and store.history()[-1]["version"] == version


def test_repair_restores_damaged_metadata_after_a_rollback_with_its_sequence(store):
    promoted(store, b"first", b"second")
    facts = store.rollback("lost money")
    (store.production / METADATA_FILE).write_text("{")
    assert "restored the files" in store.repair()[0]
    assert store.current() == facts and store.read()[1] == b"first"


def test_repair_never_decides_for_an_older_version(store):
    promoted(store, b"first", b"second")
    damage_production(store)
    assert store.repair() == [] and store.current()["sequence"] == 2
    with pytest.warns(RuntimeWarning):
        assert store.read()[1] == b"first"


def test_the_lock_can_be_held_around_several_changes(store):
    with store.locked():
        promoted(store, b"first", b"second")
        store.rollback("x")
    assert store.current()["sequence"] == 3


def test_an_older_pair_put_back_by_hand_is_a_fault_also_without_signatures(store):
    promoted(store, b"first", b"second")
    store.rollback("lost money")
    assert not [finding for finding in diagnose(store).findings if finding.part == "order"]
    shutil.copy(archived(store, store.versions()[-1])[1], store.production / METADATA_FILE)
    shutil.copy(archived(store, store.versions()[-1])[0], store.production / MODEL_FILE)
    fault = next(finding for finding in diagnose(store).findings if finding.part == "order")
    assert fault.status == "fault" and "the rollback 3 to version" in fault.seen and fault.seen in store.verify()


def test_what_is_in_the_place_of_the_lock_is_named(store):
    promoted(store, b"first")
    lock = store.root / ".lock"
    for place, remove in ((os.mkdir, os.rmdir), (os.mkfifo, os.unlink)):
        lock.unlink(missing_ok=True)
        place(lock)
        assert next(finding for finding in diagnose(store).findings if finding.part == "lock").status == "fault"
        with pytest.raises(StoreError, match="not a regular file"):
            store.rollback("x")
        remove(lock)


def test_damage_of_the_archive_is_a_warning_of_the_diagnosis(store):
    promoted(store, b"first", b"second")
    archived(store, store.versions()[0])[0].write_bytes(b"x")
    finding = next(finding for finding in diagnose(store).findings if finding.part == "store")
    assert finding.status == "warning" and "1 faults, the first: archive/" in finding.seen


@pytest.mark.slow
def test_a_retrain_killed_half_way_leaves_production_and_the_next_one_succeeds(trained, tmp_path, in_this_process):
    """`make faults` kills twenty, at random moments, with their kernel and without it."""
    models = Path(shutil.copytree(trained[0].root, tmp_path / "models"))
    before = ModelStore(models)
    versions = set(before.versions())
    code, _ = retrain_faults.retrain(models, 4.0)
    assert code == -signal.SIGKILL and retrain_faults.judge(models, versions) == []
    retrain("sandbox", overrides=TINY, store=before, force=True, show_progress=False)           # promoted or refused, but no error
    assert retrain_faults.judge_next(models, 0, "", 0, before.current()["metrics"]) == []
