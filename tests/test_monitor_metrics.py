"""The live model as metrics: what Prometheus reads is what the state holds, and the dashboard asks for nothing else."""
import itertools
import json
import math
import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

import monitored
from ml_ensemble.cli import app
from ml_ensemble.config import load_settings
from ml_ensemble.core import ConfigError, dashboard_file
from ml_ensemble.live_alarms import LiveQuality, live_state, record_conditions
from ml_ensemble.monitor_database import ALARMS
from ml_ensemble.monitor_metrics import metrics_text, read_open_alarms
from ml_ensemble.monitor_update import open_database
from ml_ensemble.run_settings import get_market


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("monitored")


@pytest.fixture(scope="module")
def found(folder):
    """A state, its database, and the alarms that it opened."""
    store, settings = monitored.make_store(folder), load_settings([*monitored.SETTINGS, *monitored.words_of(folder)])
    database = open_database(settings, store)
    state = live_state(store, settings, database, get_market(settings))
    return state, database, record_conditions(database, state, settings).open


def read(text: str) -> dict:
    """The value of each series, by its name and its labels other than the market."""
    return {(sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "market")): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture(scope="module")
def series(found):
    return read(metrics_text(found[0], found[2]))


def test_every_value_is_that_of_the_state(found, series):
    state = found[0].to_dict()
    figures = {"log_loss": ("log_loss", ""), "skill": ("skill", "_ratio"), "weighted_f1": ("weighted_f1", "_ratio"),
               "calibration_error": ("calibration_error", "_ratio"), "hit_rate": ("hit", "_ratio"), "net_return": ("net_return", "_ratio")}
    for name, (metric, unit) in figures.items():
        for part, value in zip(("", "_low", "_high"), state["newest"][name]):
            assert series.get((f"ml_ensemble_window_{metric}{part}{unit}",)) == value, (name, part)
    for test in state["tests"]:
        for part, key in (("log_evidence", "log_e"), ("log_evidence_limit", "limit"), ("gain", "mean"), ("gain_low", "low"),
                          ("compared_bars", "bars")):
            assert series.get((f"ml_ensemble_test_{part}", test["against"])) == test[key], (test["against"], key)
    assert series["ml_ensemble_predictions_total",] == state["predictions"] == monitored.BARS - monitored.FIRST
    assert series["ml_ensemble_settled_predictions_total",] == state["settled"] > 0
    assert series["ml_ensemble_model_age_seconds",] == state["quality"]["age_days"] * 86400
    assert series["ml_ensemble_model_info", state["version"]] == 1
    lights = {name: series["ml_ensemble_light", name] for name in ("green", "yellow", "red")}
    assert lights.pop(state["light"]) == 1 and set(lights.values()) == {0}


def test_alarms_are_counted_by_kind_and_a_kind_without_one_is_0(found, series):
    state, database, opened = found
    assert [alarm["kind"] for alarm in read_open_alarms(database, state.market)] == [alarm["kind"] for alarm in opened] == ["age"]
    count = {key[1]: value for key, value in series.items() if key[0] == "ml_ensemble_open_alarms"}
    assert count.pop("age") == 1 and set(count.values()) == {0} and {"skill", "drift", "silent"} <= set(count)


def test_the_drift_of_a_feature_is_that_of_its_newest_complete_windows(found, series):
    table = found[0].drift["inputs"].table
    for name, rows in table.groupby("feature"):
        newest = max(rows.loc[rows["end"] == table.loc[table["length"] == length, "end"].max(), "ratio"].max()
                     for length in table["length"].unique())
        assert series["ml_ensemble_drift_ratio", name, "inputs"] == newest


def test_what_is_not_known_has_no_series(found):
    unknown = LiveQuality(bars=0, missing=0, silent=0, abstaining=0, late=0, newest_delay_minutes=None, latency_us=None, age_days=None)
    nothing = found[0].rows.take([False] * len(found[0].rows))
    state = replace(found[0], quality=unknown, rows=nothing, newest=replace(found[0].newest, bars=0, figures={}), tests=[], drift={})
    names = {key[0] for key in read(metrics_text(state))}
    assert not names & {"ml_ensemble_model_age_seconds", "ml_ensemble_prediction_delay_seconds", "ml_ensemble_decision_latency_seconds"}
    assert not [name for name in names if "skill" in name or "test_" in name or "drift" in name]
    known = read(metrics_text(replace(state, quality=replace(unknown, latency_us=120.0, newest_delay_minutes=2.0))))
    assert known["ml_ensemble_decision_latency_seconds",] == 0.00012 and known["ml_ensemble_prediction_delay_seconds",] == 120


def test_names_follow_the_rules_of_prometheus(found):
    families = list(text_string_to_metric_families(metrics_text(found[0], found[2])))
    for family in families:
        assert re.fullmatch(r"ml_ensemble_[a-z0-9]+(_[a-z0-9]+)*", family.name) and family.documentation.endswith(".")
        names = {sample.name for sample in family.samples}
        assert {name.endswith("_total") for name in names} == {family.type == "counter"}
        assert not re.search(r"minutes|hours|days|_us|_ms|percent|gauge|counter|_(sum|count|bucket)$", family.name)
        assert all(sample.labels["market"] == found[0].market and math.isfinite(sample.value) for sample in family.samples)
        assert all(sample.timestamp is None for sample in family.samples)          # the textfile collector refuses them
    assert sum(len(family.samples) for family in families) < 100


def test_a_market_with_quotes_and_new_lines_is_read_back(found):
    market = 'bitbank:"BTC/JPY"\\\n4h'
    families = text_string_to_metric_families(metrics_text(replace(found[0], market=market)))
    assert {sample.labels["market"] for family in families for sample in family.samples} == {market}


def test_the_command_prints_or_writes_them_and_changes_nothing(folder, found, monkeypatch):
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(folder / "models"))
    call = lambda *words: CliRunner().invoke(app, ["monitor", "metrics", *words, *monitored.options_of(folder)])
    before = found[1].read(ALARMS)
    printed = call()
    assert printed.exit_code == 0, printed.output
    target = folder / "live.prom"
    assert call("--to", str(target)).exit_code == 0
    ageing = re.compile(r"^ml_ensemble_model_age_seconds.*$", re.M)
    expected = ageing.sub("", metrics_text(found[0], found[2]))
    assert ageing.sub("", target.read_text()) == ageing.sub("", printed.output) == expected
    assert [path.name for path in folder.glob("live*")] == ["live.prom"]
    assert found[1].read(ALARMS).equals(before)
    wrong = call("--to", str(folder / "live.txt"))
    assert isinstance(wrong.exception, ConfigError) and ".prom" in wrong.exception.remedy


# --- the dashboard ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(dashboard_file().read_text())


def test_every_metric_and_label_of_the_dashboard_exists(found, dashboard):
    newest = replace(found[0].newest, figures={**found[0].newest.figures, "hit_rate": (0.5, 0.4, 0.6)})      # there was no buy
    state = replace(found[0], newest=newest, quality=replace(found[0].quality, latency_us=1.0, newest_delay_minutes=1.0))
    labels = {sample.name: set(sample.labels) for family in text_string_to_metric_families(metrics_text(state, found[2]))
              for sample in family.samples}
    used = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"ml_ensemble_\w+", target["expr"])
            used |= set(names)
            assert names and set(names) <= set(labels), target["expr"]
            assert target["expr"].count('{market="$market"}') == len(names)
            joined = {name.strip() for group in re.findall(r"(?:on|by)\s*\((.*?)\)", target["expr"]) for name in group.split(",")}
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(joined | shown <= labels[name] for name in names), target
    variable = next(item for item in dashboard["templating"]["list"] if item["name"] == "market")
    assert re.fullmatch(r"label_values\((\w+), market\)", variable["definition"])[1] in labels
    assert {"ml_ensemble_light", "ml_ensemble_open_alarms", "ml_ensemble_test_log_evidence", "ml_ensemble_window_skill_ratio",
            "ml_ensemble_window_net_return_ratio", "ml_ensemble_decision_latency_seconds", "ml_ensemble_missing_bars",
            "ml_ensemble_drift_ratio"} <= used


def test_the_panels_have_numbers_of_their_own_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["description"] and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    cells = [(x, y) for place in (panel["gridPos"] for panel in panels)
             for x, y in itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))]
    assert len(cells) == len(set(cells))


def test_the_dashboard_belongs_to_no_installation_and_no_date(dashboard):
    assert dashboard["uid"] and dashboard["schemaVersion"] >= 41 and "id" not in dashboard
    assert dashboard["time"] == {"from": "now-30d", "to": "now"}
    kinds = {item["name"]: item["type"] for item in dashboard["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "market": "query"}
    sources = [part["datasource"]["uid"] for panel in dashboard["panels"] for part in (panel, *panel["targets"])]
    assert set(sources) == {"${datasource}"}
    assert not re.search(r"20\d\d-\d\d-\d\d|https?://", json.dumps(dashboard))


def test_the_command_prints_the_dashboard(dashboard):
    done = CliRunner().invoke(app, ["monitor", "metrics", "--dashboard"])
    assert done.exit_code == 0 and json.loads(done.output) == dashboard
