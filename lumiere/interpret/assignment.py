"""The assignment problem: partners for all, at the least cost in total."""

import numpy as np


def cheapest_assignment(costs: np.ndarray) -> np.ndarray:
    """(M, 2) rows and columns, each at most once and as many as there can be, with the least sum of costs.

    The Hungarian method (Kuhn 1955, "The Hungarian Method for the Assignment Problem"; Munkres 1957) by shortest
    augmenting paths, O(n^2 m): rows come in one after the other, and potentials keep all reduced costs from being
    negative. Every assignment is compared, so no order of the rows and no greedy first choice decides.

    Args:
        costs: (N, M), finite.

    Raises:
        ValueError: a cost is not finite.
    """
    if not np.isfinite(costs).all():
        raise ValueError("every cost of an assignment must be a finite number")
    if costs.shape[0] > costs.shape[1]:
        pairs = cheapest_assignment(costs.T)[:, ::-1]
        return pairs[np.argsort(pairs[:, 0])]
    num_rows, num_columns = costs.shape
    row_potential, column_potential = np.zeros(num_rows), np.zeros(num_columns + 1)
    row_of = np.full(num_columns + 1, -1)  # the last column is where a path starts, and belongs to no cost
    for row in range(num_rows):
        row_of[num_columns] = row
        column = num_columns
        slack, reached_from = np.full(num_columns + 1, np.inf), np.full(num_columns + 1, num_columns)
        is_used = np.zeros(num_columns + 1, dtype=bool)
        while row_of[column] >= 0:
            is_used[column] = True
            reduced = costs[row_of[column]] - row_potential[row_of[column]] - column_potential[:-1]
            is_shorter = ~is_used[:-1] & (reduced < slack[:-1])
            slack[:-1][is_shorter] = reduced[is_shorter]
            reached_from[:-1][is_shorter] = column
            following = int(np.where(is_used[:-1], np.inf, slack[:-1]).argmin())
            step = slack[following]
            row_potential[row_of[is_used]] += step
            column_potential[is_used] -= step
            slack[~is_used] -= step
            column = following
        while column != num_columns:
            row_of[column] = row_of[reached_from[column]]
            column = int(reached_from[column])
    columns = np.flatnonzero(row_of[:-1] >= 0)
    pairs = np.stack([row_of[columns], columns], axis=1)
    return pairs[np.argsort(pairs[:, 0])]
