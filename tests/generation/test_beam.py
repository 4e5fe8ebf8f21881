"""Beam search against `transformers`."""

from typing import Any

import pytest
import torch

from lumiere.data.tokenizer import EOT, PAD, SOT
from lumiere.generation.decoding import beam_search
from lumiere.generation.kv_cache import CachedDecoder
from lumiere.generation.sampling import Sampling
from tests.generation.conftest import random_model
from tests.models.build import ROTARY, stock_llama


@pytest.mark.parametrize("num_beams", [2, 4, 7])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("end", [1.0, 3.0])
def test_it_is_that_of_transformers(num_beams: int, settings: dict[str, Any], end: float) -> None:
    """With texts that end and texts that do not: `end` scales the end token's vector, and with it its logits."""
    model = random_model(**ROTARY, d_value=8, num_layers=1)
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
        rows = [row[len(prompt) :].tolist() for row in expected.sequences]
        texts = [row[: row.index(EOT)] if EOT in row else row for row in rows]
        found = beam_search(CachedDecoder(model), prompt, num_beams, 8, [EOT], Sampling(**settings))
        assert [list(beam.tokens) for beam in found] == texts
        assert [beam.is_ended for beam in found] == [EOT in row for row in rows]
        scores = torch.tensor([beam.score for beam in found])
        torch.testing.assert_close(scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
