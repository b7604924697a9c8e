"""Diffuser compared with its authors' code.

The peer: `q_sample` and `q_posterior` of `GaussianDiffusion` show the schedule. Three steps of
`Trainer` train `GaussianDiffusion` with `TemporalUnet`, and `ValueDiffusion` with `ValueFunction`
(losses, Adam, averaged weights). `ValueGuide` gives the gradient of the guide, `p_mean_variance`
one denoising step, `conditional_sample` whole plans, guided by `n_step_guided_p_sample` or, by its
default, towards a goal.

- Stubs replace environments, datasets, rendering and the command line.
- torch returns our times and noise.
- `Trainer` gets our minibatches, each in two halves whose gradients it accumulates, and copies
  nothing to a GPU. Its optimiser keeps the gradients it receives.

Differences removed for the comparison:
- averaging of weights: `Trainer` averages at every step from the first, by its own arguments
- padding: windows are complete
- scale of values: divided by `return_scale`; its guide scale is multiplied by it
- upsampling: the peer's transposed convolution of size 4 is replaced by our convolution of size 3
  to two steps. Ours contains it as a special case with two of six taps zero; with such weights the
  peer's own network makes the same predictions, which is compared too.

Weights: our kernel (out, size * in) is the peer's convolution (out, in, size); a Dense is a Linear.
Of two consecutive blocks our Flax counts the second first. The arrays are too large to keep: both
sides draw the weights from a fixed generator, and gradients and trained weights are summarised, for
each array, by up to 8 evenly spread numbers and the root mean square. Narrower networks would
normalise single numbers, and their gradients would be rounding errors, which Adam turns into whole
steps. `ValueFunction` does not allow a longer horizon with so few levels.
"""

import functools
import sys
import tempfile
import zlib
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np

from benchmarks.parity import flatten, jit, tree_map, unflatten, vector

PEER = dict(
    name="authors (diffuser)",
    repository="https://github.com/jannerm/diffuser",
    commit="7ea422860cc0106e5ca5949d980f04b799d5462c",
    environment="torch==2.13.0 einops numpy",
)
UPDATES, PLANS, OBS, ACTION = 3, 1, 4, 2
# A fast average, so that three updates show; not so the rate, theirs: of Adam's first steps, all of
# one size, rounding decides some, and larger ones add up to more than rounding.
SETTINGS = dict(
    horizon=8, width=32, diffusion_steps=20, batch_size=4, lr=2e-4, ema=0.8, action_weight=10.0,
    return_scale=10.0, guide_scale=0.1, guide_steps=2, guide_stop=2, samples=1, plan_every=1,
)  # fmt: skip
MULTIPLES = {"model": (1, 2), "value": (1, 4)}
BOUNDS = {"value gradient": 2e-5}  # rounding of both sides, through a dozen normalisations


def summary(tree):
    """For each array up to 8 evenly spread numbers and the root mean square."""
    out = {}
    for name, x in flatten(tree).items():
        places = np.linspace(0, x.size - 1, min(x.size, 8)).astype(int)
        out[name] = np.append(x.ravel()[places], np.sqrt(np.mean(np.square(x, dtype=float))))
    return vector(out).astype(np.float32)


# --- Inputs ---


def config(name="model", goal=False):
    """Our Config with the widths of one network."""
    from algorithms import diffuser

    return diffuser.Config(**SETTINGS, multiples=MULTIPLES[name], goal=goal)


@functools.cache
def structures():
    """{network: its TrainState as `init` makes it, without numbers}."""
    import jax
    import jax.numpy as jnp

    from algorithms import diffuser

    data = SimpleNamespace(obs=jnp.zeros((2, OBS)), action=jnp.zeros((2, ACTION)))
    cfgs = {"model": config(goal=True), "value": config("value")}  # the first without a value
    states = {
        name: jax.eval_shape(lambda key, cfg=cfg: diffuser.init(key, data, cfg), jax.random.key(0))
        for name, cfg in cfgs.items()
    }
    return {name: keeping(getattr(state, name)) for name, state in states.items()}


def keeping(net):
    """The TrainState with an optimiser that keeps the gradients it receives."""
    import optax

    keep = optax.GradientTransformation(lambda params: params, lambda grads, *_: (grads, grads))
    return net.replace(tx=optax.chain(keep, net.tx))


def keys(of, count=None):
    import jax

    key = jax.random.key(of)
    return key if count is None else jax.random.split(key, count)


def drawn(key, shape):
    """Times and noise of one loss, as `diffuse` draws them from its key."""
    import jax

    k_t, k_noise = jax.random.split(key)
    t = jax.random.randint(k_t, shape[:1], 0, SETTINGS["diffusion_steps"])
    return {"t": t, "noise": jax.random.normal(k_noise, shape)}


def inputs():
    import jax

    rng = np.random.default_rng(0)
    shape = SETTINGS["batch_size"], SETTINGS["horizon"], ACTION + OBS
    noise = [
        {name: drawn(k, shape) for name, k in zip(MULTIPLES, jax.random.split(key), strict=True)}
        for key in keys(1, UPDATES)
    ]
    k_start, k_steps = jax.random.split(keys(2))
    episodes = (PLANS, *shape[1:])
    k_steps = jax.random.split(k_steps, SETTINGS["diffusion_steps"])
    return flatten(jax.device_get({
        "size": np.float32(1),  # of the weights, see `weights`
        "x": rng.normal(size=(UPDATES, *shape)).astype(np.float32),
        "returns_to_go": rng.normal(size=(UPDATES, shape[0])).astype(np.float32),
        "noise": tree_map(lambda *x: np.stack(x), *noise),
        "plan": {
            "start": jax.random.normal(k_start, episodes),
            "steps": np.stack([jax.random.normal(key, episodes) for key in k_steps]),
            "first": rng.normal(size=(PLANS, OBS)).astype(np.float32),
            "last": rng.normal(size=(PLANS, OBS)).astype(np.float32),
        },
    }))  # fmt: skip


def weights(inputs, network, like):
    """Parameters of the shapes in `like`, {our name: array}, by NumPy's frozen generator."""
    params = {}
    for name, x in like.items():
        seed = f"{network}/{name}".replace("TimeEmbedding", "Time")  # as the golden file has it
        generator = np.random.RandomState(zlib.crc32(seed.encode()))
        fan_in = x.shape[-1] if len(x.shape) > 1 else 16
        noise = inputs["size"] * generator.normal(size=x.shape) / np.sqrt(fan_in)
        params[name] = (noise + name.endswith("scale")).astype(np.float32)
    return params


def one(inputs):
    """Four steps and noise for every time: (T, 4, A + D) each."""
    pair = inputs["x"][0, 0, :4], inputs["x"][0, 1, :4]
    return (np.repeat(x[None], SETTINGS["diffusion_steps"], 0) for x in pair)


# --- Theirs ---


def block(ours, theirs):
    """(our layer's name, theirs) of a residual block."""
    for i, part in enumerate(theirs.blocks):
        yield f"{ours}/Conv_{i}/Dense_0", part.block[0]
        yield f"{ours}/GroupNorm_{i}", part.block[2]
    yield f"{ours}/Dense_0", theirs.time_mlp[1]
    if hasattr(theirs.residual_conv, "weight"):
        yield f"{ours}/Dense_1", theirs.residual_conv


def down(net, levels):
    """The same for the time embedding and the levels on the way down."""
    yield "TimeEmbedding_0/Dense_1", net.time_mlp[1]
    yield "TimeEmbedding_0/Dense_0", net.time_mlp[3]
    for i, (first, second, *_, smaller) in enumerate(levels):
        yield from block(f"Block_{2 * i + 1}", first)
        yield from block(f"Block_{2 * i}", second)
        if hasattr(smaller, "conv"):
            yield f"Conv_{i}/Dense_0", smaller.conv


def layers(net):
    """The same for a whole network."""
    if hasattr(net, "ups"):
        n = len(net.downs)
        yield from down(net, net.downs)
        yield from block(f"Block_{2 * n + 1}", net.mid_block1)
        yield from block(f"Block_{2 * n}", net.mid_block2)
        for i, (first, second, _, larger) in enumerate(net.ups):
            yield from block(f"Block_{2 * (n + i) + 2}", first)
            yield from block(f"Block_{2 * (n + i) + 3}", second)
            yield f"Conv_{n - 1 + i}/Dense_0", larger.conv
        yield f"Conv_{2 * (n - 1)}/Dense_0", net.final_conv[0].block[0]
        yield "GroupNorm_0", net.final_conv[0].block[2]
        yield "Dense_0", net.final_conv[1]
    else:
        n = len(net.blocks)
        yield from down(net, net.blocks)
        yield from block(f"Block_{2 * n}", net.mid_block1)
        yield from block(f"Block_{2 * n + 1}", net.mid_block2)
        yield f"Conv_{n}/Dense_0", net.mid_down1.conv
        yield f"Conv_{n + 1}/Dense_0", net.mid_down2.conv
        yield "Dense_1", net.final_block[0]
        yield "Dense_0", net.final_block[2]


def to_theirs(kernel, shape):
    """Our kernel (out, size * in), or scale, in the shape of their weight."""
    if len(shape) < 3:
        return kernel
    out, inner, size = shape
    return kernel.reshape(out, size, inner).swapaxes(1, 2)


def to_ours(weight):
    """The inverse."""
    return weight if weight.ndim < 3 else weight.swapaxes(1, 2).reshape(len(weight), -1)


def write(net, params):
    import torch

    params = dict(params)
    for name, layer in layers(net):
        kernel = params.pop(f"{name}/{'scale' if layer.weight.ndim == 1 else 'kernel'}")
        kernel = to_theirs(kernel, layer.weight.shape)
        bias = params.pop(f"{name}/bias")
        if isinstance(layer, torch.nn.ConvTranspose1d):
            bias = bias[: len(bias) // 2]
        assert kernel.shape == layer.weight.shape and bias.shape == layer.bias.shape
        layer.weight.data = torch.tensor(np.ascontiguousarray(kernel))
        layer.bias.data = torch.tensor(bias)
    assert not params


def read(net, grad=False):
    out = {}
    for name, layer in layers(net):
        weight, bias = ((x.grad if grad else x.data).numpy() for x in (layer.weight, layer.bias))
        out[f"{name}/{'scale' if weight.ndim == 1 else 'kernel'}"] = to_ours(weight).copy()
        out[f"{name}/bias"] = bias.copy()
    return out


def networks(inputs, clip=False):
    """{network: their diffusion, with our weights}."""
    import torch
    from diffuser.models import GaussianDiffusion, TemporalUnet, ValueDiffusion, ValueFunction

    class Upsample(torch.nn.Module):
        """Our upsampling: a convolution to twice the channels, each half a step."""

        def __init__(self, width):
            super().__init__()
            self.conv = torch.nn.Conv1d(width, 2 * width, 3, padding=1)

        def forward(self, x):
            even, odd = self.conv(x).chunk(2, 1)
            return torch.stack([even, odd], -1).flatten(2)

    sizes = SETTINGS["horizon"], ACTION + OBS, OBS, SETTINGS["width"]
    nets = {"model": TemporalUnet(*sizes, MULTIPLES["model"])}
    nets["value"] = ValueFunction(*sizes, MULTIPLES["value"])
    for level in nets["model"].ups:
        level[3] = Upsample(level[3].conv.in_channels)
    kinds = {"model": (GaussianDiffusion, "l2"), "value": (ValueDiffusion, "value_l2")}
    for name, net in nets.items():
        write(net, weights(inputs, name, read(net)))
        kind, loss = kinds[name]
        nets[name] = kind(
            net, SETTINGS["horizon"], OBS, ACTION, SETTINGS["diffusion_steps"], loss, clip,
            predict_epsilon=False, action_weight=SETTINGS["action_weight"],
        )  # fmt: skip
    return nets


def trained(inputs, name):
    """Three steps of their Trainer: losses, gradients, weights and their averages."""
    import torch
    from diffuser.utils import training

    diffusion, noise = networks(inputs)[name], unflatten(inputs, f"noise/{name}")
    half = SETTINGS["batch_size"] // 2
    halves = [slice(0, half), slice(half, None)]
    batches, times, noises = [], [], []
    for i in range(UPDATES):
        for rows in halves:
            x = torch.tensor(inputs["x"][i, rows])
            batch = x, {0: x[:, 0, ACTION:].clone()}
            value = torch.tensor(inputs["returns_to_go"][i, rows, None])
            batches.append(batch if name == "model" else (*batch, value))
            times.append(torch.tensor(noise["t"][i, rows]).long())
            noises.append(torch.tensor(noise["noise"][i, rows]))
    times, noises, losses, gradients = iter(times), iter(noises), [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.Trainer(
            diffusion, [0], None, ema_decay=SETTINGS["ema"], train_lr=SETTINGS["lr"],
            gradient_accumulate_every=2, step_start_ema=0, update_ema_every=1, sample_freq=0,
            results_folder=folder,
        )  # fmt: skip
        trainer.dataloader = iter(batches)
        loss, step = diffusion.loss, trainer.optimizer.step

        def keep_loss(*batch):
            value, info = loss(*batch)
            losses.append(value.item())
            return value, info

        def keep_gradient():
            gradients.append(summary(read(diffusion.model, grad=True)))
            step()

        diffusion.loss, trainer.optimizer.step = keep_loss, keep_gradient
        with (
            mock.patch("torch.randint", lambda *_, **__: next(times)),
            mock.patch("torch.randn_like", lambda _: next(noises)),
            mock.patch.object(training, "batch_to_device", lambda batch: batch),
        ):
            trainer.train(UPDATES)
    return {
        f"{name} loss": np.reshape(losses, (UPDATES, 2)).mean(1),
        f"{name} gradient": np.concatenate(gradients),
        f"{name} after": summary(read(diffusion.model)),
        f"{name} average": summary(read(trainer.ema_model.model)),
    }


def planned(inputs):
    """Whole plans, guided, or to a goal, where what the network predicts is clipped."""
    import torch
    from diffuser.sampling import ValueGuide, n_step_guided_p_sample

    given = tree_map(torch.tensor, unflatten(inputs, "plan"))
    guide = ValueGuide(networks(inputs)["value"].model)
    scale = SETTINGS["guide_scale"] * SETTINGS["return_scale"]
    guided = dict(
        sample_fn=n_step_guided_p_sample, guide=guide, scale=scale,
        t_stopgrad=SETTINGS["guide_stop"], n_guide_steps=SETTINGS["guide_steps"],
    )  # fmt: skip
    out, last = {}, SETTINGS["horizon"] - 1
    for name, known, how in [
        ("guided plan", {0: given["first"]}, guided),
        ("plan to a goal", {0: given["first"], last: given["last"]}, {}),
    ]:
        steps = iter(given["steps"].clone())
        with (
            mock.patch("torch.randn", lambda *_, **__: given["start"].clone()),
            mock.patch("torch.randn_like", lambda _, steps=steps: next(steps)),
        ):
            diffusion = networks(inputs, clip=not how)["model"]
            sample = diffusion.conditional_sample(known, verbose=False, return_chain=True, **how)
        out[name] = sample.chains[:, -1].numpy()  # the rest of it is sorted by value
    x, t = torch.tensor(inputs["x"][0]), torch.tensor(inputs["noise/model/t"][0]).long()
    out["guide's gradient"] = guide.gradients(x.clone(), None, t)[1].numpy()
    with torch.no_grad():
        mean, _, _ = networks(inputs)["model"].p_mean_variance(x, None, t)
    return out | {"step's mean": mean.numpy()}


def scheduled(inputs):
    """The peer's schedule at every time: four noised steps, and the posterior."""
    import torch

    diffusion = networks(inputs)["model"]
    x, noise = (torch.tensor(z) for z in one(inputs))
    t = torch.arange(SETTINGS["diffusion_steps"])
    mean, variance, _ = diffusion.q_posterior(x, noise, t)
    noised = diffusion.q_sample(x, t, noise)
    out = {"noised": noised, "posterior's mean": mean, "posterior's variance": variance * noise}
    return {name: x.numpy() for name, x in out.items()}


def transposed(inputs):
    """What their U-Net predicts with its own upsampling."""
    import torch
    from diffuser.models import TemporalUnet

    sizes = SETTINGS["horizon"], ACTION + OBS, OBS, SETTINGS["width"]
    net = TemporalUnet(*sizes, MULTIPLES["model"])
    params = read(networks(inputs)["model"].model)
    for name, layer in layers(net):
        if isinstance(layer, torch.nn.ConvTranspose1d):
            kernel = params[f"{name}/kernel"]  # (2 out, 3 in)
            taps = kernel.reshape(2, -1, 3, kernel.shape[1] // 3)
            before, now, after = taps.transpose(2, 0, 3, 1)  # (3, 2, in, out)
            taps = after[1], now[0], now[1], before[0]  # of both steps
            own = np.stack(taps, -1)  # (in, out, 4)
            params[f"{name}/kernel"] = own.swapaxes(1, 2).reshape(len(own), -1)
    write(net, params)
    t = torch.tensor(inputs["noise/model/t"][0]).float()
    with torch.no_grad():
        prediction = net(torch.tensor(inputs["x"][0]), None, t)
    return {"prediction with their upsampling": prediction.numpy()}


def theirs(inputs, checkout):
    for name in (
        "environments",
        *(f"utils.{x}" for x in ("rendering", "setup", "config", "colab")),
    ):
        sys.modules[f"diffuser.{name}"] = ModuleType(name)
    for name in ("datasets", "datasets.preprocessing"):
        sys.modules[f"diffuser.{name}"] = mock.MagicMock()
    sys.path.insert(0, checkout)
    return {
        **scheduled(inputs),
        **trained(inputs, "model"),
        **trained(inputs, "value"),
        **planned(inputs),
        **transposed(inputs),
    }


# --- Ours ---


@functools.cache
def programs():
    """What `ours` runs, compiled once."""
    import jax

    from algorithms import diffuser

    cfg, to_goal = config(), config(goal=True)
    nets = structures()

    def plan(state, known, key, cfg):
        return diffuser.plan(state, known, key, cfg)

    def gradient(params, x, t):
        return jax.grad(lambda x: nets["value"].apply_fn(params, x, t).sum())(x)

    return SimpleNamespace(
        update=jit(functools.partial(diffuser.update, cfg=cfg)),
        plan=jit(functools.partial(plan, cfg=cfg)),
        plan_to_goal=jit(functools.partial(plan, cfg=to_goal)),
        gradient=jit(gradient),
        predict=jit(nets["model"].apply_fn),
    )


def our_state(params):
    import jax.numpy as jnp

    from algorithms import diffuser

    params = {name: tree_map(jnp.asarray, nested(x)) for name, x in params.items()}
    nets = {
        name: net.create(apply_fn=net.apply_fn, params=params[name], tx=net.tx)
        for name, net in structures().items()
    }
    none = jnp.zeros(OBS), jnp.ones(OBS), jnp.zeros(ACTION), jnp.ones(ACTION)
    return diffuser.State(nets["model"], nets["value"], params, *none)


def ours(inputs):
    import jax
    import jax.numpy as jnp

    from algorithms import diffuser

    run, params = programs(), {}
    for name, net in structures().items():
        like = flatten(tree_map(lambda x: np.zeros(x.shape), net.params["params"]))
        params[name] = weights(inputs, name, like)
    start = state = our_state(params)
    seen = {}
    for i, key in enumerate(keys(1, UPDATES)):
        x, returns_to_go = jnp.asarray(inputs["x"][i]), jnp.asarray(inputs["returns_to_go"][i])
        window = diffuser.Window(x, jnp.ones(x.shape[:2], bool), returns_to_go)
        state, info = run.update(state, window, key)
        for name in MULTIPLES:
            kept, _ = jax.device_get(getattr(state, name).opt_state)
            found = {"loss": info[f"{name}_loss"], "gradient": summary(kept["params"])}
            for k, v in found.items():
                seen.setdefault(f"{name} {k}", []).append(v)
    out = {name: np.array(x) for name, x in seen.items()}
    for name in MULTIPLES:
        after, average = jax.device_get((getattr(state, name).params, state.ema[name]))
        out[f"{name} after"] = summary(after["params"])
        out[f"{name} average"] = summary(average["params"])

    steps = diffuser.denoising(SETTINGS["diffusion_steps"])
    rising = {name: x[::-1, None, None] for name, x in steps._asdict().items()}
    (x, noise), abar = one(inputs), diffuser.schedule(SETTINGS["diffusion_steps"])[:, None, None]
    out["noised"] = np.sqrt(abar) * x + np.sqrt(1 - abar) * noise
    out["posterior's mean"] = rising["x0"] * x + rising["xt"] * noise
    out["posterior's variance"] = rising["variance"] * noise

    given = unflatten(inputs, "plan")
    out["guided plan"] = run.plan(start, (given["first"], None), keys(2))
    out["plan to a goal"] = run.plan_to_goal(start, (given["first"], given["last"]), keys(2))
    x, t = inputs["x"][0], inputs["noise/model/t"][0]
    out["guide's gradient"] = run.gradient(start.ema["value"], x, jnp.float32(t))
    x0 = run.predict(start.ema["model"], x, jnp.float32(t))
    out["step's mean"] = rising["x0"][t] * x0 + rising["xt"][t] * x
    out["prediction with their upsampling"] = run.predict(
        two_taps(params["model"]), x, jnp.float32(t)
    )
    return out


def nested(flat):
    """Parameters in the nesting of Flax."""
    return unflatten({f"all/params/{name}": x for name, x in flat.items()}, "all")


def two_taps(flat):
    """The U-Net's weights without the taps that a transposed convolution does not have."""
    levels, flat = len(MULTIPLES["model"]), dict(flat)
    for i in range(levels - 1, 2 * (levels - 1)):
        name = f"Conv_{i}/Dense_0"
        kernel, bias = flat[f"{name}/kernel"], flat[f"{name}/bias"]
        taps = kernel.reshape(2, -1, 3, kernel.shape[1] // 3).copy()
        taps[0, :, 2] = taps[1, :, 0] = 0  # the even step does not look ahead, nor the odd one back
        flat[f"{name}/kernel"] = taps.reshape(kernel.shape)
        flat[f"{name}/bias"] = np.tile(bias[: len(bias) // 2], 2)
    return nested(flat)
