"""Publication: what git, Git LFS and GTO read afterwards, and what is left after each refusal: nothing."""
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import hand_made_payload
from ml_ensemble import ModelStore, ProductionEnsemble, cli as command_line
from ml_ensemble.core import ConfigError, LFSPointerError
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.publishing import PublishError, publish

ROOT = Path(__file__).resolve().parent.parent
NOON = datetime(2025, 9, 4, 12, tzinfo=timezone.utc)
GATE = {"gate": {"outcome": "passed", "summary": "The skill is 0.047 at the next open."},
        "metrics": {"metrics": {"skill": 0.0497, "weighted_f1": 0.612}, "intervals": {"skill": [0.04, 0.06]}}}


def run(folder, *words, check=True, **environment):
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def git(folder, *words, **more):
    return run(folder, "git", *words, **more)


def write_hook(folder, name, text):
    path = Path(folder) / "hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def own_git(tmp_path, monkeypatch):
    """git with a configuration of the test, and nothing of this machine."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "gitconfig"
    config.write_text("[user]\nname = A. Person\nemail = person@example.invalid\n[init]\ndefaultBranch = main\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def remote(tmp_path):
    """A bare repository whose branch main has one commit."""
    path = tmp_path / "remote.git"
    git(tmp_path, "init", "-q", "--bare", str(path))
    first = tmp_path / "first"
    git(tmp_path, "init", "-q", str(first))
    (first / "code.py").write_text("a = 1\n")
    (first / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    git(first, "add", ".")
    git(first, "commit", "-q", "-m", "First")
    git(first, "push", "-q", str(path), "main")
    return path


@pytest.fixture
def clone(tmp_path, remote):
    def make(name="clone", *words):
        git(tmp_path, "clone", "-q", *words, f"file://{remote}", name)
        return tmp_path / name
    return make


@pytest.fixture
def here(clone):
    """A clone with a store that was promoted once and not published."""
    folder = clone()
    store = ModelStore(folder / "models", clock=lambda: NOON)
    store.promote(b"model 1", GATE)
    return SimpleNamespace(folder=folder, store=store)


@pytest.fixture
def command(here, monkeypatch):
    """`ml-ensemble publish` in this process."""
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(here.store.root))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", "publish", *words])
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = command_line.run_command("--json" in words)
        return SimpleNamespace(code=code, out=out.getvalue(), err=" ".join(err.getvalue().split()))
    return call


def state(folder, remote=None):
    """Refs, index and files of a repository, and the refs of the remote: what a failed publication leaves alone."""
    files = {path: path.read_bytes() for path in (folder / "models").rglob("*") if path.is_file() and path.name[:5] != ".lock"}
    return (git(folder, "for-each-ref"), git(folder, "rev-parse", "HEAD"), git(folder, "ls-files", "--stage"), files,
            git(remote, "for-each-ref") if remote else "")


def tags(folder):
    return git(folder, "for-each-ref", "--sort=taggerdate", "--format=%(refname:strip=2)", "refs/tags").split()


def files_of(folder, revision):
    return git(folder, "diff-tree", "--no-commit-id", "--name-only", "-r", revision).splitlines()


# --- what is published ------------------------------------------------------------------------------------------------

def test_a_promotion_becomes_one_commit_with_version_verdict_and_figures_and_two_annotated_tags_on_the_remote(here, remote):
    result = publish(here.store)
    version = here.store.current()["version"]
    assert (result.status, result.pushed, result.remote) == ("published", True, "origin/main")
    message = git(remote, "log", "-1", "--format=%B", "main")
    assert message.startswith(f"Promote {version}: gate passed, skill 0.050 (0.040 to 0.060), weighted f1 0.612\n")
    assert f"Version: {version}\nSequence: 1\nSha256: {here.store.current()['sha256']}" in message
    assert tags(remote) == ["ml-ensemble@v1.0.0", "ml-ensemble#production#1"] == list(result.tags)
    assert git(remote, "for-each-ref", "--format=%(objecttype) %(*objectname)", "refs/tags").split("\n") == [
        f"tag {git(remote, 'rev-parse', 'main')}"] * 2
    assert git(remote, "log", "-1", "--format=%an %ae %cn", "main") == "A. Person person@example.invalid A. Person"
    assert set(files_of(remote, "main")) == {
        "models/archive/history.jsonl", f"models/archive/production_ensemble_{version}.pkl",
        f"models/archive/production_model_metadata_{version}.json", "models/production/production_ensemble.pkl",
        "models/production/production_model_metadata.json"}
    assert git(here.folder, "status", "--porcelain") == "" and git(here.folder, "rev-parse", "HEAD") == git(remote, "rev-parse", "main")
    git(remote, "fsck", "--strict")
    assert publish(here.store).status == "nothing to publish"


@pytest.mark.parametrize("each", [True, False], ids=["after each change", "all at once"])
def test_gto_lists_versions_and_stages_of_5_promotions_and_a_rollback_within_one_second_in_order(here, each):
    versions = [here.store.current()["version"]]
    for number in range(2, 6):
        if each:
            publish(here.store)
        versions.append(here.store.promote(b"model %d" % number, GATE)["version"])
    if each:
        publish(here.store)
    here.store.rollback("fees changed", versions[2])
    publish(here.store)
    bin_ = Path(sys.executable).parent / "gto"
    show = json.loads(run(here.folder, bin_, "show", "ml-ensemble", "--json"))
    assert [row["version"] for row in show] == [f"v{n}.0.0" for n in (5, 4, 3, 2, 1)]
    current = json.loads(run(here.folder, bin_, "show", "--json"))["ml-ensemble"]
    assert (current["version"], current["stage"]) == ("v5.0.0", {"production": "v3.0.0"})
    events = json.loads(run(here.folder, bin_, "history", "ml-ensemble", "--json", "--ascending"))
    events = [(event["event"], event["version"]) for event in events if event["event"] != "commit"]
    pairs = [(kind, f"v{n}.0.0") for n in range(1, 6) for kind in ("registration", "assignment")]
    assert events == [*pairs, ("assignment", "v3.0.0")]
    times = git(here.folder, "for-each-ref", "--sort=taggerdate", "--format=%(taggerdate:unix)", "refs/tags").split()
    assert len(set(times)) == len(times) == 11 and int(times[0]) == NOON.timestamp()
    for number, version in enumerate(versions, 1):           # each version is in production at the commit of its tag
        text = git(here.folder, "show", f"ml-ensemble@v{number}.0.0:models/production/production_model_metadata.json")
        assert json.loads(text)["version"] == version
    assert "fees changed" in git(here.folder, "log", "-1", "--format=%s")


def test_a_clock_that_runs_backwards_does_not_change_the_order_of_the_tags(here):
    publish(here.store)
    here.store.clock = lambda: datetime(2020, 1, 1, tzinfo=timezone.utc)
    here.store.promote(b"model 2", GATE)
    publish(here.store)
    assert tags(here.folder) == ["ml-ensemble@v1.0.0", "ml-ensemble#production#1", "ml-ensemble@v2.0.0", "ml-ensemble#production#2"]


def test_a_refusal_is_a_commit_without_tags(here, remote):
    publish(here.store)
    here.store.record("refusal", reason="rejected: skill 0.01")
    result = publish(here.store)
    assert (result.tags, files_of(remote, "main")) == ((), ["models/archive/history.jsonl"])
    assert git(remote, "log", "-1", "--format=%s", "main") == "Record refusal: rejected: skill 0.01"


def test_a_reason_becomes_neither_an_option_nor_a_trailer_nor_an_escape_sequence(here, remote, monkeypatch):
    """New reasons are plain text; an older release recorded any."""
    monkeypatch.setattr("ml_ensemble.versioning.check_reason", lambda reason: None)
    here.store.promote(b"model 2", GATE)
    here.store.rollback("--amend\nSequence: 99\n\x1b[2J\u202e" + "x" * 900)
    publish(here.store)
    message = git(remote, "log", "-1", "--format=%B", "main")
    assert message.splitlines()[0].startswith("Roll back to 20250904-0001: --amend Sequence: 99 [2J")
    assert "\x1b" not in message and "\u202e" not in message and "\nSequence: 99" not in message and len(message) < 3000


def test_staged_and_changed_files_of_the_user_stay_as_they_are_and_out_of_the_commit(here, remote):
    (here.folder / "code.py").write_text("a = 2\n")
    (here.folder / "new.py").write_text("b = 1\n")
    git(here.folder, "add", "new.py")
    publish(here.store)
    assert all(path.startswith("models/") for path in files_of(remote, "main"))
    assert git(here.folder, "status", "--porcelain").split("\n") == ["M code.py", "A  new.py"]     # stripped


def test_a_version_that_enters_shadow_is_published_without_a_promotion_and_removed_when_it_leaves(here, remote):
    publish(here.store)
    version = here.store.start_shadow(here.store.stage(b"model 2", GATE))["version"]
    assert publish(here.store).tags == ()
    sent = [f"models/shadow/production_ensemble_{version}.pkl", f"models/shadow/production_model_metadata_{version}.json"]
    assert git(remote, "ls-tree", "-r", "--name-only", "main", "models/shadow").split() == sent
    here.store.end_shadow("not better")
    publish(here.store)
    assert git(remote, "ls-tree", "-r", "--name-only", "main", "models/shadow") == ""


def test_locks_candidates_temporary_files_and_readmes_are_not_published(here, remote):
    for name in (".staging/promotion/x.pkl", "archive/.x.tmp", "archive/y.tmp", "production/README.md", "scratch/big.json", ".lock"):
        path = here.store.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    publish(here.store)
    assert not [name for name in files_of(remote, "main") if name.endswith((".tmp", ".lock", ".md", "x.pkl", "big.json"))]


def test_what_was_deleted_from_the_store_is_deleted_in_the_commit_and_the_tag_keeps_it(here, remote):
    publish(here.store)
    here.store.keep_versions = 1
    for number in (2, 3, 4):
        here.store.promote(b"model %d" % number, GATE)
        publish(here.store)
    names = git(remote, "ls-tree", "-r", "--name-only", "main")
    assert "0001.pkl" not in names and "0004.pkl" in names
    assert git(remote, "show", "ml-ensemble@v1.0.0:models/production/production_ensemble.pkl") == "model 1"


def test_json_and_dry_run_print_one_document_and_a_dry_run_writes_nothing(here, command, remote):
    before, objects = state(here.folder, remote), git(here.folder, "count-objects")
    shown = command("--dry-run", "--json")
    document = json.loads(shown.out)
    assert (shown.code, document["status"], document["pushed"]) == (0, "dry run", False)
    assert document["tags"] == ["ml-ensemble@v1.0.0", "ml-ensemble#production#1"] and document["message"].startswith("Promote")
    assert (state(here.folder, remote), git(here.folder, "count-objects")) == (before, objects)
    done = command("--json")
    assert (done.code, json.loads(done.out)["pushed"]) == (0, True)
    assert "Nothing to publish" in command().out


def test_no_push_publishes_here_and_a_later_publication_pushes_it(here, command, remote):
    assert command("--no-push").code == 0 and len(tags(here.folder)) == 2 and tags(remote) == []
    here.store.promote(b"model 2", GATE)
    assert command().code == 0
    assert tags(remote) == tags(here.folder) == ["ml-ensemble@v1.0.0", "ml-ensemble#production#1", "ml-ensemble@v2.0.0",
                                                 "ml-ensemble#production#2"]
    assert git(remote, "for-each-ref", "refs/tags") == git(here.folder, "for-each-ref", "refs/tags")
    assert git(here.folder, "status", "--porcelain") == ""


def test_without_a_remote_the_commit_stays_here_with_a_note(here, command):
    git(here.folder, "remote", "remove", "origin")
    done = command()
    assert done.code == 0 and "was not pushed" in done.out and len(tags(here.folder)) == 2


def test_variables_of_a_hook_that_calls_the_command_do_not_redirect_it(here, tmp_path, monkeypatch, remote):
    git(tmp_path, "init", "-q", "other")
    for name, value in (("GIT_DIR", "other/.git"), ("GIT_INDEX_FILE", "other/index"), ("GIT_WORK_TREE", "other")):
        monkeypatch.setenv(name, str(tmp_path / value))
    publish(here.store)
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name)
    assert tags(remote) and git(tmp_path / "other", "for-each-ref") == ""


def test_ssh_asks_nothing(here, tmp_path, monkeypatch):
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/words\ntest -t 0 && exit 9\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    git(here.folder, "remote", "set-url", "origin", "ssh://host.invalid/x.git")
    with pytest.raises(PublishError, match="cannot be read"):
        publish(here.store)
    assert "-o BatchMode=yes" in (tmp_path / "words").read_text()


# --- set-up that is wrong: exit code 2, nothing was tried -------------------------------------------------------------

def _no_user(folder):
    Path(os.environ["GIT_CONFIG_GLOBAL"]).write_text("[user]\nemail = person@example.invalid\n")     # git would guess the name


def _rebase(folder):
    (folder / ".git" / "rebase-merge").mkdir()


def _ahead(folder):
    (folder / "code.py").write_text("a = 3\n")
    git(folder, "commit", "-q", "-a", "-m", "work in progress")


WRONG = {
    "detached": (lambda folder: git(folder, "checkout", "-q", "--detach"), "HEAD is detached"),
    "no repository": (lambda folder: shutil.rmtree(folder / ".git"), "not in a git repository"),
    "no commit": (lambda folder: git(folder, "checkout", "-q", "--orphan", "empty"), "has no commit yet"),
    "no user name": (_no_user, "does not know who commits"),
    "rebase": (_rebase, "a rebase is in progress"),
    "merge": (lambda folder: (folder / ".git" / "MERGE_HEAD").write_text("x"), "a merge is in progress"),
    "unknown remote": (lambda folder: git(folder, "config", "branch.main.remote", "gone"), "the remote gone of the branch main"),
    "no branch there": (lambda folder: git(folder, "checkout", "-q", "-b", "fresh"), "has no branch fresh"),
    "commits of the user": (_ahead, "1 commits of main are not on origin"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_set_up_is_named_and_nothing_is_tried(here, command, remote, how):
    prepare, message = WRONG[how]
    prepare(here.folder)
    repository = (here.folder / ".git").exists()
    before = state(here.folder, remote) if repository and how != "no commit" else None
    done = command()
    assert (done.code, message in done.err) == (2, True), done.err
    assert before is None or state(here.folder, remote) == before
    assert tags(remote) == [] and here.store.read()[1] == b"model 1"


def test_a_missing_git_and_a_name_that_gto_does_not_know_are_wrong_set_ups(here, command, monkeypatch, tmp_path):
    assert "cannot be the name of an artifact" in command("--name=--upload-pack=x").err
    assert command("--name", "a b").code == command("--name", "").code == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command()
    assert done.code == 2 and "git is not installed" in done.err


# --- refusals and failures: exit code 1, everything as before ---------------------------------------------------------

def _hang(here, remote):
    git(here.folder, "config", "protocol.ext.allow", "always")
    git(here.folder, "remote", "set-url", "origin", "ext::sh -c sleep% 60")


REFUSED = {
    "protected branch": (lambda here, remote: write_hook(remote, "pre-receive", "echo main is protected >&2; exit 1"), "main is protected"),
    "one tag refused": (lambda here, remote: write_hook(remote, "update", 'case "$1" in *production*) echo no stages >&2; exit 1;; esac'),
                        "no stages"),
    "pre-commit": (lambda here, remote: write_hook(here.folder / ".git", "pre-commit", "echo too large >&2; exit 1"),
                   "the hook pre-commit refuses the commit: too large"),
    "commit-msg": (lambda here, remote: write_hook(here.folder / ".git", "commit-msg", "echo no ticket >&2; exit 1"), "no ticket"),
    "pre-push": (lambda here, remote: write_hook(here.folder / ".git", "pre-push", "echo tests fail >&2; exit 1"), "tests fail"),
    "unreachable": (lambda here, remote: git(here.folder, "remote", "set-url", "origin", "/nowhere.git"), "cannot be read"),
    "link": (lambda here, remote: (here.store.production / "x.json").symlink_to("/etc/passwd"), "is a symbolic link"),
    "pipe": (lambda here, remote: os.mkfifo(here.store.production / "x.json"), "is not a regular file"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_refused_publication_leaves_no_tag_and_no_commit_and_the_next_one_publishes_it(here, command, remote, how):
    prepare, message = REFUSED[how]
    address = git(here.folder, "remote", "get-url", "origin")
    before = state(here.folder, remote)
    prepare(here, remote)
    done = command()
    assert (done.code, message in done.err) == (1, True), done.err
    (here.store.production / "x.json").unlink(missing_ok=True)
    assert state(here.folder, remote) == before
    for hooks in (remote / "hooks", here.folder / ".git" / "hooks"):
        shutil.rmtree(hooks, ignore_errors=True)
    git(here.folder, "remote", "set-url", "origin", address)
    assert command().code == 0 and len(tags(remote)) == 2


def test_a_remote_that_hangs_ends_at_the_time_limit_with_its_processes(here, remote):
    _hang(here, remote)
    begin = time.monotonic()
    with pytest.raises(PublishError, match="did not end within 1 seconds"):
        publish(here.store, seconds=1)
    assert time.monotonic() - begin < 10
    assert "sleep 60" not in run("/", "ps", "-eo", "args")


def test_a_commit_msg_hook_may_change_the_message(here, remote):
    write_hook(here.folder / ".git", "commit-msg", 'echo "Ticket: 7" >> "$1"')
    publish(here.store)
    assert git(remote, "log", "-1", "--format=%B", "main").endswith("Ticket: 7")


# --- two clones -------------------------------------------------------------------------------------------------------

def _push_code(folder, text, name="code.py"):
    (folder / name).write_text(text)
    git(folder, "add", name)
    git(folder, "commit", "-q", "-m", f"Change {name}")
    git(folder, "push", "-q")


def test_what_others_have_pushed_is_kept_below_the_commit_and_arrives_in_the_working_tree(here, clone, remote):
    _push_code(clone("other"), "a = 5\n")
    publish(here.store)
    assert git(remote, "log", "--format=%s", "main").splitlines()[1:] == ["Change code.py", "First"]
    assert (here.folder / "code.py").read_text() == "a = 5\n" and git(here.folder, "status", "--porcelain") == ""


def test_a_push_in_between_is_a_reason_to_try_again(here, clone, remote):
    other = clone("other")
    script = f"""test -e {other}/done && exit 0
touch {other}/done; unset GIT_DIR; cd {other} && echo 'a = 6' > code.py && git commit -q -a -m 'In between' && git push -q"""
    write_hook(here.folder / ".git", "pre-push", script)
    assert publish(here.store).pushed
    assert git(remote, "log", "--format=%s", "main").splitlines()[1:] == ["In between", "First"]
    assert tags(remote) == tags(here.folder) and len(tags(remote)) == 2
    git(remote, "fsck", "--strict")


def test_two_clones_that_publish_at_the_same_time_both_arrive(clone, remote):
    stores = {}
    for name in ("btc", "eth"):
        stores[name] = ModelStore(clone(name) / name, clock=lambda: NOON)
        stores[name].promote(name.encode(), GATE)
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda name: publish(stores[name], artifact=name), stores))
    assert all(result.pushed for result in results)
    assert sorted(tags(remote)) == ["btc#production#1", "btc@v1.0.0", "eth#production#1", "eth@v1.0.0"]
    assert git(remote, "rev-list", "--count", "main") == "3" and git(remote, "rev-list", "--merges", "main") == ""
    assert {name.split("/")[0] for name in git(remote, "ls-tree", "-r", "--name-only", "main").split()} >= set(stores)


def test_another_change_of_the_same_store_is_a_conflict_and_changes_nothing(here, clone, command, remote):
    other = ModelStore(clone("other") / "models", clock=lambda: NOON)
    other.promote(b"another model", GATE)
    publish(other)
    before = state(here.folder, remote)[1:]
    done = command()
    assert done.code == 1 and "another clone has published from this store" in done.err, done.err
    assert state(here.folder, remote)[1:] == before and here.store.read()[1] == b"model 1"
    assert "ml-ensemble@v1.0.0" in tags(remote) and git(remote, "show", "main:models/production/production_ensemble.pkl") == "another model"


def test_a_new_store_with_the_numbers_of_an_older_one_is_not_published_under_its_tags(here, command, remote):
    publish(here.store)
    shutil.rmtree(here.store.root)
    here.store.promote(b"begun again", GATE)
    before = state(here.folder, remote)
    done = command()
    assert done.code == 1 and "was published from another store" in done.err and state(here.folder, remote) == before
    assert command("--name", "second").code == 0
    assert [tag for tag in tags(remote) if "second" in tag] == ["second@v1.0.0", "second#production#1"]


def test_a_local_tag_whose_number_another_clone_has_published_is_a_conflict(here, clone, command, remote):
    assert command("--no-push").code == 0
    other = ModelStore(clone("other") / "models", clock=lambda: NOON)
    other.promote(b"another model", GATE)
    publish(other)
    before = state(here.folder, remote)
    done = command()
    assert done.code == 1 and "Another clone has published a version with this number" in done.err
    refs = lambda text: [line for line in text.splitlines() if "remotes" not in line]
    after = state(here.folder, remote)
    assert refs(after[0]) == refs(before[0]) and after[1:] == before[1:]


def test_changes_of_the_user_are_not_overwritten_by_what_others_have_pushed(here, clone, command, remote):
    _push_code(clone("other"), "a = 5\n")
    (here.folder / "code.py").write_text("my work\n")
    done = command()
    assert done.code == 1 and "the working tree cannot follow" in done.err, done.err
    assert tags(remote) == [] and (here.folder / "code.py").read_text() == "my work\n"
    git(here.folder, "checkout", "-q", "code.py")
    assert command().code == 0


def test_a_clone_that_could_not_follow_after_the_push_follows_at_the_next_publication(here, command, remote):
    hook = write_hook(here.folder / ".git", "reference-transaction",
                      'test "$1" = prepared && grep -q refs/heads/main && exit 1; exit 0')
    done = command()
    assert done.code == 0 and "could not follow" in done.out and len(tags(remote)) == 2
    hook.unlink()
    assert "Nothing to publish" in command().out and git(remote, "rev-list", "--count", "main") == "2"
    assert git(here.folder, "rev-parse", "HEAD") == git(remote, "rev-parse", "main") and git(here.folder, "status", "--porcelain") == ""


def test_a_partial_clone_as_in_the_workflow_publishes(clone, remote):
    git(remote, "config", "uploadpack.allowFilter", "true")
    folder = clone("partial", "--filter=blob:none")
    store = ModelStore(folder / "models", clock=lambda: NOON)
    store.promote(b"model 1", GATE)
    assert publish(store).pushed and len(tags(remote)) == 2


# --- Git LFS ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def lfs(remote, clone):
    """Clones of a repository that keeps models in Git LFS."""
    assert shutil.which("git-lfs"), "git-lfs is not installed: run `apt-get install git-lfs`, as the README says"
    first = clone("lfs-first")
    shutil.copy(ROOT / ".gitattributes", first)
    git(first, "add", ".gitattributes")
    git(first, "commit", "-q", "-m", "Attributes")
    git(first, "push", "-q")

    def make(name, *words, install=True):
        folder = clone(name, *words)
        if install:
            git(folder, "lfs", "install", "--local")
        return folder
    return make


def model_bytes(weight):
    payload = hand_made_payload()
    return restore_ensemble(payload | {"max_age_days": 14.0 + weight}).to_bytes()


def lfs_objects(folder):
    return sorted(path.name for path in (folder / "lfs" / "objects").rglob("*") if path.is_file())


@pytest.fixture
def published(lfs):
    """Three versions, published by a clone."""
    folder = lfs("maker")
    store = ModelStore(folder / "models")
    for weight in range(3):
        store.promote(model_bytes(weight), {**GATE, "created_at": "2025-01-01T00:00:00Z"})
        publish(store)
    return SimpleNamespace(folder=folder, store=store)


def test_models_are_pointers_in_git_and_their_objects_are_on_the_remote(published, remote):
    text = git(remote, "show", "main:models/production/production_ensemble.pkl")
    assert text.startswith("version https://git-lfs.github.com/spec/v1") and published.store.current()["sha256"] in text
    assert len(lfs_objects(remote)) == 3
    assert git(published.folder, "status", "--porcelain") == ""
    git(published.folder, "lfs", "fsck")


def test_a_clone_without_content_reports_pointers_and_a_pull_of_production_alone_is_enough_to_predict(published, lfs, monkeypatch):
    monkeypatch.setenv("GIT_LFS_SKIP_SMUDGE", "1")
    folder = lfs("reader")
    store = ModelStore(folder / "models")
    with pytest.raises(LFSPointerError, match="git lfs pull"):
        ProductionEnsemble(store=store)
    git(folder, "lfs", "pull", "--include", "models/production/*")
    assert lfs_objects(folder / ".git") == [published.store.current()["sha256"]]      # nothing of the archive
    model = ProductionEnsemble(store=store)
    rows = np.array(hand_made_payload()["canary"]["features"])
    assert np.array_equal(model.predict_proba(rows), ProductionEnsemble(store=published.store).predict_proba(rows))
    assert model.get_model_info()["version"] == published.store.current()["version"]


def test_a_weekly_job_with_production_alone_promotes_and_publishes_and_a_full_clone_has_all_objects(published, lfs, monkeypatch, remote):
    monkeypatch.setenv("GIT_LFS_SKIP_SMUDGE", "1")
    folder = lfs("weekly")
    git(folder, "lfs", "pull", "--include", "models/production/*")
    store = ModelStore(folder / "models")
    store.promote(model_bytes(7), {**GATE, "created_at": "2025-01-08T00:00:00Z"})
    assert publish(store).pushed
    assert len(lfs_objects(folder / ".git")) == 2 and len(lfs_objects(remote)) == 4
    monkeypatch.delenv("GIT_LFS_SKIP_SMUDGE")
    full = ModelStore(lfs("full") / "models")
    git(full.root.parent, "lfs", "pull")
    assert [full.read(version)[0]["version"] for version in full.versions()] == store.versions() and len(store.versions()) == 4
    git(full.root.parent, "lfs", "fsck")


def test_a_clone_with_a_pre_push_hook_of_its_own_instead_of_that_of_git_lfs_still_uploads_the_objects(lfs, remote):
    folder = lfs("own-hook")
    write_hook(folder / ".git", "pre-push", "exit 0")
    store = ModelStore(folder / "models")
    store.promote(model_bytes(0), GATE)
    publish(store)
    assert lfs_objects(remote) == [store.current()["sha256"]]


def test_without_git_lfs_nothing_is_stored_as_a_whole_in_git(lfs, remote, monkeypatch, tmp_path):
    folder = lfs("unprepared", install=False)
    store = ModelStore(folder / "models")
    store.promote(model_bytes(0), GATE)
    with pytest.raises(ConfigError, match="git lfs install --local"):
        publish(store)
    only_git = tmp_path / "only-git"
    only_git.mkdir()
    (only_git / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(only_git))
    with pytest.raises(ConfigError, match="git-lfs is not installed"):
        publish(store)
    assert tags(remote) == []


def test_an_upload_that_fails_leaves_no_tag_and_no_commit(lfs, remote):
    folder = lfs("upload")
    store = ModelStore(folder / "models")
    store.promote(model_bytes(0), GATE)
    (remote / "lfs").write_text("not a folder")
    before = state(folder, remote)
    with pytest.raises(PublishError, match="git lfs failed"):
        publish(store)
    assert state(folder, remote) == before
    (remote / "lfs").unlink()
    assert publish(store).pushed


def test_the_weekly_workflow_fetches_the_model_in_production_alone_and_publishes():
    import yaml
    job = yaml.safe_load((ROOT / ".github/workflows/weekly-retrain.yml").read_text())["jobs"]["retrain"]
    checkout = next(step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/checkout"))
    assert checkout["lfs"] is False and checkout["fetch-depth"] == 0
    steps = "\n".join(step.get("run", "") for step in job["steps"])
    assert "make fetch-production" in steps and "ml-ensemble publish" in steps and "git push" not in steps
    assert 'git lfs pull --include "models/production/*"' in (ROOT / "Makefile").read_text()
