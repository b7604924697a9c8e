"""JAX-CORL, JAX: eight updates are compiled together."""

from functools import partial

from benchmarks.peers import ACTION, BATCH, DT, EVALUATION, OBS, TWO, Row, module, repeat

PEER = dict(
    name="JAX-CORL",
    repository="https://github.com/nissymori/JAX-CORL",
    packages=("jax", "jaxlib", "flax", "optax", "distrax", "gymnasium", "mujoco"),
)


def training(what, sizes, updates, **settings):
    def rows(checkout, world):
        import jax

        peer, key = module(checkout, f"algos/{what}.py"), jax.random.PRNGKey(0)
        for name, x in settings.items():
            setattr(peer.config, name, x)
        data, *_ = peer.get_dataset(world, peer.config)
        first = data.observations[0], data.actions[0]
        state = getattr(peer, f"create_{what}_train_state")(key, *first, peer.config)
        update = jax.jit(getattr(peer, what.upper()).update_n_times, static_argnums=(3,))

        def step():
            nonlocal key, state
            key, subkey = jax.random.split(key)
            state, _ = update(state, data, subkey, peer.config)

        def wait():
            jax.block_until_ready(state)

        yield Row(what, sizes, updates, repeat(step, updates // peer.config.n_jitted_updates, wait))

    return rows


def dt(checkout, world):
    """Its trajectories are NumPy arrays, passed to the compiled sampler for each batch."""
    import jax

    peer, key = module(checkout, "algos/dt.py"), jax.random.PRNGKey(0)
    windows, count, lengths, *_ = peer.make_padded_trajectories(peer.config)
    state = peer.create_dt_train_state(key, OBS, ACTION, peer.config)
    update = jax.jit(peer.DT.update)

    def step():
        nonlocal key, state
        key, k_data, k_update = jax.random.split(key, 3)
        sizes = peer.config.batch_size, peer.config.context_len, count
        batch = peer.sample_traj_batch(k_data, windows, *sizes, lengths)
        state, _ = update(state, batch, k_update)

    yield Row("dt", DT, 4, repeat(step, 4, lambda: jax.block_until_ready(state)))


def evaluation(checkout, world):
    import jax

    peer, key = module(checkout, "algos/iql.py"), jax.random.PRNGKey(0)
    data = world.get_dataset()
    first = data["observations"][0], data["actions"][0]
    state = peer.create_iql_train_state(key, *first, peer.config)
    act = partial(jax.jit(peer.IQL.get_action), temperature=0.0, seed=key, train_state=state)
    run = partial(peer.evaluate, act, world, EVALUATION["episodes"], 0.0, 1.0)
    yield Row("evaluation", EVALUATION, 1, repeat(run, 1))


IQL = dict(widths=TWO, critics=2, **BATCH)
AWAC = IQL | dict(actor_widths=[256] * 4)
CQL = IQL | dict(actions=30)
CASES = {
    "iql": training("iql", IQL, 96, layer_norm=False),
    "awac": training("awac", AWAC, 80),
    "cql": training("cql", CQL, 8, action_dim=ACTION, target_entropy=-float(ACTION)),
    "dt": dt,
    "evaluation": evaluation,
}
