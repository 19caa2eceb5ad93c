"""Fail when `ml_ensemble/` is not exactly what `nbs/` exports. Run by `make test` before anything else."""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def differences() -> list[str]:
    """Export a copy of the notebooks and name each module that differs, is missing, or has no notebook."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("settings.ini", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        (copy / "ml_ensemble").mkdir()
        (copy / "ml_ensemble" / "__init__.py").touch()
        export = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
        done = subprocess.run(export, cwd=copy, capture_output=True, text=True)
        if done.returncode:
            return [f"nbdev_export failed:\n{done.stderr}"]
        names = lambda place: {p.relative_to(place).as_posix() for p in place.rglob("*.py")}
        fresh, here = copy / "ml_ensemble", ROOT / "ml_ensemble"
        _, changed, broken = filecmp.cmpfiles(fresh, here, sorted(names(fresh) & names(here)), shallow=False)
        return ([f"ml_ensemble/{n} differs from its notebook" for n in changed + broken]
                + [f"ml_ensemble/{n} is exported but not here" for n in sorted(names(fresh) - names(here))]
                + [f"ml_ensemble/{n} has no notebook" for n in sorted(names(here) - names(fresh))])


if __name__ == "__main__":
    found = differences()
    for line in found:
        print(line, file=sys.stderr)
    if found:
        sys.exit("The export is stale. Edit the notebook, run nbdev_export, commit both.")
    print("Export is fresh.")
