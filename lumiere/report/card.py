"""A run's model card, in Markdown with the header of the Hugging Face Hub.

Everything in it is derived from the run. What comes from files stands in code spans, where nothing is markup.
"""

from lumiere.report.card_facts import CardFacts
from lumiere.report.card_header import header
from lumiere.report.card_model import architecture, improvements, overview, parameter_table, strengths
from lumiere.report.card_results import limitations, results
from lumiere.report.card_training import dataset, tokenization, training
from lumiere.report.card_use import citation, evaluating, licence, loading

SECTIONS = {
    "Overview": overview,
    "Architecture": architecture,
    "Improvements over a plain transformer": improvements,
    "Parameters": parameter_table,
    "Dataset": dataset,
    "Tokenization": tokenization,
    "Training": training,
    "Validation results": results,
    "Strengths": strengths,
    "Limitations": limitations,
    "How to load it": loading,
    "How to evaluate it": evaluating,
    "Licence": licence,
    "Citation": citation,
}


def model_card(facts: CardFacts) -> str:
    """The card as a `README.md` for the Hub: YAML header and Markdown, ending in a line end."""
    sections = [f"## {title}\n\n{section(facts)}" for title, section in SECTIONS.items()]
    return "\n\n".join([f"---\n{header(facts)}---", f"# Lumiere {facts.run_id}", *sections]) + "\n"
