"""Figures of analyses: they show the numbers of the result, signed maps are centered, and tokens are plain text."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from lumiere.config.loader import validate
from lumiere.data.batches import Batch
from lumiere.errors import LumiereError
from lumiere.interpret.ablation import ablate
from lumiere.interpret.activations import activations
from lumiere.interpret.attention import COMBINED, WEIGHTED, attention_patterns, combined_attention
from lumiere.interpret.head_scores import SCORES, score_heads
from lumiere.interpret.logit_attribution import LEVELS, logit_attribution
from lumiere.interpret.logit_lens import logit_lens
from lumiere.interpret.model_diff import diff_models
from lumiere.interpret.summary import summarize
from lumiere.interpret.token_losses import token_losses
from lumiere.models.transformer import Transformer, build_model
from lumiere.report.figures import bars, heat_maps
from lumiere.report.figures.figure import SUFFIXES, Picture, check_picture
from lumiere.report.results import save_result
from tests.interpret.models import BATCHES, nudged, random_model

TOKENS = [0, 5, 6, 7, 8, 9, 10, 11, 12]
AWKWARD = {
    0: "<|sot|>",
    5: "·a",
    6: "↵",
    7: "\\x1b[2J",
    8: "$x_1$",
    9: "<b>&amp;",
    10: "·verylongtokenthatgoeson",
    11: "שלום",
    12: "人",
}
ABOUT = {"run": "run_a", "checkpoint": "best", "step": 1200, "source": "<i>file</i>"}
LATER = np.triu(np.ones((len(TOKENS), len(TOKENS)), dtype=bool), 1)


def label(token: int) -> str:
    return AWKWARD.get(token, f"#{token}")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(vocab_size=4096, scale=20)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    rows = torch.arange(3, 39).reshape(4, 9)
    return [Batch(part[:, :-1], part[:, 1:], part[:, 1:].numel()) for part in (rows[:2], rows[2:])]


def panels(picture: Picture) -> list[Any]:
    return picture.figure.axes


def images(picture: Picture) -> list[Any]:
    return [image for axes in panels(picture) for image in axes.get_images()]


def numbers(image: Any) -> np.ndarray:
    """What an image shows, NaN where it shows nothing."""
    return np.ma.filled(image.get_array().astype(float), np.nan)


def texts(artists: Any) -> list[str]:
    return [text.get_text() for text in artists]


def row_labels(axes: Any) -> list[str]:
    return texts(axes.get_yticklabels())


def widths(axes: Any) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def assert_signed(image: Any) -> None:
    low, high = image.get_clim()
    assert (image.get_cmap().name, low) == (heat_maps.SIGNED, -high)
    assert high == np.nanmax(np.abs(numbers(image)))


@pytest.mark.parametrize("kind", [*WEIGHTED, *COMBINED])
def test_attention_has_a_map_for_each_head_or_layer(model: Transformer, kind: str) -> None:
    if kind in WEIGHTED:
        result = attention_patterns(model, TOKENS, kind=kind)
        maps = result.patterns.reshape(6, len(TOKENS), -1)
        names = [f"L{layer}H{head}" for layer in range(3) for head in range(2)]
    else:
        result = combined_attention(model, TOKENS, layers=[2, 0], kind=kind)
        maps, names = result.weights, ["L2", "L0"]
    picture = heat_maps.draw_attention(result, label)
    assert [axes.get_title(loc="left") for axes in panels(picture)[: len(names)]] == names
    for image, weights in zip(images(picture), maps, strict=True):
        np.testing.assert_array_equal(numbers(image), np.where(LATER, np.nan, weights))
        assert (image.get_clim(), image.get_cmap().name) == ((0, 1), heat_maps.MAGNITUDES)


def test_awkward_tokens_are_shown_as_in_the_terminal(model: Transformer) -> None:
    picture = heat_maps.draw_attention(attention_patterns(model, TOKENS, layers=[0], heads=[0]), label)
    axes = panels(picture)[0]
    assert row_labels(axes) == [name if len(name) < 13 else f"{name[:11]}…" for name in AWKWARD.values()]
    assert not any(text.get_parse_math() for text in [*axes.get_yticklabels(), *axes.get_xticklabels()])


def test_a_long_text_has_positions_and_no_tokens() -> None:
    torch.manual_seed(1)
    long = build_model(validate({"model": {"context_size": 200, "num_layers": 1, "num_heads": 2}})).eval()
    axes = panels(heat_maps.draw_attention(attention_patterns(long, list(range(3, 203))), label))[0]
    assert axes.get_ylabel() == "position"
    assert not any("#" in text for text in row_labels(axes))


@pytest.mark.parametrize("stat", ["top", "probability", "rank", "entropy", "kl"])
def test_a_lens_is_tokens_by_stages(model: Transformer, stat: str) -> None:
    result = logit_lens(model, TOKENS, sublayers=True, top_k=2)
    picture = heat_maps.draw_lens(result, stat, label, None)
    (image,) = images(picture)
    expected = {
        "top": result.top_probabilities[:, :, 0],
        "probability": result.target_probabilities,
        "rank": np.log10(np.where(result.targets >= 0, 1.0 + result.target_ranks, np.nan)),
        "entropy": result.entropies,
        "kl": result.divergences,
    }[stat]
    np.testing.assert_allclose(numbers(image), expected.T)
    axes = panels(picture)[0]
    assert texts(axes.get_xticklabels()) == ["embed", "L0 mid", "L0", "L1 mid", "L1", "L2 mid", "L2"]
    assert row_labels(axes)[:3] == ["<|sot|>", "·a", "↵"]
    if stat == "top":
        words = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
        for stage, row in np.ndindex(*result.entropies.shape):
            assert words[stage, row] == label(int(result.top_tokens[stage, row, 0]))[:12]


@pytest.mark.parametrize("level", LEVELS)
def test_bars_add_up_to_the_logit(model: Transformer, level: Any) -> None:
    result = logit_attribution(model, TOKENS, by=level)
    *parts, total = panels(bars.draw_logits(result, label))[0].patches
    assert len(parts) <= bars.MAX_PARTS + 1
    assert total.get_width() == pytest.approx(result.logits[0], rel=1e-4)
    end = 0.0
    for bar in parts:  # each begins where the previous one ended
        assert bar.get_x() == pytest.approx(end, abs=1e-6)
        end += bar.get_width()
        color = heat_maps.POSITIVE if bar.get_width() > 0 else heat_maps.NEGATIVE
        assert to_hex(bar.get_facecolor()).upper() == color
    assert end == pytest.approx(result.logits[0], rel=1e-4)


@pytest.mark.parametrize("level", ["layer", "source"])
def test_many_positions_are_a_signed_map_whose_columns_add_up(model: Transformer, level: Any) -> None:
    result = logit_attribution(model, TOKENS, positions=range(len(TOKENS)), by=level)
    picture = bars.draw_logits(result, label)
    (image,) = images(picture)
    shown = numbers(image)
    np.testing.assert_allclose(np.nansum(shown, axis=0), result.logits, rtol=1e-4)
    assert_signed(image)
    if level == "layer":
        np.testing.assert_array_equal(shown[0], result.embed)
        assert row_labels(panels(picture)[0])[:4] == ["embed", "position", "L0 attention", "L0 feed-forward"]
    else:  # later sources are empty
        np.testing.assert_array_equal(np.isnan(shown).sum(0), range(len(TOKENS))[::-1])


def test_heads_have_their_scores_and_a_signed_copying(model: Transformer) -> None:
    result = score_heads(model, torch.tensor([[0, *range(3, 10), *range(3, 10)]]))
    picture = bars.draw_heads(result)
    scores, copying = images(picture)
    np.testing.assert_array_equal(numbers(scores), result.scores.reshape(6, len(SCORES)))
    np.testing.assert_array_equal(numbers(copying)[:, 0], result.copying.flatten())
    assert (copying.get_clim(), copying.get_cmap().name) == ((-1, 1), heat_maps.SIGNED)
    assert row_labels(panels(picture)[0])[:2] == ["L0H0", "L0H1"]
    losses = next(axes for axes in panels(picture) if axes.get_lines()).get_lines()
    assert [line.get_ydata().tolist() for line in losses] == [result.losses[:7].tolist(), result.losses[7:].tolist()]


@pytest.mark.parametrize("unit", ["head", "feedforward", "neuron", "position"])
def test_ablations_are_a_signed_map_and_sorted_bars(model: Transformer, batches: list[Batch], unit: str) -> None:
    result = ablate(model, batches, unit, layers=[2, 0])
    picture = bars.draw_ablations(result)
    (image,) = images(picture)
    np.testing.assert_array_equal(numbers(image).flatten(), result.changes)
    assert_signed(image)
    map_axes, bar_axes, *_ = panels(picture)
    assert row_labels(map_axes) == ["L2", "L0"]
    assert widths(bar_axes) == sorted(result.changes, reverse=True)[:16]
    assert row_labels(bar_axes) == [result.labels[number] for number in result.order[:16]]


def test_tokens_have_a_bar_each(model: Transformer) -> None:
    result = token_losses(model, TOKENS)
    axes = panels(heat_maps.draw_tokens(result, label))[0]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], result.losses)
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), result.entropies)
    assert texts(axes.get_xticklabels())[:2] == ["·a", "↵"]


def test_activations_have_their_size_at_each_token(model: Transformer) -> None:
    result = activations(model, TOKENS)
    (image,) = images(heat_maps.draw_activations(result, label))
    shown = dict(zip(result.names, 10 ** numbers(image), strict=True))
    for name, axes in (("blocks.1.hook_resid_pre", 1), ("blocks.1.attn.hook_pattern", (0, 2))):
        squares = result.values[name].astype(float) ** 2
        np.testing.assert_allclose(shown[name], np.sqrt(squares.mean(axes)))


def test_a_summary_has_its_matrices_by_layer(model: Transformer, batches: list[Batch]) -> None:
    result = summarize(model, batches)
    picture = bars.draw_summary(result)
    kinds = dict.fromkeys(("query", "key", "value", "output"), "attention")
    kinds |= dict.fromkeys(("gate", "up", "down"), "feedforward")
    by_name = dict(zip(result.matrices, result.rms, strict=True))
    expected = [[by_name[f"blocks.{n}.{part}.{kind}.weight"] for kind, part in kinds.items()] for n in range(3)]
    ranks, writes, rms = images(picture)
    np.testing.assert_array_equal(numbers(rms), expected)
    assert numbers(ranks).max() <= 1
    assert result.writes is not None
    assert result.head_writes is not None
    np.testing.assert_array_equal(numbers(writes), np.concatenate([result.writes, result.head_writes], axis=1))
    assert widths(panels(picture)[0]) == [count for count in result.parameters.values() if count]
    assert len(images(bars.draw_summary(summarize(model)))) == 2


def test_a_diff_has_a_panel_for_each_comparison() -> None:
    model = random_model()
    result = diff_models(model, nudged(model), BATCHES)
    predictions, cka, heads, weights = panels(bars.draw_diff(result))
    assert result.predictions is not None
    assert result.heads is not None
    assert result.cka is not None
    lines = {line.get_label(): line.get_ydata() for line in predictions.get_lines()}
    np.testing.assert_array_equal(lines["KL(A||B)"], result.predictions.kl_ab_by_position)
    np.testing.assert_array_equal(lines["KL(B||A)"], result.predictions.kl_ba_by_position)
    np.testing.assert_array_equal(numbers(cka.images[0]), result.cka)
    assert texts(cka.texts) == [f"{value:.2f}" for value in result.cka.flatten()]
    for axes, values in ((heads, result.heads.match_divergences), (weights, result.weights.relative_changes)):
        assert widths(axes) == sorted(values.tolist(), reverse=True)[: bars.MAX_BARS]
    a, b = result.heads.matches[int(result.heads.match_divergences.argmax())]
    assert row_labels(heads)[0] == f"{result.heads.heads_a[a]} → {result.heads.heads_b[b]}"
    assert f"{row_labels(weights)[0]}.weight" == result.weights.tensors[int(result.weights.relative_changes.argmax())]
    bare = dataclasses.replace(result, predictions=None, cka=None, heads=None)
    (axes,) = panels(bars.draw_diff(bare))
    assert len(axes.patches) == len(weights.patches)
    assert len(panels(bars.draw_diff(diff_models(model, model, BATCHES)))) == 4


@pytest.fixture
def picture(model: Transformer) -> Picture:
    return heat_maps.draw_attention(attention_patterns(model, TOKENS, layers=[0], heads=[0]), label)


def save(model: Transformer, name: str, picture: Picture | None = None, **about: Any) -> bytes:
    result = attention_patterns(model, TOKENS, layers=[0], heads=[0])
    path = Path(name)
    save_result(path, result, ABOUT | about, lambda: picture or heat_maps.draw_attention(result, label))
    return path.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_results_give_equal_bytes_in_the_format_of_the_suffix(model: Transformer, suffix: str) -> None:
    Path(f"first{suffix.upper()}").write_text("old")
    data = save(model, f"first{suffix.upper()}")
    assert data == save(model, f"second{suffix}")
    assert data.startswith({".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".html": b"<!doctype html>"}[suffix])
    assert len(list(Path().iterdir())) == 2, "no temporary file is left"


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_text_is_text_and_includes_facts_and_caption(model: Transformer, suffix: str) -> None:
    text = save(model, f"out{suffix}").decode()
    assert not re.search(r"<(script|link|img|iframe|b|i)\b|@import|url\((?!#)|href=\"(?!data:|#)", text)
    for expected in ("&lt;b&gt;&amp;amp;", "$x_1$", "שלום", "人", "&lt;i&gt;file&lt;/i&gt;", "1,200", "Wallace"):
        assert expected in text
    assert not re.search(r'(?:href|src)="(?!#|data:)', text[text.index("<svg") :])


def test_a_page_takes_its_text_color_from_the_reader(model: Transformer) -> None:
    text = save(model, "out.html", bars.draw_logits(logit_attribution(model, TOKENS, by="head"), label)).decode()
    assert "currentColor" in text
    assert "prefers-color-scheme: dark" in text
    assert {color.upper() for color in re.findall(r"#[0-9a-fA-F]{6}\b", text)} == {"#2166AC", "#B2182B"}


def test_a_png_spells_what_its_font_does_not_have(model: Transformer, picture: Picture) -> None:
    save(model, "out.png", picture)
    assert row_labels(panels(picture)[0])[-2:] == ["שלום", "\\u4eba"]


@pytest.mark.parametrize("name", ["loss.gif", "loss", "folder.png", "none/loss.png"])
def test_a_picture_that_cannot_be_written_is_refused_at_once(name: str) -> None:
    Path("folder.png").mkdir()
    with pytest.raises(LumiereError, match=repr(name.partition("/")[0])):
        check_picture(Path(name))


def test_without_matplotlib_numbers_are_written_and_pictures_are_not(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for refused in (lambda: save(model, "out.svg"), lambda: check_picture(Path("out.svg"))):
        with pytest.raises(LumiereError, match=r"need matplotlib.*pip install matplotlib"):
            refused()
    assert not list(Path().iterdir())
    save(model, "out.csv")


def test_a_picture_may_have_a_page_of_its_own(model: Transformer, picture: Picture) -> None:
    own = dataclasses.replace(picture, page=lambda title: f"<h1>{title}</h1>")
    assert save(model, "out.html", own, source=None) == b"<h1>Attention: run_a, checkpoint best (step 1,200)</h1>"
