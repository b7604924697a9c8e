"""Copies a block from one algorithm file to all files that share its text.

    python tests/siblings.py algorithms/iql.py MLP     # or: make siblings FILE=... BLOCK=...

A block is a function, class or assignment at module level. tests/algorithms/test_siblings.py says
which blocks are the same in all files (the rule), in groups of files (VERSIONS), or free (IDEA).
"""

import ast
import importlib.util
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def rules():
    """(VERSIONS, IDEA) of test_siblings.py."""
    spec = importlib.util.spec_from_file_location("", TESTS / "algorithms/test_siblings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VERSIONS, module.IDEA


def lines_of(text, block):
    """The slice of a file's lines that holds a block with its decorators; None without one."""
    for node in ast.parse(text).body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            names = [getattr(target, "id", None) for target in node.targets]
        if block in names:
            first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
            return slice(first - 1, node.end_lineno)
    return None


def copy(path, block, versions, idea):
    """Writes the block of `path` into its siblings: the files that changed."""
    path = Path(path).resolve()
    lines = path.read_text("utf-8").splitlines(keepends=True)
    where = lines_of("".join(lines), block)
    if where is None:
        raise SystemExit(f"{path.name} has no block {block!r} at module level.")
    if block in idea:
        raise SystemExit(f"{block} may differ between files, see IDEA in {TESTS.name}/algorithms.")
    groups = [group.split() for group in versions.get(block, "").split(" | ")]
    group = next((group for group in groups if path.stem in group), None)
    changed = []
    for sibling in sorted(path.parent.glob("*.py")):
        text = sibling.read_text("utf-8")
        there = lines_of(text, block)
        outside = sibling.stem not in group if group else any(sibling.stem in g for g in groups)
        if sibling == path or there is None or outside:
            continue
        new = text.splitlines(keepends=True)
        new[there] = lines[where]
        if "".join(new) != text:
            sibling.write_text("".join(new), "utf-8")
            changed.append(sibling)
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    changed = copy(*sys.argv[1:], *rules())
    print(f"{sys.argv[2]}: copied to {', '.join(x.name for x in changed) or 'no file, all equal'}")
