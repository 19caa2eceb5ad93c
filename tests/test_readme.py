"""The README is correct: every code block runs as written and in order, and each exit code can be met."""
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import hand_made_payload
from ml_ensemble import ModelStore, cli as command_line
from ml_ensemble.config import load_settings
from ml_ensemble.ensemble import restore_ensemble
from scratch import PYTHON, ROOT, clean_environment, copy_repository, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(README[:match.start()].count("\n") + 2, match[1], match[2])
          for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)]
# What a block may not do inside the tests, because it would run them again, install, or take minutes: `make` only shows it.
ONLY_SHOWN = ("test", "install", "bench", "notebooks", "lock", "clean")
NEEDS_NETWORK = "ccxt:"        # a block with such a source is not run: its commands and options are looked up
# A retrain in seconds, by settings the README documents; the gate stays as configured.
QUICK = {f"ML_ENSEMBLE_{name}": value for name, value in {
    "VALIDATION__N_SPLITS": "2", "EVALUATION__REPLICATIONS": "100", "AUDIT__CUTS": "1",
    **{f"LEARNERS__{name}__N_ESTIMATORS": "10" for name in ("LIGHTGBM", "XGBOOST", "RANDOM_FOREST")},
    **{f"LEARNERS__{name}__LEARNING_RATE": "0.2" for name in ("LIGHTGBM", "XGBOOST")}}.items()}


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository whose `.venv` is this environment, and a `make` that only shows some targets."""
    folder = copy_repository(tmp_path / "clone")
    (folder / ".venv").mkdir()
    for part in Path(PYTHON).parent.parent.iterdir():
        if part.name != ".installed":
            (folder / ".venv" / part.name).symlink_to(part)
    (folder / ".venv/.installed").touch()                  # newer than the lock: nothing is to be installed
    make = tmp_path / "bin/make"
    make.parent.mkdir()
    make.write_text(f"""#!/bin/sh
for word; do case "$word" in test-*|{'|'.join(ONLY_SHOWN)}) exec {shutil.which('make')} --dry-run "$@";; esac; done
exec {shutil.which('make')} "$@"
""")
    make.chmod(0o755)
    return folder


def variables(clone, **more):
    path = f"{clone.parent / 'bin'}:{Path(PYTHON).parent}:{os.environ['PATH']}"
    return clean_environment() | {"PATH": path} | more


@pytest.mark.slow
def test_every_code_block_runs_as_written_and_in_order(clone, monkeypatch):
    assert {language for _, language, _ in BLOCKS} == {"bash", "python", "text"} and len(BLOCKS) >= 5
    monkeypatch.chdir(clone)
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    names, printed = {"__name__": "readme"}, ""
    for line, language, block in BLOCKS:
        if language == "text":
            assert block in printed, f"README.md, line {line} is not printed"
        elif NEEDS_NETWORK in block:
            continue
        elif language == "bash":
            done = run("bash", "-e", "-o", "pipefail", "-c", block, cwd=clone, env=variables(clone, **QUICK))
            assert done.returncode == 0, f"README.md, line {line}:\n{block}\n{done.stdout}{done.stderr}"
            printed += re.sub(r" +$", "", done.stdout, flags=re.M)
        else:
            source = f"<README.md, line {line}>"           # inspect finds the source of functions by this name
            linecache.cache[source] = (len(block), None, block.splitlines(keepends=True), source)
            exec(compile(block, source, "exec"), names)
    for words in ("is in production", "weighted F1", "Report:", "Dry run: nothing was written."):
        assert words in printed
    assert "check_export.py" in printed and "-m pytest" in printed           # the recipe of `make test`, shown
    assert (clone / "models/production/production_ensemble.pkl").exists()
    assert sorted(path.suffix for path in (clone / "models/reports").glob("weekly_*")) == [".html", ".ipynb"]
    assert len(list((clone / "dist").glob("*.whl"))) == 1
    assert names["decision"].reason == "" and names["decision"].decision in ("buy", "hold")


def test_files_that_are_only_shown_exist_and_so_do_the_commands_of_the_tables():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert set(ONLY_SHOWN) <= targets
    assert set(re.findall(r"`make ([a-z-]+)`", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.M)) <= targets
    helped = run(PYTHON, "-m", "ml_ensemble.cli", "--help").stdout
    commands = set(re.findall(r"`ml-ensemble ([a-z]+)", README))
    assert commands and all(re.search(rf"\b{command}\b", helped) for command in commands)


def test_commands_that_need_a_network_exist_with_their_options():
    commands = [line.split() for _, _, block in BLOCKS if NEEDS_NETWORK in block for line in block.splitlines()]
    assert commands
    for program, command, *words in commands:
        helped = run(PYTHON, "-m", "ml_ensemble.cli", command, "--help").stdout
        assert program == ".venv/bin/ml-ensemble"
        assert all(word in helped for word in words if word.startswith("--"))
        settings = [text for option, text in zip(words, words[1:]) if option == "--set"]
        source = next(word for word in words if word.startswith(NEEDS_NETWORK))
        assert load_settings([f"data.source={source}", *settings]).data.source == source


@pytest.mark.parametrize(("user", "flag"), [("0", True), ("1000", False)])
def test_make_lab_allows_root_only_to_root_and_passes_arguments_on(tmp_path, user, flag):
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (tmp_path / "id").chmod(0o755)
    (tmp_path / "jupyter").write_text('#!/bin/sh\necho jupyter "$@"\n')
    (tmp_path / "jupyter").chmod(0o755)
    (tmp_path / "python").symlink_to(PYTHON)
    done = run("make", "--old-file=.venv/.installed", f"BIN={tmp_path}", "lab", "ARGS=--port 9000", cwd=ROOT,
               env=clean_environment(PATH=f"{tmp_path}:{os.environ['PATH']}"))
    words = done.stdout.splitlines()[-1].split()
    assert words[:4] == ["jupyter", "lab", "--notebook-dir", "nbs"] and words[-2:] == ["--port", "9000"]
    assert ("--allow-root" in words) == flag


COIN = """
import random
from ml_ensemble.custom_features import custom_feature

@custom_feature(window=[0, 0], unit="ratio")
def coin(bars):
    "another number each time"
    return random.random()
"""


def interrupted(words, folder):
    """Exit code of a command that receives SIGTERM when it has begun."""
    running = subprocess.Popen([PYTHON, "-m", "ml_ensemble.cli", *words], cwd=folder, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    assert running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    return running.returncode


def output_fails(where, *words):
    """Exit code of a command whose output goes where it cannot be written."""
    return run("bash", "-c", f'"$@" {where}; exit ${{PIPESTATUS[0]}}', "bash", PYTHON, "-m", "ml_ensemble.cli", *words).returncode


@pytest.mark.slow
def test_each_exit_code_of_the_readme_occurs_and_no_others_exist(tmp_path, monkeypatch):
    documented = {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.+) \|$", README, re.M)}
    (tmp_path / "a_coin.py").write_text(COIN)
    monkeypatch.syspath_prepend(tmp_path)                  # as PYTHONPATH does
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path / "models"))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["ml-ensemble", *words])
        return command_line.run_command(as_json=False)

    for _ in range(2):
        ModelStore().promote(restore_ensemble(hand_made_payload()).to_bytes(),
                             {"data": {"market": "sandbox", "source": "sandbox", "to": "2020-01-01T00:00:00+00:00"}})
    audit = ["audit", "--days", "100", "--set", "n_estimators=2", "--set", "n_splits=2", "--set", "cuts=1"]
    absent = ("rollback", "--reason", "x", "--to", "20200101-0001")
    seen = {call("history"): "done", call(*absent): "failed", call("history", "--limit", "0"): "wrong call",
            call(*audit, "--set", "features.custom=[a_coin:coin]"): "`audit` found a leak",
            call("monitor", "check"): "an alarm about the live model is open",
            interrupted(audit, tmp_path): "interrupted",
            output_fails("| true", "history"): "the reader of the output closed it",
            output_fails("> /dev/full", "rollback", "--reason", "x"): "production was changed as requested"}
    assert set(documented) == set(seen)
    assert all(text in documented[code] for code, text in seen.items())
