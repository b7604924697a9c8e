"""A short fuzz run over the HDF5 reader, the long one's beginning; and that it sees faults."""

import os
import signal
import time

import numpy as np

from benchmarks.faults import fuzz


def test_damaged_files_are_read_or_refused():
    found, grown = fuzz.fuzz(range(300), seed=0)
    kinds = [kind for kind, *_ in found.values()]
    assert set(kinds) == {"read", "refused"}, [x for x in found.items() if x[1][0] in fuzz.FAULTS]
    assert kinds.count("read") > 30 and kinds.count("refused") > 100
    assert len(found) == 300 and max(grown) < 64 * 2**20


def test_a_file_of_a_seed_is_always_the_same_and_is_damaged():
    wholes, again = fuzz.whole_files(), fuzz.whole_files()
    assert [raw for _, raw in wholes] == [raw for _, raw in again]
    files = [fuzz.make_file(0, i, wholes) for i in range(200)]
    assert files == [fuzz.make_file(0, i, wholes) for i in range(200)]
    assert {name for _, name, _ in files} == {damage.__name__ for damage in fuzz.DAMAGES}
    whole = [raw for _, raw in wholes]
    assert sum(raw in whole for *_, raw in files) < 40  # a swap of equal blocks is none
    assert len({raw for *_, raw in files}) > 160


WHOLE = [raw for _, raw in fuzz.whole_files()]


def faulty(path, layout):
    """A reader with every fault there is."""
    raw = path.read_bytes()
    kind = "read" if raw in WHOLE else fuzz.KINDS[sum(raw) % len(fuzz.KINDS)]
    if kind == "crashed":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "hung":
        time.sleep(60)
    elif kind == "grew":
        return "read", str(np.ones(fuzz.GROWTH // 8 + 2**20).sum())
    return kind, ""


def test_every_fault_is_seen():
    """What the file's number should come to comes out, and the next file is read all the same."""
    wholes, numbers = fuzz.whole_files(), []
    expected = {}
    for i in range(1000):  # one of each kind, then those that are fine
        *_, raw = fuzz.make_file(0, i, wholes)
        kind = fuzz.KINDS[sum(raw) % len(fuzz.KINDS)]
        if raw not in WHOLE and list(expected.values()).count(kind) < 1:
            expected[i] = kind
            numbers.append(i)
    found, _ = fuzz.fuzz(numbers, seed=0, limit=2.0, reader=faulty)
    assert {i: x[0] for i, x in found.items()} == expected
    assert sorted(expected.values()) == sorted(fuzz.KINDS)
    assert "SIGSEGV" in [x[1] for x in found.values()]
