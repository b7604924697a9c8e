"""tests/siblings.py copies a block to the files that share it, and to no other."""

import pytest
import siblings

HEAD = "import functools\n\n\n"
OLD = "@functools.cache\ndef f(x):\n    return x\n"
NEW = "@functools.lru_cache(3)\ndef f(x):\n    # why\n    return x + 1\n"
TAIL = "\n\nN = 1  # a number\n\n\ndef g():\n    return f(N)\n"


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.py").write_text(HEAD + (NEW if name == "a" else OLD) + TAIL)
    (tmp_path / "e.py").write_text(HEAD + "N = 2\n")
    return lambda: {path.stem: path.read_text() for path in tmp_path.glob("*.py")}


def test_to_all_that_have_it(files, tmp_path):
    changed = siblings.copy(tmp_path / "a.py", "f", {}, set())
    assert [path.stem for path in changed] == ["b", "c", "d"]
    assert files() == dict.fromkeys("abcd", HEAD + NEW + TAIL) | {"e": HEAD + "N = 2\n"}
    assert siblings.copy(tmp_path / "a.py", "f", {}, set()) == []


def test_to_its_own_group_alone(files, tmp_path):
    changed = siblings.copy(tmp_path / "a.py", "f", {"f": "a c | b d"}, set())
    assert [path.stem for path in changed] == ["c"]
    assert files()["b"] == files()["d"] == HEAD + OLD + TAIL


def test_a_file_outside_the_groups_leaves_them(files, tmp_path):
    assert siblings.copy(tmp_path / "a.py", "f", {"f": "b | c d"}, set()) == []


def test_an_assignment(files, tmp_path):
    changed = siblings.copy(tmp_path / "e.py", "N", {}, set())
    assert [path.stem for path in changed] == ["a", "b", "c", "d"]
    assert files()["b"] == (HEAD + OLD + TAIL).replace("N = 1  # a number", "N = 2")


@pytest.mark.parametrize(
    ("block", "idea", "words"), [("h", set(), "no block 'h'"), ("f", {"f"}, "may differ")]
)
def test_refuses(files, tmp_path, block, idea, words):
    before = files()
    with pytest.raises(SystemExit, match=words):
        siblings.copy(tmp_path / "a.py", block, {}, idea)
    assert files() == before


def test_the_rules_are_those_of_the_test():
    versions, idea = siblings.rules()
    assert "Config" in idea and "rebrac" in versions["Actor"]
