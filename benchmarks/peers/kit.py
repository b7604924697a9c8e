"""OfflineRL-Kit, PyTorch: the calls inside the training loops of its COMBO."""

import sys

import numpy as np

from benchmarks.peers import (
    ACTION,
    BATCH,
    DYNAMICS,
    EPISODES,
    LENGTH,
    MODEL,
    OBS,
    ROLLOUT,
    THREE,
    Row,
    repeat,
    without,
)

PEER = dict(
    name="OfflineRL-Kit",
    repository="https://github.com/yihaosun1124/OfflineRL-Kit",
    packages=("torch",),
)


def learner(checkout, world):
    """(its policy with a model, its buffer with the data)."""
    import torch

    without("gym.envs", "gym.envs.mujoco", "pandas", "matplotlib", "matplotlib.pyplot")
    without("torch.utils.tensorboard")
    sys.path.insert(0, checkout)
    from offlinerlkit import buffer, dynamics, modules, nets, policy
    from offlinerlkit.utils import scaler, termination_fns

    def adam(net, lr):
        return torch.optim.Adam(net.parameters(), lr=lr)

    dist = modules.TanhDiagGaussian(256, ACTION, unbounded=True, conditioned_sigma=True)
    actor = modules.ActorProb(nets.MLP(OBS, THREE), dist)
    critics = [modules.Critic(nets.MLP(OBS + ACTION, THREE)) for _ in range(2)]
    log_alpha = torch.zeros(1, requires_grad=True)
    decay = 2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4
    model = modules.EnsembleDynamicsModel(OBS, ACTION, MODEL["widths"], weight_decays=decay)
    ends = termination_fns.get_termination_fn("halfcheetah-medium-v2")
    model = dynamics.EnsembleDynamics(model, adam(model, 1e-3), scaler.StandardScaler(), ends)
    combo = policy.COMBOPolicy(
        model, actor, *critics, adam(actor, 1e-4), *(adam(critic, 3e-4) for critic in critics),
        world.action_space, alpha=(-ACTION, log_alpha, torch.optim.Adam([log_alpha], 1e-4)),
        cql_weight=0.5, with_lagrange=False,
    )  # fmt: skip
    rows = buffer.ReplayBuffer(EPISODES * LENGTH, (OBS,), np.float32, ACTION, np.float32)
    rows.load_dataset(world.get_dataset())
    return combo, rows


def combo_update(checkout, world):
    combo, rows = learner(checkout, world)
    combo.train()

    def step():
        combo.learn({"real": rows.sample(128), "fake": rows.sample(128)})

    sizes = dict(widths=THREE, critics=2, actions=30, **BATCH)
    yield Row("combo_update", sizes, 4, repeat(step, 4))


def model(checkout, world):
    combo, rows = learner(checkout, world)
    model, updates = combo.dynamics, 20
    inputs, targets = model.format_samples_for_training(rows.sample_all())
    model.scaler.fit(inputs)
    drawn = np.random.default_rng(0).integers(len(inputs), size=(MODEL["members"], 256 * updates))
    epoch = model.scaler.transform(inputs)[drawn], targets[drawn]
    yield Row("dynamics", DYNAMICS, updates, repeat(lambda: model.learn(*epoch, 256), 1))

    def run():
        starts = rows.sample(ROLLOUT["starts"])["observations"].numpy()
        made, _ = combo.rollout(starts, ROLLOUT["steps"])
        assert len(made["obss"]) == ROLLOUT["starts"] * ROLLOUT["steps"]  # none has ended

    yield Row("rollout", ROLLOUT, 1, repeat(run, 1))


CASES = {"combo_update": combo_update, "model": model}
