"""What a skill is made of: illusions are named on simulated markets, and on rare labels a verdict comes out."""
import re

import numpy as np
import pandas as pd
import pytest

from ml_ensemble.backtest import backtest
from ml_ensemble.champion import Comparison
from ml_ensemble.config import load_settings
from ml_ensemble.core import DataError
from ml_ensemble.labels import forward_return_labels, next_returns, triple_barrier_labels
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.quality_gate import GateInput, judge
from ml_ensemble.recipe import blend_learners, training_set
from ml_ensemble.recipe import out_of_fold
from ml_ensemble.retrain_steps import (blend_table, check_first_fold, evaluate_result, fit_candidate, importance,
                                       label_economics, learner_evaluations, monitoring_reference, rarest_class, reach_verdict, run_audit,
                                       run_backtest, run_money_bridge, run_skill_sources, stage, trading_facts)
from ml_ensemble.run_settings import get_market
from ml_ensemble.skill_sources import (SkillSources, above_zero, money_bridge, plot_waterfall, use_of_probabilities,
                                       volatility_inputs)
from ml_ensemble.trading_costs import entry_delay, known_spread, rolling_spread, side_cost
from ml_ensemble.versioning import ModelStore

pytestmark = [pytest.mark.slow, pytest.mark.untraced]
SMALL = ("lightgbm.n_estimators=60", "xgboost.n_estimators=60", "random_forest.n_estimators=30", "learning_rate=0.05",
         "replications=300", "audit.cuts=16")
silent = lambda text: None


def prepared(*overrides):
    settings = load_settings([*SMALL, *overrides])
    market = get_market(settings)
    data = training_set(settings, market.candles)
    walk = out_of_fold(settings, data, silent)
    return settings, market, data, walk, blend_learners(settings, walk)


def sources_of(*overrides) -> SkillSources:
    return run_skill_sources(*prepared(*overrides), silent)


@pytest.fixture(scope="module")
def bounce() -> SkillSources:
    return sources_of("sandbox_strength=0", "sandbox_spread=0.006", "sandbox_volatility=0.002")


def test_bounce_gives_skill_at_the_close_and_none_at_the_next_open(bounce):
    assert bounce.close[0] > 0.1 and bounce.close[1] > 0.1
    assert bounce.entry[1] < 0 and bounce.entry[0] < 0.01 and not above_zero(bounce.direction)
    assert "bid-ask bounce" in bounce.sentence() and "adds nothing" in bounce.sentence()


def test_volatility_gives_skill_without_direction():
    found = sources_of("sandbox_strength=0", "sandbox_spread=0", "sandbox_clustering=0.8", "labels.threshold=0.015")
    assert above_zero(found.volatility) and above_zero(found.entry) and not above_zero(found.direction)
    assert "volatility alone has" in found.sentence() and "adds nothing" in found.sentence()


def test_a_planted_drift_gives_direction():
    found = sources_of("sandbox_strength=0.3")
    assert above_zero(found.direction) and found.direction[0] > 0.7 * found.entry[0] and "direction adds" in found.sentence()


def test_with_opens_that_repeat_closes_direction_is_measured_one_bar_later(tmp_path):
    candles, _ = simulate_market(4000, seed=1, strength=0, spread=0.006, volatility=0.002)
    opens = candles["close"].shift(1).fillna(candles["open"])
    copied = candles.assign(open=opens, high=np.maximum(candles["high"], opens), low=np.minimum(candles["low"], opens))
    copied.to_csv(tmp_path / "copied.csv")
    settings, market, data, walk, blended = prepared(f"source=file:{tmp_path}/copied.csv")
    found = run_skill_sources(settings, market, data, walk, blended, silent)
    assert found.delay == 1 and above_zero(found.entry) and not above_zero(found.direction)     # the entry is the close that decided
    assert "one bar later because opens repeat" in found.sentence()
    expected = (copied["open"].shift(-3) / copied["open"].shift(-2) - 1).loc[walk.time]
    np.testing.assert_allclose(walk.returns, expected)                                # money waits for that bar too
    assert run_backtest(settings, walk, blended).model.probabilistic_sharpe < 0.95


@pytest.mark.parametrize("planted", [0.001, 0.002, 0.004, 0.006, 0.008])
def test_the_spread_is_recovered_within_a_fifth_on_6000_bars(planted):
    found = known_spread(simulate_market(6000, seed=11, strength=0, spread=planted)[0]).iloc[-1]
    assert abs(found / planted - 1) < 0.2


def test_the_spread_equals_the_librarys_estimate_and_uses_no_later_bar():
    import bidask
    candles, _ = simulate_market(2000, seed=2, spread=0.004)
    prices = [candles[name] for name in ("open", "high", "low", "close")]
    assert known_spread(candles).iloc[-1] == pytest.approx(bidask.edge(*prices), rel=1e-6)
    assert rolling_spread(candles, 500).iloc[-1] == pytest.approx(bidask.edge(*(p.iloc[-500:] for p in prices)), rel=1e-6)
    other = candles.copy()
    other.iloc[1000:, :4] *= np.random.default_rng(0).uniform(1, 2, (1000, 1))
    pd.testing.assert_series_equal(known_spread(other).iloc[:1000], known_spread(candles).iloc[:1000])
    assert entry_delay(candles) == 0


def test_costs_are_those_known_at_the_start_of_the_fold():
    settings, market, data, walk, blended = prepared("sandbox_spread=0.004", "days=400")
    spread = known_spread(market.candles)
    for number, (_, _, begin, _) in enumerate(walk.folds, start=1):
        assert set(walk.spread[walk.fold == number]) == {spread.loc[begin]}
    result = run_backtest(settings, walk, blended)
    late = walk.fold > 1
    assert result.cost == pytest.approx(side_cost(walk.spread[late], 0.0005, 0.0005).mean()) and result.cost > 0.002
    again = backtest(walk.time[late], blended.oos.decide(blended.threshold)[late], walk.returns[late], 0.0)
    assert again.model.net_return > result.model.net_return


def test_fills_are_at_the_next_open_whatever_the_labels():
    for entry in ("next_open", "close"):
        _, market, data, walk, _ = prepared("days=300", f"labels.entry={entry}")
        opens = market.candles["open"]
        np.testing.assert_allclose(walk.returns, (opens.shift(-2) / opens.shift(-1) - 1).loc[walk.time])


def test_label_ends_are_the_first_bars_at_which_the_price_is_known():
    candles, _ = simulate_market(200, seed=1)
    for labels, horizon in ((forward_return_labels(candles, 3), 3), (triple_barrier_labels(candles, 3, 0.5), 3)):
        waited = candles.index.get_indexer(labels["end_time"]) - candles.index.get_indexer(labels.index)
        assert set(waited) == {horizon + 1}
        ends = candles["open"].loc[labels["end_time"]].to_numpy()
        np.testing.assert_allclose(labels["forward_return"], ends / candles["open"].shift(-1).loc[labels.index] - 1)
    np.testing.assert_allclose(next_returns(candles)[:-2], forward_return_labels(candles)["forward_return"])


def test_the_volatility_forecast_does_not_depend_on_the_sign_of_returns():
    candles, _ = simulate_market(500, seed=1)
    mirror = 1 / candles.rename(columns={"high": "low", "low": "high"})[["open", "high", "low", "close"]]
    np.testing.assert_allclose(volatility_inputs(mirror), volatility_inputs(candles), atol=1e-9)


def test_the_money_bridge_adds_up_to_the_backtest():
    settings, market, data, walk, blended = prepared("days=600", "sandbox_spread=0.002")
    money, result = run_money_bridge(settings, market, walk, blended), run_backtest(settings, walk, blended)
    assert money.net == pytest.approx(money.gross - money.fee - money.spread)
    assert money.net == pytest.approx(result.model_returns.sum(), abs=0.002 * money.changes)   # cross terms of cost and return
    assert 0 <= money.buys_that_pay <= 1


def still_after(candles, row):
    """A market that stops: the last price for ever, no volume."""
    still = candles.copy()
    still.iloc[row:, :4], still.iloc[row:, 4] = candles["close"].iloc[row - 1], 0.0
    return still


def quiet(bars, jumps=()):
    """A stablecoin around 1, with single bars half a percent higher."""
    rng = np.random.default_rng(1)
    close = 1 + rng.normal(0, 2e-4, bars)
    opens = np.r_[1, close[:-1]] * np.exp(rng.normal(0, 1e-4, bars))
    table = pd.DataFrame({"open": opens, "high": np.maximum(opens, close) * 1.0001, "low": np.minimum(opens, close) / 1.0001,
                          "close": close, "volume": rng.lognormal(3, 0.5, bars)},
                         index=pd.date_range("2024-01-01", periods=bars, freq="5min", tz="UTC", name="time"))
    for row in jumps:
        table.iloc[row, :4] *= 1.006
    return table


def five_minutes(bars):
    """Bars of 5 minutes with fat tails and slow changes of volatility: one in fifty rises by 0.3 %."""
    rng = np.random.default_rng(11)
    size = 0.0013 * np.exp(np.convolve(rng.normal(0, 0.5, bars + 99), np.ones(100) / 10, "valid") * 0.4)
    close = 65_000 * np.exp(np.cumsum(rng.standard_t(4, bars) / np.sqrt(2) * size))
    opens = np.r_[65_000, close[:-1]]
    up, down = rng.exponential(0.4, (2, bars)) * size
    return pd.DataFrame({"open": opens, "high": np.maximum(opens, close) * (1 + up), "low": np.minimum(opens, close) / (1 + down),
                         "close": close, "volume": rng.lognormal(3, 0.7, bars)},
                        index=pd.date_range("2024-01-01", periods=bars, freq="5min", tz="UTC", name="time"))


def calm_beginning():
    """Candles of the sandbox whose first 900 bars hardly move."""
    candles = simulate_market(4300, seed=3)[0]
    prices = np.log(candles[["open", "high", "low", "close"]])
    calm = prices.iloc[:900] * 0.01
    later = prices.iloc[900:] + (calm["close"].iloc[-1] - prices["close"].iloc[899])
    return candles.assign(**np.exp(pd.concat([calm, later])))


CASES = {"five minutes": (five_minutes(9000), ("calibration=platt",), "refused"),
         "five minutes, learned": (five_minutes(4300), ("weighting=learned", "calibration=platt"), None),
         "stablecoin": (quiet(4300), (), "not enough evidence"), "stablecoin, three": (quiet(4300), ("classes=3",), "not enough evidence"),
         "two buys": (quiet(4300, (2500, 4000)), (), "not enough evidence"),
         "two buys, three": (quiet(4300, (2500, 4000)), ("classes=3",), "not enough evidence"),
         "two buys, weighed": (quiet(4300, (2500, 4000)), ("class_weight=balanced", "early_stopping=5"), "not enough evidence"),
         "two buys, learned": (quiet(4300, (2500, 4000)), ("weighting=learned", "calibration=platt"), "not enough evidence"),
         "goes still": (still_after(simulate_market(4300, seed=1)[0], 3000), (), None),
         "still, bounce": (still_after(simulate_market(4300, seed=1, strength=0, spread=0.006, volatility=0.003)[0], 3000), (), "refused")}


@pytest.mark.parametrize("candles, overrides, outcome", CASES.values(), ids=CASES)
def test_a_verdict_is_reached_however_rare_a_class_is(candles, overrides, outcome, tmp_path):
    candles.to_csv(tmp_path / "candles.csv")
    tiny = ("n_estimators=12", "learning_rate=0.2", "replications=100", "n_splits=3")
    settings, market, data, walk, blended = prepared(*tiny, *overrides, f"source=file:{tmp_path}/candles.csv")
    store, evaluation = ModelStore(tmp_path / "models"), evaluate_result(settings, blended)
    singles, sources = learner_evaluations(settings, walk), run_skill_sources(settings, market, data, walk, blended, silent)
    result, money = run_backtest(settings, walk, blended), run_money_bridge(settings, market, walk, blended)
    economics, leakage = label_economics(settings, market, data), run_audit(settings, market, silent)
    candidate = fit_candidate(settings, data, blended.final, store, "run", silent)
    verdict = reach_verdict(settings, market, data=data, walk=walk, blended=blended, evaluation=evaluation, sources=sources,
                            candidate=candidate, store=store, leakage=leakage, progress=silent)
    assert outcome in (None, verdict.outcome), str(verdict)
    assert leakage.clean and np.isfinite(candidate.artefact["parity_error"])
    for shown in (sources, result, economics, verdict):
        assert shown._repr_markdown_()
    plot_waterfall(sources, money), use_of_probabilities(sources, result), blend_table(settings, walk)
    importance(settings, data, walk, blended)
    trading = trading_facts(sources, result, money, economics)
    stage(settings, market, data=data, evaluation=evaluation, singles=singles, trading=trading, candidate=candidate,
          verdict=verdict, leakage=leakage, reference=monitoring_reference(data, blended.oos), store=store,
          run_id="run")


@pytest.mark.parametrize("classes, names", [(2, "without buy"), (3, "without sell .* and buy")])
def test_a_class_that_is_absent_at_the_beginning_only_is_an_error_whose_remedies_help(classes, names, tmp_path):
    calm_beginning().to_csv(tmp_path / "candles.csv")

    def check(*more):
        settings = load_settings([f"source=file:{tmp_path}/candles.csv", f"classes={classes}", "labels.threshold=0.01", *more])
        check_first_fold(settings, training_set(settings, get_market(settings).candles))
    with pytest.raises(DataError, match=f"{names} .*which begins at 2022-05-3") as caught:
        check()
    folds, days = re.findall(r"[a-z_.]+=\d+", caught.value.remedy)
    assert folds == "validation.n_splits=3" and days.startswith("data.days=")
    check(folds), check(days)


FINE = {"parity_error": 0.0, "size_mb": 1.0, "memory_mb": 1.0, "latency_ms": 0.1}


def verdict(*overrides):
    settings, market, data, walk, blended = prepared(*overrides)
    sources = run_skill_sources(settings, market, data, walk, blended, silent)
    return judge(GateInput(
        evaluation=evaluate_result(settings, blended), sources=sources, money=run_backtest(settings, walk, blended),
        samples=len(data), rarest=rarest_class(data, walk), versions=Comparison(0), recipes=Comparison(0), artefact=FINE,
        problems=[]), settings.gate)


@pytest.mark.parametrize("kind", [("sandbox_strength=0", "sandbox_spread=0", "sandbox_clustering=0"),
                                  ("sandbox_strength=0", "sandbox_spread=0"),
                                  ("sandbox_strength=0", "sandbox_spread=0.006", "sandbox_volatility=0.003")])
def test_the_gate_refuses_each_illusion(kind):
    refused = verdict(*kind)
    assert refused.outcome == "refused"
    assert {"direction beyond volatility, lower end", "probability that the Sharpe ratio is above 0"} <= {
        c.name for c in refused.failures}
    assert ("bid-ask bounce" in refused.summary) == ("sandbox_spread=0.006" in kind)


def test_the_gate_passes_the_documented_market_and_warns_of_figures_too_good_for_a_market():
    passed = verdict()
    assert passed.passed and "direction adds" in passed.summary and "sandbox has a simulated drift" in passed.summary


def test_where_no_buy_covers_its_costs_the_money_bridge_shows_decisions_that_ignore_costs():
    candles, _ = simulate_market(600, seed=1)
    settings, market, data, walk, blended = prepared("days=300", "fee=0.05", "sandbox_strength=0")
    assert set(blended.oos.decide(blended.threshold)[walk.fold > 1]) == {0}
    free = run_money_bridge(settings, market, walk, blended)
    assert free.note == "decisions that ignore costs" and free.buys_that_pay == 0 and free.net < free.gross
    assert run_backtest(settings, walk, blended).model.probabilistic_sharpe == 0
    late = walk.fold > 1
    nothing = money_bridge(market.candles, walk, late, np.zeros(len(walk.y)), np.full(len(walk.y), 0.001), 0.0005)
    assert (nothing.gross, nothing.net, nothing.changes, nothing.buys_that_pay) == (0, 0, 0, None)


def test_the_decomposition_is_the_same_whichever_entry_is_configured():
    from_open, from_close = (sources_of("days=500", f"labels.entry={entry}") for entry in ("next_open", "close"))
    assert from_open == from_close
