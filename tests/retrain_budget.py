"""Time and memory of a weekly retrain of 17,000 bars on one core, beside the bare steps; run as a script it prints a table (`make bench`).

Memory is that of the whole process tree: the sum of the proportional set sizes, which count a shared page once. The bare steps are
those of the notebook in one process that draws nothing, writes no report and promotes nothing.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat

from scratch import clean_environment

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs/weekly_retrain.ipynb"


def bare_steps() -> None:
    """Execute the calculating cells of the notebook in this process, without output."""
    import matplotlib
    matplotlib.use("Agg")
    names = {"display": lambda *shown: None}
    for cell in nbformat.read(PAGE, 4).cells:
        if cell.cell_type != "code":
            continue
        source = cell.source.replace("%matplotlib inline", "").replace("from IPython.display import display", "")
        lines = [line for line in source.splitlines() if not line.startswith(("display(plot_", "display(data.features.describe"))]
        exec("\n".join(lines), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(models=os.environ["ML_ENSEMBLE_MODELS"], overrides=os.environ["OVERRIDES"], run_id="bare")


def children(process: int) -> list[int]:
    """A process and all that it started."""
    try:
        own = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(found for child in own for found in children(int(child)))]


def proportional_mb(process: int) -> float:
    """Proportional set size of a process in MB; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


def measured(command: list, models: Path, overrides: str, core: int) -> tuple[int, float, float]:
    """Exit code, seconds and peak of the tree in MB of a command that is pinned to a core."""
    environment = clean_environment(ML_ENSEMBLE_MODELS=str(models), OVERRIDES=overrides)
    start, peak, stop = time.monotonic(), 0.0, threading.Event()
    process = subprocess.Popen(["taskset", "-c", str(core), *map(str, command)], cwd=ROOT, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def watch():
        nonlocal peak
        while not stop.wait(0.2):
            peak = max(peak, sum(map(proportional_mb, children(process.pid))))

    watching = threading.Thread(target=watch)
    watching.start()
    code = process.wait()
    seconds = time.monotonic() - start
    stop.set()
    watching.join()
    return code, seconds, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bars", type=int, default=17_000)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.bare:
        bare_steps()
        return 0
    overrides = f"allow_simulated=true days={words.bars // 6}"
    ours = [Path(sys.executable).with_name("ml-ensemble"), "retrain", "--source", "sandbox", "--settings", overrides]
    commands = {"bare steps": [sys.executable, __file__, "--bare"], "ml-ensemble retrain": ours}
    print(f"{words.bars:,} bars on core {words.core}")
    with tempfile.TemporaryDirectory() as folder:
        seconds = {}
        for name, command in commands.items():
            code, seconds[name], peak = measured(command, Path(folder) / name, overrides, words.core)
            print(f"  {name:<22} {seconds[name]:7.1f} s   peak of the tree {peak:6.0f} MB   exit code {code}", flush=True)
    added = seconds["ml-ensemble retrain"] - seconds["bare steps"]
    print(f"  notebook, report and versioning add {added:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
