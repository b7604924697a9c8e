"""Discrete CQL compared with d3rlpy, with Q itself and with quantiles.

The peer: `DiscreteCQLImpl.inner_update` makes whole updates on batches of its own class. Gradients
are read when its optimiser is about to step, in the first update.

Differences removed for the comparison:
- initialisation: both start from our weights, and the target from its own
- the target network: copied after each update, our Polyak step of 1

Weights: our Dense_0, Dense_1, ... are the encoder's Linears and the last Linear, whose outputs are
quantiles within actions on both sides. Our actions are vectors with a 1, theirs are numbers.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.layers import from_mlp, to_mlp

PEER = dict(
    name="d3rlpy",
    repository="https://github.com/takuseno/d3rlpy",
    commit="38c34b6f99fde82875e2ad81d1ba1f7a7da34137",
    environment="torch numpy gymnasium==1.0.0 gym structlog dataclasses-json h5py click tqdm "
    "colorama scikit-learn",
)
ACTIONS = 3
SETTINGS = dict(widths=(16, 16), gamma=0.9, polyak=1.0, lr=1e-3, alpha=0.7)
HEADS = {"DQN": 0, "QR-DQN": 5}  # numbers of quantiles


def inputs():
    rng = np.random.default_rng(0)
    batches = random_batches(rng, action_dim=ACTIONS)
    batches["action"] = np.eye(ACTIONS, dtype=np.float32)[batches["action"].argmax(-1)]
    params = {}
    for head, n in HEADS.items():
        _, state = start("discrete_cql", batches, num_quantiles=n, **SETTINGS)
        params[head] = {
            "critic": scramble(state.critic.params["params"], rng),
            "target": scramble(state.target["params"], rng),
        }
    return flatten({"batch": batches, "params": params})


def ours(inputs):
    return jit(outputs)(unflatten(inputs, "batch"), unflatten(inputs, "params"))


def outputs(batches, params):
    import jax

    from algorithms import discrete_cql
    from common.datasets import Batch

    out = {}
    for head, n in HEADS.items():
        cfg, state = start("discrete_cql", batches, num_quantiles=n, **SETTINGS)
        own = {name: {"params": tree} for name, tree in params[head].items()}
        critic = state.critic.replace(params=own["critic"])
        state = state.replace(critic=critic, target=own["target"])
        first = Batch(**tree_map(lambda x: x[0], batches))
        loss = jax.grad(discrete_cql.critic_loss, has_aux=True)
        gradient, _ = loss(state.critic.params, state, first, cfg)
        state, infos = jax.lax.scan(
            lambda s, batch, cfg=cfg: discrete_cql.update(s, batch, None, cfg),
            state,
            Batch(**batches),
        )
        out[f"{head} gradient"] = gradient
        for name in ("critic_loss", "td_loss", "gap"):
            out[f"{head} {name.replace('_', ' ')} of 3 updates"] = infos[name]
        out[f"{head} critic after 3 updates"] = state.critic.params
    return out


def theirs(inputs, checkout):
    import sys

    import torch

    sys.path.insert(0, checkout)
    import d3rlpy
    from d3rlpy.models.q_functions import MeanQFunctionFactory, QRQFunctionFactory
    from d3rlpy.torch_utility import TorchMiniBatch

    batches, params, out = unflatten(inputs, "batch"), unflatten(inputs, "params"), {}
    for head, n in HEADS.items():
        algorithm = d3rlpy.algos.DiscreteCQLConfig(
            learning_rate=SETTINGS["lr"],
            gamma=SETTINGS["gamma"],
            alpha=SETTINGS["alpha"],
            target_update_interval=1,
            encoder_factory=d3rlpy.models.VectorEncoderFactory(list(SETTINGS["widths"])),
            q_func_factory=QRQFunctionFactory(n_quantiles=n) if n else MeanQFunctionFactory(),
        ).create(device="cpu")
        algorithm.create_impl((batches["obs"].shape[-1],), ACTIONS)
        modules, gradients = algorithm.impl.modules, []
        stacks = {
            name: [*nets[0].encoder._layers, nets[0]._fc]
            for name, nets in (("critic", modules.q_funcs), ("target", modules.targ_q_funcs))
        }
        for name, stack in stacks.items():
            to_mlp(stack, params[head][name]["MLP_0"])
        keep = lambda *_, stack=stacks["critic"], to=gradients: to.append(  # noqa: E731
            from_mlp(stack, grad=True)
        )
        modules.optim.optim.register_step_pre_hook(keep)
        losses = []
        for i in range(3):
            batch = {name: torch.tensor(x[i]) for name, x in batches.items()}
            column, actions = torch.ones(len(batch["reward"]), 1), batch["action"].argmax(1)
            rows = TorchMiniBatch(
                observations=batch["obs"],
                actions=actions[:, None],
                rewards=batch["reward"][:, None],
                next_observations=batch["next_obs"],
                next_actions=actions[:, None],
                returns_to_go=column,
                terminals=batch["done"][:, None],
                intervals=column,
                device="cpu",
            )
            losses.append(algorithm.impl.inner_update(rows, i + 1))
        out[f"{head} gradient"] = {"MLP_0": gradients[0]}
        names = {"critic loss": "loss", "td loss": "td_loss", "gap": "conservative_loss"}
        for ours_, theirs_ in names.items():
            out[f"{head} {ours_} of 3 updates"] = np.array([loss[theirs_] for loss in losses])
        out[f"{head} critic after 3 updates"] = {"MLP_0": from_mlp(stacks["critic"])}
    return out
