"""The page of the benchmarks: it is what the script writes from the results."""

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("make_page")


def test_the_page_is_what_the_results_say(script: ModuleType) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.make_page()
    assert script.main(["--check"]) == 0


def test_the_check_fails_for_another_page(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    monkeypatch.setattr(script, "PAGE", page)
    assert script.main(["--check"]) == 1  # there is none
    assert script.main([]) == 0 and script.main(["--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("0.61", "0.62"), encoding="utf-8")
    assert script.main(["--check"]) == 1
    assert "run python benchmarks/make_page.py" in capsys.readouterr().err


def test_other_results_make_another_page(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(script.RESULTS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    results = tmp_path / "balancing_overhead.json"
    figures = json.loads(results.read_text(encoding="utf-8")) | {"callback_on_over_off": 1.2}
    results.write_text(json.dumps(figures), encoding="utf-8")
    assert "| this package, callback on over callback off | +20.0% |" in script.make_page()
    assert script.main(["--check"]) == 1
