"""An analysis of a model: its result, with what it read and its picture."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lumiere.api.target import InspectTarget
from lumiere.persistence.loading import OpenedModel

if TYPE_CHECKING:
    import pandas as pd

    from lumiere.interpret.result import Result
    from lumiere.models.transformer import Transformer
    from lumiere.report.figures.figure import Picture

AnyResult = TypeVar("AnyResult", bound="Result", covariant=True)


@dataclass(frozen=True, repr=False)
class Analysis(Generic[AnyResult]):
    """An analysis of a model. A notebook shows its picture.

    Attributes of the result, such as `patterns` or `receipts`, are attributes of the analysis too.

    Attributes:
        name: Such as `attention`.
        result: The numbers, with their receipts.
        provenance: Everything needed to compute the result again: run, checkpoint, hashes, device, seed, text.
        target: The models and the text that were read.
        source: What was read, in words, unless it is one text.
        notes: What was left out, and why.
    """

    name: str
    result: AnyResult
    provenance: Mapping[str, Any]
    target: InspectTarget
    source: str | None
    notes: tuple[str, ...]
    _draw: "Callable[[], Picture]" = field(compare=False)

    def draw(self) -> "Picture":
        """Return the picture.

        Raises:
            LumiereError: matplotlib is not installed.
        """
        return self._draw()

    def frame(self) -> "pd.DataFrame":
        """Return the result as a table, one observation a row."""
        import pandas as pd

        return pd.DataFrame(list(self.result.rows()))

    def save(self, path: str | Path) -> None:
        """Write the numbers to .json, .csv or .npz, or the picture to .html, .svg or .png.

        Raises:
            LumiereError: Unknown suffix, the file cannot be written, or matplotlib, for a picture, is missing.
        """
        from lumiere.report.results import check_export, save_result

        check_export(Path(path))
        save_result(Path(path), self.result, self.provenance, self.draw)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # such as what notebooks and `copy` look for
            raise AttributeError(name)
        return getattr(self.result, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in dir(self.result) if not name.startswith("_"))})

    def __repr__(self) -> str:
        from lumiere.report.results import facts_line

        return f"<{self.name} of {facts_line(self.provenance)}: {self.result!r}>"

    def _repr_html_(self) -> str:
        from lumiere.report.fragments import result_fragment

        return result_fragment(self.result, self.provenance, self.notes, self.draw)


def analyze(
    name: str,
    target: InspectTarget,
    compute: "Callable[[Transformer], AnyResult]",
    draw: "Callable[[AnyResult], Picture]",
    source: str | None = None,
    **provenance: Any,
) -> Analysis[AnyResult]:
    """Compute a result, and verify it in float64 if the target says so.

    Args:
        compute: A pure function, so that it can be called again with the model in float64.
        draw: Returns the picture of a result.
        source: What the analysis reads, in words, unless it is one text.
        provenance: More entries for the JSON.
    """
    from lumiere.interpret.result import agreement

    model = target.opened.model
    result = compute(model)
    if target.verify:
        exact = compute(deepcopy(model).cpu().double())  # on the CPU: not every device has float64
        result = replace(result, receipts=(*result.receipts, agreement(result, exact)))
    about = {**provenance_of(name, target, source), **provenance}
    return Analysis(name, result, about, target, source, tuple(target.notes), lambda: draw(result))


def provenance_of(name: str, target: InspectTarget, source: str | None) -> dict[str, Any]:
    """Return everything needed to compute a result again: run, checkpoint, hashes, device, seed, text."""
    from lumiere import __version__

    opened = target.opened
    weight = opened.model.token_embedding.weight
    provenance = {
        "analysis": name,
        "lumiere_version": __version__,
        **model_provenance(opened),
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "seed": target.seed,
        "source": source,
    }
    if target.other is not None:
        provenance["other"] = model_provenance(target.other)
    if target.has_text:
        tokens, text_source = target.chosen
        provenance |= {"source": text_source, "token_ids": list(tokens), "token_labels": target.labels}
    return provenance


def model_provenance(opened: OpenedModel) -> dict[str, Any]:
    """Return the run, the checkpoint, the step and the hashes of a model."""
    return {
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "weights_sha256": opened.weights_sha256,
        "tokenizer_sha256": opened.tokenizer.fingerprint,
        "corpus_sha256": opened.run.record.corpus_sha256,
    }
