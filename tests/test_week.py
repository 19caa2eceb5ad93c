"""A week that does not go as planned: the same retrain twice, an interrupted one, a disk without space."""
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, execute_here

from ml_ensemble import ModelStore, retrain, retraining
from ml_ensemble import walk_forward as walk_module
from ml_ensemble.config import load_settings
from ml_ensemble.core import RetrainError
from ml_ensemble.recipe import out_of_fold, training_set
from ml_ensemble.run_settings import checkpoint_folder, get_market, staging_folder

REFUSED = (*TINY, "min_samples=1000000")
pytestmark = pytest.mark.slow


def run(store, *more, **options):
    return retrain(overrides=(*REFUSED, *more), store=store, show_progress=False, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A store after a refusal, the result, and the number of fits in all walk-forwards."""
    store, fit, fitted = ModelStore(tmp_path_factory.mktemp("undisturbed")), walk_module.fit_learner, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retraining, "execute", execute_here)
        patch.setattr(walk_module, "fit_learner", lambda *words, **options: fitted.append(fit(*words, **options)))
        return store, run(store), len(fitted)


@pytest.fixture(scope="module")
def small():
    settings = load_settings((*TINY, "training.threads=1"))
    return settings, training_set(settings, get_market(settings).candles)


@pytest.fixture
def fits(monkeypatch):
    """The learners that were fitted in a walk-forward; `fits.limit` of them, then the run is interrupted."""
    seen = SimpleNamespace(learners=[], limit=None)
    fit = walk_module.fit_learner

    def counted(learner, *arguments, **options):
        if len(seen.learners) == seen.limit:
            raise KeyboardInterrupt
        seen.learners.append(type(learner).__name__)
        return fit(learner, *arguments, **options)

    monkeypatch.setattr(walk_module, "fit_learner", counted)
    return seen


def same(one, other):
    return all(one.proba[name].tobytes() == other.proba[name].tobytes() for name in one.proba)


# --- an interrupted walk-forward --------------------------------------------------------------------------------------


def test_an_interrupted_walk_forward_repeats_no_finished_fit(small, fits, tmp_path):
    undisturbed = out_of_fold(*small, lambda text: None)
    fits.learners.clear()
    fits.limit = 5
    with pytest.raises(KeyboardInterrupt):
        out_of_fold(*small, lambda text: None, checkpoints=tmp_path)
    fits.limit = None
    resumed = out_of_fold(*small, lambda text: None, checkpoints=tmp_path)
    assert len(fits.learners) == 9 and same(resumed, undisturbed)
    again = out_of_fold(*small, lambda text: None, checkpoints=tmp_path)
    assert len(fits.learners) == 9 and same(again, undisturbed)
    assert sorted(again.newest()) == sorted(undisturbed.newest()) and len(fits.learners) == 12


@pytest.mark.parametrize("change", ["seed=8", "lightgbm.num_leaves=5", "days=299", "labels.threshold=0.004", "labels.horizon=2",
                                    "training.overlap_weight=true", "validation.embargo=5"])
def test_no_fit_of_another_recipe_or_other_candles_is_taken(small, fits, tmp_path, change):
    out_of_fold(*small, lambda text: None, checkpoints=tmp_path)
    settings = load_settings((*TINY, "training.threads=1", change))
    data = training_set(settings, get_market(settings).candles)
    assert same(out_of_fold(settings, data, lambda text: None, checkpoints=tmp_path), out_of_fold(settings, data, lambda text: None))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-8]), lambda path: path.write_bytes(b""),
    lambda path: np.save(path, np.load(path)[1:]), lambda path: np.save(path, np.load(path) * np.nan),
    lambda path: np.save(path, np.load(path).astype(np.float32)),
    lambda path: np.save(path, np.array([print, print]), allow_pickle=True)],
    ids=["cut off", "empty", "other rows", "not a number", "less precise", "pickled"])
def test_a_damaged_checkpoint_is_fitted_again(small, fits, tmp_path, damage):
    before = out_of_fold(*small, lambda text: None, checkpoints=tmp_path)
    fits.learners.clear()
    damage(min(tmp_path.iterdir()))
    assert same(out_of_fold(*small, lambda text: None, checkpoints=tmp_path), before) and len(fits.learners) == 1


def test_a_full_disk_does_not_end_a_walk_forward(small, fits, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(walk_module, "write_atomic", full)
    assert same(out_of_fold(*small, lambda text: None, checkpoints=tmp_path), out_of_fold(*small, lambda text: None))


def test_a_run_after_an_interrupted_one_has_the_figures_of_an_undisturbed_one(store, undisturbed, fits, in_this_process):
    fits.limit = 14                                                # of 18: in the second recipe, of the other entry
    with pytest.raises(KeyboardInterrupt):
        run(store)
    kept = len(list(checkpoint_folder(store).iterdir()))
    assert kept >= 9
    fits.limit = None
    resumed = run(store)
    for part in ("metrics", "backtest", "skill_sources"):
        assert resumed.metadata[part] == undisturbed[1].metadata[part]
    assert len(fits.learners) == 14 + undisturbed[2] - kept + 3   # the newest fold once more, for the importance
    assert not checkpoint_folder(store).exists()
    assert [event["kind"] for event in store.history()] == ["failure", "refusal"]


# --- the same run twice -----------------------------------------------------------------------------------------------


@pytest.fixture
def refused(undisturbed, tmp_path, monkeypatch):
    """A store after a refusal; a further run that gets as far as the notebook raises."""
    store, first = ModelStore(shutil.copytree(undisturbed[0].root, tmp_path / "refused")), undisturbed[1]
    assert not first.promoted and store.history()[-1]["kind"] == "refusal"

    def began(*arguments):
        raise RuntimeError("the notebook began")
    monkeypatch.setattr(retraining, "execute", began)
    return store, replace(first, report=store.root / "reports" / first.report.name)


def test_a_refused_candidate_is_not_made_again_until_something_has_changed(refused):
    store, first = refused
    again = run(store)
    assert again.reason.startswith("refused before, on 20") and not again.promoted and again.report == first.report
    assert again.verdict == first.verdict and again.metadata["metrics"] == first.metadata["metrics"]
    assert [event["kind"] for event in store.history()] == ["refusal", "no_new_bars"]
    assert again.to_dict()["reason"] == again.reason
    for change in (["seed=8"], ["days=299"], ["min_samples=999999"]):
        with pytest.raises(RetrainError, match="the notebook began"):
            run(store, *change)
    for option in ({"force": True}, {"accept_change": True}, {"promote": False}):
        with pytest.raises(RetrainError, match="the notebook began"):
            run(store, **option)


def test_a_refused_candidate_is_made_again_against_another_version_in_production(refused):
    store, _ = refused
    store.promote(b"model", {"note": "another"})
    with pytest.raises(RetrainError, match="the notebook began"):
        run(store)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_refused_candidate_whose_figures_are_lost_is_made_again(refused, content):
    store, first = refused
    path = first.report.with_suffix(".json")
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(RetrainError, match="the notebook began"):
        run(store)


# --- what a killed run leaves, and a full disk ------------------------------------------------------------------------


def test_what_a_killed_run_has_left_is_removed_and_stands_in_the_history(refused):
    store, _ = refused
    folder = staging_folder(store, "20260101T000000Z")
    folder.mkdir(parents=True)
    (folder / "production_ensemble.pkl").write_bytes(b"half a model")
    with pytest.raises(RetrainError, match="the notebook began"):
        run(store, force=True)
    assert not folder.exists()
    assert [event["kind"] for event in store.history()] == ["refusal", "interrupted", "failure"]
    assert "20260101T000000Z" in store.history()[1]["reason"]


def test_a_disk_without_space_is_noticed_before_the_work_starts(refused, monkeypatch):
    store, _ = refused
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=6_000_000))
    with pytest.raises(RetrainError, match=r"6,000,000 bytes free, and a retrain needs about 50,000,000") as caught:
        run(store, force=True)
    assert str(store.root) in str(caught.value) and "Production was not changed" in caught.value.remedy
