"""Small worlds: their rules written out, purity, limits, and that memory is what they ask for."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ref.tasks.environments import (
    AppleMaze,
    CartPole,
    MemoryLength,
    NumberPad,
    RepeatPrevious,
    TMaze,
    env_reset,
    env_step,
)

ALL = (MemoryLength(3), TMaze(4, 2), RepeatPrevious(2, 3, 9), NumberPad(3, 4), AppleMaze(4, 30), CartPole(50))
ids = lambda spec: type(spec).__name__


def play(spec, policy, seed=0):
    """Rewards, observations and states of one episode; policy(state, observation) -> action."""
    state, obs = env_reset(seed, spec)
    states, seen, rewards, done = [state], [obs], [], False
    while not done:
        state, obs, reward, done = env_step(state, policy(state, obs))
        states.append(state)
        seen.append(obs)
        rewards.append(reward)
    return rewards, seen, states


@pytest.mark.parametrize("spec", ALL, ids=ids)
def test_environments_are_pure_and_end(spec):
    rng = np.random.default_rng(0)
    actions = iter(rng.integers(0, spec.actions, 1000))
    rewards, seen, states = play(spec, lambda s, o: next(actions))
    assert len(rewards) <= spec.limit
    assert all(o.shape == (spec.observations,) and o.dtype == np.float64 for o in seen)
    before = states[0]
    again = [env_step(before, 0) for _ in range(2)]
    np.testing.assert_array_equal(again[0][1], again[1][1])
    assert before.t == 0  # nothing was changed
    over = env_step(states[-1], 0)
    assert over[2:] == (0.0, True)
    assert over[0] is states[-1]
    np.testing.assert_array_equal(env_reset(5, spec)[1], env_reset(5, spec)[1])


def test_environments_memory_length_pays_for_the_cue_alone():
    for seed in range(6):
        _, first = env_reset(seed, MemoryLength(4))
        cue = first[1]
        assert cue in (-1, 1)
        for right in (True, False):
            rewards, seen, _ = play(MemoryLength(4), lambda s, o, c=cue, r=right: int((c > 0) == r), seed)
            assert rewards == [0, 0, 0, 0, 1 if right else -1]
            assert all(o[1] == 0 for o in seen[1:])
            assert [o[2] for o in seen[:5]] == [0, 0, 0, 0, 1]
            np.testing.assert_allclose([o[0] for o in seen[:5]], 1 - np.arange(5) / 5)
    assert play(MemoryLength(0), lambda s, o: int(o[1] > 0))[0] == [1]


def test_environments_t_maze_walks_then_turns():
    for seed in range(6):
        spec, (_, first) = TMaze(5, 3), env_reset(seed, TMaze(5, 3))
        turn = lambda s, o, cue=first[0]: 1 if not o[1] else (2 if cue > 0 else 3)
        rewards, seen, _ = play(spec, turn, seed)
        assert rewards == [0] * 5 + [4]
        wrong = lambda s, o, cue=first[0]: 1 if not o[1] else (3 if cue > 0 else 2)
        assert play(spec, wrong, seed)[0] == [0] * 5 + [-1]
        assert len({tuple(o[2:]) for o in seen[:-1]}) > 1
        idle = play(spec, lambda s, o: 0, seed)
        assert len(idle[0]) == spec.limit
        assert not any(idle[0])


def test_environments_repeat_previous_pays_one_for_all_right():
    spec, shown = RepeatPrevious(3, 4, 12), []

    def policy(state, obs):
        shown.append(int(obs.argmax()))
        return shown[-4] if len(shown) > 3 else 0

    rewards, _, _ = play(spec, policy)
    assert rewards[:3] == [0, 0, 0]
    np.testing.assert_allclose(sum(rewards), 1)


def test_environments_number_pad_pays_once_a_pass():
    spec = NumberPad(3, 4, 60)
    state, _ = env_reset(3, spec)
    order = state.secret
    assert len(set(order.tolist())) == 4
    steps = [np.abs(np.subtract(divmod(a, 3), divmod(b, 3))).max() for a, b in pairwise(order)]
    assert set(steps) == {1}
    go = lambda s, cell: next(a for a in range(9) if spec.move(int(s.place[0]), a) == cell)
    at = lambda s, *place: replace(s, place=np.array(place))
    beside = spec.around(int(order[0]))[0]
    state = at(state, beside, 0, 0)
    rewards = []
    for cell in order[:3]:
        state, obs, reward, _ = env_step(state, go(state, cell))
        rewards.append(reward)
    assert rewards == [1, 1, 1]
    assert obs[9:].sum() == 3  # three pads are lit
    stay = env_step(state, 8)[0]
    np.testing.assert_array_equal(stay.place, state.place)
    lost, _, reward, _ = env_step(state, go(state, order[1]))  # back: a wrong pad
    assert reward == 0
    assert lost.place[1] == 0
    lost = at(lost, beside, *lost.place[1:])
    lost, _, reward, _ = env_step(lost, go(lost, order[0]))
    assert (reward, lost.place[1]) == (0, 1)  # already paid in this pass
    full, _, reward, _ = env_step(state, go(state, order[3]))
    assert reward == 1
    np.testing.assert_array_equal(full.place[1:], 0)  # the next pass begins


def test_environments_apple_stays_where_it_is():
    spec = AppleMaze(4, 200)
    rng = np.random.default_rng(0)
    rewards, _, states = play(spec, lambda s, o: int(rng.integers(4)))
    assert len({int(s.secret) for s in states}) == 1
    assert sum(rewards) >= 2
    for before, after, reward in zip(states, states[1:], rewards, strict=False):
        assert int(before.place[0]) != int(before.secret)
        assert after.place[1] == reward
    row, column = divmod(int(states[0].secret), 4)

    def straight(s, o):
        r, c = divmod(int(s.place[0]), 4)
        return 2 if r > row else 3 if r < row else 0 if c > column else 1

    assert sum(play(spec, straight)[0]) > sum(rewards)  # who remembers eats more


def test_environments_pole_falls_unless_it_is_caught():
    spec = CartPole(200)
    fallen = play(spec, lambda s, o: 1)[0]
    assert len(fallen) < 15
    caught = play(spec, lambda s, o: int(o[2] + 0.5 * o[3] + 0.1 * o[1] + 0.05 * o[0] > 0))[0]
    assert len(caught) == 200
    # one push by the equations of motion, from rest at an angle of 0.1
    state = replace(env_reset(0, spec)[0], place=np.array([0.0, 0.0, 0.1, 0.0]))
    new = env_step(state, 1)[1]
    twist = (9.8 * np.sin(0.1) - np.cos(0.1) * 10 / 1.1) / (0.5 * (4 / 3 - 0.1 * np.cos(0.1) ** 2 / 1.1))
    accel = 10 / 1.1 - 0.05 * twist * np.cos(0.1) / 1.1
    np.testing.assert_allclose(new, [0, 0.02 * accel, 0.1, 0.02 * twist], rtol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        MemoryLength(-1),
        TMaze(0),
        RepeatPrevious(4, 4, 4),
        NumberPad(1),
        NumberPad(2, 5),
        AppleMaze(1),
        CartPole(0),
    ],
    ids=ids,
)
def test_environments_reject_sizes_that_make_no_world(spec):
    with pytest.raises(ValueError, match="spec has sizes that make no world"):
        env_reset(0, spec)


def test_environments_reject_strangers():
    with pytest.raises(ValueError, match="spec must be one of MemoryLength"):
        env_reset(0, "maze")
    state, _ = env_reset(0, MemoryLength(1))
    for action in (-1, 2, 0.5):
        with pytest.raises(ValueError, match=r"action must be an integer in 0\.\.1"):
            env_step(state, action)
