"""The oracle: each loss as its formula, one element at a time, in float64.

Nothing of the package, of JAX or of optax is used here, and nothing is padded: a loss
takes one element, numbers or NumPy arrays, and returns a float; `weighted_mean` adds
up a list of them. Derivatives are numeric, of the fourth order, good to about 1e-9.
"""

import itertools
import math

import numpy as np


def weighted_mean(values, weights):
    """Returns the total, the weight and the mean of two lists; 0 where nothing is."""
    total = math.fsum(w * v for v, w in zip(values, weights, strict=True))
    weight = math.fsum(weights)
    return total, weight, total / weight if weight else 0.0


def derivative(function, step=1e-4):
    """Differentiates at 0 a function of a number; what it returns may be an array."""
    near, far = (function(h) - function(-h) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def gradient(function, argument):
    """Differentiates ``function`` at ``argument``, a number or an array."""
    argument = np.asarray(argument, np.float64)
    result = np.zeros(argument.shape)
    for index in np.ndindex(argument.shape):
        unit = np.zeros(argument.shape)
        unit[index] = 1
        result[index] = derivative(lambda h, unit=unit: function(argument + h * unit))
    return result


def gradients(loss, element, differentiable):
    """Differentiates ``loss`` of one ``element`` in each differentiable argument."""
    return [
        gradient(lambda x, i=i: loss(*element[:i], x, *element[i + 1 :]), element[i])
        for i in differentiable
    ]


def second_derivatives(loss, element, differentiable, tangents):
    """Differentiates `gradients` in the direction of ``tangents``."""

    def moved(h, k):
        arguments = list(element)
        for i, tangent in zip(differentiable, tangents, strict=True):
            arguments[i] = arguments[i] + h * tangent
        return gradients(loss, arguments, differentiable)[k]

    return [derivative(lambda h, k=k: moved(h, k)) for k in range(len(tangents))]


# --------------------------------------------------------------------- regression


def identity(value):
    return value


def absolute_error(prediction, target):
    return abs(prediction - target)


def squared_error(prediction, target):
    return (prediction - target) ** 2


def l2_loss(prediction, target):
    return (prediction - target) ** 2 / 2


def huber_loss(prediction, target, delta=1.0):
    error = abs(prediction - target)
    return error**2 / 2 if error <= delta else delta * (error - delta / 2)


def log_cosh(prediction, target):
    return np.log(np.cosh(prediction - target))


def quantile_loss(prediction, target, quantile=0.5):
    under = target - prediction
    return quantile * under if under > 0 else (quantile - 1) * under


def cosine_distance(prediction, target):
    norms = np.sqrt((prediction**2).sum()) * np.sqrt((target**2).sum())
    return 1 - (prediction * target).sum() / norms


def poisson_nll(prediction, target, log_input=True, full=False, eps=1e-8):
    rate = np.exp(prediction) if log_input else prediction
    log_rate = prediction if log_input else np.log(prediction + eps)
    loss = rate - target * log_rate
    if full and target > 1:
        loss += target * np.log(target) - target + np.log(2 * np.pi * target) / 2
    return loss


def gaussian_nll(mean, target, variance, full=False, eps=1e-6):
    variance = max(variance, eps)
    loss = (np.log(variance) + (mean - target) ** 2 / variance) / 2
    return loss + np.log(2 * np.pi) / 2 if full else loss


# ------------------------------------------------------------- binary classification


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def smooth_l1_loss(prediction, target, beta=1.0):
    error = abs(prediction - target)
    return error**2 / beta / 2 if error < beta else error - beta / 2


def hinge_embedding_loss(distance, target, margin=1.0):
    return distance if target == 1 else max(0, margin - distance)


def margin_ranking_loss(first, second, target, margin=0.0):
    return max(0, -target * (first - second) + margin)


def soft_margin_loss(logit, target):
    return np.logaddexp(0, -target * logit)


def cosine_embedding_loss(first, second, target, margin=0.0):
    cosine = 1 - cosine_distance(first, second)
    return 1 - cosine if target == 1 else max(0, cosine - margin)


def multi_margin_loss(scores, label, p=1, margin=1.0):
    others = [x for v, x in enumerate(scores) if v != label]
    return sum(max(0, margin - scores[label] + x) ** p for x in others) / len(scores)


def multilabel_margin_loss(scores, labels):
    own = list(itertools.takewhile(lambda label: label != -1, labels))
    others = [x for v, x in enumerate(scores) if v not in own]
    pairs = itertools.product((scores[label] for label in own), others)
    return sum(max(0, 1 - x + other) for x, other in pairs) / len(scores)


def multilabel_soft_margin_loss(logits, labels, class_weights):
    return np.mean(
        [
            weight * sigmoid_binary_cross_entropy(logit, label)
            for weight, logit, label in zip(class_weights, logits, labels, strict=True)
        ]
    )


def binary_cross_entropy(probability, label):
    return -label * np.log(probability) - (1 - label) * np.log(1 - probability)


def nll_loss(log_probs, label):
    return -log_probs[label]


def triplet_margin_with_distance_loss(
    anchor, positive, negative, margin=1.0, swap=False
):
    def distance(a, b):
        return np.sqrt(((a - b + 1e-6) ** 2).sum())

    far = distance(anchor, negative)
    if swap:
        far = min(far, distance(positive, negative))
    return max(distance(anchor, positive) - far + margin, 0)


def sigmoid_binary_cross_entropy(logit, label, pos_weight=1):
    return -pos_weight * label * np.log(sigmoid(logit)) - (1 - label) * np.log(
        sigmoid(-logit)
    )


def sigmoid_focal_loss(logit, label, alpha=None, gamma=2.0):
    missed = label * sigmoid(-logit) + (1 - label) * sigmoid(logit)
    loss = missed**gamma * sigmoid_binary_cross_entropy(logit, label)
    factor = 1 if alpha is None else alpha * label + (1 - alpha) * (1 - label)
    return factor * loss


def hinge_loss(score, target):
    return max(0.0, 1 - score * target)


def perceptron_loss(score, target):
    return max(0.0, -score * target)


def sparsemax_loss(logit, label):
    x = -logit if label else logit
    return 0.0 if x <= -1 else x if x >= 1 else (x + 1) ** 2 / 4


# --------------------------------------------------------- multiclass classification


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def softmax_cross_entropy(logits, label, label_smoothing=0, class_weights=1):
    label = (1 - label_smoothing) * label + label_smoothing / len(logits)
    return -(class_weights * label * log_softmax(logits)).sum()


def safe_softmax_cross_entropy(logits, label):
    return -sum(y * x for y, x in zip(label, log_softmax(logits), strict=True) if y)


def softmax_cross_entropy_with_integer_labels(
    logits, label, label_smoothing=0.0, z_loss=0.0
):
    log_probabilities = log_softmax(logits)
    share = np.full(logits.shape, label_smoothing / logits.size)
    share[label] += 1 - label_smoothing
    lse = logits[0] - log_probabilities[0]
    return -(share * log_probabilities).sum() + z_loss * lse**2


def softmax_z_loss(logits):
    lse = logits[0] - log_softmax(logits)[0]
    return lse**2


def poly_loss_cross_entropy(logits, label, epsilon=2.0):
    probabilities = np.exp(log_softmax(logits))
    missed = 1 - (label * probabilities).sum()
    return softmax_cross_entropy(logits, label) + epsilon * missed


def multiclass_hinge_loss(scores, label):
    margins = [x + (v != label) for v, x in enumerate(scores)]
    return max(margins) - scores[label]


def multiclass_perceptron_loss(scores, label):
    return max(scores) - scores[label]


def multiclass_sparsemax_loss(scores, label):
    # The projection on the simplex moves all scores by one threshold and clips.
    descending = sorted(scores, reverse=True)
    thresholds = [(sum(descending[:k]) - 1) / k for k in range(1, len(descending) + 1)]
    support = sum(x > t for x, t in zip(descending, thresholds, strict=True))
    p = np.maximum(scores - thresholds[support - 1], 0)
    return (p * scores).sum() + (1 - (p**2).sum()) / 2 - scores[label]


# ------------------------------------------------------------------- distributions


def kl_divergence(log_prediction, target):
    return sum(
        t * (math.log(t) - p) for p, t in zip(log_prediction, target, strict=True) if t
    )


def kl_divergence_with_log_targets(log_prediction, log_target):
    return (np.exp(log_target) * (log_target - log_prediction)).sum()


def generalized_kl_divergence(log_prediction, target):
    return kl_divergence(log_prediction, target) + (
        np.exp(log_prediction).sum() - target.sum()
    )


# ------------------------------------------------------------- embeddings, sequences


def triplet_margin_loss(
    anchor, positive, negative, norm_degree=2, margin=1.0, eps=1e-6
):
    def distance(a, b):
        return ((abs(a - b) ** norm_degree).sum() + eps) ** (1 / norm_degree)

    return max(distance(anchor, positive) - distance(anchor, negative) + margin, 0)


def ctc_loss(logits, logit_paddings, labels, label_paddings, blank_id=0):
    """Adds up the probabilities of all the paths that collapse to the labels."""
    frames = [
        log_softmax(x) for x, pad in zip(logits, logit_paddings, strict=True) if not pad
    ]
    labels = [y for y, pad in zip(labels, label_paddings, strict=True) if not pad]
    probability = 0.0
    for path in itertools.product(range(logits.shape[-1]), repeat=len(frames)):
        collapsed = [v for v, _ in itertools.groupby(path) if v != blank_id]
        if collapsed == labels:
            probability += math.exp(
                sum(x[v] for x, v in zip(frames, path, strict=True))
            )
    return -math.log(probability)
