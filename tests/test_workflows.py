"""The workflows: valid, careful with secrets, and their steps executed in order against a remote, an exchange and a receiver of alerts."""
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

import monitored
from conftest import TINY
from ml_ensemble import ModelStore
from ml_ensemble.candles import OHLCV
from ml_ensemble.config import load_settings
from ml_ensemble.monitor_database import PREDICTIONS, MonitorDatabase
from scratch import clean_environment
from test_exchange import PLACES, STEP, Server
from test_retrain_weeks import REDIRECT, WEEK

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SECRET = "-".join(("t0p", "s3cr3t", "t0ken"))      # not as a word: the remote holds this file as well
SETTINGS = (*TINY, "n_splits=2", "replications=100", "audit.cuts=1", "labels.threshold=0.001", "champion_margin=1", "champion_min_rows=30",
            "allow_simulated=false", "champion_recipe_margin=1", f"data.source=ccxt:{PLACES['bitbank']}", "min_free_disk_mb=1",
            "max_age_days=2000")                      # the exchange lives in 2024


def test_the_workflows_are_valid_and_safe():
    schema = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS]
    zizmor = [Path(sys.executable).with_name("zizmor"), "--offline", "--no-progress", "--pedantic", *WORKFLOWS]
    for command in (schema, zizmor):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_is_a_pinned_action_or_a_command_of_this_project(path):
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for step in job["steps"]:
            if "run" in step:
                assert re.match(r"(make|\.venv/bin/ml-ensemble) [a-z-]+", step["run"]) and "${{" not in step["run"], step
                assert len(step["run"].splitlines()) == 1
            else:
                assert re.fullmatch(r"actions/[a-z/-]+@[0-9a-f]{40}", step["uses"]), step


def test_the_monitoring_reads_only_and_follows_the_close_of_each_bar():
    workflow = yaml.safe_load((ROOT / ".github/workflows/monitor.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {} and job["permissions"] == {"contents": "read"}
    minute, hours = workflow[True]["schedule"][0]["cron"].split()[:2]
    assert hours == "*/4" and 0 < int(minute) < 30 and workflow[True]["schedule"][0]["timezone"] == "Etc/UTC"
    uploads = [step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert uploads == ["models/monitor/*.html"]                        # neither database nor credentials
    secrets = [name for step in job["steps"] for name, value in step.get("env", {}).items() if "secrets." in value]
    assert {step["name"]: "!cancelled()" in step.get("if", "") for step in job["steps"]}["Report"]              # also after an alarm
    assert set(secrets) == {"ML_ENSEMBLE_ALERT_URLS", "PGPASSWORD"} and "secrets." not in str(job["env"])


def test_the_weekly_retrain_is_never_cancelled_and_ci_runs_the_tests():
    weekly = yaml.safe_load((ROOT / ".github/workflows/weekly-retrain.yml").read_text())
    triggers = weekly[True]                      # YAML 1.1 reads the key `on` as true
    assert triggers["schedule"][0]["cron"].split()[4] in "0123456" and triggers["schedule"][0]["timezone"] == "Etc/UTC"
    assert "workflow_dispatch" in triggers and weekly["concurrency"]["cancel-in-progress"] is False
    assert weekly["permissions"] == {} and weekly["jobs"]["retrain"]["permissions"] == {"contents": "write"}
    assert (ROOT / ".ci/run").read_text().count("make test") == 1
    assert "make test" in (ROOT / ".github/workflows/ci.yml").read_text()


# --- the steps, executed ----------------------------------------------------------------------------------------------


def git(folder, *words) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Actions:
    """A runner of workflows: a fresh clone of a local remote for each run, with the caches of the runs before."""

    def __init__(self, folder: Path, alerts: str):
        self.folder, self.alerts, self.number, self.output = folder, alerts, 0, ""
        self.exchange = Server("bitbank", bars=2100)
        self.exchange.now -= 2 * WEEK * STEP
        self.remote = folder / "remote.git"
        (folder / "path").mkdir()
        (folder / "path" / "sitecustomize.py").write_text(REDIRECT)
        self._make_remote(folder / "project")

    def _make_remote(self, project: Path) -> None:
        for name in git(ROOT, "ls-files").splitlines():
            if (ROOT / name).is_file():
                (project / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, project / name)
        (project / "config" / "week").mkdir()
        settings = json.loads(load_settings(SETTINGS).model_dump_json())
        (project / "config" / "week" / "base.yaml").write_text(yaml.safe_dump(settings))
        git(project, "init", "--quiet", "--initial-branch", "main")
        git(project, "add", "--force", ".")
        git(project, "commit", "--quiet", "--message", "The project")
        git(self.folder, "clone", "--quiet", "--bare", str(project), str(self.remote))

    def clone(self, name: str) -> Path:
        clone = self.folder / name
        subprocess.run(["git", "clone", "--quiet", self.remote.as_uri(), str(clone)], check=True,
                       env={**os.environ, "GIT_LFS_SKIP_SMUDGE": "1"})
        return clone

    def run(self, workflow: str, before_step=lambda name: None, without: tuple[str, ...] = (), **inputs) -> dict[str, int]:
        """Execute a workflow, but for some steps; returns the exit code of each step that ran."""
        self.number += 1
        clone = self.clone(f"run-{self.number}")
        (clone / ".venv").mkdir()
        (clone / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
        (clone / ".venv" / ".installed").touch()                                  # newer than the lock: nothing to install
        if (self.folder / "cache").exists():
            shutil.copytree(self.folder / "cache", clone / ".candles")
        self.summary = self.folder / f"summary-{self.number}.md"
        described = yaml.safe_load((ROOT / ".github/workflows" / f"{workflow}.yml").read_text())
        for job in described["jobs"].values():
            job["steps"] = [step for step in job["steps"] if step.get("name") not in without]
        codes = self._execute(clone, described, before_step, inputs)
        if (clone / ".candles").exists():
            shutil.copytree(clone / ".candles", self.folder / "cache", dirs_exist_ok=True)
        return codes

    def _execute(self, clone: Path, workflow: dict, before_step, inputs: dict) -> dict[str, int]:
        (job,), codes = workflow["jobs"].values(), {}
        values = {"github.workspace": str(clone), "secrets.ML_ENSEMBLE_ALERT_URLS": self.alerts,
                  "inputs.source || vars.ML_ENSEMBLE_SOURCE": inputs.get("source", ""), "inputs.settings": inputs.get("settings", ""),
                  "vars.ML_ENSEMBLE_SOURCE": "", "vars.ML_ENSEMBLE_MONITOR_DATABASE": "", "secrets.PGPASSWORD": ""}
        for step in (step for step in job["steps"] if "run" in step):
            condition = step.get("if", "")
            if any(codes.values()) and "cancelled" not in condition or re.search("PULL_REQUEST|MONITOR_DATABASE != ''", condition):
                continue                                                          # neither variable is set
            before_step(step["name"])
            given = {name: re.sub(r"\$\{\{ (.*?) \}\}", lambda match: values[match[1]], str(value))
                     for name, value in (job.get("env", {}) | step.get("env", {})).items()}
            environment = clean_environment(ML_ENSEMBLE_ENV="week", PYTHONPATH=str(self.folder / "path"), **given,
                                            LOCAL_EXCHANGE=self.exchange.url, GITHUB_STEP_SUMMARY=str(self.summary))
            done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=clone, capture_output=True, text=True, timeout=300,
                                  env=environment)
            codes[step["name"]] = done.returncode
            self.output += done.stdout + done.stderr
        return codes

    def history(self) -> list[dict]:
        """The events that the remote holds."""
        return [json.loads(line) for line in git(self.remote, "show", "main:models/archive/history.jsonl").splitlines()]

    def reports(self) -> list[str]:
        return re.findall(r"models/reports/\S+\.html", git(self.remote, "ls-tree", "-r", "--name-only", "main"))

    def lfs_objects(self) -> set[str]:
        return {path.name for path in (self.remote / "lfs/objects").rglob("*") if path.is_file()}


@pytest.fixture
def actions(tmp_path, monkeypatch, inbox):
    (tmp_path / "gitconfig").write_text("[user]\nname = A. Person\nemail = person@example.invalid\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("HOME", str(tmp_path))
    runner = Actions(tmp_path, f"json://{SECRET}@{inbox.address}/")
    yield runner
    runner.exchange.close()


@pytest.mark.slow
@pytest.mark.untraced
def test_a_month_of_the_weekly_workflow_arrives_at_the_remote(actions, inbox):
    good = {"Fetch the model in production": 0, "Install": 0, "Retrain": 0, "Publish": 0, "Diagnose": 0}

    assert actions.run("weekly-retrain") == good, actions.output                                          # a version
    (promotion,) = actions.history()
    version = promotion["version"]
    assert promotion["kind"] == "promotion" and len(actions.reports()) == 1 and not inbox
    assert git(actions.remote, "tag").split() == ["ml-ensemble#production#1", "ml-ensemble@v1.0.0"]
    assert version in git(actions.remote, "tag", "--list", "--format=%(contents)", "ml-ensemble#production#1")
    pointer = git(actions.remote, "show", "main:models/production/production_ensemble.pkl")
    assert re.search("oid sha256:(.*)", pointer)[1] in actions.lfs_objects()
    assert f"Version {version} is in production" in actions.summary.read_text()

    actions.exchange.now += WEEK * STEP
    assert actions.run("weekly-retrain", settings="min_samples=1000000 seed=3") == good, actions.output     # a refusal
    assert [event["kind"] for event in actions.history()] == ["promotion", "refusal"] and len(actions.reports()) == 2
    (alert,) = inbox
    assert alert["title"].startswith("ml_ensemble: not enough evidence") and "samples is" in alert["message"]
    assert f"Version {version} stays in production" in alert["message"] and "models/reports/" in alert["message"]
    assert "Nothing was promoted" in actions.summary.read_text() and "samples" in actions.summary.read_text()

    def someone_pushes(step):
        if step == "Publish":
            other = actions.clone("other")
            (other / "NOTES.md").write_text("meanwhile\n")
            git(other, "add", "NOTES.md")
            git(other, "commit", "--quiet", "--message", "Meanwhile")
            git(other, "push", "--quiet")
    assert actions.run("weekly-retrain", someone_pushes) == good, actions.output                         # a moved branch
    assert [event["kind"] for event in actions.history()] == ["promotion", "refusal", "promotion"]
    assert "NOTES.md" in git(actions.remote, "ls-tree", "--name-only", "main").split() and len(inbox) == 1

    actions.exchange.close()
    actions.exchange.now += 4 * WEEK * STEP                                                              # a failure
    codes = actions.run("weekly-retrain", settings="data.max_staleness=1")
    assert (codes["Retrain"], codes["Publish"]) == (1, 0), actions.output
    kinds = [event["kind"] for event in actions.history()]
    assert kinds == ["promotion", "refusal", "promotion", "failure"]
    assert inbox[1]["title"] == "ml_ensemble: the candles are out of date" and "What to do:" in inbox[1]["message"]
    assert "The retrain failed" in actions.summary.read_text()

    assert actions.run("retrain-overdue") == {"Install": 0, "Ask the history": 0}, actions.output
    assert git(actions.remote, "log", "--format=%an", "main").split()[:2] == ["weekly-retrain"] * 2
    assert SECRET not in actions.output + git(actions.remote, "log", "--all", "-p")
    names = subprocess.run(["grep", "-rlF", SECRET, actions.folder], capture_output=True, text=True).stdout
    assert names == ""


@pytest.mark.slow
@pytest.mark.untraced
def test_the_monitoring_workflow_fetches_every_version_that_was_live_and_fails_when_an_alarm_is_open(actions, inbox):
    clone = actions.clone("seed")
    (clone / ".venv").mkdir()
    (clone / ".venv/bin").symlink_to(Path(sys.executable).parent)
    candles = pd.DataFrame.from_dict(actions.exchange.rows, "index", columns=list(OHLCV))
    candles.index = pd.to_datetime(candles.index, unit="ms", utc=True)
    for stop in (1500, 1800):
        monitored.promote(ModelStore(clone / "models"), candles.iloc[:stop], PLACES["bitbank"], f"ccxt:{PLACES['bitbank']}")
    done = subprocess.run([".venv/bin/ml-ensemble", "publish"], cwd=clone, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stderr

    codes = actions.run("monitor", without=("Report",))                          # the page has tests of its own, and takes half a minute
    assert codes == {"Fetch the versions": 0, "Install": 0, "Update from candles": 0, "Check": 4}, actions.output
    (alert,) = inbox                       # the versions are no better than the prior on a random walk, against what their metadata say
    assert "ALARM against the validated gain" in alert["message"] and "What to do:" in alert["message"]
    found = MonitorDatabase(f"sqlite:///{actions.folder}/run-1/models/monitor/monitor.sqlite").read(PREDICTIONS, PLACES["bitbank"])
    assert found.groupby("stage")["version"].nunique().to_dict() == {"production": 2, "previous": 1, "baseline": 2}
    assert SECRET not in actions.output


@pytest.mark.slow
def test_on_a_protected_branch_the_job_publishes_on_its_own_branch_and_asks_for_a_merge(actions, monkeypatch):
    clone = actions.clone("protected")
    (clone / ".venv").mkdir()
    (clone / ".venv/bin").symlink_to(Path(sys.executable).parent)
    gh = actions.folder / "bin" / "gh"
    gh.parent.mkdir()
    gh.write_text('#!/bin/sh\necho "$@"\n')
    gh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gh.parent}:{os.environ['PATH']}")
    ModelStore(clone / "models").record("refusal", reason="skill is 0")

    def command(*words):
        done = subprocess.run(words, cwd=clone, capture_output=True, text=True, env=clean_environment())
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
    command("make", "retrain-branch")
    command(".venv/bin/ml-ensemble", "publish")
    assert command("make", "pull-request") == "pr create --fill"
    (branch,) = re.findall(r"retrain/\S+", git(actions.remote, "branch"))
    assert "skill is 0" in git(actions.remote, "show", f"{branch}:models/archive/history.jsonl")
    assert git(actions.remote, "log", "--format=%s", "main").strip() == "The project"


# --- other schedulers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented():
    """CRON, SERVICE and TIMER of the page."""
    cells = nbformat.read(ROOT / "nbs/schedule.ipynb", 4).cells
    names = {}
    for cell in cells:
        if cell.cell_type == "code" and re.match("CRON|SERVICE", cell.source):
            exec(cell.source, names)
    return names


@pytest.mark.slow
def test_the_documented_cron_line_runs_as_cron_would(documented, tmp_path):
    first, second = documented["CRON"].splitlines()
    assert re.match(r"17 3 \* \* 0  cd /srv/bot", first) and re.match(r"41 6 \* \* \*  cd /srv/bot", second)
    assert "%" not in documented["CRON"]                                     # cron takes it for a new line
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / "models").mkdir()
    for line, said in ((first.replace("retrain;", "retrain --dry-run;"), "not in a git repository"), (second, "no retrain is recorded")):
        command = line.split("  ", 1)[1].replace("/srv/bot", str(tmp_path))
        subprocess.run(["/bin/sh", "-c", command], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh",
                                                        "ML_ENSEMBLE_MODELS": str(tmp_path / "models")}, timeout=120)
        assert said in " ".join((tmp_path / "retrain.log").read_text().split())


def test_the_documented_units_are_valid(documented, tmp_path):
    settings = {}
    for name, text in (("service", documented["SERVICE"]), ("timer", documented["TIMER"])):
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read_string(text)
        settings |= {(name, section): dict(unit[section]) for section in unit.sections()}
    service, timer = settings["service", "Service"], settings["timer", "Timer"]
    assert service["MemoryMax"] == "1G" and service["CPUQuota"] == "100%" and service["Type"] == "oneshot"
    assert service["ExecStart"].endswith("/ml-ensemble retrain") and service["ExecStopPost"].endswith("/ml-ensemble publish")
    assert timer["Persistent"] == "true" and timer["OnCalendar"] == "Sun *-*-* 03:17:00 UTC"
    if shutil.which("systemd-analyze"):                                      # systemd's own opinion, where it is installed
        unit = tmp_path / "retrain.service"
        unit.write_text(documented["SERVICE"].replace("/srv/bot/.venv/bin/ml-ensemble", "/bin/true"))
        for command in (["calendar", timer["OnCalendar"]], ["verify", "--man=no", "--recursive-errors=no", str(unit)]):
            done = subprocess.run(["systemd-analyze", *command], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
