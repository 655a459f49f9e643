# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Plan what is uploaded of a folder: its files, the code, the card, and what the repository loses."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils import logging

from modeling_deepseekmoe.conversion.checkpoint import CONFIG_NAME, file_identity, listed, parse_json
from modeling_deepseekmoe.conversion.writing import say_nothing

from ..analysis.inspection import gigabytes
from ..analysis.routing_report import RoutingReport
from ..remote_code import (
    CODE_MARK,
    NATIVE_TYPES,
    as_json,
    auto_map_among,
    carries_code,
    check_place_for_code,
    code_files,
    code_names_in,
)
from ..support.tokenization import SETTINGS_NAME, TOKENIZER_NAME, unheeded_flags
from .candidate import Candidate, find_candidate
from .card import CARD_NAME, CardFacts, is_hand_written, make_card, metadata_of, read_metadata
from .card_sections import HEATMAP_NAME, find_training_state, heatmap
from .checks import check_candidate
from .repository import (
    CONFIG_NAMES,
    Remote,
    check_content,
    check_metadata,
    client,
    explained,
    full_repo_id,
    look,
    stale_code_of,
)
from .secrets import check_secrets

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PushPlan:
    """What would be uploaded.

    Attributes:
        repo_id, revision: the repository and its branch.
        kind: `"model"`, `"adapter"`, `"experts"`, or the code's version if only code goes up.
        exists: whether the repository is there already.
        private: whether a new repository is to be private. `None` leaves it to the Hub's default.
        files: contents by path in the repository, as a file of this machine or as bytes.
        deleted: paths in the repository that the commit removes.
        left_out: files of the folder that are not uploaded, with the reason.
        checks: results of the checks that passed.
        notes: what else there is to say.
        parent: commit of the branch that the plan was made for.
        states: identity of every file when it was checked, by which a change shows.
        is_complete: whether the Hub was asked what is there. Only such a plan can be carried out.
    """

    repo_id: str
    revision: str
    kind: str
    exists: bool
    private: bool | None
    files: dict[str, Path | bytes]
    deleted: tuple[str, ...]
    left_out: dict[str, str]
    checks: tuple[str, ...]
    notes: tuple[str, ...]
    parent: str | None
    states: dict[str, list[object]]
    is_complete: bool

    @property
    def is_empty(self) -> bool:
        """Whether nothing would change."""
        return not self.files and not self.deleted

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in self.files.items()}

    def check_unchanged(self) -> None:
        """Raise ValueError if a file changed since the check. The message names the files."""
        odd = [
            name
            for name, state in self.states.items()
            if not (file := Path(str(self.files[name]))).is_file() or file_identity(file) != state
        ]
        if odd:
            raise ValueError(f"{listed(odd)}: changed since they were checked. Push again.")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain numbers and strings."""
        fields = {key: value for key, value in asdict(self).items() if key not in ("files", "states")}
        return {**fields, "files": self.sizes}

    def to_text(self) -> str:
        """Return the plan as text for a reader."""
        sizes = self.sizes
        width = max(map(len, sizes), default=0)
        where = f"{self.repo_id}, branch {self.revision}" + ("" if self.exists else " (new)")
        lines = [f"{self.kind} for {where}", *(f"  {check}" for check in self.checks)]
        lines += [f"uploads {len(sizes)} files, {gigabytes(sum(sizes.values()))}:"]
        lines += [f"  {name:<{width}}  {size:>15,}" for name, size in sorted(sizes.items())]
        lines += [f"removes from the repository: {', '.join(self.deleted)}"] if self.deleted else []
        lines += [f"leaves out {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class PushOptions:
    """Options of a publication.

    Attributes:
        facts: license, base model and datasets for the card. What is absent is taken from a card that is there
            already.
        private: whether a new repository is private. An existing one must be so already.
        revision: branch. If it does not exist, it is made from `main`.
        code: whether the code of the family goes up with a model: `"auto"` (if transformers has no classes of its
            own), `"always"` or `"never"`.
        routing: what the gates did with a text, for the card.
        overwrite_card: replace a card that somebody wrote.
        replace_content: replace what else a repository holds.
        with_training_state: let optimizer states and the like go up too.
        license_required: refuse a new card without a license.
        token: token of the Hub. The default is the stored one.
        ask_hub: whether to look at the repository. Without it, the plan is made for a new repository.

    Raises:
        ValueError: if `code` is another value.
    """

    facts: CardFacts = field(default_factory=CardFacts)
    private: bool | None = None
    revision: str = "main"
    code: str = "auto"
    routing: RoutingReport | None = None
    overwrite_card: bool = False
    replace_content: bool = False
    with_training_state: bool = False
    license_required: bool = True
    token: str | bool | None = None
    ask_hub: bool = True

    def __post_init__(self) -> None:
        if self.facts is None:
            object.__setattr__(self, "facts", CardFacts())
        carries_code("", self.code)


def plan_push(
    folder: str | Path,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    progress: Callable[[int], None] = say_nothing,
    **fields_of_options: Any,
) -> PushPlan:
    """Check a folder, look at the repository, and plan the upload. Nothing is written anywhere.

    Args:
        folder: a checkpoint of the family, a LoRA adapter, or the trained experts of `save_esft`.
        repo_id: `user/name`.
        options: how it is published.
        progress: receives numbers of bytes of weights that were read.
        fields_of_options: fields of [`PushOptions`], each in place of that of `options`.

    Raises:
        ValueError: if arguments, the folder or the repository are not allowed.
        PreflightError: if the folder is not in order.
        OSError: if files are missing, or the Hub refuses or cannot be reached.
    """
    options = replace(options or PushOptions(), **fields_of_options)
    api = client(options.token) if options.ask_hub else None
    repo_id = full_repo_id(repo_id, api)
    candidate = find_candidate(folder, options.with_training_state)
    card, remote = _read_card(candidate), look(api, repo_id, options.revision) if api else Remote()
    if options.private and remote.exists and not remote.private:
        raise ValueError(f"private=True is not allowed: {repo_id} exists and is public.")
    facts = options.facts.completed(candidate, (card,) if options.replace_content else (card, remote.card))
    candidate, files, notes = _files_of(candidate, facts, options, api)
    deleted = check_content(candidate, remote, repo_id, options.replace_content, options.overwrite_card)
    if api and candidate.kind == "model":
        deleted += stale_code_of(api, repo_id, remote, {*files, *deleted})
    if not options.overwrite_card and (is_hand_written(remote.card) or is_hand_written(card)):
        notes += _keep_card(files, remote, card, options)
    else:
        facts.check_license(options.license_required)
        card = _add_card(candidate, repo_id, facts, options.routing, files)
        if options.routing is None and HEATMAP_NAME in remote.files:
            deleted.append(HEATMAP_NAME)
    if api and CARD_NAME in files:
        check_metadata(api, card)
    states = {name: file_identity(content) for name, content in files.items() if isinstance(content, Path)}
    checks = (*check_candidate(candidate, progress), _no_secrets(files, api))
    return PushPlan(
        repo_id=repo_id,
        revision=options.revision,
        kind=candidate.kind,
        exists=remote.exists,
        private=options.private,
        files=files,
        deleted=tuple(name for name in dict.fromkeys(deleted) if name not in files),
        left_out=candidate.left_out,
        checks=checks,
        notes=tuple(notes),
        parent=remote.head,
        states=states,
        is_complete=options.ask_hub,
    )


def _no_secrets(files: dict[str, Path | bytes], api: HfApi | None) -> str:
    check_secrets(files, api.token if api and isinstance(api.token, str) else None)
    return "no file holds what looks like a token or a key"


def _files_of(
    candidate: Candidate, facts: CardFacts, options: PushOptions, api: HfApi | None
) -> tuple[Candidate, dict[str, Path | bytes], list[str]]:
    """Return the candidate as it is published, its files without the card, and notes on them."""
    files: dict[str, Path | bytes] = dict(candidate.files)
    notes = [] if options.ask_hub else ["the Hub was not asked: the repository is taken for a new one"]
    notes += _name_tokenizer(candidate, files)
    if candidate.kind == "model":
        notes += _add_code(candidate, files, options.code)
    elif api and not _is_on_hub(api, facts.base_model):
        notes.append(f"the base model {facts.base_model} is not on the Hub, or not for this token")
    if candidate.kind == "adapter" and candidate.raw.get("base_model_name_or_path") != facts.base_model:
        candidate = replace(candidate, raw={**candidate.raw, "base_model_name_or_path": facts.base_model})
        files[CONFIG_NAMES["adapter"]] = as_json(candidate.raw)
        notes.append(f"{CONFIG_NAMES['adapter']} names {facts.base_model} as its base")
    return candidate, files, notes


def _add_card(
    candidate: Candidate, repo_id: str, facts: CardFacts, routing: RoutingReport | None, files: dict[str, Path | bytes]
) -> str:
    """Add a new card, with its picture if there is one, and return the card's text."""
    training, with_code = find_training_state(candidate.folder), CODE_MARK in files
    card = make_card(candidate, repo_id, facts, with_code=with_code, routing=routing, training=training)
    files[CARD_NAME] = card.encode()
    if routing is not None:
        files[HEATMAP_NAME] = heatmap(routing)
    return card


def _is_on_hub(api: HfApi, repo_id: str | None) -> bool:
    with explained(str(repo_id)):
        return repo_id is not None and api.repo_exists(repo_id)


def _read_card(candidate: Candidate) -> str:
    if CARD_NAME not in candidate.files:
        return ""
    try:
        card = candidate.files[CARD_NAME].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{CARD_NAME} is not allowed: it is no text in UTF-8 ({error}).") from error
    read_metadata(card)
    return card


def _add_code(candidate: Candidate, files: dict[str, Path | bytes], code: str) -> list[str]:
    """Add the code and its `auto_map`. Take an `auto_map` away if it names what is not there. Return notes."""
    raw = candidate.raw
    carried = carries_code(raw["model_type"], code)
    for name in check_place_for_code(candidate.folder) if carried else code_names_in(candidate.folder):
        files.pop(name, None)
    if carried:
        files.update(code_files())
    auto_map = auto_map_among(files, raw["model_type"], raw.get("auto_map"))
    if auto_map == (raw.get("auto_map") or {}):
        return []
    files[CONFIG_NAME] = as_json(
        {key: value for key, value in raw.items() if key != "auto_map"} | ({"auto_map": auto_map} if auto_map else {})
    )
    dropped = set(raw.get("auto_map") or ()) - set(auto_map)
    return (
        [f"the auto_map of {CONFIG_NAME} named code that is not published: {listed(sorted(dropped))}"]
        if dropped
        else []
    )


def _name_tokenizer(candidate: Candidate, files: dict[str, Path | bytes]) -> list[str]:
    """Name a tokenizer class that every version of transformers can read. Return notes on it and on ignored settings.

    transformers 5 saves tokenizers under the name of a class that transformers 4 does not have. The first generation's
    tokenizer was released under the name of Llama's, but a byte-level tokenizer loses its spaces in that class.
    """
    settings, tokenizer = (candidate.files.get(name) for name in (SETTINGS_NAME, TOKENIZER_NAME))
    content, read = (parse_json(file) if file else None for file in (settings, tokenizer))
    if settings is None or not isinstance(content, dict) or not isinstance(read, dict):
        return []
    notes = []
    for flag in unheeded_flags(content, read):
        notes.append(
            f"{SETTINGS_NAME} says {flag}=true, which transformers 5 ignores beside this {TOKENIZER_NAME}: "
            "modeling_deepseekmoe.load_tokenizer(folder).save_pretrained(folder) writes it where all look"
        )
    named, reason = content.get("tokenizer_class"), None
    if named == "TokenizersBackend":
        reason = "which transformers 4 reads too"
    elif named in ("LlamaTokenizer", "LlamaTokenizerFast") and candidate.raw.get("model_type") not in NATIVE_TYPES:
        reason = "it is byte-level" if "ByteLevel" in str(read.get("pre_tokenizer")) else None
    if reason:
        files[SETTINGS_NAME] = as_json({**content, "tokenizer_class": "PreTrainedTokenizerFast"})
        notes.append(f"{SETTINGS_NAME} names PreTrainedTokenizerFast instead of {named}: {reason}")
    return notes


def _keep_card(files: dict[str, Path | bytes], remote: Remote, card: str, options: PushOptions) -> list[str]:
    """Decide which of two cards stays, if one is written by hand. Return notes."""
    stays = is_hand_written(remote.card)
    if not metadata_of(remote.card if stays else card).get("license"):
        problem = f"{CARD_NAME}{' in the repository' if stays else ''} is written by hand, and states no license"
        if options.license_required:
            raise ValueError(
                f"license is missing: {problem}. It is not changed: add one to its metadata, or pass --overwrite-card."
            )
        logger.warning(problem)
    said = options.facts != CardFacts() or options.routing is not None
    unsaid = [f"{CARD_NAME} is not changed: what was said for it is left out"] if said else []
    if not stays:
        return [f"{CARD_NAME} of the folder is written by hand: it goes up as it is", *unsaid]
    files.pop(CARD_NAME, None)
    differs = " The folder's differs." if card and card != remote.card else ""
    kept = f"{CARD_NAME} in the repository is written by hand: it stays (--overwrite-card makes a new one).{differs}"
    return [kept, *unsaid]


__all__ = ["PushOptions", "PushPlan", "plan_push"]
