"""Siblings differ in the idea alone: blocks of one name are one text, but for a short list."""

import ast
import functools
import itertools
import re
from pathlib import Path

import pytest

ALGORITHMS = Path(__file__).parents[2] / "algorithms"
FILES = {path.stem: path.read_text("utf-8") for path in sorted(ALGORITHMS.glob("*.py"))}
PAIRS = list(itertools.combinations(FILES, 2))

# What holds an algorithm's idea may differ between any two files,
IDEA = {"Config", "State", "init", "update", "main", "TUNED"}
IDEA |= {"actor_loss", "critic_loss", "value_loss", "model_loss", "advantage", "train"}
# and these, each text shared by the files between two bars: other kinds of policy and of data.
VERSIONS = {
    "Actor": "awac bc iql | combo cql sac | rebrac td3_bc | bear | awr",
    "Critic": "awac bcq bear combo cql iql sac td3_bc | rebrac",
    "act": "awac awr bc iql | combo cql sac | rebrac td3_bc | bcq bear | diffuser | dt",
    "policy": "awac awr bc combo cql iql rebrac sac td3_bc | bcq bear | diffuser | dt",
    "minibatch": "awac bc bcq bear combo cql iql rebrac sac td3_bc | awr | diffuser | dt",
    "train_chunk": "awac bc cql iql sac | rebrac td3_bc | bcq bear | diffuser dt | awr | combo",
    "Window": "diffuser | dt",
    "Block": "diffuser | dt",
    "candidates": "bcq | bear",
    "check": "awr | combo | diffuser | dt | rebrac td3_bc",
}
SHARED = """env env_id seed num_seeds num_updates log_every eval_every eval_episodes out resume
wandb batch_size gamma lr actor_lr critic_lr polyak widths normalize""".split()


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


@functools.cache
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
    assert own[:12] == SHARED[:12]


@pytest.mark.parametrize("name", FILES)
def test_every_field_has_a_comment_and_nothing_else_stands_in_config(name):
    tree = next(
        n for n in ast.parse(FILES[name]).body if isinstance(n, ast.ClassDef) and n.name == "Config"
    )
    assert [node.target.id for node in tree.body] == list(fields(name))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_settings_of_the_run_are_the_same(a, b):
    for field in SHARED[:11]:
        assert fields(a)[field] == fields(b)[field], field


def lines_of_train(name, variables):
    """The loop of `train`, and its lines that set these variables, as syntax trees."""
    tree = next(n for n in ast.parse(FILES[name]).body if getattr(n, "name", "") == "train")
    assigned = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id in variables]
    loops = [n for n in tree.body if isinstance(n, ast.For)]
    assert len(loops) == 1
    return [ast.dump(node) for node in [*assigned, *loops]]


@pytest.mark.parametrize("name", FILES)
def test_the_loop_and_the_lines_before_it_are_the_same(name):
    variables = {"keys", "start", "chunk", "state", "policies"}
    if name == "combo":  # fits its model before, and its chunk takes the terminal states
        variables = {"keys", "start", "policies"}
    assert lines_of_train(name, variables) == lines_of_train("iql", variables)


@pytest.mark.parametrize("name", FILES)
def test_self_contained(name):
    """Imports no other algorithm; of the project, only the three modules of common."""
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & set(FILES)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in {*FILES, "common"}:
            assert node.module == "common"
            assert {alias.name for alias in node.names} <= {"datasets", "evaluation", "experiment"}


@functools.cache
def words_of_common():
    """{file: the words of its code}; docstrings may give examples."""
    found = {}
    for path in (ALGORITHMS.parent / "common").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if ast.get_docstring(node) if isinstance(node, DOCUMENTED) else False:
                node.body = node.body[1:]
        found[path.name] = set(re.findall(r"[a-z0-9]+", ast.dump(tree).lower()))
    return found


@pytest.mark.parametrize("name", FILES)
def test_common_knows_no_algorithm(name):
    assert not [path for path, words in words_of_common().items() if name in words]


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_says_what_a_reader_needs(name):
    text = " ".join(ast.get_docstring(ast.parse(FILES[name])).split())
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)
    assert f"Run: python algorithms/{name}.py" in text
    assert "Differs from" in text
