"""`lumiere inspect`: one command an analysis."""

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lumiere.cli.console import escape, guarded, out, print_json, show_note
from lumiere.cli.loading import OpenedModel, open_model
from lumiere.cli.options import CheckpointName, Device, Json, RunOption, RunsDir
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.interpret.attention import AttentionPatterns

DEFAULT_TOKENS = 32
"""Tokens of the validation split that are shown where no prompt is given: what fits on a screen."""

app = typer.Typer(no_args_is_help=True, help="Look inside a model: one command an analysis.")


@app.callback()
def about() -> None:
    """Look inside a model: one command an analysis."""


@app.command()
@guarded
def attention(
    layer: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--layer", "-l", help="The block, counted from 0. [default: the last]"),
    ] = None,
    head: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--head", help="The head, counted from 0. [default: all]"),
    ] = None,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--prompt", "-p", help="The text to look at. [default: the start of the validation split]"),
    ] = None,
    run: RunOption = "latest",
    checkpoint: CheckpointName = "best",
    device: Device = "cpu",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Where does each head look? Rows are tokens, columns the tokens that they take information from."""
    from lumiere.cli.heatmap import LEGEND
    from lumiere.interpret.attention import attention_patterns

    opened = open_model(run, checkpoint, device, runs_dir)
    shape = opened.config.model
    layer = check_index("layer", shape.num_layers - 1 if layer is None else layer, shape.num_layers)
    heads = range(shape.num_heads) if head is None else [check_index("head", head, shape.num_heads)]
    tokens, source = tokens_to_inspect(opened, prompt)
    result = attention_patterns(opened.model, tokens)
    labels = [opened.tokenizer.label(token) for token in result.tokens]
    if as_json:
        print_json(
            {
                "schema_version": 1,
                "analysis": "attention",
                "run": opened.run.name,
                "checkpoint": opened.checkpoint,
                "step": opened.step,
                "source": source,
                "token_ids": list(result.tokens),
                "tokens": labels,
                "layer": layer,
                "heads": list(heads),
                "patterns": result.patterns[layer, list(heads)].tolist(),
                "receipts": result.receipts,
            }
        )
        return
    out().print(f"[bold]{opened.run.name}[/], checkpoint {opened.checkpoint} (step {opened.step:,})")
    out().print(f"{escape(source)}: {len(tokens)} tokens; token ids {' '.join(map(str, tokens))}\n", soft_wrap=False)
    for number in heads:
        show_head(result, labels, layer, number)
    out().print(f"share of a row: {LEGEND}")
    receipts = result.receipts
    out().print(
        f"receipts: rows sum to 1 within {receipts['rows_sum_to_1']:.0e}; "
        f"largest weight on a later token {receipts['no_weight_on_the_future']:g}"
    )


def show_head(result: "AttentionPatterns", labels: list[str], layer: int, head: int) -> None:
    """The heat map of one head, under a line that says what is striking."""
    from lumiere.cli.heatmap import LABEL_WIDTH, heatmap

    weights = result.patterns[layer, head]
    size = len(labels)
    shown = min(size, max(1, out().width - LABEL_WIDTH - 1))
    first_token, previous, current = weights[1:, 0], weights.diagonal(-1), weights.diagonal()[1:]
    shares = {"first token": first_token, "previous token": previous, "itself": current}
    summary = ", ".join(f"{name} {share.mean():.0%}" for name, share in shares.items()) if size > 1 else ""
    out().print(f"[bold]L{layer}H{head}[/]  {summary}")
    if shown < size:
        show_note(f"the terminal has room for the last {shown} of {size} tokens")
    out().print(heatmap(weights[size - shown :, size - shown :], labels[size - shown :], out().width))


def tokens_to_inspect(opened: OpenedModel, prompt: str | None) -> tuple[list[int], str]:
    """The ids to look at and where they come from: the prompt, or else always the same validation window.

    Raises:
        LumiereError: if the prompt is empty or longer than the context.
    """
    import numpy as np

    from lumiere.data.dataset import tokenize_corpus
    from lumiere.data.tokenizer import SOT

    context_size = opened.config.model.context_size
    if prompt is None:
        windows = tokenize_corpus(opened.config).windows("validation", opened.config)
        tokens, lengths = windows.cut(np.array([0]))
        count = min(int(lengths[0]), context_size, DEFAULT_TOKENS)
        return tokens[0, :count].tolist(), f"start of the validation split of {opened.config.dataset.name}"
    if not prompt.strip():
        raise LumiereError("the prompt is empty", "give it some text, or leave it out for the validation split")
    tokens = [SOT, *opened.tokenizer.encode(prompt)]
    if len(tokens) > context_size:
        raise LumiereError(
            f"the prompt has {len(tokens)} tokens with its start token, the model sees {context_size}",
            "shorten it; lumiere tokenize CONFIG --text shows how a text is split",
        )
    return tokens, "prompt"


def check_index(name: str, index: int, count: int) -> int:
    """`index`, which counts layers or heads from 0.

    Raises:
        LumiereError: if the model has no such layer or head.
    """
    if not 0 <= index < count:
        raise LumiereError(f"there is no {name} {index}", f"this model has the {name}s 0 to {count - 1}")
    return index
