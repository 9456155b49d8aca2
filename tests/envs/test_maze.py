import itertools

import pytest

from qvgpt.envs.games import Game, row_return
from qvgpt.envs.maze import MOVES, NOISES, Maze, MazeEnv
from qvgpt.errors import QvgptError

# a corridor of five cells with the goal in the middle:  a b G c d
CORRIDOR = frozenset((0, column) for column in range(5))
LEFT, RIGHT, UP, DOWN = MOVES


def corridor(full: bool, max_moves: int = 9) -> Maze:
    return Maze(CORRIDOR, (0, 2), full, max_moves)


def play_out(maze: Maze, start, choose) -> float:
    """Return of a policy of all that was seen so far, from one start, without the environment."""
    cell, seen, total = start, [maze.observe(start)], 0.0
    for _ in range(maze.max_moves):
        cell = maze.move(cell, choose(tuple(seen)))
        if cell == maze.goal:
            break
        total -= 1
        seen.append(maze.observe(cell))
    return total


def test_values_by_hand_when_all_is_seen():
    values = corridor(full=True).solve()
    assert values.q([(0, 0)], 9) == {LEFT: -2.0, RIGHT: -1.0, UP: -2.0, DOWN: -2.0}
    assert values.q([(0, 1)], 9) == {LEFT: -2.0, RIGHT: 0.0, UP: -1.0, DOWN: -1.0}
    assert values.q([(0, 0)], 1) == dict.fromkeys(MOVES, -1.0)  # the limit spares what would follow
    assert corridor(full=True).optimal_return() == -0.5


def test_values_by_hand_when_only_walls_are_seen():
    """In the middle of a corridor both sides look alike: one try, then back."""
    maze = corridor(full=False)
    inner, values = [(0, 1), (0, 3)], maze.solve()
    # right: from b at the goal at once (0); from c to d, back to c and to the goal: −1 −1 −0
    assert values.q(inner, 9)[RIGHT] == -1.0
    assert values.q(inner, 9)[UP] == -2.0  # nothing learned
    assert values.v([(0, 0)], 9) == -1.0
    assert maze.optimal_return() == (2 * -1.0 + 2 * -1.0) / 4


@pytest.mark.parametrize("seed", range(3))
def test_full_sight_is_worth_the_distance(seed):
    maze = Maze.draw(seed)
    values = maze.solve()
    for cell in maze.starts:
        assert values.v([cell], 100) == 1 - maze.distance[cell]
    blind = Maze(maze.cells, maze.goal, full=False)
    assert blind.optimal_return() <= maze.optimal_return()
    assert blind.data_return(knowing=True) == maze.data_return() < blind.optimal_return()
    assert blind.data_return() < maze.data_return()
    assert blind.data_return([0.0]) == pytest.approx(blind.optimal_return())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("full", [True, False])
def test_dynamic_programming_agrees_with_all_policies_there_are(seed, full):
    maze = Maze.draw(seed, num_cells=5, side=4, full=full, max_moves=5)
    best = best_by_search(maze, maze.look(maze.starts), maze.max_moves)
    assert maze.optimal_return() == pytest.approx(best / len(maze.starts))


def best_by_search(maze: Maze, parts, moves_left: int) -> float:
    """Summed return over the cells of `parts`, each followed by itself: starts, not sets."""
    if moves_left == 0:
        return 0.0
    total = 0.0
    for part in parts:
        outcomes = []
        for move in MOVES:
            there = [maze.move(cell, move) for cell in part]
            go_on = [cell for cell in there if cell != maze.goal]
            seen = {maze.observe(c): [] for c in go_on}
            for cell in go_on:
                seen[maze.observe(cell)].append(cell)
            outcomes.append(best_by_search(maze, seen.values(), moves_left - 1) - len(go_on))
        total += max(outcomes)
    return total


def test_the_best_policy_earns_its_value():
    maze = Maze.draw(3, num_cells=12, side=6, full=False)
    values = maze.solve()

    def choose(seen):
        belief = next(p for p in maze.look(maze.starts) if maze.observe(next(iter(p))) == seen[0])
        for turn, what in enumerate(seen[1:]):
            q = values.q(belief, maze.max_moves - turn)
            after = maze.look({maze.move(c, max(q, key=q.get)) for c in belief} - {maze.goal})
            belief = next(p for p in after if maze.observe(next(iter(p))) == what)
        q = values.q(belief, maze.max_moves - len(seen) + 1)
        return max(q, key=q.get)

    returns = [play_out(maze, start, choose) for start in maze.starts]
    assert sum(returns) / len(returns) == pytest.approx(maze.optimal_return())


@pytest.mark.parametrize(("full", "knowing"), [(True, False), (False, False), (False, True)])
def test_the_logs_average_to_the_data_value(full, knowing):
    maze = Maze.draw(0, full=full, max_moves=30)
    rows = maze.logged_games(500, seed=2, knowing=knowing)
    mean = sum(map(row_return, rows)) / len(rows)
    assert mean == pytest.approx(maze.data_return(knowing=knowing), abs=1.6)
    few = (maze.logged_games(5, seed, knowing=knowing) for seed in (2, 3))
    assert rows[:5] == next(few) != next(few)
    lengths = [len(row["messages"]) for row in rows]
    assert max(lengths) == 60  # the last observation, after the end, is left out


def test_what_players_know():
    full = Maze.draw(0, max_moves=30)
    blind = Maze(full.cells, full.goal, full=False, max_moves=30)
    shown, known, unknown = (
        [[m["content"] for m in row["messages"][1::2]] for row in rows]
        for rows in (
            full.logged_games(9, seed=2),
            blind.logged_games(9, seed=2, knowing=True),
            blind.logged_games(9, seed=2),
        )
    )
    assert shown == known != unknown
    assert full.data_return([0.0]) == -sum(full.distance[c] - 1 for c in full.starts) / 24


def test_the_data_value_by_hand():
    """Two cells: a random player arrives with 1 of 4 moves."""
    maze = Maze(frozenset([(0, 0), (0, 1)]), (0, 1), max_moves=2)
    assert maze.data_return([1.0]) == -(3 / 4) - (3 / 4) ** 2
    assert maze.data_return([1.0, 0.0]) == maze.data_return([1.0]) / 2


@pytest.mark.parametrize("seed", range(20))
def test_drawn_mazes_are_corridors(seed):
    maze = Maze.draw(seed)
    assert len(maze.cells) == len(maze.distance) == 25
    doors = sum(maze.move(c, m) != c for c, m in itertools.product(maze.cells, MOVES))
    assert doors == 2 * 24  # a tree has one edge less than cells
    assert Maze.draw(seed) == maze != Maze.draw(seed + 20)


def test_environment():
    maze = corridor(full=True, max_moves=4)
    env = MazeEnv(maze)
    assert isinstance(env, Game)
    with pytest.raises(QvgptError, match="reset"):
        env.step(LEFT)
    assert env.reset(0) == env.reset(4) == "goal c. you a."
    for action, allowed, reward in [(UP, True, -1.0), ("fly", False, -4.0)]:
        assert env.allows(action) is allowed
        step = env.step(action)
        assert (step.observation, step.reward) == (maze.observe((0, 0)), reward)
    step = env.step(RIGHT)
    assert (step.observation, step.terminated) == ("goal c. you b.", False)
    step = env.step(RIGHT)
    assert (step.observation, step.reward, step.terminated) == (None, 0.0, True)
    env.reset(0)
    ends = [env.step(LEFT) for _ in range(4)]
    assert [(s.reward, s.terminated, s.truncated) for s in ends[2:]] == [
        (-1.0, False, False),
        (-1.0, True, False),
    ]
    env.reset(0)
    ends = [env.step("move") for _ in range(4)]  # what is no move counts for the limit too
    assert [(s.reward, s.terminated) for s in ends[2:]] == [(-4.0, False), (-4.0, True)]
    blind = corridor(full=False)
    assert blind.observe((0, 3)) == "walls up, down."
    open_cross = Maze(frozenset([(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]), (0, 1), full=False)
    assert open_cross.observe((1, 1)) == "walls none."


def test_faults():
    with pytest.raises(QvgptError, match="goal among them"):
        Maze(CORRIDOR, (1, 1))
    with pytest.raises(QvgptError, match="2 to 52 cells"):
        Maze(frozenset((0, column) for column in range(53)), (0, 0))
    with pytest.raises(QvgptError, match="must reach"):
        Maze(CORRIDOR | {(5, 5)}, (0, 0))
    with pytest.raises(QvgptError, match="4 moves away"):
        Maze(CORRIDOR, (0, 0), max_moves=3)
    with pytest.raises(QvgptError, match="no maze of 25"):
        Maze.draw(0, side=4)
    with pytest.raises(QvgptError, match="2 cells"):
        Maze.draw(0, num_cells=1)
    values = corridor(full=True).solve()
    with pytest.raises(QvgptError, match="no course"):
        values.v([(0, 0), (0, 1)], 9)
    with pytest.raises(QvgptError, match="moves left"):
        values.q([(0, 0)], 0)
    with pytest.raises(QvgptError, match="noises"):
        corridor(full=True).logged_games(1, noises=[2.0])
    assert NOISES[0] == 1.0
