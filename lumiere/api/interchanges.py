"""`run.inspect.interchange`: whether a subspace of the residual stream carries a variable.

Importing this module loads neither torch nor numpy.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.api import snapshots
from lumiere.api.analysis import Analysis, analyze
from lumiere.api.options import RunAnalyses
from lumiere.api.pairs import MAX_BYTES, prompt_of
from lumiere.api.target import InspectTarget, parse_indices, parse_token
from lumiere.errors import DataError, LumiereError, check_choice, quoted
from lumiere.files import parse_json, read_file

if TYPE_CHECKING:
    from lumiere.interpret.interchange import Interchange, InterchangePairs
    from lumiere.models.transformer import Transformer

KEYS = ("base", "source", "label")
EXAMPLE = 'write {"base": "...", "source": "...", "label": "..."}'
MIN_PAIRS = 4


class Interchanges(RunAnalyses):
    """Interventions that put one text's value of a variable into another text."""

    def interchange(
        self,
        pairs: str | Path,
        *,
        layer: int = -1,
        pos: int = -1,
        source_pos: int | None = None,
        rank: int = 1,
        steps: int = 100,
        seeds: int = 5,
        seed: int = 0,
        verify: bool = False,
    ) -> "Analysis[Interchange]":
        """Whether a subspace of the residual stream carries a variable: interchange interventions and DAS.

        Args:
            pairs: A file with one JSON object a line: {"base": ..., "source": ..., "label": ...}. The label is the
                token that should follow the base prompt if the variable had the value that it has in the source.
            layer: After whose block the stream is changed.
            pos: Position of the base prompt that is changed.
            source_pos: Position of the source prompt that is read. Default: `pos`.
            rank: Dimensions of the subspace.
            steps: Steps of training it.
            seeds: Number of halves of the pairs that subspaces are fitted to.
        """
        from lumiere.interpret.interchange import interchange
        from lumiere.report.figures.interchange import draw_interchange

        target = self._target(seed=seed, verify=verify)
        model = target.opened.model
        read = read_pairs(Path(pairs), target)
        if not 1 <= rank <= model.embedding_size:
            raise LumiereError(f"--rank {rank} is no dimension of a subspace", f"give 1 to {model.embedding_size}")
        (where,) = parse_indices(layer, model.num_layers, "layer")
        (at,) = parse_indices(pos, read.base.shape[1], "position")
        (source_at,) = parse_indices(pos if source_pos is None else source_pos, read.base.shape[1], "position")
        drawn = range(seed, seed + seeds)

        def compute(model: "Transformer") -> "Interchange":
            return interchange(
                model, read, where, (at, source_at), rank, steps, drawn, lambda: untrained(target, model)
            )

        return analyze("interchange", target, compute, draw_interchange, f"{len(read.labels):,} pairs of {pairs}")


def untrained(target: InspectTarget, like: "Transformer") -> "Transformer":
    """Return the model of the snapshot before training; without one, a new model by the target's seed."""
    from lumiere.persistence.checkpoint_manager import snapshot_steps

    if 0 in snapshot_steps(target.opened.run):
        return snapshots.load_snapshot(target, 0, like)
    import torch

    from lumiere.models.transformer import build_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(target.seed)
        return build_model(target.opened.config).to(like.token_embedding.weight).eval()


def read_pairs(path: Path, target: InspectTarget) -> "InterchangePairs":
    """Read the pairs of a file; errors name the line."""
    import torch

    from lumiere.interpret.interchange import InterchangePairs

    try:
        lines = read_file(path, MAX_BYTES).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", "check the path") from None
    read: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = read_pair(line, target)
            sizes = {len(pair[0]), len(pair[1]), *(len(other[0]) for other in read[:1])}
            if len(sizes) > 1:
                raise LumiereError(
                    f"the prompts have {' and '.join(map(str, sorted(sizes)))} tokens", "give prompts of one length"
                )
        except LumiereError as error:
            raise DataError(f"{path}, line {number}: {error.message}", error.hint) from None
        read.append(pair)
    if len(read) < MIN_PAIRS:
        raise DataError(f"{path} contains {len(read)} pairs", f"give {MIN_PAIRS} or more: half of them are held out")
    base, source, labels = zip(*read, strict=True)
    if len(set(labels)) == 1:
        raise DataError(f"all labels of {path} are {target.label(labels[0])}", "give pairs with two labels or more")
    return InterchangePairs(torch.tensor(base), torch.tensor(source), torch.tensor(labels))


def read_pair(line: bytes, target: InspectTarget) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise LumiereError(f"this is no JSON: {error}", EXAMPLE) from None
    if not isinstance(values, dict):
        raise LumiereError(f"{quoted(values)} is no pair", EXAMPLE)
    for key in values:
        check_choice("key", key, KEYS)
    label = values.get("label")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise LumiereError(f"label is {quoted(label)}", "write a token as a text, or its id")
    return (
        prompt_of(values, "base", target),
        prompt_of(values, "source", target),
        parse_token(label, target.opened.tokenizer),
    )
