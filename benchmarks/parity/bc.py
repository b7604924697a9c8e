"""BC with both heads compared with CORL.

The peer with --head deterministic: `Actor` and `BC` of algorithms/offline/any_percent_bc.py.
`BC.train` makes whole updates; its return value gives the loss, and the gradient is read when its
optimiser is about to step.

The peer with --head gaussian: CORL has no such BC, but its AWAC with an infinite lambda is one,
because all weights exp(A / lambda) are 1: `_actor_loss` and `_update_actor` of
algorithms/offline/awac.py, as in parity/awac.py.

- Stubs replace d4rl, gym, pyrallis and wandb.

Differences removed for the comparison:
- initialisation: both start from our weights
- width of 256: the peer gets narrower layers of the same kind
- choice of the best episodes and standardisation: outside of an update in both

Weights: layer by layer; its _log_std is our log_std.
"""

from itertools import pairwise

import numpy as np

from benchmarks.parity import awac, flatten, jit, random_batches, scramble, start, unflatten
from benchmarks.parity.layers import from_mlp, to_mlp

PEER = awac.PEER
# The layers that CORL's AWAC has; large steps, so that three updates show.
SETTINGS = dict(widths=awac.SETTINGS["widths"], lr=awac.SETTINGS["lr"], normalize=False)
HEADS = ("deterministic", "gaussian")


def inputs():
    rng = np.random.default_rng(8)  # no gradient so small that rounding turns Adam round
    batches = random_batches(rng)
    _, state = start("bc", batches, head="gaussian", **SETTINGS)
    params = scramble(state.actor.params["params"], rng)
    return flatten({"batch": batches, "params": {"actor": params}})


def ours(inputs):
    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    run = jit(outputs, static_argnums=0)
    return {k: v for head in HEADS for k, v in run(head, batches, params["actor"]).items()}


def outputs(head, batches, params):
    import jax

    from algorithms import bc
    from common.datasets import Batch

    cfg, state = start("bc", batches, head=head, **SETTINGS)
    state = state.replace(actor=state.actor.replace(params={"params": params}))
    batches = Batch(**batches)
    loss = jax.value_and_grad(bc.actor_loss, has_aux=True)
    batch = jax.tree.map(lambda x: x[0], batches)
    (value, _), gradient = loss(state.actor.params, state, batch, cfg)
    state, infos = jax.lax.scan(lambda s, batch: bc.update(s, batch, None, cfg), state, batches)
    after = state.actor.params["params"]
    return named(head, value, gradient["params"], infos["actor_loss"], after)


def named(head, loss, gradient, losses, after):
    """The quantities of one head; the deterministic head does not train a std."""
    if head == "deterministic":
        gradient, after = gradient["MLP_0"], after["MLP_0"]
    return {
        f"{head}: actor loss": loss,
        f"{head}: actor gradient": gradient,
        f"{head}: actor loss of 3 updates": losses,
        f"{head}: actor after 3 updates": after,
    }


def theirs(inputs, checkout):
    import torch

    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    obs, action = torch.tensor(batches["obs"]), torch.tensor(batches["action"])
    sizes = obs.shape[-1], action.shape[-1]

    agent = awac.build(checkout, *sizes, float("inf"))  # and from now on CORL can be imported
    actor = params["actor"]
    to_mlp(agent._actor._mlp, actor["MLP_0"])
    agent._actor._log_std.data = torch.tensor(actor["log_std"])
    loss = agent._actor_loss(obs[0], action[0])
    loss.backward()
    gradient = awac.read(agent, "actor", grad=True)
    losses = np.array([agent._update_actor(*row) for row in zip(obs, action, strict=True)])
    out = named("gaussian", loss.item(), gradient, losses, awac.read(agent, "actor"))

    import any_percent_bc as corl

    policy, layers, gradients = corl.Actor(*sizes, max_action=1.0), [], []
    for pair in pairwise([sizes[0], *SETTINGS["widths"], sizes[1]]):
        layers += [torch.nn.Linear(*pair), torch.nn.ReLU()]
    policy.net = torch.nn.Sequential(*layers[:-1], torch.nn.Tanh())
    to_mlp(policy.net, actor["MLP_0"])
    adam = torch.optim.Adam(policy.parameters(), lr=SETTINGS["lr"])

    def hook(*_):
        gradients.append({"MLP_0": from_mlp(policy.net, grad=True)})

    adam.register_step_pre_hook(hook)
    agent = corl.BC(1.0, policy, adam)
    rows = zip(obs, action, strict=True)
    losses = np.array([agent.train([*row, None, None, None])["actor_loss"] for row in rows])
    after = {"MLP_0": from_mlp(policy.net)}
    return out | named("deterministic", losses[0], gradients[0], losses, after)
