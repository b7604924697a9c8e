"""Every algorithm so small that it trains in a second, for tests that are the same for all files.

A field of its own that is an int becomes 5 at most, and hidden layers 8 wide. A new file needs a
line in OWN only if that does not fit it.
"""

import dataclasses
import importlib
from pathlib import Path

import h5py
import numpy as np

from common import datasets

FILES = sorted((Path(__file__).resolve().parents[1] / "algorithms").glob("*.py"))
NAMES = [path.stem for path in FILES if "\ndef train(" in path.read_text("utf-8")]
RUN = dict(
    num_updates=100, log_every=10, eval_every=50, save_every=50, eval_episodes=1, num_seeds=2,
    batch_size=8,
)  # fmt: skip
DISCRETE = [path.stem for path in FILES if '\nACTIONS = ("discrete",)' in path.read_text("utf-8")]
TWINS = {  # slow to compile, and most of the text is a sibling's: their longest tests run weekly
    "diffuser": "decision_diffuser",
    "mobile": "combo",
    "mopo": "combo",
}
OWN = {
    "fql": dict(chunk=3),  # which makes it a policy with memory
    "brac": dict(divergence="wasserstein"),  # which trains all its networks
    "mobile": dict(real_fraction=0.5),
    "mopo": dict(real_fraction=0.5),
    "decision_diffuser": dict(
        horizon=16,
        diffusion_steps=2,
        width=16,
        multiples=(2,),
        plan_every=4,
        regions=(0.0, 0.0, 9.0),
    ),
    "cal_ql": dict(online_steps=50, critic_widths=(8, 8)),
    "rlpd": dict(pretrain_updates=50),
    "diffuser": dict(
        horizon=16, diffusion_steps=2, width=32, multiples=(2,), guide_steps=1, plan_every=4
    ),
}


def settings(name):
    """{field: its small value} of the Config of algorithms/<name>.py, where the default is not."""
    small = {}
    for field in dataclasses.fields(importlib.import_module(name).Config):
        default, kind = field.default, str(field.type)
        if field.name in RUN:
            small[field.name] = RUN[field.name]
        elif field.name.endswith("widths"):
            small[field.name] = (8,) * len(default)
        elif field.name == "width":
            small[field.name] = 8
        elif type(default) is int and "int" in kind:
            small[field.name] = min(default, 5)
    return small | OWN.get(name, {})


def config(name, **changes):
    """The small Config."""
    return importlib.import_module(name).Config(**settings(name) | changes)


def flags(values):
    """{field: value} as words of a command line."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return words


def sizes(name=""):
    """(environment, D, A) of the tiny data of algorithms/<name>.py."""
    return ("CartPole-v1", 4, 2) if name in DISCRETE else ("Hopper-v5", 11, 3)


def write(path, name="", rows=64, episode=16):
    """An HDF5 file for a file's environment in D4RL's layout; one of its episodes ends in a
    terminal state."""
    rng, last = np.random.default_rng(0), np.arange(rows) % episode == episode - 1
    _, dim, actions = sizes(name)
    track = rng.normal(size=(rows + 1, dim)).astype(np.float32)
    terminals = last & (np.arange(rows) < episode)
    with h5py.File(path, "w") as file:
        file["observations"], file["next_observations"] = track[:-1], track[1:]
        vectors = rng.uniform(-1, 1, (rows, actions)).astype(np.float32)
        file["actions"] = vectors.argmax(1) if name in DISCRETE else vectors
        file["rewards"] = rng.normal(1, 1, rows).astype(np.float32)
        file["terminals"], file["timeouts"] = terminals, last & ~terminals


def dataset(path, name=""):
    """That file as a Dataset, written where there is none yet."""
    if not Path(path).exists():
        write(path, name)
    return datasets.load(str(path), sizes(name)[0])
