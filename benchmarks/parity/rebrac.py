"""ReBRAC compared with its authors' code, which uses JAX.

The peer: `update_critic` and `update_actor` of src/algorithms/rebrac.py through `update_td3` and
`update_td3_no_targets`, with the networks of src/networks.py. Losses are among its metrics;
gradients are read where they reach `apply_gradients`.

- Stubs replace d4rl, gym, pyrallis, wandb and the replay buffer.
- `jax.random.normal` returns the noise that our update draws from fixed keys.

Differences removed for the comparison:
- initialisation: both start from our weights
- which of two updates also updates the policy: the peer begins with one that does not
- number and width of hidden layers: equal

Weights: its kernels are ours transposed.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten

PEER = dict(
    name="tinkoff-ai/ReBRAC",
    repository="https://github.com/tinkoff-ai/ReBRAC",
    commit="694385b72fcef2ae318e3f0ff41ca36122355343",
    environment="jax flax optax chex distrax numpy",
)
# Large steps and noise, so that four updates and the clips show.
SETTINGS = dict(
    widths=(16, 16), gamma=0.9, actor_lr=3e-3, critic_lr=5e-3, polyak=0.1, beta1=0.4, beta2=0.7,
    policy_noise=0.4, reward_scale=1.0,
)  # fmt: skip
NETS = ("actor", "critic")
TREES = (*NETS, "target", "target_actor")
UPDATES = 4  # two rounds


def inputs():
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, count=UPDATES)
    shape = batches["action"].shape
    batches["next_action"] = rng.uniform(-0.95, 0.95, shape).astype(np.float32)
    _, state = begin(batches)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in NETS}
    params |= {name: scramble(getattr(state, name)["params"], rng) for name in TREES[2:]}
    noise = jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys())
    return flatten({"batch": batches, "params": params, "noise": noise})


def begin(batches):
    """Our config and a fresh state."""
    plain = {name: x for name, x in batches.items() if name != "next_action"}
    return start("rebrac", plain, **SETTINGS)


def keys():
    """The keys of four updates."""
    import jax

    return jax.random.split(jax.random.key(0), UPDATES)


def ours(inputs):
    return jit(outputs)(unflatten(inputs, "batch"), unflatten(inputs, "params"))


def outputs(batches, params):
    import jax

    from algorithms import rebrac

    cfg, state = begin(batches)
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in NETS}
    targets = {name: {"params": params[name]} for name in TREES[2:]}
    state, batches = state.replace(**nets, **targets), rebrac.Transitions(**batches)
    rows = [jax.tree.map(lambda x, i=i: x[i], (batches, keys())) for i in range(2)]

    def gradient(loss, learner, *args):
        (value, _), slope = jax.value_and_grad(loss, has_aux=True)(learner.params, *args)
        return value, slope

    out, critic = {}, state.critic
    loss = gradient(rebrac.critic_loss, critic, state, *rows[0], cfg)
    out["critic loss"], out["critic gradient"] = loss
    for row in rows:
        critic, _ = rebrac.descend(rebrac.critic_loss, critic, state, *row, cfg)
    after = state.replace(critic=critic)
    loss = gradient(rebrac.actor_loss, state.actor, after, rows[1][0], cfg)
    out["actor loss"], out["actor gradient"] = loss

    rounds = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), (batches, keys()))
    state, infos = jax.lax.scan(lambda s, row: rebrac.update(s, *row, cfg), state, rounds)
    out["actor loss of 2 rounds"] = infos["actor_loss"]
    out["critic loss of 2 rounds"] = infos["critic_loss"]
    out |= {f"{name} after 2 rounds": getattr(state, name).params for name in NETS}
    return out | {f"{name} after 2 rounds": getattr(state, name) for name in TREES[2:]}


def theirs(inputs, checkout):
    import sys
    from unittest import mock

    for name in ("d4rl", "gym", "pyrallis", "wandb", "tqdm", "tqdm.auto", "src.utils.buffer"):
        sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, checkout)
    import jax
    from src.algorithms import rebrac

    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    learners = build(rebrac, params)
    settings = dict(
        gamma=SETTINGS["gamma"],
        actor_bc_coef=SETTINGS["beta1"],
        critic_bc_coef=SETTINGS["beta2"],
        tau=SETTINGS["polyak"],
        policy_noise=SETTINGS["policy_noise"],
        noise_clip=0.5,
    )
    losses, gradients = {name: [] for name in NETS}, {}

    for i in range(UPDATES):
        moves = i % 2 == 1  # the policy and the targets
        update = rebrac.update_td3 if moves else rebrac.update_td3_no_targets
        more = settings | ({"normalize_q": True} if moves else {})
        with (
            mock.patch("jax.random.normal", lambda key, shape, i=i: given(noise[i], shape)),
            mock.patch.object(rebrac.TrainState, "apply_gradients", recorder(rebrac, gradients)),
        ):
            _, *after, metrics = update(
                key=jax.random.key(0),
                batch=columns(batches, i),
                metrics=rebrac.Metrics.create(
                    "critic_loss q_min actor_loss bc_mse_policy bc_mse_random action_mse".split()
                ),
                **learners,
                **more,
            )
        learners = dict(zip(NETS, after, strict=True))
        for name in NETS[0 if moves else 1 :]:
            losses[name].append(metrics.compute()[f"{name}_loss"][0])

    out = {f"{name} gradient": gradients[name] for name in NETS}
    out |= {f"{name} loss": np.array(losses[name][0]) for name in NETS}
    out["actor loss of 2 rounds"] = np.array(losses["actor"])
    out["critic loss of 2 rounds"] = np.array(losses["critic"]).reshape(-1, 2).mean(1)
    for name, learner in learners.items():
        target = "target" if name == "critic" else "target_actor"
        out[f"{name} after 2 rounds"] = from_theirs(learner.params)
        out[f"{target} after 2 rounds"] = from_theirs(learner.target_params)
    return out


def given(noise, shape):
    assert noise.shape == shape
    return noise


def recorder(module, gradients):
    """Their `apply_gradients`, which keeps the first gradients of each network."""
    step = module.TrainState.apply_gradients

    def apply_gradients(learner, grads):
        name = "actor" if isinstance(learner, module.ActorTrainState) else "critic"
        gradients.setdefault(name, from_theirs(grads))
        return step(learner, grads=grads)

    return apply_gradients


def columns(batches, i):
    """Batch i under their names."""
    names = dict(
        states="obs",
        actions="action",
        rewards="reward",
        next_states="next_obs",
        dones="done",
        next_actions="next_action",
    )
    return {name: batches[column][i] for name, column in names.items()}


def build(module, params):
    """Their two learners with our weights."""
    import optax

    size, depth = SETTINGS["widths"][0], len(SETTINGS["widths"])
    sizes = dict(hidden_dim=size, n_hiddens=depth)
    action_dim = params["actor"]["MLP_0"]["Dense_2"]["bias"].shape[-1]
    return {
        "actor": module.ActorTrainState.create(
            apply_fn=module.DetActor(action_dim=action_dim, layernorm=False, **sizes).apply,
            params=to_theirs(params["actor"]["MLP_0"]),
            target_params=to_theirs(params["target_actor"]["MLP_0"]),
            tx=optax.adam(SETTINGS["actor_lr"]),
        ),
        "critic": module.CriticTrainState.create(
            apply_fn=module.EnsembleCritic(num_critics=2, layernorm=True, **sizes).apply,
            params=to_theirs({"VmapCritic_0": params["critic"]}),
            target_params=to_theirs({"VmapCritic_0": params["target"]}),
            tx=optax.adam(SETTINGS["critic_lr"]),
        ),
    }


def transposed(tree, name=""):
    """The same tree, kernels transposed."""
    if hasattr(tree, "items"):
        return {inner: transposed(x, inner) for inner, x in tree.items()}
    return tree.swapaxes(-1, -2) if name == "kernel" else tree


def to_theirs(tree):
    return {"params": transposed(tree)}


def from_theirs(params):
    """One of our trees from theirs."""
    tree = tree_map(np.asarray, transposed(params["params"]))
    return tree.get("VmapCritic_0", tree)
