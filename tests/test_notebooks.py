"""Every notebook runs from top to bottom, as `nbdev_test` runs it; here beside the other tests, and with their coverage."""
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"


@pytest.mark.slow
@pytest.mark.no_cover                  # the code of a notebook's own cells is not the module's; coverage doubles their time
@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("[!_]*.ipynb")))
def test_a_notebook_runs(name, tmp_path, monkeypatch, capfd, untraced):
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("IN_TEST", "1")             # nbdev sets it and leaves it; a later nbdev_export would export nothing
    monkeypatch.chdir(NOTEBOOKS)
    passed, _ = run_notebook(NOTEBOOKS / name, skip_flags=[], basepath=NOTEBOOKS.parent)
    assert passed, "".join(capfd.readouterr())
