"""PointMaze: the environment's form, the waypoint controller, and the data of its walk."""

import functools
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from benchmarks.collect import waypoints
from common import datasets, evaluation
from common.evaluation import environments as mazes

ROOT = Path(__file__).resolve().parents[2]

UMAZE, NAME = "PointMaze_UMaze-v3", "stillwater/pointmaze-umaze/waypoint-v0"

# D4RL's layouts, O free, # wall, G the goal; and the time limits of its maze2d.
LAYOUTS = {
    "UMaze": (300, "#####  #GOO#  ###O#  #OOO#  #####"),
    "Medium": (600, "########  #OO##OO#  #OO#OOO#  ##OOO###  #OO#OOO#  #O#OO#O#  #OOO#OG#  "
                    "########"),
    "Large": (800, "############  #OOOO#OOOOO#  #O##O#O#O#O#  #OOOOOO#OOO#  #O####O###O#  "
                   "#OO#O#OOOOO#  ##O#O#O#O###  #OO#OOO#OGO#  ############"),
}  # fmt: skip


def drawn(size):
    """(walls as rows of 0 and 1, (row, column) of the goal, time limit), from LAYOUTS."""
    limit, rows = LAYOUTS[size][0], LAYOUTS[size][1].split()
    goal = next((i, row.index("G")) for i, row in enumerate(rows) if "G" in row)
    return [[int(x == "#") for x in row] for row in rows], goal, limit


def middle(cell, walls):
    """x, y of a cell: the origin in the maze's middle, x along a row, y up against the rows."""
    return np.array([cell[1] + 0.5 - len(walls[0]) / 2, len(walls) / 2 - cell[0] - 0.5])


def plain(env_id):
    """gymnasium-robotics' own environment, with dictionaries as observations."""
    mazes.register(env_id)
    return gymnasium.make(env_id, disable_env_checker=True)


def to_goal(obs):
    """Straight to the goal in view, and there it stays; obs (..., 6)."""
    return np.clip(10 * (obs[..., 4:] - obs[..., :2]) - obs[..., 2:4], -1, 1)


# --- The environment ---


@pytest.mark.parametrize("dense", ["", "Dense"])
@pytest.mark.parametrize("size", LAYOUTS)
def test_flat_observations_and_the_goal_of_d4rl(size, dense):
    """Every start sees one goal, without noise, in the cell that D4RL's layout marks."""
    env_id = f"PointMaze_{size}{dense}-v3"
    env, theirs, (walls, goal, limit) = evaluation.make(env_id), plain(env_id), drawn(size)
    maze = env.unwrapped
    assert maze.maze.maze_map == walls and mazes.goal_cell(env_id) == goal
    assert env.spec.max_episode_steps == limit
    assert env.observation_space.shape == (6,) and env.action_space.shape == (2,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        want, _ = theirs.reset(seed=seed, options={"goal_cell": np.array(goal)})
        for action in np.random.default_rng(seed).uniform(-1, 1, (4, 2)).astype(np.float32):
            assert obs in env.observation_space  # float32
            np.testing.assert_array_equal(obs[:4], np.float32(want["observation"]))
            np.testing.assert_array_equal(obs[:2], np.float32(want["achieved_goal"]))
            np.testing.assert_array_equal(obs[4:], middle(goal, walls))
            obs, reward, *_ = env.step(action)
            want = theirs.step(action)[0]
            far = np.linalg.norm(want["achieved_goal"] - middle(goal, walls))
            assert reward == pytest.approx(np.exp(-far) if dense else float(far <= 0.45))
    site = maze.model.site_pos[maze.target_site_id]  # what a video shows
    np.testing.assert_array_equal(site[:2], middle(goal, walls))
    assert evaluation.inspect(env_id)[1:5:3] == (6, limit)


def test_starts_are_seeded_and_in_every_cell_but_the_goals():
    env, (walls, goal, _) = evaluation.make(UMAZE), drawn("UMaze")
    starts = [env.reset(seed=seed)[0] for seed in range(100)]
    np.testing.assert_array_equal(starts[7], env.reset(seed=7)[0])
    cells = {tuple(env.unwrapped.maze.cell_xy_to_rowcol(obs[:2])) for obs in starts}
    free = {(i, j) for i in range(5) for j in range(5) if not walls[i][j]}
    assert cells == free - {goal}
    off = [obs[:2] - middle(env.unwrapped.maze.cell_xy_to_rowcol(obs[:2]), walls) for obs in starts]
    assert 0.2 < np.abs(off).max() <= 0.2501
    assert not np.array(starts)[:, 2:4].any()  # at rest
    obs, _ = env.reset(seed=0, options={"reset_cell": np.array([3, 1])})
    assert np.abs(obs[:2] - middle((3, 1), walls)).max() <= 0.2501


def test_a_maze_without_a_chosen_goal_keeps_its_own():
    env = evaluation.make("PointMaze_Open-v3")
    assert mazes.goal_cell("PointMaze_Open-v3") is mazes.goal_cell("Hopper-v5") is None
    goals = [tuple(env.reset(seed=seed)[0][4:]) for seed in range(4)]
    assert len(set(goals)) == 4
    np.testing.assert_allclose(goals[3], env.unwrapped.goal, rtol=1e-6)
    obs, _ = env.reset(options={"goal_cell": np.array([2, 2])})
    assert np.abs(obs[4:] - env.unwrapped.maze.cell_rowcol_to_xy(np.array([2, 2]))).max() <= 0.2501


def test_only_d4rls_three_layouts_have_a_chosen_goal():
    """The other layouts of the same size mark where their goals may be."""
    for size in ("Open_Diverse_G", "Medium_Diverse_G", "Large_Diverse_GDense"):
        env_id = f"PointMaze_{size}-v3"
        env = evaluation.make(env_id)
        cells = {tuple(env.unwrapped.maze.cell_xy_to_rowcol(env.reset(seed=seed)[0][4:]))
                 for seed in range(20)}  # fmt: skip
        marked = np.argwhere(np.array(env.unwrapped.maze.maze_map) == "g").tolist()
        assert mazes.goal_cell(env_id) is None
        assert len(marked) >= len(cells) > 1 and cells <= {tuple(cell) for cell in marked}


@pytest.mark.parametrize("angle", [-0.4, 0.0, 0.6])
def test_the_goals_edge_is_at_45_centimetres(angle):
    """At rest on either side of it, off the walls: a step without force moves nothing."""
    envs = evaluation.make(UMAZE), evaluation.make("PointMaze_UMazeDense-v3")
    way = np.array([np.cos(angle), np.sin(angle)])
    for far in (0.0, 0.449, 0.451, 0.49):
        rewards = []
        for env in envs:
            env.reset(seed=0)
            env.unwrapped.point_env.set_state([-1, 1] + far * way, np.zeros(2))
            obs, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
            np.testing.assert_allclose(np.linalg.norm(obs[:2] - [-1, 1]), far, atol=1e-6)
            rewards.append(reward)
            assert not terminated and not truncated
        assert rewards == [far < 0.45, pytest.approx(np.exp(-far))]


def test_mazes_are_made_in_silence():
    """In a new process: their package greets whoever imports it first."""
    code = f"from common import evaluation; evaluation.make({UMAZE!r}).reset(seed=0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_returns_count_every_step_at_the_goal_to_the_time_limit():
    """Against the plain environment, asked for the same goal and scored by hand."""
    act = partial(evaluation.stateless(lambda state, obs: to_goal(obs)), None)
    returns = evaluation.evaluate(act, UMAZE, 1, 8, seed=3)[0]
    theirs, lengths = plain(UMAZE), []
    for j, found in enumerate(returns):
        seen, _ = theirs.reset(seed=3 + j, options={"goal_cell": np.array([1, 1])})
        total, steps, over = 0, 0, False
        while not over:
            obs = np.float32([*seen["observation"], -1, 1])
            seen, _, terminated, over, _ = theirs.step(to_goal(obs))
            total += np.hypot(*(seen["achieved_goal"] - [-1, 1])) <= 0.45
            steps += 1
            assert not terminated
        lengths.append(steps)
        assert found == total
    assert lengths == [300] * 8
    assert 200 < returns.max() < 300 and returns.min() == 0  # 0: behind the wall
    obs = np.float32(np.random.default_rng(0).normal(size=(5, 6)))
    for env_id in (UMAZE, "PointMaze_LargeDense-v3"):
        assert not np.any(evaluation.termination(env_id)(obs, None, obs))


@pytest.mark.parametrize("env_id", [UMAZE, "AntMaze_UMaze-v5"])
def test_no_file_is_left_behind(env_id, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    evaluation.make(env_id).reset(seed=0)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_there_is_one_message(monkeypatch, tmp_path, capsys):
    """The other environments work without it; the bundled data loads, and says what is missing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "gymnasium_robotics", None)  # importing it raises
        for env_id in (UMAZE, "AntMaze_UMaze-v5"):
            with pytest.raises(evaluation.EvaluationError) as error:
                evaluation.make(env_id)
            want = "mazes need gymnasium-robotics, see requirements.txt"
            assert str(error.value) == f"{env_id} cannot be made: {want}"
            with pytest.raises(evaluation.EvaluationError, match="mazes need gymnasium-rob"):
                evaluation.inspect(env_id)
        evaluation.make("Pendulum-v1")
        data = datasets.load(NAME)
        assert (data.env_id, data.obs.shape[1]) == ("", 6)
        assert "mazes need gymnasium-robotics" in capsys.readouterr().err
    assert datasets.load(NAME).env_id == UMAZE  # once it is installed: not the cache's answer
    assert capsys.readouterr().err == ""


class Reach(gymnasium.Env):
    """A goal environment whose observation begins with the place."""

    space = functools.partial(gymnasium.spaces.Box, -9, 9)
    observation_space = gymnasium.spaces.Dict(
        observation=space((3,)), achieved_goal=space((2,)), desired_goal=space((2,))
    )
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.step([0.0])[0], {}

    def step(self, action):
        seen = self.np_random.normal(size=3) + action[0]
        goal = np.array([7.0, 8.0])
        obs = dict(observation=seen, achieved_goal=seen[:2], desired_goal=goal)
        return obs, 0.0, False, False, {}


@pytest.mark.parametrize("env_id, told", [("AntMaze_UMaze-v5", False), ("Reach-v0", True)])
def test_goal_environments_are_flattened_as_their_data_are(env_id, told):
    """(place, observation, goal), the place left out where the observation begins with it."""
    if told:
        gymnasium.register("Reach-v0", Reach, max_episode_steps=9)
    names = ("achieved_goal", "observation", "desired_goal")[told:]
    env, theirs = evaluation.make(env_id), plain(env_id)
    ours, _ = env.reset(seed=3)
    want, _ = theirs.reset(seed=3)
    action = np.full(env.action_space.shape, 0.5, np.float32)
    for _ in range(3):
        flat = np.concatenate([want[name] for name in names])
        np.testing.assert_allclose(ours, flat, rtol=1e-6)
        assert env.observation_space.shape == ours.shape
        ours, want = env.step(action)[0], theirs.step(action)[0]
    assert evaluation.inspect(env_id).obs_dim == len(ours)
    gymnasium.registry.pop("Reach-v0", None)


FILM = """
import sys
import gymnasium, imageio.v2 as imageio, numpy as np
from common import evaluation
from common.evaluation import environments as mazes
from common.evaluation import video

video.choose_renderer()
evaluation.make("Pendulum-v1")
assert "gymnasium_robotics" not in sys.modules  # imported for mazes alone
mazes.register("PointMaze_UMaze-v3")
gymnasium.spec("PointMaze_UMaze-v3").max_episode_steps = 20
policy = lambda carry, obs, reward, key: (np.ones((1, 1, 2)), carry)
print(video.film(policy, "PointMaze_UMaze-v3", sys.argv[1]).shape)
frames = np.array([frame for frame in imageio.get_reader(sys.argv[1])])
red = (frames[..., 0] > 2.0 * frames[..., 1]) & (frames[..., 0] > 120)  # the goal's ball
print(len(frames), red.any((1, 2)).all(), np.any(frames[0] != frames[-1]))
"""


def test_a_maze_is_filmed_where_the_machine_can(tmp_path):
    command = [sys.executable, "-W", "error", "-c", FILM, str(tmp_path / "maze.mp4")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and "apt-get" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(1,)", "10", "True", "True"]  # every second step, at 50 Hz


# --- The controller ---

BY_HAND = {
    "loop": ["#######", "#OOOOO#", "#O###O#", "#O###O#", "#OOOOO#", "#######"],
    "room": ["#####", "#OOO#", "#OOO#", "#OO##", "#####"],
    "dead ends": ["########", "#O#OOOO#", "#O#O##O#", "#OOO#OO#", "########"],
}


@pytest.mark.parametrize("name", [*LAYOUTS, *BY_HAND])
def test_routes_are_shortest(name):
    """Against distances by relaxation over all cells (Bellman-Ford)."""
    if name in LAYOUTS:
        walls = drawn(name)[0]
    else:
        walls = [[int(x == "#") for x in row] for row in BY_HAND[name]]
    walls = np.array(walls)
    free = [tuple(map(int, cell)) for cell in np.argwhere(walls == 0)]
    for start in free[:: max(1, len(free) // 8)]:
        distance = np.full(walls.shape, np.inf)
        distance[start] = 0
        for _ in range(walls.size):
            near = [np.roll(distance, shift, axis) for axis in (0, 1) for shift in (-1, 1)]
            distance = np.where(walls, np.inf, np.minimum(distance, 1 + np.min(near, 0)))
        for goal in free:
            way = waypoints.route(walls.tolist(), start, goal)
            assert len(way) == distance[goal]
            steps = np.diff([start, *way], axis=0)
            assert (np.abs(steps).sum(1) == 1).all() and all(walls[cell] == 0 for cell in way)
            assert [start, *way][-1] == goal


def test_marks_in_a_map_are_free_cells_and_walls_have_no_way():
    walls = [[1, 1, 1, 1, 1, 1], [1, "r", 0, "g", 1, "c"], [1, 1, 1, 1, 1, 1]]
    assert waypoints.route(walls, (1, 1), (1, 3)) == [(1, 2), (1, 3)]
    assert waypoints.route(walls, (1, 2), (1, 2)) == []
    with pytest.raises(ValueError, match="no path"):
        waypoints.route(walls, (1, 1), (1, 5))


def test_the_controller_gets_from_every_cell_to_every_other_and_stays():
    env, (walls, _, _) = evaluation.make(UMAZE), drawn("UMaze")
    free = [(i, j) for i in range(5) for j in range(5) if not walls[i][j]]
    assert len(free) == 7
    rng, seed = np.random.default_rng(0), 0
    for start in free[1:]:  # the environment's own goal, (1, 1), is no start
        for goal in [cell for cell in free if cell != start]:
            obs, _ = env.reset(seed=(seed := seed + 1), options={"reset_cell": np.array(start)})
            walker, far = waypoints.Walker(env, rng, goal), []
            for _ in range(250):
                action = walker(obs)
                assert action.dtype == np.float32 and np.abs(action).max() <= 1
                obs = env.step(action)[0]
                far.append(np.linalg.norm(obs[:2] - middle(goal, walls)))
            assert max(far[-30:]) < 0.15, (start, goal)


def test_the_controllers_law():
    """At rest in the middle of a cell, with its one waypoint a metre away, and beside it."""
    env = evaluation.make(UMAZE)
    env.reset(seed=0)
    walker = waypoints.Walker(env, np.random.default_rng(0), (1, 1))
    np.testing.assert_array_equal(walker(np.float32([0, 1, 0, 0, 9, 9])), [-1, 0])
    np.testing.assert_allclose(walker(np.float32([-0.8, 1.15, -1.5, 0.5, 9, 9])), [-0.5, -1], 1e-5)
    np.testing.assert_allclose(walker(np.float32([-0.89, 1, -0.4, 0.3, 9, 9])), [-0.7, -0.3], 1e-5)


def test_a_walk_draws_every_cell_and_is_one_piece():
    env = evaluation.make("PointMaze_Medium-v3")
    obs, action, reward, next_obs = waypoints.walk(env, 12_000, 5)
    np.testing.assert_array_equal(obs[1:], next_obs[:-1])
    np.testing.assert_array_equal(obs[0], env.reset(seed=5)[0])
    walls = np.array(drawn("Medium")[0])
    seen = {tuple(env.unwrapped.maze.cell_xy_to_rowcol(row[:2])) for row in obs}
    assert seen == {tuple(map(int, cell)) for cell in np.argwhere(walls == 0)}
    again = waypoints.walk(env, 50, 5)
    np.testing.assert_array_equal(action[:50], again[1])
    assert (waypoints.walk(env, 50, 6)[1] != action[:50]).any()
    assert 0 < reward.mean() < 0.2


# --- The data ---


@pytest.fixture(scope="module")
def data():
    with pytest.MonkeyPatch.context() as m, tempfile.TemporaryDirectory() as cache:
        m.setenv("XDG_CACHE_HOME", cache)
        yield datasets.load(NAME)


def test_the_bundled_walk_is_one_piece_cut_by_time_alone(data):
    np.testing.assert_array_equal(data.obs[1:], data.next_obs[:-1])  # across the cuts as well
    assert (data.length == 300).all() and len(data.length) == 100
    assert not data.done.any()
    assert (data.obs[:, 4:] == [-1, 1]).all()
    assert np.abs(data.action).max() <= 1 and (np.abs(data.action).max(0) == 1).all()
    walls = np.array(drawn("UMaze")[0])
    cells = np.stack([np.floor(2.5 - data.obs[:, 1]), np.floor(data.obs[:, 0] + 2.5)], 1)
    assert not walls[tuple(cells.astype(int).T)].any()
    assert np.abs(data.obs[:, :2]).max() < 1.4 + 0.01  # the ball's radius, 0.1, from the wall
    assert np.abs(data.obs[:, 2:4]).max() < 5.3  # the environment cuts at 5, before it pushes


def test_the_bundled_rows_are_the_environments_own_steps(data):
    """From the state that a row holds, its action leads to its next_obs and earns its reward."""
    env = evaluation.make(data.env_id)
    env.reset(seed=0)
    maze = env.unwrapped
    reward = maze.compute_reward(data.next_obs[:, :2].astype(float), np.array([-1.0, 1.0]), {})
    np.testing.assert_array_equal(data.reward, reward)
    near = np.linalg.norm(data.next_obs[:, :2] - [-1, 1], axis=1) <= 0.45
    np.testing.assert_array_equal(data.reward, near)
    assert 0.03 < reward.mean() < 0.2
    rows = np.random.default_rng(0).integers(0, len(data.obs), 400)
    for i in rows:
        state = data.obs[i].astype(np.float64)
        maze.point_env.set_state(state[:2], state[2:4])
        obs, reward, terminated, _, _ = env.step(data.action[i])
        np.testing.assert_allclose(obs, data.next_obs[i], atol=1e-5)
        assert reward == data.reward[i] and not terminated


def test_references_are_uniform_actions_and_the_controller(data):
    """Measured again, from other starts: 0 and 100 but for the noise of 60 episodes."""
    assert 0 < data.ref_min < 40 and 180 < data.ref_max < 260
    env = evaluation.make(data.env_id)
    worst, best = (waypoints.returns(env, 60, 500, goal) for goal in (None, (1, 1)))
    assert abs(data.score(worst.mean())) < 10  # standard error 3
    assert abs(data.score(best.mean()) - 100) < 10
    assert "not D4RL's" in data.provenance["metadata"]["stillwater"]["reference_from"]
    np.testing.assert_array_equal(waypoints.returns(env, 2, 500), worst[:2])


def test_collecting_from_the_command_line(tmp_path, monkeypatch):
    """700 steps: two episodes and a part of one. Their rows are those of the walk itself."""
    command = [sys.executable, "-m", "benchmarks.collect", "--kind", "waypoint", "--out"]
    command += [str(tmp_path), "--num-steps", "700", "--seed", "4", "--env-id"]
    done = subprocess.run([*command, UMAZE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "700 steps, 3 episodes" in done.stdout
    monkeypatch.setattr("common.datasets.sources.BUNDLED", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = datasets.load(NAME)
    assert data.env_id == UMAZE and data.length.tolist() == [300, 300, 100]
    walk = waypoints.walk(evaluation.make(UMAZE), 700, 4)
    for ours, theirs in zip((data.obs, data.action, data.reward, data.next_obs), walk, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert 0 < data.ref_min < 40 and 180 < data.ref_max < 260


def test_a_walk_needs_a_maze_with_a_goal(tmp_path):
    from benchmarks.collect import __main__ as collect

    for env_id in ("Hopper-v5", "PointMaze_Open-v3"):
        cfg = collect.Config(env_id, "waypoint", out=str(tmp_path / "out"))
        with pytest.raises(SystemExit, match=f"needs PointMaze's UMaze.*: {env_id}"):
            collect.main(cfg)
    assert not list(tmp_path.iterdir())


def test_minaris_dictionaries_become_flat(tmp_path, monkeypatch):
    """As Farama's D4RL/pointmaze has them, with a goal that moves on when it is reached."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mazes.register(UMAZE)
    env = gymnasium.make(UMAZE, reset_target=True, disable_env_checker=True)
    want, buffers = [], []
    for seed in range(2):
        seen, rows, over = [env.reset(seed=seed)[0]], [], False
        while not over:
            obs = np.float32([*seen[-1]["observation"], *seen[-1]["desired_goal"]])
            action = to_goal(obs)
            dictionary, reward, terminated, over, _ = env.step(action)
            rows.append((action, reward, terminated, over))
            want.append(obs)
            seen.append(dictionary)
        observations = {k: np.array([row[k] for row in seen]) for k in env.observation_space}
        fields = ("actions", "rewards", "terminations", "truncations")
        columns = map(np.array, zip(*rows, strict=True))
        columns = dict(zip(fields, columns, strict=True))
        buffers.append(EpisodeBuffer(observations=observations, **columns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # minari's, of each optional field left out
        minari.create_dataset_from_buffers("own/pointmaze/umaze-v0", buffers, env=UMAZE)
    data = datasets.load("own/pointmaze/umaze-v0")
    assert data.env_id == UMAZE and data.length.tolist() == [300, 300]
    np.testing.assert_array_equal(data.obs, want)
    assert len(np.unique(data.obs[:300, 4:], axis=0)) > 1
    for start in (0, 300):
        rows = slice(start, start + 299)
        np.testing.assert_array_equal(data.next_obs[rows], data.obs[start + 1 : start + 300])
    np.testing.assert_allclose(data.action, to_goal(data.obs), atol=1e-6)
    assert not data.done.any() and np.isnan(data.score(1.0))
