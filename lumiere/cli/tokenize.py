"""`lumiere tokenize`."""

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from lumiere.cli.console import escape, print_json, show_note, stdout, table
from lumiere.cli.options import Config, Json, Overrides

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig
    from lumiere.data.dataset import TokenizedCorpus
    from lumiere.data.tokenizer import Tokenizer

TOKEN_STYLES = ("black on bright_cyan", "black on bright_yellow")
COLUMNS = {"documents": ",", "tokens": ",", "bytes_per_token": ".2f", "windows": ",", "padding_share": ".1%"}


def tokenize(
    config: Config,
    overrides: Overrides = None,
    text: Annotated[str | None, Option("--text", metavar="TEXT", help="Show the tokens of this text.")] = None,
    verify: Annotated[bool, Option("--verify", help="Check the cached ids against their checksums.")] = False,
    as_json: Json = False,
) -> None:
    """Train the tokenizer of a config and encode its corpus, or show what is cached.

    [bold]lumiere train[/] does this by itself. Tokens show a space as ·, a line end as ↵ and a tab as ⇥.

    Example: [bold]lumiere tokenize tiny --text "Once upon a time"[/]
    """
    from lumiere.cli.progress import CorpusProgress
    from lumiere.config.loader import load_config
    from lumiere.data.dataset import tokenize_corpus
    from lumiere.data.foreign_tokenizer import existing_tokenizer, fitted

    resolved = load_config(config, overrides or ())
    tokenizer = existing_tokenizer(resolved.tokenizer)
    resolved = resolved.model_copy(update={"tokenizer": fitted(resolved.tokenizer, tokenizer)})
    with CorpusProgress() as progress:
        corpus = tokenize_corpus(resolved, progress, verify=verify, tokenizer=tokenizer)
    if text is not None:
        show_text(text, corpus.tokenizer, as_json)
        return
    facts = summary(corpus, resolved)
    if as_json:
        print_json(facts)
        return
    title = " ".join(filter(None, [facts["dataset"], facts["subset"]]))
    stdout().print(f"[bold]{escape(title)}[/]")
    rows = [["split", *(key.replace("_", " ").removesuffix(" share") for key in COLUMNS)]]
    rows += [
        [name, *(format(split[key], form) for key, form in COLUMNS.items())] for name, split in facts["splits"].items()
    ]
    stdout().print(table(rows), end="")
    used, rows = facts["num_tokens_used"], facts["vocab_size"]
    stdout().print(f"vocabulary   {used:,} tokens" + (f", fewer than the {rows:,} asked for" if used < rows else ""))
    stdout().print(f"fingerprint  {facts['fingerprint'][:16]}" + (" (from the cache)" if corpus.from_cache else ""))


def show_text(text: str, tokenizer: "Tokenizer", as_json: bool) -> None:
    """Print the tokens of `text` and their ids, without the start token of a document."""
    from lumiere.data.text import plain

    text = plain(text)
    ids = tokenizer.encode(text)
    labels = [tokenizer.label(token) for token in ids]
    if as_json:
        print_json({"text": text, "tokens": labels, "ids": ids})
        return
    # Alternating colors show the borders of tokens; without colors the bars do.
    pieces = [f"[{TOKEN_STYLES[i % 2]}]{escape(label)}[/]" for i, label in enumerate(labels)]
    stdout().print("|".join(pieces))
    stdout().print(" ".join(map(str, ids)))
    show_note(f"{len(ids)} tokens, {len(text.encode()) / max(len(ids), 1):.2f} bytes per token")


def summary(corpus: "TokenizedCorpus", config: "RunConfig") -> dict[str, Any]:
    """Return the facts of the encoded corpus, split by split."""
    splits = {}
    for name, split in corpus.splits.items():
        facts, windows = split.facts, corpus.windows(name, config)
        splits[name] = {
            "documents": facts.num_documents,
            "tokens": facts.num_tokens,
            "bytes": facts.num_bytes,
            "bytes_per_token": facts.num_bytes / facts.num_tokens,
            "windows": len(windows),
            "padding_share": windows.padding_share,
        }
    return {
        "dataset": config.dataset.name,
        "subset": config.dataset.subset,
        "fingerprint": corpus.fingerprint,
        "from_cache": corpus.from_cache,
        "num_tokens_used": len(corpus.tokenizer),
        "vocab_size": config.tokenizer.vocab_size,
        "splits": splits,
    }
