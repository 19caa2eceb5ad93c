"""Many markets on a real local Dask cluster give what they give one after another."""
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from ml_ensemble.fleet import judge_fleet


@pytest.mark.slow
def test_a_cluster_gives_the_same_table_as_one_process():
    markets = {"one": "sandbox#1", "two": "sandbox#2", "lost": "file:lost.csv"}
    small = ("days=250", "n_estimators=20", "n_splits=2", "replications=100")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        together = judge_fleet(markets, small, client)
    pd.testing.assert_frame_equal(together, judge_fleet(markets, small))
