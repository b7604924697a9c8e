"""Unifloral, JAX: a scan over its train step.

The scan is compiled once, with the data as an argument. Without that, the current release of JAX
compiles the scans of CQL and COMBO again at several calls.
"""

import importlib
import sys
from functools import partial
from types import SimpleNamespace

from benchmarks.peers import (
    ACTION,
    BATCH,
    DYNAMICS,
    EVALUATION,
    LENGTH,
    OBS,
    ROLLOUT,
    THREE,
    TWO,
    Row,
    repeat,
)

PEER = dict(
    name="Unifloral",
    repository="https://github.com/EmptyJackson/unifloral",
    packages=("jax", "jaxlib", "flax", "optax", "distrax", "gymnasium", "mujoco"),
)


def load(checkout, name):
    import jax

    jax.tree_map = jax.tree_util.tree_map  # as it was called then
    sys.path.insert(0, f"{checkout}/algorithms")
    return importlib.import_module(name)


def transitions(peer, world):
    import jax.numpy as jnp

    names = dict(obs="observations", action="actions", reward="rewards", done="terminals")
    names |= dict(next_obs="next_observations", next_action="actions")  # the latter is not used
    data = world.get_dataset()
    return peer.Transition(**{x: jnp.array(data[names[x]]) for x in peer.Transition._fields})


def scanned(make_step, carry, data, updates):
    import jax

    @jax.jit
    def chunk(carry, data):
        return jax.lax.scan(make_step(data), carry, None, updates)

    def run():
        nonlocal carry
        carry, _ = jax.block_until_ready(chunk(carry, data))  # with losses: XLA would drop them

    return repeat(run, 1)


def states(peer, args, key, nets):
    """Unifloral's state of the networks (actor, Q, target, other)."""
    import jax.numpy as jnp

    obs, action = jnp.zeros(OBS), jnp.zeros(ACTION)
    dummies = [obs], [obs, action], [obs, action], [] if hasattr(peer, "EntropyCoef") else [obs]
    pairs = zip(nets, dummies, strict=True)
    return peer.AgentTrainState(*(peer.create_train_state(args, key, *pair) for pair in pairs))


def iql(checkout, world):
    import jax

    peer, key = load(checkout, "iql"), jax.random.key(0)
    data, args = transitions(peer, world), peer.Args()
    stats = data.obs.mean(0), data.obs.std(0)
    actor, q = peer.TanhGaussianActor(ACTION, *stats), peer.DualQNetwork(*stats)
    value = peer.StateValueFunction(*stats)
    state = states(peer, args, key, [actor, q, q, value])
    make = partial(peer.make_train_step, args, actor.apply, q.apply, value.apply)
    sizes = dict(widths=TWO, critics=2, **BATCH)
    yield Row("iql", sizes, 100, scanned(make, (key, state), data, 100))


def conservative(name, what, critics, updates):
    """CQL, or COMBO without its rollouts (one in 1,000 updates); one action of each kind."""

    def rows(checkout, world):
        import jax

        peer, key = load(checkout, name), jax.random.key(0)
        data, args = transitions(peer, world), peer.Args(num_critics=critics)
        actor, q, alpha = peer.TanhGaussianActor(ACTION), peer.VectorQ(critics), peer.EntropyCoef()
        carry = key, states(peer, args, key, [actor, q, q, alpha])

        def make(data):
            nets = actor.apply, q.apply, alpha.apply
            if name == "cql":
                return peer.make_train_step(args, *nets, data)
            return peer.make_train_step(args, *nets, data, lambda key, policy, buffer: buffer)

        carry = carry if name == "cql" else (*carry, data)
        sizes = dict(widths=THREE, critics=critics, actions=3, **BATCH)
        yield Row(what, sizes, updates, scanned(make, carry, data, updates))

    return rows


def model(checkout, world):
    """One epoch of training the model with a single holdout batch; then a rollout."""
    import jax
    import jax.numpy as jnp

    combo, key = load(checkout, "combo"), jax.random.key(0)
    peer, updates = sys.modules["dynamics"], 50
    args = peer.Args(num_epochs=1, validation_split=0.02)
    data = transitions(peer, world)
    some = jax.tree.map(lambda x: x[: int(256 * updates / 0.98) + 2], data)
    net = peer.EnsembleDynamicsModel(OBS, ACTION, args.num_ensemble, args.n_layers, args.layer_size)
    state = peer.create_train_state(args, key, net, jnp.zeros(OBS + ACTION))
    train = jax.jit(lambda state, data, key: peer.train_dynamics_model(state, args, data, key))

    def fit():
        jax.block_until_ready(train(state, some, key))

    yield Row("dynamics", DYNAMICS, updates, repeat(fit, 1))

    policy = combo.TanhGaussianActor(ACTION)
    ends = peer.get_termination_fn("halfcheetah-medium-v2")
    ensemble = peer.EnsembleDynamics(net, state.params, jnp.arange(args.num_elites), ends)
    ensemble.dataset = data
    roll = ensemble.make_rollout_fn(ROLLOUT["starts"], ROLLOUT["steps"])
    params, buffer = policy.init(key, jnp.zeros(OBS)), jax.tree.map(lambda x: x.repeat(10, 0), data)

    @jax.jit
    def fill(params, buffer, key):
        return roll(key, lambda obs, key: policy.apply(params, obs).sample(seed=key), buffer)

    def run():
        jax.block_until_ready(fill(params, buffer, key))

    yield Row("rollout", ROLLOUT, 1, repeat(run, 1))


class Worlds:
    """Ten environments with the interface of Gym's vector environments before 0.26."""

    env_fns = [lambda: SimpleNamespace(spec=SimpleNamespace(max_episode_steps=LENGTH))]

    def __init__(self, kind):
        import gymnasium

        # Python's default, fork, is not safe where JAX has threads.
        how = dict(context="spawn") if kind == "AsyncVectorEnv" else {}
        makes = [partial(gymnasium.make, "HalfCheetah-v5")] * EVALUATION["episodes"]
        self.envs = getattr(gymnasium.vector, kind)(makes, **how)

    def reset(self):
        return self.envs.reset()[0]

    def step(self, action):
        obs, reward, terminated, truncated, info = self.envs.step(action)
        return obs, reward, terminated | truncated, info


def evaluation(kind, checkout, world):
    """kind: AsyncVectorEnv has processes, as Unifloral; SyncVectorEnv is faster on one core."""
    import jax
    import jax.numpy as jnp

    peer, key = load(checkout, "iql"), jax.random.key(0)
    args = peer.Args(eval_workers=EVALUATION["episodes"])
    net = peer.TanhGaussianActor(ACTION, jnp.zeros(OBS), jnp.ones(OBS))
    state = SimpleNamespace(actor=peer.create_train_state(args, key, net, [jnp.zeros(OBS)]))
    worlds = Worlds(kind)
    run = partial(peer.eval_agent, args, key, worlds, state)
    yield Row("evaluation", EVALUATION | dict(envs=kind), 1, repeat(run, 1))
    worlds.envs.close()


CASES = {
    "iql": iql,
    "cql": conservative("cql", "cql", 2, 20),
    "cql_10": conservative("cql", "cql", 10, 4),
    "combo_update": conservative("combo", "combo_update", 2, 20),
    "combo_update_10": conservative("combo", "combo_update", 10, 4),
    "model": model,
    "evaluation": partial(evaluation, "SyncVectorEnv"),
    "evaluation_async": partial(evaluation, "AsyncVectorEnv"),
}
