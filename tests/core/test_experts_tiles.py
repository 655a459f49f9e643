"""Which tile the experts' kernels have, and the file of a user's own."""

import json
from pathlib import Path

import pytest
import torch

from modeling_deepseekmoe.experts_tiles import Gpu, Problem, Tile, choose_tile, measured_rule, rule, use_tiles

CPU = torch.device("cpu")
PROBLEM = Problem("first", torch.bfloat16, 128, 768, 2048)
ENTRY = {"gpu": "cpu", "kind": "first", "dtype": "bfloat16", "rows": 128, "columns": 768, "inside": 2048}
HOPPER, AMPERE = Gpu("sm_90", 232_448), Gpu("sm_80", 166_912)


def written(path: Path, entries: object) -> str:
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


def test_rules() -> None:
    assert rule(PROBLEM, HOPPER) == Tile(128, 128, 64, 8, 4)
    assert rule(PROBLEM, AMPERE) == Tile(128, 64, 64, 8, 3)
    assert rule(PROBLEM._replace(rows=1), HOPPER) == Tile(16, 64, 64, 4, 3)
    assert rule(PROBLEM._replace(kind="product", columns=100, inside=20), HOPPER) == Tile(128, 128, 32, 8, 3)
    assert rule(PROBLEM._replace(kind="product", dtype=torch.float32), HOPPER) == Tile(64, 64, 32, 4, 3)
    assert rule(Problem("outer", torch.bfloat16, 0, 2048, 1536), HOPPER) == Tile(128, 256, 64, 8, 5)
    assert rule(Problem("outer", torch.bfloat16, 0, 30, 3), AMPERE) == Tile(16, 32, 64, 4, 3)


def test_what_was_measured() -> None:
    many = PROBLEM._replace(rows=256)
    assert measured_rule(many, HOPPER) == rule(many, HOPPER)._replace(descriptors=1)
    gradient = many._replace(kind="activation_gradient")
    assert measured_rule(gradient, HOPPER) == Tile(128, 128, 64, 8, 3, 128, 1)
    for other in (PROBLEM, many._replace(dtype=torch.float32), Problem("outer", torch.bfloat16, 0, 2048, 1536)):
        assert measured_rule(other, HOPPER) == rule(other, HOPPER)
    assert measured_rule(many, AMPERE) == rule(many, AMPERE)


def test_where_a_tile_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, own, swept = rule(PROBLEM, Gpu("cpu", 0)), *(Tile(16, 16, 16, 4, stages) for stages in (4, 6))
    assert choose_tile(PROBLEM, CPU) == usual
    path = written(tmp_path / "tiles.json", [{**ENTRY, "tile": list(own[:5])}])
    monkeypatch.setenv("DEEPSEEKMOE_TILES", path)
    assert choose_tile(PROBLEM, CPU) == own
    assert choose_tile(PROBLEM._replace(rows=64), CPU) == rule(PROBLEM._replace(rows=64), Gpu("cpu", 0))
    with use_tiles(lambda problem: swept if problem == PROBLEM else None):
        assert choose_tile(PROBLEM, CPU) == swept
        assert choose_tile(PROBLEM._replace(rows=64), CPU) == rule(PROBLEM._replace(rows=64), Gpu("cpu", 0))
    assert choose_tile(PROBLEM, CPU) == own


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[", "it must be a JSON file of tiles"),
        ([{**ENTRY}], "the fields are not gpu, kind, dtype, rows, columns, inside and tile in entry 0"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2], "kind": "last"}], "the kind is not one of first, product"),
        ([{**ENTRY, "tile": [16, 16, 16, 4]}], "the tile is not rows, columns, inside, warps, stages"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2]}, {**ENTRY, "tile": [16, 24, 16, 4, 2]}], "power of two .* in entry 1"),
        ([{**ENTRY, "tile": [16, 16, 16, 3, 2]}], "the warps are not 1, 2, 4, 8 or 16"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2, -5]}], "the registers are not 0 to 255"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2, 0, 2]}], "the descriptors are not 0 or 1"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2, 0, 1], "gpu": "sm_80"}], "this gpu has no descriptors"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2, 0, 1], "kind": "outer", "rows": 0}], "outer reads no weights"),
        ([{**ENTRY, "tile": [16, 512, 16, 4, 2, 0, 1], "gpu": "sm_90"}], "a block of a descriptor has more than 256"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2], "dtype": "bf16"}], "the dtype is not one of bfloat16, float16"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2], "gpu": "H100"}], "the gpu is not as sm_90 or gfx942"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2], "rows": 100}], "the rows are not a power of two or, for outer, 0"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2], "rows": 0}], "the rows are not a power of two or, for outer, 0"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2], "kind": "outer"}], "the rows are not a power of two or, for outer, 0"),
        ([{**ENTRY, "tile": [16, 16, 16, 4, 2], "columns": "768"}], "rows, columns and inside are not whole numbers"),
        ([{**ENTRY, "tile": [16, 16, 1024, 4, 2]}], "a block's size is not a power of two from 16 to 512"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: object, message: str) -> None:
    monkeypatch.setenv("DEEPSEEKMOE_TILES", written(tmp_path / "tiles.json", entries))
    with pytest.raises(ValueError, match=f"DEEPSEEKMOE_TILES='.*tiles.json' is not allowed: .*{message}"):
        choose_tile(PROBLEM, CPU)


def test_a_file_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEKMOE_TILES", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none.json' is not allowed: .*No such file"):
        choose_tile(PROBLEM, CPU)
