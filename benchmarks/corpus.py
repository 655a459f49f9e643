"""Read real text that any machine with this project has: docstrings and reference pages, by domain.

The domains are Python itself (its language reference and standard library), mathematics, data, PyTorch and
transformers. A document is a page of the reference, or the docstrings of one module. A paragraph counts once, wherever
it first occurs. One document in sixteen, chosen by a hash of its name, is held out.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# The packages of every domain. All are there with the project's own requirements and its extras.
DOMAINS = {
    "python": (),
    "mathematics": ("sympy", "networkx", "mpmath"),
    "data": ("numpy", "pandas", "matplotlib"),
    "pytorch": ("torch",),
    "transformers": ("transformers", "peft", "trl"),
}
END = "<end>"
_HELD_OUT, _OF = 1, 16
LEAST_CHARACTERS = 40  # of a docstring
_RUN = 12  # words


@dataclass(frozen=True)
class Document:
    """A text, the domain that it belongs to, and a name that is the same on every machine."""

    domain: str
    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the document is for validation."""
        return hashlib.sha256(self.name.encode()).digest()[0] % _OF < _HELD_OUT


def docstrings(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the docstrings of every module below a folder, without its tests."""
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if {"site-packages", "test", "tests", "idle_test"} & set(relative.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template or a file in another encoding: no text for a reader
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        yield relative.as_posix(), [text for text in found if len(text) >= LEAST_CHARACTERS]


def documents() -> list[Document]:
    """Collect all documents. Paragraphs that occurred before, in whatever document, are left out."""
    seen: set[str] = set()
    found = []
    for document in _all_documents():
        text = "\n\n".join(_new_paragraphs(document.text, seen))
        if len(text) >= LEAST_CHARACTERS:
            found.append(Document(document.domain, document.name, text))
    return found


def _all_documents() -> Iterator[Document]:
    paths = {name: Path(place) for name, place in sysconfig.get_paths().items()}
    for domain, packages in DOMAINS.items():
        if domain == "python":
            yield from (Document(domain, f"topics/{name}", topics[name]) for name in sorted(topics))
            folders = {"stdlib": paths["stdlib"]}
        else:
            folders = {name: paths["purelib"] / name for name in packages}
        for package, folder in folders.items():
            if not folder.is_dir():
                raise FileNotFoundError(f"{package} is not installed: `make environments` installs it.")
            for name, texts in docstrings(folder):
                yield Document(domain, f"{package}/{name}", "\n\n".join(texts))


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if len(words) < 20:  # a heading
            yield paragraph
        elif words not in seen:
            seen.add(words)
            yield paragraph


def split(found: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Divide documents into those to train on and those for validation.

    Documents for validation are left out if more than half of their runs of twelve words are also in a training text.
    """
    training: list[Document] = []
    held_out: list[Document] = []
    for document in found:
        (held_out if document.is_held_out else training).append(document)
    kept = set(without_copies([one.text for one in held_out], [one.text for one in training]))
    return training, [document for document in held_out if document.text in kept]


def without_copies(texts: list[str], others: list[str]) -> list[str]:
    """Leave out the texts of which more than half of the runs of twelve words are also in one of the others."""
    own = [set(runs_of_words(text)) for text in texts]
    wanted: set[tuple[str, ...]] = set().union(*own)
    known = {run for text in others for run in runs_of_words(text) if run in wanted}
    return [text for text, runs in zip(texts, own, strict=True) if 2 * len(runs & known) <= len(runs)]


def runs_of_words(text: str, length: int = _RUN) -> Iterator[tuple[str, ...]]:
    """Yield all runs of so many words."""
    words = text.split()
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. Its first token ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def blocks(texts: list[str], tokenizer: Tokenizer, block_size: int) -> torch.Tensor:
    """Make blocks (N, block_size) of token ids. A token ends each text; what fills no block at the end is left out."""
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in [*encoding.ids, 0]]
    return torch.tensor(ids[: len(ids) // block_size * block_size]).view(-1, block_size)


def package_versions() -> dict[str, str]:
    """Return the version of every package whose docstrings are read."""
    return {name: metadata.version(name) for packages in DOMAINS.values() for name in packages}
