"""What all analyses share: their common options, the model, the output, the receipts and the exit code.

A command is a function that takes a `Subject` and its own options and returns an `Analysis`: how to compute it and
how to show it. `analysis` makes a command of it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import typer

from lumiere.cli.console import escape, guarded, open_model, print_json, show_note, stderr, stdout
from lumiere.cli.inspect import options
from lumiere.cli.inspect.options import Output, Verify
from lumiere.cli.inspect.vocabulary import token_label
from lumiere.cli.options import CheckpointName, Device, Json, RunOption, RunsDir
from lumiere.errors import LumiereError
from lumiere.persistence.loading import OpenedModel

if TYPE_CHECKING:
    from lumiere.interpret.result import Receipt, Result
    from lumiere.models.transformer import Transformer
    from lumiere.report.figures.figure import Picture

CHECK_FAILED = 3

AnyResult = TypeVar("AnyResult", bound="Result")


@dataclass(frozen=True)
class Subject:
    """What is looked at: a model and, where the analysis wants one, a text.

    Attributes:
        text: the values of `TEXT_OPTIONS`.
        seed: of all that is drawn at random.
        other: the second model, where two are compared.
    """

    opened: OpenedModel
    text: Mapping[str, Any]
    seed: int
    other: OpenedModel | None = None

    @cached_property
    def chosen(self) -> tuple[tuple[int, ...], str]:
        """The ids and where they come from, found when they are first asked for."""
        from lumiere.cli.inspect.texts import choose_text

        return choose_text(self.opened, **self.text, seed=self.seed)

    @property
    def tokens(self) -> tuple[int, ...]:
        """(T,) the ids of the text."""
        return self.chosen[0]

    @property
    def labels(self) -> list[str]:
        """(T,) the tokens as they are printed."""
        return [self.opened.tokenizer.label(token) for token in self.tokens]

    def label(self, token: int) -> str:
        """Any token as it is printed."""
        return token_label(self.opened.tokenizer, token)

    @property
    def has_text(self) -> bool:
        """Whether the analysis looked at one text, which is then told with the result."""
        return "chosen" in self.__dict__


@dataclass(frozen=True)
class Analysis(Generic[AnyResult]):
    """How to compute a result, how to show it, and how to draw it.

    Attributes:
        compute: pure, so that `--verify` can call it again with the same model in float64.
        show: prints the result for people; what it comes from and its receipts are printed around it.
        draw: the result as a picture, for `-o FILE.svg`; a function of lumiere/report/figures/ or beside it.
        source: what was looked at, in words, where it is not one text.
        about: more facts for the JSON.
    """

    compute: "Callable[[Transformer], AnyResult]"
    show: Callable[[AnyResult], None]
    draw: "Callable[[AnyResult], Picture]"
    source: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


TEXT_OPTIONS = [
    keyword("prompt", options.Prompt, None),
    keyword("file", options.TextFile, None),
    keyword("window", options.Window, None),
    keyword("random", options.Random, None),
]
COMMON_OPTIONS = [
    keyword("seed", options.Seed, 0),
    keyword("run", RunOption, "latest"),
    keyword("checkpoint", CheckpointName, "best"),
    keyword("device", Device, "cpu"),
    keyword("verify", Verify, False),
    keyword("output", Output, None),
    keyword("as_json", Json, False),
    keyword("runs_dir", RunsDir, None),
]
PAIR = [
    keyword("run", options.FirstModel, inspect.Parameter.empty),
    keyword("other", options.SecondModel, inspect.Parameter.empty),
]


def analysis(
    *, text: bool, whole_run: bool = False, pair: bool = False
) -> Callable[[Callable[..., Analysis[Any]]], Callable[..., None]]:
    """Make a command of `describe(subject, its own options) -> Analysis`, with the options that all share.

    Args:
        text: whether it looks at one text, and so has `--prompt`, `--file`, `--val` and `--random`.
        whole_run: whether it looks at all snapshots of a run, and so has no `--checkpoint`: the model is the last one.
        pair: whether it compares two models, which are then arguments instead of `--run`.
    """
    without = {name for name, is_so in (("checkpoint", whole_run), ("run", pair)) if is_so}
    common_options = [option for option in COMMON_OPTIONS if option.name not in without]
    shared = [*(PAIR if pair else []), *(TEXT_OPTIONS if text else []), *common_options]

    def decorate(describe: Callable[..., Analysis[Any]]) -> Callable[..., None]:
        own = list(inspect.signature(describe).parameters.values())[1:]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*own, *shared]]

        @guarded
        def command(**values: Any) -> None:
            common = {parameter.name: values.pop(parameter.name) for parameter in shared}
            run_analysis(describe, values, common)

        command.__name__ = describe.__name__
        command.__doc__ = describe.__doc__
        # Typer reads the signature; a function of keywords has none of its own.
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def run_analysis(describe: Callable[..., Analysis[Any]], own: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """Open, compute, verify, then print or write; exit with 3 if a law does not hold."""
    from lumiere.device import keep_freed_memory
    from lumiere.interpret.result import agreement
    from lumiere.report.results import check_export, payload, save_result

    keep_freed_memory()  # a pass that keeps its activations frees them at its end, as a step of training does
    if common["output"] is not None:
        check_export(common["output"])
    opened, other = open_models(common)
    text = {option.name: common[option.name] for option in TEXT_OPTIONS if option.name in common}
    subject = Subject(opened, text, common["seed"], other)
    described = describe(subject, **own)
    result = described.compute(opened.model)
    if common["verify"]:
        result = with_receipt(result, agreement(result, described.compute(doubled(opened.model))))
    about = facts(describe.__name__, subject, described)
    if common["output"] is not None:
        save_result(common["output"], result, about, lambda: described.draw(result))
        show_note(f"written to {common['output']}")
    if common["as_json"]:
        print_json(payload(result, about))
    else:
        show_heading(subject, described)
        described.show(result)
        show_receipts(result.receipts)
    if not result.holds:
        broken = "; ".join(receipt.law for receipt in result.receipts if not receipt.holds)
        stderr().print(f"[bold red]failed:[/] {escape(broken)}")
        raise typer.Exit(CHECK_FAILED)


def open_models(common: Mapping[str, Any]) -> tuple[OpenedModel, OpenedModel | None]:
    """The model that is looked at, and the one that it is compared with."""
    place = common["device"], common["runs_dir"]
    if "other" not in common:
        checkpoint = common.get("checkpoint") or last_snapshot(common["run"], common["runs_dir"])
        return open_model(common["run"], checkpoint, *place), None
    named = [split_reference(common[side], common["checkpoint"]) for side in ("run", "other")]
    first, second = (open_model(reference, checkpoint, *place) for reference, checkpoint in named)
    return first, second


def split_reference(reference: str, checkpoint: str) -> tuple[str, str]:
    """The run and the checkpoint of `RUN@CHECKPOINT`; `checkpoint` where none is named.

    Raises:
        LumiereError: one of the two is empty.
    """
    run, at, named = reference.partition("@")
    if not run or (at and not named):
        raise LumiereError(f"{reference!r} names no checkpoint of a run", "write RUN or RUN@CHECKPOINT: latest@500")
    return run, named or checkpoint


def last_snapshot(reference: str, runs_dir: str | None) -> str:
    """The name of a run's last snapshot.

    Raises:
        LumiereError: there is no such run, or it has kept none.
    """
    from lumiere.persistence.checkpoint_manager import NAMES, checkpoint_names
    from lumiere.persistence.runs import RunStore

    run = RunStore(runs_dir).open(reference)
    snapshots = [name for name in checkpoint_names(run) if name not in NAMES]
    if not snapshots:
        raise LumiereError(
            f"run {run.id} has no snapshots", "train with training.snapshots=true, and do not prune them"
        )
    return snapshots[-1]


def doubled(model: "Transformer") -> "Transformer":
    """A copy of the model in float64, on the CPU, since not every device has it."""
    from copy import deepcopy

    return deepcopy(model).cpu().double()


def with_receipt(result: AnyResult, receipt: Any) -> AnyResult:
    from dataclasses import replace

    return replace(result, receipts=(*result.receipts, receipt))


def facts(name: str, subject: Subject, described: Analysis[Any]) -> dict[str, Any]:
    """Where a result comes from, so that it can be made again and compared."""
    from lumiere import __version__

    opened = subject.opened
    weight = opened.model.token_embedding.weight
    about = {
        "analysis": name,
        "lumiere_version": __version__,
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "weights_sha256": opened.weights_sha256,
        "tokenizer_sha256": opened.tokenizer.fingerprint,
        "corpus_sha256": opened.run.record.corpus_sha256,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "seed": subject.seed,
        "source": described.source,
    }
    if subject.other is not None:
        about["other"] = {
            "run": subject.other.run.name,
            "checkpoint": subject.other.checkpoint,
            "step": subject.other.step,
            "weights_sha256": subject.other.weights_sha256,
            "tokenizer_sha256": subject.other.tokenizer.fingerprint,
            "corpus_sha256": subject.other.run.record.corpus_sha256,
        }
    if subject.has_text:
        about |= {"source": subject.chosen[1], "token_ids": list(subject.tokens), "token_labels": subject.labels}
    return {**about, **described.about}


def show_heading(subject: Subject, described: Analysis[Any]) -> None:
    marked = [("", subject.opened)] if subject.other is None else [("A  ", subject.opened), ("B  ", subject.other)]
    for mark, opened in marked:
        stdout().print(f"{mark}[bold]{opened.run.name}[/], checkpoint {opened.checkpoint} (step {opened.step:,})")
    if subject.has_text:
        tokens, source = subject.chosen
        ids = " ".join(map(str, tokens))
        stdout().print(f"{escape(source)}: {len(tokens)} tokens; token ids {ids}\n", soft_wrap=False)
    elif described.source is not None:
        stdout().print(f"{escape(described.source)}\n", soft_wrap=False)


def show_receipts(receipts: "Iterable[Receipt]") -> None:
    """The laws that were checked, those that do not hold in red."""
    for receipt in receipts:
        style = "dim" if receipt.holds else "bold red"
        verdict = "" if receipt.holds else ": FAILED"
        line = f"receipt: {receipt.law}, off by {receipt.error:.0e} (allowed {receipt.tolerance:.0e}){verdict}"
        stdout().print(f"[{style}]{escape(line)}[/]")
