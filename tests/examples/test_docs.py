"""The documentation: every block runs, as it stands, against a Hub with tiny models under the names that it uses.

The Python blocks of a page share their variables, and all blocks of a page a folder, with `text.txt` and `task.jsonl`
in it. What a page does not show stands in a comment, `<!-- setup`, and what cannot run here is marked with the reason,
`<!-- not run: ... -->`.
"""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from local_hub import USERS, WRITER, HubServer
from paths import ROOT
from tiny_hub import fill_hub, write_texts
from typer.testing import CliRunner

import modeling_deepseekmoe
from modeling_deepseekmoe.cli.app import app

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->\s*$")
# Why a block may not run here; nothing else is a reason.
REASONS = {"needs several GPUs", "needs a GPU", "installs", "is what CI runs", "starts another program"}
BLOCK = re.compile(
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$|^<!-- setup\n(?P<setup>.*?)^-->$", re.DOTALL | re.MULTILINE
)


@dataclass
class Block:
    """A piece of a page that runs."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        before = NOT_RUN.search(text[: match.start()])
        reason = before["reason"] if before and not text[before.end() : match.start()].strip() else None
        language, code = ("python", match["setup"]) if match["setup"] else (match["language"], match["code"])
        found.append(Block(language, code, text[: match.start()].count("\n") + 1, reason))
    return found


@pytest.fixture
def full_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub with its models, this user's name there, and the folder of the blocks."""
    monkeypatch.setitem(USERS, WRITER, "me")
    fill_hub(hub, tmp_path / "models")
    folder = tmp_path / "work"
    folder.mkdir()
    write_texts(folder)
    monkeypatch.chdir(folder)
    return folder


def run_python(block: Block, names: dict[str, object], page: Path) -> None:
    source = "\n" * block.line + block.code  # so that an error names the line of the page
    with torch.compiler.set_stance("force_eager"):  # other tests compile; here it would take a minute
        exec(compile(source, str(page), "exec"), names)


def run_commands(block: Block) -> None:
    for line in re.sub(r"\\\n\s*", " ", block.code).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "deepseekmoe":
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
        else:
            subprocess.run(["bash", "-ec", line], check=True, timeout=300)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, full_hub: Path) -> None:
    modeling_deepseekmoe.register()  # as in a process of the reader's
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.reason is not None:
            assert block.reason in REASONS, f"{page.name}:{block.line}: {block.reason}"
        elif block.language == "python":
            run_python(block, names, page)
        elif block.language == "bash":
            run_commands(block)
        else:
            assert block.language in ("text", "json", "yaml", "toml"), f"{page.name}:{block.line}: {block.language}"
