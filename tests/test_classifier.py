"""`EnsembleClassifier`: scikit-learn's contract, scikit-learn's tools, and the weekly recipe to the last bit."""
import json
import os
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold, TimeSeriesSplit, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator

from ml_ensemble.base_learners import make_learners
from ml_ensemble.learner_parameters import LEARNERS
from ml_ensemble.blending import BlendConfig, learn_weights, walk_forward_blend, prob_of_true_class
from ml_ensemble.classifier import EnsembleClassifier, _predict_out_of_fold
from ml_ensemble.config import load_settings
from ml_ensemble.core import ConfigError, MissingValueError, MLEnsembleError, ValidationError
from ml_ensemble.feature_manager import FeatureManager, scale_free
from ml_ensemble.labels import forward_return_labels
from ml_ensemble.walk_forward import weighted_mean, make_training_set, walk_forward
from ml_ensemble.validation import PurgedWalkForward

# The real learners, with few trees.
FEW = {"lightgbm": {"n_estimators": 10, "learning_rate": 0.1}, "xgboost": {"n_estimators": 10, "learning_rate": 0.1},
       "random_forest": {"n_estimators": 10}, "n_jobs": 1}
TINY = {name: {**FEW[name], "n_estimators": 4} for name in LEARNERS} | {"n_jobs": 1}
CONTRACTS = {"default": {}, "prior": {"incomplete": "prior"},
             "learned": {"weighting": "learned", "calibration": "auto", "cv": StratifiedKFold(2)}}
ARRAY_API = "check_array_api_input"      # needs a variable that is read when scipy is first imported
# Limits of the libraries count rows, whatever their weight; scikit-learn expects its own forest to fail this check too.
EXPECTED_TO_FAIL = "check_sample_weight_equivalence_on_dense_data"


def check_name(check) -> str:
    return check_name(check.func) if isinstance(check, partial) else check.__name__


CHECKS = [pytest.param(model, check, id=f"{name}-{number}-{check_name(check)}")
          for name, own in CONTRACTS.items()
          for number, (model, check) in enumerate(estimator_checks_generator(EnsembleClassifier(**TINY, **own)))
          if check_name(check) not in (ARRAY_API, EXPECTED_TO_FAIL)]


@pytest.mark.untraced
@pytest.mark.filterwarnings("ignore:Using the fractional value max_samples")
@pytest.mark.parametrize(("model", "check"), CHECKS)
def test_scikit_learns_contract(model, check):
    check(model)


@pytest.mark.untraced
def test_scikit_learns_contract_with_array_dispatch():
    script = f"""
import warnings; warnings.simplefilter("ignore")
from sklearn.utils.estimator_checks import estimator_checks_generator
from ml_ensemble import EnsembleClassifier
run = 0
for model, check in estimator_checks_generator(EnsembleClassifier(**{TINY!r})):
    if "{ARRAY_API}" in str(check):
        check(model); run += 1
print(run)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env=os.environ | {"SCIPY_ARRAY_API": "1"})
    assert done.stdout.strip() == "1", done.stderr


@pytest.fixture(scope="module")
def data(sandbox):
    return make_training_set(FeatureManager(), sandbox, forward_return_labels(sandbox), classes=2)


@pytest.fixture(scope="module")
def three(sandbox):
    return make_training_set(FeatureManager(), sandbox, forward_return_labels(sandbox, classes=3), classes=3)


SPLITTER = PurgedWalkForward(3)
SETTINGS = load_settings(["n_estimators=12", "learning_rate=0.1"])
PARAMETERS = SETTINGS.learners.model_dump()
SHARES = dict(zip(LEARNERS, (0.4, 0.4, 0.2)))


def walked(rows, seed):
    return walk_forward(rows, SPLITTER, lambda: make_learners(PARAMETERS, seed, 1))


@pytest.mark.parametrize("classes", [2, 3])
def test_its_probabilities_are_those_of_the_weekly_recipe_bit_for_bit(data, three, classes):
    rows = data if classes == 2 else three
    walk = walked(rows, seed=11)
    for number, (train, test) in enumerate(SPLITTER.split(rows.features, groups=rows.end_time), start=1):
        model = EnsembleClassifier(**PARAMETERS, random_state=11, n_jobs=1).fit(rows.inputs[train], rows.y[train])
        expected = weighted_mean(walk.proba, SHARES)[walk.fold == number]
        assert model.predict_proba(rows.inputs[test]).tobytes() == expected.tobytes()
        assert model.classes_.tolist() == list(rows.classes)


@pytest.mark.parametrize(("weighting", "calibration"), [("learned", "platt"), ("learned", "none"), ("fixed", "platt")])
def test_its_blend_is_that_of_the_weekly_recipe(data, weighting, calibration):
    config = BlendConfig(SHARES, weighting=weighting, shrinkage=SETTINGS.ensemble.shrinkage, calibration=calibration,
                         calibration_shrinkage=SETTINGS.ensemble.calibration_shrinkage)
    expected = walk_forward_blend(walked(data, seed=11), config).final
    folds = list(SPLITTER.split(data.features, groups=data.end_time))
    model = EnsembleClassifier(**PARAMETERS, weighting=weighting, calibration=calibration, cv=folds, random_state=11,
                               n_jobs=1).fit(data.inputs, data.y)
    assert (model.weights_, model.calibration_) == (expected.weights, expected.calibration)


def test_the_folds_are_purged_walk_forward_unless_others_are_given(data):
    index, horizon = data.features.index, SETTINGS.labels.horizon
    assert horizon == 1
    ends = index + pd.Timedelta("4h")                    # the candles have no gap, so rows and times agree
    purged = list(PurgedWalkForward(4, min_train=1).split(data.features, groups=ends))
    how = FEW | {"weighting": "learned", "calibration": "platt"}
    by_number = EnsembleClassifier(**how, cv=4).fit(data.inputs, data.y)
    by_splits = EnsembleClassifier(**how, cv=purged).fit(data.inputs, data.y)
    other = EnsembleClassifier(**how, cv=TimeSeriesSplit(4)).fit(data.inputs, data.y)
    assert by_number.weights_ == by_splits.weights_ and by_number.calibration_ == by_splits.calibration_
    assert by_number.weights_ != other.weights_          # TimeSeriesSplit does not purge
    configured = EnsembleClassifier(**how).fit(data.inputs, data.y)
    same = EnsembleClassifier(**how, cv=SETTINGS.validation.n_splits).fit(data.inputs, data.y)
    assert configured.weights_ == same.weights_


def test_parameters_that_are_not_passed_are_as_configured(data, monkeypatch):
    configured = load_settings().learners.model_dump()
    model = EnsembleClassifier(**FEW).fit(data.inputs, data.y)
    assert model.parameters_ == {name: configured[name] | FEW[name] for name in LEARNERS}
    assert model.learners_["random_forest"].min_samples_leaf == configured["random_forest"]["min_samples_leaf"]
    assert {learner.random_state for learner in model.learners_.values()} == {load_settings().seed}
    assert EnsembleClassifier().weights == tuple(load_settings().ensemble.weights.model_dump().values())
    monkeypatch.setenv("ML_ENSEMBLE_LEARNERS__XGBOOST__MAX_DEPTH", "2")
    assert clone(model).fit(data.inputs, data.y).parameters_["xgboost"]["max_depth"] == 2


# -- scikit-learn's tools ------------------------------------------------------------------------------------------

def test_a_pipeline_predicts_from_candles(sandbox, data):
    labels = forward_return_labels(sandbox)
    ensemble = EnsembleClassifier(**FEW, incomplete="prior")
    model = make_pipeline(FeatureManager(), FunctionTransformer(scale_free), ensemble)
    model.fit(sandbox.loc[labels.index], labels["label"])
    proba = model.predict_proba(sandbox)
    assert proba.shape == (len(sandbox), 2) and np.isfinite(proba).all()
    direct = EnsembleClassifier(**FEW).fit(data.inputs, data.y)
    np.testing.assert_array_equal(proba[49:-2], direct.predict_proba(data.inputs))
    np.testing.assert_array_equal(proba[:49, 1], data.y.mean())
    assert set(model.predict(sandbox)) == {0, 1}
    with pytest.raises(MissingValueError, match="is NaN in row 0.*incomplete="):
        clone(model).set_params(ensembleclassifier__incomplete="refuse").fit(sandbox.loc[labels.index], labels["label"])


def test_a_search_under_purged_walk_forward(data):
    model = make_pipeline(FunctionTransformer(scale_free), EnsembleClassifier(**FEW))
    grid = {"ensembleclassifier__xgboost__max_depth": [1, 4],
            "ensembleclassifier__random_forest": [{"n_estimators": 3}]}
    search = GridSearchCV(model, grid, cv=SPLITTER, scoring="neg_log_loss", error_score="raise")
    search.fit(data.features, data.y, groups=data.end_time)
    depths = [p["ensembleclassifier__xgboost__max_depth"] for p in search.cv_results_["params"]]
    scores = search.cv_results_["mean_test_score"]
    assert depths == [1, 4] and scores[0] != scores[1]
    best = search.best_estimator_["ensembleclassifier"]
    assert best.learners_["xgboost"].max_depth == search.best_params_["ensembleclassifier__xgboost__max_depth"]
    assert len(best.learners_["random_forest"].estimators_) == 3
    assert model["ensembleclassifier"].xgboost == FEW["xgboost"]


def test_cross_validate_with_weights(data):
    weight = np.linspace(0.5, 1.5, len(data))
    how = {"cv": TimeSeriesSplit(2), "scoring": "neg_log_loss", "error_score": "raise"}
    plain, weighted = (cross_validate(EnsembleClassifier(**FEW), data.inputs, data.y, params=params, **how)["test_score"]
                       for params in (None, {"sample_weight": weight}))
    assert np.isfinite(weighted).all() and (plain != weighted).all()


def test_parameters_inside_the_dicts():
    given = {"num_leaves": 7}
    model = EnsembleClassifier(lightgbm=given)
    assert model.get_params()["lightgbm__num_leaves"] == 7
    assert "lightgbm__num_leaves" not in model.get_params(deep=False)
    model.set_params(lightgbm__reg_lambda=1.0, xgboost__max_depth=2, n_jobs=1)
    assert model.lightgbm == {"num_leaves": 7, "reg_lambda": 1.0} and model.xgboost == {"max_depth": 2}
    assert given == {"num_leaves": 7} and model.n_jobs == 1            # what was handed in stays as it was
    assert clone(model).get_params() == model.get_params()
    model.set_params(lightgbm={"num_leaves": 3}, lightgbm__max_depth=2)
    assert model.lightgbm == {"num_leaves": 3, "max_depth": 2}
    with pytest.raises(ValueError, match="no parameter 'catboost__depth'"):
        model.set_params(catboost__depth=3)


def test_a_pickle_predicts_like_the_model_and_a_clone_is_not_fitted(data):
    model = EnsembleClassifier(**FEW, weighting="learned").fit(data.inputs, data.y)
    again = pickle.loads(pickle.dumps(model))
    assert again.predict_proba(data.inputs).tobytes() == model.predict_proba(data.inputs).tobytes()
    with pytest.raises(NotFittedError):
        clone(model).predict(data.inputs)


def test_column_names_are_stored_and_checked(data):
    table = pd.DataFrame(data.inputs, columns=[f"x{i}" for i in range(12)])
    model = EnsembleClassifier(**FEW).fit(table, data.y)
    assert model.n_features_in_ == 12 and model.feature_names_in_.tolist() == table.columns.tolist()
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(table[table.columns[::-1]])
    table.loc[5, "x3"] = np.nan
    with pytest.raises(MissingValueError, match="x3 of X is NaN in row 5"):
        model.predict(table)


# -- labels, weights, incomplete rows ------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [["hold", "buy"], ["sell", "hold", "buy"], ["a", "b", "c", "d"]])
def test_labels_can_be_text_or_numbers_of_two_or_more_classes(data, names):
    k = len(names)
    number = np.digitize(data.inputs[:, 1], np.quantile(data.inputs[:, 1], np.arange(1, k) / k))   # of something learnable
    texts = np.array(sorted(names), dtype=object)[number]
    by_word, by_number = (EnsembleClassifier(**FEW).fit(data.inputs, y) for y in (texts, number))
    assert by_word.classes_.tolist() == sorted(names)
    assert by_word.predict_proba(data.inputs).tobytes() == by_number.predict_proba(data.inputs).tobytes()
    np.testing.assert_allclose(by_word.predict_proba(data.inputs).sum(axis=1), 1)
    assert (by_word.predict(data.inputs) == texts).mean() > 0.9


@pytest.mark.parametrize("options", [{}, {"weighting": "learned", "calibration": "platt"}], ids=["fixed", "learned"])
def test_a_row_of_weight_zero_has_no_influence_and_equal_weights_are_no_weights(data, options):
    row, half = np.arange(len(data)), len(data) // 2
    weight = np.random.default_rng(0).integers(0, 2, len(data)).astype(float)
    kept = weight > 0

    def proba(rows, sample_weight=None):
        folds = [(np.flatnonzero(row[rows] < half), np.flatnonzero(row[rows] >= half))]
        model = EnsembleClassifier(**FEW | options | {"cv": folds if options else None})
        return model.fit(data.inputs[rows], data.y[rows], sample_weight).predict_proba(data.inputs)

    assert proba(row, weight).tobytes() == proba(kept).tobytes() != proba(row).tobytes()
    assert proba(row, np.full(len(data), 3.0)).tobytes() == proba(row).tobytes()


def test_a_class_without_positive_weight_is_ignored(three):
    weight = (three.y != -1).astype(float)
    model = EnsembleClassifier(**FEW).fit(three.inputs, three.y, weight)
    assert model.classes_.tolist() == [0, 1]


def test_a_number_of_splits_divides_the_rows_with_a_positive_weight(data):
    weight = np.ones(len(data))
    weight[::3] = 0
    how = FEW | {"weighting": "learned", "cv": 3}
    zeroed = EnsembleClassifier(**how).fit(data.inputs, data.y, weight)
    removed = EnsembleClassifier(**how).fit(data.inputs[weight > 0], data.y[weight > 0])
    assert zeroed.weights_ == removed.weights_


def test_fractional_weights_affect_all_three_learners_and_the_blend(data):
    weight = np.where(data.y == 1, 3.7, 0.9)
    plain, weighted = (EnsembleClassifier(**FEW).fit(data.inputs, data.y, w) for w in (None, weight))
    for name in LEARNERS:
        less, more = (model.learners_[name].predict_proba(data.inputs)[:, 1].mean() for model in (plain, weighted))
        assert more - less > 0.05, name
    assert weighted.prior_[1] == pytest.approx(np.average(data.y, weights=weight))
    n = np.arange(len(data))
    folds = [(n[:900], n[900:])]
    model = EnsembleClassifier(**FEW, weighting="learned", cv=folds).fit(data.inputs, data.y, weight)
    make = lambda: make_learners(model.parameters_, load_settings().seed, 1)
    proba, rows = _predict_out_of_fold(make, data.inputs, data.y, weight, classes=model.classes_, folds=folds,
                                       workers=1)
    p_true, fixed = prob_of_true_class(proba, data.y[rows]), np.array([0.4, 0.4, 0.2])
    expected = learn_weights(p_true, fixed, SETTINGS.ensemble.shrinkage, weight[rows] / weight[rows].mean())
    np.testing.assert_allclose(list(model.weights_.values()), expected, atol=1e-12)
    assert np.abs(expected - learn_weights(p_true, fixed, SETTINGS.ensemble.shrinkage)).max() > 1e-3


def test_only_the_ratios_of_weights_matter(data):
    weight = np.where(data.y == 1, 3, 1)
    first, second = (EnsembleClassifier(**FEW).fit(data.inputs, data.y, weight * factor).predict_proba(data.inputs)
                     for factor in (1, 10**7))
    np.testing.assert_allclose(first, second, atol=1e-9)


def test_incomplete_rows_are_excluded_and_predicted_with_the_class_shares(data):
    X, missing = data.inputs.copy(), np.arange(len(data)) % 7 == 0
    X[missing, 4] = np.nan
    model = EnsembleClassifier(**FEW, incomplete="prior").fit(X, data.y)
    without = EnsembleClassifier(**FEW).fit(X[~missing], data.y[~missing])
    proba = model.predict_proba(X)
    assert proba[~missing].tobytes() == without.predict_proba(X[~missing]).tobytes()
    np.testing.assert_allclose(proba[missing, 1], data.y[~missing].mean())
    assert np.isfinite(model.predict_proba(np.full((2, 12), np.nan))).all()


# -- what is learned -----------------------------------------------------------------------------------------------

def test_learned_weights_lie_on_the_simplex_and_fit_the_out_of_fold_rows(data):
    folds = list(SPLITTER.split(data.features, groups=data.end_time))
    model = EnsembleClassifier(**PARAMETERS, weighting="learned", cv=folds, random_state=11, n_jobs=1)
    weights = model.fit(data.inputs, data.y).weights_
    assert list(weights) == list(LEARNERS) and min(weights.values()) >= 0
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
    walk = walked(data, seed=11)
    loss = {name: log_loss(walk.y, weighted_mean(walk.proba, w)) for name, w in (("new", weights), ("fixed", SHARES))}
    assert loss["new"] < loss["fixed"]


def test_the_only_informative_learner_gets_nearly_all_the_weight(data):
    blind = FEW | {"weighting": "learned", "xgboost": {"n_estimators": 1, "learning_rate": 1e-6},
                   "lightgbm": {"n_estimators": 1, "learning_rate": 1e-6}, "random_forest": {"n_estimators": 60}}
    y = (data.inputs[:, 1] > np.median(data.inputs[:, 1])).astype(int)
    weights = EnsembleClassifier(**blind).fit(data.inputs, y).weights_
    assert weights["random_forest"] > 0.9


def test_calibration_makes_an_underconfident_ensemble_more_confident_and_better(monkeypatch):
    rng = np.random.default_rng(2)
    X = rng.normal(size=(4000, 3)).astype(np.float32)
    truth = 1 / (1 + np.exp(-2 * X[:, 0]))
    y = (rng.random(4000) < truth).astype(int)
    underconfident = FEW | {"lightgbm": {"n_estimators": 10, "learning_rate": 0.02}, "weights": (0.5, 0.5, 0.0),
                   "xgboost": {"n_estimators": 10, "learning_rate": 0.02}}
    calibrated_with = lambda calibration: EnsembleClassifier(**underconfident, calibration=calibration, cv=2).fit(
        X[:3000], y[:3000]).predict_proba(X[3000:])[:, 1]
    raw, shrunk = calibrated_with("none"), calibrated_with("platt")
    assert log_loss(y[3000:], shrunk) < log_loss(y[3000:], raw)           # with the configured shrinkage
    monkeypatch.setenv("ML_ENSEMBLE_ENSEMBLE__CALIBRATION_SHRINKAGE", "0")
    calibrated = calibrated_with("platt")
    assert calibrated.std() > 2 * raw.std()
    assert np.abs(calibrated - truth[3000:]).mean() < np.abs(raw - truth[3000:]).mean() / 2
    assert log_loss(y[3000:], calibrated) < log_loss(y[3000:], raw) - 0.05


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_forest_that_predicts_0_or_1_keeps_the_log_loss_finite():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(300, 2))
    y = (X[:, 0] > 0).astype(int)
    y[::50] = 1 - y[::50]
    sure = {"min_samples_leaf": 1, "max_depth": None, "n_estimators": 5}
    for weighting in ("fixed", "learned"):
        model = EnsembleClassifier(**FEW | {"random_forest": sure}, weights=(0, 0, 1), weighting=weighting,
                                   calibration="platt", cv=2).fit(X, y)
        assert np.isfinite(model.predict_proba(X)).all() and np.isfinite(list(model.weights_.values())).all()
        assert model.calibration_["slope"] not in (1.0, np.inf)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_seed_gives_the_same_bits_and_another_seed_others(data, at_once):
    how = FEW | {"n_jobs": at_once, "weighting": "learned", "calibration": "platt", "cv": 2}
    first, second, other = (EnsembleClassifier(**how, random_state=seed).fit(data.inputs, data.y).predict_proba(data.inputs)
                            for seed in (5, 5, 6))
    assert first.tobytes() == second.tobytes() != other.tobytes()


def test_a_generator_draws_the_seed(data):
    drawn = [EnsembleClassifier(**FEW, random_state=generator).fit(data.inputs, data.y).predict_proba(data.inputs).tobytes()
             for generator in (np.random.RandomState(1), np.random.RandomState(1), np.random.RandomState(2))]
    assert drawn[0] == drawn[1] != drawn[2]


def test_learners_see_float32(data):
    telling = data.inputs.astype(np.float64)
    telling[:, 0] = 1 + 1e-10 * data.y                    # gives the label away, beyond the digits of float32
    model = EnsembleClassifier(**FEW).fit(telling, data.y)
    blind = EnsembleClassifier(**FEW).fit(telling.astype(np.float32), data.y)
    assert model.predict_proba(telling).tobytes() == blind.predict_proba(telling.astype(np.float32)).tobytes()


# -- what is refused -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("parameters", "expected"), [
    ({"weights": (0.5, 0.4, 0.2)}, "the weights sum to 1.1, not to 1"),
    ({"weights": (1.4, -0.4, 0.0)}, "non-negative numbers, for lightgbm, xgboost, random_forest"),
    ({"weights": (0.5, 0.5)}, "Pass three non-negative numbers"),
    ({"weights": (np.nan, 0.5, 0.5)}, "the weights are"),
    ({"weights": "equal"}, "the weights are 'equal'"),
    ({"weighting": "best"}, "weighting is 'best'. Use one of fixed, learned"),
    ({"calibration": "sigmoid"}, "calibration is 'sigmoid'. Use one of none, auto, platt"),
    ({"incomplete": "drop"}, "incomplete is 'drop'. Use one of refuse, prior"),
    ({"lightgbm": {"num_leafs": 3}}, "lightgbm has no parameter 'num_leafs'. Did you mean num_leaves?"),
    ({"lightgbm": {"min_data_in_leaf": 3, "min_child_samples": 3}}, "min_child_samples of lightgbm is given twice"),
    ({"random_forest": {"random_state": 3}}, "random_state of random_forest cannot be set: all learners share the seed"),
    ({"xgboost": [("max_depth", 3)]}, "Pass a dict"),
    ({"weighting": "learned", "cv": "five"}, "cv is 'five'. Use a number of folds"),
    ({"weighting": "learned", "cv": 0}, "cannot be cut into 1 blocks"),
    ({"weighting": "learned", "cv": 3.5}, "cv is 3.5"),
    ({"weighting": "learned", "cv": []}, "the 0 splits in cv has no usable row"),
    ({"weighting": "learned", "cv": [([0, 1, 2], [9999])]}, "the 1 splits in cv has no usable row"),
])
def test_an_invalid_parameter_raises_an_error(data, parameters, expected):
    with pytest.raises(ValueError) as refused:
        EnsembleClassifier(**FEW | parameters).fit(data.inputs, data.y)
    assert isinstance(refused.value, MLEnsembleError) and expected in str(refused.value)


def test_too_few_rows_raise_an_error(data, three):
    learned = EnsembleClassifier(**FEW, weighting="learned")
    with pytest.raises(ValidationError, match="5 rows cannot be cut into 6 blocks"):
        learned.fit(data.inputs[:5], [0, 1, 0, 1, 0])
    late = learned.fit(data.inputs[:30], [0] * 15 + [1] * 15)            # its first folds know no class 1
    assert np.isfinite(late.predict_proba(data.inputs[:30])).all()
    with pytest.raises(ValidationError, match="the label end times are unknown|the label"):
        EnsembleClassifier(**FEW, weighting="learned", cv=PurgedWalkForward(3)).fit(data.inputs, data.y)
    with pytest.raises(ConfigError, match="requires two classes, y has 3"):
        EnsembleClassifier(**FEW, calibration="platt").fit(three.inputs, three.y)
    assert EnsembleClassifier(**FEW, calibration="auto").fit(three.inputs, three.y).calibration_ == {"kind": "none"}


def test_invalid_weights_and_labels_raise_an_error(data):
    model = EnsembleClassifier(**FEW)
    one = np.ones(len(data))
    for weight, expected in ((-one, "the weight of row 0 is -1"), (0 * one, "every sample weight is zero"),
                         (one[:3], "inconsistent numbers of samples"), (np.stack([one, one], 1), "one weight per row")):
        with pytest.raises(ValueError, match=expected):
            model.fit(data.inputs, data.y, weight)
    with pytest.raises(ValidationError, match="one class, 1, in the 5 usable of"):
        model.fit(data.inputs, np.repeat([1, 0], [5, len(data) - 5]), np.repeat([1, 0], [5, len(data) - 5]))
    with pytest.raises(ValidationError, match="there is no class in the 0 usable of"):
        model.set_params(incomplete="prior").fit(np.full((4, 2), np.nan), [0, 1, 0, 1])


def test_the_package_imports_the_classifier_lazily():
    script = """
import json, sys, ml_ensemble
from ml_ensemble import FeatureManager, ProductionEnsemble
before = sorted({"sklearn", "lightgbm", "xgboost", "pandas"} & set(sys.modules))
from ml_ensemble import EnsembleClassifier
print(json.dumps([before, EnsembleClassifier.__module__, "EnsembleClassifier" in ml_ensemble.__all__]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], "ml_ensemble.classifier", True]
