"""CORL, PyTorch: its whole training loops; a call of their logger marks an update."""

from functools import partial

import numpy as np

from benchmarks.peers import (
    ACTION,
    BATCH,
    DT,
    EPISODES,
    EVALUATION,
    LENGTH,
    OBS,
    THREE,
    TWO,
    Row,
    every,
    module,
    repeat,
)

PEER = dict(
    name="CORL",
    repository="https://github.com/tinkoff-ai/CORL",
    packages=("torch", "gymnasium", "mujoco"),
)


def training(what, sizes, updates, **settings):
    def rows(checkout, world):
        def loop(tick):
            peer = module(checkout, f"algorithms/offline/{what}.py")
            peer.wandb.log = every(updates, tick)
            peer.train(peer.TrainConfig(device="cpu", **settings))

        yield Row(what, sizes, updates, loop)

    return rows


def evaluation(checkout, world):
    peer = module(checkout, "algorithms/offline/iql.py")
    actor = peer.GaussianPolicy(OBS, ACTION, 1.0)
    run = partial(peer.eval_actor, world, actor, "cpu", EVALUATION["episodes"], 0)
    yield Row("evaluation", EVALUATION, 1, repeat(run, 1))


def stepping(checkout, world):
    """Steps of the environment without a policy, one episode after another."""
    actions = np.random.default_rng(0).uniform(-1, 1, (LENGTH, ACTION))

    def run():
        for _ in range(EVALUATION["episodes"]):
            world.reset()
            for action in actions:
                world.step(action)

    yield Row("stepping", dict(episodes=EVALUATION["episodes"]), 1, repeat(run, 1))


NEVER = 10**9
ROWS = dict(buffer_size=EPISODES * LENGTH, normalize_reward=False)
IQL = dict(widths=TWO, critics=2, **BATCH)
AWAC = dict(widths=THREE, critics=2, **BATCH)
CQL = AWAC | dict(actions=30)
CASES = {
    "iql": training("iql", IQL, 100, eval_freq=NEVER, **ROWS),
    "awac": training("awac", AWAC, 50, eval_frequency=NEVER, **ROWS),
    "cql": training("cql", CQL, 5, eval_freq=NEVER, **ROWS),
    "dt": training("dt", DT, 4, target_returns=(), eval_every=NEVER, num_workers=0),
    "evaluation": evaluation,
    "stepping": stepping,
}
