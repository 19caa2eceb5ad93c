"""Remote copies: what arrives, what is left after a fault, and what is refused: other pushers, hostile places, foreign keys."""
import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import warnings
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import hand_made_payload
from ml_ensemble import ModelStore, ProductionEnsemble, cli as command_line
from ml_ensemble.config import load_settings
from ml_ensemble.core import (ChangedMeaningError, ConfigError, IntegrityError, MissingExtraError, SignatureError, StaleStoreError,
                              StoreError)
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.remote_copies import RemoteError, pull_store, push_store
from ml_ensemble.signing import generate_key
from ml_ensemble.store_records import history_line
from ml_ensemble.versioning import METADATA_FILE, MODEL_FILE
from store_faults import Injector

PRODUCTION = f"production/{METADATA_FILE}"
NOON = datetime(2025, 9, 4, 12, tzinfo=timezone.utc)


# --- places -----------------------------------------------------------------------------------------------------------

class Folder:
    """A folder, and its objects as somebody else sees them."""

    def __init__(self, root: Path):
        self.root, self.url = root, f"file:{root}"

    def __getitem__(self, name): return (self.root / name).read_bytes()

    def __setitem__(self, name, data):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(data)

    def __delitem__(self, name): (self.root / name).unlink()

    def names(self): return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())

    def contents(self): return {name: self[name] for name in self.names()}


class Bucket(Folder):
    """The same in a bucket of a local server of S3."""

    def __init__(self, client, name):
        self.client, self.bucket, self.url = client, name, f"s3://{name}/team/models"
        client.create_bucket(Bucket=name)

    def __getitem__(self, name): return self.client.get_object(Bucket=self.bucket, Key=f"team/models/{name}")["Body"].read()

    def __setitem__(self, name, data): self.client.put_object(Bucket=self.bucket, Key=f"team/models/{name}", Body=data)

    def __delitem__(self, name): self.client.delete_object(Bucket=self.bucket, Key=f"team/models/{name}")

    def names(self):
        found = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return sorted(item["Key"].removeprefix("team/models/") for item in found)


@pytest.fixture(scope="module")
def server():
    """moto's server of S3 on a free port."""
    from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    url = "http://{}:{}".format(*running.get_host_and_port())
    import boto3
    yield url, boto3.client("s3", "us-east-1", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b")
    running.stop()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    import fsspec.config
    server, client = server
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", server)                  # for processes; this one has read it already
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server})
    return Bucket(client, tmp_path.name.replace("_", "-").lower()[-60:].strip("-"))


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """Waiting for the disk is half of the time, and no test here switches off the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["file", "s3"])
def place(request, tmp_path):
    return Folder(tmp_path / "remote") if request.param == "file" else request.getfixturevalue("s3")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "remote")


@pytest.fixture
def here(tmp_path):
    """A store of two versions."""
    store = ModelStore(tmp_path / "here", clock=lambda: NOON)
    promote(store, b"first" * 900, b"second" * 900)
    return store


@pytest.fixture
def other(tmp_path):
    return ModelStore(tmp_path / "other", clock=lambda: NOON + timedelta(hours=1))


def promote(store, *models):
    return [store.promote(model, {"note": "a week"})["version"] for model in models]


def files(store):
    """Every file of a store but those of its lock."""
    return {str(path.relative_to(store.root)): path.read_bytes() for path in store.root.rglob("*")
            if path.is_file() and not path.name.startswith(".lock")} if store.root.exists() else {}


def same(one, other):
    """Whether two stores have the same production, archive and history, and both are intact."""
    kept = lambda store: {name: data for name, data in files(store).items() if name.startswith(("production/", "archive/"))}
    return kept(one) == kept(other) and one.verify() == other.verify() == []


def refused(error, match, store, attempt):
    """The attempt ends with this error, and the store is as it was."""
    before = files(store), store.last_change
    with pytest.raises(error, match=match) as caught:
        attempt()
    assert (files(store), store.last_change) == before
    return str(caught.value)


# --- what arrives -----------------------------------------------------------------------------------------------------

def test_a_pushed_store_is_pulled_byte_for_byte_and_predicts_alike(place, tmp_path, other):
    store = ModelStore(tmp_path / "here", clock=lambda: NOON)
    model = restore_ensemble(hand_made_payload()).to_bytes()
    for _ in range(2):
        store.promote(model, {"created_at": "2025-09-04T00:00:00Z"})
    store.pin(store.versions()[0], "reference")
    before = files(store)
    result = push_store(store, place.url)
    assert (result.status, list(result.sent), result.sequence) == ("pushed", store.versions(), 2) and files(store) == before
    assert place.names() == sorted(["archive/history.jsonl", "archive/pinned.json", PRODUCTION, *(
        f"archive/production_{kind}_{version}.{end}" for version in store.versions()
        for kind, end in (("ensemble", "pkl"), ("model_metadata", "json")))])
    pulled = pull_store(other, place.url)
    assert (pulled.status, set(pulled.fetched), pulled.replaced) == ("pulled", set(store.versions()), None) and same(store, other)
    row = [[1.0] * 12]
    ours, theirs = (ProductionEnsemble(store=each, clock=lambda: NOON).predict_proba(row) for each in (store, other))
    assert (ours == theirs).all()
    assert push_store(store, place.url).status == pull_store(other, place.url).status == "up to date"


def test_weeks_of_promotions_rollbacks_and_refusals_are_followed(folder, here, other):
    for change in (lambda: here.record("refusal", reason="no skill"), lambda: promote(here, b"third"), lambda: here.rollback("worse"),
                   lambda: promote(here, b"fourth", b"fifth"), lambda: here.rollback("worse", here.versions()[1])):
        change()
        assert push_store(here, folder.url).status == "pushed"
        assert pull_store(other, folder.url).sequence == here.current()["sequence"] and same(here, other)
    assert other.previous() == here.previous() and other.rollback("goes on alone")["sequence"] == here.current()["sequence"] + 1


def test_a_bot_fetches_one_model_and_a_later_pull_the_others(place, here, other):
    push_store(here, place.url)
    seen = []
    assert pull_store(other, place.url, production_only=True, progress=seen.append).fetched == (here.versions()[1],)
    assert len(seen) == 1 and "MB" in seen[0] and other.verify() == [] and other.read() == here.read()
    assert pull_store(other, place.url).fetched == (here.versions()[0],) and same(here, other)


def test_what_the_policy_would_delete_is_not_fetched_and_pins_are(folder, here, other):
    versions = here.versions() + promote(here, *(b"week %d" % week for week in range(6)))
    here.pin(versions[0], "reference")
    push_store(here, folder.url)
    other.keep_versions, other.keep_months = 2, 1
    assert set(pull_store(other, folder.url).fetched) == {versions[0], *versions[-2:]} == set(other.versions())
    assert pull_store(other, folder.url).status == "up to date" and other.pins() == here.pins()


def test_histories_with_lines_of_their_own_are_joined_and_both_stay_intact(folder, here, other):
    push_store(here, folder.url)
    pull_store(other, folder.url)
    other.record("note", text="of the other machine")
    promote(here, b"third")
    push_store(here, folder.url)
    pull_store(other, folder.url)
    assert [event["kind"] for event in other.history()] == ["promotion", "promotion", "note", "promotion"] and other.verify() == []
    promote(other, b"fourth")
    push_store(other, folder.url)
    pull_store(here, folder.url)
    assert here.current() == other.current() and here.verify() == other.verify() == []


# --- never overwritten ------------------------------------------------------------------------------------------------

def test_an_object_of_a_version_is_never_overwritten(place, here):
    version = here.versions()[0]
    for name in (f"archive/production_ensemble_{version}.pkl", f"archive/production_model_metadata_{version}.json"):
        place[name] = b"something else"
        before = place.contents()
        refused(IntegrityError, f"{name} at .* has other content", here, lambda: push_store(here, place.url))
        assert place[name] == b"something else" and PRODUCTION not in place.names() and before.items() <= place.contents().items()
        del place[name]
    assert push_store(here, place.url).status == "pushed"


def test_two_pushers_the_second_is_refused_until_it_pulls(place, here, other):
    push_store(here, place.url)
    pull_store(other, place.url)
    promote(here, b"third")
    push_store(here, place.url)
    before = place.contents()
    message = refused(StaleStoreError, "which is newer than", other, lambda: push_store(other, place.url))
    assert "pull-store" in message
    promote(other, b"third of another")
    for attempt in (lambda: push_store(other, place.url), lambda: pull_store(other, place.url)):
            refused(StaleStoreError, "the same sequence and other content", other, attempt)
    promote(other, b"fourth of another")
    refused(StaleStoreError, "its change 3 .* is not in the history here", other, lambda: push_store(other, place.url))
    refused(StaleStoreError, "the store here has the newer change 4", other, lambda: pull_store(other, place.url))
    promote(here, b"fourth", b"fifth")
    push_store(here, place.url)
    refused(StaleStoreError, "change 3 .* here is not in its history", other, lambda: pull_store(other, place.url))
    assert {name: data for name, data in before.items() if name.endswith((".pkl", "1.json", "2.json", "3.json"))}.items() \
        <= place.contents().items()


def test_two_stores_with_the_same_names_and_times_are_told_apart_by_their_models(folder, here, other):
    push_store(here, folder.url)
    pull_store(other, folder.url)
    other.clock = here.clock
    promote(here, b"third")
    promote(other, b"third of another")
    push_store(here, folder.url)
    promote(other, b"fourth of another")
    refused(StaleStoreError, "the archive here has another model", other, lambda: push_store(other, folder.url))
    shutil.rmtree(other.root)
    pull_store(other, folder.url)
    promote(here, b"fourth", b"fifth")
    promote(other, b"fourth of another")
    push_store(here, folder.url)
    refused(StaleStoreError, "another model under the name", other, lambda: pull_store(other, folder.url))


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_push_in_the_middle_of_another_one_is_found(s3, here, other, monkeypatch, moment):
    """The other one is complete before the given write of this one."""
    import s3fs
    push_store(here, s3.url)
    pull_store(other, s3.url)
    promote(other, b"of the other machine")
    promote(here, b"of this machine")
    original, count = s3fs.S3FileSystem._call_s3, [0]

    async def call(self, method, *words, **more):
        if method == "put_object":
            count[0] += 1
            if count[0] == moment:
                winner.update(json.loads(winner_text))
                for name, data in complete.items():
                    s3[name] = data
        return await original(self, method, *words, **more)
    complete = {name: data for name, data in files(other).items()
                if name.startswith("archive/") or name == PRODUCTION}
    winner, winner_text = {}, complete[PRODUCTION]
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    if moment == 5:                                                       # there are four writes: model, metadata, history, commit
        assert push_store(here, s3.url).status == "pushed" and not winner
        return
    with pytest.raises((StaleStoreError, IntegrityError)):
        push_store(here, s3.url)
    assert json.loads(s3[PRODUCTION]) == winner and s3["archive/history.jsonl"] == complete["archive/history.jsonl"]
    assert s3[f"archive/production_ensemble_{winner['version']}.pkl"] == b"of the other machine"


def test_a_damaged_version_is_not_sent_and_is_named_and_a_damaged_production_stops_the_push(folder, here):
    first, second = here.versions()
    (here.archive / f"production_ensemble_{first}.pkl").write_bytes(b"damaged")
    result = push_store(here, folder.url)
    assert result.sent == (second,) and len(result.damaged) == 1 and first in result.damaged[0]
    assert not [name for name in folder.names() if first in name]
    (here.production / MODEL_FILE).write_bytes(b"damaged")
    refused(IntegrityError, "has sha256", here, lambda: push_store(here, folder.url))
    here.repair()
    path = here.archive / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b"12:00", b"13:00", 1))
    promote(here, b"third")
    refused(IntegrityError, "not intact.*was edited", here, lambda: push_store(here, folder.url))


# --- interrupted ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, step, after", [("put_object", 1, False), ("put_object", 1, True), ("head_object", 6, False)])
def test_a_push_cut_off_at_a_call_leaves_a_complete_older_state_and_the_next_one_completes_it(s3, here, tmp_path, monkeypatch,
                                                                                              kind, step, after):
    import s3fs
    push_store(here, s3.url)
    promote(here, b"third")
    here.rollback("worse")
    original, count, start = s3fs.S3FileSystem._call_s3, [0], s3.contents()

    async def call(self, method, *words, **more):
        count[0] += method == kind
        strikes = method == kind and count[0] == at
        answer = await original(self, method, *words, **more) if after or not strikes else None
        if strikes:
            raise OSError(5, "Input/output error")
        return answer
    outcomes = []
    for number in range(1, 100, step):
        for name in set(s3.names()) - set(start):
            del s3[name]
        s3["archive/history.jsonl"], s3[PRODUCTION] = start["archive/history.jsonl"], start[PRODUCTION]
        at, count[0] = number, 0
        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
        try:
            push_store(here, s3.url)
        except RemoteError as error:
            assert "Input/output error" in str(error)
        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", original)
        reader = ModelStore(tmp_path / f"reader {number}")
        outcomes.append(pull_store(reader, s3.url).sequence)
        assert reader.verify() == []
        if count[0] < number:
            break
    assert set(outcomes) == {2, 4} and len(outcomes) >= 4
    s3[PRODUCTION] = start[PRODUCTION]
    push_store(here, s3.url)
    assert pull_store(reader, s3.url).sequence == 4 and same(here, reader)


@pytest.mark.parametrize("name", ["replace", "link", "fsync"])
def test_a_push_to_a_folder_cut_off_at_each_call_leaves_a_complete_older_state(folder, here, other, monkeypatch, name):
    push_store(here, folder.url)
    promote(here, b"third")
    original, count = getattr(os, name), [0]

    def broken(*words, **more):
        if str(words[-1] if name != "fsync" else os.readlink(f"/proc/self/fd/{words[0]}")).startswith(str(folder.root)):
            count[0] += 1
            if count[0] == at:
                raise OSError(28, "No space left on device", str(folder.root))
        return original(*words, **more)
    for at in range(1, 30):
        count[0] = 0
        monkeypatch.setattr(os, name, broken)
        try:
            push_store(here, folder.url)
            break
        except RemoteError as error:
            assert "disk is full" in str(error) and "continues where it ended" in str(error)
        monkeypatch.setattr(os, name, original)
        reader = ModelStore(other.root.with_name(f"reader {at}"))
        assert pull_store(reader, folder.url).sequence == 2 and reader.verify() == []
    assert at > 2 and pull_store(other, folder.url).sequence == 3 and same(here, other)
    assert not list(folder.root.rglob("*.tmp"))


def test_a_pull_killed_at_each_system_call_leaves_the_old_or_the_new_pair_and_the_next_one_completes_it(folder, here, other, tmp_path):
    push_store(here, folder.url)
    pull_store(other, folder.url, production_only=True)                  # so that a version of the archive is missing as well
    promote(here, b"third")
    push_store(here, folder.url)
    sequences = set()
    for at in range(1, 250, 5):
        trial = shutil.copytree(other.root, tmp_path / "trial")
        child = os.fork()
        if child == 0:
            try:
                Injector("exit", at).patch()
                pull_store(ModelStore(trial), folder.url)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        store = ModelStore(trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                              # the archived copy serves
            metadata, model = store.read()
            assert model == {2: b"second" * 900, 3: b"third"}[metadata["sequence"]]
            sequences.add((status, metadata["sequence"]))
            pull_store(store, folder.url)
        for backup in trial.glob("production_backup_*"):                 # the copy of a promotion that was killed may be half
            shutil.rmtree(backup)
        assert same(here, store) and not list(trial.rglob("*.tmp"))
        shutil.rmtree(trial)
        if status == 0:
            break
    assert sequences == {(9, 2), (9, 3), (0, 3)}


def test_a_pull_whose_network_fails_after_the_change_tells_that_production_changed(s3, here, other, monkeypatch):
    import s3fs
    push_store(here, s3.url)
    original, gone = s3fs.S3FileSystem._call_s3, []

    async def call(self, method, *words, **more):
        if gone:
            raise ConnectionError("the network is gone")
        return await original(self, method, *words, **more)
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    with pytest.raises(RemoteError, match="the network is gone.*continues where it ended"):
        pull_store(other, s3.url, progress=lambda text: gone.append(text) if other.last_change else None)
    assert other.last_change["sequence"] == 2 and other.read()[1] == b"second" * 900
    gone.clear()
    assert pull_store(other, s3.url).fetched == (here.versions()[0],) and same(here, other)


def test_damaged_files_here_are_fetched_again(folder, here, other):
    push_store(here, folder.url)
    pull_store(other, folder.url)
    for path in (other.production / MODEL_FILE, other.archive / f"production_ensemble_{here.versions()[1]}.pkl"):
        path.write_bytes(b"damaged")
    assert pull_store(other, folder.url).status == "pulled" and same(here, other)


def test_a_version_that_does_not_load_is_not_put_into_production(folder, here, other):
    def refuse(path):
        assert path.read_bytes() == b"second" * 900 and (path.parent / METADATA_FILE).exists()
        raise IntegrityError("the canary rows disagree", "Retrain.")
    push_store(here, folder.url)
    with pytest.raises(IntegrityError, match="canary"):
        pull_store(other, folder.url, verify=refuse)
    assert other.current() is None and other.versions() == [] and other.last_change is None


# --- hostile places ---------------------------------------------------------------------------------------------------

def altered(place, name, **fields):
    facts = json.loads(place[name])
    place[name] = json.dumps(facts | fields).encode()


def of(version, kind="metadata"):
    return f"archive/production_model_metadata_{version}.json" if kind == "metadata" else f"archive/production_ensemble_{version}.pkl"


HOSTILE = {
    "not JSON": (lambda p, v: p.__setitem__(PRODUCTION, b"{"), "cannot be used as metadata"),
    "a name that leaves the store": (lambda p, v: altered(p, PRODUCTION, version="../../x"), "not the name of a version"),
    "no event": (lambda p, v: altered(p, PRODUCTION, event={}), "lacks the event"),
    "a sequence of its own": (lambda p, v: altered(p, PRODUCTION, sequence=10**15), "lacks the change 1000000000000000"),
    "huge metadata": (lambda p, v: p.__setitem__(PRODUCTION, b" " * (2**22 + 1)), "the limit is 4,194,304"),
    "a huge model": (lambda p, v: p.__setitem__(of(v, "model"), b"x" * 100_000), "the limit is 5,400"),
    "a shorter model": (lambda p, v: p.__setitem__(of(v, "model"), b"x"), "missing or shorter"),
    "another model": (lambda p, v: p.__setitem__(of(v, "model"), b"SECOND" * 900), "has sha256"),
    "a Git LFS pointer": (lambda p, v: (altered(p, of(v), size_bytes=40), p.__setitem__(of(v, "model"), b"version https://git-lfs".ljust(40))),
                          "Git LFS pointer"),
    "no model": (lambda p, v: p.__delitem__(of(v, "model")), "missing"),
    "no metadata in the archive": (lambda p, v: p.__delitem__(of(v)), "is missing"),
    "another version inside": (lambda p, v: altered(p, of(v), version="20250904-0009"), "is the metadata of version 20250904-0009"),
    "another store inside": (lambda p, v: altered(p, of(v), store_id="x"), "belongs to another store"),
    "a sequence from the future": (lambda p, v: altered(p, of(v), sequence=10**15), "above that in production"),
    "no history": (lambda p, v: p.__delitem__("archive/history.jsonl"), "lacks the change 2"),
    "an edited history": (lambda p, v: p.__setitem__("archive/history.jsonl", p["archive/history.jsonl"].replace(b"12:00", b"13:00", 1)),
                          "was edited"),
    "many lines": (lambda p, v: p.__setitem__("archive/history.jsonl", b"\n" * 400_001 + p["archive/history.jsonl"]), "400,00. lines"),
    "a huge history": (lambda p, v: p.__setitem__("archive/history.jsonl", b"\n" * (2**25 + 1)), "the limit is 33,554,432"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_remote_is_refused_by_name_and_nothing_is_written(folder, here, other, kind):
    push_store(here, folder.url)
    spoil, problem = HOSTILE[kind]
    spoil(folder, here.versions()[1])
    refused(StoreError, problem, other, lambda: pull_store(other, folder.url))
    assert other.versions() == [] and other.current() is None


def test_sizes_and_names_of_a_hostile_bucket_are_checked_before_content(s3, here, other, monkeypatch):
    import s3fs
    first, second = here.versions()
    push_store(here, s3.url)
    good = s3.contents()
    original = s3fs.S3FileSystem._call_s3

    async def call(self, method, *words, **more):                         # however many objects there are, no listing is asked for
        assert not method.startswith("list") or more["MaxKeys"] == 1
        return await original(self, method, *words, **more)
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    s3["archive/production_model_metadata_20250905-0009.json"] = good[of(second)]
    altered(s3, of(first), version="20250904-0009")
    result = pull_store(other, s3.url)
    assert result.fetched == (second,) and len(result.refused) == 1 and "20250904-0009" in result.refused[0]
    for name, data in {of(first): b"x" * (2**22 + 1), of(second, "model"): b"x" * 100_000}.items():
        s3[name] = data
    assert "4,194,305 bytes" in pull_store(other, s3.url).refused[0]
    with pytest.raises(IntegrityError, match="100,000 bytes, the limit is 5,400"):
        pull_store(ModelStore(other.root.with_name("third")), s3.url)
    s3[of(first)], s3[of(second, "model")], s3["archive/pinned.json"] = good[of(first)], good[of(second, "model")], b'{"../x": "y"}'
    with pytest.raises(IntegrityError, match="pinned.json"):
        pull_store(other, s3.url)


def test_links_of_a_folder_are_not_followed_out_of_it(folder, here, other, tmp_path):
    push_store(here, folder.url)
    outside = tmp_path / "outside"
    outside.write_bytes(folder[PRODUCTION])
    del folder[PRODUCTION]
    (folder.root / PRODUCTION).symlink_to(outside)
    refused(IntegrityError, "it is a link to", other, lambda: pull_store(other, folder.url))
    refused(IntegrityError, "it is a link to", here, lambda: push_store(here, folder.url))
    (folder.root / PRODUCTION).unlink()
    os.mkfifo(folder.root / PRODUCTION)
    refused(IntegrityError, "a named pipe", other, lambda: pull_store(other, folder.url))
    shutil.rmtree(folder.root)
    folder.root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (folder.root / "archive").symlink_to(tmp_path / "elsewhere")
    refused((RemoteError, IntegrityError), "link", here, lambda: push_store(here, folder.url))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_older_state_of_the_remote_is_not_pulled(place, here, other):
    push_store(here, place.url)
    older = place.contents()
    promote(here, b"third")
    push_store(here, place.url)
    pull_store(other, place.url)
    for name, data in older.items():
        place[name] = data
    refused(StaleStoreError, "the store here has the newer change 3", other, lambda: pull_store(other, place.url))
    assert push_store(here, place.url).status == "pushed"


def test_lines_after_the_change_in_production_are_not_taken(folder, here, other):
    push_store(here, folder.url)
    history = folder["archive/history.jsonl"]
    forged = history_line({"at": "2025-09-05T00:00:00Z", "kind": "promotion", "sequence": 9, "version": "20250905-0009"},
                          history.rstrip(b"\n").split(b"\n")[-1])
    folder["archive/history.jsonl"] = history + forged
    assert pull_store(other, folder.url).sequence == 2 and same(here, other)


def test_a_version_whose_decisions_mean_something_else_needs_to_be_accepted(folder, here, other):
    meant = lambda market: {"data": {"market": market, "interval_minutes": 240}}
    here.promote(b"third", meant("a"))
    push_store(here, folder.url)
    pull_store(other, folder.url)
    here.promote(b"fourth", meant("b"))
    push_store(here, folder.url)
    message = refused(ChangedMeaningError, "market a -> b", other, lambda: pull_store(other, folder.url))
    assert "--accept-change" in message
    assert pull_store(other, folder.url, accept_change=True).sequence == 4 and same(here, other)


# --- signatures -------------------------------------------------------------------------------------------------------

@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("ML_ENSEMBLE_STATE", str(tmp_path / "state"))
    return {name: (str(tmp_path / f"{name}.key"), generate_key(tmp_path / f"{name}.key")) for name in ("ours", "theirs")}


def test_with_a_public_key_only_what_its_owner_signed_is_pulled(folder, keys, tmp_path):
    private, public = keys["ours"]
    make = lambda name, **more: ModelStore(tmp_path / name, clock=lambda: NOON, **more)
    store = make("signed", signing_key=private, public_key=public)
    promote(store, b"first", b"second")
    push_store(store, folder.url)
    reader = make("reader", public_key=public)
    assert pull_store(reader, folder.url).sequence == 2 and reader.read() == store.read() and reader.verify() == []
    older = folder.contents()
    promote(store, b"third")
    push_store(store, folder.url)
    pull_store(reader, folder.url)
    reader.read()                                                         # the mark rises
    shutil.rmtree(reader.root)
    for name, data in older.items():
        folder[name] = data
    refused(SignatureError, "3 was seen before", make("reader", public_key=public), lambda: pull_store(reader, folder.url))
    foreign = make("foreign", public_key=keys["theirs"][1])
    refused(SignatureError, "is signed with the key", foreign, lambda: pull_store(foreign, folder.url))
    late = ModelStore(tmp_path / "late", clock=lambda: NOON + timedelta(days=61), public_key=public)
    refused(SignatureError, "has expired", late, lambda: pull_store(late, folder.url))
    altered(folder, PRODUCTION, note="changed")
    fresh = make("fresh", public_key=public)
    refused(SignatureError, "does not match its signature", fresh, lambda: pull_store(fresh, folder.url))


def test_an_unsigned_archived_version_is_refused_and_a_forged_remote_does_not_stop_the_owner_unnoticed(folder, keys, tmp_path):
    private, public = keys["ours"]
    store = ModelStore(tmp_path / "signed", clock=lambda: NOON, signing_key=private, public_key=public)
    first, _ = promote(store, b"first", b"second")
    push_store(store, folder.url)
    altered(folder, of(first), note="changed")
    reader = ModelStore(tmp_path / "reader", clock=lambda: NOON, public_key=public)
    result = pull_store(reader, folder.url)
    assert reader.read()[1] == b"second" and len(result.refused) == 1 and "signature" in result.refused[0]
    refused(IntegrityError, "has other content", store, lambda: push_store(store, folder.url))
    altered(folder, PRODUCTION, sequence=10**15)
    with pytest.raises(SignatureError, match="does not match its signature"):
        push_store(store, folder.url)


# --- addresses and errors ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("url, problem", [
    ("", "no URL"), ("models", "no protocol"), ("sftp://user:pw1@host/models", "a password"), ("https://host/models?sig=pw1", "a query"),
    ("simplecache::s3://bucket/models", "several protocols"), ("gopher://host/x", "not known"),
    ("s3://bucket/\x1b[2J", "control characters")])
def test_a_url_that_cannot_be_used_is_refused_without_its_secrets(here, url, problem):
    for attempt in (push_store, pull_store):
        with pytest.raises(ConfigError, match=problem) as caught:
            attempt(here, url)
        assert "pw1" not in str(caught.value) and "\x1b" not in str(caught.value)
    if url and "gopher" not in url:
        with pytest.raises(ConfigError) as caught:
            load_settings([f"store.remote={url}"])
        assert "pw1" not in str(caught.value)


def test_errors_of_s3_are_one_sentence_with_a_remedy(s3, here, other, monkeypatch):
    import s3fs
    for attempt in (lambda: pull_store(other, "s3://no-such-bucket/x"), lambda: push_store(here, "s3://no-such-bucket/x")):
        with pytest.raises(RemoteError, match=r"bucket does not exist\)\. Correct the address or create the bucket"):
            attempt()
    with pytest.raises(RemoteError, match="there is no copy of a store"):
        pull_store(other, s3.url)

    async def call(self, method, *words, **more):
        raise PermissionError("Access Denied to https://a.b/c?X-Amz-Signature=pw1")
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    with pytest.raises(RemoteError, match="Access Denied.*credentials") as caught:
        push_store(here, s3.url)
    assert "pw1" not in str(caught.value) and caught.value.__cause__ is None
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    with pytest.raises(MissingExtraError, match="pip install s3fs"):
        push_store(here, s3.url)


def test_a_server_that_cannot_be_reached_is_named_with_the_variable(s3, here, monkeypatch):
    import fsspec.config
    import s3fs
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    once = {"retries": {"total_max_attempts": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": once})
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9.*FSSPEC_S3_ENDPOINT_URL"):
        push_store(here, s3.url)


# --- the commands -----------------------------------------------------------------------------------------------------

@pytest.fixture
def command(monkeypatch):
    def call(store, *words):
        monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(store.root))
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", *words])
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = command_line.run_command("--json" in words)
        return SimpleNamespace(code=code, out=out.getvalue(), err=" ".join(err.getvalue().split()))
    return call


def test_the_commands_move_a_store_and_their_exit_codes_tell_what_happened(folder, here, other, command, monkeypatch):
    model = restore_ensemble(hand_made_payload()).to_bytes()
    here.promote(model, {"created_at": "2025-09-04T00:00:00Z"})
    monkeypatch.setenv("ML_ENSEMBLE_STORE__REMOTE", folder.url)
    done = command(here, "push-store")
    assert done.code == 0 and "Pushed: version" in done.out and "3 versions sent" in done.out and "Sending archive/" in done.err
    assert json.loads(command(here, "push-store", "--json").out)["status"] == "up to date"
    folder[of(here.versions()[0])] = b"{"
    done = command(other, "pull-store", "--json")
    result = json.loads(done.out)
    assert done.code == 5 and result["status"] == "pulled" and len(result["refused"]) == 1 and other.read()[1] == model
    assert command(other, "pull-store").code == 1 and command(other, "pull-store", "--production-only").code == 0
    assert "has other content" in command(here, "push-store").err
    done = command(other, "pull-store", "--remote", "file:nowhere/at/all", "--json")
    assert done.code == 1 and json.loads(done.out)["error"] == "RemoteError"
    done = command(other, "pull-store", "--remote", "sftp://a:pw1@host/x")
    assert done.code == 2 and "a password" in done.err and "pw1" not in done.err + done.out
    promote(here, b"no model that loads")
    del folder[of(here.versions()[0])]
    assert command(here, "push-store").code == 0
    done = command(other, "pull-store")
    assert done.code == 1 and "could not load" in done.err and other.read()[1] == model


@pytest.mark.slow
def test_the_options_of_fsspec_come_from_the_environment(s3, here):
    environment = {**os.environ, "ML_ENSEMBLE_MODELS": str(here.root)}
    done = subprocess.run([sys.executable, "-m", "ml_ensemble.cli", "push-store", "--remote", s3.url, "--json"],
                          capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["sent"] == here.versions()
    assert PRODUCTION in s3.names()


# --- what a stranger tried --------------------------------------------------------------------------------------------


def test_a_store_in_use_is_no_place_for_a_copy(here, other, command):
    promote(other, b"of another")
    before = files(other)
    with pytest.raises(ConfigError, match="is a model store, not a copy"):
        push_store(here, f"file:{other.root}")
    assert files(other) == before
    in_memory = command(here, "push-store", "--remote", "memory://x")
    assert in_memory.code == 2 and "ends with the command" in in_memory.err


def test_stores_that_went_apart_are_told_so_and_the_named_remedies_work(here, folder, tmp_path):
    push_store(here, folder.url)
    there = ModelStore(tmp_path / "there", clock=lambda: NOON + timedelta(minutes=1))
    pull_store(there, folder.url)
    here.rollback("here")
    there.rollback("there")
    push_store(here, folder.url)
    for attempt in (lambda: push_store(there, folder.url), lambda: pull_store(there, folder.url)):
        with pytest.raises(StaleStoreError, match="cannot be joined") as caught:
            attempt()
        assert "push-store` first" not in str(caught.value) and "pull-store` first" not in str(caught.value)
    there.rollback("higher than the remote", here.versions()[1])
    for attempt in (lambda: push_store(there, folder.url), lambda: pull_store(there, folder.url)):
        with pytest.raises(StaleStoreError, match="cannot be joined"):
            attempt()
    assert push_store(there, f"file:{tmp_path}/own").status == "pushed"
    assert pull_store(ModelStore(tmp_path / "empty", clock=lambda: NOON), folder.url).status == "pulled"


def test_a_server_that_stops_to_answer_ends_in_an_error(here, monkeypatch):
    import fsspec
    silent = threading.Event()

    class Silent(fsspec.AbstractFileSystem):
        protocol = "silent"

        def info(self, path, **more):
            silent.wait(20)

    fsspec.register_implementation("silent", Silent, clobber=True)
    monkeypatch.setattr("ml_ensemble.remote_copies._CALL_SECONDS", 0.1)
    with pytest.raises(RemoteError, match="no answer within 0.1 seconds"):
        push_store(here, "silent://x/models")
    silent.set()


def test_a_damaged_or_unsigned_archived_version_is_fetched_again(here, folder, other):
    push_store(here, folder.url)
    pull_store(other, folder.url)
    first = other.versions()[0]
    path = other.archive / f"production_ensemble_{first}.pkl"
    path.write_bytes(path.read_bytes() + b"x")
    assert pull_store(other, folder.url).fetched == (first,) and other.verify() == []


def test_a_damaged_model_at_the_remote_is_found_by_a_push(here, folder):
    push_store(here, folder.url)
    old, newest = (f"archive/production_ensemble_{version}.pkl" for version in here.versions())
    intact = folder[newest]
    folder[newest] = b"x" + intact[1:]                                          # as long as before
    with pytest.raises(IntegrityError, match="has other content"):
        push_store(here, folder.url)
    folder[newest], folder[old] = intact, b"x" + folder[old][1:]
    assert push_store(here, folder.url).status == "up to date"
    with pytest.raises(IntegrityError, match="has other content"):
        push_store(here, folder.url, verify=True)


def test_a_bot_with_a_new_key_is_told_to_pull_into_an_empty_folder(here, folder, tmp_path):
    push_store(here, folder.url)
    bot = ModelStore(tmp_path / "bot", clock=lambda: NOON)
    pull_store(bot, folder.url)
    key = generate_key(tmp_path / "a.key")
    signer = ModelStore(here.root, clock=lambda: NOON, signing_key=str(tmp_path / "a.key"), public_key=key)
    signer.sign("begin to sign")
    push_store(signer, f"file:{tmp_path}/signed")
    with pytest.raises(SignatureError, match="pull into an empty folder"):
        pull_store(ModelStore(bot.root, clock=lambda: NOON, public_key=key), f"file:{tmp_path}/signed")
    with pytest.raises(SignatureError, match="pushed to a new URL"):
        pull_store(ModelStore(tmp_path / "new", clock=lambda: NOON, public_key=key), folder.url)
    assert pull_store(ModelStore(tmp_path / "new", clock=lambda: NOON, public_key=key), f"file:{tmp_path}/signed").status == "pulled"
