"""Compares losses, gradients and whole updates with another implementation, the peer.

Each file parity/<algorithm>.py names a peer, makes inputs (weights, batches, noise) and runs the
peer's own code and ours on them. The peer runs once, in an environment of its own. Its outputs are
kept with the inputs in parity/golden/<algorithm>.npz, as "in/..." and "out/...".

    python -m benchmarks.parity inputs iql           # writes golden/iql.npz with the inputs
    python -m benchmarks.parity theirs iql CHECKOUT  # with the peer's Python: adds its outputs
    python -m benchmarks.parity                      # the table, also to results/parity.json
    python -m benchmarks.parity table iql            # computes only the rows of iql

CHECKOUT is a clone of the peer's repository at the commit named in the file. The second command
imports only NumPy code of this project. A difference is max |ours - theirs| / max |theirs| over the
elements of one quantity.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.markdown import markdown
from benchmarks.parity import vector

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "results/parity.json"
BOUND = 1e-5  # largest difference allowed, unless a file has BOUNDS = {quantity: bound}


def algorithms():
    """Names of the algorithms with golden numbers and a file here."""
    golden = sorted(path.stem for path in FOLDER.glob("golden/*.npz"))
    return [name for name in golden if (FOLDER / f"{name}.py").exists()]


def module(name):
    """The module parity/<name>.py."""
    return importlib.import_module(f"benchmarks.parity.{name}")


def read(name):
    """(inputs, the peer's outputs), flat dicts of arrays."""
    with np.load(FOLDER / f"golden/{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return tuple(
        {k.removeprefix(part): v for k, v in arrays.items() if k.startswith(part)}
        for part in ("in/", "out/")
    )


def write(name, inputs, outputs):
    """Writes the golden file to a temporary name and renames it."""
    arrays = {f"in/{k}": v for k, v in inputs.items()} | {f"out/{k}": v for k, v in outputs.items()}
    path = FOLDER / f"golden/{name}.npz"
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new.npz")
    np.savez_compressed(new, **arrays)
    new.replace(path)


def differences(ours, theirs):
    """{quantity: max |ours - theirs| / max |theirs|}; a quantity is an array or a tree.

    Raises ValueError if quantities or their shapes differ.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one side has {sorted(ours.keys() ^ theirs.keys())}")
    found = {}
    for name in theirs:
        mine, known = (vector(side[name]).astype(np.float64) for side in (ours, theirs))
        if mine.shape != known.shape:
            raise ValueError(f"{name}: {len(mine)} numbers, theirs {len(known)}")
        if not (np.isfinite(known).all() and np.abs(known).max() > 0):
            raise ValueError(f"{name}: theirs is not finite, or zero throughout")
        found[name] = float(np.abs(mine - known).max() / np.abs(known).max())
    return found


def bounds(name):
    """{quantity: largest difference allowed}; None if the two differ on purpose."""
    file, (_, theirs) = module(name), read(name)
    own = getattr(file, "BOUNDS", {}) | dict.fromkeys(getattr(file, "DIFFERS", {}))
    return {quantity: own.get(quantity, BOUND) for quantity in theirs}


def rows(name):
    """The rows of the table for one algorithm, as plain data."""
    file, (inputs, theirs) = module(name), read(name)
    found, allowed = differences(file.ours(inputs), theirs), bounds(name)
    for quantity in found:
        yield {
            "algorithm": name,
            "peer": file.PEER["name"],
            "repository": file.PEER["repository"],
            "commit": file.PEER["commit"],
            "quantity": quantity,
            "difference": float(f"{found[quantity]:.2g}"),
            "bound": allowed[quantity],
            "differs": getattr(file, "DIFFERS", {}).get(quantity, ""),
        }


def main(command="table", *words):
    if command == "inputs":
        (name,) = words
        write(name, module(name).inputs(), {})
    elif command == "theirs":
        name, checkout = words
        inputs, _ = read(name)
        outputs = module(name).theirs(inputs, str(Path(checkout).resolve()))
        write(name, inputs, {quantity: vector(tree) for quantity, tree in outputs.items()})
    elif command == "table":
        names = words or algorithms()
        kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
        table = [row for row in kept if row["algorithm"] not in names]
        table += [row for name in names for row in rows(name)]
        table.sort(key=lambda row: row["algorithm"])  # a stable sort: quantities keep their order
        RESULTS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
        names, cells = ["algorithm", "peer", "quantity", "largest difference", ""], []
        for row in table:
            verdict = row["differs"] or ("same" if row["difference"] <= row["bound"] else "DIFFERS")
            values = (row[k] for k in ("algorithm", "peer", "quantity", "difference"))
            cells.append([*values, verdict])
        print(markdown(names, cells), end="")
    else:
        raise SystemExit(f"unknown command {command!r}\n{__doc__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
