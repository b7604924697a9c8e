"""The environment that data were recorded in, from names and metadata.

Only plain values of the metadata are used: the id of a registered environment, its options, its
time limit, the bounds of its actions. No code in the metadata is run or imported.
"""

import json
import math

import numpy as np

from common import evaluation
from common.datasets.checked import MOST_ACTIONS, DatasetError

HARMLESS = {  # wrappers that change neither observations nor actions nor rewards
    "RecordEpisodeStatistics", "RecordVideo", "RenderCollection", "HumanRendering",
    "OrderEnforcing", "PassiveEnvChecker", "StepDataCollector", "DataCollector", "Autoreset",
}  # fmt: skip


def environment(source, metadata):
    """(the evaluation.Env to score on, its own action bounds, notes for the user).

    It is the user's choice, `source.env_id`, else the evaluation environment in Minari's metadata,
    else the environment that the data were recorded in. The bounds in Env are those of the recorded
    actions, from the metadata; they differ from the environment's own if a wrapper rescaled them.
    Without an environment, or if it cannot be reproduced, Env.env_id is "" and a note says why.
    Raises DatasetError for a choice that contradicts the metadata.
    """
    own, wrappers, why = read_spec(metadata)
    low, high = action_bounds(metadata)
    asked = source.env_id
    if asked and own and asked.partition(" ")[0] != own.partition(" ")[0]:
        raise DatasetError(f"--env-id {asked}: {source.path} holds data of {own}.")
    rescaled = "RescaleAction" in wrappers
    unknown = sorted(wrappers.keys() - HARMLESS - {"RescaleAction", "ClipAction", "TimeLimit"})
    if unknown:
        why = why or f"its data went through {', '.join(unknown)}, which cannot be honoured"
    env, notes = evaluation.Env(), []
    try:
        if asked or (own and not why):
            env = evaluation.inspect(asked or own)
            why = "" if asked else differs(env, metadata, low, rescaled or "ClipAction" in wrappers)
    except evaluation.EvaluationError as error:
        if asked:
            raise DatasetError(str(error)) from None
        why = str(error)
    if why:
        notes.append(f"cannot be scored: {why}")
        env = evaluation.Env()
    elif " " in env.env_id and not asked:
        notes.append(f"is scored on {env.env_id}, as its metadata say")
    if not env.env_id:
        env = env._replace(num_actions=num_actions(metadata))
    bounds = env.low, env.high
    if low is not None and (rescaled or not env.env_id):
        env = env._replace(low=low, high=high)
        bounds = bounds if env.env_id else (low, high)
    env = env._replace(limit=env.limit or source.limit, clip="ClipAction" in wrappers)
    return env, bounds, notes


def read_spec(metadata):
    """(name of the environment, {wrapper: arguments}, why it cannot be made), "" for none."""
    own = spec_of(metadata.get("env_spec"))
    scored = spec_of(metadata.get("eval_env_spec")) or own
    wrappers = {}
    for one in own.get("additional_wrappers") or ():
        if isinstance(one, dict):
            wrappers[str(one.get("name"))[:100]] = one.get("kwargs")
    name, arguments = str(scored.get("id", ""))[:100], scored.get("kwargs") or {}
    limits = [scored.get("max_episode_steps")]
    if isinstance(wrappers.get("TimeLimit"), dict):
        limits.append(wrappers["TimeLimit"].get("max_episode_steps"))
    limits = [x for x in limits if type(x) is int and x > 0]
    try:
        arguments = {**arguments, **({"max_episode_steps": min(limits)} if limits else {})}
        return evaluation.named(name, arguments) if name else "", wrappers, ""
    except (TypeError, ValueError):
        return name, wrappers, f"the arguments of {name} in its metadata are not plain values"


def spec_of(value):
    """A part of the metadata, a dict or its JSON text, as a dict; {} for anything else."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def action_bounds(metadata):
    """Bounds (low, high), (A,) float32, of the metadata's action_space, or (None, None)."""
    space = spec_of(metadata.get("action_space"))
    try:
        low, high = (np.asarray(space[key], np.float32).ravel() for key in ("low", "high"))
    except (KeyError, TypeError, ValueError):
        return None, None
    good = low.shape == high.shape and low.size and np.isfinite([low, high]).all()
    return (low, high) if good and (low < high).all() else (None, None)


def num_actions(metadata):
    """The number of discrete actions in the metadata's action_space; 0: it has others."""
    space = spec_of(metadata.get("action_space"))
    count = space.get("n") if space.get("type") == "Discrete" else 0
    good = type(count) is int and 0 < count <= MOST_ACTIONS and space.get("start", 0) == 0
    return count if good else 0


def differs(env, metadata, low, wrapped):
    """Why `env` is not the environment that the metadata describe; "" if it is."""
    shape = spec_of(metadata.get("observation_space")).get("shape")
    if isinstance(shape, list) and math.prod(shape) != env.obs_dim:
        return f"its observations have shape {shape}, those of {env.env_id} [{env.obs_dim}]"
    _, high = action_bounds(metadata)
    if metadata.get("action_space") and (count := num_actions(metadata)) != env.num_actions:
        ours, theirs = (
            f"{n} discrete actions" if n else "vectors" for n in (count, env.num_actions)
        )
        return f"its actions are {ours}, those of {env.env_id} {theirs}"
    if low is None or wrapped or env.num_actions:
        return ""
    if low.shape != env.low.shape or not np.allclose([low, high], [env.low, env.high]):
        theirs = f"{env.env_id} from {env.low.min():g} to {env.high.max():g}"
        return f"its actions go from {low.min():g} to {high.max():g}, those of {theirs}"
    return ""
