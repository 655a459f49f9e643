"""What the benchmarks conclude from their runs, and how the balancing experiment splits its texts."""

import importlib.util
from types import ModuleType

import pytest
from paths import ROOT


def load(name: str) -> ModuleType:
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def balancing() -> ModuleType:
    return load("balancing")


def runs(balancing: ModuleType, free: list[float], violation: float = 0.05) -> list[dict]:
    """Three seeds of every method; the auxiliary loss with 0.01 is the best one, with 10, 11 and 12."""
    perplexities = {method.name: [20.0, 21.0, 22.0] for method in balancing.METHODS}
    perplexities |= {"auxiliary loss, 0.01": [10.0, 11.0, 12.0], "loss-free": free}
    return [
        {"method": name, "seed": seed, "perplexity": value, "max_violation_global": violation,
         "max_violation_batch": 0.2, "max_violation_batch_end": 0.1}
        for name, values in perplexities.items() for seed, value in enumerate(values)
    ]  # fmt: skip


def test_verdict(balancing: ModuleType) -> None:
    better = balancing.verdict(runs(balancing, [9.0, 11.5, 12.0]))
    assert "at most 0.050, within 0.10" in better and "(auxiliary loss, 0.01), by seed: -1.00, +0.50, +0.00" in better
    assert "seeds 1.00: no worse within the spread" in better
    assert balancing.verdict(runs(balancing, [12.0, 13.0, 14.0])).endswith(": worse than the spread.")
    assert "no worse" not in balancing.verdict(runs(balancing, [12.0, 13.0, 14.0]))
    assert "above 0.10" in balancing.verdict(runs(balancing, [9.0, 9.0, 9.0], violation=0.11))


def test_summary(balancing: ModuleType) -> None:
    rows = {row["method"]: row for row in balancing.summarize(runs(balancing, [9.0, 11.0, 13.0]))}
    assert rows["loss-free"]["perplexity"] == {"mean": 11.0, "min": 9.0, "max": 13.0}
    assert list(rows) == [method.name for method in balancing.METHODS]
    assert balancing.smooth([1.0, 3.0, 5.0], width=2) == [2.0, 5.0]


def test_validation_texts_are_no_copies_of_training_texts(balancing: ModuleType) -> None:
    texts = [" ".join(f"word{number * 40 + place}" for place in range(40)) for number in range(200)]
    training, validation = balancing.split(texts)
    assert len(training) + len(validation) == 200 and 5 < len(validation) < 45
    copies = [f"{text} once more" for text in texts]
    training, validation = balancing.split([*texts, *copies])
    for text in validation:  # both the text and its copy are held out, or it would not be here
        assert f"{text} once more" not in training and text.removesuffix(" once more") not in training


def test_limits_of_conversion() -> None:
    conversion = load("conversion")
    case = {"rss_anon": 3e8, "mapped": 1, "of_cp": 0.7}
    upcycled = {"dialect": "deepseek", "rss_anon": 1e9, "max_logit_difference": 1e-4, "same_text": True}

    def failures(name: str = "per-expert to stacked", last: dict | None = None, **upcycling: object) -> list[str]:
        results = [{"gigabytes": size, "cases": dict.fromkeys(conversion.CASES, case)} for size in (2.0, 8.0)]
        results[1]["cases"][name] = {**case, **(last or {})}
        return conversion.verdict(results, [{**upcycled, **upcycling}])

    assert failures() == []
    assert "1100 MB of memory" in failures(last={"rss_anon": 1.1e9})[0]
    assert "memory grows with the size, 300 to 400 MB" in failures(last={"rss_anon": 4e8})[0]
    assert "2 files mapped" in failures(last={"mapped": 2})[0]
    assert "50% of the speed of cp" in failures(last={"of_cp": 0.5})[0]
    assert failures("bfloat16 to FP8", {"of_cp": 0.1}) == []
    for wrong in ({"rss_anon": 1.6e9}, {"max_logit_difference": 2e-3}, {"same_text": False}):
        assert "upcycling to deepseek" in failures(**wrong)[0]
