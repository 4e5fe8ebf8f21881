"""`lumiere inspect attention`."""

from typing import TYPE_CHECKING

from lumiere.cli.console import out, show_note
from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.cli.inspect.options import Heads, Layers, parse_indices

if TYPE_CHECKING:
    import numpy as np

    from lumiere.interpret.attention import AttentionPatterns


@analysis(text=True)
def attention(subject: Subject, layer: Layers = None, head: Heads = None) -> "Analysis[AttentionPatterns]":
    """Where does each head look? Rows are tokens, columns the tokens that they take information from."""
    from lumiere.interpret.attention import attention_patterns

    shape = subject.opened.config.model
    layers = parse_indices(layer, shape.num_layers, "layer")
    heads = parse_indices(head, shape.num_heads, "head")
    tokens, labels = subject.tokens, subject.labels
    return Analysis(
        compute=lambda model: attention_patterns(model, tokens, layers, heads),
        show=lambda result: show(result, labels),
    )


def show(result: "AttentionPatterns", labels: list[str]) -> None:
    from lumiere.cli.heatmap import LEGEND

    for row, layer in enumerate(result.layers):
        for column, head in enumerate(result.heads):
            show_head(result.patterns[row, column], labels, f"L{layer}H{head}")
    out().print(f"share of a row: {LEGEND}")


def show_head(weights: "np.ndarray", labels: list[str], name: str) -> None:
    """The heat map of one head, under a line that says what is striking."""
    from lumiere.cli.heatmap import LABEL_WIDTH, heatmap

    size = len(labels)
    shown = min(size, max(1, out().width - LABEL_WIDTH - 1))
    first_token, previous, current = weights[1:, 0], weights.diagonal(-1), weights.diagonal()[1:]
    shares = {"first token": first_token, "previous token": previous, "itself": current}
    summary = ", ".join(f"{name} {share.mean():.0%}" for name, share in shares.items()) if size > 1 else ""
    out().print(f"[bold]{name}[/]  {summary}")
    if shown < size:
        show_note(f"the terminal has room for the last {shown} of {size} tokens")
    out().print(heatmap(weights[size - shown :, size - shown :], labels[size - shown :], out().width))
