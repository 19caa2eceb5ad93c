"""A store of two small versions on a simulated market, with its candles in a file and its monitoring brought up to date."""
from pathlib import Path

import pandas as pd

from ml_ensemble import ModelStore
from ml_ensemble.config import load_settings
from ml_ensemble.core import iso
from ml_ensemble.drift import feature_reference
from ml_ensemble.feature_manager import input_names
from ml_ensemble.monitor_update import open_database, update_monitoring
from ml_ensemble.recipe import new_learners, training_set
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.training import fit_all, make_ensemble

SETTINGS = ("n_estimators=10", "learning_rate=0.1", "data.market=sandbox")
BARS, FIRST, SECOND = 2000, 1500, 1850           # of the market, and on which the versions were trained


def promote(store: ModelStore, candles: pd.DataFrame, market: str, source: str) -> None:
    """A version that was trained on all of the candles."""
    settings = load_settings(SETTINGS)
    past = training_set(settings, candles)
    model = make_ensemble(past, fit_all(past, new_learners(settings)), settings.ensemble.weights.model_dump(), 0.5)
    inputs = pd.DataFrame(past.inputs.astype(float), index=past.features.index, columns=input_names(past.manager))
    store.promote(model.to_bytes(), {
        "classes": [0, 1], "reference": {"inputs": feature_reference(inputs)},
        "data": {"market": market, "source": source, "interval_minutes": 240, "calendar": "continuous", "to": iso(candles.index[-1]),
                 "labels": settings.labels.model_dump()},
        "metrics": {"metrics": {"brier": 0.225}, "baselines": {"prior": {"brier": 0.235}}}})


def make_store(folder: Path) -> ModelStore:
    """The store; its candles are in `candles.csv` in the same folder."""
    store = ModelStore(folder / "models")
    candles, _ = simulate_market(BARS, seed=7)
    for stop in (FIRST, SECOND):
        promote(store, candles.iloc[:stop], "sandbox", "sandbox")
    candles.to_csv(folder / "candles.csv")
    given = load_settings([*SETTINGS, *words_of(folder)])
    update_monitoring(store, given, open_database(given, store), replay=True)
    return store


def words_of(folder: Path) -> list[str]:
    """Settings that name the candles."""
    return [f"data.source=file:{folder / 'candles.csv'}"]


def options_of(folder: Path) -> list[str]:
    """The same as options of a command."""
    return [word for setting in (*SETTINGS, *words_of(folder)) for word in ("--set", setting)]
