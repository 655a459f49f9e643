"""What the benchmarks conclude from their runs and keep of them, and how the balancing experiment splits its texts."""

import importlib
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from paths import ROOT


def load(name: str) -> ModuleType:
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import scripts that import each other."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


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


class Clock:
    """A clock that only jobs move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def jobs(self, seconds: dict[str, float], figures: dict) -> list[tuple[str, Callable[[], None]]]:
        """Jobs that take some seconds, and put their names into the figures."""

        def job(name: str) -> Callable[[], None]:
            def measure() -> None:
                self.now += seconds[name]
                figures["lines"].append(name)

            return measure

        return [(name, job(name)) for name in seconds]


def test_a_budget_stops_before_it_is_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measuring, path = load("measuring"), tmp_path / "some.json"
    seconds = {"long": 5.0, "short": 1.0, "next": 1.0, "last": 1.0}
    for budget, measured in ((None, 4), (12.0, 4), (11.9, 3), (10.9, 2), (10.0, 2), (9.9, 1), (4.0, 1), (-1.0, 0)):
        clock, figures = Clock(), {"lines": []}
        path.unlink(missing_ok=True)
        measuring.measure_lines(clock.jobs(seconds, figures), figures, path, budget, clock)
        assert figures["lines"] == list(seconds)[:measured], budget
        assert figures["left_out"] == list(seconds)[measured:], budget
        assert (json.loads(path.read_text()) == figures) if measured else not path.exists()
        said = capsys.readouterr().out
        assert said.count("Left out") == (measured < 4)
        assert "; ".join(figures["left_out"]) in said


def test_an_interrupted_run_leaves_what_it_had(tmp_path: Path) -> None:
    measuring, path, figures = load("measuring"), tmp_path / "some.json", {"lines": []}

    def interrupt() -> None:
        raise KeyboardInterrupt

    first, last = Clock().jobs({"first": 1.0, "last": 1.0}, figures)
    with pytest.raises(KeyboardInterrupt):
        measuring.measure_lines([first, ("second", interrupt), last], figures, path)
    assert json.loads(path.read_text()) == {"lines": ["first"], "left_out": ["second", "last"]}
    measuring.measure_lines([last], figures, None)  # writes nothing
    assert json.loads(path.read_text())["lines"] == ["first"]


def test_results_are_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring, path, write = load("measuring"), tmp_path / "some.json", Path.write_text
    measuring.write_results(path, {"lines": ["old"]})

    def half(target: Path, text: str, **options: str) -> None:
        write(target, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            measuring.write_results(path, {"lines": ["new"]})
    assert json.loads(path.read_text()) == {"lines": ["old"]}
    with path.open() as reader:  # whoever reads the old file reads it to its end
        measuring.write_results(path, {"lines": ["new", "and more"]})
        assert json.load(reader) == {"lines": ["old"]}
    assert json.loads(path.read_text()) == {"lines": ["new", "and more"]}
    assert list(tmp_path.iterdir()) == [path]
    assert measuring.results_path("routing", "cuda").name == "routing_gpu.json"
    assert measuring.results_path("routing", "cpu") == ROOT / "benchmarks" / "results" / "routing.json"


def test_the_most_valuable_lines_come_first(script: Callable[[str], ModuleType]) -> None:
    lines, routing = script("experts_lines"), script("routing")
    for device in ("cpu", "cuda"):
        shown = lines.lines_on(device, quick=False)
        first = lines.by_value(shown)
        assert sorted(map(str, first)) == sorted(map(str, shown)) and len(set(shown)) == len(shown)
        assert first[0].tokens == max(first[0].shape.tokens) and first[0].shape is shown[0].shape
        quiet = [line.tokens > 32 for line in first if (line.condition, line.dtype) == ("quiet", first[0].dtype)]
        assert quiet == sorted(quiet, reverse=True)
    assert {(line.condition, line.dtype) for line in lines.lines_on("cpu", quick=True)} == {
        ("quiet", "float32"), ("quiet", "bfloat16"), ("busy", "float32"), ("one thread", "float32"),
    }  # fmt: skip
    names = [name for name, _ in routing.jobs_of("cpu", None, False, [])]
    assert names[:3] == ["DeepSeek-V3, 8192 tokens", "Kimi K2, 8192 tokens", "DeepSeekMoE 16B, 8192 tokens"]
    assert len(set(names)) == len(names) == len(routing.GATES) * len(routing.TOKENS)


def test_rows_stand_in_the_order_of_the_table(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, lines, routing = script("experts"), script("experts_lines"), script("routing")
    monkeypatch.setattr(experts, "Layer", lambda *given: given)
    monkeypatch.setattr(experts, "measure", lambda line, layer: str(line))
    monkeypatch.setattr(experts, "memory", lambda *given: {})
    monkeypatch.setattr(experts, "whole_model", lambda device: {"training": {}})
    shown, figures = lines.lines_on("cpu", quick=False), {"cases": [], "memory": [], "model": {}}
    jobs = experts.jobs_of(shown, "cpu", False, figures)
    for place, (_, measure) in enumerate(jobs, 1):
        measure()
        assert figures["cases"] == [str(line) for line in shown if str(line) in figures["cases"]]
        assert len(figures["cases"]) == min(place, len(shown))
    assert [row["kind"] for row in figures["memory"]] == ["frozen", "full"] and figures["model"]

    monkeypatch.setattr(routing, "measure", lambda gate, tokens, *given: {"model": gate.model, "tokens": tokens})
    rows: list[dict] = []
    for _, measure in routing.jobs_of("cpu", None, False, rows):
        measure()
    wanted = [(gate.model, tokens) for gate in routing.GATES for tokens in routing.TOKENS]
    assert [(row["model"], row["tokens"]) for row in rows] == wanted


def test_conditions_end(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    lines, started = script("experts_lines"), []

    class Started(subprocess.Popen):
        def __init__(self, *given: object, **options: object) -> None:
            super().__init__(*given, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Started)
    with pytest.raises(KeyboardInterrupt), lines.busy_core():
        assert started[0].poll() is None
        raise KeyboardInterrupt
    assert started[0].poll() is not None
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), lines.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == threads


def test_bfloat16_is_compared_with_float32(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, lines = script("experts"), script("experts_lines")
    layer = experts.Layer(lines.QUICK[0], "cpu", "bfloat16")
    inputs, ways = layer.inputs(16), layer.ways(16, "full")
    wanted = experts.expected(layer, "full", inputs)
    assert {value.dtype for value in wanted} == {torch.float32} and layer.dtype == torch.bfloat16
    rounded = layer.run("grouped_mm", "full", inputs)[1]
    assert not torch.equal(wanted[0].bfloat16().float(), wanted[0]) and not torch.equal(rounded[0].float(), wanted[0])
    experts.check_equal(layer, "full", inputs, ways)
    monkeypatch.setattr(experts, "expected", lambda *given: [1.05 * value for value in wanted])
    with pytest.raises(ValueError, match="grouped_mm differs"):
        experts.check_equal(layer, "full", inputs, ways)


def test_a_partial_file_of_results_gives_a_page(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_page = script("make_page")
    shutil.copytree(make_page.RESULTS, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "gpu")
    monkeypatch.setattr(make_page, "RESULTS", tmp_path)

    def write(name: str, part: str, lines: list[dict]) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({part: lines, "left_out": ["what is not there"]}))

    case, row = make_page.load("experts")["cases"][1], make_page.load("routing")["rows"][-8]
    case["shape"] |= {"name": "16B and V2-Lite"}
    hows = [("quiet", "float32"), ("quiet", "bfloat16"), ("busy", "float32"), ("one thread", "float32")]
    cases = [{**case, "condition": condition, "dtype": dtype} for condition, dtype in hows]
    write("routing", "rows", [row])
    write("experts", "cases", cases)
    titles = ["In float32:", "In bfloat16:", "In float32, while another process keeps a core busy:",
              "In float32, on one thread:"]  # fmt: skip
    page = make_page.make_page()
    assert [line for line in page.splitlines() if line in titles] == titles
    assert page.count("| 16B and V2-Lite | 256 | forward |") == 4 and "whole model" not in page
    assert page.count(f"| {row['model']} | {row['tokens']:,} |") == 1
    assert "a layer of 16B's experts, 256 tokens" in make_page.headline()
    write("experts", "cases", cases[1:2])
    page = make_page.make_page()
    assert titles[0] not in page and titles[1] in page
    assert "a layer of 16B's experts" not in make_page.headline()
