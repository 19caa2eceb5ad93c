"""A copy of the repository, and an environment of its own, for tests that must not see or change this one."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy_repository(folder: Path) -> Path:
    """What git would commit, in a folder of its own; returns the folder."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():                        # a file that was deleted is listed until the commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def clean_environment(**more: str) -> dict[str, str]:
    """This process's variables without those that refer to this process: settings, import paths, coverage, Jupyter, make."""
    inherited = ("ML_ENSEMBLE_", "MAKE", "MFLAGS", "ARGS", "PYTHON", "COVERAGE_", "COV_", "JUPYTER_", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(inherited)} | more


def run(*words, **how) -> subprocess.CompletedProcess:
    """A process and what it printed; it ends within two minutes."""
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, **how)


PYTHON = sys.executable
SLOWED = 3 if sys.gettrace() else 1            # how much longer a process takes while coverage counts its lines

SHADOWS = ("onnxruntime", "yaml", "numpy", "json", "pandas", "typing", "random", "sitecustomize", "usercustomize")
FEATURE = """
from pathlib import Path
from ml_ensemble.custom_features import custom_feature
Path({marker!r}).touch()

@custom_feature(window=[3, 0], unit="ratio")
def range_4(bars):
    "highest high over lowest low of 4 bars"
    return bars.high.max() / bars.low.min() - 1
"""


def shadow_modules(folder: Path, marker: Path) -> Path:
    """A project whose files have the names of modules; each writes to `marker` if it runs."""
    (folder / "config/core").mkdir(parents=True)
    for path in (ROOT / "config/core").iterdir():
        shutil.copy(path, folder / "config/core" / path.name)
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write({name!r} + chr(10))\nraise ImportError({name!r})\n")
    return folder
