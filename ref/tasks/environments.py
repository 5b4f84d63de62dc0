"""Small worlds for agents with memory, as pure functions: all chance is drawn at reset and kept in the state.

Source: memory length as in bsuite (Osband et al. 2020); the T maze of Bakker 2002; repeat-previous as in
POPGym (Morad et al. 2023); the number pad and the apple maze after Parisotto et al. 2020 (arXiv 1910.06764),
re-created from their description; cart-pole of Barto, Sutton and Anderson 1983. A finished world stays as it
is, done, with reward 0.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class EnvState:
    """A world at one moment: its spec, steps taken, what moves, what was drawn for good, noise by step."""

    spec: object
    t: int
    place: np.ndarray
    secret: np.ndarray
    noise: np.ndarray
    done: bool = False


@dataclass(frozen=True)
class MemoryLength:
    """Tell at the end which sign was shown at the start, n steps before: reward +1 or -1 at the last step.

    Observation: time left in 1..0, the cue +-1 at the first step, 1 at the last, when the action counts (1
    for the cue +1). n = 0 shows and asks at once.
    """

    n: int = 10
    actions: int = 2
    observations: int = 3

    @property
    def limit(self):
        """Steps of an episode."""
        return self.n + 1

    def draw(self, rng):
        """(place, secret, noise)."""
        return np.zeros(0), rng.choice((-1.0, 1.0)), np.zeros((self.limit, 0))

    def observe(self, s):
        """[3]."""
        return np.array([1 - s.t / self.limit, s.secret * (s.t == 0), float(s.t == self.n)])

    def advance(self, s, action):
        """(place, reward, done)."""
        last = s.t == self.n
        return s.place, (1.0 if (action == 1) == (s.secret > 0) else -1.0) if last else 0.0, last


@dataclass(frozen=True)
class TMaze:
    """Walk a corridor and turn as a cue at its start said: +4 for the right turn, -1 for the wrong one.

    Actions: left, right, up, down. The cue +-1 (up or down) is seen at the first step only. Observation: the
    cue, 1 at the junction, and random signs that mean nothing. Walls stop; 4 (corridor + 1) steps are
    allowed.
    """

    corridor: int = 10
    distractors: int = 0
    actions: int = 4

    @property
    def observations(self):
        """Numbers in an observation."""
        return 2 + self.distractors

    @property
    def limit(self):
        """Steps of an episode."""
        return 4 * (self.corridor + 1)

    def draw(self, rng):
        """(place, secret, noise)."""
        return np.zeros(1), rng.choice((-1.0, 1.0)), rng.choice((-1.0, 1.0), (self.limit, self.distractors))

    def observe(self, s):
        """[2 + distractors]."""
        return np.concatenate(
            [[s.secret * (s.t == 0), s.place[0] == self.corridor], s.noise[min(s.t, self.limit - 1)]]
        )

    def advance(self, s, action):
        """(place, reward, done)."""
        if s.place[0] == self.corridor and action >= 2:
            return s.place, 4.0 if (action == 2) == (s.secret > 0) else -1.0, True
        step = {0: -1, 1: 1}.get(action, 0)
        return np.clip(s.place + step, 0, self.corridor), 0.0, False


@dataclass(frozen=True)
class RepeatPrevious:
    """Name the card shown k steps ago: +-1 / (length - k) a step from step k on, so that all right is 1."""

    k: int = 4
    cards: int = 4
    length: int = 24

    @property
    def actions(self):
        """One for each card."""
        return self.cards

    @property
    def observations(self):
        """One for each card."""
        return self.cards

    @property
    def limit(self):
        """Steps of an episode."""
        return self.length

    def draw(self, rng):
        """(place, secret, noise)."""
        return np.zeros(0), np.zeros(0), rng.integers(0, self.cards, (self.length, 1))

    def observe(self, s):
        """[cards], one of them 1."""
        return np.eye(self.cards)[s.noise[min(s.t, self.length - 1), 0]]

    def advance(self, s, action):
        """(place, reward, done)."""
        right = s.t >= self.k and action == s.noise[s.t - self.k, 0]
        reward = (1.0 if right else -1.0) / (self.length - self.k) if s.t >= self.k else 0.0
        return s.place, reward, False


@dataclass(frozen=True)
class NumberPad:
    """Step on pads of an n x n grid in a hidden order of `order` pads, each next to the one before it.

    Actions: the eight neighbours, then staying; walls stop. Stepping on the next pad of the order pays 1,
    once in a pass; on a wrong one clears the progress; the end of the order begins the next pass.
    Observation: where one stands, and which pads are lit (the progress).
    """

    n: int = 2
    order: int = 3
    limit: int = 40
    actions: int = 9

    @property
    def observations(self):
        """Numbers in an observation."""
        return 2 * self.n**2

    def draw(self, rng):
        """(place: cell, progress, paid; secret: the order of cells; noise)."""
        while True:  # a walk through neighbours may run into a corner
            path = [int(rng.integers(self.n**2))]
            while len(path) < self.order:
                free = [c for c in self.around(path[-1]) if c not in path]
                if not free:
                    break
                path.append(free[rng.integers(len(free))])
            if len(path) == self.order:
                break
        others = [c for c in range(self.n**2) if c != path[0]]
        return np.array([others[rng.integers(len(others))], 0, 0]), np.array(path), np.zeros((self.limit, 0))

    def around(self, cell):
        """The neighbours of a cell."""
        return sorted({self.move(cell, a) for a in range(8)} - {cell})

    def move(self, cell, action):
        """The cell after an action."""
        if action == 8:
            return cell
        row, column = divmod(cell, self.n)
        down, right = divmod(action + (action >= 4), 3)
        row, column = row + down - 1, column + right - 1
        return row * self.n + column if 0 <= row < self.n and 0 <= column < self.n else cell

    def observe(self, s):
        """[2 n n]."""
        lit = np.isin(np.arange(self.n**2), s.secret[: s.place[1]])
        return np.concatenate([np.arange(self.n**2) == s.place[0], lit]).astype(np.float64)

    def advance(self, s, action):
        """(place, reward, done)."""
        cell, progress, paid = (int(x) for x in s.place)
        new, reward = self.move(cell, action), 0.0
        if new != cell:
            progress = progress + 1 if new == s.secret[progress] else 0
            if progress > paid:
                reward, paid = 1.0, progress
        if progress == self.order:
            progress, paid = 0, 0
        return np.array([new, progress, paid]), reward, False


@dataclass(frozen=True)
class AppleMaze:
    """Find a hidden apple in a size x size room, +1, and be carried off to a random cell each time.

    Actions: left, right, up, down; walls stop. Every cell has a landmark of its own: the observation is where
    one stands and the last reward. The apple stays where it is, so that remembering pays.
    """

    size: int = 5
    limit: int = 60
    actions: int = 4

    @property
    def observations(self):
        """Numbers in an observation."""
        return self.size**2 + 1

    def draw(self, rng):
        """(place: cell, last reward; secret: the apple's cell; noise: where one is carried)."""
        apple = int(rng.integers(self.size**2))
        cells = rng.integers(0, self.size**2 - 1, (self.limit + 1, 1))
        cells = cells + (cells >= apple)  # never onto the apple
        return np.array([cells[-1, 0], 0]), np.array(apple), cells[:-1]

    def observe(self, s):
        """[size size + 1]."""
        return np.append(np.arange(self.size**2) == s.place[0], s.place[1]).astype(np.float64)

    def advance(self, s, action):
        """(place, reward, done)."""
        row, column = divmod(int(s.place[0]), self.size)
        row = int(np.clip(row + {2: -1, 3: 1}.get(action, 0), 0, self.size - 1))
        column = int(np.clip(column + {0: -1, 1: 1}.get(action, 0), 0, self.size - 1))
        cell = row * self.size + column
        found = cell == int(s.secret)
        return np.array([s.noise[s.t, 0] if found else cell, float(found)]), float(found), False


@dataclass(frozen=True)
class CartPole:
    """Keep a pole upright by pushing its cart left or right: +1 a step. All is seen: no memory needed.

    Observation: position, velocity, angle, angular velocity. Ends beyond 2.4 m or 12 degrees; Euler steps of
    0.02 s.
    """

    limit: int = 200
    actions: int = 2
    observations: int = 4

    def draw(self, rng):
        """(place, secret, noise)."""
        return rng.uniform(-0.05, 0.05, 4), np.zeros(0), np.zeros((self.limit, 0))

    def observe(self, s):
        """[4]."""
        return s.place

    def advance(self, s, action):
        """(place, reward, done): gravity 9.8, cart 1 kg, pole 0.1 kg of half length 0.5 m, force 10 N."""
        x, v, angle, spin = s.place
        sin, cos = np.sin(angle), np.cos(angle)
        push = ((10.0 if action == 1 else -10.0) + 0.05 * spin**2 * sin) / 1.1
        twist = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        accel = push - 0.05 * twist * cos / 1.1
        new = np.array([x + 0.02 * v, v + 0.02 * accel, angle + 0.02 * spin, spin + 0.02 * twist])
        return new, 1.0, bool(abs(new[0]) > 2.4 or abs(new[2]) > 12 * np.pi / 180)


SPECS = (MemoryLength, TMaze, RepeatPrevious, NumberPad, AppleMaze, CartPole)


def env_reset(key, spec):
    """(state, observation [spec.observations]) of a new episode. key: NumPy Generator or seed.

    spec: a MemoryLength, TMaze, RepeatPrevious, NumberPad, AppleMaze or CartPole.
    Raises: ValueError for another spec, or one whose sizes make no world.
    """
    _check_spec(spec)
    state = EnvState(spec, 0, *spec.draw(np.random.default_rng(key)))
    return state, np.asarray(spec.observe(state), np.float64)


def env_step(state, action):
    """(state, observation, reward, done) after an action in 0..spec.actions - 1; ValueError for others."""
    spec = state.spec
    if not 0 <= int(action) < spec.actions or int(action) != action:
        raise ValueError(f"action must be an integer in 0..{spec.actions - 1}, got {action}")
    if state.done:
        return state, np.asarray(spec.observe(state), np.float64), 0.0, True
    place, reward, over = spec.advance(state, int(action))
    over = bool(over or state.t + 1 >= spec.limit)
    state = replace(state, t=state.t + 1, place=place, done=over)
    return state, np.asarray(spec.observe(state), np.float64), float(reward), over


def _check_spec(spec):
    if not isinstance(spec, SPECS):
        raise ValueError(f"spec must be one of {', '.join(c.__name__ for c in SPECS)}, got {spec!r}")
    bad = {
        MemoryLength: lambda s: s.n < 0,
        TMaze: lambda s: s.corridor < 1 or s.distractors < 0,
        RepeatPrevious: lambda s: s.k < 0 or s.cards < 2 or s.length <= s.k,
        NumberPad: lambda s: s.n < 2 or not 1 <= s.order <= s.n**2 or s.limit < 1,
        AppleMaze: lambda s: s.size < 2 or s.limit < 1,
        CartPole: lambda s: s.limit < 1,
    }[type(spec)]
    if bad(spec):
        raise ValueError(f"spec has sizes that make no world: {spec}")
