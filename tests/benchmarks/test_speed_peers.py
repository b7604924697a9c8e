"""The timer of benchmarks/speed_peers.py; the peers themselves are not here."""

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.speed import peers as speed_peers


def test_median_of_chunks_after_two(monkeypatch):
    """Chunks of 10 updates take 9, 3, 1, 4, 2, 9, ... seconds: 3 + 1 of excess, then the median."""
    chunks, now, calls = iter([9, 3, 1, 4, 2, 9]), [0.0], []
    monkeypatch.setattr(speed_peers.time, "perf_counter", lambda: now[0])

    def wait():
        now[0] += next(chunks)

    row = peers.Row("what", {}, 10, peers.repeat(lambda: calls.append(0), 10, wait))
    seconds = speed_peers.measure(row.loop, 6.5)
    np.testing.assert_array_equal(seconds, [9, 3, 1, 4, 2])
    assert len(calls) == 50
    new = speed_peers.result(row, seconds, compiles=True)
    assert (new["ms_per_update"], new["ms_min"], new["chunks"]) == (200, 100, 3)
    assert new["compile_seconds"] == 9 + 3 - 2 * 2
    assert speed_peers.result(row, seconds, compiles=False)["compile_seconds"] == 0


def test_a_tick_every_few_updates():
    ticks = []
    update = peers.every(3, lambda: ticks.append(0))
    for k in range(1, 8):
        update({"loss": 0.0}, step=k)
        assert len(ticks) == k // 3


@pytest.mark.parametrize("argv", [["nobody"], ["corl", "--only", "ppo"]])
def test_unknown_names_are_refused(argv, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speed_peers.py", *argv, "--checkout", "."])
    with pytest.raises(SystemExit):
        speed_peers.main()
    assert argv[-1] in capsys.readouterr().err


def test_data_has_no_step_across_episodes():
    data = peers.World().get_dataset()
    obs, next_obs = data["observations"], data["next_observations"]
    follows = (next_obs[:-1] == obs[1:]).all(-1)
    np.testing.assert_array_equal(follows, ~data["timeouts"][:-1])
