from itertools import pairwise

import pytest

from qvgpt.envs.games import Game
from qvgpt.envs.star_graph import END, StarEnv, StarGraph, StarGraphs
from qvgpt.errors import QvgptError

SMALL = StarGraph("bc|af|fg|ab/ac", ("bc", "fg"), "c")
G = StarGraphs(degree=2, length=3, num_labels=8)


def test_a_graph_by_hand():
    assert SMALL.path == "bc"
    assert SMALL.wrong == ("fg",)
    assert G.q(SMALL, "") == {"b": 1.0, "f": 0.0}
    assert G.q(SMALL, "f") == {"g": 0.0}
    assert G.q(SMALL, "bc") == {END: 1.0}
    assert (G.v_star(SMALL, ""), G.v_star(SMALL, "f"), G.v_star(SMALL, "b")) == (1.0, 0.0, 1.0)
    assert (G.v_data(SMALL, ""), G.v_data(SMALL, "f"), G.v_data(SMALL, "b")) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(("degree", "length"), [(2, 5), (5, 5), (2, 20)])
def test_drawn_graphs_are_stars(degree, length):
    graphs = StarGraphs(degree, length, num_labels=50)
    for seed in range(20):
        graph = graphs.draw(seed)
        listed, _, asked = graph.prompt.partition("/")
        edges = {(a, b) for a, b in listed.split("|")}
        start, goal = asked
        assert set(graph.prompt) <= set(graphs.alphabet)
        assert goal == graph.goal == graph.path[-1]
        assert len(edges) == degree * (length - 1) == graphs.num_nodes - 1
        assert len(set(start + "".join(graph.arms))) == graphs.num_nodes
        assert edges == {pair for arm in graph.arms for pair in pairwise(start + arm)}
        assert len(graph.arms) == degree


def test_the_right_arm_is_no_habit():
    drawn = [StarGraphs(3, 2, num_labels=8).draw(seed) for seed in range(300)]
    first = [graph.arms.index(graph.path) for graph in drawn]
    assert all(70 < first.count(i) < 130 for i in range(3))
    assert G.draw(1) == G.draw(1) != G.draw(2)


def test_logs_average_to_the_data_value_and_play_no_environment():
    for graphs, mean in [(StarGraphs(4, 3), 0.25), (StarGraphs(4, 3, right_first=0.1), 0.1)]:
        rows = graphs.logged_paths(2000, seed=1)
        assert graphs.data_return() == mean
        assert sum(r["reward"] for r in rows) / 2000 == pytest.approx(mean, abs=0.03)
        assert graphs.logged_paths(9, seed=1) == rows[:9] != graphs.logged_paths(9, seed=2)
    env = StarEnv(graphs)
    assert {r["prompt"] for r in rows}.isdisjoint(env.reset(seed) for seed in range(200))


def test_environment():
    env = StarEnv(G)
    assert isinstance(env, Game)
    with pytest.raises(QvgptError, match="reset"):
        env.step("bc")
    with pytest.raises(QvgptError, match="reset"):
        env.allows("bc")
    assert env.reset(3) == G.draw(3).prompt
    graph = env.graph
    for action in (graph.path, graph.wrong[0], graph.path[:1], "", graph.path + "a"):
        step = env.step(action)
        assert step.terminated
        assert step.reward == (action == graph.path)
        assert env.allows(action) == (action in (graph.path, graph.wrong[0], graph.path[:1]))


def test_faults():
    for arguments, message in [
        ((1, 5), "2 arms"),
        ((2, 1), "2 nodes"),
        ((5, 5, 20), "21 nodes need as many labels"),
        ((5, 20, 99), "52 letters"),
        ((2, 5, 26, 1.5), "right_first"),
    ]:
        with pytest.raises(QvgptError, match=message):
            StarGraphs(*arguments)
    with pytest.raises(QvgptError, match="no way"):
        G.q(SMALL, "bf")
