"""Tokens beside a heat map, in a terminal and in a picture."""

LABEL_WIDTH = 12


def fitted(label: str) -> str:
    """The label, its end left out where it is too long."""
    return label if len(label) <= LABEL_WIDTH else label[: LABEL_WIDTH - 1] + "…"


def rank_label(rank: float) -> str:
    """`1,204`; `1,023.5` where tied tokens share their places."""
    return f"{rank:,.1f}".removesuffix(".0")
