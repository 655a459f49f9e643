"""Damaged, hostile and unfortunate files: a clear error that names the file, nothing written, nothing changed."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from cli_runner import run
from conftest import Golden
from conversion_cases import INDEX, SECOND, deadline, digests
from safetensors import SafetensorError, safe_open
from synthetic import read, same_bytes, write

from modeling_deepseekmoe.conversion import convert
from modeling_deepseekmoe.conversion.checkpoint import Checkpoint, read_header


@pytest.fixture
def folder(v1: Golden, tmp_path: Path) -> Path:
    """A sharded checkpoint."""
    return write(tmp_path / "source", v1.tensors, v1.config, 3)


def edit_header(file: Path, old: str, new: str) -> None:
    content = file.read_bytes()
    assert old.encode() in content and len(old) == len(new)
    file.write_bytes(content.replace(old.encode(), new.encode(), 1))


def edit_index(folder: Path, without: str = "", **changes: object) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] |= changes
    content["weight_map"].pop(without, None)
    (folder / INDEX).write_text(json.dumps(content))


def double_in_header(file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    name, entry = list(json.loads(header).items())[-1]
    header = header[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def as_link(file: Path) -> None:
    elsewhere = file.parent.parent / f"elsewhere-{file.name}"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def with_extra_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = load_file(folder / SECOND.replace("2-of", "1-of")), load_file(folder / SECOND)
    save_file(first | {sorted(second)[0]: second[sorted(second)[0]]}, folder / SECOND.replace("2-of", "1-of"))


def pickled(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def pickled_under_another_name(folder: Path) -> None:
    torch.save({"a": torch.zeros(100)}, folder / SECOND)


def named_bin(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    edit_index(folder, **{"model.norm.weight": "pytorch_model.bin"})


BROKEN = {
    "truncated": (lambda f: os.truncate(f / SECOND, 3000), rf"{SECOND} is not a readable .*tensors end at byte"),
    "empty": (lambda f: os.truncate(f / SECOND, 0), rf"{SECOND} is not a readable .*the file has 0"),
    "only a length": (lambda f: os.truncate(f / SECOND, 8), rf"{SECOND} is not a readable .*the file has 8"),
    "longer": (lambda f: (f / SECOND).open("ab").write(b"x"), rf"{SECOND} is not a readable .*end at byte"),
    "header is not JSON": (lambda f: edit_header(f / SECOND, '"F32"', '"F32}'), rf"{SECOND} .* header is not JSON"),
    "dtype": (lambda f: edit_header(f / SECOND, '"F32"', '"I32"'), rf"{SECOND} .* dtype 'I32'; allowed are F64"),
    "shape": (lambda f: edit_header(f / SECOND, "[24,64]", "[25,64]"), rf"{SECOND} .* of shape \[25, 64\]"),
    "offset": (lambda f: edit_header(f / SECOND, "offsets\":[0,", "offsets\":[8,"), rf"{SECOND} is not a readable"),
    "twice in a header": (lambda f: double_in_header(f / SECOND), rf"{SECOND} .*is there twice"),
    "dtype twice": (
        lambda f: edit_header(f / SECOND, '"shape":[24,64]', '"dtype":"F32"  '), rf"{SECOND} .*'dtype' is there twice",
    ),
    "duplicate": (with_extra_tensor, r"is in two files, model-00001-of-00003.safetensors and model-00002"),
    "index names ../": (
        lambda f: edit_index(f, **{"model.norm.weight": "../x.safetensors"}),
        r"index\.json names '\.\./x\.safetensors', which is not allowed: it must lie in the folder",
    ),
    "index names an absolute path": (
        lambda f: edit_index(f, **{"model.norm.weight": "/tmp/x.safetensors"}),
        r"index\.json names '/tmp/x\.safetensors'",
    ),
    "index names a missing file": (
        lambda f: edit_index(f, **{"model.norm.weight": "gone.safetensors"}), r"lacks gone\.safetensors",
    ),
    "index names another file": (
        lambda f: edit_index(f, **{"model.norm.weight": SECOND, "lm_head.weight": SECOND}),
        rf"index\.json has tensor .* in {SECOND}, which does not hold it",
    ),
    "index names a tensor that is nowhere": (
        lambda f: edit_index(f, **{"model.n.weight": SECOND}), rf"index\.json has tensor model\.n\.weight in {SECOND}",
    ),
    "index lacks a tensor": (lambda f: edit_index(f, without="model.norm.weight"), r"index\.json lacks model\.norm"),
    "index names a folder": (
        lambda f: edit_index(f, **{"model.norm.weight": "a/x.safetensors"}), r"index\.json names 'a/x\.safetensors'",
    ),
    "index names a path of Windows": (
        lambda f: edit_index(f, **{"model.norm.weight": "..\\x.safetensors"}), r"index\.json names '\.\.",
    ),
    "index is a link": (lambda f: as_link(f / INDEX), r"index\.json is a link to"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), r"index\.json is not allowed: it must be JSON"),
    "index has a key twice": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), r"index\.json .*'a' is there twice",
    ),
    "index is deep": (lambda f: (f / INDEX).write_text("[" * 10**5), r"index\.json is not readable JSON"),
    "index is binary": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"), r"index\.json is not readable JSON"),
    "a stale file beside the index": (
        lambda f: shutil.copy(f / SECOND, f / "model.safetensors"), r"holds model\.safetensors, which .* one of them",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), r"lacks model\.safetensors"),
    "shard is a link": (lambda f: as_link(f / SECOND), rf"{SECOND} is a link to .*it must lie in the folder"),
    "config is a link": (lambda f: as_link(f / "config.json"), r"config\.json is a link to"),
    "tokenizer is a link": (lambda f: as_link(f / "tokenizer.json"), r"tokenizer\.json is a link to"),
    "pickled": (pickled, r"holds its weights in pytorch_model\.bin, which is not allowed: only \.safetensors"),
    "index names a pickled file": (named_bin, r"index\.json names 'pytorch_model\.bin'.*only \.safetensors"),
    "a pickled file under another name": (pickled_under_another_name, rf"{SECOND} is not a readable safetensors file"),
    "no config": (lambda f: (f / "config.json").unlink(), r"source lacks config\.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not readable JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), r"config of type list is not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("command", ["convert", "verify"])
def test_broken_sources(case: str, command: str, folder: Path, tmp_path: Path) -> None:
    import re

    breaks, message = BROKEN[case]
    breaks(folder)
    before = digests(folder)
    with deadline():
        code, output = run(command, folder, *([tmp_path / "out"] if command == "convert" else []))
    if (case, command) == ("tokenizer is a link", "verify"):
        assert code == 0  # it reads no tokenizer
        return
    missing = case in ("no config", "no index", "index names a missing file")
    assert code == (1 if command == "verify" and not missing else 2), output
    assert re.search(message, output.replace("\n", " ")), output
    assert digests(folder) == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--someone--moe"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    convert(snapshot, tmp_path / "out")
    assert same_bytes(read(tmp_path / "out"), read(folder))
    (tmp_path / "cache" / "secret").write_bytes((folder / SECOND).read_bytes())
    (snapshot / SECOND).unlink()
    (snapshot / SECOND).symlink_to(tmp_path / "cache" / "secret")
    with pytest.raises(ValueError, match=rf"{SECOND} is a link to"):
        convert(snapshot, tmp_path / "again")


def test_flipped_data_is_found_by_verify(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "copy", layout="stacked")
    assert run("verify", folder, "--write-manifest")[0] == 0
    code, output = run("verify", folder)
    assert code == 0 and "manifest tensors.sha256.json: checked" in output
    tensor = Checkpoint(folder).tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    content = bytearray(tensor.file.read_bytes())
    content[tensor.offset + 5] ^= 0x10
    tensor.file.write_bytes(content)
    code, output = run("verify", folder)
    assert code == 1 and f"not what the manifest says: {tensor.name}" in output
    (folder / "tensors.sha256.json").unlink()
    assert run("verify", folder)[0] == 0  # nothing to compare it with
    code, output = run("verify", tmp_path / "copy", folder)
    assert code == 1 and f"tensors that differ: {tensor.name}" in output


def test_hundreds_of_random_corruptions(v1: Golden, folder: Path, tmp_path: Path) -> None:
    """Of a header or the index: an error, or the right result."""
    layouts, results = ("per-expert", "stacked"), {}
    for layout in layouts:
        convert(folder, tmp_path / layout, layout=layout)
        results[layout] = read(tmp_path / layout)
    before = digests(folder)
    generator, outcomes = random.Random(0), {0: 0, 1: 0, 2: 0}
    headers = {file: 8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors")}
    targets = [*headers, folder / INDEX, folder / INDEX]
    for number in range(500):
        file = generator.choice(targets)
        content = file.read_bytes()
        end = headers.get(file, len(content))
        corrupted = bytearray(content)
        for _ in range(generator.choice((1, 1, 1, 2, 5))):
            place = generator.randrange(end)
            kind = generator.randrange(5)
            if kind == 0:
                corrupted[place] ^= 1 << generator.randrange(8)
            elif kind == 1:
                corrupted[place] = generator.randrange(256)
            elif kind == 2:
                corrupted[place] = generator.choice(b'0123456789"{}[],:.')
            elif kind == 3:
                del corrupted[place : place + generator.randrange(1, 9)]
            else:
                corrupted[place:place] = corrupted[place // 2 : place // 2 + generator.randrange(1, 30)]
        file.write_bytes(corrupted)
        out = tmp_path / f"out-{number}"
        with deadline():
            code, output = run("convert", folder, out, "--layout", layouts[number % 2])
            verified, _ = run("verify", folder)
        assert "Traceback" not in output and code in (0, 2) and (verified == 0) == (code == 0), output
        outcomes[code] += 1
        if code == 0:
            assert same_bytes(read(out), results[layouts[number % 2]])
            assert json.loads((out / "config.json").read_text()) == v1.config
        else:
            assert "Error: " in output and not out.exists()
        shutil.rmtree(out, ignore_errors=True)
        assert not out.with_name(f"{out.name}.unfinished").exists() and file.read_bytes() == corrupted
        file.write_bytes(content)
    assert digests(folder) == before
    assert outcomes[2] > 400 and outcomes[0] > 0  # some change the index's metadata or white space alone


def test_headers_are_read_as_the_safetensors_library_reads_them(v3: Golden, tmp_path: Path) -> None:
    """Whatever is accepted here is accepted there, and with the same meaning."""
    generator, content = random.Random(1), (v3.folder / "model.safetensors").read_bytes()
    end, file, accepted = 8 + int.from_bytes(content[:8], "little"), tmp_path / "x.safetensors", 0
    for _ in range(1500):
        corrupted = bytearray(content)
        for _ in range(generator.choice((1, 1, 1, 2))):
            corrupted[generator.randrange(end)] = generator.choice(b'0123456789"{}[],:. F32xyz')
        file.write_bytes(corrupted)
        try:
            tensors = {tensor.name: tensor for tensor in read_header(file)}
        except ValueError:
            continue
        accepted += corrupted != content
        try:
            with safe_open(file, framework="pt") as handle:
                assert set(handle.keys()) == tensors.keys()
                for name, tensor in tensors.items():
                    found = handle.get_tensor(name)
                    assert found.dtype == tensor.dtype and tuple(found.shape) == tensor.shape
                    data = bytes(corrupted[tensor.offset : tensor.offset + tensor.nbytes])
                    assert bytes(found.contiguous().view(-1).view(torch.uint8).numpy()) == data
        except SafetensorError as error:
            raise AssertionError(f"accepted here, and not there: {error}") from error
    assert accepted > 50


ODD_FIELDS = [
    {},  # nothing is odd about it
    {"architectures": [5]},
    {"architectures": "DeepseekForCausalLM"},
    {"architectures": ["BertForPreTraining"]},
    {"dtype": [1]},
    {"is_moe_layer": 5},
    {"num_hidden_layers": 10**7},
    {"num_hidden_layers": 2},
    {"n_routed_experts": 10**7},
    {"n_routed_experts": 4, "num_experts_per_tok": 2},
    {"num_labels": 10**40},
    {"num_labels": "two"},
    {"quantization_config": 5},
    {"quantization_config": {"quant_method": "gptq"}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 10**13]}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": "128"}},
    {"rope_scaling": 5},
    {"hidden_size": 10**30},
    {"hidden_size": None},
    {"num_attention_heads": 0},
    {"vocab_size": "x"},
    {"moe_layer_freq": 0},
    {"model_type": "llama"},
    {"model_type": None},
    {"first_k_dense_replace": 0},
]


@pytest.mark.parametrize("fields", ODD_FIELDS, ids=str)
def test_odd_configs(fields: dict, v1: Golden, tmp_path: Path) -> None:
    source = write(tmp_path / "source", v1.tensors, {**v1.config, **fields})
    with deadline():
        for command in (("convert", source, tmp_path / "out", "--dtype", "fp8"), ("verify", source)):
            code, output = run(*command)
            if not fields:
                assert code == 0
                continue
            assert code == (2 if command[0] == "convert" else 1), output
            assert "config.json" in output or "fit the config" in output or "the config asks for" in output
    assert (tmp_path / "out").exists() == (not fields) and not (tmp_path / "out.unfinished").exists()
