"""Pushing to the Hub of the tests."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from local_hub import HubServer

from modeling_deepseekmoe.hub.card import CardFacts
from modeling_deepseekmoe.hub.plan import plan_push
from modeling_deepseekmoe.hub.push import upload
from modeling_deepseekmoe.remote_code import code_files

MIT = CardFacts(license="mit")
CODE = set(code_files())


def push(folder: Path, repo: str, **options: object) -> str:
    facts = options.pop("facts", MIT)
    return upload(plan_push(folder, repo, facts=facts, **options))


def commit(hub: HubServer, repo: str, files: dict[str, str]) -> None:
    """Put files into a repository by other means."""
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    api.create_commit(repo, operations, commit_message="By other means")
