"""IQL compared with its authors' code.

The peer: `Learner` of learner.py holds the networks. `update_v` and `update_q` of critic.py and
`update` of actor.py give the losses, and the gradients through an optimiser that keeps them.
`Learner.update` makes whole updates.

- Nothing is stubbed. `jax.tree_multimap` and Flax's frozen parameters, which later versions
  changed, are restored.

Differences removed for the comparison:
- initialisation: both start from our weights
- standardisation and reward scale: outside of an update in both

Weights: its Critic_0 and Critic_1 are our members 0 and 1 on axis 0. The last layer of its policy
is outside its MLP, ours is the last layer of the MLP. Its log_stds is our log_std.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten

PEER = dict(
    name="authors (implicit_q_learning)",
    repository="https://github.com/ikostrikov/implicit_q_learning",
    commit="09d700248117881a75cb21f0adb95c6c8a694cb2",
    environment="jax==0.4.13 jaxlib==0.4.13 flax==0.7.2 optax==0.1.7 tensorflow-probability==0.21 "
    "scipy<1.13 numpy<1.27",
)
# Large steps, so that three updates show; num_updates is short, so that the actor's rate falls.
SETTINGS = dict(
    widths=(16, 16), gamma=0.9, lr=1e-2, polyak=0.1, tau=0.8, beta=3.0, num_updates=6,
    normalize=False,
)  # fmt: skip


LOSSES = ("value", "actor", "critic")  # in the order of an update


def inputs():
    rng = np.random.default_rng(0)
    batches = random_batches(rng)
    _, state = start("iql", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in LOSSES}
    params["target"] = scramble(state.target["params"], rng)
    return flatten({"batch": batches, "params": params})


def ours(inputs):
    return jit(outputs)(unflatten(inputs, "batch"), unflatten(inputs, "params"))


def outputs(batches, params):
    import jax

    from algorithms import iql
    from common.datasets import Batch

    cfg, state = start("iql", batches, **SETTINGS)
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in LOSSES}
    state, batches = state.replace(target={"params": params["target"]}, **nets), Batch(**batches)

    out = {}
    for name in LOSSES:
        loss = jax.value_and_grad(getattr(iql, f"{name}_loss"), has_aux=True)
        batch = jax.tree.map(lambda x: x[0], batches)
        (value, _), gradient = loss(getattr(state, name).params, state, batch, cfg)
        out |= {f"{name} loss": value, f"{name} gradient": gradient}

    state, infos = jax.lax.scan(lambda s, batch: iql.update(s, batch, None, cfg), state, batches)
    for name in LOSSES:
        out[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
        out[f"{name} after 3 updates"] = getattr(state, name).params
    return out | {"target after 3 updates": state.target}


def theirs(inputs, checkout):
    import sys

    import flax
    import jax
    import optax

    sys.path.insert(0, checkout)
    jax.tree_multimap = jax.tree_util.tree_map
    flax.config.update("flax_return_frozendict", True)
    import actor
    import critic
    import learner as authors

    import common

    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    b = [  # of each update; their mask is 1 where ours is not done
        common.Batch(x["obs"], x["action"], x["reward"], 1 - x["done"], x["next_obs"])
        for x in (tree_map(lambda x, i=i: x[i], batches) for i in range(3))
    ]
    learner = authors.Learner(
        0, b[0].observations, b[0].actions, hidden_dims=SETTINGS["widths"],
        actor_lr=SETTINGS["lr"], value_lr=SETTINGS["lr"], critic_lr=SETTINGS["lr"],
        discount=SETTINGS["gamma"], tau=SETTINGS["polyak"], expectile=SETTINGS["tau"],
        temperature=SETTINGS["beta"], max_steps=SETTINGS["num_updates"],
    )  # fmt: skip
    learner.actor = load(learner.actor, to_actor(params["actor"]))
    learner.critic = load(learner.critic, to_critic(params["critic"]))
    learner.target_critic = load(learner.target_critic, to_critic(params["target"]))
    learner.value = load(learner.value, params["value"])

    keep = optax.GradientTransformation(lambda p: p, lambda g, s, p: (g, g))  # its state is g

    def keeping(model):
        return model.replace(tx=keep, opt_state=model.params)

    out, back = {}, {"value": dict, "actor": from_actor, "critic": from_critic}
    target, args = learner.target_critic, (b[0], SETTINGS["gamma"])
    models = {
        "value": critic.update_v(target, keeping(learner.value), b[0], SETTINGS["tau"]),
        "actor": actor.update(
            learner.rng, keeping(learner.actor), target, learner.value, b[0], SETTINGS["beta"]
        ),
        "critic": critic.update_q(keeping(learner.critic), learner.value, *args),
    }
    for name, (model, info) in models.items():
        gradient = turned(back[name](model.opt_state))
        out |= {f"{name} loss": info[f"{name}_loss"], f"{name} gradient": gradient}

    infos = [learner.update(batch) for batch in b]
    for name in models:
        out[f"{name} loss of 3 updates"] = np.array([info[f"{name}_loss"] for info in infos])
        out[f"{name} after 3 updates"] = turned(back[name](getattr(learner, name).params))
    return out | {"target after 3 updates": turned(from_critic(learner.target_critic.params))}


def load(model, params):
    """The peer's Model with these parameters, which must have the structure of its own."""
    from flax.core import freeze

    params = turned(params)
    shapes = [{k: np.shape(x) for k, x in flatten(p).items()} for p in (model.params, params)]
    assert shapes[0] == shapes[1]
    return model.replace(params=freeze(params))


def turned(tree):
    """The tree with every kernel transposed: ours are (out, in), the peer's (in, out)."""
    if not hasattr(tree, "items"):
        return tree
    return {k: np.swapaxes(x, -1, -2) if k == "kernel" else turned(x) for k, x in tree.items()}


def to_actor(params):
    hidden = dict(params["MLP_0"])
    return {"Dense_0": hidden.pop("Dense_2"), "MLP_0": hidden, "log_stds": params["log_std"]}


def from_actor(params):
    layers = dict(params["MLP_0"]) | {"Dense_2": params["Dense_0"]}
    return {"MLP_0": layers, "log_std": params["log_stds"]}


def to_critic(params):
    return {f"Critic_{i}": tree_map(lambda x, i=i: x[i], params) for i in range(2)}


def from_critic(params):
    return tree_map(lambda *x: np.stack(x), params["Critic_0"], params["Critic_1"])
