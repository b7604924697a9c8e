"""Siblings differ in the idea alone: blocks of one name are one text, but for a short list."""

import ast
import functools
import itertools
import re
from pathlib import Path

import pytest

ALGORITHMS = Path(__file__).parents[2] / "algorithms"
FILES = {path.stem: path.read_text("utf-8") for path in sorted(ALGORITHMS.glob("*.py"))}
TRAINERS = [name for name, text in FILES.items() if "\ndef train(" in text]
PAIRS = list(itertools.combinations(TRAINERS, 2))

# An algorithm's idea: these may differ between any two files,
IDEA = {"Config", "State", "init", "update", "check", "main", "train", "TUNED"}
IDEA |= {"ACTIONS", "actor_loss", "critic_loss", "value_loss", "model_loss", "advantage"}
# and these, each text shared by the files between two bars: other kinds of policy and of data.
# Files that are not named share one text: a new one is named only where it differs from them.
VERSIONS = {
    "Actor": "awr | bear | brac | cal_ql combo cql edac mobile mopo sac | rebrac td3_bc | rlpd"
    " | rvs",
    "Critic": "discrete_cql | fql | rebrac | rlpd",
    "act": "bcq bear | brac cal_ql combo cql edac mobile mopo rlpd sac | decision_diffuser"
    " | diffuser | discrete_bcq | discrete_cql | dt | fql | rebrac td3_bc | rvs",
    "policy": "bcq bear | decision_diffuser diffuser | discrete_bcq | dt fql rvs",
    "minibatch": "awr | decision_diffuser | diffuser | dt | rvs",
    "train_chunk": "awr | combo mobile mopo | decision_diffuser diffuser dt | rebrac td3_bc | rlpd"
    " | rvs",
    "Window": "decision_diffuser | dt",
    "Block": "dt",
    "candidates": "bear",
    "TimeEmbedding": "decision_diffuser",
    "plan": "decision_diffuser",
    "backup": "mobile",
    "rollout": "mopo",
    "learn": "cal_ql | rlpd",
    "temperature_loss": "rlpd",
    "multiplier_loss": "cal_ql",
}
# What `train` does from its seeds' keys on is one text; these files have a line more.
MORE = {
    "combo": "if run.step == 0:\n    state = run.restore(state.replace(dynamics=fit_dynamics(",
    "mopo": "if run.step == 0:\n    dynamics = fit_dynamics(",
    "mobile": "if run.step == 0:\n    state = run.restore(state.replace(dynamics=fit_dynamics(",
    "brac": "if run.step == 0:\n    state = run.restore(clone_behaviour(",
    "dt": "report(run, cfg.targets)",
    **dict.fromkeys(("awac", "cal_ql", "iql"), "if cfg.online_steps:"),
    "rlpd": "if cfg.pretrain_updates < cfg.num_updates:",
}
SHARED = """env env_id env_module seed num_seeds num_updates log_every eval_every eval_episodes out
resume wandb batch_size gamma lr actor_lr critic_lr polyak widths normalize""".split()


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


BLOCKS = {name: blocks(name) for name in FILES}


def fields(name):
    """Lines of Config: {field: (annotation, comment)} in their order."""
    body = FILES[name].split("class Config:\n")[1].split("\n\n\n")[0]
    lines = (re.fullmatch(r"    (\w+): (.+?) = .+?  # (.+)", line) for line in body.splitlines())
    return {m[1]: (m[2], m[3]) for m in lines if m}


def texts(block):
    """The files that have this block, grouped by its text."""
    groups = {}
    for name in FILES:
        if block in BLOCKS[name]:
            groups.setdefault(BLOCKS[name][block], set()).add(name)
    return groups.values()


@pytest.mark.parametrize("block", sorted({n for name in FILES for n in BLOCKS[name]} - IDEA))
def test_blocks_of_one_name_are_one_text(block):
    """One text in all files but those of the list, which is no longer than it must be."""
    found, apart = {" ".join(sorted(group)) for group in texts(block)}, set()
    if block in VERSIONS:
        apart = set(VERSIONS[block].split(" | "))
    assert apart <= found
    assert len(found - apart) <= 1


def test_what_all_files_have():
    assert all({"Config", "main", "descend"} <= BLOCKS[name].keys() for name in FILES)
    for name in TRAINERS:
        assert {"Config", "State", "init", "update", "act", "policy", "train", "main"} <= BLOCKS[
            name
        ].keys()
        assert {"descend", "normalise", "minibatch", "train_chunk"} <= BLOCKS[name].keys()
        assert set(VERSIONS) & IDEA == set()


def test_cql_and_combo_have_one_policy():
    assert BLOCKS["cql"]["actor_loss"] == BLOCKS["combo"]["actor_loss"]


def test_the_model_is_one_text():
    """That of the section Dynamics and of the buffer, comments included."""
    based = [text for text in FILES.values() if "# --- Dynamics ---\n\n" in text]
    parts = {text.split("# --- Dynamics ---\n\n")[1].split("class State:")[0] for text in based}
    assert len(based) == 3 and len(parts) == 1


@pytest.mark.parametrize("name", TRAINERS)
def test_shared_fields_come_first_in_one_order(name):
    own = list(fields(name))
    shared = [field for field in SHARED if field in own]
    assert own[: len(shared)] == shared
    assert own[:13] == SHARED[:13]


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


def statements(name, function):
    """Those of a function, each as one text without comments."""
    (tree,) = (n for n in ast.parse(FILES[name]).body if getattr(n, "name", "") == function)
    return [ast.unparse(node) for node in tree.body]


def starts(lines, words):
    """The number of the one line that starts with these words."""
    (found,) = (i for i, line in enumerate(lines) if line.startswith(words))
    return found


@pytest.mark.parametrize("name", TRAINERS)
def test_train_sets_up_and_loops_as_all_do(name):
    """Its head: the config, its check against the data, the run. Then what is learned from; then,
    from the keys on, the text of CQL, but for MORE and what else a chunk is told."""
    lines, cql = statements(name, "train"), statements("cql", "train")
    has = BLOCKS[name].keys()
    tuned = "TUNED" if "TUNED" in has else "{}"
    assert lines[:2] == [cql[0], f"cfg = experiment.resolve(cfg, {tuned}, dataset)"]
    run, keys = starts(lines, "run = "), starts(lines, "keys = ")
    assert lines[run] == "run = experiment.Run(cfg, dataset)"
    assert ("check(cfg, dataset)" in lines[2:run]) == ("check" in has)
    assert any(line.startswith("data = ") for line in lines[run:keys])
    rest = [re.sub("(train_chunk, cfg=cfg), [^)]+", r"\1", line) for line in lines[keys:]]
    rest = [line.replace("data.rows)", "data)") for line in rest]  # AWR has more than rows
    if name in MORE:
        del rest[starts(rest, MORE[name])]
    assert rest == cql[starts(cql, "keys = ") :]


@pytest.mark.parametrize("name", TRAINERS)
def test_main_resolves_loads_and_trains(name):
    tuned = ", TUNED" if "TUNED" in BLOCKS[name] else ""
    assert statements(name, "main") == [
        f"cfg = experiment.resolve(cfg{tuned})",
        "train(cfg, datasets.load(cfg.env, cfg.env_id))",
    ]


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
        found[path] = set(re.findall(r"[a-z0-9]+", ast.dump(tree).lower()))
    return found


@pytest.mark.parametrize("name", FILES)
def test_common_knows_no_algorithm(name):
    assert not [path for path, words in words_of_common().items() if name in words]


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_says_what_a_reader_needs(name):
    text = ast.get_docstring(ast.parse(FILES[name]))
    assert re.search(r"arXiv:\d{4}\.\d{5}|proceedings\.mlr\.press/v\d+/\w+", text)
    assert f"Run: python algorithms/{name}.py" in text
    assert "Differs from" in " ".join(text.split())


@pytest.mark.parametrize("name", FILES)
def test_a_schedule_of_the_runs_length_is_declared(name):
    """A run is extended unless a field's comment says `until num_updates`, as of online steps."""
    scheduled = re.search(r"schedule\([^)]*cfg\.num_updates", FILES[name]) is not None
    scheduled |= bool({"online_steps", "random_steps"} & fields(name).keys())
    declared = [field for field, (_, text) in fields(name).items() if "until num_updates" in text]
    assert scheduled == bool(declared)
