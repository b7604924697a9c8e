"""Scores of other implementations on our data, with the same rows, updates and evaluation.

    python -m benchmarks.parity.scores data --env stillwater/halfcheetah/medium-v0 --file data.npz
    python -m benchmarks.parity.scores iql --checkout DIR --file data.npz --updates 100000

The first command runs in our environment and writes the rows of a dataset. The second, for `iql`,
`awac`, `cql` or `dt`, runs in the peer's environment (see PEERS), trains the peer and writes
benchmarks/results/peers/NAME.json. benchmarks/report.py compares it with our runs of as many
updates.

Only the peer's learning code is run: agents, networks, losses and samplers, with its own settings
for the D4RL dataset of that name. Its rows are ours, which include those at time limits. The
evaluation is ours too: ten episodes, environment seeds 0 to 9, the mean action, Gymnasium's v5.
Modules that a peer imports only for logging or D4RL are replaced by empty ones.
"""

import argparse
import importlib.util
import json
import random
import sys
import time
import types
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PEERS = {  # algorithm: (name, repository, commit, environment)
    "iql": (
        "authors' code",
        "https://github.com/ikostrikov/implicit_q_learning",
        "09d700248117881a75cb21f0adb95c6c8a694cb2",
        "jax==0.4.13 jaxlib==0.4.13 flax==0.7.2 optax==0.1.7 tensorflow-probability==0.21.0",
    ),
    "awac": (
        "CORL",
        "https://github.com/tinkoff-ai/CORL",
        "6afec90484bbf47dee05fdf525e26a3ebe028e9b",
        "torch==2.13.0",
    ),
    "cql": (
        "young-geng/CQL",
        "https://github.com/young-geng/CQL",
        "21efac46faadef7d24ecf03a8091ab9cc3a613fd",
        "torch==2.13.0 ml_collections",
    ),
    "dt": (
        "CORL",
        "https://github.com/tinkoff-ai/CORL",
        "6afec90484bbf47dee05fdf525e26a3ebe028e9b",
        "torch==2.13.0",
    ),
}


def without(*names):
    """Replaces these modules by empty ones."""
    sys.modules.update({name: MagicMock() for name in names})


def module(checkout, path):
    """A single file of a checkout as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(checkout) / path)
    sys.modules[spec.name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# --- Peers: each yields, after 1/10, 2/10, ... of the updates, an act(obs, reward, t) -> action ---


def iql(checkout, data, updates, seed):
    import flax
    import jax

    jax.tree_multimap = jax.tree_util.tree_map  # as it was called then
    flax.config.update("flax_return_frozendict", True)  # as it was then
    without("gym", "d4rl")
    sys.path.insert(0, checkout)
    import dataset_utils
    from configs.mujoco_config import get_config
    from learner import Learner

    returns = np.add.reduceat(data["reward"], data["start"])
    rows = dataset_utils.Dataset(
        data["obs"],
        data["action"].clip(-1 + 1e-5, 1 - 1e-5),
        data["reward"] * 1000 / np.ptp(returns),
        1 - data["done"],
        np.zeros_like(data["done"]),  # where episodes end: only for splitting them
        data["next_obs"],
        len(data["done"]),
    )
    agent = Learner(
        seed, data["obs"][:1], data["action"][:1], max_steps=updates, **dict(get_config())
    )
    for _ in range(10):
        for _ in range(updates // 10):
            agent.update(rows.sample(256))
        yield lambda obs, reward, t: agent.sample_actions(obs, temperature=0.0)


def awac(checkout, data, updates, seed):
    import torch

    without("gym", "d4rl", "pyrallis", "wandb")
    corl = module(checkout, "algorithms/offline/awac.py")
    torch.manual_seed(seed)
    mean, std = corl.compute_mean_std(data["obs"], eps=1e-3)
    rows = corl.ReplayBuffer(data["obs"].shape[1], data["action"].shape[1], len(data["done"]))
    rows.load_d4rl_dataset({
        "observations": corl.normalize_states(data["obs"], mean, std),
        "actions": data["action"],
        "rewards": data["reward"],
        "next_observations": corl.normalize_states(data["next_obs"], mean, std),
        "terminals": data["done"],
    })  # fmt: skip
    sizes = data["obs"].shape[1], data["action"].shape[1], 256
    nets = corl.Actor(*sizes), corl.Critic(*sizes), corl.Critic(*sizes)
    learners = [x for net in nets for x in (net, torch.optim.Adam(net.parameters(), lr=3e-4))]
    agent = corl.AdvantageWeightedActorCritic(*learners, awac_lambda=0.3333)

    def act(obs, reward, t):
        nets[0].eval()
        return nets[0].act((obs - mean) / std, "cpu")

    for _ in range(10):
        nets[0].train()
        for _ in range(updates // 10):
            agent.update(rows.sample(256))
        with torch.no_grad():
            yield act


def cql(checkout, data, updates, seed):
    import torch

    without("gym", "d4rl", "wandb", "absl", "absl.flags", "ml_collections.config_flags")
    sys.path.insert(0, checkout)
    from SimpleSAC.conservative_sac import ConservativeSAC
    from SimpleSAC.model import FullyConnectedQFunction, SamplerPolicy, TanhGaussianPolicy

    torch.manual_seed(seed)
    sizes = data["obs"].shape[1], data["action"].shape[1]
    policy = TanhGaussianPolicy(*sizes)
    critics = [FullyConnectedQFunction(*sizes) for _ in range(4)]
    for target, critic in zip(critics[2:], critics[:2], strict=True):
        target.load_state_dict(critic.state_dict())
    settings = ConservativeSAC.get_default_config({"target_entropy": float(-sizes[1])})
    agent = ConservativeSAC(settings, policy, *critics)
    names = dict(observations="obs", rewards="reward", next_observations="next_obs", dones="done")
    rows = {theirs: torch.tensor(data[name]) for theirs, name in names.items()}
    rows["actions"] = torch.tensor(data["action"].clip(-0.999, 0.999))
    greedy, rng = SamplerPolicy(policy, "cpu"), np.random.default_rng(seed)
    for _ in range(10):
        for _ in range(updates // 10):
            index = torch.tensor(rng.integers(len(data["done"]), size=256))
            agent.train({name: x[index] for name, x in rows.items()})
        yield lambda obs, reward, t: greedy(obs[None], deterministic=True)[0]


def dt(checkout, data, updates, seed):
    import torch

    without("gym", "d4rl", "pyrallis", "wandb")
    corl = module(checkout, "algorithms/offline/dt.py")
    torch.manual_seed(seed)
    end = data["start"] + data["length"] - 1
    last = np.zeros_like(data["done"], bool)
    last[end] = True
    names = dict(observations="obs", actions="action", rewards="reward", terminals="done")
    d4rl = {theirs: data[name] for theirs, name in names.items()} | {"timeouts": last}
    corl.gym.make = lambda name: types.SimpleNamespace(get_dataset=lambda: d4rl)
    cfg = corl.TrainConfig(warmup_steps=min(1000, updates // 5))
    rows = corl.SequenceDataset("", seq_len=cfg.seq_len, reward_scale=cfg.reward_scale)
    batches = iter(torch.utils.data.DataLoader(rows, batch_size=cfg.batch_size))
    model = corl.DecisionTransformer(
        data["obs"].shape[1],
        data["action"].shape[1],
        cfg.seq_len,
        cfg.episode_len,
        cfg.embedding_dim,
        cfg.num_layers,
        cfg.num_heads,
        cfg.attention_dropout,
        cfg.residual_dropout,
        cfg.embedding_dropout,
    )
    adam = torch.optim.AdamW(
        model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, betas=cfg.betas
    )
    warm = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: min((t + 1) / cfg.warmup_steps, 1))
    target = np.add.reduceat(data["reward"], data["start"]).max() * cfg.reward_scale
    past = {}

    def act(obs, reward, t):
        model.eval()
        if t == 0:
            past.update(obs=[], action=[], returns_to_go=[target])
        else:
            past["returns_to_go"].append(past["returns_to_go"][-1] - reward * cfg.reward_scale)
        past["obs"].append(((obs - rows.state_mean) / rows.state_std)[0])
        now = past["action"] + [np.zeros(data["action"].shape[1])]
        recent = [np.array(x[-cfg.seq_len :]) for x in (past["obs"], now, past["returns_to_go"])]
        times = torch.arange(max(0, t + 1 - cfg.seq_len), t + 1)[None]
        action = model(*(torch.tensor(x, dtype=torch.float32)[None] for x in recent), times)
        past["action"].append(action[0, -1].numpy())
        return past["action"][-1]

    for _ in range(10):
        model.train()
        for _ in range(updates // 10):
            states, actions, returns_to_go, times, mask = next(batches)
            states, returns_to_go = states.float(), returns_to_go.float()
            padding = ~mask.to(torch.bool)
            guess = model(states, actions, returns_to_go, times, padding)
            loss = ((guess - actions) ** 2 * mask.unsqueeze(-1)).mean()
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
            adam.step()
            warm.step()
        with torch.no_grad():
            yield act


# --- Ours: data, evaluation, table ---


def evaluate(act, env, episodes=10):
    """Undiscounted returns of whole episodes, environment seeds 0, 1, ..."""
    returns = []
    for seed in range(episodes):
        obs, reward, total = env.reset(seed=seed)[0], 0.0, 0.0
        for t in range(10**6):
            action = np.asarray(act(np.float32(obs), reward, t)).clip(-1, 1)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += reward
            if terminated or truncated:
                break
        returns.append(float(total))
    return returns


def write_data(env, file):
    from common import datasets

    data = datasets.load(env)
    names = ("obs", "action", "reward", "next_obs", "done", "start", "length")
    arrays = {name: getattr(data, name) for name in names}
    facts = dict(env_id=data.env_id, name=data.name, sha256=data.provenance["sha256"])
    facts |= dict(ref=[data.ref_min, data.ref_max])
    np.savez(file, **arrays, facts=json.dumps(facts))


def train(algorithm, checkout, file, updates, seed, out):
    import gymnasium

    data = dict(np.load(file))
    facts = json.loads(str(data.pop("facts")))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, what they draw from
    env, curve, begin = gymnasium.make(facts["env_id"]), {}, time.time()
    peer = globals()[algorithm](checkout, data, updates, seed)
    for k, act in enumerate(peer, 1):
        curve[k * updates // 10] = evaluate(act, env)
        low, high = facts["ref"]
        score = 100 * (np.mean(curve[k * updates // 10]) - low) / (high - low)
        print(f"{k * updates // 10:,} updates: score {score:.1f}, {time.time() - begin:.0f} s")
    peer = dict(zip(("name", "repository", "commit", "environment"), PEERS[algorithm], strict=True))
    result = {"algorithm": algorithm, "peer": peer, "data": facts, "updates": updates}
    result |= {"seed": seed, "returns": curve}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    parts = algorithm, facts["name"].replace("/", "-"), updates, f"s{seed}"
    name = "-".join(map(str, parts)) + ".json"
    (folder / name).write_text(json.dumps(result, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["data", *PEERS])
    parser.add_argument("--env", default="stillwater/halfcheetah/medium-v0")
    parser.add_argument("--file", default="data.npz", help="file with the rows of a dataset")
    parser.add_argument("--checkout", help="folder with the peer's repository")
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/peers"))
    args = parser.parse_args()
    if args.what == "data":
        write_data(args.env, args.file)
    else:
        train(args.what, args.checkout, args.file, args.updates, args.seed, args.out)


if __name__ == "__main__":
    main()
