"""What happens where transformers is newer than the tests: one warning, and one look at what `generate` computes."""

from collections.abc import Callable

import fresh_process
import pytest
import torch
from conftest import Golden
from paths import ROOT
from transformers import DynamicCache

from modeling_deepseekmoe import untested_versions
from modeling_deepseekmoe.transformers_support import cache_name
from modeling_deepseekmoe.untested_versions import NEWEST_TESTED, SWITCH, newer_than_tested, warn_of_untested_version

NEWEST = ".".join(map(str, NEWEST_TESTED))
PROMPT = torch.tensor([[5, 17, 33, 8]])


@pytest.mark.parametrize(
    ("version", "newer"),
    [("5.17.0", False), (f"{NEWEST}.0", False), (f"{NEWEST}.9", False), ("5.25.0", True), ("5.25.0.dev0", True),
     ("5.100.1", True), ("6.0.0", True), ("odd", False)],
)  # fmt: skip
def test_newer_than_tested(version: str, newer: bool) -> None:
    assert newer_than_tested(version) is newer


def test_ci_runs_the_newest_tested_version() -> None:
    """Three lanes: the oldest, the newest but one, the newest."""

    pinned = {}
    for name in ("constraints.txt", "constraints-previous.txt", "constraints-oldest.txt"):
        text = (ROOT / name).read_text()
        pinned[name] = next(line for line in text.splitlines() if line.startswith("transformers=="))
    assert pinned["constraints.txt"].startswith(f"transformers=={NEWEST}.")
    oldest = ".".join(map(str, untested_versions.OLDEST_TESTED))
    assert pinned["constraints-oldest.txt"].startswith(f"transformers=={oldest}.")
    assert not newer_than_tested(pinned["constraints-previous.txt"].partition("==")[2])


def test_one_warning_names_both_versions() -> None:
    script = "import transformers; transformers.__version__ = '5.99.1'\nimport modeling_deepseekmoe\n"
    script += "modeling_deepseekmoe.DeepseekMoeConfig(num_hidden_layers=1)"
    said = fresh_process.check("-c", script).stderr
    assert said.count("was tested with transformers up to") == 1
    assert f"up to {NEWEST}, and 5.99.1 is installed" in said and "transformers<5.25" in said
    said = fresh_process.check("-c", script.replace("5.99.1", f"{NEWEST}.7")).stderr
    assert "was tested with" not in said


def test_a_tested_version_is_not_warned_of(monkeypatch: pytest.MonkeyPatch, warnings_of_package: list[str]) -> None:
    monkeypatch.setattr(untested_versions, "INSTALLED", f"{NEWEST}.3")
    warn_of_untested_version()
    assert warnings_of_package == []


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers of which nothing is known, in a fresh process."""
    monkeypatch.setattr(untested_versions, "INSTALLED", "5.99.1")
    monkeypatch.setattr(untested_versions, "_checked", [])


def count_forwards(model: torch.nn.Module) -> list[int]:
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(1), with_kwargs=True)
    return lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("untested")
def test_the_first_generation_is_checked_once(
    golden: Golden, dtype: torch.dtype, warnings_of_package: list[str]
) -> None:
    model = golden.model(dtype=dtype)
    forwards = count_forwards(model)
    model.generate(PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert len(forwards) == 3 + 3  # two steps and a pass over all of it
    model.generate(PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert len(forwards) == 9
    assert warnings_of_package == []


@pytest.mark.usefixtures("untested")
def test_the_check_says_so_if_a_cache_is_not_used(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, warnings_of_package: list[str]
) -> None:
    """As with transformers 5.24 and a model that knows one name of the cache: masks count tokens that layers do not
    see."""
    model = golden.model()
    monkeypatch.setattr(DynamicCache, "update", forgetting(DynamicCache.update))
    model.generate(PROMPT, max_new_tokens=2, do_sample=False, eos_token_id=-1)
    assert len(warnings_of_package) == 1
    assert "GENERATION IS WRONG. With transformers 5.99.1" in warnings_of_package[0]
    assert "use_cache=False" in warnings_of_package[0] and "'transformers<5.25'" in warnings_of_package[0]


def forgetting(update: Callable) -> Callable:
    def forget(self: DynamicCache, *states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, ...]:
        whole = update(self, *states, **kwargs)
        return tuple(state * (torch.arange(state.shape[-2]) == state.shape[-2] - 1)[:, None] for state in whole)

    return forget


@pytest.mark.usefixtures("untested")
def test_the_check_can_be_switched_off(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    model = golden.model()
    forwards = count_forwards(model)
    model.generate(PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert len(forwards) == 3


def test_tested_versions_are_not_checked(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untested_versions, "INSTALLED", f"{NEWEST}.0")
    monkeypatch.setattr(untested_versions, "_checked", [])
    model = golden.model()
    forwards = count_forwards(model)
    model.generate(PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert len(forwards) == 3 and untested_versions._checked == []


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 3, "do_sample": True}, {"stop_strings": ["x"]}, {"max_time": 5.0}, {"num_beams": 3},
     {"cache_implementation": "static"}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_the_check_does_not_depend_on_the_settings_of_the_model(
    settings: dict, golden: Golden, warnings_of_package: list[str]
) -> None:
    model = golden.model().train()
    model.config.attention_dropout = 0.9
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    before = model.generation_config
    untested_versions.check_cached_generation(model, PROMPT)
    assert warnings_of_package == [] and untested_versions._checked == ["5.99.1"]
    assert model.training and model.generation_config is before


@pytest.mark.usefixtures("untested")
def test_a_check_that_fails_says_so_and_lets_the_call_go_on(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, warnings_of_package: list[str]
) -> None:
    def fail(*args: object) -> float:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(untested_versions, "_difference_of_cached_logits", fail)
    model = golden.model()
    assert model.generate(PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=-1).shape == (1, 7)
    assert len(warnings_of_package) == 1
    assert "could not be checked: RuntimeError: no such thing" in warnings_of_package[0]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_learned_prompts_generate_what_they_do_without_a_cache_or_not_at_all(kind: str) -> None:
    """PEFT before 0.22 looks for the cache under its first name."""
    from importlib.metadata import version

    from packaging.version import Version
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    make = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    model = get_peft_model(Golden("v1-mha").model(), make(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if cache_name() == "cache" and Version(version("peft")) < Version("0.22"):
        with pytest.raises(ValueError, match="not allowed for prompt learning with transformers"):
            model.generate(input_ids=PROMPT, eos_token_id=-1, **arguments)
        return
    text = PROMPT
    for _ in range(4):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=PROMPT, eos_token_id=-1, **arguments), text)
