"""The authors of Decision Transformer, PyTorch: their whole experiment."""

import os
import pickle
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.peers import DT, EPISODES, Row, every

PEER = dict(
    name="authors' Decision Transformer",
    repository="https://github.com/kzl/decision-transformer",
    packages=("torch", "transformers"),
)
SETTINGS = dict(
    env="halfcheetah", dataset="medium", model_type="dt", device="cpu", K=20, batch_size=64,
    embed_dim=128, n_layer=3, n_head=1, activation_function="relu", dropout=0.1,
    learning_rate=1e-4, weight_decay=1e-4, warmup_steps=10_000, num_eval_episodes=100,
    max_iters=10, num_steps_per_iter=10_000,
)  # fmt: skip


def dt(checkout, world):
    import transformers

    transformers.file_utils.add_code_sample_docstrings = lambda **_: lambda function: function
    transformers.GPT2Config.n_ctx = 1024  # its default then
    sys.path.insert(0, f"{checkout}/gym")
    import experiment

    columns = {k: np.split(x, EPISODES) for k, x in world.get_dataset().items()}
    episodes = [dict(zip(columns, x, strict=True)) for x in zip(*columns.values(), strict=True)]
    updates = 4

    def loop(tick):
        count = every(updates, tick)

        class Trainer(experiment.SequenceTrainer):
            def train_step(self):
                loss = super().train_step()
                count()
                return loss

        here = os.getcwd()
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(experiment, "SequenceTrainer", Trainer),
        ):
            os.chdir(folder)
            Path("data").mkdir()
            Path("data/halfcheetah-medium-v2.pkl").write_bytes(pickle.dumps(episodes))
            try:
                experiment.experiment("speed", SETTINGS)
            finally:
                os.chdir(here)

    yield Row("dt", DT, updates, loop)


CASES = {"dt": dt}
