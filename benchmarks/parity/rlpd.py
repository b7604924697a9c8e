"""RLPD compared with its authors' code: losses, and updates with two steps of Q each.

The peer: `SACLearner` of rlpd/agents/sac/sac_learner.py with its networks. `update` makes whole
updates, `update_critic`, `update_actor` and `update_temperature` their parts; gradients are read by
optimisers that keep them.

- It runs without jit. jax.random.normal returns the noise that our update draws from fixed keys,
  jax.random.choice the critics that it chooses.
- Stubs replace gym, rlpd.agents.drq and rlpd.data, which only pixels and data need.

Differences removed for the comparison:
- initialisation: both start from our weights

Weights: its policy has two last layers, ours is both in one. Its critics have the last layer beside
their MLP, ours is a layer of it. Its log_temp is our log.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, unflatten
from benchmarks.parity.iql import turned

PEER = dict(
    name="authors (RLPD)",
    repository="https://github.com/ikostrikov/rlpd",
    commit="c90fd4baf28c9c9ef40a81460a2e395092844f88",
    environment="jax==0.10.2 flax==0.12.8 optax==0.2.8 tfp-nightly==0.26.0.dev20261027 numpy",
)
# The authors' ten critics and subset of two; large steps and few of them, so that they show.
SETTINGS = dict(
    widths=(12, 12), gamma=0.9, actor_lr=3e-3, critic_lr=5e-3, polyak=0.1, utd=2, num_critics=10,
    min_critics=2, backup_entropy=True, batch_size=16, num_updates=1, pretrain_updates=1,
)  # fmt: skip
NETS = ("actor", "critic", "temperature")


def inputs():
    """Batches (3, utd, B, ...), weights, and what our update draws from its keys."""
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, rows=32)
    batches = {k: x.reshape(3, 2, 16, *x.shape[2:]) for k, x in batches.items()}
    _, state = start("rlpd", {k: x[:, 0] for k, x in batches.items()}, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in NETS}
    params["target"] = scramble(state.target["params"], rng)
    noise = jax.vmap(lambda key: draw(key, batches["action"].shape[2:]))(keys())
    return flatten({"batch": batches, "params": params, "noise": noise})


def keys():
    """The keys of three updates."""
    import jax

    return jax.random.split(jax.random.key(0), 3)


def draw(key, shape):
    """What our update draws from a key; shape (B, A)."""
    import distrax
    import jax
    import jax.numpy as jnp

    k_critic, k_actor = jax.random.split(key)
    normal = distrax.MultivariateNormalDiag(jnp.zeros(shape), jnp.ones(shape))

    def critic(key):
        k_pi, k_members = jax.random.split(key)
        return normal.sample(seed=k_pi), jax.random.choice(k_members, 10, (2,), replace=False)

    backup, members = jax.vmap(critic)(jax.random.split(k_critic, 2))
    return {"policy": normal.sample(seed=k_actor), "backup": backup, "members": members}


def ours(inputs):
    return jit(outputs)(unflatten(inputs, "batch"), unflatten(inputs, "params"))


def outputs(batches, params):
    import jax

    from algorithms import rlpd
    from common.datasets import Batch

    cfg, state = start("rlpd", {k: x[:, 0] for k, x in batches.items()}, **SETTINGS)
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in NETS}
    state, batches = state.replace(target={"params": params["target"]}, **nets), Batch(**batches)

    def gradient(loss, name, *args):
        return jax.value_and_grad(loss, has_aux=True)(getattr(state, name).params, state, *args)

    batch = jax.tree.map(lambda x: x[0, 0], batches)
    k_critic, k_actor = jax.random.split(keys()[0])
    k_first = jax.random.split(k_critic, 2)[0]
    (loss, _), slope = gradient(rlpd.critic_loss, "critic", batch, k_first, cfg)
    out = {"critic loss": loss, "critic gradient": slope}
    (loss, info), slope = gradient(rlpd.actor_loss, "actor", batch, k_actor)
    out |= {"actor loss": loss, "actor gradient": slope}
    args = info["entropy"], -batch.action.shape[-1] / 2
    (loss, _), slope = gradient(rlpd.temperature_loss, "temperature", *args)
    out |= {"temperature loss": loss, "temperature gradient": slope}

    def one(state, row):
        return rlpd.update(state, *row, cfg)

    state, infos = jax.lax.scan(one, state, (batches, keys()))
    out["actor loss of 3 updates"] = infos["actor_loss"]
    for name in NETS:
        out[f"{name} after 3 updates"] = getattr(state, name).params
    out["target after 3 updates"] = state.target
    return out


def theirs(inputs, checkout):
    import jax

    stub(checkout)
    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    with jax.disable_jit():
        return train(batches, params, noise)


def stub(checkout):
    """Makes the learner importable without gym, pixels and data."""
    import sys
    import types

    import tensorflow_probability.substrates.jax  # noqa: F401

    sys.path.insert(0, checkout)
    for name in ("gym", "rlpd.agents", "rlpd.agents.sac", "rlpd.data", "rlpd.data.dataset"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["gym"].Space = object
    sys.modules["rlpd.data.dataset"].DatasetDict = dict
    sys.modules["rlpd.agents"].__path__ = [f"{checkout}/rlpd/agents"]
    sys.modules["rlpd.agents.sac"].__path__ = [f"{checkout}/rlpd/agents/sac"]


def train(batches, params, noise):
    """Parts of the authors' first update, then three whole ones."""
    import jax.numpy as jnp
    import optax

    agent = build(params, batches)
    keep = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, g))  # its state is g

    def keeping(learner):
        return learner.replace(tx=keep, opt_state=learner.params)

    kept = agent.replace(**{x: keeping(getattr(agent, x)) for x in ("actor", "critic", "temp")})
    first = renamed({k: x[0, 0] for k, x in batches.items()})
    out = {}
    with drawn([noise["backup"][0, 0]], [noise["members"][0, 0]]):
        after, info = kept.update_critic(first)
    out["critic loss"], out["critic gradient"] = info["critic_loss"], critic(after.critic.opt_state)
    with drawn([noise["policy"][0]], []):
        after, info = kept.update_actor(first)
    out["actor loss"], out["actor gradient"] = info["actor_loss"], actor(after.actor.opt_state)
    after, info = kept.update_temperature(info["entropy"])
    out["temperature loss"] = info["temperature_loss"]
    out["temperature gradient"] = {"params": {"log": after.temp.opt_state["log_temp"]}}

    losses = []
    for i in range(3):
        batch = {k: jnp.asarray(x[i].reshape(-1, *x.shape[3:])) for k, x in batches.items()}
        with drawn([*noise["backup"][i], noise["policy"][i]], list(noise["members"][i])):
            agent, info = agent.update(renamed(batch), 2)
        losses.append(info["actor_loss"])
    out["actor loss of 3 updates"] = np.array(losses)
    out["actor after 3 updates"] = actor(agent.actor.params)
    out["critic after 3 updates"] = critic(agent.critic.params)
    out["temperature after 3 updates"] = {"params": {"log": agent.temp.params["log_temp"]}}
    return out | {"target after 3 updates": critic(agent.target_critic.params)}


def build(params, batches):
    """The authors' learner with our weights."""
    from types import SimpleNamespace

    from rlpd.agents.sac.sac_learner import SACLearner

    spaces = [
        SimpleNamespace(sample=lambda x=x: x, shape=x.shape)
        for x in (batches["obs"][0, 0, 0], batches["action"][0, 0, 0])
    ]
    rates = dict(actor_lr=SETTINGS["actor_lr"], temp_lr=SETTINGS["actor_lr"])
    agent = SACLearner.create(
        0, *spaces, **rates, critic_lr=SETTINGS["critic_lr"], hidden_dims=SETTINGS["widths"],
        discount=SETTINGS["gamma"], tau=SETTINGS["polyak"], num_qs=10, num_min_qs=2,
        critic_layer_norm=True,
    )  # fmt: skip

    def load(learner, own):
        mine, known = (flatten(x) for x in (own, learner.params))
        shapes = [{k: np.shape(x) for k, x in tree.items()} for tree in (mine, known)]
        assert shapes[0] == shapes[1]
        return learner.replace(params=own, opt_state=learner.tx.init(own))

    return agent.replace(
        actor=load(agent.actor, to_actor(params["actor"])),
        critic=load(agent.critic, to_critic(params["critic"])),
        target_critic=agent.target_critic.replace(params=to_critic(params["target"])),
        temp=load(agent.temp, {"log_temp": np.float32(params["temperature"]["log"])}),
    )


def renamed(batch):
    """One of the authors' batches; their mask is 1 where ours is not done."""
    names = {"obs": "observations", "action": "actions", "next_obs": "next_observations"}
    return {names[k]: batch[k] for k in names} | {
        "rewards": batch["reward"],
        "masks": 1 - batch["done"],
    }


def drawn(normals, choices):
    """A context in which jax.random.normal and jax.random.choice return these arrays in turn."""
    from contextlib import ExitStack
    from unittest import mock

    normals, choices = iter(normals), iter(choices)

    def normal(key, shape=(), dtype=np.float32):
        x = next(normals)
        assert tuple(shape) == x.shape[::-1]  # TensorFlow Probability draws (A, B) and turns it
        return x.T

    def choice(key, a, shape, replace):
        x = next(choices)
        assert shape == x.shape and len(a) == 10 and not replace
        return x

    stack = ExitStack()
    stack.enter_context(mock.patch("jax.random.normal", normal))
    stack.enter_context(mock.patch("jax.random.choice", choice))
    return stack


def to_actor(params):
    """The authors' policy from ours, whose last layer is mean and log std."""
    layers = turned(params["MLP_0"])
    last = layers.pop("Dense_2")
    mean, log_std = ({k: np.split(x, 2, -1)[i] for k, x in last.items()} for i in (0, 1))
    return {"MLP_0": layers, "OutputDenseMean": mean, "OutputDenseLogStd": log_std}


def actor(params):
    """Our policy's parameters from the authors'."""
    layers, both = dict(params["MLP_0"]), [params[f"OutputDense{x}"] for x in ("Mean", "LogStd")]
    layers["Dense_2"] = {k: np.concatenate([x[k] for x in both], -1) for k in ("kernel", "bias")}
    return {"params": {"MLP_0": turned(layers)}}


def to_critic(params):
    layers = turned(params["NormedMLP_0"])
    last = layers.pop("Dense_2")
    return {"VmapStateActionValue_0": {"MLP_0": layers, "Dense_0": last}}


def critic(params):
    own = params["VmapStateActionValue_0"]
    return {"params": {"NormedMLP_0": turned(dict(own["MLP_0"]) | {"Dense_2": own["Dense_0"]})}}
