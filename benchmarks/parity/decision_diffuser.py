"""Decision Diffuser compared with its authors' code.

The peer: three steps of `Trainer` train `GaussianInvDynDiffusion` with `TemporalUnet` (losses of
x_0, by `predict_epsilon=False`, and of the inverse dynamics, Adam, averaged weights);
`conditional_sample` makes whole plans towards a return at low temperature, and its `inv_model`
gives their first action.

- Stubs replace environments, datasets, rendering, the logger and the command line.
- torch returns our times and noise; the mask of the condition returns which windows we keep.
- `Trainer` gets our minibatches, each in two halves whose gradients it accumulates, and copies
  nothing to a GPU and saves nothing. Its optimiser keeps the gradients it receives.

Differences removed for the comparison:
- its loss is half the sum of the two: gradients are doubled before Adam, whose epsilon sees them
- averaging of weights: `Trainer` averages at every step from the first, by its own arguments
- padding: windows are complete
- clipping of x_0: to [-1, 1], as the peer's data are scaled
- upsampling: the peer's transposed convolution is replaced by ours, as in diffuser.py, where the
  two are compared

Weights are drawn and summarised as in diffuser.py.
"""

import functools
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np

from benchmarks.parity import diffuser as shared
from benchmarks.parity import flatten, jit, tree_map, unflatten

PEER = dict(
    name="authors (decision-diffuser)",
    repository="https://github.com/anuragajay/decision-diffuser",
    commit="01ce528c30b4733dc59aa6203e46ec165561158d",
    environment="torch==2.13.0 einops numpy",
)
UPDATES, PLANS, OBS, ACTION = 3, 2, 4, 2
SETTINGS = dict(
    horizon=8, width=32, multiples=(1, 2), diffusion_steps=20, batch_size=4, lr=2e-4, ema=0.8,
    drop=0.5, inverse_widths=(16, 16), target=0.9, guidance=1.2, temperature=0.5,
)  # fmt: skip
NETS = ("model", "inverse")


def config():
    from algorithms import decision_diffuser

    return decision_diffuser.Config(**SETTINGS)


def keys(of, count=None):
    return shared.keys(of, count)


# --- Inputs ---


def drawn(key, shape):
    """Times, noise and kept conditions of one loss, as `model_loss` draws them from its key."""
    import jax

    k_t, k_noise, k_condition = jax.random.split(key, 3)
    _, k_drop = jax.random.split(k_condition)
    return {
        "t": jax.random.randint(k_t, shape[:1], 0, SETTINGS["diffusion_steps"]),
        "noise": jax.random.normal(k_noise, shape),
        "keep": jax.random.uniform(k_drop, shape[:1]) >= SETTINGS["drop"],
    }


def inputs():
    import jax

    rng, shape = np.random.default_rng(0), (SETTINGS["batch_size"], SETTINGS["horizon"], OBS)
    noise = [jax.device_get(drawn(key, shape)) for key in keys(1, UPDATES)]
    k_start, k_steps = jax.random.split(keys(2))
    plans = (PLANS, *shape[1:])
    k_steps = jax.random.split(k_steps, SETTINGS["diffusion_steps"])
    numbers = {"x": shape, "action": (*shape[:2], ACTION), "returns": (shape[0], 1)}
    return flatten(jax.device_get({
        "size": np.float32(1),  # of the weights, see diffuser.py
        **{name: rng.uniform(-1, 1, (UPDATES, *x)).astype(np.float32)
           for name, x in numbers.items()},
        "noise": tree_map(lambda *x: np.stack(x), *noise),
        "plan": {
            "start": jax.random.normal(k_start, plans),
            "steps": np.stack([jax.random.normal(key, plans) for key in k_steps]),
            "first": rng.uniform(-1, 1, (PLANS, OBS)).astype(np.float32),
        },
    }))  # fmt: skip


# --- Theirs ---


def layers(diffusion):
    """{network: [(our layer's name, theirs)]}."""
    net, told = diffusion.model, diffusion.model.returns_mlp
    n, found = len(net.downs), []
    for i, (first, second, smaller) in enumerate(net.downs):
        found += shared.block(f"Block_{2 * i + 1}", first)
        found += shared.block(f"Block_{2 * i}", second)
        if hasattr(smaller, "conv"):
            found.append((f"Conv_{i}/Dense_0", smaller.conv))
    found += shared.block(f"Block_{2 * n + 1}", net.mid_block1)
    found += shared.block(f"Block_{2 * n}", net.mid_block2)
    for i, (first, second, larger) in enumerate(net.ups):
        found += shared.block(f"Block_{2 * (n + i) + 2}", first)
        found += shared.block(f"Block_{2 * (n + i) + 3}", second)
        found.append((f"Conv_{n - 1 + i}/Dense_0", larger.conv))
    found += [
        (f"Conv_{2 * (n - 1)}/Dense_0", net.final_conv[0].block[0]),
        ("GroupNorm_0", net.final_conv[0].block[2]),
        ("Dense_0", net.final_conv[1]),
        ("TimeEmbedding_0/Dense_1", net.time_mlp[1]),
        ("TimeEmbedding_0/Dense_0", net.time_mlp[3]),
        *((f"TimeEmbedding_0/Dense_{4 - i}", told[2 * i]) for i in range(3)),
    ]
    inverse = [(f"Dense_{i}", diffusion.inv_model[2 * i]) for i in range(3)]
    return {"model": found, "inverse": inverse}


def network(inputs):
    """Their diffusion with our weights."""
    import torch
    from diffuser.models import GaussianInvDynDiffusion, TemporalUnet

    class Upsample(torch.nn.Module):
        """Our upsampling: a convolution to twice the channels, each half a step."""

        def __init__(self, width):
            super().__init__()
            self.conv = torch.nn.Conv1d(width, 2 * width, 3, padding=1)

        def forward(self, x):
            even, odd = self.conv(x).chunk(2, 1)
            return torch.stack([even, odd], -1).flatten(2)

    net = TemporalUnet(
        SETTINGS["horizon"], OBS, OBS, SETTINGS["width"], SETTINGS["multiples"],
        returns_condition=True, condition_dropout=SETTINGS["drop"],
    )  # fmt: skip
    for level in net.ups:
        level[2] = Upsample(level[2].conv.in_channels)
    diffusion = GaussianInvDynDiffusion(
        net, SETTINGS["horizon"], OBS, ACTION, SETTINGS["diffusion_steps"], clip_denoised=True,
        predict_epsilon=False, hidden_dim=SETTINGS["inverse_widths"][0], returns_condition=True,
        condition_guidance_w=SETTINGS["guidance"],
    )  # fmt: skip
    for name, pairs in layers(diffusion).items():
        with mock.patch.object(shared, "layers", lambda _, pairs=pairs: pairs):
            shared.write(None, shared.weights(inputs, name, shared.read(None)))
    return diffusion


def read(diffusion, name, grad=False):
    """The summary of one network's weights or gradients."""
    pairs = layers(diffusion)[name]
    with mock.patch.object(shared, "layers", lambda _: pairs):
        return shared.summary(shared.read(None, grad))


def trained(inputs):
    """Three steps of their Trainer: losses, gradients, weights and their averages."""
    import torch
    from diffuser.utils import training

    diffusion, noise = network(inputs), unflatten(inputs, "noise")
    half = SETTINGS["batch_size"] // 2
    batches, draws = [], []
    for i in range(UPDATES):
        for rows in (slice(0, half), slice(half, None)):
            x = torch.tensor(np.concatenate([inputs["action"][i, rows], inputs["x"][i, rows]], -1))
            batches.append((x, {0: x[:, 0, ACTION:]}, torch.tensor(inputs["returns"][i, rows])))
            draws.append({name: torch.tensor(noise[name][i, rows]) for name in noise})
    times, noises, kept = (iter([x[name] for x in draws]) for name in ("t", "noise", "keep"))
    trainer = training.Trainer(
        diffusion, [0], None, ema_decay=SETTINGS["ema"], train_lr=SETTINGS["lr"],
        gradient_accumulate_every=2, step_start_ema=0, update_ema_every=1, sample_freq=0,
    )  # fmt: skip
    trainer.dataloader, trainer.save = iter(batches), lambda: None
    loss, step = diffusion.loss, trainer.optimizer.step
    losses, gradients = [], {name: [] for name in NETS}

    def keep_loss(*batch):
        value, info = loss(*batch)
        losses.append(value.item())
        return value, info

    def keep_gradient():
        for x in diffusion.parameters():
            x.grad *= 2
        for name in NETS:
            gradients[name].append(read(diffusion, name, grad=True))
        step()

    diffusion.loss, trainer.optimizer.step = keep_loss, keep_gradient
    mask = SimpleNamespace(sample=lambda sample_shape: next(kept).float()[:, None])
    with (
        mock.patch.object(diffusion.model, "mask_dist", mask),
        mock.patch("torch.randint", lambda *_, **__: next(times)),
        mock.patch("torch.randn_like", lambda _: next(noises)),
        mock.patch.object(training, "batch_to_device", lambda batch, device: batch),
    ):
        trainer.train(UPDATES)
    out = {"half the sum of the losses": np.reshape(losses, (UPDATES, 2)).mean(1)}
    for name in NETS:
        out[f"{name} gradient"] = np.concatenate(gradients[name])
        out[f"{name} after"] = read(diffusion, name)
        out[f"{name} average"] = read(trainer.ema_model, name)
    return out


def planned(inputs):
    import torch

    given = tree_map(torch.tensor, unflatten(inputs, "plan"))
    steps, diffusion = iter(given["steps"].clone()), network(inputs)
    with (
        torch.no_grad(),
        mock.patch("torch.randn", lambda *_, **__: given["start"].clone()),
        mock.patch("torch.randn_like", lambda _: next(steps)),
    ):
        returns = SETTINGS["target"] * torch.ones(PLANS, 1)
        x = diffusion.conditional_sample({0: given["first"]}, returns, verbose=False)
        action = diffusion.inv_model(torch.cat([x[:, 0], x[:, 1]], -1))
    return {"plan": x.numpy(), "action": action.numpy()}


def theirs(inputs, checkout):
    sys.path.insert(0, f"{checkout}/code")
    sys.modules["ml_logger"] = mock.MagicMock()
    sys.modules["diffuser.environments"] = ModuleType("environments")
    for name in ("rendering", "setup", "config", "colab", "serialization", "cloud"):
        sys.modules[f"diffuser.utils.{name}"] = stub = ModuleType(name)
        stub.sync_logs = None
    for name in ("datasets", "datasets.preprocessing"):
        sys.modules[f"diffuser.{name}"] = mock.MagicMock()
    return trained(inputs) | planned(inputs)


# --- Ours ---


@functools.cache
def structures():
    """{network: its TrainState as `init` makes it, without numbers, keeping its gradients}."""
    import jax
    import jax.numpy as jnp

    from algorithms import decision_diffuser

    data = SimpleNamespace(obs=jnp.zeros((2, OBS)), action=jnp.zeros((2, ACTION)))
    state = jax.eval_shape(lambda key: decision_diffuser.init(key, data, config()), keys(0))
    return {name: shared.keeping(getattr(state, name)) for name in NETS}


@functools.cache
def programs():
    """What `ours` runs, compiled once."""
    from algorithms import decision_diffuser as dd

    cfg = config()

    def plan(state, first, key):
        x = dd.plan(state, (first, None), key, cfg)
        action, _ = dd.act(state, None, first, None, key, cfg)
        return x, action

    return SimpleNamespace(update=jit(functools.partial(dd.update, cfg=cfg)), plan=jit(plan))


def our_state(inputs):
    import jax.numpy as jnp

    from algorithms import decision_diffuser

    nets = {}
    for name, net in structures().items():
        like = flatten(tree_map(lambda x: np.zeros(x.shape), net.params["params"]))
        params = shared.nested(shared.weights(inputs, name, like))
        params = tree_map(jnp.asarray, params)
        nets[name] = net.create(apply_fn=net.apply_fn, params=params, tx=net.tx)
    ema = {name: net.params for name, net in nets.items()}
    rest = jnp.zeros(OBS), jnp.ones(OBS), -jnp.ones(OBS), jnp.ones(OBS)
    return decision_diffuser.State(*nets.values(), ema, *rest)


def ours(inputs):
    import jax
    import jax.numpy as jnp

    from algorithms import decision_diffuser as dd

    run, state, losses = programs(), our_state(inputs), []
    given = unflatten(inputs, "plan")
    x, action = run.plan(state, given["first"], keys(2))
    out, gradients = {"plan": x, "action": action}, {name: [] for name in NETS}
    for i, key in enumerate(keys(1, UPDATES)):
        x, action, y = (jnp.asarray(inputs[name][i]) for name in ("x", "action", "returns"))
        window = dd.Window(x, action, jnp.ones(x.shape[:2], bool), y)
        state, info = run.update(state, window, key)
        losses.append((info["model_loss"] + info["inverse_loss"]) / 2)
        for name in NETS:
            kept, _ = jax.device_get(getattr(state, name).opt_state)
            gradients[name].append(shared.summary(kept["params"]))
    out["half the sum of the losses"] = np.array(losses)
    for name in NETS:
        after, average = jax.device_get((getattr(state, name).params, state.ema[name]))
        out[f"{name} gradient"] = np.concatenate(gradients[name])
        out[f"{name} after"] = shared.summary(after["params"])
        out[f"{name} average"] = shared.summary(average["params"])
    return out
