"""Parameters of the learners: any that the library takes, under any of its names; no typo, and none that breaks a promise."""
import inspect

import numpy as np
import pytest
from lightgbm import LGBMClassifier
from lightgbm.basic import _ConfigAliases
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectFromModel
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from xgboost import XGBModel

from ml_ensemble.base_learners import fit_learner, make_learners, predict_learner
from ml_ensemble.learner_parameters import LEARNERS
from ml_ensemble.classifier import EnsembleClassifier
from ml_ensemble.config import load_settings
from ml_ensemble.core import ConfigError
from ml_ensemble.learner_parameters import FIXED
from ml_ensemble.recipe import new_learners
from ml_ensemble.retrain_steps import champion_recipe

CONFIGURED = {name: {**values, "n_estimators": 8} for name, values in load_settings().learners.model_dump().items()}
EMPTY = {name: {} for name in LEARNERS}
FEW = {name: {"n_estimators": 8} for name in LEARNERS} | {"n_jobs": 1}


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(8)
    X = rng.normal(size=(500, 4)).astype(np.float32)
    return X, (2 * X[:, 1] + X[:, 3] + rng.normal(size=500) > 0).astype(int)


def test_every_parameter_listed_by_the_libraries_is_accepted_or_refused_with_a_reason():
    listed = {"lightgbm": {alias for names in _ConfigAliases._get_all_param_aliases().values() for alias in names}
              | set(inspect.signature(LGBMClassifier.__init__).parameters),
              "xgboost": set(inspect.signature(XGBModel.__init__).parameters) | {"eta", "lambda", "max_cached_hist_node"},
              "random_forest": set(inspect.signature(RandomForestClassifier.__init__).parameters)}
    for learner, names in listed.items():
        for name in names - {"self", "kwargs"}:
            try:
                make_learners({**EMPTY, learner: {name: 1}}, seed=0)
            except ConfigError as error:
                assert f"{name} of {learner} cannot be set: " in str(error) and error.remedy, name


@pytest.mark.parametrize(("learner", "parameters", "same"), [
    ("lightgbm", {"bagging_fraction": 0.9, "min_data": 5, "num_boost_round": 3},
     {"subsample": 0.9, "min_child_samples": 5, "n_estimators": 3}),
    ("lightgbm", {"sub_feature_bynode": 0.9, "lambda": 1.0}, {"colsample_bynode": 0.9, "reg_lambda": 1.0}),
    ("xgboost", {"eta": 0.3, "lambda": 1.0, "min_split_loss": 0.1},
     {"learning_rate": 0.3, "reg_lambda": 1.0, "gamma": 0.1})])
def test_an_alias_replaces_what_is_configured_under_another_name(rows, learner, parameters, same):
    """The oracle is the library itself, given its own names only."""
    fitted = []
    for given in (parameters, same):
        settings = load_settings([f"learners.{learner}.{name}={value}" for name, value in given.items()])
        fitted.append(fit_learner(new_learners(settings)[learner], *rows))
    theirs = {**load_settings().learners.model_dump()[learner], **same}
    direct = type(fitted[0])(**{**fitted[0].get_params(), **theirs}).fit(*rows)
    assert predict_learner(fitted[0], rows[0]).tobytes() == predict_learner(fitted[1], rows[0]).tobytes()
    assert predict_learner(fitted[0], rows[0]).tobytes() == predict_learner(direct, rows[0]).tobytes()
    plain = fit_learner(new_learners(load_settings())[learner], *rows)
    assert predict_learner(fitted[0], rows[0]).tobytes() != predict_learner(plain, rows[0]).tobytes()


def test_every_layer_takes_any_parameter(tmp_path, monkeypatch):
    (tmp_path / "config/night").mkdir(parents=True)
    (tmp_path / "config/night/base.yaml").write_text(
        "learners: {lightgbm: {max_bin: 31, bagging_fraction: 0.9, extra_trees: true}, random_forest: {criterion: entropy}}")
    monkeypatch.setenv("ML_ENSEMBLE_ROOT", str(tmp_path))                 # its core files are those of the package
    monkeypatch.setenv("ML_ENSEMBLE_ENV", "night")
    monkeypatch.setenv("ML_ENSEMBLE_LEARNERS__LIGHTGBM__MAX_BIN", "63")
    monkeypatch.setenv("ML_ENSEMBLE_LEARNERS__XGBOOST__MAX_LEAVES", "4")
    settings = load_settings(["lightgbm.path_smooth=2", "xgboost.max_leaves=5"])
    learners = new_learners(settings)
    boosted = learners["lightgbm"].get_params()
    assert (boosted["max_bin"], boosted["subsample"], boosted["extra_trees"], boosted["path_smooth"]) == (63, 0.9, True, 2)
    assert "bagging_fraction" not in boosted and "bagging_fraction" not in settings.learners.lightgbm.model_dump()
    assert (learners["xgboost"].max_leaves, learners["random_forest"].criterion) == (5, "entropy")


@pytest.mark.parametrize(("overrides", "expected"), [
    (["lightgbm.num_leafs=3"], "lightgbm has no parameter 'num_leafs'. Did you mean num_leaves?"),
    (["learners.xgboost.max_dept=3"], "xgboost has no parameter 'max_dept'. Did you mean max_depth"),
    (["random_forest.max_leafs=3"], "random_forest has no parameter 'max_leafs'. Did you mean max_leaf_nodes"),
    (["random_forest.learning_rate=3"], "random_forest has no parameter 'learning_rate'"),
    (["max_bin=3"], "write lightgbm.max_bin or xgboost.max_bin"),
    (["lightgbm.num_threads=3"], "num_threads of lightgbm cannot be set: a learner runs on one thread"),
    (["xgboost.seed=3"], "seed of xgboost cannot be set: all learners share the seed of the run"),
    (["lightgbm.application=cross_entropy"], "application of lightgbm cannot be set: the blend and the model file need"),
    (["random_forest.class_weight=balanced"], "Set `training.class_weight=balanced`, which requires a calibration"),
    (["xgboost.early_stopping_rounds=3"], "Set `training.early_stopping` in the configuration"),
    (["xgboost.booster=dart"], "booster of xgboost cannot be set: the model file holds sums of trees"),
    (["lightgbm.boosting=rf"], "boosting_type of lightgbm cannot be 'rf'"),
    (["lightgbm.subsample=0.4", "lightgbm.bagging=0.5"], None)])
def test_typos_and_parameters_that_break_a_guarantee_are_refused_in_the_configuration(overrides, expected):
    if expected is None:                                       # twice in one layer: the last one counts, as for any setting
        assert load_settings(overrides).learners.lightgbm.subsample == 0.5
        return
    with pytest.raises(ConfigError) as refused:
        load_settings(overrides)
    assert expected in str(refused.value)


@pytest.mark.parametrize("layer", ["file", "environment", "classifier", "make_learners"])
def test_a_typo_is_refused_wherever_parameters_are_given(layer, tmp_path, monkeypatch, rows):
    (tmp_path / "config/night").mkdir(parents=True)
    (tmp_path / "config/night/base.yaml").write_text("learners: {xgboost: {colsample_bytre: 0.5}}")
    if layer == "environment":
        monkeypatch.setenv("ML_ENSEMBLE_LEARNERS__XGBOOST__COLSAMPLE_BYTRE", "0.5")
    if layer == "file":
        monkeypatch.setenv("ML_ENSEMBLE_ROOT", str(tmp_path))
        monkeypatch.setenv("ML_ENSEMBLE_ENV", "night")
    call = {"classifier": lambda: EnsembleClassifier(xgboost={"colsample_bytre": 0.5}).fit(*rows),
            "make_learners": lambda: make_learners({**EMPTY, "xgboost": {"colsample_bytre": 0.5}}, seed=0)}
    with pytest.raises(ConfigError, match="xgboost has no parameter 'colsample_bytre'. Did you mean colsample_bytree"):
        call.get(layer, load_settings)()


def test_what_is_refused_for_the_model_file_would_break_it(rows):
    """Fitted against the check: the artefact would not predict as the learner does; so the reason given is true."""
    import onnxruntime
    from ml_ensemble.tree_graph import to_onnx
    breaking = {"lightgbm": [{"boosting_type": "rf"}, {"linear_tree": True}, {"sigmoid": 2.0}], "xgboost": [{"missing": 0.0}]}
    X, y = rows[0].copy(), rows[1]
    X[::5, 1] = 0
    for learner, cases in breaking.items():
        for case in [{}, *cases]:
            made = make_learners({**EMPTY, learner: CONFIGURED[learner]}, seed=1)[learner].set_params(**case)
            fitted = fit_learner(made, X, y)
            session = onnxruntime.InferenceSession(to_onnx({learner: fitted}, {learner: 1.0}, 2, 4))
            apart = np.abs(session.run(None, {"view": X})[0] - predict_learner(fitted, X)).max()
            assert apart > 1e-4 if case else apart < 1e-6, (learner, case, apart)
            assert all(name in FIXED[learner] or name == "boosting_type" for name in case)


def test_current_parameters_stay_out_of_the_champions_recipe(monkeypatch):
    champion = {"configuration": load_settings(["xgboost.max_leaves=9"]).model_dump()}
    monkeypatch.setenv("ML_ENSEMBLE_LEARNERS__LIGHTGBM__MAX_BIN", "31")
    theirs = champion_recipe(load_settings(), champion)
    assert theirs.learners.model_dump() == champion["configuration"]["learners"]
    assert load_settings().learners.lightgbm.max_bin == 31


# -- EnsembleClassifier --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("parameters", "expected"), [
    ({"weigths": (1, 0, 0)}, "EnsembleClassifier has no parameter 'weigths'. Did you mean weights?"),
    ({"num_leaves": 3}, "Did you mean lightgbm__num_leaves?"),
    ({"lightgbmm__num_leaves": 3}, "Did you mean lightgbm__num_leaves?"),
    ({"lightgbm__num_leafs": 3}, "lightgbm has no parameter 'num_leafs'. Did you mean num_leaves?"),
    ({"xgboost": {"max_dept": 3}}, "xgboost has no parameter 'max_dept'. Did you mean max_depth"),
    ({"random_forest__n_jobs": 3}, "n_jobs of random_forest cannot be set"),
    ({"cv__n_splits": 3}, "EnsembleClassifier has no parameter 'cv__n_splits'"),
    ({"lightgbm__num_leaves__x": 3}, "lightgbm has no parameter 'num_leaves__x'")])
def test_set_params_refuses_a_typo_at_once_and_sets_nothing(parameters, expected):
    model = EnsembleClassifier(lightgbm={"num_leaves": 5})
    before = model.get_params()
    with pytest.raises(ValueError) as refused:
        model.set_params(n_jobs=7, lightgbm__max_bin=9, **parameters)
    assert expected in str(refused.value) and model.get_params() == before
    inside = make_pipeline(StandardScaler(), model)
    with pytest.raises(ValueError) as refused:
        inside.set_params(**{f"ensembleclassifier__{name}": value for name, value in parameters.items()})
    assert expected in str(refused.value) and model.get_params() == before


def test_set_params_accepts_any_name_of_the_library(rows):
    model = EnsembleClassifier(**FEW).set_params(lightgbm__bagging_fraction=0.9, lightgbm__max_bin=15, xgboost__eta=0.3)
    assert model.get_params()["lightgbm__bagging_fraction"] == 0.9
    model.fit(*rows)
    assert model.parameters_["lightgbm"]["subsample"] == 0.9 and model.parameters_["xgboost"]["learning_rate"] == 0.3
    model.set_params(lightgbm__subsample=0.8)                            # another name of the same parameter
    assert model.fit(*rows).parameters_["lightgbm"]["subsample"] == 0.8


def test_feature_importances_are_the_learners_shares_of_gain_blended_by_weight(rows):
    with pytest.raises(NotFittedError):
        _ = EnsembleClassifier().feature_importances_
    assert not hasattr(EnsembleClassifier(), "feature_importances_")
    X, y = rows
    model = EnsembleClassifier(**FEW, weights=(0.5, 0.2, 0.3)).fit(X, y)
    lightgbm, xgboost, forest = (model.learners_[name] for name in LEARNERS)
    table, trees = lightgbm.booster_.trees_to_dataframe(), xgboost.get_booster().trees_to_dataframe()
    gains = [table.groupby("split_feature")["split_gain"].sum().reindex([f"Column_{k}" for k in range(4)]).fillna(0),
             trees[trees["Feature"] != "Leaf"].groupby("Feature")["Gain"].sum().reindex([f"f{k}" for k in range(4)]).fillna(0),
             np.mean([tree.feature_importances_ for tree in forest.estimators_], axis=0)]
    by_hand = sum(weight * np.asarray(gain) / np.sum(gain) for weight, gain in zip((0.5, 0.2, 0.3), gains))
    np.testing.assert_allclose(model.feature_importances_, by_hand, rtol=1e-5)
    assert model.feature_importances_.shape == (4,) and model.feature_importances_.argmax() == 1
    assert model.feature_importances_.sum() == pytest.approx(1, abs=1e-12)
    alone = EnsembleClassifier(**FEW, weights=(0, 1, 0)).fit(X, y)
    np.testing.assert_allclose(alone.feature_importances_, np.asarray(gains[1]) / np.sum(gains[1]), rtol=1e-5)
    assert SelectFromModel(model, prefit=True).transform(X).shape[1] < 4


def test_importances_of_trees_without_a_split_are_equal_shares():
    X, y = np.zeros((60, 5)), np.arange(60) % 2
    importances = EnsembleClassifier(**FEW).fit(X, y).feature_importances_
    assert importances.tolist() == [0.2] * 5
