"""Generation with drafts of multi-token prediction: greedy the same tokens, sampling the same distribution."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import MLA, V3_LIKE, Golden
from mtp_cases import cycle, golden_with_mtp, left_padded, trained
from tokenizers_of_tests import byte_level
from tolerances import CACHED_LOGITS, SAME_COMPUTATION
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedTokenizerFast, TextStreamer

from modeling_deepseekmoe import DeepseekMoeForCausalLM, mtp_assistant
from modeling_deepseekmoe.mtp_drafting import Drafter

GREEDY = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
SIXTEENS = {"hidden_size": 16, "moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 3}
GATES = {
    "softmax": {},
    "grouped": {**MLA, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    "sigmoid": {**V3_LIKE, **SIXTEENS},
}


@functools.cache
def model_of(gate: str = "softmax", depths: int = 1) -> DeepseekMoeForCausalLM:
    return trained(**GATES[gate], num_nextn_predict_layers=depths)


@pytest.mark.parametrize("rows", [1, 5], ids=["alone", "padded"])
@pytest.mark.parametrize(("gate", "depths", "drafts"), [
    ("softmax", 1, 1), ("softmax", 1, 3), ("softmax", 2, 2), ("softmax", 3, 3), ("softmax", 3, 2), ("grouped", 1, 2),
    ("sigmoid", 2, 1),
])  # fmt: skip
def test_greedy_is_ordinary_greedy(gate: str, depths: int, drafts: int, rows: int) -> None:
    model = model_of(gate, depths)
    torch.manual_seed(rows)
    inputs = left_padded(rows, 9)
    wanted = model.generate(**inputs, **GREEDY)
    for cache in ({}, {"cache_implementation": "static"}):
        found = model.generate(
            **inputs, **GREEDY, **cache, use_mtp=True, num_assistant_tokens=drafts, return_dict_in_generate=True
        )
        assert torch.equal(found.sequences, wanted)
        assert len(found.mtp_acceptance) == drafts and 0.3 < found.mtp_acceptance[0] <= 1
        assert found.mtp_steps < 63 * rows


@pytest.mark.parametrize("depths", [1, 2])
def test_greedy_of_official_names(v3: Golden, tmp_path: Any, depths: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_with_mtp(v3, tmp_path / "mtp", depths), mtp=True).eval()
    torch.manual_seed(0)
    for inputs in (left_padded(1, 7), left_padded(5, 7)):
        assert torch.equal(model.generate(**inputs, **GREEDY, use_mtp=True), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("cache", [None, "static"])
def test_rows_that_end_early(cache: str | None) -> None:
    model = model_of(depths=2)
    inputs = left_padded(5, 9)
    ordinary = model.generate(**inputs, **GREEDY)
    ends = ordinary[2, 9 + 11].item()  # one row and perhaps others end at this token
    kwargs = {**GREEDY, "eos_token_id": [ends], "cache_implementation": cache}
    wanted = model.generate(**inputs, **kwargs)
    assert torch.equal(model.generate(**inputs, **kwargs, use_mtp=True), wanted)
    lengths = (wanted[:, 9:] == ends).long().cumsum(1).eq(0).sum(1)
    assert len(lengths.unique()) > 1


@pytest.mark.parametrize(("depths", "drafts"), [(1, 1), (1, 3), (2, 2), (3, 3)])
def test_drafts_are_what_the_layers_predict(depths: int, drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With caches, and rows of different lengths in them, against whole texts by themselves."""
    model, inputs = model_of(depths=depths), left_padded(4, 9)
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Drafter.draft

    def draft(self: Drafter, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(original(self, *args))
        return made[-1]

    monkeypatch.setattr(Drafter, "draft", draft)
    texts: list[list[list[int]]] = []
    verify = DecodingTexts(texts, monkeypatch)
    model.generate(**inputs, **{**GREEDY, "max_new_tokens": 24}, use_mtp=True, num_assistant_tokens=drafts)
    assert len(made) == len(texts) > 5 and verify.lengths_differ
    for rows, (tokens, logits) in zip(texts, made, strict=True):
        for row, text in enumerate(rows):
            whole = [
                one
                for one, real in zip(text, [*inputs["attention_mask"][row].tolist(), *[1] * 99], strict=False)
                if real
            ]
            for idx, expected in enumerate(predicted(model, whole, tokens[row].tolist(), depths)):
                assert (logits[row, idx] - expected).abs().max() <= CACHED_LOGITS, (row, idx)


class DecodingTexts:
    """Keeps the rows' texts at every call of the drafter."""

    def __init__(self, texts: list, monkeypatch: pytest.MonkeyPatch) -> None:
        from modeling_deepseekmoe.mtp_decoding import DecodingLoop

        self.lengths_differ, original = False, DecodingLoop._chooser

        def chooser(loop: Any, rows: Any) -> Any:
            self.lengths_differ |= len(set(rows.lengths)) > 1
            texts.append([rows.ids[row, :length].tolist() for row, length in enumerate(rows.lengths)])
            return original(loop, rows)

        monkeypatch.setattr(DecodingLoop, "_chooser", chooser)


@torch.no_grad()
def predicted(
    model: DeepseekMoeForCausalLM, text: list[int], drafts: list[int], depths: int
) -> Iterator[torch.Tensor]:
    """The logits of the drafts behind a text, its last token pending, without a cache."""
    hidden = model.model(torch.tensor([text[:-1]])).last_hidden_state
    outputs, layers = hidden, model.model.layers[model.config.num_hidden_layers :]
    for idx in range(len(drafts)):
        ids = torch.tensor([[*text[1:], *drafts[:idx]]])
        if depths > 1:
            ids = ids[:, idx:]  # each layer is another token ahead
        elif idx:
            # The only layer again, behind its own entries: position n + idx reads its output at the one before.
            hidden = torch.cat([hidden, outputs[:, -1:]], dim=1)
        embeds, positions = model.model.embed_tokens(ids), torch.arange(ids.shape[1])[None]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        rotary = model.model.rotary_emb(embeds, positions)
        layer = layers[idx if depths > 1 else 0]
        outputs = layer(hidden, embeds, attention_mask=mask, position_ids=positions, position_embeddings=rotary)[0]
        if depths > 1:
            hidden = outputs
        yield model.lm_head(outputs[0, -1])


def chi_square(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The p-value of counts against probabilities; cells that expect fewer than five are one."""
    expected = probabilities * observed.sum()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]]).double()
    kept = expected > 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    return float(torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2))


@pytest.mark.parametrize(("depths", "drafts", "cache"), [
    (1, 2, None), (2, 2, "static"), pytest.param(1, 1, None, marks=pytest.mark.slow),
])  # fmt: skip
def test_sampling_has_the_exact_distribution(depths: int, drafts: int, cache: str | None) -> None:
    vocabulary, length, draws = 6, 4, 20_000
    torch.manual_seed(4)
    model = trained(steps=0, vocab_size=vocabulary, initializer_range=0.4, num_nextn_predict_layers=depths, **{
        "hidden_size": 16, "num_hidden_layers": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 0,
    })  # fmt: skip
    prompt, warpers = torch.tensor([[3, 1, 4, 1]]), {"temperature": 0.8, "top_k": 4}
    exact = torch.zeros(vocabulary**length, dtype=torch.float64)

    @torch.no_grad()
    def walk(ids: torch.Tensor, probability: float, place: int) -> None:
        if ids.shape[1] == prompt.shape[1] + length:
            exact[place] = probability
            return
        logits = model(ids).logits[0, -1].double() / warpers["temperature"]
        least = logits.topk(warpers["top_k"]).values[-1]
        for token, share in enumerate(logits.masked_fill(logits < least, -torch.inf).softmax(-1).tolist()):
            if share:
                walk(torch.cat([ids, torch.tensor([[token]])], dim=1), probability * share, place * vocabulary + token)

    walk(prompt, 1.0, 0)
    torch.manual_seed(1)
    counts, powers = torch.zeros_like(exact), vocabulary ** torch.arange(length - 1, -1, -1)
    for _ in range(8):
        found = model.generate(
            prompt.expand(draws // 8, -1), attention_mask=torch.ones(draws // 8, 4), do_sample=True, pad_token_id=0,
            max_new_tokens=length, use_mtp=True, num_assistant_tokens=drafts, cache_implementation=cache,
            return_dict_in_generate=True, **warpers,
        )  # fmt: skip
        counts += torch.bincount((found.sequences[:, 4:] * powers).sum(dim=1), minlength=len(counts))
        assert 0 < found.mtp_acceptance[0] < 1
    assert exact.sum().item() == pytest.approx(1) and counts[exact == 0].sum() == 0
    assert chi_square(counts, exact) > 0.01


@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 20, "eos_token_id": list(range(3, 12))},
    {"prefix_allowed_tokens_fn": lambda row, ids: [4 + row, 9 + len(ids) % 3, 20, 21, 22]},
    {"sequence_bias": [[[7], -4.0], [[5, 6], 3.0]]},
])  # fmt: skip
def test_processors_see_the_texts_that_they_would_see(options: dict[str, Any]) -> None:
    model, inputs = model_of(depths=2), left_padded(4, 9)
    wanted = model.generate(**inputs, **GREEDY, **options)
    assert torch.equal(model.generate(**inputs, **GREEDY, **options, use_mtp=True), wanted)


def test_scores_and_logits() -> None:
    model, inputs = model_of(), left_padded(2, 9)
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    wanted = model.generate(**inputs, **options, repetition_penalty=1.2)
    found = model.generate(**inputs, **options, repetition_penalty=1.2, use_mtp=True)
    assert torch.equal(found.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        one, other = torch.stack(found[name]), torch.stack(wanted[name])
        assert one.shape == other.shape and (one - other).abs().max() <= CACHED_LOGITS


def test_streaming_and_stop_strings(capsys: pytest.CaptureFixture) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    model = trained(vocab_size=len(tokenizer))
    inputs = {"input_ids": cycle(1, 9), "attention_mask": torch.ones(1, 9)}
    ordinary = model.generate(**inputs, **GREEDY)
    stop = tokenizer.decode(ordinary[0, 20:22])
    wanted = model.generate(**inputs, **GREEDY, stop_strings=[stop], tokenizer=tokenizer)
    capsys.readouterr()
    found = model.generate(
        **inputs, **GREEDY, stop_strings=[stop], tokenizer=tokenizer, use_mtp=True, streamer=TextStreamer(tokenizer)
    )
    assert torch.equal(found, wanted) and found.shape[1] < ordinary.shape[1]
    assert capsys.readouterr().out.strip() == tokenizer.decode(found[0]).strip()


def test_every_way_to_ask_for_it() -> None:
    model, inputs = model_of(), left_padded(2, 9)
    wanted = model.generate(**inputs, **GREEDY)
    assistant = mtp_assistant(model, 2)
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=assistant), wanted)
    assert len(assistant.acceptance) == 2 and assistant.steps > 0
    config = GenerationConfig(**GREEDY)
    config.use_mtp = True
    assert torch.equal(model.generate(**inputs, generation_config=config), wanted)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_mtp=False), wanted)
    several = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2, use_mtp=True)
    assert several.shape == (4, 12)


def test_what_is_not_allowed(tiny_model: Callable) -> None:
    model, inputs = model_of(), left_padded(2, 9)
    with pytest.raises(ValueError, match=r"has no multi-token-prediction layers\. Load .* mtp=True.*add_mtp"):
        tiny_model().eval().generate(**inputs, **GREEDY, use_mtp=True)
    for kwargs, message in (
        ({"num_beams": 2}, "num_beams=2 is not allowed"),
        ({"use_cache": False}, "use_cache=False is not allowed"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens=0 is not allowed"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is not allowed"),
        ({"assistant_model": model}, "assistant_model is not allowed"),
        ({"assistant_confidence_threshold": 0.4}, "assistant_confidence_threshold=0.4 is not allowed"),
        ({"num_assistant_tokens_schedule": "heuristic"}, "num_assistant_tokens_schedule='heuristic' is not allowed"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True is not allowed"),
        ({"generation_config": GenerationConfig(stop_strings="a")}, "one or more stop strings"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **GREEDY, use_mtp=True, **kwargs)
    with pytest.raises(ValueError, match=r"has no multi-token-prediction layers"):
        tiny_model().eval().generate(**inputs, **GREEDY, custom_generate=mtp_assistant(model))
    with pytest.raises(ValueError, match="from 1 to 2, the number of layers"):
        model_of(depths=2).generate(**inputs, **GREEDY, use_mtp=True, num_assistant_tokens=3)
    cache = DynamicCache()
    with torch.no_grad():
        model(inputs["input_ids"][:, :3], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="a cache with 3 tokens is not allowed"):
        model.generate(**inputs, **GREEDY, use_mtp=True, past_key_values=cache)
    with pytest.raises(ValueError, match="inputs_embeds is not allowed"):
        embeds = model.model.embed_tokens(inputs["input_ids"]).detach()
        model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY, use_mtp=True)


def test_a_last_hidden_state_is_returned_on_request() -> None:
    model, ids = model_of(), cycle(2, 9)
    with torch.no_grad():
        assert model(ids).last_hidden_state is None
        hidden = model(ids, output_last_hidden_state=True).last_hidden_state
        assert (model.lm_head(hidden) - model(ids).logits).abs().max() <= SAME_COMPUTATION
