"""BRAC beside its authors' code, in the copy with which D4RL was evaluated.

Theirs: `Agent` of brac_primal_agent.py, of brac_dual_agent.py and, for the clone, of bc_agent.py;
`Agent._optimize_step` does the whole updates. Losses are read from what it returns, gradients where
an optimiser applies them, of the first update. TensorFlow Probability's Normal and TensorFlow's
`random.uniform` hand out the noise that our update draws from fixed keys; our action in Q is the
first of those that estimate D, so theirs is made the same. Stubs stand for tf_agents and for the
checkpoint of the clone; what later versions dropped is given back: AffineScalar, the shapes of a
TransformedDistribution, the argument lr of Adam, a custom gradient of the first argument alone. Out
of play: epsilon of Adam, by ours in place of theirs; the steps of c on other batches, by one step
of c an update; the initialisation, by our weights.

Weights: a kernel of theirs is ours transposed; their two critics are our members 0 and 1 on axis 0;
their variables of alpha and of the entropy's weight are our numbers.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten

PEER = dict(
    name="authors (BRAC, in d4rl_evaluations)",
    repository="https://github.com/rail-berkeley/d4rl_evaluations",
    commit="c93b9d2bf443cd5b8c43542fca9937dc50e630c3",
    environment="tensorflow-cpu==2.15.1 tensorflow-probability==0.23.0 gin-config",
)
# Large steps, so that three updates show; the first of them is the warm start's in KL's variant.
SETTINGS = dict(
    widths=(12, 12), actor_widths=(12, 12), gamma=0.9, actor_lr=3e-3, critic_lr=5e-3, clone_lr=3e-3,
    polyak=0.1, entropy=0.2, c_steps=1, warm_start=-1,
)  # fmt: skip
VARIANTS = {  # ours, theirs
    "KL, value": (dict(warm_start=0), dict(warm_start=0, value_penalty=True)),
    "KL, learned alpha": (
        dict(target_divergence=0.5),
        dict(value_penalty=True, train_alpha=True, target_divergence=0.5),
    ),
    "MMD, policy": (
        dict(divergence="mmd", penalty="policy"),
        dict(divergence_name="mmd", value_penalty=False),
    ),
    "Wasserstein, policy": (
        dict(divergence="wasserstein", penalty="policy", num_samples=1),
        dict(divergence_name="w", value_penalty=False),
    ),
}
SHOWN = {  # of each variant
    "KL, value": ("critic", "actor", "target"),
    "KL, learned alpha": ("actor", "alpha"),
    "MMD, policy": ("critic", "actor"),
    "Wasserstein, policy": ("actor", "c"),
    "clone": ("behaviour", "clone_entropy"),
}
NETS = ("behaviour", "actor", "critic", "c")


def inputs():
    import jax

    rng = np.random.default_rng(1)  # no loss near 0
    batches = random_batches(rng, rows=10)
    _, state = start("brac", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in NETS}
    params["target"] = scramble(state.target["params"], rng)
    params |= {"alpha": {"weight": np.float32(0.7)}, "clone_entropy": {"weight": np.float32(1.3)}}
    shape = batches["action"].shape[1:]
    noise = {str(n): jax.vmap(lambda key, n=n: draw(key, n, shape))(keys()) for n in (1, 4)}
    noise["clone"] = jax.vmap(lambda key: draw_clone(key, shape))(keys())
    return flatten({"batch": batches, "params": params, "noise": noise})


def keys():
    """Those of three updates."""
    import jax

    return jax.random.split(jax.random.key(0), 3)


def normal(key, *shape):
    import distrax
    import jax.numpy as jnp

    *n, rows, dim = shape
    unit = distrax.MultivariateNormalDiag(jnp.zeros((rows, dim)), jnp.ones((rows, dim)))
    return unit.sample(seed=key, sample_shape=tuple(n))


def draw(key, n, shape):
    """What our update draws from a key, before a policy scales and squashes it; shape (B, A)."""
    import jax

    k_critic, k_actor, k_c, k_alpha = jax.random.split(key, 4)
    places = {"next": jax.random.split(k_critic)[0], "actor": k_actor, "alpha": k_alpha}
    found = {}
    for name, k in places.items():
        k_pi, k_b = jax.random.split(k)
        found[name] = {"pi": normal(k_pi, n, *shape), "b": normal(k_b, n, *shape)}
    k_pi, k_between = jax.random.split(jax.random.split(k_c, 1)[0])
    between = jax.random.uniform(k_between, (shape[0], 1))
    return found | {"c": {"pi": normal(k_pi, *shape), "between": between[:, 0]}}


def draw_clone(key, shape):
    import jax

    k_behaviour, k_entropy = jax.random.split(key)
    return {"behaviour": normal(k_behaviour, *shape), "entropy": normal(k_entropy, *shape)}


def ours(inputs):
    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    run = jit(outputs, static_argnums=0)
    out = {k: v for name in VARIANTS for k, v in run(name, batches, params).items()}
    return out | jit(clone_outputs)(batches, params)


def prepared(variant, batches, params):
    from common.datasets import Batch

    cfg, state = start("brac", batches, **SETTINGS | VARIANTS.get(variant, [{}])[0])
    nets = {n: getattr(state, n).replace(params={"params": params[n]}) for n in NETS}
    nets |= {n: getattr(state, n).replace(params=params[n]) for n in ("alpha", "clone_entropy")}
    return cfg, state.replace(target={"params": params["target"]}, **nets), Batch(**batches)


def gradient(name, state, *args):
    import jax

    from algorithms import brac

    loss = jax.value_and_grad(getattr(brac, f"{name}_loss"), has_aux=True)
    (value, _), slope = loss(getattr(state, name).params, state, *args)
    return {f"{name} loss": value, f"{name} gradient": slope}


def outputs(variant, batches, params):
    import jax
    import optax

    from algorithms import brac

    cfg, state, batches = prepared(variant, batches, params)
    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    k_critic, k_actor, k_c, k_alpha = jax.random.split(key, 4)
    first, _ = brac.update(state, batch, key, cfg)  # theirs are read within an update
    target = optax.incremental_update(state.critic.params, state.target, cfg.polyak)
    newer = state.replace(target=target)
    found = gradient("critic", newer, batch, k_critic, cfg)
    newer = newer.replace(critic=first.critic)
    found |= gradient("actor", newer, batch, k_actor, cfg)
    newer = newer.replace(actor=first.actor)
    if cfg.divergence == "wasserstein":
        found |= gradient("c", newer, batch, jax.random.split(k_c, 1)[0])
    if cfg.target_divergence is not None:
        found |= gradient("alpha", newer, batch, k_alpha, cfg)

    state, infos = jax.lax.scan(lambda s, row: brac.update(s, *row, cfg), state, (batches, keys()))
    for name in SHOWN[variant]:
        learner = getattr(state, name)
        found[f"{name} after 3 updates"] = getattr(learner, "params", learner)
        if f"{name}_loss" in infos:
            found[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
    return {f"{variant}: {k}": v for k, v in found.items() if k.split()[0] in SHOWN[variant]}


def clone_outputs(batches, params):
    import jax

    from algorithms import brac

    _, state, batches = prepared("clone", batches, params)
    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    k_behaviour, k_entropy = jax.random.split(key)
    first, _ = brac.clone(state, batch, key)
    out = gradient("behaviour", state, batch, k_behaviour)
    newer = state.replace(behaviour=first.behaviour)
    out |= gradient("clone_entropy", newer, batch, k_entropy)
    state, infos = jax.lax.scan(lambda s, row: brac.clone(s, *row), state, (batches, keys()))
    out["behaviour loss of 3 updates"] = infos["behaviour_loss"]
    out["behaviour after 3 updates"] = state.behaviour.params
    out["clone_entropy after 3 updates"] = state.clone_entropy.params
    return {f"clone: {k.replace('_', ' ')}": v for k, v in out.items()}


def theirs(inputs, checkout):
    import sys
    from unittest import mock

    import tensorflow as tf

    tf.config.run_functions_eagerly(True)  # noise is handed out at each call, not at the first
    sys.path.insert(0, f"{checkout}/brac")
    for name in ("tf_agents", "tf_agents.specs"):
        sys.modules[name] = mock.MagicMock()
    give_back()
    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    out = {}
    for variant in (*VARIANTS, "clone"):
        found = train(variant, batches, params, noise)
        out |= {f"{variant}: {quantity}": x for quantity, x in found.items()}
    return out


def give_back():
    """What their code takes from older versions."""
    import tensorflow as tf
    import tensorflow_probability as tfp

    tfb, tfd, adam = tfp.bijectors, tfp.distributions, tf.compat.v1.keras.optimizers.Adam
    transformed = tfd.TransformedDistribution
    tfb.AffineScalar = lambda shift, scale: tfb.Chain([tfb.Shift(shift), tfb.Scale(scale)])

    def distribution(distribution, bijector, event_shape, batch_shape):
        unit = tfd.Normal(tf.zeros([*batch_shape, *event_shape]), 1.0)
        return transformed(tfd.Independent(unit, 1), bijector)

    tfd.TransformedDistribution = distribution
    tf.compat.v1.keras.optimizers.Adam = lambda lr: adam(learning_rate=lr)

    from behavior_regularized_offline_rl.brac import utils

    clip = utils.clip_v2.__wrapped__
    utils.clip_v2 = lambda x, low, high: tf.custom_gradient(lambda y: clip(y, low, high))(x)


def train(variant, batches, params, noise):
    """Three of their updates."""
    from unittest import mock

    import tensorflow as tf
    import tensorflow_probability as tfp

    agent, nets, numbers = build(variant, params, batches)
    optimizers = {"behaviour": agent._p_optimizer, "clone_entropy": agent._ae_optimizer}
    losses = {"behaviour": "p_loss", "clone_entropy": "ae_loss"}
    if variant != "clone":
        optimizers = {"critic": agent._q_optimizer, "actor": agent._p_optimizer}
        losses = {"critic": "q_loss", "actor": "p_loss"}
        if variant.startswith("Wasserstein"):
            optimizers["c"], losses["c"] = agent._c_optimizer, "c_loss"
        if "alpha" in variant:
            optimizers["alpha"], losses["alpha"] = agent._a_optimizer, "a_loss"
    gradients, infos = {}, []
    trees = {name: (lambda tree=tree: tree) for name, tree in nets.items()} | numbers

    def hook(name, optimizer):
        apply = optimizer.apply_gradients

        def keep(pairs):
            slopes = {x.ref(): g.numpy() for g, x in pairs}
            gradients.setdefault(name, read(trees[name](), lambda x: slopes[x.ref()]))
            apply(pairs)

        optimizer.apply_gradients = keep

    for name, optimizer in optimizers.items():
        hook(name, optimizer)

    for i in range(3):
        queue = queued(variant, tree_map(lambda x, i=i: x[i], noise))

        def sample(self, n, seed=None, queue=queue):  # of a unit Normal (B, A)
            x = queue.pop(0)
            assert x.size == n * np.prod(self.batch_shape)
            return tf.constant(x.reshape(n, *self.batch_shape))

        def uniform(shape, queue=queue):
            x = queue.pop(0)
            assert [*x.shape] == shape
            return tf.constant(x)

        b = tree_map(lambda x, i=i: tf.constant(x[i]), batches)
        batch = dict(s1=b["obs"], a1=b["action"], r=b["reward"], s2=b["next_obs"], a2=b["action"])
        batch["dsc"] = 1 - b["done"]
        for optimizer in optimizers.values():  # theirs is added before the bias is corrected
            optimizer.epsilon = 1e-8 * np.sqrt(1 - 0.999 ** (i + 1))
        with (
            mock.patch.object(tfp.distributions.Normal, "_sample_n", sample),
            mock.patch("tensorflow.compat.v1.random.uniform", uniform),
        ):
            infos.append({k: v.numpy() for k, v in agent._optimize_step(batch).items()})
        agent._global_step.assign_add(1)
        assert not queue

    out = {}
    for name in SHOWN[variant]:
        shown = name.replace("_", " ")
        out[f"{shown} after 3 updates"] = read(trees[name](), lambda x: x.numpy())
        if name in losses:
            out |= {f"{shown} loss": infos[0][losses[name]], f"{shown} gradient": gradients[name]}
        if name in losses and name not in numbers:
            out[f"{shown} loss of 3 updates"] = np.array([info[losses[name]] for info in infos])
    return out


def queued(variant, noise):
    """The noise of one update in the order in which they draw it."""
    if variant == "clone":
        return [noise["clone"]["behaviour"], noise["clone"]["entropy"]]
    given = noise["1" if variant.startswith("Wasserstein") else "4"]
    first = {name: given[name]["pi"][0] for name in ("next", "actor", "alpha")}
    pair = {name: [given[name]["pi"], given[name]["b"]] for name in first}
    if variant.startswith("Wasserstein"):
        return [first["next"], first["actor"], given["c"]["pi"], given["c"]["between"]]
    queue = [first["next"], *(pair["next"] if "policy" not in variant else [])]
    queue += [first["actor"], *pair["actor"]]
    return queue + (pair["alpha"] if "alpha" in variant else [])


def build(variant, params, batches):
    """Their agent with our weights: it, its networks, its numbers."""
    from types import SimpleNamespace
    from unittest import mock

    import tensorflow as tf
    from behavior_regularized_offline_rl.brac import bc_agent, brac_dual_agent, brac_primal_agent

    dim, adam = batches["action"].shape[-1], lambda rate: ("adam", SETTINGS[rate])
    spec = SimpleNamespace(shape=(dim,), minimum=-np.ones(dim), maximum=np.ones(dim))
    spec.minimum, spec.maximum = (np.float32(x) for x in (spec.minimum, spec.maximum))
    row = {name: tf.constant(x[0]) for name, x in batches.items()}
    rows = SimpleNamespace(
        s1=row["obs"], s2=row["next_obs"], a1=row["action"], a2=row["action"],
        reward=row["reward"], discount=1 - row["done"],
    )  # fmt: skip
    data = SimpleNamespace(size=len(row["obs"]), get_batch=lambda indices: rows)
    q, pi = SETTINGS["widths"], SETTINGS["actor_widths"]
    common = dict(
        action_spec=spec, train_data=data, discount=SETTINGS["gamma"],
        update_rate=SETTINGS["polyak"], batch_size=len(row["obs"]),
    )  # fmt: skip
    if variant == "clone":
        modules = bc_agent.get_modules((pi,), spec)
        agent = bc_agent.Agent(modules=modules, optimizers=(adam("clone_lr"),), **common)
        nets = {"behaviour": agent._agent_module.p_net}
        numbers = {"clone_entropy": lambda: agent._agent_module._alpha_entropy_var}
    else:
        dual = variant.startswith("Wasserstein")
        module, sizes = (brac_dual_agent, (q, pi, q)) if dual else (brac_primal_agent, (q, pi))
        rates = [adam("critic_lr"), adam("actor_lr"), adam("critic_lr"), adam("critic_lr")]
        settings = dict(alpha_entropy=SETTINGS["entropy"], warm_start=-1)
        with mock.patch.object(brac_primal_agent.Agent, "_load_behavior_policy", lambda self: None):
            agent = module.Agent(
                modules=module.get_modules((sizes, 2), spec), optimizers=rates,
                **common | settings | VARIANTS[variant][1],
            )  # fmt: skip
        inner = agent._agent_module
        nets = {"actor": inner.p_net, "critic": [q[0] for q in inner.q_nets]}
        nets["target"] = [q[1] for q in inner.q_nets]
        nets |= {"c": inner.c_net} if dual else {"behaviour": inner.b_net}
        numbers = {"alpha": lambda: inner._alpha_var}
    for name, net in nets.items():
        load(net, params[name]["MLP_0"])
    for name, number in numbers.items():
        number().assign(params[name]["weight"])
    return agent, nets, numbers


def load(net, params):
    """Writes our weights into a network of theirs, or into a list of members."""
    if isinstance(net, list):
        for i, member in enumerate(net):
            load(member, tree_map(lambda x, i=i: x[i], params))
        return
    for i, layer in enumerate(net._layers):
        layer.kernel.assign(params[f"Dense_{i}"]["kernel"].T)
        layer.bias.assign(params[f"Dense_{i}"]["bias"])


def read(net, value):
    """One of our trees from value(variable) of each variable of a network, or of a number."""
    if isinstance(net, list):
        trees = [read(member, value) for member in net]
        return tree_map(lambda *x: np.stack(x), *trees)
    if not hasattr(net, "_layers"):
        return {"weight": value(net)}
    layers = [{"kernel": value(x.kernel).T, "bias": value(x.bias)} for x in net._layers]
    return {"MLP_0": {f"Dense_{i}": layer for i, layer in enumerate(layers)}}
