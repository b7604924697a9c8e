"""Tables of speed in Markdown, from what `benchmarks.speed`, its profile, changes and peers wrote.

ours: {cores: the JSON of `benchmarks.speed`}; peers: {cores: [the JSON of each peer]}.
"""

import importlib
import json

import numpy as np

from benchmarks.markdown import markdown
from benchmarks.scores.runs import NAMES

OURS = {1: "speed.json", 2: "speed-2-cores.json"}  # by cores
PLAIN, THREE = dict(widths=[256] * 2), dict(widths=[256] * 3)
PENALTY = dict(critics=2, actions=30)
COMPARED = {  # our row: what peers call it, and the sizes that must be equal
    "iql": ("iql", PLAIN),
    "awac": ("awac", THREE),
    "awac, 2 layers": ("awac", PLAIN),
    "cql": ("cql", PLAIN | PENALTY),
    "cql, 3 layers": ("cql", THREE | PENALTY),
    "combo": ("combo_update", THREE | PENALTY),
    "dynamics": ("dynamics", {}),
    "rollout": ("rollout", {}),
    "dt": ("dt", {}),
    "diffuser": ("diffuser", dict(horizon=32)),
    "plan": ("plan", dict(horizon=32)),
    "evaluation": ("evaluation", {}),
}
# Their policies cost what the rows of evaluations measure.
SIMILAR = "bc sac td3_bc rebrac edac brac awr iql awac cql combo mopo mobile dt rvs".split()
OTHERWISE = {  # (peer, our row): the difference between them
    ("Unifloral", "iql"): "the policy's weights from V before its update: one V less",
    ("Unifloral", "dynamics"): "ReLU for swish, one batch for all members, no weight decay",
    ("JAX-CORL", "awac, 2 layers"): "an actor of four layers",
    ("CleanDiffuser", "plan"): "the guide's gradient once in a step, not twice",
}
MARKS = "¹²³⁴"


def load(results):
    """(ours, peers) of all that lies below `results`."""
    ours = {n: json.loads((results / name).read_text("utf-8")) for n, name in OURS.items()}
    found = [json.loads(x.read_text("utf-8")) for x in sorted(results.glob("speed/*.json"))]
    return ours, {n: [x for x in found if x["device"]["threads"] == n] for n in OURS}


def by_name(file, seeds=1):
    return {row["row"]: row for row in file["rows"] if row["seeds"] == seeds}


def evaluations_share(name, row, rows):
    """Of the time of a run with the file's defaults, from the evaluation of such a policy."""
    if name not in SIMILAR:
        return ""
    each = rows["evaluation, dt" if name == "dt" else "evaluation"]["us"]
    every = importlib.import_module(f"algorithms.{name}").Config().eval_every
    return f"{each / (each + every * row['us']):.1%}"


def digits(ms):
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def own_table(ours):
    """Our rows with one seed."""
    names = ["one seed", "ms", "GFLOP", "share of the rate", "compiling, s", "from the cache, s"]
    names += ["memory, MB", "evaluations", "ms on two cores", "share"]
    one, two = (by_name(ours[cores]) for cores in OURS)
    rows = []
    for name, row in one.items():
        share = [f"{x['share']:.0%}" if "share" in x else "" for x in (row, two[name])]
        cells = [name, digits(row["us"] / 1000), digits(row["gflop"]) if share[0] else "", share[0]]
        cells += [f"{row[x]:.1f}" for x in ("compile_seconds", "cached_compile_seconds")]
        cells += [f"{row['peak_mb']:,.0f}", evaluations_share(name, row, one)]
        rows.append([*cells, digits(two[name]["us"] / 1000), share[1]])
    return markdown(names, rows)


def seeds_table(ours):
    """Updates of several seeds under vmap, on one core."""
    counts = sorted({row["seeds"] for row in ours[1]["rows"]})
    found = [by_name(ours[1], n) for n in counts]
    rows = []
    for name in found[-1]:  # some methods are timed with one seed alone
        each = (rows_of_n[name] for rows_of_n in found)
        cells = [f"{digits(x['us'] / 1000 / x['seeds'])}, {x['share']:.0%}" for x in each]
        rows.append([name, *cells])
    return markdown(["ms a seed, share", *map(str, counts)], rows)


def million_table(file):
    """A million updates of many seeds under vmap, at the measured rate."""
    names = [f"{file['algorithm']} on {file['device']}", "ms an update of all seeds"]
    names += ["minutes for a million", "seconds a seed", "to one seed's rate"]
    alone, rows = file["rows"][0]["us"] / file["rows"][0]["seeds"], []
    for row in file["rows"]:
        us, seeds = row["us"], row["seeds"]
        cells = [f"{seeds} seed{'s' * (seeds > 1)}", digits(us / 1000), digits(us / 60)]
        rows.append([*cells, digits(us / seeds), f"{alone * seeds / us:.1f}"])
    return markdown(names, rows)


def profile_table(profile):
    """Milliseconds of each kind of work in an update; the rest passes between the steps."""
    rows = profile["rows"]
    alone = [f"{row['products_alone_ms']:.1f}" for row in rows]
    lines = [["the necessary matrix products alone", *alone]]
    for kind in rows[0]["kinds_ms"]:
        lines.append([kind, *(f"{row['kinds_ms'][kind]:.1f}" for row in rows)])
    lines.append(["the whole update", *(f"{row['ms']:.1f}" for row in rows)])
    return markdown(["ms", *(row["row"] for row in rows)], lines)


def changes_table(changes):
    """Median milliseconds of a row before and after a change."""
    rows = []
    for change in changes["rows"]:
        old, new = (np.median(change[f"us_{when}"]) / 1000 for when in ("before", "after"))
        cores = f"{change['cores']} core" + "s" * (change["cores"] > 1)
        cells = [digits(old), digits(new), f"{old / new:.2f}"]
        rows.append([change["what"], f"{change['row']}, {cores}", *cells])
    return markdown(["change", "", "ms before", "after", "ratio"], rows)


def theirs(peers, name):
    """[(ms, compile seconds, peer)] of the peers that compare with our row, the fastest first."""
    what, sizes = COMPARED[name]
    found = []
    for peer in peers:
        for row in peer["rows"]:
            if row["what"] == what and sizes.items() <= row["sizes"].items():
                found.append((row["ms_per_update"], row["compile_seconds"], peer["peer"]["name"]))
    return sorted(found)


def peers_table(ours, peers):
    """Our times beside the peers' at equal sizes; ratio: the fastest peer's time over ours."""
    names = ["", "ours, ms (compiling, s)", "theirs, ms", "ratio", "ratio on two cores"]
    one, rows, notes = by_name(ours[1]), [], []
    for name in COMPARED:
        cells = []
        for ms, compiling, peer in theirs(peers[1], name):
            if (peer, name) in OTHERWISE:
                notes.append(OTHERWISE[peer, name])
                peer += MARKS[len(notes) - 1]
            cells.append(f"{peer} {digits(ms)}" + f" ({compiling:.0f})" * (compiling >= 1))
        ratios = []
        for cores in OURS:
            found = theirs(peers[cores], name)
            own = by_name(ours[cores])[name]["us"] / 1000
            ratios.append(f"{found[0][0] / own:.2f}" if found else "")
        own = f"{digits(one[name]['us'] / 1000)} ({one[name]['compile_seconds']:.0f})"
        rows.append([name, own, ", ".join(cells), *ratios])
    notes = "; ".join(f"{mark} {note}" for mark, note in zip(MARKS, notes, strict=False))
    return f"{markdown(names, rows)}\n{notes}.\n"


def summary_table(ours, peers):
    """One update on one core beside the fastest peer at equal sizes, where one was timed."""
    names = ["one update, one core", "ms", "share of the machine's rate", "fastest other code, ms"]
    one, rows = by_name(ours[1]), []
    for name in (name for name in COMPARED if name in NAMES):  # not its variants
        ms, share, (found, *_) = one[name]["us"] / 1000, one[name]["share"], theirs(peers[1], name)
        cells = [f"{found[2]} {digits(found[0])}", f"{found[0] / ms:.2f}"]
        rows.append([name, digits(ms), f"{share:.0%}", *cells])
    return markdown([*names, "times as fast"], rows)
