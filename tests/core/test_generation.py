"""generate(): every mode, on a multi-head and on a latent-attention model."""

import copy
import inspect

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import GOLDEN_NAMES, Golden
from tolerances import CACHED_LOGITS
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    pipeline,
)

import modeling_deepseekmoe
from modeling_deepseekmoe.transformers_support import cache_name

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


# --------------------------------------------------------------------------------------------- caches of every kind
@models
@pytest.mark.parametrize(
    "kind",
    [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"cache_implementation": "static", "num_beams": 3}],
    ids=["prompt lookup", "beams", "static with beams"],
)
def test_the_text_is_that_without_a_cache(model: torch.nn.Module, kind: dict) -> None:
    beams = {"num_beams": kind.get("num_beams", 1)}
    assert torch.equal(generate(model, **kind), generate(model, use_cache=False, **beams))


@pytest.mark.slow  # the library compiles itself for a minute when it is first used
@pytest.mark.parametrize("name", ["v2-lite", "v2-group-limited", "v3-noaux"])
def test_quantised_cache(model: torch.nn.Module, name: str) -> None:
    """Four bits change the text: to what transformers' own classes write with the same weights and cache."""
    modeling_deepseekmoe.register()
    native = Golden(name).model()
    assert type(native).__module__.startswith("transformers.")
    native.generation_config = model.generation_config
    settings = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4}
    texts = [generate(it, cache_implementation="quantized", cache_config=settings) for it in (model, native)]
    assert torch.equal(*texts) and not torch.equal(texts[0], generate(model))


@models
def test_second_turn_with_a_kept_cache(model: torch.nn.Module) -> None:
    """What is said next continues the cache; the logits equal one pass over everything without a cache."""
    cache = DynamicCache(config=model.config)
    first = generate(model, **{cache_name(): cache})
    second = torch.cat([first, torch.tensor([[9, 21, 5]])], dim=1)
    turn = model.generate(
        second, attention_mask=torch.ones_like(second), max_new_tokens=6, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **{cache_name(): cache},
    )  # fmt: skip
    whole = model(turn.sequences, use_cache=False).logits[:, second.shape[1] - 1 : -1]
    assert (torch.stack(turn.logits, dim=1) - whole).abs().max() <= CACHED_LOGITS
    assert torch.equal(whole.argmax(-1), turn.sequences[:, second.shape[1] :])


@models
def test_static_cache_of_a_fixed_length(model: torch.nn.Module) -> None:
    cache = StaticCache(config=model.config, max_cache_len=24)
    text = torch.randint(96, (2, 20))
    steps = [model(part, use_cache=True, past_key_values=cache).logits for part in text.split([7, 1, 4, 8], dim=1)]
    assert (torch.cat(steps, dim=1) - model(text, use_cache=False).logits).abs().max() <= CACHED_LOGITS
    assert cache.get_seq_length() == 20


@models
def test_batch_of_four_left_padded_with_a_static_cache(model: torch.nn.Module) -> None:
    batch, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
    lengths = (7, 5, 2, 1)
    for row, length in enumerate(lengths):
        batch[row, 7 - length :], mask[row, 7 - length :] = PROMPT[0, -length:], 1
    for kind in ({}, {"cache_implementation": "static"}):
        together = generate(model, batch, attention_mask=mask, **kind)
        for row, length in enumerate(lengths):
            assert torch.equal(together[row, 7:], generate(model, PROMPT[:, -length:], use_cache=False)[0, length:])


@pytest.mark.parametrize("name", ["v1-mha", "v1-gqa-norm"])
def test_continuous_batching(model: torch.nn.Module) -> None:
    """transformers' paged cache is for plain attention."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [PROMPT[0].tolist(), PROMPT[0, :3].tolist(), PROMPT[0, 2:].tolist()]
    model.set_attn_implementation("paged|eager")
    settings = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paged = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)
    found = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=paged)
    model.set_attn_implementation("eager")
    texts = [output.generated_tokens for output in found.values()]
    for prompt in prompts:
        alone = generate(model, torch.tensor([prompt]), use_cache=False)[0, len(prompt) :].tolist()
        assert alone in texts
    assert len(texts) == len(prompts)


# ---------------------------------------------------------------------------------------- the cache's two names
@models
def test_both_names_of_the_cache(model: torch.nn.Module, name: str) -> None:
    """By either name, and by place; in the decoder, the language model, a classifier and `generate`."""
    decoder = AutoModel.from_pretrained(Golden(name).folder).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(Golden(name).folder).eval()
    rest = torch.tensor([[3, 9]])

    def filled() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(PROMPT, past_key_values=cache, use_cache=True)
        return cache

    for called in (model, decoder, classifier):
        called.config.pad_token_id = 0
        results = [called(rest, cache=filled())[0], called(rest, past_key_values=filled())[0]]
        results.append(called(rest, None, None, filled())[0])
        results.append(called(rest, None, None, None, cache=filled())[0])
        without = called(rest)[0]
        assert all(torch.equal(result, results[0]) for result in results)
        assert not torch.equal(without, results[0])
        for both in ({"cache": filled(), "past_key_values": filled()},):
            with pytest.raises(ValueError, match="cache, past_key_values: only one of them is allowed"):
                called(rest, **both)
        with pytest.raises(ValueError, match="only one of them is allowed"):
            called(rest, None, None, filled(), cache=filled())
        assert cache_name() in inspect.signature(called.forward).parameters
        hooked = copy.deepcopy(called)
        add_hook_to_module(hooked, ModelHook())
        assert [*inspect.signature(hooked.forward).parameters] == [*inspect.signature(called.forward).parameters]
    texts = [generate(model, **{key: DynamicCache(config=model.config)}) for key in ("cache", "past_key_values")]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], generate(model, use_cache=False))


@models
def test_a_layer_takes_both_names(model: torch.nn.Module) -> None:
    layer, hidden = model.model.layers[0], torch.randn(1, 3, model.config.hidden_size)
    positions = model.model.rotary_emb(hidden, torch.arange(3)[None])
    for key in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        layer(hidden, position_embeddings=positions, **{key: cache})
        assert cache.get_seq_length() == 3


@models
def test_outputs_hold_the_cache_under_the_name_of_the_installed_transformers(model: torch.nn.Module) -> None:
    outputs = model(PROMPT, use_cache=True)
    assert outputs[cache_name()].get_seq_length() == PROMPT.shape[1]
    assert outputs.past_key_values is outputs[cache_name()]
    assert set(outputs.keys()) == {"logits", cache_name()}


def test_pipeline(source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text in, text out: what an uncached greedy loop gives."""
    model, tokenizer = Golden("v3-noaux").model(), AutoTokenizer.from_pretrained(source)
    model.generation_config.eos_token_id = None
    ids = tokenizer("Hi", return_tensors="pt").input_ids % 96
    alphabet = tokenizer.decode(ids[0])
    tokens = tokenizer(alphabet, return_tensors="pt").input_ids
    assert tokens.max() < 96
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    found = run(alphabet, max_new_tokens=8, do_sample=False, return_tensors=True)
    assert found[0]["generated_token_ids"] == tokens[0].tolist()
