"""One picture for each claim of claims.py, from claims.json."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def draw(name, found, path):
    """Draws the picture of one claim to `path`. name: of CLAIMS. found: its numbers."""
    panels, title = PICTURES[name]
    size, dpi = ((8.6, 3.9), 140) if name == "naive" else ((7, 4), 100)  # README's first picture
    figure = Figure(size, dpi=dpi, layout="constrained")
    axes = figure.subplots(1, 2 if name in TWO_PANELS else 1)
    panels(found, *np.ravel(axes))
    figure.suptitle(title, fontsize=11)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(64).save(path, optimize=True)  # a third of the bytes


def levels(axis, values):
    """Draws dashed lines with names at the right end. values: {name: (value, colour)}."""
    for name, (value, colour) in values.items():
        axis.axhline(value, color=colour, lw=1, ls="--", zorder=0)
        where = dict(xycoords=("axes fraction", "data"), textcoords="offset points")
        axis.annotate(name, (1, value), (-3, 3), ha="right", color=colour, fontsize=9, **where)


def dots(axis, x, seeds, label, colour, **style):
    """Draws the mean of the seeds with a bar from the lowest to the highest."""
    mean = np.array(seeds["mean"])
    bars = np.abs(np.array([seeds["lowest"], seeds["highest"]]) - mean)
    style = dict(ms=5) | style
    axis.errorbar(x, mean, bars, fmt="o", capsize=3, label=label, color=colour, **style)


def band(axis, x, seeds, label, colour):
    """Draws the mean of the seeds as a line in a band from the lowest to the highest."""
    axis.plot(x, seeds["mean"], label=label, color=colour)
    axis.fill_between(x, seeds["lowest"], seeds["highest"], color=colour, alpha=0.25, lw=0)


def naive(found, left, right):
    best = found["best possible"]
    for who, colour in (("SAC", "#d55e00"), ("CQL", "#0072b2")):
        predicted, earned = (found[who][k] for k in ("predicted", "earned"))
        band(left, found["updates"], predicted, who, colour)
        left.plot(found["updates"], earned["mean"], color=colour, ls=":")
        band(right, found["actions"], found[who]["error of one step"], who, colour)
        for verb, values in (("predicts", predicted), ("earns", earned)):
            last = values["mean"][-1]
            words = dict(color=colour, fontsize=9, va="center", textcoords="offset points")
            left.annotate(f"{who} {verb} {last:.1f}", (found["updates"][-1], last), (5, 0), **words)
    levels(left, {f"best possible {best:.1f}": (best, "0.3")})
    left.set(xlabel="updates", ylabel="discounted return", xlim=(0, 1.45 * found["updates"][-1]))
    left.set_xticks([0, 1000, 2000, 3000, 4000])
    left.set_title("Return that Q predicts, and that the policy earns", fontsize=10)
    right.axvspan(*found["seen"], color="0.9")
    right.annotate("actions in the data", (np.mean(found["seen"]), 8.6), ha="center", fontsize=9)
    levels(right, {"": (0, "0.3")})
    right.set(xlabel="action at x = 0", ylabel="one-step error of Q", ylim=(-15, 10))
    right.annotate("SAC", (0.85, 5), color="#d55e00", fontsize=9)
    right.annotate("CQL", (0.47, -13), color="#0072b2", fontsize=9)
    right.set_title("The error begins outside the data", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)


def cql(found, *axes):
    for axis, kind in zip(axes, ("table", "network"), strict=True):
        for how, colour in (("without", "C1"), ("with", "C0")):
            pairs, means = (found[f"{kind}, {how}"][k] for k in ("pairs", "policy"))
            label = f"{how} the data term: Q(s, a)"
            axis.scatter(pairs["true"], pairs["learned"], 9, colour, alpha=0.5, lw=0, label=label)
            style = dict(
                ec="k", marker="D", label="mean of these under the policy, of each place", zorder=3
            )
            axis.scatter(means["true"], means["learned"], 30, colour, **style)
        low = max(axis.get_xlim()[0], axis.get_ylim()[0])
        axis.plot([low, 1], [low, 1], color="0.3", lw=1, ls="--")
        axis.annotate("the truth", (0.97, 0.97), (-4, 0), ha="right", va="bottom",
                      color="0.3", fontsize=9, textcoords="offset points")  # fmt: skip
        axis.set(title={"table": "a table, exact", "network": "cql.py, 5 seeds"}[kind])
        axis.set(xlabel="true Q", ylabel="learned Q")
    axes[0].figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )


def iql(found, axis):
    for name, colour in (("behaviour", "C2"), ("best in the data", "C1"), ("best", "0.5")):
        label = {"behaviour": "SARSA", "best": "best of all actions"}.get(name, name)
        levels(axis, {label: (found[name], colour)})
    axis.plot(1 - np.array(found["exact"]["taus"]), found["exact"]["V"], "k", lw=1, label="exact")
    dots(axis, 1 - np.array(found["taus"]), found["V"], "iql.py, 5 seeds", "C0")
    axis.set(xscale="log", xlim=(0.6, 0.0025), ylim=(0, 0.9), xlabel="tau")
    axis.set(ylabel="V at the middle place")
    axis.set_xticks(1 - np.array(found["taus"]), found["taus"])
    axis.minorticks_off()
    axis.legend(fontsize=9, loc="center left")


def awac(found, axis):
    for name, colour in (("behaviour", "C2"), ("best in the data", "C1"), ("best", "0.5")):
        label = {"behaviour": "imitation", "best": "best of all actions"}.get(name, name)
        levels(axis, {label: (found[name], colour)})
    axis.plot(found["exact"]["lambdas"], found["exact"]["V"], "k", lw=1, label="exact")
    dots(axis, found["lambdas"], found["V"], "awac.py, 5 seeds", "C0")
    axis.set(xscale="log", xlim=(4, 0.0023), ylim=(0, 0.9), ylabel="value of the policy")
    axis.set(xlabel="lambda: weights exp(A / lambda), from weak to strong")
    axis.set_xticks(found["lambdas"], found["lambdas"])
    axis.minorticks_off()
    axis.legend(fontsize=9, loc="center left")


def combo(found, axis):
    x = np.arange(len(found["betas"]))
    dots(axis, x, found["predicted"], "COMBO predicts", "C0")
    dots(axis, x, found["earned"], "COMBO earns", "k", mfc="w")
    axis.set_xticks(x, ["0: no penalty", *(f"{beta:g}" for beta in found["betas"][1:])])
    axis.set(xlabel="beta, weight of the penalty", ylabel="Q at the model's states")
    axis.legend(fontsize=9)


def bc(found, *axes):
    for i, (axis, effort) in enumerate(zip(axes, found["efforts"], strict=True)):
        axis.plot(found["means"], found["behaviour"][i], "k", label="behaviour")
        for who, colour, size in (("IQL", "C0", 5), ("BC", "C3", 8), ("BC, sampled", "C1", 4)):
            seeds = {k: v[i] for k, v in found[who].items()}
            label = {"BC": "BC's mean action"}.get(who, who)
            dots(axis, found["means"], seeds, label, colour, ms=size)
        levels(axis, {"best": (found["best"][i], "0.5")})
        axis.set(title=f"an action costs {effort:g} a$^2$" if effort else "actions cost nothing")
        axis.set(xlabel="mean action of the behaviour", ylabel="value")
    axes[0].legend(fontsize=8, loc="lower right")


def awr(found, axis):
    names = [*(f"AWR\nlambda {lam:g}" for lam in found["lams"]), "AWAC"]
    levels(axis, {"what the data earned": (found["of the data"], "C3")})
    levels(axis, {"what can be earned": (found["best"], "C2"), "": (0, "0.3")})
    for x, colour in ((slice(None, -1), "C0"), (slice(-1, None), "C1")):
        seeds = {k: v[x] for k, v in found["gap"].items()}
        dots(axis, np.arange(len(names))[x], seeds, None, colour)
    for x, share in enumerate(found["to C"]["mean"]):
        axis.annotate(f"{share:.0%} to C", (x, found["gap"]["mean"][x]), (8, -3),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axis.set_xticks(range(len(names)), names)
    axis.set(xlim=(-0.5, len(names)), ylabel="advantage at A: towards B less towards F")


def support(found, axis):
    levels(axis, {name: (found[name], "0.5") for name in ("best", "behaviour")})
    for x, (label, run) in enumerate(found["runs"].items()):
        colour = {"KL": "C3", "MM": "C1", "BE": "C2", "BC": "C0"}[label[:2]]
        dots(axis, x, {k: [v] for k, v in run["earned"].items()}, None, colour)
        earned, words = run["earned"]["mean"], f"{run['beyond']['mean']:.0%}"
        if earned < -19:  # below the picture
            earned, words = -19, f"earns {earned:.0f},\n{words}"
        axis.annotate(words, (x, earned), (7, -3), textcoords="offset points", fontsize=8)
    axis.set_xticks(range(len(found["runs"])), found["runs"], fontsize=9)
    axis.set(xlim=(-0.5, len(found["runs"]) + 0.5), ylim=(-20, 16), ylabel="value of the policy")


def behaviours(found, axis):
    levels(axis, {name: (a, "0.5") for name, a in found["actions"].items()})
    shares = np.array(found["shares"])
    for i, (who, colour) in enumerate((("CQL", "C0"), ("BRAC", "C3"), ("BEAR", "C2"))):
        each = np.array(found[who]["each action"])  # a dot for each seed
        x = np.repeat(shares[:, None] + 0.02 * (i - 1), each.shape[1], 1)
        axis.scatter(x, each, 25, colour, lw=0, label=f"{who.lower()}.py")
    axis.set(xlabel="share of the bad behaviour in the data", ylabel="mean action of the policy")
    axis.legend(fontsize=9, loc="lower left")


def brac(found, axis):
    v, d, r = (np.array(found[x]) for x in ("Q of the value", "alpha D", "Q of the reward"))
    axis.scatter(v, r, 9, "0.6", lw=0, label="against Q with the penalty in the value")
    axis.scatter(v - d, r, 9, "C0", lw=0, label="against that Q less alpha D(s)")
    low, high = min(r.min(), (v - d).min()), max(v.max(), r.max())
    axis.plot([low, high], [low, high], color="0.3", lw=1, ls="--")
    axis.set(xlabel="Q, or Q - alpha D(s): penalty in the value", ylabel="Q: penalty in the reward")
    axis.legend(fontsize=9)


def edac(found, axis):
    levels(axis, {"the best path": (found["best"], "C2")})
    for i, (eta, colour) in enumerate(zip(found["etas"], ("C1", "C0"), strict=True)):
        who, x = "EDAC" if eta else "SAC-N", np.arange(len(found["members"])) + 0.12 * i
        for what, style in (("predicted", {}), ("earned", dict(mfc="w"))):
            seeds = {k: np.array(v)[:, i] for k, v in found[what].items()}
            verb = {"predicted": "predicts", "earned": "earns"}[what]
            dots(axis, x, seeds, f"{who} {verb}", colour, **style)
    axis.set_xticks(range(len(found["members"])), [f"{n:g}" for n in found["members"]])
    axis.set(xlabel="critics", ylabel="discounted return from A")
    axis.legend(fontsize=9)


def ensemble(found, left, right):
    at, points, gp = np.array(found["at"]), found["points"], found["GP"]
    for name, colour in (("GP", "C0"), ("ensemble", "C1")):
        mean, std = (np.array(found[name][k]) for k in ("mean", "std"))
        title = {"GP": "Gaussian process", "ensemble": "ensemble, 7 members"}[name]
        left.plot(at, mean, color=colour, label=title)
        left.fill_between(at, mean - 2 * std, mean + 2 * std, color=colour, alpha=0.25, lw=0)
    left.plot(at, found["curve"], "k:", lw=1, label="truth")
    left.plot(points["x"], points["y"], "k.", ms=2, label="data")
    left.set(xlabel="s", ylabel="s' - s", ylim=(-4, 4))
    left.legend(fontsize=8, loc="upper left")
    for axis in (left, right):
        for low, high in found["seen"]:
            axis.axvspan(low, high, color="0.92", zorder=0)
    right.plot(at, gp["std"], color="C0", label="std of the Gaussian process")
    kinds = {"spread": "spread", "disagreement": "disagreement", "std": "largest learned std"}
    for (name, title), colour in zip(kinds.items(), ("C1", "C2", "C4"), strict=True):
        u = np.array(found[name])
        seeds = {"mean": np.median(u, 0), "lowest": u.min(0), "highest": u.max(0)}
        band(right, at, seeds, title, colour)
    right.set(yscale="log", xlabel="s", ylabel="u, as mopo.py computes it; 5 seeds")
    right.legend(fontsize=8, loc="upper center")


def mopo(found, left, right):
    names = {"error": "u = the model's error", "distance": "u = distance of distributions"}
    for (name, title), colour in zip(names.items(), ("C0", "C1"), strict=True):
        rows = found[name]
        style = dict(marker="o", ms=4, color=colour, label=title)
        left.plot(found["shares"], 100 * np.array(rows["above"]), **style)
        right.plot(found["shares"], rows["excess"], **style)
    for axis in (left, right):
        axis.axvline(1, color="0.5", ls="--", lw=1)
        axis.set(xlabel="penalty_scale: share of u that is paid")
    left.set(ylabel="% of policies above their true return")
    left.legend(fontsize=8)
    right.axhline(0, color="0.5", lw=1)
    right.set(ylabel="largest penalised - true return")


def bound(found, left, right):
    errors = 100 * np.array(found["errors"])
    left.plot(errors, found["COMBO"]["distance"], "o-", ms=4, label="COMBO")
    left.axhline(found["CQL"]["distance"], color="C1", label="CQL")
    left.set(xlabel="wrong transitions in the model, %", ylabel="true value - lower bound")
    left.set_ylim(0)
    left.legend(fontsize=8)
    for i, beta in enumerate(found["betas"]):
        colour = ("C3", "C2", "C0")[i]
        lowest, least = (np.array(x)[:, i] for x in (found["gain"]["lowest"], found["least"]))
        right.plot(errors, lowest, color=colour, label=f"beta {beta:g}")
        right.plot(errors, least, ":", color=colour)
    right.axhline(0, color="0.5", lw=1)
    right.set(xlabel="wrong transitions in the model, %", ylabel="improved policy - behaviour")
    right.set_title("lowest of 40 worlds (dotted: bound)", fontsize=9)
    right.legend(fontsize=8)


TWO_PANELS = ("naive", "cql", "bc", "ensemble", "mopo", "bound")
PICTURES = {  # name: (its panels, its title)
    "naive": (naive, "Naive off-policy learning (SAC) overestimates actions outside the data;\n"
              "conservative Q-learning (CQL) does not"),
    "cql": (cql, "CQL without the data term is below the truth at every action;\n"
            "with it, only in the mean under the policy"),
    "iql": (iql, "IQL goes from SARSA's value to the best within the data\n"
            "as tau goes to 1, and evaluates Q on no other action"),
    "awac": (awac, "AWAC goes from imitation (weak weights) to greed (strong weights)"),
    "combo": (combo, "COMBO's penalty lowers the values of the model's states\n"
              "once beta is large; at 0.5 some seeds still overestimate"),
    "bc": (bc, "BC's ceiling is the behaviour: it can save no more than what the noise costs.\n"
           "IQL goes beyond on the same data"),
    "awr": (awr, "AWR's advantage is what the data earned after an action, with any lambda;\n"
            "AWAC's is what its own policy will earn: it alone joins two paths"),
    "support": (support,
                "Where the data are wide and dull, KL holds the policy back more than MMD;\n"
                "in per cent the share of actions beyond the data"),
    "behaviours": (behaviours,
                   "Two behaviours at the same places: BRAC acts between them, without data;\n"
                   "CQL acts like one of them, but not always the better one"),
    "brac": (brac, "With the penalty in the reward, BRAC's Q is less by alpha D(s),\n"
             "which no action changes: the policy is the same"),
    "edac": (edac, "More critics predict less, but SAC-N fails all the same;\n"
             "EDAC pushes their gradients apart, predicts too little and arrives"),
    "ensemble": (ensemble, "Where data end, a Gaussian process's band opens\n"
                 "and the members of an ensemble part"),
    "mopo": (mopo, "The penalised return is a lower bound once u bounds the model's error"),
    "bound": (bound, "COMBO's lower bound is tighter than CQL's while the model is good;\n"
              "its penalty keeps the policy from falling far below the behaviour"),
}  # fmt: skip
