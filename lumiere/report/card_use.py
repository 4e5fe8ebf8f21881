"""The sections of a model card that are there to be copied: code, commands, citation."""

from lumiere import __version__
from lumiere.report.card_facts import CardFacts, known_language
from lumiere.report.card_training import BUILT_IN
from lumiere.report.markdown import fenced

PROMPT = "Once upon a time"


def loading(facts: CardFacts) -> str:
    return (
        "With Lumiere installed from its source (`lumiere` on PyPI is another project) and the run's folder in "
        "`runs/`:\n\n"
        f"{fenced(our_example(facts), 'python')}\n\n"
        "Or by hand, in the way of the Lumiére model card:\n\n"
        f"{fenced(cards_example(facts), 'python')}\n\n"
        "From a shell:\n\n"
        f"{fenced(f'lumiere generate --run {facts.run_id} --prompt {PROMPT!r}', 'bash')}"
    )


def our_example(facts: CardFacts) -> str:
    return (
        "from lumiere.generation.decoding import generate\n"
        "from lumiere.persistence.runs import RunStore\n"
        "\n"
        f'run = RunStore().open("{facts.run_id}")\n'
        f'model, tokenizer = run.load_model("{facts.checkpoint}"), run.load_tokenizer()\n'
        f'print("".join(generate(model, tokenizer, "{PROMPT}", max_new_tokens=50, seed=0)))'
    )


def cards_example(facts: CardFacts) -> str:
    model = facts.config.model
    positions = ', positions="rotary"' if model.positions == "rotary" else ""
    return (
        "from lumiere.models.transformer import Transformer\n"
        "from lumiere.persistence.checkpoint_manager import CheckpointManager\n"
        "checkpoint_manager = CheckpointManager()\n"
        "\n"
        f'checkpoint = checkpoint_manager.load_checkpoint("{facts.run_name}", "{facts.checkpoint}")\n'
        f"model = Transformer(vocab_size={facts.config.tokenizer.vocab_size}, embedding_size={model.embedding_size}, "
        f"context_size={model.context_size},\n"
        f"                    num_layers={model.num_layers}, num_heads={model.num_heads}, d_key={model.d_key}, "
        f"d_value={model.d_value}, d_ff={model.d_ff}{positions})\n"
        'model.load_state_dict(checkpoint["model_state_dict"])\n'
        "model.eval()"
    )


def evaluating(facts: CardFacts) -> str:
    batches = facts.evaluation.batch_size
    command = f"lumiere eval {facts.run_id} --checkpoint {facts.checkpoint} --split validation --batch-size {batches}"
    return f"{fenced(command, 'bash')}\n\nIt needs the corpus as it was; `--text FILE` scores any other text."


def licence(facts: CardFacts) -> str:
    lines = [
        "Lumiere is under the MIT licence, and this card names it for the weights too. Whoever publishes them may "
        "choose another one in the first lines of this file.",
        "The corpus has a licence of its own."
        if facts.config.dataset.name not in BUILT_IN
        else "The corpus is made by Lumiere and has no other licence.",
    ]
    if known_language(facts.config.dataset) and facts.config.dataset.name != "stories":
        lines[-1] = "The corpus has a licence of its own: WikiText is under CC BY-SA 3.0 and the GFDL."
    return "\n\n".join(lines)


def citation(facts: CardFacts) -> str:
    """What CITATION.cff says, as BibTeX; that file is not part of an installed package."""
    versions = facts.record.get("versions")
    version = versions.get("lumiere") if isinstance(versions, dict) else None
    version = version if isinstance(version, str) and version.replace(".", "").isalnum() else __version__
    return fenced(
        "@software{lumiere,\n"
        "  title = {Lumiere: train small GPT-style transformers and look inside them},\n"
        "  author = {{The Lumiere authors}},\n"
        f"  version = {{{version}}},\n"
        "  license = {MIT}\n"
        "}",
        "bibtex",
    )
