"""What does an update spend its time on?

    python -m benchmarks.speed.profile              # CQL, COMBO, DT, Diffuser, Decision Diffuser
    python -m benchmarks.speed.profile --rows iql   # this row; the file keeps the others

The rows are those of benchmarks.speed, with one seed. XLA reports the time of each step of its
program. A step is a matrix product, or elementwise work, sums and copies fused together; it counts
as the first kind of work (KINDS) that its instructions contain. Writes
benchmarks/results/profile.json.
"""

import json
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from benchmarks.speed import __main__ as speed
from benchmarks.speed import flops
from common import experiment

ROOT = Path(__file__).resolve().parents[2]

KINDS = {  # kind of work: instructions that identify it
    "matrix products": "dot convolution custom-call",
    "random numbers": "xor rng-bit-generator",
    "sums: normalisation, softmax, losses": "reduce",
    "rows of the data": "gather dynamic-slice",
    "copies of the gradients and activations": "transpose copy",
    "elementwise": "",
}
WRAPPERS = "while", "call", "conditional"  # the instructions inside are counted separately
INSTRUCTION = re.compile(r" +(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")


@dataclass(frozen=True)
class Config:
    rows: tuple[str, ...] = ("cql", "combo", "dt", "diffuser", "decision_diffuser")  # to profile
    steps: int = 8  # number of longest steps to list
    calls: int = 5  # calls of the program to trace
    cores: int = 1  # cores for each row
    out: str = str(ROOT / "benchmarks/results/profile.json")  # file to write
    row: str = ""  # profile only this row, in this process, and print it


def read(text):
    """{instruction: (shape, opcode, all opcodes in it, place in our code)} of a program's text."""
    inside, lines, computation = defaultdict(set), {}, ""
    for line in text.splitlines():
        if line.endswith("{") and (begin := re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)):
            computation = begin[1]
        elif found := INSTRUCTION.match(line):
            name, shape, opcode, rest = found.groups()
            called = re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", rest)
            where = re.search(r'op_name="([^"]*)"', rest)
            lines[name] = shape, opcode, called, where[1] if where else ""
            inside[computation] |= {opcode, *(x for name in called for x in inside[name])}
    return {
        name: (shape, opcode, {opcode}.union(*(inside[x] for x in called)), where)
        for name, (shape, opcode, called, where) in lines.items()
    }


def kind(shape, opcodes):
    """The kind of work of a step."""
    if shape.startswith("u"):  # unsigned integers are bits of random numbers
        return "random numbers"
    return next(name for name, words in KINDS.items() if not words or opcodes & {*words.split()})


def trace(call, calls):
    """{step: [seconds of each execution]} over `calls` calls."""
    taken = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                call()
        (path,) = Path(folder).glob("**/*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    taken[event.name].append(event.duration_ns / 1e9)
    return taken


def steps(program, call, calls):
    """The steps of a program as plain data, the longest first; ms: milliseconds of one call."""
    found, taken = [], trace(call, calls)
    for name, (shape, opcode, opcodes, where) in read(program.as_text()).items():
        if name in taken and opcode not in WRAPPERS:
            ms = 1e3 * float(np.median(taken[name])) * len(taken[name]) / calls
            found.append({"ms": ms, "kind": kind(shape, opcodes), "shape": shape, "where": where})
    return sorted(found, key=lambda step: -step["ms"])


def profile(name, cfg):
    """One row as plain data."""
    work = speed.work_of(name, seeds=1)
    row = {"row": name, "seeds": 1, "ms": 1e3 * speed.median_time(work.call, 10, 15) / work.updates}
    rate = speed.products_rate(work.products)
    row["products_alone_ms"] = 1e3 * flops.total(work.products) / rate
    found = steps(work.program, work.call, cfg.calls)
    found = [step | {"ms": step["ms"] / work.updates} for step in found]
    kinds = {x: sum(step["ms"] for step in found if step["kind"] == x) for x in KINDS}
    return row | {"kinds_ms": kinds, "longest": found[: cfg.steps]}


def main(cfg: Config):
    if cfg.row:
        print(json.dumps(profile(cfg.row, cfg)))
        return
    machine = experiment.machine()
    facts = {x: machine[x] for x in ("versions", "device")} | {"cores": cfg.cores}
    facts = speed.kept(Path(cfg.out), facts)
    for name in cfg.rows:
        words = ["--row", name, "--steps", str(cfg.steps), "--calls", str(cfg.calls)]
        row = speed.apart("benchmarks.speed.profile", words, cfg.cores)
        speed.merge(facts["rows"], row | {"commit": machine["commit"]})
        print(f"{name}: {row['ms']:.1f} ms")
        for what, ms in row["kinds_ms"].items():
            print(f"  {ms:7.2f} {what}")
        for step in row["longest"]:
            print("  {ms:7.2f} {kind}: {shape} {where}".format(**step))
        Path(cfg.out).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
