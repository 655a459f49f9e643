"""Files of the code that have other names in this version: none of the former ones stays where it is published."""

from pathlib import Path
from zipfile import ZipFile

import pytest
from huggingface_hub import HfApi
from local_hub import HubServer
from paths import DATA
from publishing_cases import CODE, commit, push

from modeling_deepseekmoe.hub import plan, repository
from modeling_deepseekmoe.hub.code_update import plan_code_update
from modeling_deepseekmoe.remote_code import attach_code, code_files, code_names_in


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


def test_code_that_was_put_beside_older_code(hub: HubServer, folder: Path) -> None:
    """transformers' own uploads add files and take none away. What imports what says nothing of those left over."""
    with ZipFile(DATA / "code-0.8.0.zip") as archive:
        archive.extractall(folder)
    for name, path in code_files().items():
        (folder / name).write_bytes(path.read_bytes())
    assert {"gate.py", "balancing.py", "grouped_products.py"} <= code_names_in(folder)
    push(folder, "alice/model")
    assert {name for name in hub.files("alice/model") if name.endswith(".py")} == CODE


@pytest.mark.parametrize("how", ["attach", "push"])
def test_files_of_somebody_else_with_new_names_are_not_replaced(hub: HubServer, how: str, folder: Path) -> None:
    with ZipFile(DATA / "code-0.8.0.zip") as archive:
        archive.extractall(folder)
    (folder / "moe.py").write_text("# somebody's own\n")
    with pytest.raises(ValueError, match=r"holds moe\.py: these are names of the family's code"):
        attach_code(folder) if how == "attach" else push(folder, "alice/model")
    assert (folder / "moe.py").read_text() == "# somebody's own\n" and (folder / "gate.py").is_file()


def test_code_that_was_attached_in_part(tmp_path: Path) -> None:
    """A copy that was interrupted is completed."""
    for name in sorted(CODE)[:3]:
        (tmp_path / name).write_bytes(code_files()[name].read_bytes())
    attach_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == CODE


def test_nothing_is_downloaded_where_nothing_can_be_left_over(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, "alice/model")
    monkeypatch.setattr(repository, "_copy_scripts", pytest.fail)
    push(folder, "alice/model")


def test_former_files_beside_code_that_lacks_one_go_with_an_update(hub: HubServer, folder: Path) -> None:
    push(folder, "alice/model")
    with ZipFile(DATA / "code-0.8.0.zip") as archive:
        commit(hub, "alice/model", {name: archive.read(name).decode() for name in archive.namelist()})
    HfApi().delete_file("routing.py", "alice/model")
    update = plan_code_update("alice/model", replace_content=True)
    assert {"gate.py", "balancing.py", "grouped_products.py"} <= set(update.deleted) and "routing.py" in update.files
