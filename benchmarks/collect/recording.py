"""Episodes of policies as rows, and rows as a Minari dataset with its provenance."""

import os
import re
import shutil
import sys
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

from common.evaluation import options

FIELDS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")


def play(envs, policy, rng, num_steps, begin=None, names=FIELDS):
    """Whole episodes, in rounds of one per environment, until there are `num_steps` rows.

    policy: obs (n, D) -> action (n, A). begin: makes for each round a function of the policy's
    action of environment i and of i, which returns the action to take and more columns. Returns
    {name: array} of `names`, one episode after another.
    """
    episodes, total = [], 0
    while total < num_steps:
        seeds = rng.integers(0, 2**31, len(envs))
        obs = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
        take = begin() if begin else lambda action, i: (action,)
        rows, alive = [[] for _ in envs], list(range(len(envs)))
        while alive:
            actions = np.asarray(policy(np.stack(obs)))
            for i in list(alive):
                action, *more = take(actions[i], i)
                next_obs, reward, terminated, truncated, _ = envs[i].step(action)
                rows[i].append((obs[i], action, reward, next_obs, terminated, truncated, *more))
                obs[i] = next_obs
                if terminated or truncated:
                    alive.remove(i)
        episodes += rows
        total += sum(map(len, rows))
    flat = [row for episode in episodes for row in episode]
    return {k: np.array([row[i] for row in flat]) for i, k in enumerate(names)}


def boundaries(rows):
    """Slices of the episodes; rows after the last end count as an episode."""
    ends = np.flatnonzero(rows["terminated"] | rows["truncated"]) + 1
    edges = np.unique(np.concatenate([[0], ends, [len(rows["reward"])]]))
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def episode_returns(rows):
    """Undiscounted returns of the episodes (E,)."""
    return np.array([rows["reward"][s].sum(dtype=np.float64) for s in boundaries(rows)])


def write(path, data):
    """Writes bytes to a temporary name and renames the file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def cut(rows, num_steps):
    """The first `num_steps` rows; an episode cut there ends in a truncation."""
    rows = {k: v[:num_steps] for k, v in rows.items()}
    rows["truncated"][-1] |= not rows["terminated"][-1]
    return rows


def thin(rows, num_steps, rng):
    """Random whole episodes, in their order, that fit into `num_steps` rows."""
    episodes = boundaries(rows)
    if len(rows["reward"]) <= num_steps:
        return rows
    kept, total = [], 0
    for i in rng.permutation(len(episodes)):
        length = episodes[i].stop - episodes[i].start
        if total + length <= num_steps:
            kept, total = [*kept, i], total + length
    index = np.concatenate([np.arange(episodes[i].start, episodes[i].stop) for i in sorted(kept)])
    return {k: v[index] for k, v in rows.items()}


def export(cfg, rows, shape, action_space, reference, about, made_by, packages=(), infos=()):
    """Writes the Minari dataset stillwater/<env>/<kind>-v0 below cfg.out; its path.

    rows: {name: array} of `FIELDS`, actions in the environment's own units. shape: of an
    observation. reference: (return with score 0, return with score 100, their source in words).
    about: facts for the metadata. made_by: the behaviour in words. packages: of the environment.
    infos: names of further rows to store as Minari's infos.
    """
    env_name, _ = options.split(cfg.env_id)
    env_name = env_name.rsplit("-", 1)[0].replace("-singletask", "")
    env_name = re.sub("[^a-z0-9]+", "-", env_name.lower())
    name = f"stillwater/{env_name}/{cfg.kind}-v0"
    final = Path(cfg.out).resolve() / name
    temporary = final.with_name(f".{final.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    os.environ["MINARI_DATASETS_PATH"] = str(temporary)  # minari writes there

    returns, buffers = episode_returns(rows), []
    for s in boundaries(rows):
        terminated, truncated = rows["terminated"][s], rows["truncated"][s].copy()
        truncated[-1] |= not terminated[-1]  # the run's last, unfinished episode
        observations = np.concatenate([rows["obs"][s], rows["next_obs"][s][-1:]])
        buffers.append(
            EpisodeBuffer(
                observations=observations.astype(np.float32),
                actions=rows["action"][s],
                rewards=rows["reward"][s].astype(np.float32),
                terminations=terminated,
                truncations=truncated,
                infos={name: rows[name][s] for name in infos} or None,
            )
        )
    packages = ["gymnasium", *packages]
    with warnings.catch_warnings():  # minari recommends an e-mail address and a permanent link
        warnings.filterwarnings("ignore", "`(code_permalink|author_email|eval_env)` is set to None")
        dataset = minari.create_dataset_from_buffers(
            name,
            buffers,
            env=options.spec(cfg.env_id),
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32),
            action_space=action_space,
            algorithm_name=made_by,
            author="Stillwater",
            requirements=[f"{p}=={version(p)}" for p in packages],
            description=f"{cfg.kind} data of {cfg.env_id}, by Stillwater's benchmarks/collect",
        )
    ref_min, ref_max, source = reference
    dataset.storage.update_metadata(
        {
            "ref_min_score": ref_min,
            "ref_max_score": ref_max,
            "stillwater": {
                "command": command(),
                "config": asdict(cfg),
                "reference_from": source,
                "returns": {
                    "mean": float(returns.mean()),
                    "std": float(returns.std()),
                    "min": float(returns.min()),
                    "max": float(returns.max()),
                },
                "versions": {p: version(p) for p in ("jax", "minari", *packages)},
                **about,
            },
        }
    )
    data = temporary / name / "data"
    small = h5py.File(data / "small.hdf5", "w", libver="latest")  # with short headers
    with h5py.File(data / "main_data.hdf5") as old, small as new:
        compress(old, new)
    os.replace(data / "small.hdf5", data / "main_data.hdf5")
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary / name, final)
    shutil.rmtree(temporary)
    return final


def command():
    """What was typed."""
    stem = Path(sys.argv[0]).stem
    module = f".{stem}" if stem in ("antmaze", "discrete", "ogbench") else ""
    return " ".join([f"python -m benchmarks.collect{module}", *sys.argv[1:]])


def compress(old, new):
    """Copies HDF5 groups, attributes and arrays; shuffles and gzips arrays of more than 1 kB."""
    new.attrs.update(old.attrs)
    for name, item in old.items():
        if isinstance(item, h5py.Group):
            compress(item, new.create_group(name))
        else:
            how = {
                "compression": "gzip",
                "compression_opts": 9,
                "shuffle": True,
                "chunks": item.shape,
            }
            new.create_dataset(name, data=item[()], **(how if item.nbytes > 1024 else {}))
