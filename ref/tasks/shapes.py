"""Pictures of simple shapes with questions: Sort-of-CLEVR, and triangles of dots.

Source: Santoro et al. 2017 (arXiv 1706.01427), section 4, with the three-object questions of the code
released with the shared workspace of Goyal et al. 2022; there objects may be exactly 10 apart, where two
squares share an edge, and the distance from a line is taken along y. The triangles are a re-creation.
"""

import numpy as np

SIDE, HALF, COLORS = (
    75,
    5,
    ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 156, 0), (128, 128, 128), (255, 255, 0)),
)
YES, NO, RECTANGLE, CIRCLE, FIRST_COUNT = 0, 1, 2, 3, 4
BAND, TRIES = 12.0, 1000
KINDS = ("unary", "binary", "ternary")


def sort_of_clevr(key, n_images, *, questions=10):
    """dict: image [n, 75, 75, 3] in 0..1, question [n, 3q, 18], answer [n, 3q] in 0..9, kind [n, 3q] in 0..2.

    Six objects, one a colour, squares or circles of half-size 5 whose centres are more than 10 apart. In a
    question: one-hot of a first colour, a second colour (ternary), its kind, one of three subtypes. Answers:
    yes, no, rectangle, circle, then 1..6. unary: which shape; left half?; upper half? binary: shape of the
    closest; of the furthest; how many of the same shape (itself included). ternary, two of the first five
    colours: how many others in their box, plus one; is another within 12 pixels of their line; how many
    others make an obtuse triangle with them, plus one. key: seed.
    """
    if n_images < 0 or questions < 1:
        raise ValueError(f"need n_images >= 0 and questions >= 1, got {n_images} and {questions}")
    rng, rows = np.random.default_rng(key), 3 * questions
    image = np.ones((n_images, SIDE, SIDE, 3))
    question = np.zeros((n_images, rows, 18))
    answer, kind = np.zeros((2, n_images, rows), np.int64)
    for n in range(n_images):
        centers, round_ = _objects(rng)
        image[n] = draw(centers, round_)
        for r in range(rows):
            kind[n, r], subtype = r // questions, rng.integers(3)
            first, second = rng.permutation(5)[:2] if kind[n, r] == 2 else (rng.integers(6), None)
            answer[n, r] = answer_of(centers, round_, kind[n, r], subtype, first, second)
            question[n, r, [first, 12 + kind[n, r], 15 + subtype]] = 1
            if second is not None:
                question[n, r, 6 + second] = 1
    return {"image": image, "question": question, "answer": answer, "kind": kind}


def draw(centers, round_):
    """The picture [75, 75, 3] of six objects: centers [6, 2] as (x, y), round_ bool [6]."""
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.ones((SIDE, SIDE, 3))
    for (cx, cy), circle, color in zip(centers, round_, COLORS, strict=True):
        inside = np.maximum(np.abs(x - cx), np.abs(y - cy)) <= HALF
        if circle:
            inside = (x - cx) ** 2 + (y - cy) ** 2 <= HALF**2
        image[inside] = np.array(color) / 255
    return image


def answer_of(centers, round_, kind, subtype, first, second=None):
    """The class 0..9 of the answer: see `sort_of_clevr`."""
    here = centers[first].astype(float)
    shape = lambda i: CIRCLE if round_[i] else RECTANGLE
    if kind == 0:
        return shape(first) if subtype == 0 else (YES if here[subtype - 1] < SIDE / 2 else NO)
    others = [i for i in range(6) if i not in (first, second)]
    if kind == 1:
        if subtype == 2:
            return FIRST_COUNT + sum(round_[i] == round_[first] for i in others)
        far = [np.linalg.norm(centers[i] - here) for i in others]
        return shape(others[int(np.argmin(far) if subtype == 0 else np.argmax(far))])
    there, points = centers[second].astype(float), centers[others].astype(float)
    if subtype == 0:
        low, high = np.minimum(here, there), np.maximum(here, there)
        return FIRST_COUNT + int(((points >= low) & (points <= high)).all(axis=1).sum())
    line = there - here
    if subtype == 1:
        off = np.abs(line[0] * (points - here)[:, 1] - line[1] * (points - here)[:, 0]) / np.linalg.norm(line)
        return YES if (off <= BAND).any() else NO
    sides = np.stack(
        [np.sum((points - here) ** 2, 1), np.sum((points - there) ** 2, 1), np.full(4, line @ line)]
    )
    longest = sides.max(axis=0)
    flat = np.isclose(np.abs(line[0] * (points - here)[:, 1] - line[1] * (points - here)[:, 0]), 0)
    return FIRST_COUNT + int(((longest >= sides.sum(axis=0) - longest) & ~flat).sum())


def triangles(key, n_images, *, dots=20, spread=1.2):
    """(image [n, 64, 64, 1] of 0 and 1, label int [n]): are three clusters of dots an equilateral triangle?

    Half of the triangles are equilateral in the mean (label 1); of the others the longest side is at least
    1.3 times the shortest. dots a cluster, with standard deviation `spread` in pixels.
    """
    if n_images < 0 or dots < 1 or spread < 0:
        raise ValueError(f"need n_images >= 0, dots >= 1 and spread >= 0, got {n_images}, {dots}, {spread}")
    rng, image = np.random.default_rng(key), np.zeros((n_images, 64, 64, 1))
    label = rng.integers(0, 2, n_images)
    for n in range(n_images):
        corners = _triangle(rng, label[n])
        at = np.rint(corners[:, None] + spread * rng.standard_normal((3, dots, 2))).astype(int).reshape(-1, 2)
        image[n, at[:, 1].clip(0, 63), at[:, 0].clip(0, 63)] = 1
    return image, label


def _objects(rng):
    """(centres int [6, 2], bool [6]), drawn until no two objects overlap."""
    centers = []
    for _ in range(TRIES):
        c = rng.integers(HALF, SIDE - HALF, 2)
        if all(np.sum((c - o) ** 2) > (2 * HALF) ** 2 for o in centers):
            centers.append(c)
        if len(centers) == 6:
            return np.array(centers), rng.random(6) < 0.5
    raise RuntimeError(f"no place for six objects in {TRIES} tries")


def _triangle(rng, equilateral):
    """Corners [3, 2] at least 5 pixels inside the picture, no two closer than 12."""
    for _ in range(TRIES):
        if equilateral:
            turn = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(3) / 3
            corners = rng.uniform(15, 49, 2) + rng.uniform(8, 25) * np.stack(
                [np.cos(turn), np.sin(turn)], axis=1
            )
        else:
            corners = rng.uniform(5, 58, (3, 2))
        sides = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
        inside = corners.min() >= 5 and corners.max() <= 58 and sides.min() >= 12
        if inside and (equilateral or sides.max() >= 1.3 * sides.min()):
            return corners
    raise RuntimeError(f"no triangle in {TRIES} tries")
