"""Beam search against `transformers`, and against all texts that there are."""

import itertools

import pytest
import torch

from lumiere.data.tokenizer import EOT, PAD, SOT
from lumiere.errors import LumiereError
from lumiere.generation.decoding import beam_search
from lumiere.generation.kv_cache import CachedDecoder, FullForward
from lumiere.generation.sampling import Sampling
from lumiere.models.transformer import Transformer
from tests.generation.conftest import CONTEXT_SIZE, VOCAB_SIZE, random_model


def llama_of(model: Transformer):
    """The same model by `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=model.embedding_size,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        head_dim=model.d_key,
        max_position_embeddings=CONTEXT_SIZE,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=SOT,
        eos_token_id=EOT,
        pad_token_id=PAD,
    )
    llama = LlamaForCausalLM(config).eval()
    renamed = {
        "token_embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "blocks.": "model.layers.",
        "attention_norm": "input_layernorm",
        "feedforward_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feedforward": "mlp",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs) if not name.startswith("model.") or "layers" in name else name
        weights[name] = value
    problems = llama.load_state_dict(weights, strict=False)
    assert not problems.unexpected_keys
    assert problems.missing_keys in ([], ["lm_head.weight"])
    return llama


@pytest.mark.parametrize("num_beams", [2, 4, 7])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("end", [0.0, 3.0])
def test_it_is_that_of_transformers(num_beams: int, settings: dict[str, float], end: float) -> None:
    """With texts that end and with texts that do not: `end` lengthens the end's vector, and with it its logits."""
    model = random_model("rotary", d_value=8, layers=1)
    if end:
        model.token_embedding.weight.data[EOT] *= end
    llama = llama_of(model)
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
        found = beam_search(CachedDecoder(model), prompt, num_beams, 8, Sampling(**settings))  # type: ignore[arg-type]
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


def test_no_beams_are_refused() -> None:
    with pytest.raises(LumiereError, match="at least 1 beam, not 0"):
        beam_search(CachedDecoder(random_model("learned")), [SOT], 0, 3)
