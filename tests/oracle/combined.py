"""Losses that are no means, their data, and the same in float64 over unpadded samples.

One small model for all: tokens to hidden units, their mean over a sample, two numbers a
token. `PARTS` and `COMBINE` are as a user writes them, `REFERENCE` is NumPy over lists,
each by the name of the loss. Gradients are differences of the reference, in float64.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl

FEATURES, HIDDEN, GROUPS, EXPERTS, SIZE = 3, 4, 4, 3, 5

# A mean of thousands of float32 numbers is good to 1e-7, their correlation to 1e-6.
VALUE_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 2e-5  # of the largest entry


class Sample(NamedTuple):
    x: np.ndarray  # [n, FEATURES]
    other: np.ndarray  # [n, FEATURES], another view
    y: np.ndarray  # [n, 2], NaN where not measured
    group: int
    time: float
    event: bool


def draw_samples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    times = rng.permutation(len(lengths)) + 0.5
    return [
        Sample(
            rng.normal(size=(n, FEATURES)).astype(np.float32),
            rng.normal(size=(n, FEATURES)).astype(np.float32),
            np.where(
                rng.random((n, 2)) < 0.2, np.nan, rng.normal(0.3, 1, (n, 2))
            ).astype(np.float32),
            i % GROUPS,
            float(times[i]),
            bool(rng.random() < 0.7),
        )
        for i, n in enumerate(lengths)
    ]


def draw_targets(rng, n):
    y = rng.normal(0.3, 1, (n, 2)).astype(np.float32)
    y[rng.random((n, 2)) < 0.2] = np.nan
    return y


def pad(samples):
    def padded(arrays, value):
        return wl.pad_ragged(arrays, size=SIZE, value=value)[0]

    return {
        "x": padded([s.x for s in samples], 1e3),
        "other": padded([s.other for s in samples], -1e3),
        "y": padded([s.y for s in samples], 1e3),
        "lengths": np.array([len(s.x) for s in samples], np.int32),
        "group": np.array([s.group for s in samples], np.int32),
        "time": np.array([s.time for s in samples], np.float32),
        "event": np.array([s.event for s in samples]),
    }


def draw_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "w": (FEATURES, HIDDEN),
        "v": (FEATURES, HIDDEN),
        "b": (HIDDEN,),
        "head": (HIDDEN, 2),
        "gate": (HIDDEN, EXPERTS),
        "log_scale": (),
        "s": (2,),
    }
    return {
        name: np.asarray(rng.normal(size=shape), np.float32)
        for name, shape in shapes.items()
    }


# ------------------------------------------------------------------- as users write it


def tokens(params, batch, kernel="w", of="x"):
    return jnp.tanh(batch[of] @ params[kernel] + params["b"])


def pooled(params, batch, kernel="w", of="x"):
    def mean(hidden, length):
        one_unit = functools.partial(wl.weighted_mean, lengths=length)
        return jax.vmap(one_unit, in_axes=1)(hidden).compute()

    return jax.vmap(mean)(tokens(params, batch, kernel, of), batch["lengths"])


def embedded(params, batch, kernel="w", of="x"):
    z = pooled(params, batch, kernel, of) + params["b"]
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def columns(params, batch):
    """The squared error of each column, a `WeightedMean` of [2]."""

    def of_column(prediction, y):
        where = wl.observed_mask(y)
        return wl.squared_error(prediction, y, lengths=batch["lengths"], where=where)

    prediction = tokens(params, batch) @ params["head"]
    return jax.vmap(of_column, in_axes=-1)(prediction, batch["y"])


def observed(params, batch):
    prediction = (tokens(params, batch) @ params["head"])[..., 0]
    where = wl.observed_mask(batch["y"][..., 0]) & wl.length_mask(
        batch["lengths"], SIZE
    )
    mean = functools.partial(wl.weighted_mean, where=where)
    return prediction, jnp.where(where, batch["y"][..., 0], 0), mean


def moments(params, batch):
    p, y, mean = observed(params, batch)
    return {
        "p": mean(p),
        "y": mean(y),
        "pp": mean(p * p),
        "yy": mean(y * y),
        "py": mean(p * y),
    }


def pearson(m, params):
    m = wl.compute(m)
    covariance = m["py"] - m["p"] * m["y"]
    return 1 - covariance / jnp.sqrt((m["pp"] - m["p"] ** 2) * (m["yy"] - m["y"] ** 2))


def overlaps(params, batch):
    p, y, mean = observed(params, batch)
    p, y = jax.nn.sigmoid(p), (y > 0.3).astype(p.dtype)
    return mean(p * y), mean(p + y)


def of_groups(params, batch):
    p, y, _ = observed(params, batch)
    measured = wl.observed_mask(batch["y"][..., 0])

    def of_group(group):
        where = measured & (batch["group"][:, None] == group)
        return wl.squared_error(p, y, lengths=batch["lengths"], where=where)

    return jax.vmap(of_group)(jnp.arange(GROUPS))


def alike(rows, params):
    """Supervised contrastive, Khosla et al."""
    logits = rows["z"] @ rows["z"].T / 0.5
    own = jnp.eye(len(logits), dtype=bool)
    logits = jnp.where(own, -jnp.inf, logits)
    same = (rows["group"][:, None] == rows["group"]) & ~own
    log_p = jnp.where(same, jax.nn.log_softmax(logits), 0)
    return -(log_p.sum(1) / same.sum(1)).mean()


def clip(rows, params):
    logits = jnp.exp(params["log_scale"]) * rows["image"] @ rows["text"].T
    of_images = jnp.diag(jax.nn.log_softmax(logits)).mean()
    return -(of_images + jnp.diag(jax.nn.log_softmax(logits.T)).mean()) / 2


def nt_xent(rows, params):
    z = jnp.concatenate([rows["image"], rows["text"]])
    n = len(z)
    logits = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, z @ z.T / 0.5)
    pairs = (jnp.arange(n) + n // 2) % n
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), pairs[:, None], 1).mean()


def cox(rows, params):
    at_risk = rows["time"] >= rows["time"][:, None]
    hazard = jax.nn.logsumexp(jnp.where(at_risk, rows["risk"], -jnp.inf), 1)
    return -jnp.mean(rows["risk"] - hazard, where=rows["event"])


def vicreg(rows, params):
    first, second = rows
    loss = jnp.mean((first - second) ** 2)
    for z in rows:
        z = z - z.mean(0)
        covariance = z.T @ z / (len(z) - 1)
        variance = jnp.diag(covariance)
        loss += jnp.maximum(0, 1 - jnp.sqrt(variance + 1e-4)).mean()
        loss += ((covariance**2).sum() - (variance**2).sum()) / HIDDEN
    return loss


def uncertain(m, params):
    means, s = m.compute(), params["s"]
    return (jnp.exp(-s) * means + s).sum()


def routed(params, batch):
    probs = jax.nn.softmax(tokens(params, batch) @ params["gate"])
    chosen = jax.nn.one_hot(probs.argmax(-1), EXPERTS)
    mean = jax.vmap(
        functools.partial(wl.weighted_mean, lengths=batch["lengths"]), in_axes=-1
    )
    return {"probs": mean(probs), "share": mean(chosen)}


def two_views(params, batch):
    return {
        "image": embedded(params, batch),
        "text": embedded(params, batch, "v", "other"),
    }


PARTS = {
    "rmse by column": columns,
    "pearson": moments,
    "dice": overlaps,
    "soft maximum over groups": of_groups,
    "supervised contrastive": lambda params, batch: {
        "z": embedded(params, batch),
        "group": batch["group"],
    },
    "clip": two_views,
    "nt-xent": two_views,
    "cox": lambda params, batch: {
        "risk": embedded(params, batch) @ params["head"][:, 0],
        "time": batch["time"],
        "event": batch["event"],
    },
    "vicreg": lambda params, batch: (
        pooled(params, batch),
        pooled(params, batch, "v", "other"),
    ),
    "uncertainty": columns,
    "balance": routed,
}
COMBINE = {
    "rmse by column": lambda m, params: jnp.sqrt(m.compute()).mean(),
    "pearson": pearson,
    "dice": lambda m, params: 1 - 2 * m[0].total / m[1].total,
    "soft maximum over groups": lambda m, params: jax.nn.logsumexp(m.compute()),
    "supervised contrastive": alike,
    "clip": clip,
    "nt-xent": nt_xent,
    "cox": cox,
    "vicreg": vicreg,
    "uncertainty": uncertain,
    "balance": lambda m, params: (
        EXPERTS * (m["probs"].compute() * m["share"].compute()).sum()
    ),
}
NAMES = list(PARTS)

# ------------------------------------------------- in float64, over unpadded samples


class Values(NamedTuple):
    """What the reference losses are made of."""

    hidden: np.ndarray  # of all tokens
    predictions: np.ndarray  # [tokens, 2]
    targets: np.ndarray  # [tokens, 2]
    groups: np.ndarray  # of the tokens
    means: tuple[np.ndarray, np.ndarray]  # of the samples, of both views
    unit: tuple[np.ndarray, np.ndarray]  # the same with a bias, of length 1
    samples: list[Sample]
    params: dict[str, np.ndarray]


def evaluate(params, samples):
    def view(kernel, of):
        hidden = [
            np.tanh(getattr(s, of).astype(float) @ params[kernel] + params["b"])
            for s in samples
        ]
        means = [h.mean(0) if len(h) else np.zeros(HIDDEN) for h in hidden]
        unit = [(m + params["b"]) / np.linalg.norm(m + params["b"]) for m in means]
        return np.concatenate(hidden), np.array(means), np.array(unit)

    hidden, first, first_unit = view("w", "x")
    _, second, second_unit = view("v", "other")
    return Values(
        hidden,
        hidden @ params["head"],
        np.concatenate([s.y for s in samples]).astype(float),
        np.concatenate([[s.group] * len(s.x) for s in samples]),
        (first, second),
        (first_unit, second_unit),
        samples,
        params,
    )


def mean_squares(v):
    return [
        np.mean([(p - y) ** 2 for p, y in zip(*column, strict=True) if y == y])
        for column in zip(v.predictions.T, v.targets.T, strict=True)
    ]


def measured(v):
    keep = ~np.isnan(v.targets[:, 0])
    return v.predictions[keep, 0], v.targets[keep, 0]


def log_shares(logits):
    return logits - np.log(np.exp(logits).sum())


def reference_dice(v):
    p, y = measured(v)
    p, y = 1 / (1 + np.exp(-p)), (y > np.float32(0.3)).astype(float)
    return 1 - 2 * (p * y).sum() / (p + y).sum()


def reference_groups(v):
    losses = []
    for g in range(GROUPS):
        keep = (v.groups == g) & ~np.isnan(v.targets[:, 0])
        losses.append(np.mean((v.predictions[keep, 0] - v.targets[keep, 0]) ** 2))
    return np.log(np.exp(losses).sum())


def reference_alike(v):
    z, groups = v.unit[0], [s.group for s in v.samples]
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        log_p = log_shares(z[others] @ z[i] / 0.5)
        losses.append(
            -np.mean(
                [
                    q
                    for j, q in zip(others, log_p, strict=True)
                    if groups[j] == groups[i]
                ]
            )
        )
    return np.mean(losses)


def reference_clip(v):
    logits = np.exp(v.params["log_scale"]) * v.unit[0] @ v.unit[1].T
    rows = [log_shares(row)[i] for i, row in enumerate(logits)]
    columns = [log_shares(column)[i] for i, column in enumerate(logits.T)]
    return -(np.mean(rows) + np.mean(columns)) / 2


def reference_nt_xent(v):
    z = np.concatenate(v.unit)
    n = len(z)
    losses = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        pair = others.index((i + n // 2) % n)
        losses.append(-log_shares(z[others] @ z[i] / 0.5)[pair])
    return np.mean(losses)


def reference_cox(v):
    risk = v.unit[0] @ v.params["head"][:, 0]
    losses = []
    for i, own in enumerate(v.samples):
        if own.event:
            at_risk = [
                r for r, s in zip(risk, v.samples, strict=True) if s.time >= own.time
            ]
            losses.append(np.log(np.exp(at_risk).sum()) - risk[i])
    return np.mean(losses)


def reference_vicreg(v):
    loss = np.mean((v.means[0] - v.means[1]) ** 2)
    for z in v.means:
        covariance = np.cov(z.T)
        spread = np.sqrt(np.diag(covariance) + 1e-4)
        loss += np.maximum(0, 1 - spread).mean()
        loss += (
            sum(
                covariance[i, j] ** 2
                for i in range(HIDDEN)
                for j in range(HIDDEN)
                if i != j
            )
            / HIDDEN
        )
    return loss


def reference_balance(v):
    logits = v.hidden @ v.params["gate"]
    probs = np.exp(np.array([log_shares(row) for row in logits]))
    share = np.bincount(probs.argmax(1), minlength=EXPERTS) / len(probs)
    return EXPERTS * (share * probs.mean(0)).sum()


REFERENCE = {
    "rmse by column": lambda v: np.mean(np.sqrt(mean_squares(v))),
    "pearson": lambda v: 1 - np.corrcoef(*measured(v))[0, 1],
    "dice": reference_dice,
    "soft maximum over groups": reference_groups,
    "supervised contrastive": reference_alike,
    "clip": reference_clip,
    "nt-xent": reference_nt_xent,
    "cox": reference_cox,
    "vicreg": reference_vicreg,
    "uncertainty": lambda v: sum(
        np.exp(-s) * m + s for s, m in zip(v.params["s"], mean_squares(v), strict=True)
    ),
    "balance": reference_balance,
}


def oracle(params, samples, names=NAMES):
    """Value and gradient of each loss, by name, in float64."""
    wide = {name: np.asarray(x, np.float64) for name, x in params.items()}

    def values(params):
        made = evaluate(params, samples)
        return {name: REFERENCE[name](made) for name in names}

    whole = values(wide)
    grads = {name: {k: np.zeros(x.shape) for k, x in wide.items()} for name in names}
    step = 1e-6  # whose square, and the rounding of 1e-16 over it, are below 1e-9
    for key, array in wide.items():
        for index in np.ndindex(array.shape):
            ends = []
            for sign in 1, -1:
                moved = array.copy()
                moved[index] += sign * step
                ends.append(values(wide | {key: moved}))
            for name in names:
                grads[name][key][index] = (ends[0][name] - ends[1][name]) / (2 * step)
    return {name: (whole[name], grads[name]) for name in names}


def condition(name, params, samples):
    """How many times the rounding of its terms is in a loss; 1 but where they cancel.

    A variance by means of squares has that of the squares.
    """
    if name != "pearson":
        return 1.0
    wide = {key: np.asarray(x, np.float64) for key, x in params.items()}
    return max(
        1, *(np.mean(x**2) / np.var(x) for x in measured(evaluate(wide, samples)))
    )


def assert_exact(name, result, expected, condition=1.0):
    """Compares a value and a gradient to those of the `oracle`.

    A gradient that is 0 but for rounding has the rounding of a loss: 1e-7 of its value.
    """
    (value, grads), (expected_value, expected_grads) = result, expected[name]
    np.testing.assert_allclose(
        value, expected_value, condition * VALUE_TOLERANCE, err_msg=name
    )
    largest = max(np.abs(x).max() for x in expected_grads.values())
    for key, grad in grads.items():
        np.testing.assert_allclose(
            grad,
            expected_grads[key],
            rtol=0,
            atol=condition * GRADIENT_TOLERANCE * largest + 1e-7 * abs(expected_value),
            err_msg=f"{name}: {key}",
        )
