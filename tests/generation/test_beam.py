"""Beam search against `transformers`, and against all possible texts."""

import itertools
from typing import Any

import pytest
import torch

from lumiere.data.tokenizer import EOT, PAD, SOT
from lumiere.generation.decoding import beam_search
from lumiere.generation.kv_cache import CachedDecoder, FullForward
from lumiere.generation.sampling import Sampling
from tests.generation.conftest import VOCAB_SIZE, random_model
from tests.models.build import stock_llama


@pytest.mark.parametrize("num_beams", [2, 4, 7])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("end", [1.0, 3.0])
def test_it_is_that_of_transformers(num_beams: int, settings: dict[str, Any], end: float) -> None:
    """With texts that end and texts that do not: `end` scales the end token's vector, and with it its logits."""
    model = random_model("rotary", d_value=8, layers=1)
    model.token_embedding.weight.data[EOT] *= end
    llama = stock_llama(model, bos_token_id=SOT, eos_token_id=EOT, pad_token_id=PAD)
    for prompt in ([SOT, 5, 6], [SOT, 9], [SOT, 30, 31, 32]):
        expected = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            do_sample=False,
            max_new_tokens=8,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        texts = [row[len(prompt) :].tolist() for row in expected.sequences]
        texts = [row[: row.index(EOT)] if EOT in row else row for row in texts]
        found = beam_search(CachedDecoder(model), prompt, num_beams, 8, Sampling(**settings))
        assert [list(beam.tokens) for beam in found] == texts
        scores = torch.tensor([beam.score for beam in found])
        torch.testing.assert_close(scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


def test_enough_beams_find_the_best_of_all_texts() -> None:
    """Five tokens and three steps: 1 + 5 + 25 texts that end before the third step, and 125 of three tokens."""
    model = random_model("learned")
    open_ids = [EOT, 3, 4, 5, 6]
    suppressed = [i for i in range(VOCAB_SIZE) if i not in open_ids]
    slow = FullForward(model, suppressed)
    scores = {}
    for text in itertools.product(open_ids, repeat=3):
        total, written = 0.0, []
        logits_BV = slow.start([[SOT]])
        for token in text:
            total += float(logits_BV.log_softmax(-1)[0, token])
            written.append(token)
            if token == EOT:
                break
            logits_BV = slow.step([token])
        scores[tuple(written)] = total / len(written)
    best = max(scores, key=scores.__getitem__)
    (first, *_) = beam_search(CachedDecoder(model, suppressed), [SOT], 130, 3)
    assert first.tokens == tuple(token for token in best if token != EOT)
    assert first.score == pytest.approx(scores[best], abs=1e-4)
    assert first.is_ended == (EOT in best)
