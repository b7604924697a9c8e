"""Siblings differ in the idea alone: blocks of one name are one text, but for a short list."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ALGORITHMS = Path(__file__).parents[2] / "algorithms"
FILES = {path.stem: path.read_text("utf-8") for path in sorted(ALGORITHMS.glob("*.py"))}
PAIRS = list(itertools.combinations(FILES, 2))

# What holds an algorithm's idea may differ between any two files,
IDEA = {"Config", "State", "init", "update", "main", "TUNED"}
IDEA |= {"actor_loss", "critic_loss", "value_loss", "model_loss", "advantage"}
# and these, each text shared by the files between two bars: other kinds of policy and of data.
VERSIONS = {
    "Actor": "awac bc iql | awr | combo cql",
    "act": "awac awr bc iql | combo cql | diffuser | dt",
    "minibatch": "awac bc combo cql iql | awr | diffuser | dt",
    "train_chunk": "awac bc cql iql | awr | combo | diffuser dt",
    "Window": "diffuser | dt",
    "Block": "diffuser | dt",
    "check": "awr | combo | diffuser | dt",
}
SHARED = """env env_id seed num_seeds num_updates eval_every eval_episodes out resume wandb
batch_size gamma lr actor_lr critic_lr polyak widths normalize""".split()


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def blocks(name):
    """Top-level definitions of a file by their names."""
    found = {}
    for node in ast.parse(FILES[name]).body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets]
        found |= {n: ast.dump(node) for n in names if n}
    return found


def fields(name):
    """Lines of Config: {field: (annotation, comment)} in their order."""
    body = FILES[name].split("class Config:\n")[1].split("\n\n\n")[0]
    lines = (re.fullmatch(r"    (\w+): (.+?) = .+?  # (.+)", line) for line in body.splitlines())
    return {m[1]: (m[2], m[3]) for m in lines if m}


def texts(block):
    """The files that have this block, grouped by its text."""
    groups = {}
    for name in FILES:
        if block in blocks(name):
            groups.setdefault(blocks(name)[block], set()).add(name)
    return groups.values()


@pytest.mark.parametrize("block", sorted({n for name in FILES for n in blocks(name)} - IDEA))
def test_blocks_of_one_name_are_one_text(block):
    """One text in all files, or exactly those of the list: it is no longer than it must be."""
    found = {" ".join(sorted(group)) for group in texts(block)}
    if block in VERSIONS:
        assert found == set(VERSIONS[block].split(" | "))
    else:
        assert len(found) == 1


def test_what_all_files_have():
    for name in FILES:
        assert {"Config", "State", "init", "update", "act", "main"} <= blocks(name).keys()
        assert {"descend", "normalise", "minibatch", "train_chunk"} <= blocks(name).keys()


def test_cql_and_combo_have_one_policy():
    assert blocks("cql")["actor_loss"] == blocks("combo")["actor_loss"]


@pytest.mark.parametrize("name", FILES)
def test_shared_fields_come_first_in_one_order(name):
    own = list(fields(name))
    shared = [field for field in SHARED if field in own]
    assert own[: len(shared)] == shared
    assert own[:11] == SHARED[:11]


@pytest.mark.parametrize("name", FILES)
def test_every_field_has_a_comment_and_nothing_else_stands_in_config(name):
    tree = next(
        n for n in ast.parse(FILES[name]).body if isinstance(n, ast.ClassDef) and n.name == "Config"
    )
    assert [node.target.id for node in tree.body] == list(fields(name))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_settings_of_the_run_are_the_same(a, b):
    for field in SHARED[:10]:
        assert fields(a)[field] == fields(b)[field], field


@pytest.mark.parametrize("name", FILES)
def test_the_loop_in_main_is_the_same(name):
    def loop(source):
        tree = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "main")
        return [ast.dump(node) for node in tree.body if isinstance(node, ast.For)]

    assert len(loop(FILES[name])) == 1
    assert loop(FILES[name]) == loop(FILES["iql"])


@pytest.mark.parametrize("name", FILES)
def test_self_contained(name):
    """Imports no other algorithm; of the project, only the three modules of common."""
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & set(FILES)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in {*FILES, "common"}:
            assert node.module == "common"
            assert {alias.name for alias in node.names} <= {"datasets", "evaluation", "experiment"}


@pytest.mark.parametrize("name", FILES)
def test_common_knows_no_algorithm(name):
    for path in (ALGORITHMS.parent / "common").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):  # docstrings may give examples
            if ast.get_docstring(node) if isinstance(node, DOCUMENTED) else False:
                node.body = node.body[1:]
        words = set(re.findall(r"[a-z0-9]+", ast.dump(tree).lower()))
        assert name not in words, f"{path.name} names {name}"


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_says_what_a_reader_needs(name):
    text = ast.get_docstring(ast.parse(FILES[name]))
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)
    assert f"Run: python algorithms/{name}.py" in text
    assert "Differs from" in text
