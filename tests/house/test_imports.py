"""The house keeps its shape: who may import whom, no circles, no torch where it has no business."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import import_graph  # noqa: E402

MAY_IMPORT = {
    "kvblocks": set(),
    "flexkv": {"kvblocks"},
    "kvrouter": {"kvblocks"},
    "folovllm": {"kvblocks"},
    "kvstrata": {"kvblocks", "flexkv", "kvrouter", "folovllm"},
}


def test_packages_import_only_what_the_table_allows():
    for module, targets in import_graph.imports_of_modules().items():
        package = module.split(".")[0]
        others = {target.split(".")[0] for target in targets} - {package}
        assert others <= MAY_IMPORT[package], f"{module} imports {others - MAY_IMPORT[package]}"


def test_no_package_reaches_into_private_modules_of_another():
    for module, targets in import_graph.imports_of_modules().items():
        for target in targets:
            same_package = module.split(".")[0] == target.split(".")[0]
            private = any(part.startswith("_") for part in target.split("."))
            assert same_package or not private, f"{module} imports the private {target}"


def test_no_private_name_is_imported_from_another_module():
    for path in (ROOT / "src").rglob("*.py"):
        for names in re.findall(r"^from \w[\w.]* import ([^#\n(]+)$", path.read_text(), re.MULTILINE):
            private = [
                n for n in names.split(", ") if n.startswith("_") and n.split()[0] not in ("_native", "__version__")
            ]
            assert not private, f"{path} imports {private}"


def test_modules_form_no_circle():
    graph = import_graph.imports_of_modules(at_run_time_only=True)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_drawing_of_the_imports_is_up_to_date():
    command = [sys.executable, str(ROOT / "tools" / "import_graph.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["kvblocks", "flexkv", "kvrouter"])
def test_importing_a_package_without_torch(package):
    modules = [
        name
        for name in import_graph.imports_of_modules()
        if name.split(".")[0] == package and not name.startswith("flexkv.integration")
    ]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr or f"importing {package} imports torch"


@pytest.mark.parametrize("package", import_graph.PACKAGES)
def test_package_docstring_says_where_to_begin(package):
    first = (ROOT / "src" / package / "__init__.py").read_text()
    assert first.startswith('"""')
    assert len(first.split('"""')[1]) > 60
