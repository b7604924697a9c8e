"""CQL of young-geng, PyTorch: the calls inside its training loop."""

import sys

from benchmarks.peers import ACTION, BATCH, OBS, TWO, Row, repeat, without

PEER = dict(
    name="young-geng/CQL",
    repository="https://github.com/young-geng/CQL",
    packages=("torch",),
)


def cql(checkout, world):
    without("absl", "absl.flags", "ml_collections.config_flags")
    sys.path.insert(0, checkout)
    from SimpleSAC import conservative_sac, model, replay_buffer

    policy = model.TanhGaussianPolicy(OBS, ACTION)
    critics = [model.FullyConnectedQFunction(OBS, ACTION) for _ in range(4)]
    settings = dict(target_entropy=-float(ACTION))
    config = conservative_sac.ConservativeSAC.get_default_config(settings)
    agent = conservative_sac.ConservativeSAC(config, policy, *critics)
    data = replay_buffer.get_d4rl_dataset(world)

    def step():
        batch = replay_buffer.subsample_batch(data, 256)
        agent.train(replay_buffer.batch_to_torch(batch, "cpu"))

    yield Row("cql", dict(widths=TWO, critics=2, actions=30, **BATCH), 10, repeat(step, 10))


CASES = {"cql": cql}
