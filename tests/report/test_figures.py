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
from lumiere.report.figures.bars import (
    MAX_BARS,
    MAX_PARTS,
    draw_ablations,
    draw_diff,
    draw_heads,
    draw_logits,
    draw_summary,
)
from lumiere.report.figures.figure import SUFFIXES, Picture
from lumiere.report.figures.heat_maps import (
    MAGNITUDES,
    NEGATIVE,
    POSITIVE,
    SIGNED,
    draw_activations,
    draw_attention,
    draw_lens,
    draw_tokens,
)
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


def label(token: int) -> str:
    return AWKWARD.get(token, f"#{token}")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(vocab_size=4096, scale=20)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    rows = torch.arange(3, 39).reshape(4, 9)
    return [Batch(part[:, :-1], part[:, 1:], part[:, 1:].numel()) for part in (rows[:2], rows[2:])]


def images(picture: Picture) -> list[Any]:
    return [image for axes in picture.figure.axes for image in axes.get_images()]


def numbers(image: Any) -> np.ndarray:
    """What an image shows, NaN where it shows nothing."""
    return np.ma.filled(image.get_array().astype(float), np.nan)


def row_labels(picture: Picture, panel: int = 0) -> list[str]:
    return [text.get_text() for text in picture.figure.axes[panel].get_yticklabels()]


@pytest.mark.parametrize("kind", WEIGHTED)
def test_a_map_of_attention_a_head(model: Transformer, kind: str) -> None:
    result = attention_patterns(model, TOKENS, kind=kind)
    picture = draw_attention(result, label)
    shown = images(picture)
    assert len(shown) == 6
    earlier = np.tri(len(TOKENS), dtype=bool)
    for image, pattern in zip(shown, result.patterns.reshape(6, len(TOKENS), -1), strict=True):
        np.testing.assert_array_equal(numbers(image), np.where(earlier, pattern, np.nan))
        assert (image.get_clim(), image.get_cmap().name) == ((0, 1), MAGNITUDES)
    assert [axes.get_title(loc="left") for axes in picture.figure.axes[:6]] == [
        f"L{layer}H{head}" for layer in range(3) for head in range(2)
    ]


@pytest.mark.parametrize("kind", COMBINED)
def test_a_map_of_attention_a_layer(model: Transformer, kind: str) -> None:
    result = combined_attention(model, TOKENS, layers=[2, 0], kind=kind)
    picture = draw_attention(result, label)
    shown = [np.nan_to_num(numbers(image)) for image in images(picture)]
    np.testing.assert_array_equal(shown, np.tril(result.weights))
    assert [axes.get_title(loc="left") for axes in picture.figure.axes[:2]] == ["L2", "L0"]


def test_awkward_tokens_are_shown_as_in_the_terminal(model: Transformer) -> None:
    picture = draw_attention(attention_patterns(model, TOKENS, layers=[0], heads=[0]), label)
    labels = picture.figure.axes[0].get_yticklabels()
    assert [text.get_text() for text in labels] == [
        name if len(name) < 13 else f"{name[:11]}…" for name in AWKWARD.values()
    ]
    assert not any(text.get_parse_math() for text in [*labels, *picture.figure.axes[0].get_xticklabels()])


def test_a_long_text_has_positions_and_no_tokens() -> None:
    torch.manual_seed(1)
    long = build_model(validate({"model": {"context_size": 200, "num_layers": 1, "num_heads": 2}})).eval()
    picture = draw_attention(attention_patterns(long, list(range(3, 203))), label)
    assert picture.figure.axes[0].get_ylabel() == "position"
    assert not any("#" in text for text in row_labels(picture))


@pytest.mark.parametrize("stat", ["top", "probability", "rank", "entropy", "kl"])
def test_a_lens_is_tokens_by_stages(model: Transformer, stat: str) -> None:
    result = logit_lens(model, TOKENS, sublayers=True, top_k=2)
    picture = draw_lens(result, stat, label, None)
    (image,) = images(picture)
    known = result.targets >= 0
    expected = {
        "top": result.top_probabilities[:, :, 0],
        "probability": result.target_probabilities,
        "rank": np.log10(np.where(known, 1.0 + result.target_ranks, np.nan)),
        "entropy": result.entropies,
        "kl": result.divergences,
    }[stat]
    np.testing.assert_allclose(numbers(image), expected.T)
    axes = picture.figure.axes[0]
    stages = [text.get_text() for text in axes.get_xticklabels()]
    assert stages == ["embed", "L0 mid", "L0", "L1 mid", "L1", "L2 mid", "L2"]
    assert row_labels(picture)[:3] == ["<|sot|>", "·a", "↵"]
    if stat == "top":
        words = {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in axes.texts}
        for stage, row in np.ndindex(*result.entropies.shape):
            assert words[stage, row] == label(int(result.top_tokens[stage, row, 0]))[:12]


@pytest.mark.parametrize("level", LEVELS)
def test_bars_add_up_to_the_logit(model: Transformer, level: Any) -> None:
    result = logit_attribution(model, TOKENS, by=level)
    axes = draw_logits(result, label).figure.axes[0]
    *bars, total = axes.patches
    assert len(bars) <= MAX_PARTS + 1
    assert total.get_width() == pytest.approx(result.logits[0], rel=1e-4)
    end = 0.0
    for bar in bars:  # each begins where the last one ended
        assert bar.get_x() == pytest.approx(end, abs=1e-6)
        end += bar.get_width()
    assert end == pytest.approx(result.logits[0], rel=1e-4)
    for bar in bars:
        color = POSITIVE if bar.get_width() > 0 else NEGATIVE  # pyright: ignore
        assert to_hex(bar.get_facecolor()).upper() == color


def test_many_positions_are_a_signed_map_whose_columns_add_up(model: Transformer) -> None:
    result = logit_attribution(model, TOKENS, positions=range(len(TOKENS)))
    picture = draw_logits(result, label)
    (image,) = images(picture)
    np.testing.assert_allclose(numbers(image).sum(0), result.logits, rtol=1e-4)
    np.testing.assert_array_equal(numbers(image)[0], result.embed)
    assert row_labels(picture)[:4] == ["embed", "position", "L0 attention", "L0 feed-forward"]
    assert_signed(image)


def test_later_sources_are_empty_in_a_map(model: Transformer) -> None:
    result = logit_attribution(model, TOKENS, positions=range(len(TOKENS)), by="source")
    (image,) = images(draw_logits(result, label))
    shown = numbers(image)
    for column in range(len(TOKENS)):
        assert np.isnan(shown[:, column]).sum() == len(TOKENS) - 1 - column
    np.testing.assert_allclose(np.nansum(shown, axis=0), result.logits, rtol=1e-4)


def assert_signed(image: Any) -> None:
    low, high = image.get_clim()
    assert (image.get_cmap().name, low) == (SIGNED, -high)
    assert high == np.nanmax(np.abs(numbers(image)))


def test_heads_have_their_scores_and_a_signed_copying(model: Transformer) -> None:
    result = score_heads(model, torch.tensor([[0, *range(3, 10), *range(3, 10)]]))
    picture = draw_heads(result)
    scores, copying = images(picture)
    np.testing.assert_array_equal(numbers(scores), result.scores.reshape(6, len(SCORES)))
    np.testing.assert_array_equal(numbers(copying)[:, 0], result.copying.flatten())
    assert (copying.get_clim(), copying.get_cmap().name) == ((-1, 1), SIGNED)
    assert row_labels(picture)[:2] == ["L0H0", "L0H1"]
    losses = next(axes for axes in picture.figure.axes if axes.get_lines()).get_lines()
    assert [line.get_ydata().tolist() for line in losses] == [result.losses[:7].tolist(), result.losses[7:].tolist()]  # pyright: ignore


@pytest.mark.parametrize("unit", ["head", "feedforward", "neuron", "position"])
def test_ablations_are_a_signed_map_and_sorted_bars(model: Transformer, batches: list[Batch], unit: str) -> None:
    result = ablate(model, batches, unit, layers=[2, 0])
    picture = draw_ablations(result)
    (image,) = images(picture)
    np.testing.assert_array_equal(numbers(image).flatten(), result.changes)
    assert row_labels(picture) == ["L2", "L0"]
    assert_signed(image)
    bars = [bar.get_width() for bar in picture.figure.axes[1].patches]
    assert bars == sorted(result.changes, reverse=True)[:16]
    assert row_labels(picture, 1) == [result.labels[number] for number in result.order[:16]]


def test_tokens_have_a_bar_each(model: Transformer) -> None:
    result = token_losses(model, TOKENS)
    axes = draw_tokens(result, label).figure.axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], result.losses)
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), result.entropies)
    assert [text.get_text() for text in axes.get_xticklabels()][:2] == ["·a", "↵"]


def test_activations_have_their_size_at_each_token(model: Transformer) -> None:
    result = activations(model, TOKENS)
    (image,) = images(draw_activations(result, label))
    shown = dict(zip(result.names, numbers(image), strict=True))
    stream = result.values["blocks.1.hook_resid_pre"]
    np.testing.assert_allclose(10 ** shown["blocks.1.hook_resid_pre"], np.sqrt((stream.astype(float) ** 2).mean(-1)))
    pattern = result.values["blocks.1.attn.hook_pattern"].astype(float)
    for position in range(len(TOKENS)):
        expected = np.sqrt((pattern[:, position] ** 2).mean())
        assert 10 ** shown["blocks.1.attn.hook_pattern"][position] == pytest.approx(expected)


def test_a_summary_has_its_matrices_by_layer(model: Transformer, batches: list[Batch]) -> None:
    result = summarize(model, batches)
    picture = draw_summary(result)
    kinds = ["query", "key", "value", "output", "gate", "up", "down"]
    by_name = dict(zip(result.matrices, result.rms, strict=True))
    parts = dict.fromkeys(kinds[:4], "attention") | dict.fromkeys(kinds[4:], "feedforward")
    expected = [[by_name[f"blocks.{n}.{part}.{kind}.weight"] for kind, part in parts.items()] for n in range(3)]
    ranks, writes, rms = images(picture)
    np.testing.assert_array_equal(numbers(rms), expected)
    assert numbers(ranks).max() <= 1
    np.testing.assert_array_equal(numbers(writes), np.concatenate([result.writes, result.head_writes], axis=1))  # pyright: ignore
    assert [bar.get_width() for bar in picture.figure.axes[0].patches] == [n for n in result.parameters.values() if n]
    assert len(images(draw_summary(summarize(model)))) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_result_gives_the_same_bytes(model: Transformer, tmp_path: Path, suffix: str) -> None:
    result = attention_patterns(model, TOKENS)
    for name in ("first", "second"):
        save_result(tmp_path / f"{name}{suffix}", result, ABOUT, lambda: draw_attention(result, label))
    first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("first", "second"))
    if suffix == ".html":  # the page has the name of its file nowhere either
        assert b"first" not in first
    assert first == second


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_text_is_text_and_carries_its_words(model: Transformer, tmp_path: Path, suffix: str) -> None:
    result = attention_patterns(model, TOKENS, layers=[0], heads=[0])
    path = tmp_path / f"out{suffix}"
    save_result(path, result, ABOUT, lambda: draw_attention(result, label))
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe|b|i)\b|@import|url\((?!#)|href=\"(?!data:|#)", text)
    for expected in ("&lt;b&gt;&amp;amp;", "$x_1$", "שלום", "人", "&lt;i&gt;file&lt;/i&gt;", "1,200"):
        assert expected in text
    assert "Wallace" in text, "the caption"


def test_a_page_takes_its_text_colour_from_the_reader(model: Transformer, tmp_path: Path) -> None:
    result = logit_attribution(model, TOKENS, by="head")
    save_result(tmp_path / "out.html", result, ABOUT, lambda: draw_logits(result, label))
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "currentColor" in text
    assert "prefers-color-scheme: dark" in text
    assert {color.upper() for color in re.findall(r"#[0-9a-fA-F]{6}\b", text)} == {"#2166AC", "#B2182B"}


def test_a_png_spells_what_its_font_does_not_have(model: Transformer, tmp_path: Path) -> None:
    result = attention_patterns(model, TOKENS, layers=[0], heads=[0])
    picture = draw_attention(result, label)
    save_result(tmp_path / "out.png", result, ABOUT, lambda: picture)
    assert row_labels(picture)[-2:] == ["שלום", "\\u4eba"]


def test_without_matplotlib_nothing_is_written(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = attention_patterns(model, TOKENS)
    with pytest.raises(LumiereError, match=r"need matplotlib.*pip install matplotlib"):
        save_result(tmp_path / "out.svg", result, ABOUT, lambda: draw_attention(result, label))
    assert not list(tmp_path.iterdir())
    save_result(tmp_path / "out.csv", result, ABOUT, lambda: draw_attention(result, label))


def test_a_picture_may_have_a_page_of_its_own(model: Transformer, tmp_path: Path) -> None:
    result = attention_patterns(model, TOKENS)
    picture = dataclasses.replace(draw_attention(result, label), page=lambda title: f"<h1>{title}</h1>")
    save_result(tmp_path / "out.html", result, ABOUT | {"source": None}, lambda: picture)
    expected = "<h1>Attention: run_a, checkpoint best (step 1,200)</h1>"
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == expected


def test_a_diff_has_a_panel_for_each_comparison() -> None:
    model = random_model()
    result = diff_models(model, nudged(model), BATCHES)
    predictions, cka, heads, weights = draw_diff(result).figure.axes
    assert result.predictions is not None
    assert result.heads is not None
    assert result.cka is not None
    lines = {str(line.get_label()): line.get_ydata() for line in predictions.get_lines()}
    np.testing.assert_array_equal(np.asarray(lines["KL(A||B)"]), result.predictions.kl_ab_by_position)
    np.testing.assert_array_equal(np.asarray(lines["KL(B||A)"]), result.predictions.kl_ba_by_position)
    np.testing.assert_array_equal(numbers(cka.images[0]), result.cka)
    assert [text.get_text() for text in cka.texts] == [f"{value:.2f}" for value in result.cka.flatten()]
    for axes, values in ((heads, result.heads.match_divergences), (weights, result.weights.relative_changes)):
        widths = [bar.get_width() for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
        assert widths == sorted(values.tolist(), reverse=True)[:MAX_BARS]
    a, b = result.heads.matches[int(result.heads.match_divergences.argmax())]
    assert heads.get_yticklabels()[0].get_text() == f"{result.heads.heads_a[a]} → {result.heads.heads_b[b]}"
    largest = result.weights.tensors[int(result.weights.relative_changes.argmax())]
    assert weights.get_yticklabels()[0].get_text() + ".weight" == largest
    (axes,) = draw_diff(dataclasses.replace(result, predictions=None, cka=None, heads=None)).figure.axes
    assert len(axes.patches) == len(weights.patches)
    assert len(draw_diff(diff_models(model, model, BATCHES)).figure.axes) == 4
