"""generate(): every mode, on a multi-head and on a latent-attention model."""

import pytest
import torch
from conftest import GOLDEN_NAMES, Golden
from tolerances import CACHED_LOGITS

PROMPT = torch.tensor([[5, 17, 33, 8, 61, 2, 44]])
models = pytest.mark.parametrize("name", GOLDEN_NAMES)


@pytest.fixture
def model(name: str) -> torch.nn.Module:
    model = Golden(name).model()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate(model: torch.nn.Module, prompt: torch.Tensor = PROMPT, **kwargs: object) -> torch.Tensor:
    kwargs.setdefault("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, max_new_tokens=10, **{"do_sample": False, **kwargs})


@models
def test_greedy_equals_repeated_forward_passes(model: torch.nn.Module) -> None:
    tokens = PROMPT
    for _ in range(10):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model), tokens)
    assert torch.equal(generate(model, use_cache=False), tokens)


@models
def test_cached_logits_equal_uncached(model: torch.nn.Module) -> None:
    text = torch.randint(96, (2, 15))
    with torch.no_grad():
        whole = model(text).logits
        first = model(text[:, :6], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for position in range(6, 15):
            step = model(text[:, position : position + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= CACHED_LOGITS


@models
def test_sampling_is_reproducible(model: torch.nn.Module) -> None:
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(generate(model, do_sample=True, temperature=2.0, top_k=50))
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


@models
def test_beam_search_equals_beam_search_without_a_cache(model: torch.nn.Module) -> None:
    beams = generate(model, num_beams=4)
    assert beams.shape == (1, 17)
    assert torch.equal(beams, generate(model, num_beams=4, use_cache=False))


@models
def test_static_cache_equals_dynamic(model: torch.nn.Module) -> None:
    assert torch.equal(generate(model, cache_implementation="static"), generate(model))


@models
def test_assisted_generation_equals_greedy(model: torch.nn.Module) -> None:
    """With the model as its own assistant, and with a random one."""
    from transformers import AutoModelForCausalLM

    random = AutoModelForCausalLM.from_config(model.config).eval()
    random.generation_config = model.generation_config
    assert torch.equal(generate(model, assistant_model=model), generate(model))
    assert torch.equal(generate(model, assistant_model=random), generate(model))


@models
def test_left_padded_batch_equals_single_sequences(model: torch.nn.Module) -> None:
    batch, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate((7, 5, 2)):
        batch[row, 7 - length :], mask[row, 7 - length :] = PROMPT[0, :length], 1
    together = generate(model, batch, attention_mask=mask)
    for row, length in enumerate((7, 5, 2)):
        assert torch.equal(together[row, 7:], generate(model, PROMPT[:, :length])[0, length:])


@models
def test_embeddings_as_input(model: torch.nn.Module) -> None:
    embeddings = model.get_input_embeddings()(PROMPT)
    generated = model.generate(
        inputs_embeds=embeddings, attention_mask=torch.ones_like(PROMPT), max_new_tokens=10, do_sample=False
    )
    assert torch.equal(generated, generate(model)[:, PROMPT.shape[1] :])


@models
def test_logits_to_keep(model: torch.nn.Module) -> None:
    whole = model(PROMPT).logits
    torch.testing.assert_close(model(PROMPT, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(PROMPT, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
