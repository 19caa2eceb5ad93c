"""Every notebook runs from top to bottom, as `nbdev_test` runs it."""
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"


@pytest.mark.untraced
@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in sorted(NOTEBOOKS.glob("[!_]*.ipynb"))])
def test_a_notebook_runs(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ML_ENSEMBLE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("IN_TEST", "1")             # nbdev sets it and leaves it; a later nbdev_export would export nothing
    monkeypatch.chdir(NOTEBOOKS)
    passed, _ = run_notebook(NOTEBOOKS / name, skip_flags=[], basepath=NOTEBOOKS.parent)
    assert passed, "".join(capfd.readouterr())
