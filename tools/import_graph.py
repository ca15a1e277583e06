"""Draw which package and which folder imports which, from the code itself, into docs/architecture.md.

`python tools/import_graph.py` rewrites the drawing; `--check` fails when it is out of date.
"""

import argparse
import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- import graph: begin -->", "<!-- import graph: end -->"
PACKAGES = ("kvblocks", "flexkv", "kvrouter", "folovllm", "kvstrata")


def module_name(path: Path) -> str:
    """Dotted name of a source file."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of_modules(*, at_run_time_only: bool = False) -> dict[str, set[str]]:
    """Module -> modules of ours it imports; `at_run_time_only` leaves out imports made for type checkers."""
    files = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
    return {name: _imports(path, name, set(files), at_run_time_only) for name, path in files.items()}


def _imports(path: Path, name: str, known: set[str], at_run_time_only: bool) -> set[str]:
    found: set[str] = set()
    for node in _nodes(ast.parse(path.read_text()), at_run_time_only):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
    return {target for target in found if target in known and target != name}


def _nodes(tree: ast.AST, at_run_time_only: bool) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        if at_run_time_only and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes.append(node)
        stack.extend(ast.iter_child_nodes(node))
    return nodes


def room(module: str) -> str:
    """The folder (or top-level file) of a package a module lies in: `flexkv.cache`, `folovllm.request`."""
    return ".".join(module.split(".")[:2])


def draw() -> str:
    """Mermaid drawings: one of the packages, one of the rooms inside each."""
    graph = imports_of_modules()
    packages: set[tuple[str, str]] = set()
    rooms: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for module, targets in graph.items():
        for target in targets:
            source_package, target_package = module.split(".")[0], target.split(".")[0]
            if source_package != target_package:
                packages.add((source_package, target_package))
            elif room(module) != room(target) and "." in target and "." in module:
                rooms[source_package].add((room(module), room(target)))
    sections = ["### Between packages", _mermaid(packages)]
    for package in PACKAGES:
        if rooms[package]:
            sections += [f"### Inside {package}", _mermaid(rooms[package])]
    return "\n\n".join(sections)


def _mermaid(edges: set[tuple[str, str]]) -> str:
    lines = [f"  {_node(source)} --> {_node(target)}" for source, target in sorted(edges)]
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


def _node(name: str) -> str:
    return f"{name.replace('.', '_')}[{name.split('.')[-1]}]"


def main() -> int:
    """Rewrite or check the drawing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the document is out of date")
    check = parser.parse_args().check
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}\n\n{draw()}\n\n{END}{tail}"
    if new == text:
        return 0
    if check:
        print(f"{DOCUMENT.relative_to(ROOT)} is out of date: run python tools/import_graph.py", file=sys.stderr)
        return 1
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
