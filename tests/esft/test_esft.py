"""ESFT: the published selections, scores against a loop over tokens, and training of the selected experts only."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import BOTH_SIZES, TINY
from esft_cases import SELECTION, Rows, train
from lora_cases import IDS, MODELS, LargestTensor, logits, make
from paths import DATA
from safetensors.torch import load_file, save_file
from tolerances import assert_same
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_deepseekmoe import (
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    ExpertSelection,
    expert_lora_config,
    load_esft,
    merge_esft,
    prepare_esft,
    save_esft,
    score_experts,
    select_experts,
    update_router_bias,
)
from modeling_deepseekmoe.esft.scoring import save_scores, selection_table
from modeling_deepseekmoe.families.moe_layers import find_experts
from modeling_deepseekmoe.moe import DeepseekMoeExperts

ESFT_DATA = DATA / "esft"


# ----------------------------------------------------------------------------------------------- scores and selection
@pytest.mark.parametrize("task", ["intent", "law"])
def test_the_published_selections(task: str) -> None:
    """DeepSeek's own scores of V2-Lite and the experts that it trained."""
    scores = json.loads((ESFT_DATA / f"{task}.scores.json").read_text())["token_scores"]
    published = ExpertSelection.of(ESFT_DATA / f"{task}.selected.json")
    tables = {int(layer): [values[str(expert)] for expert in range(64)] for layer, values in scores.items()}
    found = select_experts(tables, 0.2)
    assert len(found) == 26 and found == published.experts
    assert not published.shared_experts and not published.non_expert_modules


def scores_by_loop(
    model: nn.Module, batches: list[torch.Tensor], method: str, scaling: float
) -> dict[int, list[float]]:
    """Token by token, from the ids and weights that the experts are called with."""
    seen: dict[int, list] = {}
    blocks = find_experts(model)
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: seen.__setitem__(layer, args))
        for layer, (_, module) in blocks.items()
    ]
    totals = {layer: [0.0] * 8 for layer in blocks}
    for batch in batches:
        logits(model, batch)
        length = batch.shape[1]
        for layer, (_, ids, weights) in seen.items():
            of_batch = [0.0] * 8
            for row in range(len(batch)):
                sums = [0.0] * 8
                for token in range(row * length, (row + 1) * length):
                    for choice in range(ids.shape[1]):
                        weight = weights[token, choice].item() / scaling
                        sums[ids[token, choice]] += weight if method == "gate" else float(weight > 0) / ids.shape[1]
                for expert in range(8):
                    of_batch[expert] += sums[expert] / length
            for expert in range(8):
                totals[layer][expert] += of_batch[expert]
    for handle in handles:
        handle.remove()
    return {layer: [total / sum(map(len, batches)) for total in values] for layer, values in totals.items()}


@pytest.mark.parametrize("name", [name for name in MODELS if "deepseek" in name.lower()])
@pytest.mark.parametrize("method", ["gate", "token"])
def test_scores_equal_a_loop_over_tokens(name: str, method: str) -> None:
    model = make(name)
    batches = [torch.randint(3, 96, (2, 7)), torch.randint(3, 96, (1, 5))]
    scaling = 2.5 if "v3" in name.lower() else 1.0
    found = score_experts(model, batches, method)
    for layer, expected in scores_by_loop(model, batches, method, scaling).items():
        assert found[layer].dtype == torch.float64
        assert found[layer].tolist() == expected, (name, layer)
        if method == "token":
            assert found[layer].sum().item() == pytest.approx(1)
    assert found.keys() == {1, 2} and not model.training


def test_padding_does_not_count_and_a_limit_ends_inside_a_sample() -> None:
    model = make()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    ids = torch.randint(3, 96, (2, 6))
    found = score_experts(model, [{"input_ids": ids, "attention_mask": mask}], "gate")
    alone = [score_experts(model, [ids[:1, :4]], "gate"), score_experts(model, [ids[1:]], "gate")]
    for layer in (1, 2):
        assert_same(found[layer], (alone[0][layer] + alone[1][layer]) / 2)
    seen: list[int] = []

    def endless() -> Iterator[torch.Tensor]:
        yield ids
        raise AssertionError("read on after the limit")

    limited = score_experts(model, endless(), "token", max_tokens=8, progress=seen.append)
    assert seen == [8]
    parts = [score_experts(model, [ids[:1]], "token"), score_experts(model, [ids[1:, :2]], "token")]
    for layer in (1, 2):
        assert_same(limited[layer], (parts[0][layer] + parts[1][layer]) / 2)
    assert score_experts(model, [ids, ids], max_tokens=12)[1].tolist() == score_experts(model, [ids])[1].tolist()


def test_padding_on_the_left_is_not_attended_to() -> None:
    model, ids = make(), torch.randint(3, 96, (1, 4))
    mask = torch.tensor([[0] * 3 + [1] * 4])
    padded = {"input_ids": torch.cat([torch.full((1, 3), 5), ids], 1), "attention_mask": mask}
    found, expected = score_experts(model, [padded]), score_experts(model, [ids])
    for layer in (1, 2):
        assert_same(found[layer], expected[layer])


def test_no_logits_are_computed_and_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().train()
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("logits"))
    score_experts(model, [IDS])
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def test_scores_of_adapted_and_of_prepared_models() -> None:
    from peft import get_peft_model

    model = make()
    expected = score_experts(model, [IDS])
    adapted = get_peft_model(copy.deepcopy(model), expert_lora_config(model, r=2))
    prepared = copy.deepcopy(model)
    prepare_esft(prepared, SELECTION)
    for other in (adapted, prepared):
        for layer, values in score_experts(other, [IDS]).items():
            assert_same(values, expected[layer])


def test_equal_scores_go_by_the_lower_id_and_a_threshold_out_of_reach_takes_all() -> None:
    assert select_experts({3: [0.1, 0.2, 0.2, 0.1]}, 0.3) == {3: [1, 2]}
    assert select_experts({3: [0.1, 0.2, 0.2, 0.1]}, 0.2) == {3: [1]}
    assert select_experts({3: torch.tensor([0.1, 0.2, 0.1])}, 1.0) == {3: [1, 0, 2]}


def test_files_are_those_of_the_release(tmp_path: Path) -> None:
    published = ExpertSelection.of(ESFT_DATA / "law.selected.json")
    published.save(tmp_path / "esft.json")
    assert json.loads((tmp_path / "esft.json").read_text()) == json.loads(
        (ESFT_DATA / "law.selected.json").read_text()
    )
    scores = score_experts(make(), [IDS], "token")
    save_scores(scores, "token", tmp_path / "scores.json")
    saved = json.loads((tmp_path / "scores.json").read_text())["token_scores"]
    assert saved["1"]["5"] == pytest.approx(scores[1][5].item(), abs=1e-6)
    table = selection_table(ExpertSelection(select_experts(scores, 0.2)), scores)
    assert "layer" in table.splitlines()[0] and len(table.splitlines()) == 4 and "of 16 experts" in table
    table = selection_table(ExpertSelection({5: [2, 0]}), {5: torch.tensor([0.2, 0.4, 0.3, 0.1])})
    assert table.splitlines()[1] == "    5 |   2 of 4 |              50.0% | 2 0"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: score_experts(model, [IDS], "top"),
            r"method='top' is not allowed: it must be 'gate' or 'token'",
        ),
        (lambda model: score_experts(model, [IDS], max_tokens=0), r"max_tokens=0 is not allowed"),
        (lambda model: score_experts(model, [[1, 2]]), r"input_ids as <class 'list'> is not allowed"),
        (lambda model: score_experts(model, [IDS[0]]), r"input_ids as torch\.int64 of shape \(9,\) is not allowed"),
        (lambda model: score_experts(model, [{"labels": IDS}]), r"input_ids as <class 'NoneType'> is not allowed"),
        (lambda model: score_experts(model, [IDS + 96]), r"dataloader: token \d+ is not allowed: there are 96"),
        (lambda model: select_experts({3: [[0.1]]}, 0.5), r"scores of layer 3 are not allowed"),
        (lambda model: select_experts({}, 1.01), r"threshold=1\.01 is not allowed"),
        (lambda model: score_experts(model, []), r"dataloader is not allowed: it yields no tokens"),
        (lambda model: score_experts(model, [{"input_ids": IDS, "attention_mask": 0 * IDS}]), r"it yields no tokens"),
        (lambda model: score_experts(nn.Linear(1, 1), [IDS]), r"Linear has no stacked experts"),
        (lambda model: select_experts({}, 0.0), r"threshold=0\.0 is not allowed: it must be above 0 and at most 1"),
        (lambda model: select_experts({}, 1.5), r"threshold=1\.5 is not allowed"),
        (lambda model: prepare_esft(model, {1: [8]}), r"expert 8 of layer 1 is not allowed"),
        (lambda model: prepare_esft(model, {7: [0]}), r"layer 7 is not allowed"),
        (lambda model: prepare_esft(model, {1: 3}), r"experts: \{1: 3\} is not allowed: it must map layers to lists"),
        (lambda model: prepare_esft(model, {"experts": {1: [3]}}), r"it must map layers to lists of expert ids"),
        (lambda model: prepare_esft(model, {1: [3.7]}), r"it must map layers to lists of expert ids"),
        (lambda model: prepare_esft(model, {}), r"an empty selection is not allowed"),
        (lambda model: save_esft(model, "nowhere"), r"is not prepared for ESFT: call prepare_esft first"),
    ],
)
def test_bad_input(call: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make())
    assert not Path("nowhere").exists()


@BOTH_SIZES
@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_model_computes_the_same_with_the_same_gradients(name: str) -> None:
    model = make(name)
    layers = sorted(find_experts(model))[-2:]
    selection = dict(zip(layers, SELECTION.values(), strict=True))
    prepared = copy.deepcopy(model)
    prepare_esft(prepared, selection)
    assert_same(logits(prepared), logits(model))
    assert_same(logits(prepared, IDS[:1, :1]), logits(model, IDS[:1, :1]))
    for each in (model.train(), prepared.train()):
        each(IDS, labels=IDS).loss.backward()
    assert {name.rsplit(".", 1)[1] for name, p in prepared.named_parameters() if p.grad is not None} == {
        "selected_gate_up_proj", "selected_down_proj"}  # fmt: skip
    for layer, ids in selection.items():
        whole, part = find_experts(model)[layer][1], find_experts(prepared)[layer][1]
        for stack in ("gate_up_proj", "down_proj"):
            assert_same(getattr(part, f"selected_{stack}").grad, getattr(whole, stack).grad[sorted(ids)])
            assert getattr(part, stack).grad is None


def test_unselected_experts_keep_their_bytes_and_the_optimizer_holds_nothing_for_them() -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_esft(model, SELECTION)
    optimizer = train(model)
    states = [state for state in optimizer.state.values() if state]
    elements = sum(state["exp_avg"].numel() for state in states)
    assert elements == 3 * 3 * 16 * 32  # three experts, three projections of 16 x 32
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if ".mlp.experts." in name:
            layer = int(name.split(".")[2])
            changed = (after[name] != tensor).flatten(1).any(1).nonzero().flatten().tolist()
            assert changed == sorted(SELECTION[layer]), name
        else:
            assert torch.equal(after[name], tensor), name


def test_saving_what_was_trained_and_applying_it_to_the_base(tmp_path: Path) -> None:
    model = make()
    base = copy.deepcopy(model)
    prepare_esft(model, SELECTION)
    train(model)
    size = save_esft(model, tmp_path / "esft")
    tensors = load_file(tmp_path / "esft" / "esft.safetensors")
    assert set(tensors) == {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer, ids in SELECTION.items() for expert in ids for projection in ("gate", "up", "down")
    }  # fmt: skip
    assert size == 4 * 9 * 16 * 32 and ExpertSelection.of(tmp_path / "esft" / "esft.json").experts == {
        1: [0, 6],
        2: [3],
    }
    load_esft(base, tmp_path / "esft")
    assert_same(logits(base), logits(model.eval()))
    merge_esft(model)
    assert type(model.model.layers[1].mlp.experts) is DeepseekMoeExperts
    assert len(model.model.layers[1].mlp.experts._load_state_dict_pre_hooks) == 1
    assert model.state_dict().keys() == dict(base.state_dict()).keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any("selected" in name for name, _ in model.named_parameters())
    prepare_esft(model, SELECTION)  # once more, after merging
    with pytest.raises(ValueError, match="call merge_esft first"):
        prepare_esft(model, SELECTION)
    with pytest.raises(ValueError, match=r"destination=.* must not exist, or be an empty folder"):
        save_esft(model, tmp_path / "esft")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.mlp.experts.8.gate_proj.weight", (16, 32), "the model has no such tensor"),
        ("model.layers.9.mlp.experts.0.gate_proj.weight", (16, 32), "the model has no such tensor"),
        ("model.layers.1.mlp.experts.0.gate_proj.weight", (17, 32), r"the model's is \(16, 32\)"),
        ("model.norm.weight", (31,), r"the model's is \(32,\)"),
    ],
)
def test_what_does_not_fit_the_base(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    ExpertSelection({}).save(tmp_path / "esft.json")
    good = "model.layers.1.mlp.experts.0.down_proj.weight"
    save_file({good: torch.ones(32, 16), name: torch.ones(shape)}, tmp_path / "esft.safetensors")
    model = make()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        load_esft(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_a_folder_that_lacks_a_selected_weight(tmp_path: Path) -> None:
    model = make()
    prepare_esft(model, SELECTION)
    save_esft(model, tmp_path / "esft")
    path = tmp_path / "esft" / "esft.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts\.3\.up_proj\.weight is missing, which esft\.json"):
        load_esft(make(), tmp_path / "esft")
    (tmp_path / "esft" / "esft.json").unlink()
    with pytest.raises(OSError, match=r"esft\.json"):
        load_esft(make(), tmp_path / "esft")


def test_shared_experts_and_everything_else(tmp_path: Path) -> None:
    model = make()
    base = copy.deepcopy(model)
    prepare_esft(model, ExpertSelection(SELECTION, shared_experts=True, non_expert_modules=True))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"model.layers.{layer}.mlp.experts.{stack}" for layer in (1, 2) for stack in ("gate_up_proj", "down_proj")
    }
    train(model)
    save_esft(model, tmp_path / "esft")
    saved = ExpertSelection.of(tmp_path / "esft" / "esft.json")
    assert saved.shared_experts and saved.non_expert_modules
    load_esft(base, tmp_path / "esft")
    assert_same(logits(base), logits(model.eval()))
    only_shared = make()
    prepare_esft(only_shared, ExpertSelection(SELECTION, shared_experts=True))
    trained = {name for name, p in only_shared.named_parameters() if p.requires_grad and "selected" not in name}
    assert len(trained) == 6 and all(".shared_experts." in name for name in trained)


def test_experts_with_ids_of_two_digits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = DeepseekMoeForCausalLM(DeepseekMoeConfig(**{**TINY, "n_routed_experts": 12}))
    model = copy.deepcopy(base)
    prepare_esft(model, {1: [1, 11], 2: [10]})
    train(model)
    save_esft(model, tmp_path / "esft")
    load_esft(base, tmp_path / "esft")
    assert_same(logits(base.eval()), logits(model.eval()))


@BOTH_SIZES
def test_no_gradient_of_the_whole_stack_is_ever_built() -> None:
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**TINY, "hidden_size": 64, "moe_intermediate_size": 128, "n_routed_experts": 16})
    model = DeepseekMoeForCausalLM(config)
    stack = model.model.layers[1].mlp.experts.down_proj.numel()
    prepare_esft(model, SELECTION)
    with LargestTensor() as mode:
        model.train()(IDS, labels=IDS).loss.backward()
    assert mode.elements < stack


def test_training_goes_on_with_saved_experts(tmp_path: Path) -> None:
    model, again = make(), make()
    for each in (model, again):
        prepare_esft(each, SELECTION)
    train(model)
    save_esft(model, tmp_path / "esft")
    load_esft(again, tmp_path / "esft")
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_trained_bias_is_saved_with_everything_else(tmp_path: Path) -> None:
    model = make("deepseek_v3")
    base = copy.deepcopy(model)
    prepare_esft(model, ExpertSelection(SELECTION, non_expert_modules=True))
    train(model)
    update_router_bias(model, 0.5)
    save_esft(model, tmp_path / "esft")
    load_esft(base, tmp_path / "esft")
    assert base.model.layers[1].mlp.gate.e_score_correction_bias.abs().max() == 0.5
    assert_same(logits(base), logits(model.eval()))


def test_adapters_and_selected_experts_do_not_mix(warnings_of_package: list[str], tmp_path: Path) -> None:
    """Each freezes what it does not know, in either order, and on other layers than the other one's too."""
    from peft import LoraConfig, get_peft_model

    lora, other = LoraConfig(r=2, target_modules=["q_proj"]), {2: [0]}
    prepared = make()
    prepare_esft(prepared, SELECTION)
    with pytest.raises(ValueError, match="call merge_esft first"):
        expert_lora_config(prepared)
    with pytest.raises(ValueError, match="is prepared already, which is not allowed: call merge_esft first"):
        prepare_esft(prepared, other)
    for config in (lora, expert_lora_config(make(), r=2)):
        adapted = get_peft_model(make(), config)
        with pytest.raises(ValueError, match="has adapters of PEFT, which is not allowed for full-weight ESFT"):
            prepare_esft(adapted.get_base_model(), SELECTION)
        assert any(parameter.requires_grad for name, parameter in adapted.named_parameters() if "lora_" in name)
    mixed = get_peft_model(prepared, lora).train()
    mixed(torch.randint(3, 96, (1, 5)))
    assert "frozen: something after it, perhaps get_peft_model" in warnings_of_package[-1]
    with pytest.raises(ValueError, match="has adapters of PEFT"):
        save_esft(mixed.get_base_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="not prepared for ESFT: there is nothing to merge"):
        merge_esft(make())


def test_a_trainer_run_resumes_bit_for_bit_and_its_checkpoints_are_complete(tmp_path: Path) -> None:
    def run(folder: Path, **kwargs: object) -> tuple[nn.Module, list[float]]:
        model = make()
        prepare_esft(model, SELECTION)
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1, save_steps=2,
            report_to="none", seed=0, max_steps=4, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Rows())
        trainer.train(**kwargs)
        return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole, losses = run(tmp_path / "a")
    resumed, again = run(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses == again and len(losses) == 4
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert_same(logits(loaded), logits(whole.eval()))
