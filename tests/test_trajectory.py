"""The one time convention: what a decision is, whose a reward is, and where values bootstrap."""

from dataclasses import replace

import pytest
import torch

from qvgpt.errors import QvgptError
from qvgpt.trajectory import (
    Trajectory,
    _pack,
    centred,
    collate,
    fingerprint,
    mean_return,
    repeated_share,
)

END = 99


def actions(*flags):
    return [bool(f) for f in flags]


def test_decisions_skip_observations():
    episode = Trajectory(
        tokens=[1, 2, 10, 11, 3, 4, 12, 13],
        is_action=actions(0, 0, 1, 1, 0, 0, 1, 1),
        reward=[0.0] * 7 + [1.0],
        terminated=True,
    )
    short = Trajectory([1, 10], actions(0, 1), [0.0, 5.0], terminated=False)
    batch = collate([episode, short], pad_id=7)
    assert batch.tokens[1].tolist() == [1, 10, 7, 7, 7, 7, 7, 7]
    assert batch.attention_mask.sum(1).tolist() == [8, 2]
    assert batch.state_index.tolist() == [[1, 2, 5, 6, 7], [0, 1, 0, 0, 0]]
    assert batch.action.tolist() == [[10, 11, 12, 13], [10, 0, 0, 0]]
    assert batch.nonterminal.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.ends_turn.tolist() == [actions(0, 1, 0, 1), actions(0, 0, 0, 0)]
    assert batch.mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert batch.reward.tolist() == [[0, 0, 0, 1], [5, 0, 0, 0]]
    assert batch.reward.dtype == torch.float32


def test_mean_return_counts_each_decision_with_what_is_still_to_come():
    late = Trajectory([1, 2, 3, 4, 5], actions(0, 1, 1, 0, 1), [0.0, 1.0, 0.0, -2.0, 4.0], True)
    early = Trajectory([1, 2], actions(0, 1), [0.0, 9.0], True)
    assert mean_return([late]) == pytest.approx((3 + 2 + 4) / 3)
    assert mean_return([late, early]) == pytest.approx((3 + 2 + 4 + 9) / 4)


def test_the_picture_at_the_head_of_the_file():
    episode = Trajectory(
        list(range(8)), actions(0, 0, 1, 1, 0, 0, 1, 1), [0.0] * 5 + [-1.0, 0.0, 1.0], True
    )
    batch = collate([episode])
    assert batch.reward.tolist() == [[0, -1, 0, 1]]  # the observation's, to the decision before
    assert batch.ends_turn.tolist() == [actions(0, 1, 0, 1)]


def test_rewards_of_several_observation_tokens_add_up():
    reward = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    episode = Trajectory([1, 10, 2, 3, 11, 4], actions(0, 1, 0, 0, 1, 0), reward, True)
    batch = collate([episode])
    assert batch.reward.tolist() == [[7, 24]]
    assert batch.reward.sum() == episode.total_reward
    assert batch.state_index.tolist() == [[0, 3, 5]]
    assert batch.nonterminal.tolist() == [[1, 0]]


def test_p06_truncated_within_a_turn_bootstraps():
    episode = Trajectory([1, 10, 11], actions(0, 1, 1), [0.0] * 3, terminated=False)
    batch = collate([episode], end_ids=[END])
    assert batch.mask.tolist() == [[True, True]]
    assert batch.nonterminal.tolist() == [[1, 1]]
    assert batch.ends_turn.tolist() == [[False, False]]
    assert batch.state_index.tolist() == [[0, 1, 2]]


def test_truncated_after_a_whole_turn_has_no_target():
    episode = Trajectory([1, 10, END], actions(0, 1, 1), [0.0] * 3, terminated=False)
    batch = collate([episode], end_ids=[END])
    assert batch.mask.tolist() == [[True, False]]
    assert batch.nonterminal.tolist() == [[1, 1]]
    assert batch.ends_turn.tolist() == [[False, True]]


def test_truncated_after_an_observation_bootstraps_from_it():
    episode = Trajectory([1, 10, END, 5, 6], actions(0, 1, 1, 0, 0), [0.0] * 5, terminated=False)
    batch = collate([episode], end_ids=[END])
    assert batch.mask.tolist() == [[True, True]]
    assert batch.nonterminal.tolist() == [[1, 1]]
    assert batch.ends_turn.tolist() == [[False, True]]
    assert batch.state_index.tolist() == [[0, 1, 4]]


def test_p07_terminated_after_the_end_token_counts():
    episode = Trajectory([1, 10, END], actions(0, 1, 1), [0.0, 0.0, 1.0], terminated=True)
    batch = collate([episode], end_ids=[END])
    assert batch.mask.all()
    assert batch.nonterminal.tolist() == [[1, 0]]


def test_bad_trajectories_are_refused():
    with pytest.raises(QvgptError, match="needs a token before its first action"):
        collate([Trajectory([10, 11], actions(1, 1), [0.0, 1.0], True)])
    with pytest.raises(QvgptError, match="and an action"):
        collate([Trajectory([1, 2], actions(0, 0), [0.0, 0.0], True)])
    with pytest.raises(QvgptError, match="belongs to no decision"):
        collate([Trajectory([1, 10], actions(0, 1), [1.0, 1.0], True)])
    with pytest.raises(QvgptError, match="empty batch"):
        collate([])


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(QvgptError, match="at each place, not 3, 2, 3 of them"):
        Trajectory([1, 2, 3], [False, True], [0.0] * 3, True)


def test_prompt_and_return():
    episode = Trajectory([1, 2, 10, 3], actions(0, 0, 1, 0), [0.0, 0.0, 0.5, 0.25], True)
    assert episode.prompt == (1, 2)
    assert episode.total_reward == 0.75


def test_centred_returns_say_which_text_of_a_prompt_is_better():
    def text(prompt, reward, length=2):
        actions = [7] * length
        is_action = [False] * len(prompt) + [True] * length
        rewards = [0.0] * (len(is_action) - 2) + [0.25, reward - 0.25]
        return Trajectory([*prompt, *actions], is_action, rewards, True)

    texts = [text([1, 5], 1.0), text([1, 6], 0.5), text([1, 5], 0.0, 3), text([1, 5], 0.2)]
    found = centred(texts)
    assert [t.total_reward for t in found] == pytest.approx([0.6, 0.0, -0.4, -0.2])
    assert [list(t.reward[:-1]) for t in found] == [list(t.reward[:-1]) for t in texts]
    assert [t.tokens for t in found] == [t.tokens for t in texts]


def test_a_fingerprint_sees_every_part_of_a_text():
    base = Trajectory([1, 5, 6], [False, True, True], [0.0, 0.0, 1.0], True)
    changes = [
        {"tokens": [1, 5, 7]},
        {"is_action": [False, False, True]},
        {"reward": [0.0, 1.0, 0.0]},
        {"terminated": False},
    ]
    prints = {fingerprint([base])} | {fingerprint([replace(base, **c)]) for c in changes}
    prints |= {fingerprint([base, base]), fingerprint([])}
    assert len(prints) == 7
    assert fingerprint([base]) == fingerprint([replace(base)])


def test_packed_texts_share_rows():
    texts = [
        Trajectory([1, 10, 11], actions(0, 1, 1), [0.0, 1.0, 2.0], True),
        Trajectory([2] * 6 + [12], actions(*[0] * 6, 1), [0.0] * 6 + [3.0], True),
        Trajectory([3, 13, 14, 15], actions(0, 1, 1, 1), [0.0] * 4, False),
        Trajectory([4, 16], actions(0, 1), [0.0, 1.0], True),
    ]
    batch, plain = collate(texts, packed=True), collate(texts)
    assert batch.tokens.tolist() == [
        [2, 2, 2, 2, 2, 2, 12, 4, 16],
        [3, 13, 14, 15, 1, 10, 11, 0, 0],
    ]
    assert batch.attention_mask.sum(1).tolist() == [9, 7]
    assert batch.row.tolist() == [1, 0, 1, 0]
    assert batch.positions is not None
    assert batch.positions[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0]
    assert batch.text.tolist() == [[1] * 7 + [3] * 2, [2] * 4 + [0] * 5]
    assert batch.state_index.tolist() == [[4, 5, 6, 0], [5, 6, 0, 0], [0, 1, 2, 3], [7, 8, 0, 0]]
    assert batch.predicted.tolist() == [
        actions(1, 1, 1, 1, 1, 1, 0, 1),
        actions(1, 1, 1, 0, 1, 1, 0, 0),
    ]
    assert plain.positions is None
    assert plain.predicted.tolist() == plain.attention_mask[:, 1:].tolist()
    for name in ("action", "reward", "nonterminal", "ends_turn", "mask"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))


def test_texts_of_one_prompt_share_a_row_that_holds_it_once():
    texts = [
        Trajectory([1, 2, 10, 11], actions(0, 0, 1, 1), [0.0, 0.0, 1.0, 2.0], True),
        Trajectory([3, 12], actions(0, 1), [0.0, 3.0], True),
        Trajectory([1, 2, 13, 4, 14], actions(0, 0, 1, 0, 1), [0.0] * 4 + [5.0], False),
        Trajectory([1, 2, 3, 15], actions(0, 0, 0, 1), [0.0] * 3 + [6.0], True),  # a longer prompt
    ]
    batch, plain = collate(texts, shared=True), collate(texts)
    assert batch.tokens.tolist() == [
        [1, 2, 10, 11, 13, 4, 14],
        [3, 12, 0, 0, 0, 0, 0],
        [1, 2, 3, 15, 0, 0, 0],
    ]
    assert batch.positions is not None
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.row.tolist() == [0, 1, 0, 2]
    assert batch.text[0].tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert batch.attention_mask.sum(1).tolist() == [7, 2, 4]
    assert batch.state_index.tolist() == [[1, 2, 3], [0, 1, 0], [1, 5, 6], [2, 3, 0]]
    for name in ("action", "reward", "nonterminal", "ends_turn", "mask"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    assert repeated_share(texts) == 2 / 15
    assert repeated_share([]) == 0


def test_packed_rows_are_nearly_full_and_hold_every_text_once():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 32):
        for _ in range(20):
            length = torch.randint(2, 250, (count,), generator=generator).tolist()
            rows = _pack(length)
            assert sorted(i for row in rows for i in row) == list(range(count))
            filled = [sum(length[i] for i in row) for row in rows]
            assert all(rows)
            assert max(filled) <= 2 * max(length)
            assert count < 32 or sum(length) > 0.95 * len(rows) * max(filled)
