"""Tokens beside a heat map, in a terminal and in a picture."""

LABEL_WIDTH = 12


def fitted(label: str) -> str:
    """The label, its end left out where it is too long."""
    return label if len(label) <= LABEL_WIDTH else label[: LABEL_WIDTH - 1] + "…"
