"""Are the numbers the authors'? Losses, gradients and updates beside another implementation's.

Each file here, parity/<algorithm>.py, names a peer, makes inputs (weights, batches, noise), drives
the peer's own code with them, and ours. The peer runs once, in an environment of its own; what is
kept of it are numbers, parity/golden/<algorithm>.npz, under "in/..." and "out/...".

    python -m benchmarks.parity inputs iql           # golden/iql.npz, inputs only
    python -m benchmarks.parity theirs iql CHECKOUT  # with the peer's Python: adds its outputs
    python -m benchmarks.parity                      # the table, also to results/parity.json
    python -m benchmarks.parity table iql            # its rows of the table anew, the others kept

CHECKOUT is a clone of the peer's repository at the commit that the file names. The second command
imports nothing of this project but numpy code of this folder. A difference is
max |ours - theirs| / max |theirs| over the elements of one quantity.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.parity import vector

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "results/parity.json"
BOUND = 1e-5  # of every difference; a file's own BOUNDS = {quantity: bound} says where not


def algorithms():
    """Names of those with golden numbers and the file that made them."""
    golden = sorted(path.stem for path in FOLDER.glob("golden/*.npz"))
    return [name for name in golden if (FOLDER / f"{name}.py").exists()]


def module(name):
    """The file parity/<name>.py."""
    return importlib.import_module(f"benchmarks.parity.{name}")


def read(name):
    """Inputs and the peer's outputs, two dicts of arrays."""
    with np.load(FOLDER / f"golden/{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return tuple(
        {k.removeprefix(part): v for k, v in arrays.items() if k.startswith(part)}
        for part in ("in/", "out/")
    )


def write(name, inputs, outputs):
    """The other way round; under a new name first, so that a crash leaves the old file."""
    arrays = {f"in/{k}": v for k, v in inputs.items()} | {f"out/{k}": v for k, v in outputs.items()}
    path = FOLDER / f"golden/{name}.npz"
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new.npz")
    np.savez_compressed(new, **arrays)
    new.replace(path)


def differences(ours, theirs):
    """{quantity: max |ours - theirs| / max |theirs|}; a quantity is an array or a tree of them."""
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
    """{quantity: largest difference allowed}; None where the two differ on purpose."""
    file, (_, theirs) = module(name), read(name)
    own = getattr(file, "BOUNDS", {}) | dict.fromkeys(getattr(file, "DIFFERS", {}))
    return {quantity: own.get(quantity, BOUND) for quantity in theirs}


def rows(name):
    """Lines of the table for one algorithm."""
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
        print("| algorithm | peer | quantity | largest difference | |\n|---|---|---|---|---|")
        for row in table:
            verdict = row["differs"] or ("same" if row["difference"] <= row["bound"] else "DIFFERS")
            cells = row["algorithm"], row["peer"], row["quantity"], row["difference"], verdict
            print("| " + " | ".join(map(str, cells)) + " |")
    else:
        raise SystemExit(f"no command {command!r}\n{__doc__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
