"""`lumiere generate`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from lumiere.cli.console import open_model
from lumiere.cli.generate.settings import Settings, given
from lumiere.cli.options import CheckpointName, Device, Json, RunOption, RunsDir
from lumiere.errors import LumiereError

FAILED_CHECK = 3


def generate(
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="The beginning; - reads stdin. Without it the model begins by itself.",
        ),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--prompts", metavar="FILE", help="A prompt a line, or .jsonl with a key prompt; the answer is JSON Lines."
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="A session: a prompt a line, /help for the rest.")
    ] = False,
    run: RunOption = "latest",
    checkpoint: CheckpointName = "best",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest text, in tokens.")
    ] = 200,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--temperature", "-t", help="0 takes the likeliest token. \\[default: 0.8]"),
    ] = None,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--top-k", help="Draw from the k likeliest tokens."),
    ] = None,
    top_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--top-p", help="Draw from the likeliest tokens that hold this probability."),
    ] = None,
    min_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--min-p", help="Leave out tokens below this share of the likeliest one's probability."),
    ] = None,
    typical_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--typical-p", help="Draw from the most typical tokens that hold this probability."),
    ] = None,
    repetition_penalty: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--repetition-penalty", help="Above 1: what was said becomes less likely."),
    ] = None,
    no_repeat_ngram_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--no-repeat-ngram-size", help="No so many tokens in a row come twice."),
    ] = None,
    stop: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--stop", metavar="TEXT", help="End before this text. Repeatable."),
    ] = None,
    num_return_sequences: Annotated[
        int, typer.Option("--num-return-sequences", min=1, help="Texts for each prompt.")
    ] = 1,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seed", min=0, help="The same seed gives the same text."),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    num_beams: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--num-beams", min=2, help="Search for the likeliest text with so many beams, and draw nothing."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts that are made at once.")] = 64,
    logprobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--logprobs",
            min=0,
            metavar="N",
            help="Print each token's log-probability and the N most probable tokens: the model's own, at temperature 1 "
            "and before every other control, normalized over all tokens that can be generated.",
        ),
    ] = None,
    color: Annotated[bool, typer.Option("--color", help="Shade each token by its probability.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the cache with full forward passes; exit 3 if they differ.")
    ] = False,
    compile_step: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile; needs a C++ compiler.")
    ] = False,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Let a model write, and print the text as it comes.

    Example: [bold]lumiere generate --prompt "Once upon a time" --temperature 0.7 --top-k 40[/]
    """
    drawing = {
        "--temperature": temperature,
        "--top-k": top_k,
        "--top-p": top_p,
        "--min-p": min_p,
        "--typical-p": typical_p,
        "--seed": seed,
    }
    sources = given({"--prompt": prompt, "--prompts": prompts, "--interactive": interactive})
    refuse_both(*sources)
    refuse_useless(drawing, greedy, num_beams, {"--stop": stop, "--logprobs": logprobs, "--color": color})
    if interactive:
        session_only = {"--num-beams": num_beams, "--logprobs": logprobs, "--check": check, "--json": as_json}
        refuse_both("--interactive", *given(session_only | {"--num-return-sequences": num_return_sequences > 1}))
    if color:
        others = {"--json": as_json, "--prompts": prompts, "--logprobs": logprobs}
        refuse_both("--color", *given(others | {"--num-return-sequences": num_return_sequences > 1}))

    from lumiere.cli.console import show_note
    from lumiere.cli.generate.prompts import read_prompt, read_prompts
    from lumiere.generation.text import TextGenerator

    settings = Settings(
        temperature=0.0 if greedy else 0.8 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        seed=seed,
    )
    settings.check()
    texts = read_prompts(prompts) if prompts is not None else [read_prompt(prompt)]
    opened = open_model(run, checkpoint, device, runs_dir)
    generator = TextGenerator(opened.model, opened.tokenizer, compile_step, show_note)
    if interactive:
        from lumiere.cli.generate.interactive import Session

        Session(generator, settings, color).run()
        return

    from lumiere.cli.generate.output import Output

    output = Output(generator, settings, logprobs, color)
    if num_beams is not None:
        generations = output.search(texts, num_beams, num_return_sequences)
    elif as_json or prompts is not None or num_return_sequences > 1:
        generations = output.write_many(texts, num_return_sequences, batch_size)
    else:
        generations = iter([output.stream(texts[0])])
    shown = output.show(generations, as_lines=prompts is not None, as_json=as_json)
    if check and not output.check(shown):
        raise typer.Exit(FAILED_CHECK)


def refuse_both(*options: str) -> None:
    """Options of which one alone makes sense with the first.

    Raises:
        LumiereError: there are two.
    """
    if len(options) > 1:
        raise LumiereError(f"{options[0]} and {options[1]} do not go together", "leave one of them out")


def refuse_useless(
    drawing: dict[str, object], greedy: bool, num_beams: int | None, streaming: dict[str, object]
) -> None:
    """Options that would have no effect.

    Raises:
        LumiereError: there are some.
    """
    named = given(drawing)
    if num_beams is not None and (useless := [*named, *given({"--greedy": greedy}), *given(streaming)]):
        raise LumiereError(
            f"beam search draws nothing and has whole texts only, so {useless[0]} has no effect", "leave it out"
        )
    is_greedy = greedy or drawing["--temperature"] == 0
    if is_greedy and (useless := [name for name in named if name != "--temperature" or greedy]):
        useless = [name for name in useless if name != "--seed"]
        if useless:
            raise LumiereError(f"greedy takes the likeliest token, so {useless[0]} has no effect", "leave it out")
