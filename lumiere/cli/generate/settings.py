"""What a session of writing can set."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from lumiere.errors import LumiereError, nearest

if TYPE_CHECKING:
    from lumiere.generation.decoding import Limits
    from lumiere.generation.sampling import Sampling


@dataclass(frozen=True)
class Settings:
    """As on the command line."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int | None

    @property
    def sampling(self) -> "Sampling":
        from lumiere.generation.sampling import Sampling

        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    def limits(self, num_logprobs: int | None = None) -> "Limits":
        from lumiere.generation.decoding import Limits

        return Limits(self.max_new_tokens, self.stop, num_logprobs)

    def check(self) -> None:
        """Raises LumiereError: a value is out of range."""
        _ = self.sampling, self.limits()

    def changed(self, name: str, text: str) -> "Settings":
        """The settings with one of them read from `text`; `none` leaves a control out.

        Raises:
            LumiereError: there is no such setting, or it cannot have this value.
        """
        name = name.replace("-", "_")
        kinds = {field.name: field.type for field in fields(self)}
        if name not in kinds:
            guess = nearest(name, kinds)
            hint = f"did you mean {guess}?" if guess else f"there are {', '.join(kinds)}"
            raise LumiereError(f"there is no setting '{name}'", hint)
        settings = replace(self, **{name: _value(name, kinds[name], text)})
        settings.check()
        return settings


def _value(name: str, kind: Any, text: str) -> Any:
    if name == "stop":
        # As a shell would write it: \n is a line end.
        return () if text == "none" else (text.encode("latin-1", "backslashreplace").decode("unicode_escape"),)
    if text == "none" and kind not in (int, float):
        return None
    try:
        return (float if kind in (float, float | None) else int)(text)
    except ValueError:
        raise LumiereError(f"{name} must be a number, not '{text}'", "for example /set temperature 0.7") from None


def given(options: Mapping[str, object]) -> list[str]:
    """The names of the options that were given."""
    return [name for name, value in options.items() if value not in (None, False, [], ())]
