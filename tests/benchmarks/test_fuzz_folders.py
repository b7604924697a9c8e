"""A short fuzz run over run folders, metadata and caches, the long one's beginning."""

import pytest

from benchmarks.faults import fuzz, fuzz_folders


def test_damaged_folders_go_on_or_are_refused():
    numbers = range(2 * len(fuzz_folders.TARGETS))
    found, _ = fuzz.fuzz(numbers, seed=0, limit=60.0, work=fuzz_folders.work)
    kinds = [kind for kind, *_ in found.values()]
    assert set(kinds) == {"read", "refused"}, [x for x in found.items() if x[1][0] in fuzz.FAULTS]
    assert kinds.count("read") > 10 and kinds.count("refused") > 10


def test_a_case_of_a_seed_is_always_the_same_and_every_file_is_damaged_in_every_way():
    text = b'{"a": [1, {"b": 2}], "c": "d"}'
    wholes = {x: text if x[1].endswith(".json") else text * 30 for x in fuzz_folders.TARGETS}
    cases = [fuzz_folders.make_case(0, i, wholes) for i in range(500)]
    assert cases == [fuzz_folders.make_case(0, i, wholes) for i in range(500)]
    assert {case[:2] for case in cases} == set(fuzz_folders.TARGETS)
    damages = {"other_value", "other_cell", *(damage.__name__ for damage in fuzz.DAMAGES)}
    assert {damage for _, _, damage, _, _ in cases} == damages
    assert len({case[3] for case in cases}) > 350


class Believing(fuzz_folders.World):
    """Reads a cache as it is, lets an error out, and answers unclearly."""

    def cache(self, copy):
        return "exception", "the cache was believed"

    def score(self, copy):
        raise KeyError("x")

    def metadata(self, copy):
        raise SystemExit("a\x1b[2J")


@pytest.mark.parametrize("target", ["cache", "score", "metadata"])
def test_faults_are_seen(target, tmp_path):
    world = Believing.__new__(Believing)
    (tmp_path / "whole").mkdir()
    world.folder, world.places = tmp_path, {target: tmp_path / "whole"}
    kind, note = world.outcome(target, "file", b"", False)
    assert kind == "exception"
    assert any(x in note for x in ("believed", "KeyError", "unclear"))
