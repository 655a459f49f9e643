"""How specialised experts are: every figure against loops over tokens and experts."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_loops import BLOCKS, CASES, CODE, PROSE, TEXT, Change, Loop, counts_of, distance, model_of, number, output_of
from tokenizers_of_tests import tokenizer
from tolerances import DOUBLE, ROUTED_IN_DOUBLE, SAME_COMPUTATION
from torch import nn

from modeling_deepseekmoe.analysis.evaluation import traced_layers
from modeling_deepseekmoe.analysis.expert_domains import effective_number, jensen_shannon
from modeling_deepseekmoe.analysis.expert_similarity import mean_cosines
from modeling_deepseekmoe.analysis.interventions import Intervention, Rerouter, intervening, losses_of_blocks
from modeling_deepseekmoe.analysis.specialisation import Specialisation, measure_specialisation
from modeling_deepseekmoe.analysis.texts import domain_batches, read_domains
from modeling_deepseekmoe.routing import TooFewExpertsError

NO_SHARED = (
    "The model has no shared experts: nothing beside the routed ones is named shared_experts or shared_expert or "
    "shared_mlp."
)


def measure(model: nn.Module, text: Mapping[str, Sequence[torch.Tensor]] = TEXT, **more: Any) -> Specialisation:
    return measure_specialisation(model, text, **({"title": "model", "source": "random"} | more))


@cache
def prepared(name: str) -> tuple[nn.Module, Loop, Specialisation]:
    model = model_of(name)
    more = {"ratios": (1 / 16, 1 / 8, 1 / 4), "single_experts": 2, "output_tokens": 7}
    return model, Loop(model, CASES[name][0]), measure(model, **more)


def changing(model: nn.Module, **change: Any) -> AbstractContextManager[None]:
    layers = traced_layers(model)
    return intervening(layers, {layer.index: Rerouter.of(layer) for layer in layers}, Intervention(**change))


def in_halves(rows: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    middle = (len(rows) + 1) // 2
    return rows[:middle], rows[middle:]


EVERY_CASE = pytest.mark.parametrize("name", CASES)


@EVERY_CASE
def test_losses_against_loops(name: str) -> None:
    _, loop, found = prepared(name)
    tolerance, sections, rises = loop.rule.tolerance, found.sections, []
    base = loop.losses(BLOCKS, Change())
    assert found.loss == pytest.approx(base.mean().item(), abs=tolerance)

    def check(point: dict[str, Any], change: Change) -> None:
        losses = loop.losses(BLOCKS, change)
        rises.append((losses - base).mean().item())
        assert point["rise"] == pytest.approx(rises[-1], abs=tolerance), change
        error = (losses - base).numpy().std(ddof=1) / len(base) ** 0.5
        assert point["error"] == pytest.approx(error, abs=tolerance), change
        assert point.get("loss", found.loss + point["rise"]) == pytest.approx(losses.mean().item(), abs=tolerance)

    experts = len(loop.blocks[1].gate.weight)
    masks, fewer = sections["redundancy"].figures["points"], sections["activation"].figures["points"]
    assert [point["masked"] for point in masks] == ([0, 1, 2, 4] if experts == 16 else [0, 1, 2])
    assert [point["share"] for point in masks] == [point["masked"] / experts for point in masks]
    assert [point["activated"] for point in fewer] == [3, 2, 1]
    for point in masks:
        check(point, Change(masked=point["masked"]))
        scaled = loop.losses(BLOCKS, Change(masked=point["masked"], same_sum=True)) - base
        assert point["rise_with_the_same_sum"] == pytest.approx(scaled.mean().item(), abs=tolerance)
        error = scaled.numpy().std(ddof=1) / len(base) ** 0.5
        assert point["error_with_the_same_sum"] == pytest.approx(error, abs=tolerance)
    for point in fewer:
        check(point, Change(top_k=point["activated"]))
    if name == "qwen3_moe":
        assert sections["shared"].empty == NO_SHARED and not sections["shared"].figures
    else:
        points = {point["shared experts"]: point for point in sections["shared"].figures["points"]}
        assert list(points) == ["on", "off", "off, one more routed", "on, one more routed"]
        for case, (shared, top_k) in zip(points, ((True, 3), (False, 3), (False, 4), (True, 4)), strict=True):
            check(points[case], Change(shared=shared, top_k=top_k))
    loop.losses(BLOCKS, Change())
    counts = {index: counts_of([ids for _, ids, _, _ in seen], experts) for index, seen in loop.seen.items()}
    for row in sections["single"].figures["layers"]:
        own = counts[row["layer"]]
        assert [one["expert"] for one in row["experts"]] == sorted(range(experts), key=lambda expert: -own[expert])[:2]
        for one in row["experts"]:
            assert one["share"] == pytest.approx(own[one["expert"]] / sum(own), abs=SAME_COMPUTATION)
            check(one, Change(expert=one["expert"], layer=row["layer"]))
        assert (row["shared_off"] is None) == (name == "qwen3_moe")
        if row["shared_off"] is not None:
            check(row["shared_off"], Change(shared=False, layer=row["layer"]))
    assert rises.count(0.0) == (2 if name == "qwen3_moe" else 3) and len(set(rises)) > len(rises) - 3
    json.dumps(found.to_dict(), allow_nan=False)


@EVERY_CASE
def test_use_of_experts_against_loops(name: str) -> None:
    _, loop, found = prepared(name)
    loop.losses(BLOCKS, Change())
    experts, domains = len(loop.blocks[1].gate.weight), found.sections["domains"].figures
    choices = {index: [ids for _, ids, _, _ in seen] for index, seen in loop.seen.items()}
    sequences = {index: [ids[9 * row : 9 * row + 9] for row in range(7)] for index, ids in choices.items()}
    rows = {"prose": (0, 1, 2), "code": (3, 4, 5, 6)}

    def count(index: int, wanted: Sequence[int]) -> list[int]:
        return counts_of([ids for row in wanted for ids in sequences[index][row]], experts)

    def mean(values: Callable[[int], float]) -> float:
        return sum(values(index) for index in choices) / len(choices)

    def busiest(index: int, domain: str) -> set[int]:
        counts = count(index, rows[domain])
        return set(sorted(range(experts), key=lambda expert: -counts[expert])[:3])

    (pair,) = domains["pairs"]
    assert pair["domains"] == ["prose", "code"] and domains["layers"] == list(choices)
    by_layer = [distance(*(count(index, own) for own in rows.values())) for index in choices]
    assert pair["by_layer"] == pytest.approx(by_layer, abs=DOUBLE)
    assert domains["mean_distance"] == pair["distance"] == pytest.approx(sum(by_layer) / len(by_layer), abs=DOUBLE)
    common = mean(lambda index: len(busiest(index, "prose") & busiest(index, "code")))
    assert pair["common_busiest"] == pytest.approx(common)
    halves = []
    for of in domains["domains"]:
        own = rows[of["domain"]]
        assert (of["tokens"], of["sequences"]) == (9 * len(own), len(own))
        halves.append(mean(lambda index, own=own: distance(*(count(index, half) for half in in_halves(own)))))
        assert of["halves"] == pytest.approx(halves[-1], abs=DOUBLE)
        for place, carried in enumerate(of["carried"], start=1):
            share = mean(lambda index, n=place, own=own: sum(sorted(count(index, own))[-n:]) / (27 * len(own)))
            assert carried == pytest.approx(share, abs=DOUBLE)
        assert all(few["share"] == of["carried"][few["experts"] - 1] for few in of["busiest"])
    assert domains["mean_distance_of_halves"] == pytest.approx(sum(halves) / 2, abs=DOUBLE)
    crossed = [
        mean(lambda index, one=one, other=other: distance(count(index, one), count(index, other)))
        for one in in_halves(rows["prose"])
        for other in in_halves(rows["code"])
    ]
    assert len(crossed) == 4 and pair["halves"] == pytest.approx(sum(crossed) / 4, abs=DOUBLE)
    assert domains["mean_distance_between_halves"] == pair["halves"]
    assert domains["even_share"] == 1 / experts and domains["common_by_chance"] == pytest.approx(9 / experts)

    for row in found.sections["effective"].figures["layers"]:
        index = row["layer"]
        by_token = [number(weights) for _, _, weights, _ in loop.seen[index]]
        by_sequence = [number(count(index, [place])) for place in range(7)]
        load = count(index, range(7))
        # the trace holds weights in float32
        assert row["by_token"] == pytest.approx(sum(by_token) / len(by_token), rel=SAME_COMPUTATION)
        assert row["by_sequence"] == pytest.approx(sum(by_sequence) / 7, rel=DOUBLE)
        assert row["by_text"] == pytest.approx(number(load), rel=DOUBLE)
        assert row["max_violation"] == pytest.approx(max(load) / (sum(load) / experts) - 1, rel=SAME_COMPUTATION)


@EVERY_CASE
def test_similarities_against_loops(name: str) -> None:
    _, loop, found = prepared(name)
    loop.losses(BLOCKS, Change())
    experts, tokens = len(loop.blocks[1].gate.weight), sum(batch.numel() for batch in BLOCKS)
    assert found.sections["outputs"].figures["tokens"] == 7
    of_both = [found.sections[key].figures["layers"] for key in ("weights", "outputs")]
    for row, of_outputs in zip(*of_both, strict=True):
        own = loop.blocks[row["layer"]].experts
        weights = [torch.cat([own.gate_up_proj[e].flatten(), own.down_proj[e].flatten()]) for e in range(experts)]
        inputs = [loop.seen[row["layer"]][i * tokens // 7][0] for i in range(7)]
        outputs = [[output_of(own, expert, token) for expert in range(experts)] for token in inputs]
        for figures, vectors in ((row, [weights]), (of_outputs, outputs)):
            table = [[0.0] * experts for _ in range(experts)]
            for one in range(experts):
                for other in range(experts):
                    cosines = [float(of[one] @ of[other] / (of[one].norm() * of[other].norm())) for of in vectors]
                    table[one][other] = sum(cosines) / len(cosines)
            if loop.rule.tolerance == DOUBLE or figures is row:  # or else a figure may be rounded to its other side
                assert figures["table"] == [[round(value, 4) for value in line] for line in table]
            pairs = [table[one][other] for one, other in combinations(range(experts), 2)]
            nearest = [max(line[:one] + line[one + 1 :]) for one, line in enumerate(table)]
            assert figures["mean"] == pytest.approx(sum(pairs) / len(pairs), abs=loop.rule.tolerance)
            assert figures["nearest"] == pytest.approx(sum(nearest) / experts, abs=loop.rule.tolerance)


@EVERY_CASE
def test_ids_that_experts_receive(name: str) -> None:
    model, loop, _ = prepared(name)
    for intervention, change in (
        ({"masked": 3}, Change(masked=3)), ({"expert": 2}, Change(expert=2)), ({"at_most": 5}, Change()),
        ({"masked": 1, "expert": 5, "more": 1}, Change(masked=1, expert=5, top_k=4)),
        ({"at_most": 1, "shared_off": True}, Change(top_k=1, shared=False)),
    ):  # fmt: skip
        received: dict[int, list[list[int]]] = {index: [] for index in loop.blocks}
        with changing(model, **intervention):
            handles = [
                layer.experts.register_forward_pre_hook(
                    lambda module, args, own=received[layer.index]: own.extend(args[1].tolist())
                )
                for layer in traced_layers(model)
            ]
            losses = losses_of_blocks(model, BLOCKS)
        for handle in handles:
            handle.remove()
        assert (losses - loop.losses(BLOCKS, change)).abs().max() < loop.rule.tolerance
        for index, seen in loop.seen.items():
            assert [{*ids} for ids in received[index]] == [{*ids} for _, ids, _, _ in seen]
            assert not any({*ids} & out for ids, (_, _, _, out) in zip(received[index], seen, strict=True))


@EVERY_CASE
def test_a_model_is_left_as_it_was(name: str) -> None:
    """Also by changes that change nothing, and where a change is interrupted."""
    model, loop, _ = prepared(name)
    base = losses_of_blocks(model, BLOCKS)
    with changing(model, masked=0):
        assert torch.equal(losses_of_blocks(model, BLOCKS), base)
    with changing(model, at_most=3):
        off = (losses_of_blocks(model, BLOCKS) - base).abs().max()
    assert off <= (ROUTED_IN_DOUBLE if loop.rule.tolerance == DOUBLE else loop.rule.tolerance)
    with pytest.raises(KeyError), changing(model, masked=2, shared_off=True):
        assert not torch.equal(losses_of_blocks(model, BLOCKS), base)
        raise KeyError
    with pytest.raises(TooFewExpertsError), changing(model, masked=7, more=7):
        losses_of_blocks(model, BLOCKS)
    assert torch.equal(losses_of_blocks(model, BLOCKS), base)
    measure(model.train(), single_experts=1)
    assert model.training and torch.equal(losses_of_blocks(model.eval(), BLOCKS), base)


def test_blocks_of_different_lengths_and_a_single_one() -> None:
    model, loop, _ = prepared("v1")
    batches = [BLOCKS[0], CODE[:, :5], PROSE[:1, :2]]
    found = measure(model, {"": batches}, ratios=(1 / 8,))
    weights = torch.tensor([8.0] * 2 + [4.0] * 4 + [1.0], dtype=torch.float64)
    base, masked = (float(loop.losses(batches, change) @ weights / 33) for change in (Change(), Change(masked=2)))
    assert found.loss == pytest.approx(base, abs=DOUBLE)
    assert found.sections["redundancy"].figures["points"][1]["loss"] == pytest.approx(masked, abs=DOUBLE)
    point = measure(model, {"": [BLOCKS[1]]}, ratios=(1 / 8,)).sections["redundancy"].figures["points"][-1]
    assert point["error"] is None and math.isfinite(point["rise"])
    section = measure(model, {"": [BLOCKS[1][:1]]}).sections["redundancy"]
    assert section.notes[0] == "The text has 1 sequence only: rises and their errors mean little."


def test_tokens_for_which_an_expert_gives_zero() -> None:
    """Two experts that compute the same are at 1, also if a token makes both of them zero."""
    outputs = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(3, 1, 1)
    outputs[2] = -outputs[2]
    outputs[:, 1:3], outputs[1, 4] = 0, 0
    table = mean_cosines(outputs)
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(table, expected, rtol=0, atol=DOUBLE)
    assert bool(mean_cosines(outputs[:, 1:3]).isnan().all())  # nothing is known of them


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ({}, {}, "domains is not allowed: it is empty"),
        ({"a": BLOCKS, "b": []}, {}, r"domains\['b'\] is not allowed: it is no batch"),
        ({"a": PROSE[None]}, {}, r"domains\['a'\] is not allowed: it is a tensor"),
        ({"a": [PROSE > 9]}, {}, r"domains\['a'\]: torch\.bool of shape"),
        ({"a": [PROSE[:, :1]]}, {}, r"domains\['a'\]: torch\.int64 of shape \(4, 1\) .* S at least 2"),
        ({"a": [PROSE.float()]}, {}, r"torch\.float32 of shape \(4, 9\)"),
        ({"a": [PROSE + 50]}, {}, "vocab_size=96"),
        ({"a": [PROSE - 50]}, {}, "vocab_size=96"),
        (TEXT, {"ratios": (0.5, 0.0, 1.0, math.nan)}, r"ratios=\[0\.5, 0\.0, 1\.0, nan\] is not allowed"),
        (BLOCKS, {}, "domains of type list is not allowed: it must be a dict"),
        (TEXT, {"ratios": ()}, r"ratios=\[\] is not allowed"),
        (TEXT, {"single_experts": -1}, "single_experts=-1 is not allowed: it must be an integer of at least 0"),
        (TEXT, {"single_experts": 1.5}, "single_experts=1.5 is not allowed"),
        (TEXT, {"output_tokens": 0}, "output_tokens=0 is not allowed: it must be an integer of at least 1"),
    ],
)
def test_bad_input(text: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(prepared("v1")[0], text, **more)


def test_models_that_are_refused() -> None:
    with pytest.raises(ValueError, match="DeepseekMoeForCausalLM has no MoE layer"):
        measure(model_of("v1", n_routed_experts=0))
    model = model_of("v1")
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="loss of DeepseekMoeForCausalLM on this text is nan"):
        measure(model)


@pytest.mark.parametrize(
    ("fields", "key", "more", "reason"),
    [
        ({}, "domains", {}, "The text has no domains: --domains COLUMN"),
        ({"n_shared_experts": None}, "shared", {}, "no shared experts"),
        ({"num_experts_per_tok": 1}, "activation", {}, "K = 1"),
        ({}, "single", {"single_experts": 0}, "Not asked for"),
        ({"n_routed_experts": 4}, "redundancy", {"ratios": (0.5, 0.75)}, "2 masked: .* than top_k=3 .* 3 masked"),
        ({"n_routed_experts": 4}, "redundancy", {"ratios": (1 / 16,)}, "Of 4 experts none are masked"),
    ],
)
def test_empty_sections_say_why(fields: dict[str, Any], key: str, more: dict[str, Any], reason: str) -> None:
    section = measure(model_of("v1", **fields), {"": BLOCKS}, **more).sections[key]
    assert re.search(reason, section.empty) and not section.figures


def test_what_few_experts_leave_out_is_noted() -> None:
    found = measure(model_of("v1", n_routed_experts=4), ratios=(0.25, 0.5)).sections["redundancy"]
    assert [point["masked"] for point in found.figures["points"]] == [0, 1] and "2 masked" in found.notes[-1]
    shared = measure(model_of("v1", n_routed_experts=3)).sections["shared"]
    assert [point["shared experts"] for point in shared.figures["points"]] == ["on", "off"]
    assert "No case with one more routed expert" in shared.notes[-1]
    one = measure(prepared("v1")[0], {"a": [PROSE[:1]], "b": [CODE]}).sections["domains"]
    assert one.figures["domains"][0]["halves"] is None and "a has one sequence" in one.notes[0]


def test_single_experts_that_nothing_can_stand_in_for() -> None:
    single = measure(model_of("v1", n_routed_experts=3), single_experts=1).sections["single"]
    assert "fewer than top_k=3" in " ".join((single.empty, *single.notes))


def test_progress_ends_where_it_said() -> None:
    calls: list[tuple[int, int]] = []
    measure(prepared("v2")[0], single_experts=1, progress=lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1 and calls == sorted(calls) and calls[-1][0] == calls[-1][1]


def test_jensen_shannon_and_effective_number() -> None:
    one, other = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = jensen_shannon(one, other)
    assert found.tolist() == pytest.approx(list(map(distance, one.tolist(), other.tolist())), abs=DOUBLE)
    assert all(
        torch.allclose(found, jensen_shannon(*of), atol=DOUBLE) for of in ((other, one), (1e3 * one, other / 7))
    )
    assert jensen_shannon(one, 2 * one).tolist() == [0.0] * 3
    assert jensen_shannon(torch.tensor([3, 1, 0]), torch.tensor([0, 0, 5])) == 1.0
    assert jensen_shannon(torch.tensor([0, 0]), torch.tensor([1, 2])).isnan()
    shares = torch.tensor([[2.0, 2.0, 0.0, 2.0], [0.0, 5.0, 0.0, 0.0]])
    assert effective_number(shares).tolist() == pytest.approx([3.0, 1.0])


def test_domains_of_rows(tmp_path: Path) -> None:
    def rows_in(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return str(path)

    pairs = (("one", "b"), ("two", 7), ("three", "b"), ("x", "7"))
    rows = [{"text": text, "of": domain} for text, domain in pairs]
    data = rows_in(tmp_path / "a.jsonl", rows)
    assert read_domains(data, "of") == {"b": ["one", "three"], "7": ["two", "x"]}
    assert read_domains(data, "of", max_characters=3) == {"b": ["one"], "7": ["two"]}
    for bad in (None, 1.5, True, ["b"]):
        broken = rows_in(tmp_path / "bad.jsonl", [*rows, {"text": "four", "of": bad}])
        with pytest.raises(
            ValueError, match=r"domains='of' is not allowed: .*bad\.jsonl, line 5 has .* there, and it"
        ):
            read_domains(broken, "of")
    with pytest.raises(
        ValueError, match=r"domains='topic' is not allowed: .* line 1 has no such field, but 'text', 'of'"
    ):
        read_domains(data, "topic")
    with pytest.raises(ValueError, match="column='body' is not allowed"):
        read_domains(data, "of", column="body")
    many = [{"text": "t", "of": number} for number in range(65)]
    assert len(read_domains(rows_in(tmp_path / "64.jsonl", many[:64]), "of")) == 64
    with pytest.raises(ValueError, match="the first 65 rows have more than 64 values"):
        read_domains(rows_in(tmp_path / "65.jsonl", many), "of")
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.txt holds no rows, and so no columns"):
        read_domains(str(tmp_path / "a.txt"), "of")


def test_batches_of_domains() -> None:
    sizes = {"max_tokens": 4 * 32, "block_size": 8, "batch_size": 2}
    texts = {"a": ["x" * 60, "y" * 60], "b": ["z" * 40], "short": ["v" * 14], "none": []}
    found, left_out = domain_batches(texts, tokenizer(), **sizes)
    # Two of the four are left, and share the 128 tokens: 64 of one, and the whole blocks of the other.
    shapes = {name: [tuple(batch.shape) for batch in own] for name, own in found.items()}
    assert shapes == {"a": [(2, 8)] * 4, "b": [(2, 8)] * 2 + [(1, 8)]}
    assert len(left_out) == 2 and "short: it holds fewer than two blocks of 8 tokens" in left_out[0]
    assert left_out[1].startswith("none: ") and "at least two are needed" in left_out[1]
    with pytest.raises(ValueError, match=r"max_tokens=63 is not allowed: 4 domains .* need at least 64"):
        domain_batches(texts, tokenizer(), **sizes | {"max_tokens": 63})
    with pytest.raises(ValueError, match=r"No domain has two blocks of block_size=8 tokens\. short: "):
        domain_batches({"short": ["v"]}, tokenizer(), **sizes)
    with pytest.raises(ValueError, match="holds no rows"):
        domain_batches({}, tokenizer(), **sizes)


def test_no_domain_has_more_than_its_share() -> None:
    texts = {"long": ["x" * 100], "less": ["y" * 20]}
    found, _ = domain_batches(texts, tokenizer(), max_tokens=64, block_size=8, batch_size=2)
    assert {name: sum(batch.numel() for batch in own) for name, own in found.items()} == {"long": 32, "less": 16}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"masked": -1}, "masked=-1 is not allowed"),
        ({"expert": -1}, "expert=-1 is not allowed"),
        ({"more": 0.5}, "more=0.5 is not allowed"),
        ({"at_most": 0}, "at_most=0 is not allowed: it must be an integer of at least 1"),
        ({"expert": 99}, r"expert=99 is not allowed: model\.layers\.\d+\.mlp has \d+"),
        ({"masked": 99}, "masked=99 is not allowed"),
    ],
)
def test_interventions_that_are_none(fields: dict[str, Any], message: str) -> None:
    model, _, _ = prepared("v1")
    with pytest.raises(ValueError, match=message), changing(model, **fields):
        losses_of_blocks(model, BLOCKS)
