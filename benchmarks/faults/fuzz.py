"""Damaged HDF5 files: are all of them read or refused?

    python -m benchmarks.faults.fuzz --files 10000 --seed 0

Small files in D4RL's and Minari's layout, stored in several ways, are damaged: bits flipped, the
file cut short, blocks swapped, bytes inserted, and sizes, addresses and types in the structure set
to critical values. Each is read as by `datasets.load`, without its cache, in a process with limits
of LIMIT seconds and MEMORY bytes. The outcomes are

    read          a dataset whose numbers are all finite
    refused       a DatasetError, the one message that a user sees
    exception     anything else was raised; a user would see a traceback
    crashed       the process died
    hung          no answer within LIMIT seconds
    grew          the process took more than GROWTH bytes for the file

The last four are faults: exit code 1. File i of a seed is always the same (`make_file`), so that a
fault can be examined alone.
"""

import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro

from common import datasets

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 10.0  # seconds for one file
MEMORY = 4 * 2**30  # bytes of address space beyond what a process has at its start
GROWTH = 128 * 2**20  # bytes that reading one file may add to its process
KINDS = ("read", "refused", "exception", "crashed", "hung", "grew")
FAULTS = KINDS[2:]
HUGE = [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
MAGIC = b"\x89HDF\r\n\x1a\n"  # first bytes of an HDF5 file
SIGNATURES = b"TREE HEAP SNOD OHDR OCHK FRHP FHDB FHIB BTHD BTLF BTIN GCOL EAHD EAIB FAHD".split()


@dataclass(frozen=True)
class Config:
    files: int = 10_000  # number of damaged files
    seed: int = 0  # seed of the damages
    workers: int = 1  # processes at once
    out: str = str(ROOT / "benchmarks/results/fuzz.json")  # file for the figures


# --- Whole files ---


def fields(layout):
    """{name: array} of a small undamaged file with two or three episodes."""
    rng, n = np.random.default_rng(0), 12
    obs = rng.normal(size=(n + 1, 3)).astype(np.float32)
    action = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    reward, ends = rng.normal(size=n).astype(np.float32), np.arange(n) % 5 == 4
    if layout == "D4RL":
        return {
            "observations": obs[:-1], "actions": action, "rewards": reward, "terminals": ends,
            "timeouts": np.arange(n) == n - 1, "next_observations": obs[1:],
        }  # fmt: skip
    episode = {
        "observations": obs, "actions": action, "rewards": reward,
        "terminations": np.zeros(n, bool), "truncations": np.arange(n) == n - 1,
    }  # fmt: skip
    return {f"episode_{i}/{name}": x for i in range(2) for name, x in episode.items()}


def whole_files():
    """[(layout, bytes)] of undamaged files: contiguous, chunked, packed, resizable, compact."""
    packed = dict(compression="gzip", shuffle=True, fletcher32=True)
    compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    compact.set_layout(h5py.h5d.COMPACT)
    ways = {}, dict(chunks=5), packed | dict(chunks=5), packed, dict(maxshape=None)
    found, ways = [], (*ways, dict(compression="lzf"), dict(dcpl=compact))
    for layout in ("D4RL", "Minari"):
        for libver in ("earliest", "latest"):
            for how in ways:
                memory = io.BytesIO()
                with h5py.File(memory, "w", libver=libver) as file:
                    for name, x in fields(layout).items():
                        own = {k: (v, *x.shape[1:]) if k in ("chunks", "maxshape") else v
                               for k, v in how.items()}  # fmt: skip
                        file.create_dataset(name, data=x, **own).attrs["unit"] = "none"
                found.append((layout, memory.getvalue()))
    return found


# --- Damages: each takes (rng, bytearray) and returns bytes ---


def flip(rng, raw):
    """Flips bits anywhere, or in the first 4,096 bytes, which hold most of the structure."""
    end = len(raw) if rng.random() < 0.5 else min(len(raw), 4096)
    for i in rng.integers(0, end, rng.integers(1, 30)):
        raw[i] ^= 1 << rng.integers(8)
    return raw


def cut(rng, raw):
    """Cuts off the end."""
    return raw[: rng.integers(8, len(raw))]


def swap(rng, raw):
    """Swaps two blocks."""
    size = int(rng.choice([8, 16, 64, 256, 1024]))
    a, b = rng.integers(0, max(len(raw) - size, 1), 2)
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]
    return raw


def insert(rng, raw):
    """Inserts random bytes."""
    at, size = rng.integers(8, len(raw)), int(rng.choice([1, 2, 8, 64, 512]))
    return raw[:at] + rng.integers(0, 256, size, np.uint8).tobytes() + raw[at:]


def copy(rng, raw):
    """Copies a block over another one, so that structures stand in wrong places."""
    size = int(rng.choice([4, 8, 32, 128, 512]))
    a, b = rng.integers(0, max(len(raw) - size, 1), 2)
    raw[b : b + size] = raw[a : a + size]
    return raw


def number(rng, raw):
    """Replaces little-endian numbers of 1 to 8 bytes by huge or slightly wrong ones."""
    for _ in range(rng.integers(1, 6)):
        size, at = int(rng.choice([1, 2, 4, 8])), rng.integers(8, len(raw) - 8)
        now = int.from_bytes(raw[at : at + size], "little")
        near = [now + 1, now - 1, now * 2, now ^ 0x80, len(raw), len(raw) - 1, int(at)]
        value = int(rng.choice(np.array(HUGE + near, object))) % 2 ** (8 * size)
        raw[at : at + size] = value.to_bytes(size, "little")
    return raw


def structure(rng, raw):
    """Writes wrong numbers within 64 bytes after a signature of object headers, trees, heaps."""
    places = [i for name in SIGNATURES for i in find(raw, name)] or [0]
    for _ in range(rng.integers(1, 4)):
        at = min(int(rng.choice(places)) + int(rng.integers(4, 64)), len(raw) - 8)
        size = int(rng.choice([1, 2, 4, 8]))
        value = int(rng.choice(np.array(HUGE + [len(raw), at], object))) % 2 ** (8 * size)
        raw[at : at + size] = value.to_bytes(size, "little")
    return raw


def known(rng, raw):
    """Replaces numbers known to be in the file, its lengths and widths."""
    width = int(rng.choice([4, 8]))
    of = int(rng.choice([12, 13, 3, 2, 36, 48, 144, 156, 96]))
    places = find(raw, of.to_bytes(width, "little")) or [8]
    for at in rng.choice(places, min(len(places), rng.integers(1, 4)), replace=False):
        value = int(rng.choice(np.array(HUGE + [10**6, 10**9, 10**12], object))) % 2 ** (8 * width)
        raw[at : at + width] = value.to_bytes(width, "little")
    return raw


def find(raw, what):
    """Positions of `what` in raw."""
    places, at = [], raw.find(what)
    while at >= 0:
        places.append(at)
        at = raw.find(what, at + 1)
    return places


DAMAGES = (flip, cut, swap, insert, copy, number, structure, known)


def make_file(seed, i, wholes):
    """File i of a seed: (layout, name of its damage, bytes). One in four is damaged twice."""
    rng = np.random.default_rng([seed, i])
    layout, raw = wholes[i // len(DAMAGES) % len(wholes)]
    damage = DAMAGES[i % len(DAMAGES)]
    raw = damage(rng, bytearray(raw))
    if rng.random() < 0.25 and len(raw) > 64:
        raw = DAMAGES[rng.integers(len(DAMAGES))](rng, bytearray(raw))
    if rng.random() < 0.9:
        raw[:8] = MAGIC[: len(raw)]  # without it the rest of the file is not read
    return layout, damage.__name__, bytes(raw)


# --- Reading ---


def read(path, layout):
    """(kind, note) of one file."""
    try:
        arrays, _ = datasets.read(datasets.CheckedFile(path), datasets.Source(path, layout))
    except datasets.DatasetError as error:
        ok = str(path.parent) in str(error) and "\n\n" not in str(error)
        return ("refused", "") if ok else ("exception", f"unclear: {error}")
    except Exception as error:
        return "exception", f"{type(error).__name__}: {error}"
    rows = arrays["length"].sum()
    whole = all(len(arrays[x]) == rows and np.isfinite(arrays[x]).all() for x in
                ("obs", "action", "reward", "next_obs", "done"))  # fmt: skip
    return ("read", "") if whole and rows > 0 else ("exception", "read, but not whole")


def memory():
    """(bytes this process holds, the most it held since the last call)."""
    lines = Path("/proc/self/status").read_text().split("\n")
    now = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    return int(now["VmRSS"]) * 1024, int(now["VmHWM"]) * 1024


def work(pipe, folder, seed, reader):
    """Reads the files whose numbers come by the pipe, and answers (kind, damage, note, bytes)."""
    wholes, path = whole_files(), Path(folder, str(os.getpid()), "main_data.hdf5")
    path.parent.mkdir()
    path.with_name("metadata.json").write_text("{}")
    for layout, raw in wholes:  # what is imported and kept once is no growth
        path.write_bytes(raw)
        assert reader(path, layout) == ("read", ""), reader(path, layout)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + MEMORY, space + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(memory()[0])
    for i in iter(pipe.recv, None):
        layout, damage, raw = make_file(seed, i, wholes)
        path.unlink()
        path.write_bytes(raw)
        before, _ = memory()
        kind, note = reader(path, layout)
        after, peak = memory()
        if peak - before > GROWTH:
            kind, note = "grew", f"{(peak - before) / 2**20:.0f} MiB"
        pipe.send((kind, note, peak - before, after))


def fuzz(numbers, seed, limit=LIMIT, reader=read, work=work):
    """Reads the files of these numbers, {number: (kind, note, bytes it took, seconds)}, and what
    the processes that read them to the end grew by in all, bytes. work: what a process does."""
    found, grown, worker, context = {}, [], None, multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for i in numbers:
            if worker is None:
                pipe, theirs = context.Pipe()
                worker = context.Process(
                    target=work, args=(theirs, folder, seed, reader), daemon=True
                )
                worker.start()
                theirs.close()
                start = now = pipe.recv()
            began = time.perf_counter()
            pipe.send(i)
            try:
                kind, note, took, now = pipe.recv() if pipe.poll(limit) else ("hung", "", 0, now)
            except EOFError:
                worker.join()
                name = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else ""
                kind, note, took = "crashed", name or f"exit code {worker.exitcode}", 0
            found[i] = kind, note, took, time.perf_counter() - began
            if kind in ("crashed", "hung"):
                worker.kill()
                worker.join()
                grown, worker = [*grown, now - start], None
        if worker:
            pipe.send(None)
            worker.join()
            grown.append(now - start)
    return found, grown


def main(cfg: Config):
    """Prints the figures and writes them to `out`; exit code 1 where there is a fault."""
    began, share = (
        time.perf_counter(),
        [range(k, cfg.files, cfg.workers) for k in range(cfg.workers)],
    )
    with ThreadPoolExecutor(cfg.workers) as pool:
        parts = list(pool.map(lambda numbers: fuzz(numbers, cfg.seed), share))
    found = {i: x for part, _ in parts for i, x in part.items()}
    wholes, table = whole_files(), {damage.__name__: Counter() for damage in DAMAGES}
    for i, (kind, *_) in found.items():
        table[make_file(cfg.seed, i, wholes)[1]][kind] += 1
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    seconds, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = usage.ru_utime + usage.ru_stime
    figures = {
        "files": cfg.files,
        "seed": cfg.seed,
        "counts": {kind: sum(x[kind] for x in table.values()) for kind in KINDS},
        "counts_by_damage": {name: {kind: x[kind] for kind in KINDS} for name, x in table.items()},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "files_per_cpu_second": round(cfg.files / cpu, 1),
        "slowest_file_seconds": round(max(x[3] for x in found.values()), 3),
        "most_memory_for_a_file_mib": round(max(x[2] for x in found.values()) / 2**20, 1),
        "growth_of_a_process_mib": round(max(x for _, grown in parts for x in grown) / 2**20, 1),
        "limits": {"seconds": LIMIT, "growth_mib": GROWTH >> 20, "address_space_mib": MEMORY >> 20},
        "faults": [[i, *x[:2]] for i, x in sorted(found.items()) if x[0] in FAULTS][:100],
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "versions": {
            "python": sys.version.split()[0], "h5py": h5py.__version__,
            "hdf5": h5py.version.hdf5_version, "numpy": np.__version__,
        },
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    Path(cfg.out).write_text(json.dumps(figures, indent=2) + "\n")
    raise SystemExit(int(any(figures["counts"][kind] for kind in FAULTS)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
