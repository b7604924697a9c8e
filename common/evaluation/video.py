"""Films a policy."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

from common.evaluation.environments import EvaluationError, inspect, make
from common.evaluation.rollout import rollout

_ADVICE = "On Debian or Ubuntu `apt-get install libegl1 libgl1-mesa-dri` (or libosmesa6) helps."


def film(policy, env_id, path, episodes=1, seed=0):
    """Writes whole episodes of one policy to an .mp4 or .gif file; their returns (episodes,).

    policy, seed: as in `evaluate`, with S = E = 1. The film runs in simulated time at about 30 Hz.
    Raises EvaluationError as `make` does, for another kind of file, for an environment that cannot
    be drawn, and without a renderer.
    """
    import imageio.v2 as imageio
    import mujoco

    path = Path(path)
    if path.suffix not in (".mp4", ".gif"):
        raise EvaluationError(f"--video {path}: the name must end in .mp4 or .gif.")
    if not inspect(env_id).is_drawn:
        why = 'the metadata of its class list no render_mode "rgb_array"'
        raise EvaluationError(f"{env_id} cannot be drawn: {why}.")
    env = make(env_id, render_mode="rgb_array")
    if model := getattr(env.unwrapped, "model", None):
        model.vis.quality.shadowsize = 0  # shadows triple the time
        follow = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")  # -1: none
        inner = getattr(env.unwrapped, "point_env", env.unwrapped)  # a maze holds its robot
        inner.mujoco_renderer.camera_id = follow
    try:
        env.reset(seed=seed)
        env.render()
    except Exception as error:  # OpenGL libraries fail in many ways
        raise EvaluationError(f"{env_id} cannot be drawn here: {error!r}. {_ADVICE}") from error
    rate = env.metadata.get("render_fps", 30)
    skip, steps = max(1, round(rate / 30)), itertools.count()
    fps = rate / skip
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"fps": fps} if path.suffix == ".mp4" else {"duration": 1000 / fps, "loop": 0}
    with warnings.catch_warnings(), env, imageio.get_writer(path, **options) as video:
        warnings.filterwarnings("ignore", r"os.fork\(\) was called", RuntimeWarning)  # by ffmpeg

        def watched(*inputs):
            if next(steps) % skip == 0:
                video.append_data(env.render())
            return policy(*inputs)

        starts = range(seed, seed + episodes)
        return np.array([rollout(watched, [env], 1, start)[0][0, 0] for start in starts])


def choose_renderer():
    """Without a display, sets MUJOCO_GL, which MuJoCo reads when imported, to a working renderer.

    Raises EvaluationError if there is none.
    """
    asked = os.environ.get("MUJOCO_GL")
    if sys.platform != "linux" or ("DISPLAY" in os.environ and not asked):
        return
    names = [asked] if asked else ["egl", "osmesa"]
    for name in names:  # in processes of their own, because a failed import leaves traces
        trial = f"from mujoco.{name} import GLContext; GLContext(8, 8).make_current()"
        environ, quiet = {**os.environ, "MUJOCO_GL": name}, subprocess.DEVNULL
        if subprocess.call([sys.executable, "-c", trial], env=environ, stderr=quiet) == 0:
            os.environ["MUJOCO_GL"] = name
            return
    raise EvaluationError(f"MuJoCo cannot draw here: tried {' and '.join(names)}. {_ADVICE}")
