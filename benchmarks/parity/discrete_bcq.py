"""Discrete BCQ compared with its authors' code.

The peer: `discrete_BCQ` of discrete_BCQ/discrete_BCQ.py for observations that are vectors.
`discrete_BCQ.train` makes whole updates on batches from a stub of its replay buffer. Its one loss
is read where `backward` is called, gradients when its optimiser is about to step, both in the first
update. It is the sum of our two.

Differences removed for the comparison:
- initialisation: both start from our weights, and the target from its own
- numbers of hidden units, fixed in its code: a patched Linear maps them to ours

Weights: layers q1 to q3 are our critic, i1 to i3 our imitation. Our actions are vectors with a 1,
theirs are numbers.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.layers import from_mlp, to_mlp

PEER = dict(
    name="authors (BCQ)",
    repository="https://github.com/sfujim/BCQ",
    commit="4876f7e5afa9eb2981feec5daf67202514477518",
    environment="torch numpy",
)
ACTIONS = 4
SETTINGS = dict(widths=(16, 16), gamma=0.9, polyak=0.1, lr=1e-3, tau=0.5)
UNITS = {256: 16}  # theirs: ours
NETS = ("critic", "actor")


def inputs():
    rng = np.random.default_rng(0)
    batches = random_batches(rng, action_dim=ACTIONS)
    batches["action"] = np.eye(ACTIONS, dtype=np.float32)[batches["action"].argmax(-1)]
    _, state = start("discrete_bcq", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in NETS}
    params["target"] = scramble(state.target["params"], rng)
    return flatten({"batch": batches, "params": params})


def ours(inputs):
    return jit(outputs)(unflatten(inputs, "batch"), unflatten(inputs, "params"))


def outputs(batches, params):
    import jax

    from algorithms import discrete_bcq
    from common.datasets import Batch

    cfg, state = start("discrete_bcq", batches, **SETTINGS)
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in NETS}
    state, out = state.replace(target={"params": params["target"]}, **nets), {}
    first = Batch(**tree_map(lambda x: x[0], batches))
    for name in NETS:
        loss = jax.grad(getattr(discrete_bcq, f"{name}_loss"), has_aux=True)
        out[f"{name} gradient"], _ = loss(getattr(state, name).params, state, first, cfg)
    state, infos = jax.lax.scan(
        lambda s, batch: discrete_bcq.update(s, batch, None, cfg), state, Batch(**batches)
    )
    out["loss of 3 updates"] = infos["critic_loss"] + infos["actor_loss"]
    for name in NETS:
        out[f"{name} after 3 updates"] = getattr(state, name).params
    return out | {"target after 3 updates": state.target}


def theirs(inputs, checkout):
    import sys
    from unittest import mock

    import torch

    sys.path.insert(0, f"{checkout}/discrete_BCQ")
    import discrete_BCQ as authors

    batches, params = (unflatten(inputs, part) for part in ("batch", "params"))
    linear = torch.nn.Linear
    with mock.patch("torch.nn.Linear", lambda i, o: linear(UNITS.get(i, i), UNITS.get(o, o))):
        agent = authors.discrete_BCQ(
            False, ACTIONS, batches["obs"].shape[-1], "cpu", BCQ_threshold=SETTINGS["tau"],
            discount=SETTINGS["gamma"], optimizer_parameters={"lr": SETTINGS["lr"]},
            polyak_target_update=True, tau=SETTINGS["polyak"],
        )  # fmt: skip
    stacks = {
        "critic": [agent.Q.q1, agent.Q.q2, agent.Q.q3],
        "actor": [agent.Q.i1, agent.Q.i2, agent.Q.i3],
        "target": [agent.Q_target.q1, agent.Q_target.q2, agent.Q_target.q3],
    }
    for name, stack in stacks.items():
        to_mlp(stack, params[name])
    gradients, losses, backward = [], [], torch.Tensor.backward
    agent.Q_optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: from_mlp(stacks[name], grad=True) for name in NETS})
    )

    def keep(loss):
        losses.append(loss.item())
        backward(loss)

    for i in range(3):
        batch = {name: torch.tensor(x[i]) for name, x in batches.items()}
        action, reward = batch["action"].argmax(1)[:, None], batch["reward"][:, None]
        columns = batch["obs"], action, batch["next_obs"], reward, 1 - batch["done"][:, None]
        buffer = mock.Mock(sample=lambda columns=columns: columns)
        with mock.patch("torch.Tensor.backward", keep):
            agent.train(buffer)
    out = {f"{name} gradient": gradients[0][name] for name in NETS}
    out["loss of 3 updates"] = np.array(losses)
    return out | {f"{name} after 3 updates": from_mlp(stack) for name, stack in stacks.items()}
