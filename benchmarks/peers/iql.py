"""The authors of IQL, JAX: one compiled update at a time."""

import sys
from functools import partial

from benchmarks.peers import BATCH, EVALUATION, TWO, Row, repeat

PEER = dict(
    name="authors' IQL",
    repository="https://github.com/ikostrikov/implicit_q_learning",
    packages=("jax", "jaxlib", "flax", "optax", "tensorflow-probability", "gymnasium", "mujoco"),
)


def rows(checkout, world):
    import flax
    import jax

    jax.tree_multimap = jax.tree_util.tree_map  # as it was called then
    flax.config.update("flax_return_frozendict", True)  # as it was then
    sys.path.insert(0, checkout)
    import dataset_utils
    from configs.mujoco_config import get_config
    from evaluation import evaluate
    from learner import Learner

    data = world.get_dataset()
    obs, action, done = data["observations"], data["actions"], data["terminals"]
    columns = obs, action, data["rewards"], 1 - done, done, data["next_observations"]
    buffer = dataset_utils.Dataset(*columns, len(obs))
    agent = Learner(0, obs[:1], action[:1], max_steps=10**6, **dict(get_config()))

    def step():
        agent.update(buffer.sample(256))

    def wait():
        jax.block_until_ready([agent.actor.params, agent.critic.params, agent.target_critic.params])

    yield Row("iql", dict(widths=TWO, critics=2, **BATCH), 100, repeat(step, 100, wait))
    run = partial(evaluate, agent, world, EVALUATION["episodes"])
    yield Row("evaluation", EVALUATION, 1, repeat(run, 1))


CASES = {"all": rows}
