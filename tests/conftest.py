"""What several test files share: real candles, a small quick configuration, a store of one's own."""
import os

import arch.data.nasdaq
import arch.data.sp500
import pandas as pd
import pytest
from hypothesis import settings

from ml_ensemble.market_data import simulate_market, tidy
from ml_ensemble.versioning import ModelStore

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

# A retrain small enough for a test: every part runs, with fewer bars, trees and replications.
QUICK = ("days=700", "lightgbm.n_estimators=40", "xgboost.n_estimators=40", "random_forest.n_estimators=40",
         "learning_rate=0.1", "n_splits=3",
         "replications=200", "min_samples=4000", "audit.cuts=20")


def daily(frame: pd.DataFrame) -> pd.DataFrame:
    """arch's daily candles under our column names."""
    return tidy(frame.rename_axis("date").reset_index())


@pytest.fixture(scope="session")
def nasdaq() -> pd.DataFrame:
    return daily(arch.data.nasdaq.load())


@pytest.fixture(scope="session")
def sp500() -> pd.DataFrame:
    return daily(arch.data.sp500.load())


@pytest.fixture(scope="session")
def sandbox() -> pd.DataFrame:
    return simulate_market(1500, seed=3)[0]


@pytest.fixture
def store(tmp_path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture(autouse=True)
def no_alerts_and_no_foreign_settings(monkeypatch):
    """No test may tell anybody anything, or read this machine's settings."""
    for name in list(os.environ):
        if name.startswith("ML_ENSEMBLE_"):
            monkeypatch.delenv(name)
