"""What would a perfect model bring? COMBO with the simulator in the model's place.

    python -m benchmarks.studies.simulator --env stillwater/halfcheetah/medium-v0 --max-epochs 1

Takes the flags of combo.py and trains as it does, but for one function: a step of the model is a
step of MuJoCo. Rollouts start at the data's states as before. HalfCheetah only: its state follows
from its observation (but for x, which nothing depends on), and no state is terminal. --max-epochs 1
spares the time of fitting a model that is not used. settling.py shows the run beside the others.
"""

import os
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import tyro
from mujoco import rollout

from algorithms import combo
from common import datasets, experiment

ENV = "HalfCheetah-v5"


def simulate(env, pool, obs, action):
    """Next observations (..., 17) and rewards (...,) of HalfCheetah, as float32.

    env: the unwrapped environment. pool: an MjData a thread. obs: (..., 17). action: (..., 6).
    """
    model, shape = env.model, obs.shape[:-1]
    obs, action = (np.asarray(x, float).reshape(-1, x.shape[-1]) for x in (obs, action))
    state = np.zeros((len(obs), mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)))
    state[:, 2 : 2 + obs.shape[1]] = obs  # after the time and x
    control = np.broadcast_to(action[:, None], (len(obs), env.frame_skip, model.nu))
    after = rollout.rollout(model, pool, state, control, persistent_pool=True)[0][:, -1]
    effort = env._ctrl_cost_weight * (action**2).sum(1)
    reward = env._forward_reward_weight * after[:, 1] / env.dt - effort
    next_obs = after[:, 2 : 2 + obs.shape[1]]
    return (
        next_obs.reshape(*shape, -1).astype(np.float32),
        reward.reshape(shape).astype(np.float32),
    )


def simulator_step(env):
    """A function in the place of combo.model_step."""
    pool = [mujoco.MjData(env.model) for _ in range(os.cpu_count())]

    def step(dynamics, obs, action, key, cfg):
        del dynamics, key, cfg
        found = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (obs.shape, obs.shape[:-1])]
        call = partial(simulate, env, pool)
        return jax.pure_callback(call, tuple(found), obs, action, vmap_method="broadcast_all")

    return step


def main(cfg: combo.Config):
    cfg = experiment.resolve(cfg, combo.TUNED)
    dataset = datasets.load(cfg.env, cfg.env_id)
    if dataset.env_id != ENV:
        raise SystemExit(f"{dataset.name} is of {dataset.env_id}; only {ENV} is simulated.")
    combo.model_step = simulator_step(gymnasium.make(ENV).unwrapped)
    combo.train(cfg, dataset)


if __name__ == "__main__":
    main(tyro.cli(combo.Config, description=__doc__))
