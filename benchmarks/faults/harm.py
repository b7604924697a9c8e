"""Outcomes of tests/common/test_harm.py by kind of attack or fault.

    python -m pytest -rA tests/common/test_harm.py > now.txt
    python -m benchmarks.faults.harm --now now.txt

A kind is a section of that file, a case is a test in it. `before` counts the cases that passed at
the commit `before_commit`, before the faults were fixed: the same tests in a checkout of it, with
twelve seconds for each and common/experiment/files.py copied there for its imports (tests of it
count as failed). A case also fails if a message has other words. Writes
benchmarks/results/harm.json.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import experiment

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/common/test_harm.py"


@dataclass(frozen=True)
class Config:
    now: str  # file with the output of pytest -rA
    before: str = ""  # the same at before_commit; empty: the counts in `results`
    before_commit: str = ""  # empty: as in `results`
    results: str = str(ROOT / "benchmarks/results/harm.json")  # file to write


def sections():
    """{name of a test: title of its section}."""
    found, title = {}, ""
    for line in TESTS.read_text().splitlines():
        if header := re.match(r"# --- (.*) ---$", line):
            title = header[1]
        elif test := re.match(r"def (test_\w+)\(", line):
            found[test[1]] = title
    return found


def count(path):
    """({section: cases}, {section: cases that passed}) from pytest's output."""
    titles, cases, passed = sections(), Counter(), Counter()
    for line in Path(path).read_text(errors="replace").splitlines():
        if found := re.match(r"(PASSED|FAILED|ERROR) .*::(test_\w+)", line):
            cases[titles[found[2]]] += 1
            passed[titles[found[2]]] += found[1] == "PASSED"
    return cases, passed


def main(cfg: Config):
    path = Path(cfg.results)
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "before_commit": ""}
    before = {row["kind"]: row["before"] for row in old["rows"]}
    if cfg.before:
        _, before = count(cfg.before)
    cases, after = count(cfg.now)
    rows = [
        {"kind": kind, "cases": cases[kind], "before": before.get(kind, 0), "after": after[kind]}
        for kind in dict.fromkeys(sections().values())
    ]
    facts = {"before_commit": cfg.before_commit or old["before_commit"], **experiment.machine()}
    path.write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n", "utf-8")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
