"""D4RL's datasets: names, files, sizes, hashes, reference returns (arXiv:2004.07219)."""

import functools
from pathlib import Path
from typing import NamedTuple

D4RL_HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
D4RL_MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # flat file names

REFERENCE = {  # returns that score 0 and 100 (D4RL, infos.py)
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
}
MAZES = {  # name: (part of the file's name, time limit in steps, reference returns)
    "umaze": ("umaze-sparse", 300, (23.85, 161.86)),
    "umaze-dense": ("umaze-dense", 300, (68.537689, 193.66285642381482)),
    "medium": ("medium-sparse", 600, (13.13, 277.39)),
    "medium-dense": ("medium-dense", 600, (44.264742, 297.4552547777125)),
    "large": ("large-sparse", 800, (6.7, 273.99)),
    "large-dense": ("large-dense", 800, (30.569041, 303.4857382709002)),
}
ANTMAZES = {  # name: (part of the file's name, time limit in steps)
    "umaze": ("u-maze_noisy_multistart_False_multigoal_False", 700),
    "umaze-diverse": ("u-maze_noisy_multistart_True_multigoal_True", 700),
    "medium-play": ("big-maze_noisy_multistart_True_multigoal_False", 1000),
    "medium-diverse": ("big-maze_noisy_multistart_True_multigoal_True", 1000),
    "large-play": ("hardest-maze_noisy_multistart_True_multigoal_False", 1000),
    "large-diverse": ("hardest-maze_noisy_multistart_True_multigoal_True", 1000),
}
KITCHENS = {  # name: part of the file's name
    "complete": "mini_kitchen_microwave_kettle_light_slider",
    "partial": "kitchen_microwave_kettle_light_slider",
    "mixed": "kitchen_microwave_kettle_bottomburner_light",
}


class Source(NamedTuple):
    """A dataset's file and what is known about it before it is opened."""

    path: Path | str  # of the HDF5 file (arrow: the folder); relative to D4RL_HOST until found
    layout: str = "D4RL"  # or "HDF5", a user's file in the same layout, or "Minari"
    env_id: str = ""  # Gymnasium id to score on
    ref: tuple[float, float] | None = None  # returns that score 0 and 100
    limit: int = 0  # time limit of an episode in steps; 0: unknown
    size: int = 0  # bytes; 0: unknown
    sha256: str = ""  # "": unknown

    @property
    def metadata(self) -> Path:
        """Minari's metadata.json."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return folder / "metadata.json"


@functools.cache
def d4rl_names() -> dict[str, Source]:
    """{name: Source} of all D4RL datasets, with sizes and hashes as far as they are known."""
    names = {}
    for env, ref in REFERENCE.items():
        for kind in ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay"):
            path = f"gym_mujoco_v2/{env.lower()}_{kind.replace('-', '_')}-v2.hdf5"
            names[f"{env.lower()}-{kind}-v2"] = Source(path, "D4RL", f"{env}-v4", ref)
    for name, (part, limit, ref) in MAZES.items():
        names[f"maze2d-{name}-v1"] = Source(f"maze2d/maze2d-{part}-v1.hdf5", ref=ref, limit=limit)
    for name, (part, limit) in ANTMAZES.items():
        path = f"ant_maze_v2/Ant_maze_{part}_sparse_fixed.hdf5"
        names[f"antmaze-{name}-v2"] = Source(path, ref=(0.0, 1.0), limit=limit)
    for name, part in KITCHENS.items():
        names[f"kitchen-{name}-v0"] = Source(f"kitchen/{part}-v0.hdf5", limit=280)
    for task in ("pen", "door", "hammer", "relocate"):
        for kind in ("human", "cloned", "expert"):
            names[f"{task}-{kind}-v1"] = Source(f"hand_dapg_v1/{task}-{kind}-v1.hdf5")
    table = Path(__file__).with_name("d4rl_files.tsv").read_text().splitlines()
    known = {path: rest for path, *rest in (row.split("\t") for row in table if row[0] != "#")}
    for name, source in names.items():
        size, sha256 = known.get(source.path, ("-", "-"))
        if sha256 != "-":
            names[name] = source._replace(size=int(size), sha256=sha256)
    return names
