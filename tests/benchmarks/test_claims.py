"""Claims about offline RL, benchmarks/studies/claims.py: its worlds, its figures, short runs."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.studies import claims, claims_models, claims_pictures

ROOT = Path(__file__).resolve().parents[2]

STORED = json.loads((ROOT / "benchmarks/results/claims.json").read_text("utf-8"))
FLAT = np.ones(5)

# --- The worlds ---


def test_values_in_the_corridor_are_what_walks_earn():
    """From the first place, by policy 0.4 then 0.2 ..., 20,000 walks of 100 steps."""
    mean, rng = np.array([0.4, 0.2, 0.0, -0.2, 0.3]), np.random.default_rng(0)
    v = claims.corridor_value(mean, mean**2, 0.1)
    place, earned = np.zeros(20_000, int), 0.0
    for t in range(100):
        alive = place < 5
        action = mean[place.clip(max=4)]
        to = place + np.where(rng.random(len(place)) < (1 + action) / 2, 1, -1)
        earned += 0.9**t * (alive & (to == 5)) - 0.9**t * alive * 0.1 * action**2
        place = np.where(alive, to.clip(0), 5)
    np.testing.assert_allclose(v[0], earned.mean(), atol=4 * earned.std() / 20_000**0.5)
    q = claims.corridor_q(v, mean[:, None], 0.1)
    np.testing.assert_allclose(q[:, 0], v, rtol=1e-12)


def test_the_corridors_data_are_steps_of_it():
    """Within each place, r + gamma V(s') is on average the Q of the actions."""
    rng = np.random.default_rng(0)
    data = claims.corridor_data(rng, rng.uniform(*claims.SEEN, 50_000), 0.1)
    v = claims.corridor_value(0.3 * FLAT)
    place = data.obs.argmax(1)
    target = data.reward + 0.9 * (1 - data.done) * (data.next_obs @ v)
    for i in range(5):
        rows = place == i
        q = claims.corridor_q(v, data.action[rows, 0], 0.1)[i]
        for part in (data.action[rows, 0] < -0.3, data.action[rows, 0] > -0.3):
            np.testing.assert_allclose(target[rows][part].mean(), q[part].mean(), atol=0.01)
    assert np.all(place[data.done == 1] == 4)


def test_the_best_of_the_corridor():
    np.testing.assert_allclose(claims.corridor_best(), claims.corridor_value(FLAT), rtol=1e-9)
    v, others = claims.corridor_best(0.2), np.linspace(-1, 1, 21)
    some = claims.corridor_value(others[:, None] * FLAT, others[:, None] ** 2, 0.2)
    assert np.all(v > some.max(0))


def test_values_on_the_ledge_are_what_walks_earn():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, 7)
    v = claims.ledge_value(np.tile(actions, (len(claims.GRID), 1)))
    x, earned = np.full(20_000, 0.3), 0.0
    q = claims.ledge_q(v, x[:1], np.array([0.5]))
    for t in range(150):
        action = np.full(len(x), 0.5) if t == 0 else rng.choice(actions, len(x))
        x, pays = claims.ledge_step(x, action)
        earned += 0.95**t * pays
    np.testing.assert_allclose(q[0], earned.mean(), atol=0.01 + 4 * earned.std() / 20_000**0.5)


def test_no_policy_on_the_ledge_beats_the_best():
    v = claims.ledge_best()
    for action in np.linspace(-1, 1, 11):
        assert np.all(v > claims.ledge_value(np.full((len(claims.GRID), 1), action)))
    data = claims.ledge_data(500)
    x, a = data.obs[:, 0], data.action[:, 0]
    to, pays = claims.ledge_step(x, a)
    np.testing.assert_allclose(data.next_obs[:, 0], to, atol=1e-6)
    np.testing.assert_allclose(data.reward, pays, atol=1e-5)
    assert a.max() <= claims.EDGE


# --- CQL's theorems, in a table ---


def random_policies(seed):
    """Behaviour and policy (5, 9) with every action in both."""
    both = np.random.default_rng(seed).dirichlet(np.full(9, 2.0), (2, 5)) + 1e-3
    return both / both.sum(-1, keepdims=True)


def dynamics(policy, actions):
    """P^pi (45, 45) from (s, a) to (s', a'), and r (45,), written down anew."""
    move, reward = np.zeros((5, 9, 5, 9)), np.zeros((5, 9))
    for s in range(5):
        for k, a in enumerate(actions):
            right = (1 + a) / 2
            move[s, k, max(s - 1, 0)] += (1 - right) * policy[max(s - 1, 0)]
            if s == 4:
                reward[s, k] = right
            else:
                move[s, k, s + 1] += right * policy[s + 1]
    return move.reshape(45, 45), reward.ravel()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("alpha", [0.01, 0.3, 3.0])
def test_cqls_fixed_points_are_those_of_its_theorems(alpha, seed):
    """Without the data term Q falls short by alpha (I - gamma P)^-1 [mu / behaviour] at every
    (s, a), Theorem 3.1; with it V does by alpha (I - gamma P)^-1 E_pi[pi / behaviour - 1], 3.2."""
    actions = np.linspace(-1, 1, 9)
    behaviour, policy = random_policies(seed)
    move, reward = dynamics(policy, actions)
    resolvent = np.linalg.inv(np.eye(45) - 0.9 * move)
    true = (resolvent @ reward).reshape(5, 9)
    v = claims.corridor_value(policy @ actions)
    np.testing.assert_allclose(claims.corridor_q(v, actions), true, rtol=1e-9)
    ratio = policy / behaviour
    for keep in (0, 1):
        q = claims.tabular(alpha, keep, behaviour, policy, actions)
        short = (resolvent @ (ratio - keep).ravel()).reshape(5, 9)
        np.testing.assert_allclose(q, true - alpha * short, rtol=1e-9, atol=1e-9)
        if keep == 0:
            assert np.all(q < true)
        assert np.all((policy * q).sum(1) < (policy * true).sum(1))


def test_cqls_fixed_point_minimises_its_objective():
    """Eq. (1) and (2) of the paper: any other Q is worse against the same backup."""
    actions, rng = np.linspace(-1, 1, 9), np.random.default_rng(0)
    behaviour, policy = random_policies(0)
    for keep in (0, 1):
        q = claims.tabular(0.3, keep, behaviour, policy, actions)
        target = claims.corridor_q((policy * q).sum(1), actions)

        def objective(x, keep=keep, target=target):
            penalty = (policy * x).sum(1) - keep * (behaviour * x).sum(1)
            return 0.3 * penalty + 0.5 * (behaviour * (x - target) ** 2).sum(1)

        for _ in range(20):
            assert np.all(objective(q) < objective(q + 0.01 * rng.normal(size=q.shape)))


def test_with_the_data_term_some_actions_are_overestimated():
    """The theorem promises no more than the mean: where pi = behaviour nothing falls short."""
    actions = np.linspace(-1, 1, 9)
    behaviour, policy = random_policies(1)
    true = claims.corridor_q(claims.corridor_value(policy @ actions), actions)
    q = claims.tabular(0.3, 1, behaviour, policy, actions)
    assert np.any(q > true + 0.05)
    same = claims.tabular(0.3, 1, policy, policy, actions)
    np.testing.assert_allclose(same, true, rtol=1e-9)


# --- What IQL and AWAC seek ---


def test_the_expectile_goes_from_sarsas_value_to_the_best_in_the_data():
    actions = np.linspace(*claims.SEEN, 400)
    v = np.array([claims.expectile_value(tau, actions) for tau in (0.5, 0.9, 0.99, 0.99999)])
    np.testing.assert_allclose(v[0], claims.corridor_value(actions.mean() * FLAT), rtol=1e-9)
    np.testing.assert_allclose(v[-1], claims.corridor_value(claims.SEEN[1] * FLAT), rtol=0.02)
    assert np.all(np.diff(v, axis=0) > 0)


def test_awacs_fixed_point_goes_from_the_behaviour_to_the_best_in_the_data():
    actions = np.linspace(*claims.SEEN, 200)
    weak, middle, strong = (claims.awac_actions(lam, actions) for lam in (100, 0.05, 0.001))
    np.testing.assert_allclose(weak, actions.mean(), atol=0.005)
    assert np.all(middle > weak + 0.05)
    assert np.all(strong > middle + 0.1)
    assert np.all((strong > 0.3) & (strong < 0.4))


# --- The claims themselves ---


def naive_holds(found):
    sac, cql = ({k: np.array(v["mean"]) for k, v in found[w].items()} for w in ("SAC", "CQL"))
    gap = sac["predicted"] - sac["earned"]
    assert np.all(np.diff(sac["predicted"]) > 0)  # it predicts more and more
    assert np.all(np.array(found["SAC"]["predicted"]["lowest"]) > found["SAC"]["earned"]["highest"])
    assert gap[-1] > gap[0] + 10
    assert sac["predicted"][-1] > found["best possible"]  # more than there is
    assert sac["beyond"][-1] > 0.8 > 0.2 > cql["beyond"][-1]
    a, made_up = np.array(found["actions"]), sac["error of one step"]
    seen = (a > -0.65) & (a < 0.25)
    assert np.abs(made_up[seen]).max() < 1.5 < 2 < made_up[-1]  # it begins where nobody was ...
    assert sac["error"][seen].min() > 10  # ... and spreads to all actions by the backups
    assert cql["error of one step"][-1] < -1
    assert cql["predicted"][-1] < cql["earned"][-1]
    assert cql["earned"][-1] > sac["earned"][-1] + 10


def cql_holds(found):
    for kind in ("table", "network"):
        without, kept = found[f"{kind}, without"], found[f"{kind}, with"]
        assert without["share of pairs above the truth"] == 0
        assert without["share of policy above the truth"] == 0
        assert kept["share of pairs above the truth"] > 0.02
        assert kept["share of policy above the truth"] == 0
        gap = [
            np.mean(np.subtract(x["policy"]["true"], x["policy"]["learned"]))
            for x in (without, kept)
        ]
        assert gap[1] < gap[0]  # the bound with the data term is tighter


def iql_holds(found, atol=0.04):
    v, exact = np.array(found["V"]["mean"]), found["exact"]
    known = np.interp(found["taus"], exact["taus"], exact["V"])
    np.testing.assert_allclose(v, known, atol=atol)
    np.testing.assert_allclose(v[0], found["behaviour"], atol=atol)
    assert np.all(np.diff(v) > 0.03)
    assert found["best in the data"] - 0.12 < v[-1] < found["best in the data"] + 0.01
    assert found["best"] > found["best in the data"] + 0.2  # which no tau shall find
    assert found["same bits with Q = NaN off the data"] is True


def awac_holds(found, atol=0.04):
    v, exact = np.array(found["V"]["mean"]), found["exact"]
    known = np.interp(-np.array(found["lambdas"]), -np.array(exact["lambdas"]), exact["V"])
    np.testing.assert_allclose(v, known, atol=atol)
    np.testing.assert_allclose(v[0], found["behaviour"], atol=atol)
    np.testing.assert_allclose(v[-1], found["best in the data"], atol=atol)
    assert np.all(np.diff(v) > -0.01) and v[-1] > v[0] + 0.4
    assert np.all(np.array(found["V"]["highest"]) < found["best in the data"] + 0.02)


def combo_holds(found):
    """From beta = 1 on; 0.5 is too weak against a model that promises so much."""
    predicted, earned = (np.array(found[k]["mean"]) for k in ("predicted", "earned"))
    strong = np.array(found["betas"]) >= 1
    assert np.all(np.array(found["predicted"]["highest"])[strong] < found["predicted"]["lowest"][0])
    assert np.all(np.diff(predicted[strong]) < 0)  # the stronger the penalty the lower
    assert predicted[0] > earned[0] + 5
    assert np.all(predicted[strong] < earned[strong])
    assert np.all(earned[strong] > earned[0] + 5)  # and it pays


def bc_holds(found, atol=0.03):
    bc, sampled, iql = (np.array(found[w]["mean"]) for w in ("BC", "BC, sampled", "IQL"))
    behaviour, best = np.array(found["behaviour"]), np.array(found["best"])
    np.testing.assert_allclose(bc[0], behaviour[0], atol=atol)  # where noise costs nothing
    np.testing.assert_allclose(sampled, behaviour, atol=atol)
    assert np.all(bc[1] > behaviour[1])  # where it costs, leaving it out brings something
    assert np.all(iql[0] > behaviour[0] + 0.05)
    assert np.all(iql < best[:, None] + 0.01)


def awr_holds(found, atol=0.5):
    gap, to_c = found["gap"], np.array(found["to C"]["mean"])
    assert found["of the data"] < -3 and found["best"] > 1
    assert max(gap["highest"][:-1]) < -0.3  # AWR: F is the better way, whatever its lambda ...
    np.testing.assert_allclose(gap["mean"][-2], found["of the data"], atol=atol)  # ... by returns
    assert gap["lowest"][-1] > 0.5  # AWAC: the way to B
    assert np.all(to_c[:-1] < 0.2) and to_c[-1] > 0.8


def support_holds(found):
    """Of the policies within the data, MMD's earns more than KL's at its best weight, and BCQ's if
    phi is large; by default BCQ is dull, and BEAR is. A weaker KL earns most, beyond the data."""
    earned = {label: run["earned"]["mean"] for label, run in found["runs"].items()}
    beyond = {label: run["beyond"]["mean"] for label, run in found["runs"].items()}
    within = [label for label, share in beyond.items() if share < 0.01]
    kl, mmd = (max(earned[x] for x in within if x.startswith(d)) for d in ("KL", "MMD"))
    assert found["behaviour"] < kl < mmd - 2 < found["best"] - 2
    assert earned["BCQ\nphi 0.3"] > mmd and max(earned["BCQ"], earned["BEAR"]) < kl
    assert earned["KL\n0.3"] > mmd and beyond["KL\n0.3"] > 0.5


def behaviours_holds(found):
    """Cloned as one Gaussian, two behaviours become one between them; CQL acts like one of them."""
    good, bad = (found["actions"][name] for name in ("the good behaviour", "the bad one"))
    each = {who: np.array(found[who]["each action"]) for who in ("CQL", "BRAC", "BEAR")}
    nearest = np.minimum(np.abs(each["CQL"] - good), np.abs(each["CQL"] - bad))
    assert np.all(nearest < 0.15)
    assert np.all(np.abs(each["CQL"][0] - good) < 0.1)
    brac = each["BRAC"].mean(1)
    assert np.all(np.diff(brac[1:]) < -0.05)  # the more there is of the bad behaviour
    assert bad + 0.2 < brac[-1] < good - 0.2
    earned = np.array(found["BRAC"]["earned"]["mean"])
    assert earned[-1] < earned[0] - 5


def brac_holds(found, atol=0.05):
    v, d, r = (np.array(found[x]) for x in ("Q of the value", "alpha D", "Q of the reward"))
    np.testing.assert_allclose(r, v - d, atol=atol)
    assert np.mean(v - r) > 0.01  # of which less than a half is left:
    assert np.abs(v - d - r).mean() < 0.5 * np.abs(v - r).mean()
    value, reward = (found["values"][penalty]["mean"] for penalty in ("value", "reward"))
    np.testing.assert_allclose(value, reward, atol=atol)


def edac_holds(found):
    """SAC predicts more than there is, with more critics less; with either it earns nothing. EDAC
    predicts less than it earns."""
    predicted, earned = found["predicted"], found["earned"]
    sac, edac = (np.array(predicted["mean"])[:, i] for i in (0, 1))
    assert sac[0] > found["best"] > sac[-1] > edac.max()
    assert np.max(np.array(earned["highest"])[:, 0]) < 0.5
    assert np.all(np.array(predicted["highest"])[:, 1] < np.array(earned["lowest"])[:, 1])
    assert np.max(earned["highest"]) < found["best"]


def ensemble_holds(found):
    """Both bands open where data end; MOPO's largest learned std hardly knows."""
    at, gp = np.array(found["at"]), np.array(found["GP"]["std"])
    (low, _), (_, high) = found["seen"]
    seen, far = ((low < at) & (at < -0.3)) | ((at > 0.3) & (at < high)), np.abs(at) > 1.4
    for name in ("GP", "ensemble"):  # both know the curve where they have seen it
        error = np.subtract(found[name]["mean"], found["curve"])
        assert np.abs(error[seen]).max() < 0.1 < np.abs(error[far]).max()
    growth = {k: np.median(found[k], 0) for k in ("spread", "disagreement", "std")} | {"GP": gp}
    growth = {k: np.median(u[far]) / np.median(u[seen]) for k, u in growth.items()}
    assert min(growth["GP"], growth["spread"], growth["disagreement"]) > 10
    assert 0.5 < growth["std"] < 4
    assert gp[np.abs(at) < 0.05].min() > gp[seen].max()  # also in the gap between the data
    truth, mean = np.array(found["curve"]), np.array(found["GP"]["mean"])
    assert np.all(np.abs(truth - mean) < 3 * gp + 0.02)  # so that its band holds the truth


def mopo_holds(found):
    """Below the true return for every policy from the full u on; for some, not below it."""
    share = np.array(found["shares"])
    for name in ("error", "distance"):
        above, excess, worse = (np.array(found[name][k]) for k in ("above", "excess", "worse"))
        assert np.all(above[share >= 1] == 0) and np.all(excess[share >= 1] <= 0)
        assert np.all(worse[share >= 1] == 0)
        assert above[0] > 0.3 and worse[0] > 0.2  # with no penalty
        assert np.all(np.diff(excess) < 0)
    above, excess = (np.array(found["error"][k]) for k in ("above", "excess"))
    assert np.all(above[share < 1] > 0) and np.all(excess[share < 1] > 0.1)


def bound_holds(found):
    """COMBO's bound is tighter than CQL's from a good model, looser from a bad one; no policy earns
    less than its bound, and the penalty raises the lowest of a bad model's policies."""
    combo, cql = np.array(found["COMBO"]["distance"]), found["CQL"]["distance"]
    assert combo[0] < 0.5 * cql and combo[-1] > 1.2 * cql
    assert np.all(np.diff(combo) > 0)
    assert found["below the bound"] == 0
    lowest, worse = np.array(found["gain"]["lowest"]), np.array(found["worse"])
    assert np.all(lowest[-1, 1:] > lowest[-1, 0] + 0.3)
    assert np.all(worse[-1, 1:] < worse[-1, 0] - 0.2)
    assert found["gain"]["mean"][0][0] > 0.1  # from a good model it improves


HOLDS = {"naive": naive_holds, "cql": cql_holds, "iql": iql_holds}
HOLDS |= {"awac": awac_holds, "combo": combo_holds, "bc": bc_holds, "awr": awr_holds}
HOLDS |= {
    "support": support_holds,
    "behaviours": behaviours_holds,
    "brac": brac_holds,
    "edac": edac_holds,
    "ensemble": ensemble_holds,
    "mopo": mopo_holds,
    "bound": bound_holds,
}
SHORT = {
    "naive": dict(updates=1200, every=400, seeds=1),
    "cql": dict(updates=1500, seeds=1),
    "iql": dict(updates=2000, seeds=1, taus=(0.5, 0.9, 0.99)),
    "awac": dict(updates=2000, seeds=1, lambdas=(3.0, 0.1, 0.003)),
    "combo": dict(updates=2400, seeds=1, betas=(0.0, 5.0)),
    "bc": dict(updates=1500, seeds=1, means=(-0.5, 0.25)),
    "awr": dict(updates=3000, seeds=1, lams=(1.0,)),
    "support": dict(seeds=1, kl=(0.3, 1.0), mmd=(3.0,)),
    "behaviours": dict(updates=1500, seeds=1, shares=(0.0, 0.25, 0.75)),
    "brac": dict(updates=1500, seeds=1),
    "edac": dict(updates=3000, seeds=1),
    "ensemble": dict(seeds=2),
    "mopo": dict(worlds=30),
    "bound": dict(worlds=100, errors=(0.0, 0.4, 1.0)),
}


@pytest.mark.parametrize("name", HOLDS)
def test_claim_holds_in_the_stored_figures(name):
    HOLDS[name](STORED[name]["found"])


def in_short(name, **slack):
    HOLDS[name](claims.plain(claims.CLAIMS[name](**SHORT[name])), **slack)


@pytest.mark.parametrize("name", ["mopo", "bound"])
def test_claim_by_enumeration_holds_in_short(name):
    in_short(name)


def test_occupancies_and_values_agree():
    """E[r] under the occupancy is (1 - gamma) the value, for all policies at once as for one."""
    (world,) = claims_models.random_worlds(1, seed=3)
    pi = claims_models.deterministic()
    assert len(pi) == 3**5 and np.all(pi.sum(-1) == 1) and len(np.unique(pi, axis=0)) == len(pi)
    occupancy = claims_models.occupancy(world["T"], pi, world["mu"])
    np.testing.assert_allclose(occupancy.sum((1, 2)), 1)
    q = claims_models.q_values(world["T"], pi, world["r"])
    value = claims_models.returns(q, pi, world["mu"])
    np.testing.assert_allclose(np.sum(occupancy * world["r"], (1, 2)), 0.1 * value)
    one = claims_models.q_values(world["T"], pi[7], world["r"])
    np.testing.assert_allclose(one, q[7])
    v = (pi[7] * one).sum(1)
    np.testing.assert_allclose(one, world["r"] + 0.9 * world["T"] @ v)  # Bellman's equation


def test_combos_fixed_point_is_its_equation():
    """Q d_f = r d_f + gamma (f d T_seen + (1 - f) rho T_model) V - beta (rho - d)."""
    (world,) = claims_models.random_worlds(1, seed=4)
    pi, f, beta = claims_models.better(world), 0.3, 0.7
    q, _ = claims_models.combo_q(world, pi, 0.5, beta, f)
    model, v = (world["T"] + world["W"]) / 2, (pi * q).sum(1)
    rho, d = claims_models.occupancy(model, pi, world["mu"]), world["d"]
    targets = f * d * (world["seen"] @ v) + (1 - f) * rho * (model @ v)
    d_f = f * d + (1 - f) * rho
    np.testing.assert_allclose(q * d_f, world["r"] * d_f + 0.9 * targets - beta * (rho - d))


def test_the_smallest_beta_is_the_smallest():
    """Values above the truth by 1, 0.5 and -1, each lowered by 2 beta."""
    free, per_beta = np.array([1.0, 0.5, -1.0]), np.full(3, -2.0)
    beta, distance = claims_models.smallest(free, per_beta, 1.0)
    np.testing.assert_allclose((beta, distance), (0.5, -np.mean(free - 1)))
    assert claims_models.smallest(free, per_beta, 0.5)[0] == 0.25


def test_a_gaussian_process_in_closed_form():
    """One point y = 2 at 0: the mean there is 2 s^2 / (s^2 + noise^2), far away 0 and the std s."""
    x, y = np.zeros(1), np.full(1, 2.0)
    mean, std, _ = claims_models.gaussian_process(x, y, np.array([0.0, 50.0]))
    scale, noise = std[1], claims_models.NOISE
    np.testing.assert_allclose(mean, [2 * scale**2 / (scale**2 + noise**2), 0], atol=1e-9)
    np.testing.assert_allclose(std[0], scale * noise / np.hypot(scale, noise), rtol=1e-6)


def test_what_the_two_ways_from_a_earned():
    """By the data's own returns; towards C it is what a walk without noise earns, nearly."""
    data, gamma = claims.stitching.dataset(), 0.95
    assert set(data.returns()[data.start.searchsorted(claims.first_rows(data, "ABD"))]) == {0.0}
    assert set(data.returns()[data.start.searchsorted(claims.first_rows(data, "AF"))]) == {5.0}
    of_data, best = claims.earned(data, gamma)
    np.testing.assert_allclose(of_data, -5 * gamma**3, atol=0.1)  # pays on the fourth step
    np.testing.assert_allclose(best, 10 * gamma**7 - 5 * gamma**3, atol=0.4)


@pytest.mark.parametrize("name", ["iql", "awac", "bc"])
def test_claim_holds_in_short(name):
    in_short(name, atol=0.07)


@pytest.mark.slow
@pytest.mark.parametrize(  # in smaller worlds: the tests of these files
    "name", ["naive", "cql", "combo", "support", "behaviours", "brac", "edac", "ensemble"]
)
def test_claim_of_the_costlier_holds_in_short(name):
    in_short(name)


def test_who_asks_q_about_another_action_notices_the_poison():
    """AWAC's target does, IQL's does not."""
    data = jax.tree.map(lambda x: x[:50], claims.ledge_data())
    key = jax.random.key(0)

    def loss(module, *args):
        cfg = module.Config(widths=(8,), normalize=False)
        state = claims.poison(data)(module.init(key, data, cfg))
        return module.critic_loss(state.critic.params, state, data, *args, cfg)[0]

    assert np.isfinite(jax.jit(lambda: loss(importlib.import_module("iql")))())
    assert np.isnan(jax.jit(lambda: loss(importlib.import_module("awac"), key))())


def test_the_data_term_is_taken_away_and_brought_back():
    """A constant added to both critics cancels between the two terms of the penalty."""
    cql, key = importlib.import_module("cql"), jax.random.key(0)
    cfg = cql.Config(widths=(8,), alpha=3.0, num_actions=2)
    data = jax.tree.map(lambda x: x[:50], claims.ledge_data())

    def rise():
        state = cql.init(key, data, cfg)
        more = jax.tree.map(lambda x: x, state.critic.params)
        more["params"]["MLP_0"]["Dense_1"]["bias"] += 1.0
        out = [cql.critic_loss(p, state, data, key, cfg) for p in (state.critic.params, more)]
        low, high = (loss - info["td_loss"] for loss, info in out)
        return high - low

    whole = cql.critic_loss
    np.testing.assert_allclose(jax.jit(lambda: rise())(), 0, atol=1e-4)
    with claims.without_the_data_term(cql):
        np.testing.assert_allclose(jax.jit(lambda: rise())(), 2 * cfg.alpha, rtol=1e-4)
    assert cql.critic_loss is whole


# --- Pictures ---


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_picture_is_the_stored_one_and_small(name, tmp_path):
    claims_pictures.draw(name, STORED[name]["found"], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 60_000
    assert (ROOT / f"benchmarks/results/claims/{name}.png").stat().st_size < 60_000


def test_an_unknown_claim_is_refused():
    with pytest.raises(SystemExit, match="must be one of naive, cql, iql, awac, combo, bc, awr"):
        claims.main(claims.Config(only="x"))
