"""Standard errors of means over tokens, with documents as the sampling unit.

Windows of one document resemble each other, so treating windows or batches as independent makes errors too small.

Shapes: U quantity, S sequence, D document.
"""

import numpy as np

FEW_DOCUMENTS = 20
"""Below this, intervals use Student's t, and the output says that the documents are few."""
NORMAL_975 = 1.960
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262),
    *(2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101),
)
"""The 97.5 % quantiles of Student's t distribution with 1 to 18 degrees of freedom."""


def half_width(num_documents: int) -> float:
    """Return how many standard errors a 95 % interval extends to each side.

    Args:
        num_documents: at least 2.
    """
    return T_975[num_documents - 2] if num_documents < FEW_DOCUMENTS else NORMAL_975


def clustered_means(
    sums_US: np.ndarray, counts_S: np.ndarray, documents_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return means over tokens and their standard errors, clustered by document.

    The standard error is that of a ratio of sums over D documents (Cochran 1977, "Sampling Techniques", equation 2.46):
    `sqrt(D / (D - 1) sum (sum_d - mean count_d)^2) / sum count_d`.

    Args:
        sums_US: the sum of each quantity over the tokens of each sequence.
        counts_S: the number of these tokens.
        documents_S: which document each sequence is cut from.

    Returns:
        means, standard errors: (U,) both; the errors are NaN for a single document.
    """
    numbers, documents_S = np.unique(documents_S, return_inverse=True)
    order = np.argsort(documents_S, kind="stable")
    starts_D = np.searchsorted(documents_S[order], np.arange(len(numbers)))
    sums_UD = np.add.reduceat(sums_US[:, order], starts_D, axis=1)
    counts_D = np.add.reduceat(counts_S[order], starts_D)
    means_U = sums_UD.sum(1) / counts_D.sum()
    if len(numbers) < 2:
        return means_U, np.full_like(means_U, np.nan)
    squares_U = np.square(sums_UD - means_U[:, None] * counts_D).sum(1)
    return means_U, np.sqrt(len(numbers) / (len(numbers) - 1) * squares_U) / counts_D.sum()
