"""Names of environments: a Gymnasium id, optionally followed by options as a JSON object.

    Hopper-v5
    Hopper-v5 {"terminate_when_unhealthy": false, "max_episode_steps": 200}

Options are arguments of the environment's constructor and its time limit. They are plain values,
never code.
"""

import copy
import json
import re

import gymnasium

from common.experiment import files

DRAWING = {"render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config"}


def split(env_id):
    """(Gymnasium id, options) of a name. Raises ValueError if an option is not a plain value."""
    name, space, text = env_id.partition(" ")
    try:
        options = files.parse_json(text) if space else {}
        if plain(options):
            return name, options
    except ValueError:
        pass
    raise ValueError(f"options must be a JSON object of plain values, not {text[:200]}")


def join(name, options):
    """The name of an environment with options, without those that change nothing.

    Raises ValueError for options that are not plain values.
    """
    if not plain(options):
        raise ValueError(f"the options of {name} are not plain values")
    options = {key: x for key, x in options.items() if key not in DRAWING}
    spec = gymnasium.registry.get(name)
    usual = {"max_episode_steps": spec.max_episode_steps, **spec.kwargs} if spec else {}
    left = {key: x for key, x in options.items() if key not in usual or usual[key] != x}
    return f"{name} {json.dumps(left, sort_keys=True)}" if left else name


def spec(env_id):
    """Gymnasium's EnvSpec of a registered environment, with the options of the name."""
    name, options = split(env_id)
    found = copy.deepcopy(gymnasium.spec(name))
    found.max_episode_steps = options.pop("max_episode_steps", found.max_episode_steps)
    found.kwargs.update(options)
    return found


def plain(value, depth=0):
    """Whether a JSON value is a number, a flag, a word (not a path), or a container of these."""
    if depth > 4 or (isinstance(value, list | dict) and len(value) > 1000):
        return False
    if isinstance(value, list):
        return all(plain(one, depth + 1) for one in value)
    if isinstance(value, dict):
        keys = all(re.fullmatch(r"\w{1,100}", key) for key in value)
        return keys and all(plain(one, depth + 1) for one in value.values())
    if isinstance(value, str):
        return bool(re.fullmatch(r"\w[\w .+-]{0,100}|", value))
    return value is None or isinstance(value, bool | int | float)
