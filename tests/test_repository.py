"""The repository contract: what a reader may rely on in every notebook and at the top level."""
import ast
import json
import re
import subprocess
from pathlib import Path

import nbformat
import pytest

from check_export import differences

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
NUMBERED = [path for path in NOTEBOOKS if path.name[0].isdigit()]
PAGES = [path for path in NOTEBOOKS if not path.name[0].isdigit() and path.name[0] != "_"]
names = lambda paths: [path.stem for path in paths]


def code(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def exported(path: Path) -> list[str]:
    return [source for source in code(path) if re.search(r"^#\| *export", source, re.M)]


def module_of(path: Path) -> str:
    return next(m[1] for source in code(path) if (m := re.search(r"^#\| *default_exp (\S+)", source, re.M)))


MODULE_NUMBER = {module_of(path): int(path.stem[:2]) for path in NUMBERED}


def imported(source: str) -> set[str]:
    found = set(re.findall(r"^\s*(?:from|import) ml_ensemble\.(\w+)", source, re.M))
    for line in re.findall(r"^\s*from ml_ensemble import (.+)$", source, re.M):
        found |= {name.strip() for name in line.split(",")} & set(MODULE_NUMBER)
    return found


def test_the_export_is_fresh():
    assert differences() == []


def test_each_notebook_has_its_own_module_named_like_it_and_no_module_is_an_orphan():
    modules = [module_of(path) for path in NUMBERED]
    assert len(set(modules)) == len(modules)
    stems = [path.stem[3:] for path in NUMBERED if module_of(path) != "__init__"]
    assert stems == [module for module in modules if module != "__init__"]
    assert {p.stem for p in (ROOT / "ml_ensemble").glob("*.py")} == {*modules, "_modidx"}
    assert not any("default_exp" in source or "#| export" in source for path in PAGES for source in code(path))


@pytest.mark.parametrize("path", NUMBERED, ids=names(NUMBERED))
def test_a_notebook_imports_only_lower_numbers(path):
    number = int(path.stem[:2])
    higher = {m for source in exported(path) for m in imported(source) if MODULE_NUMBER[m] >= number}
    assert higher == set() or path.stem == "99_init"


def code_lines(source: str) -> list[str]:
    """The lines of a cell that are code: no docstring, no blank line, no directive. Documentation may be long."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [node.body[0] for node in ast.walk(ast.parse(source))
                  if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None]
    skipped = {number for node in docstrings for number in range(node.lineno, node.end_lineno + 1)}
    return [line for number, line in enumerate(source.splitlines(), 1)
            if number not in skipped and line.strip() and not line.startswith("#|")]


@pytest.mark.parametrize("path", NUMBERED, ids=names(NUMBERED))
def test_exported_cells_are_short_and_plain(path):
    for source in exported(path):
        lines = code_lines(source)
        shell = re.match(r'(#\|.*\n)*\s*(@.*\n)*class ', source)
        assert len(lines) <= (60 if shell else 40), f"{len(lines)} lines:\n{source[:200]}"
        assert "@patch" not in source
        assert not re.search(r"^\s*from \S+ import \*", source, re.M)
        kinds = {type(node) for node in ast.parse(source).body}
        imports, definitions = kinds & {ast.Import, ast.ImportFrom}, kinds & {ast.FunctionDef, ast.ClassDef}
        assert not (imports and definitions), "imports have their own cell"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_a_notebook_begins_with_title_and_promise_and_is_clean(path):
    notebook = nbformat.read(path, 4)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and re.match(r"# .+\n\n> .+", first.source)
    assert notebook.metadata.kernelspec["language"] == "python"
    for cell in notebook.cells:
        assert not re.search(r"^(<{7}|>{7}|={7})( |$)", cell.source, re.M), "conflict markers"
        assert cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags"}
        for output in cell.get("outputs", []):
            assert output.output_type != "error"


NOISE = {
    "a memory address": r"\bat 0x[0-9a-f]{6,}",
    "an ANSI code": "\x1b",
    "a box of a console": "[╭╮╰╯┏┓┗┛┡┩│┃]",
    "a number with 12 or more decimals": r"(?<![\w/.])-?\d*\.\d{12,}",
    "the text of a figure": r"<Figure|Figure\(\d",
    "a path of one machine": r"(?<![\w.])/(?:tmp|home|root|Users|work)/",
    "an error": r"Traceback \(most recent call last\)",
}


def noise(output: dict) -> list[str]:
    "Kinds of noise in one stored output of a cell."
    data = output.get("data", {})
    text = "\n".join([output.get("text", ""), *(data.get(kind, "") for kind in ("text/plain", "text/markdown", "text/html"))])
    return [kind for kind, pattern in NOISE.items()
            if re.search(pattern, text) and not (kind == "the text of a figure" and "image/png" in data)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_stored_outputs_can_be_read_and_do_not_change_from_run_to_run(path):
    outputs = [(cell.id, output) for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    assert [(cell, kind) for cell, output in outputs for kind in noise(output)] == []


@pytest.mark.parametrize("text, kind", [
    ("<function scale_free at 0x7fdf3d30cfe0>", "a memory address"), ("\x1b[1;33mUsage:", "an ANSI code"),
    ("╭─ Error ─", "a box of a console"), ("skill=0.5055945123456789", "a number with 12 or more decimals"),
    ("<Figure size 990x308 with 1 Axes>", "the text of a figure"), ("file:/tmp/x.csv", "a path of one machine")])
def test_noise_in_an_output_is_recognised(text, kind):
    assert noise({"data": {"text/plain": text}}) == noise({"text": text}) == [kind]
    assert noise({"data": {"text/plain": "<Figure size 990x308 with 1 Axes>", "image/png": "…"}}) == []


@pytest.mark.parametrize("path", [path for path in PAGES if path.stem in ("weekly_retrain", "monitor", "benchmarks", "ablation", "tune",
                                                                     "gate_characteristics", "shadow_characteristics",
                                                                     "monitor_characteristics")],
                         ids=lambda path: path.stem)
def test_a_papermill_page_has_exactly_one_parameters_cell_and_every_parameter_has_a_type_and_a_help_text(path):
    import papermill
    cells = [cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1
    parameters = papermill.inspect_notebook(str(path))
    assert len(parameters) == len([line for line in cells[0].source.splitlines() if line.strip()])
    assert all(p["inferred_type_name"] != "None" and p["help"] for p in parameters.values())


def test_the_settings_keep_the_parameters_tag_when_notebooks_are_cleaned():
    text = (ROOT / "settings.ini").read_text()
    assert re.search(r"^allowed_cell_metadata_keys *= *tags$", text, re.M)
    assert re.search(r"^clear_all *= *False$", text, re.M) and re.search(r"^update_pyproject *= *False$", text, re.M)


def test_the_top_level_contains_the_documented_entries_only():
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    tracked = done.stdout.split("\n")
    top = {name.split("/")[0] for name in tracked if name}
    assert {"nbs", "ml_ensemble", "settings.ini", "models", "config", "tests", ".github"} <= top
    assert top <= {"nbs", "ml_ensemble", "settings.ini", "models", "config", "tests", ".github", ".ci", "README.md",
                   "LICENSE", "Makefile", "pyproject.toml", "requirements.lock", ".gitignore", ".gitattributes",
                   ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
    assert not [name for name in tracked if re.search(r"\.(pkl|onnx|feather|parquet|csv|joblib)$", name)]
    assert {f"models/{p}README.md" for p in ("", "production/", "training/", "archive/", "reports/")} <= set(tracked)


def test_the_lock_is_complete_hashed_and_without_addresses():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|--(extra-)?index-url|--find-links|@ *file", text)
    entries = re.split(r"\n(?=[a-zA-Z])", text.strip())
    assert all("==" in entry.splitlines()[0] and "--hash=sha256:" in entry for entry in entries)
    locked = {re.match(r"[\w.-]+", entry)[0].lower().replace("_", "-") for entry in entries}
    assert not [name for name in locked if name.startswith(("nvidia", "triton"))]
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for group in project["optional-dependencies"].values() for d in group)]
    assert {re.match(r"[\w.-]+", d)[0].lower().replace("_", "-") for d in wanted} <= locked


def test_the_version_is_the_same_everywhere():
    import ml_ensemble
    assert re.search(rf"^version *= *{re.escape(ml_ensemble.__version__)}$", (ROOT / "settings.ini").read_text(), re.M)


def test_models_are_kept_by_git_lfs():
    done = subprocess.run(["git", "check-attr", "filter", "models/production/production_ensemble.pkl"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("filter: lfs")


def test_the_feature_order_is_in_the_configuration():
    from ml_ensemble.feature_manager import FEATURE_NAMES
    rows = json.loads((ROOT / "config/core/feature_order.json").read_text())["features"]
    assert tuple(row["name"] for row in rows) == FEATURE_NAMES
    assert all(row["window"][1] == 0 and row["category"] and row["formula"] for row in rows)
