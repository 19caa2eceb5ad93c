"""The leakage auditor: every planted leak is caught and named by the check that should, and honest pipelines pass."""
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from lightgbm import LGBMClassifier, early_stopping
from scipy.signal import butter, filtfilt
from sklearn.calibration import IsotonicRegression
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import SelectKBest
from sklearn.model_selection import KFold, TimeSeriesSplit
from sklearn.preprocessing import StandardScaler

from ml_ensemble.blending import fit_blend
from ml_ensemble.recipe import blend_config
from ml_ensemble.config import load_settings
from ml_ensemble.core import FeatureError, canonical_json
from ml_ensemble.custom_features import CustomFeature, custom_feature
from ml_ensemble.feature_manager import FeatureManager
from ml_ensemble.labels import forward_return_labels, triple_barrier_labels
from ml_ensemble.leakage_audit import (FoldResult, OneFold, Pipeline, Rows, audit, check_causality, check_entry, check_shuffled,
                                       check_stream, join_rows, project_pipeline, view_bar_by_bar, inputs_of,
                                       view_windows)
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.validation import PurgedWalkForward

pytestmark = [pytest.mark.slow, pytest.mark.untraced]
SMALL = ("n_estimators=12", "learning_rate=0.2", "n_splits=3", "threads=1")
CANDLES = simulate_market(1500, seed=5, strength=0.6)[0]


def pipeline(*overrides) -> Pipeline:
    return project_pipeline(load_settings([*SMALL, *overrides]))


OWN = pipeline()


def linear(rows: Rows, train, test) -> FoldResult:
    """An honest fold: scaler and threshold from the training part alone, the threshold from its newest rows, purged."""
    fit, tune = train[:-len(train) // 4], train[-len(train) // 4:]
    fit = fit[rows.end_time[fit] < rows.X.index[tune[0]]]
    scaler = StandardScaler().fit(rows.X.iloc[fit])
    model = LinearDiscriminantAnalysis().fit(scaler.transform(rows.X.iloc[fit]), rows.y[fit])
    p = lambda where: model.predict_proba(np.clip(scaler.transform(rows.X.iloc[where]), -9, 9))
    threshold = best_threshold(rows.y[tune], p(tune)[:, 1])
    return FoldResult(p(test), p(test)[:, 1] >= threshold, {"scaler": scaler.mean_, "threshold": threshold})


def best_threshold(y, p) -> float:
    """The threshold with the highest F1."""
    grid = np.linspace(0.05, 0.6, 45)
    says = p[:, None] >= grid
    return float(grid[np.argmax(2 * (says & (y == 1)[:, None]).sum(axis=0) / (says.sum(axis=0) + (y == 1).sum()))])


QUICK = replace(OWN, fit_predict=lambda rows, train, test: linear(rows, train, test).proba)


def column(name, make, window=0) -> Pipeline:
    """A pipeline with one column more."""
    def features(candles):
        return OWN.features(candles).assign(**{name: make(candles)})
    return replace(QUICK, features=features, warmup={**OWN.warmup, name: window}, stream=None)


def table(change) -> Pipeline:
    """A pipeline whose table of features is changed as a whole."""
    return replace(QUICK, features=lambda candles: change(OWN.features(candles)), stream=None)


def culprits(found, check) -> set[str]:
    return {finding.culprit for finding in found.problems if finding.check == check}


# Leaks in the features

def unfinished_day(candles):
    """The close of the whole day, on each bar of that day."""
    daily = candles["close"].resample("1D", label="left").last()
    return daily.reindex(candles.index, method="ffill") / candles["close"]


def finished_day(candles):
    """The close of the day before: known."""
    daily = candles["close"].resample("1D", label="left").last().shift(1)
    return daily.reindex(candles.index, method="ffill") / candles["close"]


def known_now_and_then(candles):
    """A figure published once a day, drawn as a straight line to the next."""
    return candles["volume"].where(candles.index.hour == 0).interpolate().ffill()


def zero_phase(candles):
    return filtfilt(*butter(2, 0.1), candles["close"].pct_change().fillna(0))


FEATURE_LEAKS = {
    "shifted by -1": lambda c: c["close"].pct_change().shift(-1),
    "centred window": lambda c: c["close"].rolling(9, center=True).mean() / c["close"],
    "centred difference": lambda c: np.gradient(c["close"].to_numpy()),
    "zero-phase filter": zero_phase,
    "z-score over the whole series": lambda c: (c["close"] - c["close"].mean()) / c["close"].std(),
    "rank over the whole series": lambda c: c["volume"].rank(pct=True),
    "share of the history gone by": lambda c: np.linspace(0, 1, len(c)),
    "target under another name": lambda c: (c["close"].shift(-1) / c["close"] - 1 > 0.003).astype(float),
    "unfinished daily bar": unfinished_day,
    "interpolated between publications": known_now_and_then,
    "lowest low of the week to come": lambda c: c["low"][::-1].rolling(42).min()[::-1] / c["close"],
}


@pytest.mark.parametrize("kind", FEATURE_LEAKS)
def test_a_feature_that_uses_later_bars_is_named(kind):
    mutant = column("sentiment", FEATURE_LEAKS[kind])
    found = audit(CANDLES, mutant, cuts=48)
    assert "sentiment" in culprits(found, "causality")
    assert {finding.culprit for finding in found.problems} == {"sentiment"}           # and nobody else is blamed
    leak = next(finding for finding in found.problems if finding.check == "causality")
    assert not json.loads(canonical_json(found.to_dict()))["clean"]
    assert leak.status == "leak" and leak.time and leak.figures["ahead"] >= 1 and leak.remedy


def test_the_reach_of_a_shift_is_measured():
    for bars in (1, 5, 30):
        far = column("sentiment", lambda candles, bars=bars: candles["close"].pct_change(bars).shift(-bars))
        assert check_causality(far, CANDLES, 200, np.random.default_rng(0))[0].figures["ahead"] == bars


def test_a_scaler_over_the_whole_table_is_found_in_every_column():
    found = audit(CANDLES, table(lambda made: (made - made.mean()) / made.std()), cuts=32)
    assert culprits(found, "causality") == set(OWN.warmup)


def test_a_back_filled_warm_up_is_found_as_a_fill_and_as_look_ahead():
    found = audit(CANDLES, table(lambda made: made.bfill()), cuts=32)
    assert culprits(found, "warm-up") == culprits(found, "causality") == set(OWN.warmup)


def test_a_warm_up_filled_with_nothing_is_found():
    found = audit(CANDLES, table(lambda made: made.fillna(0)), cuts=32)
    assert culprits(found, "warm-up") == set(OWN.warmup) and culprits(found, "causality") == set()


def test_a_leak_at_a_single_bar_is_detected_by_the_stream():
    def once(candles):
        made = OWN.features(candles)
        if len(candles) > 902:
            made.iloc[900, 0] = made.iloc[901, 0]
        return made
    made = once(CANDLES)
    found = check_stream(replace(OWN, features=once), CANDLES, made)
    when = f"{CANDLES.index[900]:%Y-%m-%d %H:%M}"
    assert [(f.status, f.culprit, f.time) for f in found] == [("leak", "returns_1", when)]


# Leaks through the data and through custom features

TARGET = forward_return_labels(CANDLES)["label"].reindex(CANDLES.index, fill_value=0)


def test_the_target_in_a_column_of_the_source_is_suspicious():
    given = CANDLES.assign(sentiment=TARGET + np.random.default_rng(0).normal(0, 0.3, len(CANDLES)))
    found = audit(given, column("sentiment", lambda candles: candles["sentiment"]), cuts=32)
    assert [(f.check, f.status, f.culprit) for f in found.problems] == [("single columns", "suspicious", "sentiment")]


EVERYTHING = CANDLES["close"].to_numpy()


def test_a_custom_feature_that_reads_a_global_table_is_refused():
    def peeks(bars):
        return EVERYTHING[np.searchsorted(EVERYTHING, bars.close[-1])]
    with pytest.raises(FeatureError, match="reads the global EVERYTHING"):
        FeatureManager(custom=[CustomFeature("peeks", [0, 0], peeks)])


def with_custom(feature: CustomFeature) -> Pipeline:
    manager = FeatureManager(custom=[feature])
    return replace(QUICK, features=lambda candles: inputs_of(manager, candles), warmup=view_windows(manager),
                   stream=lambda candles: view_bar_by_bar(manager, candles))


def test_a_custom_feature_that_encodes_the_labels_is_suspicious():
    @custom_feature(window=[0, 0])
    def smuggler(bars, answers=tuple(zip(CANDLES["close"].tolist(), TARGET.astype(float).tolist()))):
        return dict(answers).get(float(bars.close[-1]), 0.0)
    found = audit(CANDLES, with_custom(smuggler), cuts=32)
    assert [(f.check, f.culprit) for f in found.problems] == [("single columns", "smuggler")]


# Leaks in labels and splits

def understated(candles):
    labels = forward_return_labels(candles, horizon=5)
    return labels.assign(end_time=candles.index[1:len(labels) + 1])


def by_quantile(candles):
    labels = forward_return_labels(candles)
    return labels.assign(label=(labels["forward_return"] > labels["forward_return"].quantile(0.8)).astype(int))


def smoothed(candles):
    labels = forward_return_labels(candles)
    mean = labels["label"].rolling(5, center=True, min_periods=1).mean()
    return labels.assign(label=(mean > 0.3).astype(int))


def interpolated(candles):
    """Every other label is set, the rest drawn between its neighbours."""
    labels = forward_return_labels(candles)
    kept = labels["label"].where(np.arange(len(labels)) % 2 == 0)
    return labels.assign(label=kept.interpolate().round().astype(int))


def one_bar_early(candles):
    """Settled, it says, at the close before the open that it needs."""
    labels = forward_return_labels(candles, horizon=2)
    return labels.assign(end_time=candles.index[2:len(labels) + 2])


@pytest.mark.parametrize("labels", [understated, one_bar_early, by_quantile])
def test_labels_that_read_beyond_their_end_are_found(labels):
    found = audit(CANDLES, replace(QUICK, labels=labels), cuts=16)
    assert [(f.check, f.status, f.culprit) for f in found.problems] == [("labels", "leak", "label")]


@pytest.mark.parametrize("labels", [smoothed, interpolated])
def test_labels_that_depend_on_their_neighbours_read_beyond_their_end_and_start_too_early(labels):
    found = audit(CANDLES, replace(QUICK, labels=labels), cuts=16)
    assert [(f.check, f.status, f.culprit) for f in found.problems] == [("labels", "leak", "label"),
                                                                        ("entry price", "leak", "label")]


# Prices that could not be had

def later(candles):
    """Entered one bar after the next open."""
    labels = forward_return_labels(candles.shift(-1).iloc[:-1].set_axis(candles.index[:-1]))
    return labels.assign(end_time=candles.index[3:len(labels) + 3])


def scaled_by_volatility(candles):
    """A threshold that follows past volatility: it reads the past, but no price of it."""
    labels = forward_return_labels(candles)
    moves = np.log(candles["close"]).diff().rolling(20).std().loc[labels.index]
    return labels.assign(label=(labels["forward_return"] > moves).astype(int))


BOOKED = OWN.returns
HONEST = {"forward return": forward_return_labels, "later": later, "by volatility": scaled_by_volatility,
          "five bars": partial(forward_return_labels, horizon=5), "three classes": partial(forward_return_labels, classes=3),
          "triple barrier": triple_barrier_labels, "five, three": partial(triple_barrier_labels, horizon=5, classes=3)}
EARLY_LABELS = {"from the close": partial(forward_return_labels, entry="close"),
                "barriers from the close": partial(triple_barrier_labels, entry="close"),
                "from its own open": lambda candles: forward_return_labels(candles.shift(1).bfill()).iloc[:-1]}
EARLY_RETURNS = {"filled at the close": lambda candles: candles["close"].shift(-1) / candles["close"] - 1,
                 "filled at its own open": lambda candles: candles["open"].shift(-1) / candles["open"] - 1,
                 "filled at the low": lambda candles: candles["open"].shift(-2) / candles["low"].shift(-1) - 1,
                 "sold at the high": lambda candles: candles["high"].shift(-1) / candles["open"].shift(-1) - 1}


def entry_problems(pipeline):
    return [(f.check, f.status, f.culprit) for f in check_entry(pipeline, CANDLES, np.random.default_rng(0)) if not f.passed]


@pytest.mark.parametrize("labels", HONEST.values(), ids=HONEST)
def test_labels_from_a_later_price_raise_no_alarm(labels):
    assert entry_problems(replace(OWN, labels=labels)) == []


@pytest.mark.parametrize("labels", EARLY_LABELS.values(), ids=EARLY_LABELS)
def test_labels_from_a_price_that_was_not_tradable_are_named(labels):
    assert entry_problems(replace(OWN, labels=labels)) == [("entry price", "leak", "label")]


@pytest.mark.parametrize("returns", EARLY_RETURNS.values(), ids=EARLY_RETURNS)
def test_a_backtest_filled_at_a_price_that_was_not_tradable_is_named(returns):
    assert entry_problems(replace(OWN, returns=returns)) == [("entry price", "leak", "backtest")]


def test_the_configured_entry_at_the_close_is_a_finding_with_its_remedy():
    found = audit(CANDLES, replace(pipeline("labels.entry=close"), fit_predict=QUICK.fit_predict), cuts=16)
    assert [(f.check, f.culprit) for f in found.problems] == [("entry price", "label")]
    assert "labels.entry=next_open" in found.problems[0].remedy


def test_a_pipeline_without_a_backtest_is_reported_as_skipped():
    found = check_entry(replace(OWN, returns=None), CANDLES, np.random.default_rng(0))
    assert [(f.status, f.culprit) for f in found] == [("ok", "label"), ("skipped", "backtest")]


@pytest.mark.filterwarnings("ignore:The groups parameter is ignored")
def test_a_split_without_purge_is_found_in_every_fold():
    far = replace(QUICK, labels=lambda candles: forward_return_labels(candles, horizon=5))
    assert audit(CANDLES, far, cuts=16).clean
    found = audit(CANDLES, replace(far, splitter=TimeSeriesSplit(3)), cuts=16)
    assert culprits(found, "label overlap") == {"fold 1", "fold 2", "fold 3"}
    assert {finding.figures["rows"] for finding in found.problems} == {6}            # five bars, and the open that ends them


class TrainOnTest:
    """A splitter with a slip of the index."""
    def split(self, X, y=None, groups=None):
        for train, test in PurgedWalkForward(3).split(X, groups=groups):
            yield np.append(train, test[:10]), test


def repeated(made, labels) -> Rows:
    """Rows with a buy stand there twice, the copy a second later, before anything is split."""
    rows = join_rows(made, labels)
    buys = np.flatnonzero(rows.y == 1)
    order = np.argsort(np.append(np.arange(len(rows.y)), buys + 0.5))
    X = pd.concat([rows.X, rows.X.iloc[buys].set_axis(rows.X.index[buys] + pd.Timedelta("1s"))]).iloc[order]
    return Rows(X, np.append(rows.y, rows.y[buys])[order], rows.end_time.append(rows.end_time[buys])[order])


@pytest.mark.filterwarnings("ignore:The groups parameter is ignored")
def test_rows_on_both_sides_are_found():
    slip = audit(CANDLES, replace(QUICK, splitter=TrainOnTest()), cuts=16)
    assert culprits(slip, "duplicate rows") == culprits(slip, "label overlap") == {"fold 1", "fold 2", "fold 3"}
    copies = audit(CANDLES, replace(QUICK, join=repeated, splitter=KFold(3, shuffle=True, random_state=1)), cuts=16)
    assert culprits(copies, "duplicate rows") == {"fold 1", "fold 2", "fold 3"}
    assert audit(CANDLES, replace(QUICK, join=repeated), cuts=16).clean              # a split that keeps them together


# Leaks in the fit

def scaler_on_all(rows, train, test):
    scaler = StandardScaler().fit(rows.X)
    model = LinearDiscriminantAnalysis().fit(scaler.transform(rows.X.iloc[train]), rows.y[train])
    return FoldResult(model.predict_proba(scaler.transform(rows.X.iloc[test])))


def scaler_on_train_and_test(rows, train, test):
    scaler = StandardScaler().fit(rows.X.iloc[np.append(train, test)])
    return FoldResult(OWN.fit_predict(replace(rows, X=rows.X * 0 + scaler.transform(rows.X)), train, test),
                  fitted={"scaler": scaler.mean_})


def selection_on_all(rows, train, test):
    chosen = SelectKBest(k=4).fit(rows.X, rows.y).get_feature_names_out()
    proba = linear(replace(rows, X=rows.X[chosen]), train, test).proba
    return FoldResult(proba, fitted={"chosen columns": chosen})


def stopped_by_test(rows, train, test):
    X = rows.X.to_numpy()
    model = LGBMClassifier(n_estimators=200, learning_rate=0.2, num_leaves=7, random_state=0, n_jobs=1, verbosity=-1)
    stop = early_stopping(5, verbose=False)
    model.fit(X[train], rows.y[train], eval_X=X[test], eval_y=rows.y[test], callbacks=[stop])
    return FoldResult(model.predict_proba(X[test]), fitted={"rounds": model.best_iteration_})


def threshold_by_test(rows, train, test):
    proba = linear(rows, train, test).proba
    threshold = best_threshold(rows.y[test], proba[:, 1])
    return FoldResult(proba, proba[:, 1] >= threshold)


def calibrated_by_test(rows, train, test):
    raw = linear(rows, train, test).proba[:, 1]
    p = IsotonicRegression(out_of_bounds="clip").fit(raw, rows.y[test]).predict(raw)
    return np.column_stack([1 - p, p])


def fitted_on_all(rows, train, test):
    return linear(rows, np.arange(len(rows.y)), test).proba


FIT_LEAKS = {
    "scaler fitted on all rows": (scaler_on_all, {"probabilities"}, "features"),
    "scaler in front of trees": (scaler_on_train_and_test, {"scaler", "probabilities"}, "features"),
    "columns selected on all rows": (selection_on_all, {"chosen columns", "probabilities"}, "labels"),
    "test rows in early stopping": (stopped_by_test, {"rounds", "probabilities"}, "labels"),
    "threshold tuned on the test rows": (threshold_by_test, {"decision"}, "labels"),
    "calibrated on the test rows": (calibrated_by_test, {"probabilities"}, "labels"),
    "fitted on all rows": (fitted_on_all, {"probabilities"}, "labels"),
}


@pytest.mark.parametrize("kind", FIT_LEAKS)
def test_a_fit_that_reads_more_than_its_training_part_is_named(kind):
    fit_predict, names, altered = FIT_LEAKS[kind]
    found = audit(CANDLES, replace(OWN, fit_predict=fit_predict), cuts=16)
    assert culprits(found, "fit window") == names
    assert all(altered in f.figures["altered"] for f in found.problems if f.check == "fit window")
    # Early stopping on the test rows also changes the in-sample fit, so the checks of shuffled labels and of the gap may report it.
    assert {f.check for f in found.problems} <= {"fit window", "shuffled labels", "in-sample gap"}


def test_skill_on_shuffled_labels_is_a_leak():
    learns_by_heart = pipeline("num_leaves=31", "min_child_samples=5", "subsample=1", "max_samples=1", "min_samples_leaf=2")
    trees_on_all = lambda rows, train, test: learns_by_heart.fit_predict(rows, np.arange(len(rows.y)), test)
    found = audit(CANDLES, replace(OWN, fit_predict=trees_on_all), cuts=16)
    assert culprits(found, "shuffled labels") == {"fit_predict"} and culprits(found, "fit window") == {"probabilities"}


def test_a_fit_that_is_not_repeatable_is_not_called_a_leak():
    rng = np.random.default_rng()
    shaky = lambda rows, train, test: linear(rows, train, test).proba + rng.normal(0, 1e-6) * np.array([1, -1])
    found = audit(CANDLES, replace(OWN, fit_predict=shaky), cuts=16)
    assert [(f.check, f.status) for f in found.problems] == [("fit window", "suspicious")]


# Leaks in the mixing

FAR = pipeline("horizon=5", "weighting=learned", "objective=profit")
FAR_MIXING = blend_config(load_settings(["horizon=5", "weighting=learned", "objective=profit"]))


def mixed_with(past):
    """A pipeline that mixes each fold by what `past(walk, fold)` chooses to fit on."""
    def mixing(walk):
        proba, decision = np.empty_like(walk.prior), np.empty(len(walk.y), int)
        for fold in range(1, len(walk.folds) + 1):
            here = walk.fold == fold
            made = fit_blend(FAR_MIXING, walk, past(walk, fold), walk.share)
            proba[here] = made.proba({name: p[here] for name, p in walk.proba.items()})
            decision[here] = proba[here, 1] >= made.threshold
        return FoldResult(proba, decision)
    return replace(QUICK, labels=FAR.labels, blend=mixing)


MIXING_LEAKS = {
    "weights and threshold of all folds": lambda walk, fold: np.ones(len(walk.y), bool),
    "its own fold as well": lambda walk, fold: walk.fold <= fold,
    "earlier folds, labels still open": lambda walk, fold: walk.fold < fold,
    "the folds after it": lambda walk, fold: walk.fold != fold,
}


@pytest.mark.parametrize("kind", MIXING_LEAKS)
def test_a_blend_fitted_on_later_rows_is_named(kind):
    found = audit(CANDLES, mixed_with(MIXING_LEAKS[kind]), cuts=16)
    assert {f.check for f in found.problems} == {"blending"} and "probabilities" in culprits(found, "blending")
    assert all(f.status == "leak" and f.time and f.remedy for f in found.problems)


def test_a_blend_of_earlier_folds_with_settled_labels_is_clean():
    settled = lambda walk, fold: (walk.fold < fold) & (walk.end_time <= walk.folds[fold - 1][2])
    found = audit(CANDLES, mixed_with(settled), cuts=16)
    assert found.clean, str(found)
    assert [f.status for f in found.findings if f.check == "blending"] == ["ok"]


# Honest pipelines

@custom_feature(window=[11, 0], unit="ratio")
def range_12(bars):
    "highest high over lowest low of 12 bars, minus 1"
    return bars.high.max() / bars.low.min() - 1


HONEST = {
    "as configured": OWN,
    "horizon 5": pipeline("horizon=5"),
    "three classes": pipeline("classes=3"),
    "triple barrier": pipeline("method=triple_barrier", "horizon=6", "threshold=0.01"),
    "triple barrier, three classes": pipeline("method=triple_barrier", "horizon=6", "threshold=0.01", "classes=3"),
    "rolling with embargo": pipeline("window=rolling", "embargo=10"),
    "mixed by everything there is": pipeline("horizon=3", "weighting=learned", "calibration=platt", "objective=f1"),
    "learned, for profit": pipeline("weighting=learned", "shrinkage=0", "objective=profit"),
    "balanced, unique, stopped early": pipeline("horizon=3", "class_weight=balanced", "overlap_weight=true",
                                                "early_stopping=5"),
    "custom feature": with_custom(range_12),
    "the day before": column("day", finished_day, 1),
    "scaler and threshold of the training part": replace(OWN, fit_predict=linear),
}


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_pipeline_is_clean(kind):
    found = audit(CANDLES, HONEST[kind], cuts=32, seed=1)
    assert found.clean, str(found)
    assert json.loads(canonical_json(found.to_dict()))["clean"]
    assert found._repr_markdown_().count("\n|") == len(found.findings) + 2


@pytest.mark.parametrize("strength", [0.0, 0.8])
@pytest.mark.parametrize("seed", range(2))
def test_no_false_alarm_on_noise_nor_on_the_strongest_signal(strength, seed):
    found = audit(simulate_market(1500, seed=seed, strength=strength)[0], QUICK, cuts=16, seed=seed)
    assert found.clean, str(found)


def test_no_false_alarm_on_real_days_with_nights_and_weekends(nasdaq):
    found = audit(nasdaq.iloc[-2000:], pipeline("calendar=sessions", "horizon=2"), cuts=32)
    assert found.clean, str(found)


def test_no_false_alarm_on_a_constant_market():
    """Rows of a flat stretch are equal bit by bit, on both sides of a split; nobody copied them."""
    still = CANDLES.copy()
    middle = slice(700, 850)
    still.iloc[middle, :4] = still["close"].iloc[899]
    still.iloc[middle, 4] = 1.0
    found = audit(still, OWN, cuts=32)
    assert found.clean, str(found)


def test_the_shuffled_control_is_exact():
    """Over clean audits, `chance` is spread evenly, so one in 10,000 is the lowest of all."""
    rows = OWN.join(OWN.features(CANDLES), OWN.labels(CANDLES))
    fold = list(OWN.splitter.split(rows.X, groups=rows.end_time))[1]
    found = [check_shuffled(QUICK, rows, fold, np.random.default_rng(seed))[0] for seed in range(30)]
    chances = [finding.figures["chance"] for finding in found]
    assert abs(np.mean(chances) - 0.5) < 3 * np.sqrt(1 / 12 / 30) and min(chances) > 1e-3


def test_one_fold_is_a_splitter():
    assert list(OneFold([0, 1], [2]).split(None)) == [([0, 1], [2])]
