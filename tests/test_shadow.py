"""Deployment in stages: the comparison of forecasters, the log, the store, the bot beside the log, and the decision."""
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from ml_ensemble import ProductionEnsemble
from ml_ensemble.cli import app
from ml_ensemble.config import load_settings
from ml_ensemble.core import ConfigError, IntegrityError, LFSPointerError, SignatureError, StaleStoreError, StoreError, iso
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.forecast_comparison import bars_until_decided, compare_scores
from ml_ensemble.prediction_log import PredictionLog, PredictionRow, read_log
from ml_ensemble.recipe import new_learners, training_set
from ml_ensemble.remote_copies import pull_store, push_store
from ml_ensemble.retraining import IN_SHADOW, NO_NEW_BARS, retrain
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.shadow import judge_pairs, pair_predictions, promote_from_shadow, shadow_verdict
from ml_ensemble.signing import generate_key
from ml_ensemble.store_records import meaning_digest
from ml_ensemble.training import fit_all, make_ensemble
from ml_ensemble.versioning import ModelStore
from ml_ensemble.versions import version_table
from conftest import TINY, hand_made_payload

START = "2024-01-01T00:00:00Z"
ROW = PredictionRow("m", START, "20250901-0001", 1, "production", (0.4, 0.6), "buy")


# ---- the confidence sequence

def by_hand(old, new, alpha):
    """Limits after each bar by the formulas in plain Python, with bisection instead of Newton's steps."""
    shares = [0.02 * (0.9 / 0.02) ** (k / 15) for k in range(16)]
    psi = lambda x: (-math.log(1 - x) - x) / 1.25**2
    total = variance = 0.0
    lows = []
    for count, (a, b) in enumerate(zip(old, new), 1):
        centre = max(-0.25, min(0.25, total / count))
        total, variance = total + (a - b), variance + (a - b - centre) ** 2
        low, high = 0.0, 1e6
        while high - low > 1e-10:
            middle = (low + high) / 2
            exponents = [x / 1.25 * middle - psi(x) * variance for x in shares]
            top = max(exponents)
            inside = top + math.log(sum(math.exp(e - top) for e in exponents) / 16) < math.log(1 / alpha)
            low, high = (middle, high) if inside else (low, middle)
        lows.append((total - high) / count)
    return lows


def test_the_limits_are_those_of_the_formulas_worked_out_in_plain_python():
    rng = np.random.default_rng(1)
    old, new = rng.random(60), rng.random(60) * 0.8
    compared = compare_scores(old, new, alpha=0.1, sides=1)
    np.testing.assert_allclose(compared.low, by_hand(old, new, 0.1), atol=1e-8)
    np.testing.assert_allclose(compared.high, -np.array(by_hand(new, old, 0.1)), atol=1e-8)
    np.testing.assert_allclose(compare_scores(old, new, alpha=0.2).low, compared.low)


def test_three_streams_are_the_average_of_three_sequences_with_a_third_of_alpha_each():
    rng = np.random.default_rng(2)
    old, new = rng.random(90), rng.random(90)
    parts = [compare_scores(old[k::3], new[k::3], alpha=0.05 / 3, sides=1).low[-1] for k in range(3)]
    assert compare_scores(old, new, horizon=3, sides=1).low[-1] == pytest.approx(np.mean(parts))


def test_a_bar_more_never_changes_the_limits_of_earlier_bars():
    rng = np.random.default_rng(3)
    old, new = rng.random(200), rng.random(200)
    whole = compare_scores(old, new, horizon=2)
    for bars in (1, 2, 77):
        np.testing.assert_allclose(compare_scores(old[:bars], new[:bars], horizon=2).low, whole.low[:bars])


def test_the_true_mean_is_outside_at_any_bar_in_at_most_five_percent_of_autocorrelated_streams():
    missed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        mean = 0.1 * np.sin(np.arange(400) / 20 + rng.uniform(0, 6))              # conditional means, which change slowly
        mean = mean * np.where(np.cumsum(rng.normal(size=400)) > 0, 1, 0.5)
        difference = np.clip(mean + rng.uniform(-0.4, 0.4, 400), -1, 1)
        compared = compare_scores(np.maximum(difference, 0), np.maximum(-difference, 0))
        true = np.cumsum(mean) / np.arange(1, 401)
        missed += bool(((true < compared.low) | (true > compared.high)).any())
    assert missed <= 10


def test_the_bars_needed_are_where_the_limit_crosses_zero_on_a_stream_of_that_mean_and_deviation():
    rng = np.random.default_rng(5)
    crossings = []
    for _ in range(20):
        difference = np.clip(rng.normal(0.03, 0.15, 4000), -1, 1)
        crossings.append(int((compare_scores(np.maximum(difference, 0), np.maximum(-difference, 0), sides=1).low > 0).argmax()))
    assert 0.6 < np.median(crossings) / bars_until_decided(0.03, 0.15) < 1.4


# ---- the bot beside its shadow

@pytest.fixture
def bars():
    rng = np.random.default_rng(1)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, 200)))
    return pd.DataFrame({"open": close, "high": close * 1.01, "low": close * 0.99, "close": close, "volume": 5.0},
                        index=pd.date_range("2024-01-01", periods=200, freq="4h", tz="UTC"))


def wide_model() -> bytes:
    """The model of one unit, which predicts for any bar."""
    payload = hand_made_payload()
    width = len(payload["range"]["low"])
    return restore_ensemble({**payload, "range": {"low": [-1e9] * width, "high": [1e9] * width, "margin": 1.0}}).to_bytes()


@pytest.fixture
def store(tmp_path):
    kept = ModelStore(tmp_path / "models")
    kept.promote(wide_model(), FACTS)
    return kept


FACTS = {"classes": [0, 1], "data": {"market": "sandbox", "to": "2024-01-25T00:00:00+00:00", "interval_minutes": 240}}


def in_shadow(store, model=None, facts=FACTS):
    return store.start_shadow(store.stage(model or wide_model(), facts))["version"]


def decisions(ensemble, bars):
    return [ensemble.decide(*bar, time=moment) for moment, bar in zip(bars.index, bars.to_numpy())]


def test_production_and_shadow_are_logged_for_each_bar_and_the_decisions_are_those_without_a_log(store, bars, tmp_path):
    version = in_shadow(store)
    plain = ProductionEnsemble(store=store).warm_up(bars[:150])
    logged = ProductionEnsemble(store=store, prediction_log=tmp_path / "log.sqlite").warm_up(bars[:150])
    assert decisions(logged, bars[150:]) == decisions(plain, bars[150:])
    assert logged.log_status(10)["shadow"] == version
    rows = read_log(tmp_path / "log.sqlite")
    assert [row.stage for row in rows] == ["production", "shadow"] * 50
    assert all(one.probabilities == other.probabilities for one, other in zip(rows[::2], rows[1::2]))
    assert {row.sequence for row in rows} == {1}


def test_another_version_in_shadow_is_noticed_and_the_stream_goes_on_without_a_warm_up(store, bars, tmp_path):
    logged = ProductionEnsemble(store=store, prediction_log=tmp_path / "log.sqlite").warm_up(bars[:100])
    seen = []
    for number, (moment, bar) in enumerate(zip(bars.index[100:110], bars[100:110].to_numpy())):
        if number in (2, 5):
            seen.append(in_shadow(store))
        if number == 8:
            store.end_shadow("an example")
        logged.decide(*bar, time=moment)
        logged.log_status(10)
    rows = read_log(tmp_path / "log.sqlite")
    shadow, production = ({row.bar: row for row in rows if row.stage == stage} for stage in ("shadow", "production"))
    assert [row.version for row in shadow.values()] == [seen[0]] * 3 + [seen[1]] * 3
    assert all((row.probabilities, row.reason) == (production[bar].probabilities, production[bar].reason) for bar, row in shadow.items())
    assert sum(row.probabilities is not None for row in shadow.values()) >= 4, next(iter(shadow.values()))


def test_bars_that_were_dropped_from_the_queue_cost_those_bars_only(store, bars, tmp_path, monkeypatch):
    in_shadow(store)
    logged = ProductionEnsemble(store=store, prediction_log=tmp_path / "log.sqlite").warm_up(bars[:100])
    with monkeypatch.context() as patch:
        patch.setattr(PredictionLog, "submit", lambda log, job: None)          # dropped
        decisions(logged, bars[100:102])
    expected = decisions(ProductionEnsemble(store=store).warm_up(bars[:102]), bars[102:])
    decisions(logged, bars[102:])
    logged.log_status(10)
    shadow = [row for row in read_log(tmp_path / "log.sqlite") if row.stage == "shadow"]
    assert [row.probabilities for row in shadow] == [None if each.reason else each.probabilities for each in expected]


@pytest.mark.parametrize("fault", ["damaged", "pointer", "pickle", "folder", "no folder", "full"])
def test_no_fault_of_shadow_or_disk_changes_or_delays_a_decision(store, bars, tmp_path, fault):
    version, path = in_shadow(store), tmp_path / "log.sqlite"
    model = store.root / f"shadow/production_ensemble_{version}.pkl"
    if fault == "damaged":
        model.write_bytes(model.read_bytes()[:-5])
    elif fault == "pointer":
        model.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif fault == "pickle":
        in_shadow(store, b"cos\nsystem\n(S'touch stolen'\ntR.")
    elif fault == "folder":
        path.mkdir()
    elif fault == "no folder":
        path = tmp_path / "nowhere" / "log.sqlite"
    else:
        path = "/dev/full"
    expected = decisions(ProductionEnsemble(store=store).warm_up(bars[:150]), bars[150:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged = ProductionEnsemble(store=store, prediction_log=path).warm_up(bars[:150])
        assert decisions(logged, bars[150:]) == expected
        status = logged.log_status(10 if fault in ("damaged", "pointer", "pickle") else 0.5)
    assert status["dropped"] + status["faults"] > 0 and status["last_fault"]
    if fault in ("damaged", "pointer", "pickle"):
        assert len(read_log(path)) == 50                 # production is logged all the same


def test_a_log_is_for_the_version_in_production(store):
    with pytest.raises(ConfigError, match="prediction_log"):
        ProductionEnsemble(store.current()["version"], store=store, prediction_log="x")


# ---- the store

def test_a_version_in_shadow_is_read_with_the_guards_of_production(store, tmp_path):
    from ml_ensemble.versioning import read_shadow
    version = in_shadow(store)
    model = store.root / f"shadow/production_ensemble_{version}.pkl"
    whole = model.read_bytes()
    for content, error in ((whole[:-1], IntegrityError), (b"version https://git-lfs\n", LFSPointerError)):
        model.write_bytes(content)
        with pytest.raises(error):
            read_shadow(store)
        assert store.verify()
    outside = tmp_path / "outside.pkl"
    outside.write_bytes(whole)
    model.unlink()
    model.symlink_to(outside)
    with pytest.raises(IntegrityError):
        read_shadow(store)


def test_a_signed_store_refuses_an_unsigned_version_in_shadow(tmp_path):
    key = tmp_path / "key"
    public = generate_key(key)
    signed = ModelStore(tmp_path / "models", public_key=public, signing_key=key)
    model = wide_model()
    signed.promote(model, FACTS)
    version = in_shadow(signed)
    from ml_ensemble.versioning import read_shadow
    assert read_shadow(signed)[0]["version"] == version
    path = signed.root / f"shadow/production_model_metadata_{version}.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in facts.items() if name != "signature"}))
    with pytest.raises(SignatureError):
        read_shadow(signed)
    with pytest.raises(SignatureError):
        signed.promote_shadow(version)


def test_a_version_enters_shadow_is_replaced_promoted_and_never_pruned(store):
    first = in_shadow(store)
    for _ in range(8):
        store.stage(b"waiting", FACTS)
    assert (store.shadow(), len(store.staged())) == (first, 5)
    assert not any(first in name for name in store.prune())
    second = in_shadow(store)
    assert version_table(store)["state"][second] == "shadow"
    with pytest.raises(StaleStoreError):
        store.promote_shadow(first)
    with pytest.raises(StaleStoreError):
        store.promote_shadow(second, expected=9)
    assert store.promote_shadow(second, expected=1, reason="better")["event"]["reason"] == "better"
    kinds = [(event["kind"], event.get("version")) for event in store.history() if event["kind"].startswith("shadow")]
    assert kinds == [("shadow_start", first), ("shadow_start", second), ("shadow_end", first), ("shadow_end", second)]
    assert (store.shadow(), store.verify(), store.current()["version"]) == (None, [], second)


def test_a_copy_of_the_store_has_the_same_version_in_shadow_and_refuses_a_damaged_one(store, tmp_path):
    bot, url = ModelStore(tmp_path / "bot"), f"file:{tmp_path}/copy"
    push_store(store, url)
    pull_store(bot, url)
    assert bot.shadow() is None
    for _ in range(2):                                             # and its successor
        version = in_shadow(store)
        assert (push_store(store, url).status, push_store(store, url).status) == ("pushed", "up to date")
        assert pull_store(bot, url, production_only=True).fetched == (version,) and pull_store(bot, url).status == "up to date"
        assert (bot.shadow(), bot.verify(), len(list((bot.root / "shadow").iterdir()))) == (version, [], 2)
    third = in_shadow(store)
    push_store(store, url)
    sent = tmp_path / f"copy/shadow/production_ensemble_{third}.pkl"
    sent.write_bytes(sent.read_bytes()[:-1] + b"x")
    assert "refused" in pull_store(bot, url).refused[0] and bot.shadow() == version
    for pointer in (b"{", b"[]", b'{"version": "../x"}', b'{"version": 5}'):
        (tmp_path / "copy/shadow/current.json").write_bytes(pointer)
        assert "refused" in pull_store(bot, url).refused[0] and bot.shadow() == version
    store.promote_shadow(third)
    push_store(store, url)
    pull_store(bot, url)
    assert (bot.shadow(), bot.current()["version"], bot.verify()) == (None, third, [])


# ---- the decision

QUICK = load_settings(["n_estimators=12", "learning_rate=0.1", "shadow.earliest=50", "threads=1"])


def trained(past, seed=1):
    settings = load_settings(["n_estimators=12", "learning_rate=0.1", f"seed={seed}", "threads=1"])
    return make_ensemble(past, fit_all(past, new_learners(settings)), QUICK.ensemble.weights.model_dump(), 0.5).to_bytes()


@pytest.fixture(scope="module")
def market():
    """Candles, and three versions trained on the first 2000 of them: good, equal, and one with shuffled labels."""
    candles, _ = simulate_market(5500, seed=11)
    past = training_set(QUICK, candles.iloc[:2000])
    shuffled = replace(past, y=np.random.default_rng(0).permutation(past.y))
    facts = {"classes": [0, 1], "data": {"market": "sandbox", "interval_minutes": 240, "to": iso(candles.index[1999]),
                                         "labels": QUICK.labels.model_dump()}}
    return candles, {"good": trained(past), "equal": trained(past, 2), "worse": trained(shuffled)}, facts


def staged_store(folder, market, production, shadow):
    kept = ModelStore(folder)
    kept.promote(market[1][production], market[2])
    in_shadow(kept, market[1][shadow], market[2])
    return kept


@pytest.mark.parametrize("production, shadow, outcomes", [
    ("worse", "good", {"promote"}), ("good", "equal", {"keep", "not enough evidence"}), ("good", "worse", {"keep"})])
def test_a_better_version_is_promoted_an_equal_one_not_and_a_worse_one_kept_out(tmp_path, market, production, shadow, outcomes):
    kept = staged_store(tmp_path / "models", market, production, shadow)
    verdict, facts = promote_from_shadow(kept, QUICK, log=tmp_path / "log.sqlite", replay=True, candles=market[0])
    assert verdict.outcome in outcomes
    assert (facts is not None) == (verdict.outcome == "promote") == (kept.current()["sequence"] == 2)
    assert json.loads(json.dumps(verdict.to_dict()))["replayed"] == verdict.to_dict()["bars"] > 3000
    assert verdict.bars_needed is None or verdict.bars_needed > 0


def test_a_worse_version_looked_at_after_every_bar_is_never_promoted_in_a_few_markets():
    promoted = 0
    for seed in range(3):
        candles, _ = simulate_market(2500, seed=seed)
        past, data = training_set(QUICK, candles.iloc[:1000]), training_set(QUICK, candles)
        shuffled = replace(past, y=np.random.default_rng(seed).permutation(past.y))
        after = data.features.index > candles.index[999]
        proba = [restore_from(trained(part)).predict_proba(data.features[after]) for part in (past, shuffled)]
        good, worse = (((p - np.eye(2)[data.y[after]]) ** 2).sum(axis=1) / 2 for p in proba)
        used = ~np.isnan(good + worse)
        promoted += bool((compare_scores(good[used], worse[used], sides=1).low > 0).any())
    assert promoted == 0


def restore_from(model):
    from ml_ensemble.model_file import read_payload
    return restore_ensemble(read_payload(model))


def test_the_evidence_goes_on_with_a_newer_version_in_shadow_and_starts_anew_after_a_change_of_production(tmp_path, market):
    candles, models, facts = market
    kept, log = staged_store(tmp_path / "models", market, "worse", "good"), tmp_path / "log.sqlite"
    first = shadow_verdict(kept, QUICK, log=log, replay=True, append=True, candles=candles.iloc[:2300])
    in_shadow(kept, models["equal"], facts)
    second = shadow_verdict(kept, QUICK, log=log, replay=True, append=True, candles=candles.iloc[:2600])
    np.testing.assert_array_equal(second.comparison.low[:len(first.comparison)], first.comparison.low)
    assert len(second.comparison) > len(first.comparison) and second.shadow != first.shadow
    kept.promote(models["worse"], facts)
    assert len(shadow_verdict(kept, QUICK, log=log, candles=candles.iloc[:2600]).comparison) == 0


def test_rows_with_another_meaning_or_of_another_market_are_not_compared(market):
    candles, _, facts = market
    facts = {**facts, "version": "20250901-0001", "sequence": 1}
    def row(k, stage, **changes):
        known = {"market": "sandbox", "bar": iso(candles.index[k]), "version": "20250901-0001", "sequence": 1, "stage": stage,
                 "probabilities": (0.4, 0.6), "decision": "buy", "meaning": meaning_digest(facts)}
        return PredictionRow(**(known | changes))
    rows = [row(k, stage) for k in range(10) for stage in ("production", "shadow")]
    assert len(pair_predictions(rows, facts, candles, QUICK.labels).y) == 10
    for changes in ({"market": "other"}, {"meaning": "other"}, {"sequence": 2}, {"probabilities": None}):
        changed = [*rows[:-1], row(9, "shadow", **changes)]
        assert len(pair_predictions(changed, facts, candles, QUICK.labels).y) == 9
    holes = candles.drop(candles.index[:5])
    assert len(pair_predictions(rows, facts, holes, QUICK.labels).y) == 5            # bars without candles stay missing
    assert len(pair_predictions(rows, facts, candles.iloc[:8], QUICK.labels).y) == 6  # never before the end of the label


def test_nothing_is_decided_before_the_earliest_and_production_is_kept_after_the_latest_bar(market):
    candles, _, facts = market
    facts = {**facts, "version": "20250901-0001", "sequence": 1}
    rows = [PredictionRow("sandbox", iso(candles.index[k]), "20250901-0001", 1, stage, (1 - p, p), "hold", meaning=meaning_digest(facts))
            for k in range(500) for stage, p in (("production", 0.5), ("shadow", 0.5))]
    pairs = pair_predictions(rows, facts, candles, QUICK.labels)
    judged = [judge_pairs(pairs, facts, "20250901-0002", QUICK.shadow.model_copy(update=changes), QUICK.labels)
              for changes in ({"earliest": 501}, {"latest": 500}, {})]
    assert [verdict.outcome for verdict in judged] == ["not enough evidence", "keep", "not enough evidence"]
    assert judged[0].bars_needed == 1


# ---- the commands

def test_the_commands_report_and_promote_with_their_exit_codes(tmp_path, market, monkeypatch):
    candles, _, _ = market
    candles.to_csv(tmp_path / "candles.csv")
    for production, shadow, code in (("good", "worse", 3), ("worse", "good", 0)):
        kept = staged_store(tmp_path / f"models_{shadow}", market, production, shadow)
        monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(kept.root))
        options = ["--replay", "--json", "--set", f"data.source=file:{tmp_path}/candles.csv"]
        shown = CliRunner().invoke(app, ["shadow", *options, "--plot", str(tmp_path / "plot.png")])
        assert shown.exit_code == 0, shown.output
        assert json.loads(shown.stdout)["bars"] > 3000 and (tmp_path / "plot.png").stat().st_size > 10_000
        assert kept.current()["sequence"] == 1
        done = CliRunner().invoke(app, ["promote", "--from", "shadow", *options])
        assert done.exit_code == code, done.output
        assert json.loads(done.stdout)["promoted"] == (code == 0) == (kept.current()["sequence"] == 2)


@pytest.mark.parametrize("words", [["promote"], ["promote", "--from", "staged"], ["promote", "20250901-0001", "--from", "shadow"],
                                   ["promote", "20250901-0001", "--replay"]])
def test_promote_takes_a_version_or_shadow_and_not_both(words, store, monkeypatch):
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(store.root))
    assert isinstance(CliRunner().invoke(app, words).exception, ConfigError)


@pytest.mark.parametrize("content, problem", [(None, "there is no log"), ("time,open\n1,2\n", "cannot be read as a log of predictions")])
def test_a_log_that_is_none_is_an_error(market, tmp_path, content, problem):
    kept, path = staged_store(tmp_path / "models", market, "good", "worse"), tmp_path / "log.sqlite"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StoreError, match=problem):
        shadow_verdict(kept, log=path, candles=market[0])


@pytest.mark.slow
def test_a_retrain_puts_the_first_version_into_production_and_the_next_one_into_shadow(tmp_path, in_this_process):
    kept = ModelStore(tmp_path)
    settings = (*TINY, "production.deployment=shadow")
    first = retrain("sandbox", overrides=settings, store=kept, show_progress=False)
    assert first.promoted and kept.shadow() is None
    second = retrain("sandbox", overrides=(*settings, "seed=8"), store=kept, show_progress=False)
    assert (second.promoted, second.reason, kept.current()["sequence"]) == (False, IN_SHADOW, 1)
    assert kept.shadow() == second.version and kept.verify() == []
    third = retrain("sandbox", overrides=(*settings, "seed=8"), store=kept, show_progress=False)      # the same week once more
    assert (third.reason, third.metadata["version"], kept.shadow()) == (NO_NEW_BARS, second.version, second.version)
