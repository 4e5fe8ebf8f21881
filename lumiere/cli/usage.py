"""Errors and exit codes of all commands; a wrong command line gets a hint that names what exists."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from lumiere.cli.console import CHECK_FAILED, print_error
from lumiere.errors import FailedCheckError, LumiereError, nearest

PROGRAM = "lumiere"
INTERRUPTED = 130
NO_FEATURES = "not available; lumiere inspect cache -o FILE.npz saves activations for your own analysis"
FINE_TUNING = "lumiere train CONFIG --from RUN starts from the weights of a run; --resume RUN continues a run"

COMMANDS_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    PROGRAM: {
        **dict.fromkeys(("evaluate", "score", "test", "perplexity"), "lumiere eval RUN"),
        **dict.fromkeys(("sample", "complete", "chat", "predict", "infer"), "lumiere generate"),
        **dict.fromkeys(("prepare", "tokenizer"), "lumiere tokenize CONFIG"),
        **dict.fromkeys(("resume", "continue"), "lumiere train --resume RUN"),
        **dict.fromkeys(("finetune", "fine-tune"), FINE_TUNING),
        **dict.fromkeys(("convert", "save"), "lumiere export RUN DIR"),
        **dict.fromkeys(("list",), "lumiere runs ls"),
    },
    f"{PROGRAM} inspect": {
        **dict.fromkeys(("patching", "activation-patching", "attribution-patching"), "lumiere inspect patch"),
        **dict.fromkeys(("causal-tracing", "tracing"), "lumiere inspect patch --kind tracing"),
        **dict.fromkeys(("sae", "features"), NO_FEATURES),
        **dict.fromkeys(("probes", "probing", "linear-probe"), "lumiere inspect probe"),
        **dict.fromkeys(("steering", "caa", "directions"), "lumiere inspect steer"),
        **dict.fromkeys(("integrated-gradients", "gradients", "occlusion"), "lumiere inspect saliency"),
        **dict.fromkeys(("das", "interchange-intervention"), "lumiere inspect interchange"),
        **dict.fromkeys(("circuits", "edges", "eap", "acdc"), "lumiere inspect circuit"),
        **dict.fromkeys(("attn", "patterns", "rollout"), "lumiere inspect attention"),
        **dict.fromkeys(("logit-lens",), "lumiere inspect lens is the logit lens"),
        **dict.fromkeys(("tuned-lens", "jacobian-lens"), "lumiere inspect lens --train"),
        **dict.fromkeys(("dla", "attribution", "direct-logit-attribution"), "lumiere inspect logits"),
        **dict.fromkeys(("induction", "copying"), "lumiere inspect heads"),
        **dict.fromkeys(("ov", "qk", "svd", "composition"), "lumiere inspect weights"),
        **dict.fromkeys(("ablation", "knockout", "zero-ablation", "mean-ablation"), "lumiere inspect ablate"),
        **dict.fromkeys(("activations", "hooks"), "lumiere inspect cache"),
        **dict.fromkeys(("surprisal", "loss"), "lumiere inspect tokens"),
        **dict.fromkeys(("compare", "cka"), "lumiere inspect diff A B"),
        **dict.fromkeys(("phases", "emergence"), "lumiere inspect dynamics"),
        **dict.fromkeys(("neurons", "neuron", "embeddings"), "lumiere inspect report -o FILE.html shows them"),
        **dict.fromkeys(("parameters",), "lumiere inspect summary"),
    },
    f"{PROGRAM} runs": {
        **dict.fromkeys(("list",), "lumiere runs ls"),
        **dict.fromkeys(("delete", "remove", "del"), "lumiere runs rm RUN"),
        **dict.fromkeys(("info", "describe", "status"), "lumiere runs show RUN"),
        **dict.fromkeys(("diff",), "lumiere runs compare RUN RUN"),
        **dict.fromkeys(("tail", "follow", "logs"), "lumiere runs watch RUN"),
        **dict.fromkeys(("upload", "sync", "backup", "copy"), "lumiere runs push RUN URL"),
        **dict.fromkeys(("download", "fetch", "clone", "restore"), "lumiere runs pull URL"),
    },
}
"""Names of commands elsewhere, by group, with what exists here."""

OPTIONS_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("--init-from", "--from-pretrained", "--pretrained", "--finetune"), FINE_TUNING),
    **dict.fromkeys(("--model", "--model-path", "--ckpt", "--run-id"), "name the run: RUN, or --run RUN"),
    **dict.fromkeys(("--checkpoint-name",), "--checkpoint NAME"),
    **dict.fromkeys(("--out-dir", "--output-dir"), "--runs-dir DIR"),
    **dict.fromkeys(("--config",), "give the config without an option: lumiere train FILE"),
    **dict.fromkeys(("--num-samples",), "--num-return-sequences N"),
    **dict.fromkeys(("--max-tokens", "--max-length", "--length"), "--max-new-tokens N"),
    **dict.fromkeys(("--do-sample",), "sampling is the default; --greedy turns it off"),
}
"""Names of options elsewhere, with what exists here."""


class Commands(TyperGroup):
    """A group of commands that reports all errors alike; bugs keep their traceback.

    The exit code is 2 for a usage error and a `LumiereError`, 3 for a failed check and 130 for Ctrl-C.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = PROGRAM,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and exit, ignoring `prog_name` and `standalone_mode`."""
        try:
            code = super().main(args, PROGRAM, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            if error.format_message():  # empty if the help was printed instead
                print_error(usage_error(error))
            sys.exit(error.exit_code)
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LumiereError as error:
            print_error(error)
            raise typer.Exit(CHECK_FAILED if isinstance(error, FailedCheckError) else 2) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name in self.commands or name.startswith("-"):
            return super().resolve_command(ctx, args)
        raise LumiereError(f"there is no command {ctx.command_path} {name}", self._hint(ctx.command_path, name))

    def _hint(self, path: str, name: str) -> str:
        """Suggest a command instead of `name`."""
        if instead := COMMANDS_ELSEWHERE.get(path, {}).get(name.lower()):
            return instead
        for command, group in self.commands.items():
            if isinstance(group, Commands) and name in group.commands:
                return f"it is {path} {command} {name}"
        guess = nearest(name, self.commands)
        return f"did you mean {guess}?" if guess else f"choose from {', '.join(self.commands)}"


def usage_error(error: typer.TyperException) -> LumiereError:
    """Convert one of Typer's errors."""
    ctx: typer.Context | None = getattr(error, "ctx", None)
    if ctx is None:
        return LumiereError(error.format_message().rstrip("."), "--help lists the options")
    name: str | None = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities"):  # which only an unknown option has
        return LumiereError(f"{ctx.command_path} has no option {name}", option_hint(ctx, name))
    message = error.format_message()
    return LumiereError(
        f"{ctx.command_path}: {message[0].lower()}{message[1:].rstrip('.')}",
        f"{ctx.get_usage()[0].lower()}{ctx.get_usage()[1:]}; --help explains it",
    )


def option_hint(ctx: typer.Context, name: str) -> str:
    """Suggest an option instead of `name`."""
    name = name.replace("_", "-")
    options = {option: parameter for parameter in ctx.command.params for option in parameter.opts}
    if name in options:
        return f"did you mean {name}?"
    if instead := OPTIONS_ELSEWHERE.get(name.lower()):
        return instead
    if "--set" in options and (path := setting(name.removeprefix("--").replace("-", "_"))):
        return f"--set {path}=VALUE"
    guess = nearest(name, options)
    return f"did you mean {guess}?" if guess else f"{ctx.command_path} --help lists its options"


def setting(name: str) -> str | None:
    """Return the dotted path of a setting by its name here or in another trainer."""
    from lumiere.config.messages import SYNONYMS, setting_paths

    if name in SYNONYMS:
        return SYNONYMS[name][1]
    return next((path for path in setting_paths() if path.rpartition(".")[2] == name), None)
