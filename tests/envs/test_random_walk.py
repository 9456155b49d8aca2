from itertools import pairwise

import pytest

from qvgpt.envs.games import Game
from qvgpt.envs.random_walk import END, RandomWalks, WalkEnv
from qvgpt.errors import QvgptError

# b → a;  c → b;  d → b, c.  Nodes on the shortest path: b 2, c 3, d 3
SMALL = RandomWalks(edges=((), (0,), (1,), (1, 2)), max_length=5)


def all_walks(walks: RandomWalks, so_far: str) -> list[tuple[str, float]]:
    """Every finished walk that continues `so_far`, with its probability under the data policy."""
    node = ord(so_far[-1]) - ord("a")
    if node == 0 or len(so_far) == walks.max_length:
        return [(so_far, 1.0)]
    nexts = walks.edges[node]
    return [
        (walk, p / len(nexts))
        for n in nexts
        for walk, p in all_walks(walks, so_far + chr(ord("a") + n))
    ]


def prefixes(walks: RandomWalks) -> set[str]:
    return {
        walk[:n]
        for start in walks.starts
        for walk, _ in all_walks(walks, start)
        for n in range(1, len(walk) + 1)
    }


@pytest.mark.parametrize(
    ("walk", "score"),
    [
        ("ba", 1.0),  # (5 − 2) / (5 − 2)
        ("dba", 1.0),  # (5 − 3) / (5 − 3)
        ("dcba", 0.5),  # (5 − 4) / (5 − 3)
        ("dbabbb", 1.0),  # what follows the goal does not count
        ("da", 0.0),  # no such edge
        ("dcb", 0.0),  # not there
        ("dzba", 0.0),  # unknown letter
        ("d ba", 0.0),
        ("Dba", 0.0),
        ("a", 0.0),  # starts at the goal
        ("ab", 0.0),
        ("d", 0.0),
        ("", 0.0),
        ("~ba", 0.0),
    ],
)
def test_optimality_by_hand(walk, score):
    assert SMALL.optimality(walk) == score


def test_a_walk_too_long_or_just_in_time_scores_nothing():
    circle = RandomWalks(edges=((), (0, 2), (1,)), max_length=5)  # b ⇄ c, b → a
    assert circle.optimality("cba") == 1.0
    assert circle.optimality("bcba") == pytest.approx(1 / 3)
    assert circle.optimality("cbcba") == 0.0  # at the goal with the fifth of five nodes
    assert circle.optimality("bcbcba") == 0.0  # the sixth: trlX would say −1/3
    assert circle.q_star("cbcb") == {"a": 0.0, "c": 0.0}
    assert circle.q_star("cbcbc") == {END: 0.0}


def test_values_by_hand():
    assert SMALL.q_star("d") == {"b": 1.0, "c": 0.5}
    assert SMALL.q_star("dc") == {"b": 0.5}
    assert SMALL.q_star("dcba") == {END: 0.5}
    assert SMALL.v_data("d") == 0.75
    assert SMALL.solve().best("d") == "b"


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programming_agrees_with_enumeration(seed):
    walks = RandomWalks.draw(seed, num_nodes=6, edge_probability=0.4, max_length=6)
    for so_far in prefixes(walks):
        ends = all_walks(walks, so_far)
        scores = [walks.optimality(walk) for walk, _ in ends]
        assert walks.v_star(so_far) == pytest.approx(max(scores))
        mean = sum(p * s for (_, p), s in zip(ends, scores, strict=True))
        assert walks.v_data(so_far) == pytest.approx(mean)
        assert walks.v_star(so_far) == pytest.approx(max(walks.q_star(so_far).values()))
        for letter, q in walks.q_data(so_far).items():
            ends = all_walks(walks, so_far + letter)
            assert q == pytest.approx(sum(p * walks.optimality(w) for w, p in ends))


@pytest.mark.parametrize("seed", range(30))
def test_every_node_of_a_drawn_graph_reaches_the_goal(seed):
    walks = RandomWalks.draw(seed)
    assert walks.num_nodes == 21
    assert all(2 <= n < walks.max_length for n in walks.shortest[1:])
    assert walks.optimal_return() == pytest.approx(1.0)
    best = walks.solve()
    for start in walks.starts:
        walk = start
        while (letter := best.best(walk)) != END:
            walk += letter
        assert len(walk) == walks.shortest[ord(start) - ord("a")]
        assert walks.optimality(walk) == pytest.approx(1.0)


def test_the_same_seed_draws_the_same():
    assert RandomWalks.draw(3) == RandomWalks.draw(3) != RandomWalks.draw(4)
    walks = RandomWalks.draw(3)
    assert walks.logged_walks(50, seed=1) == walks.logged_walks(50, seed=1)


def test_logged_walks_obey_the_graph_and_average_to_the_data_value():
    walks = RandomWalks.draw(0)
    rows = walks.logged_walks(1000, seed=0)
    for row in rows[:100]:
        walk = row["prompt"] + row["completion"]
        assert row["prompt"] in walks.starts
        assert len(row["prompt"]) == 1
        assert all(b in walks.q_star(walk[: i + 1]) for i, (_, b) in enumerate(pairwise(walk)))
        assert list(walks.q_star(walk)) == [END]  # over: at the goal, or ten nodes long
        assert row["reward"] == walks.optimality(walk)
    expected = sum(map(walks.v_data, walks.starts)) / 20
    assert sum(row["reward"] for row in rows) / 1000 == pytest.approx(expected, abs=0.04)
    assert walks.reward([r["completion"] for r in rows[:9]], rows[:9]) == [
        r["reward"] for r in rows[:9]
    ]


@pytest.mark.parametrize("walk", ["", "a", "z", "bc", "baa", "dz", "\x00b", "dbb"])
def test_what_is_no_walk_has_no_values(walk):
    with pytest.raises(QvgptError, match="no walk"):
        SMALL.q_star(walk)
    with pytest.raises(QvgptError, match="no walk"):
        SMALL.v_data(walk)


def test_environment():
    env = WalkEnv(SMALL)
    assert isinstance(env, Game)
    with pytest.raises(QvgptError, match="reset"):
        env.step("ba")
    starts = [env.reset(seed) for seed in range(300)]
    assert {s: starts.count(s) > 70 for s in starts} == dict.fromkeys("bcd", True)
    seed = starts.index("d")
    assert env.reset(seed) == "d"
    allowed = ["", "c", "cba", "cbabbb", "b"]
    assert [a for a in [*allowed, "a", "zba", "ccba"] if env.allows(a)] == allowed
    step = env.step("cba")
    assert (step.observation, step.reward, step.terminated, step.truncated) == (
        None,
        0.5,
        True,
        False,
    )


def test_faults():
    with pytest.raises(QvgptError, match="10000 graphs"):
        RandomWalks.draw(0, num_nodes=5, edge_probability=0.0)
    with pytest.raises(QvgptError, match="2 to 26"):
        RandomWalks(edges=((),))
    with pytest.raises(QvgptError, match="no edges"):
        RandomWalks(edges=((1,), (0,)))
    with pytest.raises(QvgptError, match="fewer than"):
        RandomWalks(edges=((), (0,), ()))
