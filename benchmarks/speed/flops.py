"""The necessary matrix products of an update, counted by hand from the papers' equations.

    total(iql(cfg, 17, 6))  # FLOPs of one update of IQL with 17 observations and 6 actions

A product is (rows, inner, columns); most functions return {product: how many}. Counted are the
forward pass of each network, once for every input that a loss needs, and the gradients that some
parameter learns from. Not counted are activations, optimisers, random numbers, gathers, and
whatever an implementation computes twice or does not use. tests/benchmarks/test_speed.py compares
the sums with XLA's count for a compiled update.
"""

from collections import Counter


def total(products):
    """FLOPs of products {(m, k, n): count}, with 2 m k n for each."""
    return sum(2 * m * k * n * count for (m, k, n), count in products.items())


def times(count, products):
    """`count` times the products."""
    return Counter({shape: count * n for shape, n in products.items()})


def mlp(rows, *sizes):
    """The layers [(rows, inputs, outputs)] of a network with these sizes."""
    return [(rows, i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True)]


def forward(layers):
    """The forward pass."""
    return Counter(layers)


def to_inputs(layers):
    """The forward pass and the gradient of the inputs only."""
    return Counter(layers) + Counter((rows, o, i) for rows, i, o in layers)


def learn(layers, inputs=False):
    """The forward pass and the gradients of the weights.

    inputs: also the gradient of the network's inputs.
    """
    weights = Counter((i, rows, o) for rows, i, o in layers)
    through = Counter((rows, o, i) for rows, i, o in layers[0 if inputs else 1 :])
    return Counter(layers) + weights + through


# --- Actors and critics ---


def bc(cfg, obs, action):
    return learn(mlp(cfg.batch_size, obs, *cfg.widths, action))


def discrete_cql(cfg, obs, action):
    """With the penalty of CQL(H), which needs no further network."""
    q = mlp(cfg.batch_size, obs, *cfg.widths, action * max(cfg.num_quantiles, 1))
    return learn(q) + times(1 + cfg.double, forward(q))  # at s; the target's at s', and Q's own


def discrete_bcq(cfg, obs, action):
    net = mlp(cfg.batch_size, obs, *cfg.widths, action)  # Q, or the imitation
    return times(2, learn(net)) + times(3, forward(net))  # at s; both and the target's at s'


def rvs(cfg, obs, action):
    return learn(mlp(cfg.batch_size, obs + 1, *cfg.widths, action))


def awr(cfg, obs, action, rows):
    """rows: of the dataset. V of all of them gives returns, then weights, in each iteration."""
    v, _, pi = (mlp(cfg.batch_size, *x) for x in widths(cfg, obs, action, action))
    everywhere = forward(mlp(rows, *widths(cfg, obs, action, action)[0]))
    iteration = times(cfg.critic_steps, learn(v)) + times(2, everywhere)
    return learn(pi) + times(1 / cfg.actor_steps, iteration)


def iql(cfg, obs, action):
    b = cfg.batch_size
    v, q, pi = (mlp(b, *x) for x in widths(cfg, obs, action, action))
    values = forward(v) + learn(v) + forward(v)  # V(s'), L_V, the new V(s)
    return values + times(2, forward(q) + learn(q)) + learn(pi)  # the targets', L_Q


def fql(cfg, obs, action):
    b, size = cfg.batch_size, cfg.chunk * action
    v = mlp(b, obs + size + 1, *cfg.widths, size)
    pi, q = (mlp(b, obs + size, *cfg.widths, out) for out in (size, 1))
    evaluation = forward(pi) + times(2, forward(q) + learn(q))  # at s'; the targets', L_Q
    improvement = times(cfg.flow_steps, forward(v)) + learn(pi) + times(2, to_inputs(q))
    return learn(v) + evaluation + improvement


def awac(cfg, obs, action):
    b = cfg.batch_size
    _, q, pi = (mlp(b, *x) for x in widths(cfg, obs, action, action))
    _, own, _ = (mlp(b * cfg.num_samples, *x) for x in widths(cfg, obs, action, action))
    critics = forward(q) + learn(q) + forward(q) + forward(own)  # target's, L_Q, new Q(s, a), V(s)
    return times(2, critics) + forward(pi) + learn(pi)  # at s'; at s, which serves V(s), too


def sac(cfg, obs, action, critics=2):
    _, q, pi = (mlp(cfg.batch_size, *x) for x in widths(cfg, obs, action, 2 * action))
    each = to_inputs(q) + forward(q) + learn(q)  # for the policy; the target's; L_Q
    return learn(pi) + forward(pi) + times(critics, each)  # at s; at s'


def edac(cfg, obs, action):
    """SAC, and the gradients of Q with respect to actions, by which its weights learn, too."""
    layers = mlp(cfg.batch_size, obs + action, *cfg.widths, 1)
    slope = Counter((rows, o, i) for rows, i, o in layers)  # its forward pass serves L_Q, too
    weights = Counter((o, rows, i) for rows, i, o in layers)
    through = Counter(layers[:-1])  # the last layer's input is the constant 1
    similarity = slope + weights + through if cfg.eta else Counter()
    return sac(cfg, obs, action, cfg.num_critics) + times(cfg.num_critics, similarity)


def td3_bc(cfg, obs, action, critics=1):
    """An update of the critics, and its part of a round's update of the policy.

    critics: how many the policy climbs.
    """
    _, q, pi = (mlp(cfg.batch_size, *x) for x in widths(cfg, obs, action, action))
    improvement = learn(pi) + times(critics, to_inputs(q))
    evaluation = forward(pi) + times(2, forward(q) + learn(q))  # at s'; the targets', L_Q
    return evaluation + times(1 / cfg.policy_delay, improvement)


def rebrac(cfg, obs, action):
    return td3_bc(cfg, obs, action, critics=2)


def vae(cfg, obs, action, rows):
    """The layers of encoder and decoder of BCQ and BEAR."""
    encoder = mlp(rows, obs + action, *cfg.vae_widths, 4 * action)
    return encoder, mlp(rows, obs + 2 * action, *cfg.vae_widths, action)


def imitation(cfg, obs, action):
    """An update of the VAE."""
    encoder, decoder = vae(cfg, obs, action, cfg.batch_size)
    return learn(encoder) + learn(decoder, inputs=True)


def bcq(cfg, obs, action):
    b, many = cfg.batch_size, cfg.batch_size * cfg.num_samples
    q, q_next = (mlp(rows, obs + action, *cfg.widths, 1) for rows in (b, many))
    xi, xi_next = (mlp(rows, obs + action, *cfg.widths, action) for rows in (b, many))
    (_, decoded), (_, decoded_next) = (vae(cfg, obs, action, rows) for rows in (b, many))
    evaluation = forward(decoded_next) + forward(xi_next) + times(2, forward(q_next) + learn(q))
    improvement = forward(decoded) + learn(xi) + to_inputs(q)
    return imitation(cfg, obs, action) + evaluation + improvement


def bear(cfg, obs, action):
    b, matched = cfg.batch_size, cfg.batch_size * cfg.num_matches
    pi = mlp(b, obs, *cfg.widths, 2 * action)
    q, q_next, q_matched = (
        mlp(rows, obs + action, *cfg.widths, 1) for rows in (b, b * cfg.num_samples, matched)
    )
    evaluation = forward(pi) + times(2, forward(q_next) + learn(q))  # at s'; the targets', L_Q
    _, decoded = vae(cfg, obs, action, matched)
    improvement = forward(decoded) + learn(pi) + times(2, to_inputs(q_matched))
    return imitation(cfg, obs, action) + evaluation + improvement


def brac(cfg, obs, action):
    """With the divergence KL in the value; the behaviour is cloned already."""
    _, q, _ = (mlp(cfg.batch_size, *x) for x in widths(cfg, obs, action, 1))
    pi = mlp(cfg.batch_size, obs, *cfg.actor_widths, 2 * action)
    evaluation = times(2, forward(pi)) + times(2, forward(q) + learn(q))  # pi, behaviour at s'
    return evaluation + forward(pi) + learn(pi) + times(2, to_inputs(q))  # the same at s


def widths(cfg, obs, action, out):
    """Layer sizes of V, Q and the policy, which has `out` outputs."""
    return (obs, *cfg.widths, 1), (obs + action, *cfg.widths, 1), (obs, *cfg.widths, out)


def conservative(cfg, obs, action, rows):
    """CQL and COMBO. rows: number of states in the penalty."""
    b, n = cfg.batch_size, cfg.num_actions
    _, q, pi = (mlp(b, *x) for x in widths(cfg, obs, action, 2 * action))
    _, penalised, _ = (mlp(b + 3 * n * rows, *x) for x in widths(cfg, obs, action, 2 * action))
    improvement = learn(pi) + times(2, to_inputs(q))
    return improvement + forward(pi) + times(2, forward(q) + learn(penalised))  # at s'; the targets


def cql(cfg, obs, action):
    return conservative(cfg, obs, action, cfg.batch_size)


def cal_ql(cfg, obs, action):
    """CQL with another network for Q; the target takes the best of several next actions."""
    b, n = cfg.batch_size, cfg.num_actions
    pi = mlp(b, obs, *cfg.widths, 2 * action)
    q, best, penalised = (
        mlp(rows, obs + action, *cfg.critic_widths, 1) for rows in (b, n * b, b + 3 * n * b)
    )
    improvement = learn(pi) + times(2, to_inputs(q))
    return improvement + forward(pi) + times(2, forward(best) + learn(penalised))


def rlpd(cfg, obs, action):
    _, q, pi = (mlp(cfg.batch_size, *x) for x in widths(cfg, obs, action, 2 * action))
    step = forward(pi) + times(cfg.min_critics, forward(q)) + times(cfg.num_critics, learn(q))
    return times(cfg.utd, step) + learn(pi) + times(cfg.num_critics, to_inputs(q))


def combo(cfg, obs, action):
    real = int(cfg.real_fraction * cfg.batch_size)
    rows = cfg.batch_size - real if cfg.rho == "model" else cfg.batch_size
    return conservative(cfg, obs, action, rows)


def mopo(cfg, obs, action):
    """The updates are soft actor-critic's."""
    return sac(cfg, obs, action)


def mobile(cfg, obs, action):
    """Soft actor-critic, and the elites' samples, the policy and the targets there."""
    rows = cfg.batch_size - int(cfg.real_fraction * cfg.batch_size)  # penalised ones
    rows *= cfg.num_samples
    elite = mlp(rows, obs + action, *cfg.model_widths, 2 * (obs + 1))
    _, q, pi = (mlp(rows * cfg.num_elites, *x) for x in widths(cfg, obs, action, 2 * action))
    penalty = times(cfg.num_elites, forward(elite)) + forward(pi) + times(2, forward(q))
    return sac(cfg, obs, action) + penalty


# --- A model of the environment ---


def dynamics(cfg, obs, action):
    """One update of all members of the model."""
    member = mlp(cfg.batch_size, obs + action, *cfg.model_widths, 2 * (obs + 1))
    return times(cfg.num_members, learn(member))


def rollout(cfg, obs, action):
    """A rollout: for each row and step the policy and the one elite that is drawn."""
    policy = mlp(cfg.rollout_batch, obs, *cfg.widths, 2 * action)
    rows = cfg.rollout_batch // cfg.num_elites
    elite = mlp(rows, obs + action, *cfg.model_widths, 2 * (obs + 1))
    return times(cfg.horizon, forward(policy) + times(cfg.num_elites, forward(elite)))


# --- Sequences ---


def dt(cfg, obs, action):
    """Only the state tokens predict actions, so the last block has queries for them alone."""
    b, k, w, t = cfg.batch_size, cfg.context, cfg.width, 3 * cfg.context
    products, layers = Counter(), mlp(b * k, w, action)
    for block in range(cfg.layers):
        asking = k if block == cfg.layers - 1 else t
        layers += [(b * asking, w, w), (b * t, w, 2 * w)]  # queries; keys and values
        layers += mlp(b * asking, w, w) + mlp(b * asking, w, 4 * w, w)
        part, heads = w // cfg.heads, b * cfg.heads
        score = [(asking, part, t), (asking, t, part), (t, asking, part)]  # and its gradients
        value = [(asking, t, part), (asking, part, t), (t, asking, part)]
        products += times(heads, Counter(score + value))
    embed = (learn(mlp(b * k, size, w)) for size in (1, obs, action))
    return sum(embed, products + learn(layers, inputs=True))


def block(rows, length, inner, out, width):
    """The layers of Diffuser's residual block on `rows` plans."""
    past = [] if inner == out else mlp(rows * length, inner, out)
    convolutions = [(rows * length, 5 * inner, out), (rows * length, 5 * out, out)]
    return convolutions + mlp(rows, width, out) + past


def unet(cfg, rows, channels, conditions=0):
    """The layers of the denoising network, which `conditions` are told to."""
    w, length, inner = cfg.width, cfg.horizon, channels
    sizes = [w * m for m in cfg.multiples]
    layers = mlp(rows, w, 4 * w, w)
    if conditions:
        layers += mlp(rows, conditions, w, 4 * w, w)
    given = 2 * w if conditions else w
    for level, size in enumerate(sizes):
        if level:
            length //= 2
            layers += [(rows * length, 3 * inner, inner)]
        layers += block(rows, length, inner, size, given) + block(rows, length, size, size, given)
        inner = size
    layers += 2 * block(rows, length, inner, inner, given)
    for beside, size in zip(sizes[:0:-1], sizes[-2::-1], strict=True):
        layers += block(rows, length, inner + beside, size, given) + block(
            rows, length, size, size, given
        )
        layers += [(rows * length, 3 * size, 2 * size)]
        length, inner = 2 * length, size
    return layers + [(rows * length, 5 * inner, w), (rows * length, w, channels)]


def value_net(cfg, rows, channels):
    """The layers of the network that predicts the return."""
    w, length, inner = cfg.width, cfg.horizon, channels
    layers = mlp(rows, w, 4 * w, w)
    for size in (w * m for m in cfg.multiples):
        layers += block(rows, length, inner, size, w) + block(rows, length, size, size, w)
        length, inner = (length + 1) // 2, size
        layers += [(rows * length, 3 * size, size)]
    for size in (inner // 2, inner // 4):
        layers += block(rows, length, inner, size, w)
        length, inner = (length + 1) // 2, size
        layers += [(rows * length, 3 * size, size)]
    flat = length * inner
    return layers + mlp(rows, flat + w, flat // 2, 1)


def diffuser(cfg, obs, action):
    nets = [unet] if cfg.goal else [unet, value_net]
    return sum((learn(net(cfg, cfg.batch_size, obs + action)) for net in nets), Counter())


def decision_diffuser(cfg, obs, action):
    """The U-Net with a return as its condition, and the inverse dynamics."""
    pairs = cfg.batch_size * (cfg.horizon - 1)
    inverse = mlp(pairs, 2 * obs, *cfg.inverse_widths, action)
    return learn(unet(cfg, cfg.batch_size, obs, 1)) + learn(inverse)


def plan(cfg, obs, action):
    """A guided plan for one episode."""
    model, value = (net(cfg, cfg.samples, obs + action) for net in (unet, value_net))
    guided = max(cfg.diffusion_steps - cfg.guide_stop, 0) * cfg.guide_steps
    guide = times(guided, to_inputs(value)) + forward(value)
    return times(cfg.diffusion_steps, forward(model)) + guide
