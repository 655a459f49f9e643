"""Files of the code that have other names in this version: none of the former ones stays where it is published."""

from pathlib import Path
from zipfile import ZipFile

import pytest
from local_hub import HubServer
from paths import DATA
from publishing_cases import CODE, push

from modeling_deepseekmoe.hub import plan
from modeling_deepseekmoe.remote_code import attach_code, code_names_in


@pytest.mark.parametrize("from_copy", [False, True], ids=["from the folder", "from a copy of the repository"])
def test_renamed_code_leaves_nothing_behind(
    from_copy: bool, hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository with the code of 0.8.0, four files of which have other names now, is pushed again."""
    old = tmp_path / "old"
    with ZipFile(DATA / "code-0.8.0.zip") as archive:
        archive.extractall(old)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "code_files", lambda: {path.name: path for path in old.iterdir()})
        push(folder, "alice/model")
    before = hub.files("alice/model")
    assert {"gate.py", "balancing.py", "grouped_products.py"} <= before.keys()
    if from_copy:
        for name, content in before.items():
            (folder / name).write_bytes(content)
    assert {path.name for path in old.iterdir()} - CODE == code_names_in(old) - CODE
    push(folder, "alice/model")
    assert {name for name in hub.files("alice/model") if name.endswith(".py")} == CODE


def test_a_file_of_a_former_name_that_is_not_ours_stays(hub: HubServer, folder: Path) -> None:
    push(folder, "alice/model")
    (folder / "gate.py").write_text("# somebody's own\n")
    push(folder, "alice/model")
    (folder / "gate.py").unlink()
    push(folder, "alice/model")
    assert hub.files("alice/model")["gate.py"] == b"# somebody's own\n"


def test_code_that_is_attached_to_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    with ZipFile(DATA / "code-0.8.0.zip") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "mine.py").write_text("# somebody's own\n")
    attach_code(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE | {"mine.py"}
