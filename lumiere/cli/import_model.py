"""`lumiere import`: make a run of a model from elsewhere."""

import sys
from typing import Annotated

from typer import Argument, Option

from lumiere.cli.console import print_json, show_note, stdout
from lumiere.cli.options import Json, RunsDir


def import_model(
    source: Annotated[
        str,
        Argument(metavar="SOURCE", help="A folder of Hugging Face, a name on its Hub, a GGUF file, or a state dict."),
    ],
    name: Annotated[str | None, Option(metavar="TAG", help="Tag the run with this name.")] = None,
    context_size: Annotated[
        int | None, Option(metavar="N", min=1, help="Lower the context size. \\[default: the source's]")
    ] = None,
    revision: Annotated[str | None, Option(metavar="REV", help="Take this branch, tag or commit of the Hub.")] = None,
    verify: Annotated[
        bool | None,
        Option("--verify/--no-verify", help="Compare with transformers. \\[default: if it is installed]"),
    ] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Make a run of a model from elsewhere, to generate, inspect, evaluate, fine-tune or export it.

    Reads Llama, Mistral, Qwen2, Qwen3, OLMo, GPT-2, GPT-NeoX (Pythia) and GPT-Neo models as safetensors, and Llama
    models as GGUF; also state dicts of nanoGPT and TransformerLens with a config.json beside them. No code of the
    model is run.

    Example: [bold]lumiere import HuggingFaceTB/SmolLM2-135M[/]
    """
    from lumiere.api.importing import import_model as make_run

    options = {"revision": revision, "context_size": context_size, "verify": verify}
    run = make_run(source, name=name, runs_dir=runs_dir, command=sys.argv, **options).run
    record = run.record
    if as_json:
        print_json({"run": run.name, "num_parameters": record.num_parameters, "source": record.source})
        return
    settings = run.load_config().model
    stdout().print(f"[bold]{run.name}[/]", highlight=False)
    stdout().print(
        f"{record.source['model_type']}, {record.num_parameters:,} parameters, {settings.num_layers} layers, "
        f"{settings.num_heads} heads, width {settings.embedding_size}, context {settings.context_size:,}",
        highlight=False,
    )
    if record.source["verified"]:
        stdout().print(f"log-probabilities as in transformers, error {record.source['error']:.0e}", highlight=False)
    else:
        show_note("not compared with transformers")
    steps = [run.command(*words, "--run", run.id) for words in (("generate",), ("inspect", "heads"))]
    stdout().print("Next steps: " + "\n            ".join(steps), markup=False, highlight=False)
