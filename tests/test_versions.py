"""Versions over their life: staged, pinned, pruned, restored, signed, replayed, copied; and what a reader accepts."""
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
import warnings
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from conftest import hand_made_payload
from ml_ensemble.core import (ChangedMeaningError, ConfigError, IntegrityError, ModelNotFoundError, SignatureError, StaleStoreError,
                              StoreError)
from ml_ensemble.ensemble import ProductionEnsemble, restore_ensemble
from ml_ensemble.monitoring import diagnose
from ml_ensemble.signing import generate_key
from ml_ensemble.store_records import check_chain
from ml_ensemble.versioning import METADATA_FILE, MODEL_FILE, ModelStore, archived

NOON = datetime(2025, 9, 1, 12, tzinfo=timezone.utc)


def promoted(store: ModelStore, *models: bytes) -> list[str]:
    return [store.promote(model, {})["version"] for model in models]


# --- history ----------------------------------------------------------------------------------------------------------


def altered(lines: list[bytes]) -> dict[str, list[bytes]]:
    other = lines[1].replace(b'"number": 1', b'"number": 7')
    return {"edited": [lines[0], other, *lines[2:]], "removed": [lines[0], *lines[2:]], "inserted": [*lines[:2], lines[0], *lines[2:]],
            "swapped": [lines[0], lines[2], lines[1], *lines[3:]], "beginning removed": lines[1:]}


@pytest.mark.parametrize("kind", ["edited", "removed", "inserted", "swapped", "beginning removed"])
def test_an_edited_removed_or_inserted_line_of_the_history_is_found_and_named(store, kind):
    for number in range(6):
        store.record("note", number=number)
    path = store.archive / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert store.verify() == [] and check_chain(b"".join(lines)) == []
    path.write_bytes(b"".join(altered(lines)[kind]))
    findings = store.verify()
    assert findings and "archive/history.jsonl: line " in findings[0]


def test_a_history_without_its_newest_changes_is_found_and_completed(store):
    promoted(store, b"first", b"second")
    path = store.archive / "history.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert any("the promotion 2 of version" in finding and "is missing" in finding for finding in store.verify())
    assert store.repair() and store.verify() == []


def test_an_edited_last_line_is_found_by_the_metadata(store):
    promoted(store, b"first", b"second")
    store.rollback("lost money")
    path = store.archive / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b"lost money", b"won money"))
    assert "the rollback 3 of version" in " ".join(store.verify())


def test_lines_of_an_older_release_are_accepted_at_the_beginning_only(store):
    promoted(store, b"first")
    path = store.archive / "history.jsonl"
    old = json.loads(path.read_bytes())
    del old["prev"]
    path.write_text(json.dumps(old) + "\n")
    promoted(store, b"second")
    assert store.verify() == []
    with open(path, "a") as file:
        file.write(json.dumps(old) + "\n")
    assert "does not follow" in " ".join(store.verify())


def test_two_processes_write_one_chain(store):
    script = ("import sys; from ml_ensemble.versioning import ModelStore\n"
              "for k in range(40): ModelStore(sys.argv[1]).record('note', number=k)")
    running = [subprocess.Popen([sys.executable, "-c", script, str(store.root)]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    assert len(store.history()) == 120 and store.verify() == []


def test_every_damaged_file_is_named(store):
    promoted(store, b"first", b"second", b"third")
    staged = store.stage(b"fourth", {})
    assert store.verify() == []
    backup = next(store.root.glob("production_backup_*"))
    damaged = [store.production / MODEL_FILE, archived(store, store.versions()[0])[0], backup / MODEL_FILE,
               store.root / "staged" / f"production_ensemble_{staged}.pkl"]
    for path in damaged:
        path.write_bytes(b"x")
    (store.archive / "production_ensemble_20250101-0099.pkl").write_bytes(b"x")
    (store.archive / "pinned.json").write_text("[1]")
    text = "\n".join(store.verify())
    for path in damaged:
        assert path.name in text
    assert "belongs to no version" in text and "pinned.json" in text


# --- staged versions, pins, backups -----------------------------------------------------------------------------------


def test_a_staged_version_is_not_in_production_until_it_is_promoted(store):
    first, = promoted(store, b"first")
    version = store.stage(b"second", {"note": "for review"})
    assert store.current()["version"] == first and store.versions() == [first] and store.staged() == [version]
    facts = store.promote_staged(version)
    assert (facts["version"], facts["sequence"], facts["event"]["replaced"]) == (version, 2, first)
    assert store.read()[1] == b"second" and store.staged() == [] and store.verify() == []


def test_a_staged_version_is_refused_when_production_has_changed(store):
    promoted(store, b"first")
    version = store.stage(b"second", {})
    other, = promoted(store, b"third")
    assert other != version
    with pytest.raises(StaleStoreError, match="was compared with 1"):
        store.promote_staged(version)
    assert store.read()[1] == b"third" and store.staged() == [version]


def test_a_damaged_staged_version_is_refused(store):
    version = store.stage(b"first", {})
    (store.root / "staged" / f"production_ensemble_{version}.pkl").write_bytes(b"other")
    with pytest.raises(IntegrityError):
        store.promote_staged(version)
    with pytest.raises(ModelNotFoundError, match="is not staged"):
        store.promote_staged("20250901-0099")


def test_sixty_weeks_keep_the_newest_one_a_month_pinned_current_and_previous(tmp_path):
    now = [0]
    store = ModelStore(tmp_path, clock=lambda: NOON + timedelta(days=7) * now[0], keep_versions=4, keep_months=6, keep_backups=2)
    made = []
    for week in range(60):
        now[0] = week
        version, = promoted(store, f"model {week}".encode())
        made.append(version)
        if week == 3:
            store.pin(version, "reference of the audit")
            pinned = version
    versions = store.versions()
    assert pinned in versions and versions[-4:] == made[-4:] and len(versions) <= 4 + 6 + 1
    months = {version[:6] for version in versions if version != pinned}
    assert len(months) == 6                                                  # one of each of the newest six months
    before = store.previous()
    assert store.rollback("still works")["version"] == before and store.verify() == []
    store.unpin(pinned)
    assert pinned in store.prune(dry_run=True) and pinned in store.versions()
    assert pinned in store.prune() and pinned not in store.versions()


def test_no_month_is_kept_where_none_is_asked_for(store):
    store.keep_versions, store.keep_months = 2, 0
    made = promoted(store, b"1", b"2", b"3", b"4")
    assert store.versions() == made[-2:]


def test_a_backup_cut_off_between_its_files_is_not_seen(store, monkeypatch):
    promoted(store, b"first")
    replace = os.replace

    def die(source, target):
        if str(target).endswith("backup/" + METADATA_FILE):
            raise KeyboardInterrupt
        return replace(source, target)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        store.backup()
    assert not list(store.root.glob("production_backup_*")) and store.verify() == []
    assert {file.name for file in store.backup().iterdir()} == {MODEL_FILE, METADATA_FILE}
    assert not list((store.root / ".staging").glob("backup*"))


def test_a_reader_between_the_two_replacements_of_a_promotion_waits_and_raises_no_alarm(store, monkeypatch):
    first, = promoted(store, b"first")
    replace, reads = os.replace, []

    def slow(source, target):
        if str(target).endswith("production/" + METADATA_FILE):
            reader = threading.Thread(target=lambda: reads.append(ModelStore(store.root).read()))
            reader.start()
            time.sleep(0.03)
            replace(source, target)
            reader.join()
        else:
            replace(source, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(os, "replace", slow)
        second, = promoted(store, b"second")
    assert [metadata["version"] for metadata, _ in reads] == [second] and reads[0][1] == b"second"


def test_nothing_is_deleted_while_the_pins_cannot_be_read(store):
    store.keep_versions, store.keep_months = 2, 0
    promoted(store, b"1", b"2", b"3", b"4")
    (store.archive / "pinned.json").write_text("{")
    with pytest.raises(IntegrityError, match="nothing is deleted"):
        store.prune()
    with pytest.warns(RuntimeWarning, match="old versions could not be deleted"):
        promoted(store, b"5")
    assert store.read()[1] == b"5"


def test_a_backup_is_restored_as_a_new_change(store):
    first, second = promoted(store, b"first", b"second")
    backup = store.backup()
    promoted(store, b"third")
    facts = store.restore(backup.name, "the third lost money")
    assert (facts["version"], facts["sequence"], store.read()[1]) == (second, 4, b"second")
    assert store.previous() == first and store.verify() == []
    with pytest.raises(ModelNotFoundError, match="there is no backup"):
        store.restore("../archive", "x")
    (backup / MODEL_FILE).write_bytes(b"x")
    with pytest.raises(IntegrityError):
        store.restore(backup.name, "x")


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Two key pairs, (file, public key), and a folder of marks for this test."""
    monkeypatch.setenv("ML_ENSEMBLE_STATE", str(tmp_path / "state"))
    return {name: (str(tmp_path / f"{name}.key"), generate_key(tmp_path / f"{name}.key")) for name in ("ours", "other")}


def signing_store(root: Path, key, clock=lambda: NOON) -> ModelStore:
    return ModelStore(root, clock=clock, public_key=key[1], signing_key=key[0])


def reader(root: Path, key, clock=lambda: NOON) -> ModelStore:
    return ModelStore(root, clock=clock, public_key=key[1])


@pytest.fixture
def signed(tmp_path, keys):
    """A signed store of two versions that a reader has read."""
    store = signing_store(tmp_path / "models", keys["ours"])
    promoted(store, b"first", b"second")
    assert reader(store.root, keys["ours"]).read()[1] == b"second"
    return store


def pair(store: ModelStore) -> tuple[bytes, bytes]:
    return (store.production / MODEL_FILE).read_bytes(), (store.production / METADATA_FILE).read_bytes()


def put(store: ModelStore, model: bytes, metadata: bytes) -> None:
    (store.production / MODEL_FILE).write_bytes(model)
    (store.production / METADATA_FILE).write_bytes(metadata)


def without_fallback(store: ModelStore) -> None:
    shutil.rmtree(store.archive)


def test_a_signed_life_is_accepted_by_its_readers(signed, keys):
    bot = reader(signed.root, keys["ours"])
    signed.rollback("lost money")
    assert bot.read()[1] == b"first" and bot.read()[0]["sequence"] == 3
    version = signed.stage(b"third", {})
    signed.promote_staged(version)
    signed.restore(sorted(folder.name for folder in signed.root.glob("production_backup_*"))[-1], "back")
    assert bot.read()[0]["sequence"] == 5 and bot.verify() == []


def test_an_older_signed_pair_that_is_put_back_is_refused(signed, keys):
    older = pair(signed)
    promoted(signed, b"third")
    bot = reader(signed.root, keys["ours"])
    assert bot.read()[1] == b"third"
    put(signed, *older)
    without_fallback(signed)
    with pytest.raises(SignatureError, match="3 was seen before: an older version was put back"):
        bot.read()
    assert ModelStore(signed.root).read()[1] == b"second"                    # nothing else would have noticed


def test_a_rollback_without_an_event_is_refused(signed, keys):
    model, metadata = archived(signed, signed.versions()[0])
    put(signed, model.read_bytes(), metadata.read_bytes())
    without_fallback(signed)
    with pytest.raises(SignatureError, match="an older version was put back"):
        reader(signed.root, keys["ours"]).read()


def test_newer_metadata_with_an_older_model_is_refused(signed, keys):
    older = pair(signed)
    promoted(signed, b"third")
    put(signed, older[0], pair(signed)[1])
    without_fallback(signed)
    with pytest.raises(IntegrityError, match="its metadata recorded"):
        reader(signed.root, keys["ours"]).read()


@pytest.mark.parametrize("change", [{"sequence": 9}, {"version": "20250901-0009"}, {"expires_at": "2099-01-01T00:00:00Z"},
                                    {"data": {"market": "other"}}, {"event": {"kind": "rollback", "at": "2025-09-01T12:00:00Z"}}])
def test_metadata_changed_after_it_was_signed_is_refused(signed, keys, change):
    facts = json.loads(pair(signed)[1]) | change
    put(signed, pair(signed)[0], json.dumps(facts).encode())
    without_fallback(signed)
    with pytest.raises(SignatureError, match="does not match its signature"):
        reader(signed.root, keys["ours"]).read()


def test_unsigned_and_foreign_metadata_is_refused(signed, keys, tmp_path):
    facts = json.loads(pair(signed)[1])
    without_fallback(signed)
    put(signed, pair(signed)[0], json.dumps({name: value for name, value in facts.items() if name != "signature"}).encode())
    with pytest.raises(SignatureError, match="is not signed"):
        reader(signed.root, keys["ours"]).read()
    foreign = signing_store(tmp_path / "foreign", keys["other"])
    promoted(foreign, *(b"%d" % number for number in range(5)))
    put(signed, *pair(foreign))
    with pytest.raises(SignatureError, match="is signed with the key"):
        reader(signed.root, keys["ours"]).read()


def test_a_model_of_another_store_with_the_same_key_is_refused(signed, keys, tmp_path):
    other = signing_store(tmp_path / "eth", keys["ours"])
    promoted(other, *(b"%d" % number for number in range(5)))
    put(signed, *pair(other))
    without_fallback(signed)
    with pytest.raises(SignatureError, match="belongs to another store"):
        reader(signed.root, keys["ours"]).read()


def test_expired_metadata_is_refused(signed, keys):
    late = reader(signed.root, keys["ours"], clock=lambda: NOON + timedelta(days=61))
    with pytest.raises(SignatureError, match="has expired at 2025-10-31"):
        late.read()
    renewed = signing_store(signed.root, keys["ours"], clock=lambda: NOON + timedelta(days=61))
    renewed.rollback("renew the signature", renewed.versions()[1])
    assert late.read()[1] == b"second"


def test_a_sequence_driven_to_the_limit_is_left_behind_with_a_new_key(signed, keys):
    from ml_ensemble.signing import sign_metadata
    stolen = json.loads(pair(signed)[1]) | {"sequence": 10**16 - 1}
    del stolen["signature"]
    put(signed, pair(signed)[0], json.dumps(sign_metadata(stolen, keys["ours"][0], NOON, 30)).encode())
    bot = reader(signed.root, keys["ours"])
    assert bot.read()[0]["sequence"] == 10**16 - 1
    with pytest.raises(StoreError, match="is above the limit"):
        promoted(signed, b"third")
    recovered = signing_store(signed.root, keys["other"])
    for folder in ("production", "archive"):
        shutil.rmtree(recovered.root / folder)
    promoted(recovered, b"third")
    assert reader(signed.root, keys["other"]).read()[1] == b"third"


def test_history_of_an_attacker_does_not_drive_the_sequence_of_a_signed_store(signed):
    with open(signed.archive / "history.jsonl", "a") as file:
        file.write(json.dumps({"at": "2025-09-01T00:00:00Z", "kind": "promotion", "sequence": 10**15, "version": "20250901-0001"}) + "\n")
    assert promoted(signed, b"third") and signed.current()["sequence"] == 3


def test_the_mark_is_written_after_the_verification_only(signed, keys):
    """As tough once did: a mark taken from unverified metadata locks the reader out (CVE-2025-2888)."""
    promoted(signed, b"third")
    facts = json.loads(pair(signed)[1]) | {"sequence": 10**9}
    good = pair(signed)
    put(signed, pair(signed)[0], json.dumps(facts).encode())
    bot = reader(signed.root, keys["ours"])
    with pytest.warns(RuntimeWarning, match="from the archive serves"):
        assert bot.read()[1] == b"third"
    put(signed, *good)
    assert bot.read()[1] == b"third"


def test_a_mark_that_cannot_be_read_is_an_error_and_one_that_cannot_be_written_a_warning(signed, keys, tmp_path, monkeypatch):
    bot = reader(signed.root, keys["ours"])
    for path in (tmp_path / "state").iterdir():
        path.write_text("{")
    with pytest.raises(SignatureError, match="the mark .* cannot be read"):
        bot.read()
    monkeypatch.setenv("ML_ENSEMBLE_STATE", "/dev/null/state")
    with pytest.warns(RuntimeWarning, match="could not be written"):
        assert bot.read()[1] == b"second"


def test_a_change_without_the_key_is_refused_before_anything_happens(signed, keys):
    before = pair(signed)
    with pytest.raises(StoreError, match="no signing key"):
        reader(signed.root, keys["ours"]).promote(b"third", {})
    with pytest.raises(ConfigError, match="two parts of one key"):
        ModelStore(signed.root, clock=lambda: NOON, public_key=keys["ours"][1], signing_key=keys["other"][0])
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelStore(signed.root, clock=lambda: NOON, signing_key="/nonexistent")
    assert pair(signed) == before
    with pytest.raises(ConfigError):
        ModelStore(signed.root, public_key="ed25519:AAAA")


def test_a_running_ensemble_keeps_its_version_when_the_new_one_is_not_signed(signed, keys, tmp_path):
    model = restore_ensemble(hand_made_payload()).to_bytes()
    promoted(signed, model)
    bot = ProductionEnsemble(store=reader(signed.root, keys["ours"]), clock=lambda: NOON)
    version = bot.get_model_info()["version"]
    other = restore_ensemble(hand_made_payload() | {"decision_threshold": 0.9}).to_bytes()
    with pytest.warns(RuntimeWarning, match="is signed, but this change is not"):
        ModelStore(signed.root, clock=lambda: NOON).promote(other, {})
    with pytest.raises(SignatureError):
        bot.reload_if_changed()
    assert bot.get_model_info()["version"] == version


def test_an_unsigned_store_becomes_a_signed_one_in_which_every_version_can_be_restored(store, keys):
    first, second, third = promoted(store, b"first", b"second", b"third")
    store.rollback("lost money")
    with pytest.raises(SignatureError, match="ml-ensemble sign"):
        reader(store.root, keys["ours"]).read()
    signer = signing_store(store.root, keys["ours"])
    with pytest.raises(SignatureError):
        signer.rollback("not signed yet", first)
    facts = signer.sign("begin to sign")
    assert (facts["version"], facts["sequence"]) == (second, 5) == (signer.last_change["version"], signer.last_change["sequence"])
    bot = reader(store.root, keys["ours"])
    assert bot.read()[1] == b"second" and signer.previous() == first
    assert signer.rollback("works", third)["sequence"] == 6 and bot.read()[1] == b"third"
    assert bot.verify() == []
    other = signing_store(store.root, keys["other"])
    other.sign("a new key")                                                  # and from one key to the next
    assert reader(store.root, keys["other"]).read()[1] == b"third"


def test_a_damaged_version_is_not_signed(store, keys):
    promoted(store, b"first", b"second")
    archived(store, store.versions()[0])[0].write_bytes(b"x")
    before = {path: path.read_bytes() for path in store.archive.iterdir()}
    with pytest.raises(IntegrityError):
        signing_store(store.root, keys["ours"]).sign("begin to sign")
    assert {path: path.read_bytes() for path in store.archive.iterdir()} == before


def test_an_unsigned_change_of_a_signed_store_is_a_warning(signed):
    with pytest.warns(RuntimeWarning, match="is signed, but this change is not"):
        ModelStore(signed.root, clock=lambda: NOON).rollback("without keys")


def test_a_key_is_never_written_over_a_file_or_through_a_link(tmp_path):
    (tmp_path / "a.key.pub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be created"):
        generate_key(tmp_path / "a.key")
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "a.key").exists()


@pytest.mark.parametrize("public", ["text", "file"])
def test_no_part_of_a_private_key_is_ever_shown(store, keys, public):
    """Its text in the place of its path, and the private key in the place of the public one."""
    private = Path(keys["ours"][0]).read_text()
    body = private.split("\n")[1]
    wrong = keys["ours"][0] if public == "file" else private
    for attempt in (lambda: ModelStore(store.root, public_key=wrong), lambda: ModelStore(store.root, signing_key=private),
                    lambda: ModelStore(store.root, signing_key=body), lambda: ModelStore(store.root, public_key=body)):
        with pytest.raises(ConfigError) as caught:
            attempt()
        shown = "".join(traceback.format_exception(caught.value)).partition("ml_ensemble.core.ConfigError")[2]
        assert not any(body[k:k + 8] in str(caught.value) + shown for k in range(len(body) - 8))


def test_the_diagnosis_says_that_a_signed_store_is_signed(signed):
    signature = lambda store: next(finding.seen for finding in diagnose(store).findings if finding.part == "signature")
    assert "which is not checked" in signature(ModelStore(signed.root)) and "has to be signed" in signature(signed)


# --- what a decision means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, name", [
    ({"data": {"market": "bitbank:ETH/JPY:4h"}}, "market"), ({"data": {"labels": {"horizon": 3}}}, "labels.horizon"),
    ({"data": {"interval_minutes": 60}}, "minutes of a bar")])
def test_a_bot_is_told_when_a_decision_means_something_else_and_keeps_its_version(store, change, name):
    recorded = {"market": "bitbank:BTC/JPY:4h", "labels": {"horizon": 1}, "interval_minutes": 240, "to": "2025-08-31T20:00:00Z"}
    first = store.promote(restore_ensemble(hand_made_payload()).to_bytes(), {"data": recorded})["version"]
    bot = ProductionEnsemble(store=store)
    second = store.promote(restore_ensemble(hand_made_payload()).to_bytes(), {"data": recorded | change["data"]})["version"]
    for _ in range(2):                                                       # told each time, not once
        with pytest.raises(ChangedMeaningError, match=name):
            bot.reload_if_changed()
    assert bot.get_model_info()["version"] == first
    assert bot.reload_if_changed(accept_change=True) and bot.get_model_info()["version"] == second


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_who_waits_learns_who_holds_the_lock_and_a_dead_holder_frees_it(store):
    script = ("import sys, time; from ml_ensemble.versioning import ModelStore\n"
              "with ModelStore(sys.argv[1]).locked(): print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", script, str(store.root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match=rf"process {holder.pid} on .* since 20.* has held the lock"), store.locked(timeout=0.1):
        pass
    holder.kill()
    holder.wait()
    start = time.perf_counter()
    promoted(store, b"first")
    assert time.perf_counter() - start < 5 and os.path.exists(store.root / ".lock")
