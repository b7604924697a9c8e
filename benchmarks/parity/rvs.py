"""RvS compared with its authors' code.

The peer: `RvS` of src/rvs/policies.py, an actor-critic policy of Stable-Baselines3. `training_step`
gives the loss, `backward` the gradient, `configure_optimizers` the steps, `get_actions` the
actions. `reward_to_go` and `D4RLIterableDataset._sample_batch` of src/rvs/dataset.py give the
outcomes of rows.

- Gymnasium replaces gym; stubs replace d4rl, gcsl, wandb, PyTorch Lightning and plotting.
- NumPy's random numbers are those that our code draws from a fixed key.

Differences removed for the comparison:
- initialisation: both start from our weights
- dropout: 0
- choice of episodes: given

Weights: the two layers of its shared_net and its action_net are our Dense_0 to Dense_2.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, unflatten
from benchmarks.parity.layers import from_mlp, to_mlp

PEER = dict(
    name="the authors' code",
    repository="https://github.com/scottemmons/rvs",
    commit="90c0ffb26a1a3dd617d4f51c726f135d06f44b00",
    environment="torch==2.13.0 'numpy<2' gymnasium; then --no-deps stable-baselines3==1.2.0",
)
# Large steps, so that three updates show.
SETTINGS = dict(widths=(16, 16), lr=1e-2, dropout=0.0, batch_size=32, target=9.0, horizon=9)
LENGTHS = (5, 1, 9, 3)  # of episodes, for what rows led to
PLACE = (0, 1)


def inputs():
    import jax

    rng = np.random.default_rng(5)
    batches = random_batches(rng)
    batches = {name: batches[name] for name in ("obs", "action")}
    batches["outcome"] = rng.normal(size=(3, 32, 1)).astype(np.float32)
    _, state = ours_at_start(batches["obs"][0], batches["action"][0])
    params = scramble(state.actor.params["params"], rng)
    rows = {name: x[0] for name, x in random_batches(rng, 1, sum(LENGTHS), obs_dim=6).items()}
    rows = {name: rows[name] for name in ("obs", "action", "reward")}
    return flatten({"batch": batches, "params": params, "rows": rows, "drawn": drawn(jax)})


def drawn(jax):
    """Rows, and of the episode of each two steps, as ours draws them from a key."""
    k_rows, key = jax.random.split(jax.random.key(0))
    rows = jax.random.randint(k_rows, (32,), 0, sum(LENGTHS))
    length = np.repeat(LENGTHS, LENGTHS)[rows]
    draws = zip(jax.random.split(key), (np.maximum(length - 1, 1), length), strict=True)
    one, other = (jax.random.randint(k, (32,), 0, size) for k, size in draws)
    return {"rows": rows, "one": one, "other": other}


def ours_at_start(obs, action, **settings):
    """Config and fresh State for arrays of those sizes."""
    import jax

    from algorithms import rvs

    cfg = rvs.Config(**SETTINGS | dict(goal=False) | settings)
    data = rvs.Rows(obs, action, None, None, None)
    return cfg, rvs.init(jax.random.key(0), data, cfg)


def ours(inputs):
    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    out = jit(updates)(batches, params)
    return out | led_to(unflatten(inputs, "rows"), unflatten(inputs, "drawn"))


def updates(batches, params):
    import jax
    import jax.numpy as jnp

    from algorithms import rvs

    cfg, state = ours_at_start(batches["obs"][0], batches["action"][0])
    state = state.replace(actor=state.actor.replace(params={"params": params}))
    batches, key = rvs.Batch(**batches), jax.random.key(0)  # the key of dropout, which is 0
    batch = jax.tree.map(lambda x: x[0], batches)
    loss = jax.value_and_grad(rvs.actor_loss, has_aux=True)
    (value, _), gradient = loss(state.actor.params, state, batch, key, cfg)
    action, _ = rvs.act(state, None, batch.obs / 4, jnp.zeros(32), key, cfg)
    state, infos = jax.lax.scan(lambda s, b: rvs.update(s, b, key, cfg), state, batches)
    return {
        "actor loss": value,
        "actor gradient": gradient["params"],
        "actor loss of 3 updates": infos["actor_loss"],
        "actor after 3 updates": state.actor.params["params"],
        "actions for a return": action,
    }


def led_to(rows, drawn):
    """Outcomes of rows of episodes, and the pairs of a minibatch of RvS-G."""
    import jax

    from algorithms import rvs
    from common.datasets import Dataset

    length = np.array(LENGTHS)
    arrays = rows["obs"], rows["action"], rows["reward"], rows["obs"], 0 * rows["reward"]
    whole = Dataset("", "", *arrays, np.cumsum(length) - length, length, None, None, {})
    cfg, state = ours_at_start(*arrays[:2])
    out = {"average reward to go": rvs.hindsight(whole, cfg).outcome}
    cfg, _ = ours_at_start(*arrays[:2], average=False)
    out["reward to go"] = rvs.hindsight(whole, cfg).outcome
    cfg, state = ours_at_start(*arrays[:2], goal=True, place=PLACE)
    _, key = jax.random.split(jax.random.key(0))
    batch = rvs.minibatch(state, rvs.hindsight(whole, cfg), drawn["rows"], key, cfg)
    return out | {f"{name} of RvS-G": getattr(batch, name) for name in ("obs", "outcome")}


def theirs(inputs, checkout):
    from unittest import mock

    import torch

    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    rows, drawn = unflatten(inputs, "rows"), unflatten(inputs, "drawn")
    dataset, agent = build(checkout, batches["obs"].shape[-1], batches["action"].shape[-1])
    layers = [*agent.model.mlp_extractor.shared_net, agent.model.action_net]
    to_mlp(layers, params)
    agent.model.log_std.data = torch.tensor(params["log_std"])

    def read(grad=False):
        log_std = agent.model.log_std.grad if grad else agent.model.log_std.data
        return {**from_mlp(layers, grad), "log_std": log_std.numpy().copy()}

    goal = np.full((32, 1), SETTINGS["target"] / SETTINGS["horizon"], np.float32)
    action = agent.get_actions(batches["obs"][0] / 4, goal).clip(-1, 1)
    agent.train()
    adam, losses, gradients = agent.configure_optimizers(), [], []
    both = np.concatenate([batches["obs"], batches["outcome"]], -1)
    for pair in zip(torch.tensor(both), torch.tensor(batches["action"]), strict=True):
        adam.zero_grad()
        loss = agent.training_step(pair, 0)
        loss.backward()
        losses.append(loss.item())
        gradients.append(read(grad=True))
        adam.step()
    out = {
        "actor loss": losses[0],
        "actor gradient": gradients[0],
        "actor loss of 3 updates": np.array(losses),
        "actor after 3 updates": read(),
        "actions for a return": action,
    }

    last = np.isin(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS) - 1)
    flat = {"rewards": rows["reward"], "terminals": 0 * last, "timeouts": last}
    out["average reward to go"] = dataset.reward_to_go(flat)
    out["reward to go"] = dataset.reward_to_go(flat, average=False)
    pairs = dataset.D4RLIterableDataset(
        rows["obs"][:, :-2], rows["action"], last, index_batch_size=32, goal_columns=PLACE
    )
    episode = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[drawn["rows"]]
    length = np.array(LENGTHS)[episode]
    shares = [(drawn["one"] + 0.5) / np.maximum(length - 1, 1), (drawn["other"] + 0.5) / length]
    with (
        mock.patch("numpy.random.rand", lambda *_: shares.pop(0)),
        mock.patch("numpy.random.choice", lambda *_: episode),
    ):
        obs, place, _ = pairs._sample_batch()
    return out | {"obs of RvS-G": obs, "outcome of RvS-G": place}


def build(checkout, obs_dim, action_dim):
    """(Their module dataset, their policy conditioned on a return)."""
    import sys
    from importlib.machinery import ModuleSpec
    from types import SimpleNamespace
    from unittest import mock

    import gymnasium
    import torch

    sys.modules |= {"gym": gymnasium, "gym.spaces": gymnasium.spaces}
    names = """configargparse cloudpickle d4rl d4rl.kitchen d4rl.kitchen.adept_envs.franka
    d4rl.kitchen.adept_envs d4rl.locomotion gcsl gcsl.algo gcsl.envs matplotlib matplotlib.pyplot
    gym.wrappers.monitoring pandas seaborn tqdm wandb wandb.sdk wandb.sdk.wandb_run"""
    for name in names.split():
        sys.modules[name] = mock.MagicMock(__spec__=ModuleSpec(name, None))  # torch looks
    nothing = {name: lambda self, *_, **__: None for name in ("save_hyperparameters", "log")}
    module = type("LightningModule", (torch.nn.Module,), nothing)
    sys.modules["pytorch_lightning"] = SimpleNamespace(
        LightningModule=module, LightningDataModule=type("", (), {}), loggers=mock.MagicMock()
    )
    sys.path.insert(0, f"{checkout}/src")
    from rvs import dataset, policies

    box = gymnasium.spaces.Box
    sizes = box(-np.inf, np.inf, (obs_dim,)), box(-1, 1, (action_dim,))
    agent = policies.RvS(
        *sizes,
        hidden_size=SETTINGS["widths"][0],
        depth=len(SETTINGS["widths"]),
        learning_rate=SETTINGS["lr"],
        dropout_p=SETTINGS["dropout"],
        reward_conditioning=True,
    )
    return dataset, agent
