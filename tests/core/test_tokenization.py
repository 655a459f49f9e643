"""Tokenizers: what is in the folder decides, and the first token that its settings ask for is there."""

import json
import shutil
from pathlib import Path

import fresh_process
import pytest
from conftest import GOLDEN_ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import modeling_deepseekmoe
from modeling_deepseekmoe import load_tokenizer
from modeling_deepseekmoe.cli.options import ModelOptions
from modeling_deepseekmoe.hub.plan import PushPlan, plan_push
from modeling_deepseekmoe.support.tokenization import unheeded_flags

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001 - DeepSeek writes them so
TEXT = "hello do you"
GOLDEN = {"deepseek": "v1-mha", "deepseek_v3": "v3-noaux"}


def write(folder: Path, kind: str = "deepseek", processor: object = None, **settings: object) -> Path:
    """A tokenizer in the form of DeepSeek's: byte-level, under the name of Llama's."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN_ROOT / GOLDEN[kind] / name, folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted({byte for byte in pre_tokenizers.ByteLevel.alphabet() if byte in "abcdefghijklmnopqrstuvwxyzĠ"})
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=[BEGIN, END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    if processor is not None:
        tokenizer.post_processor = processor
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": {"__type": "AddedToken", "content": BEGIN}, "eos_token": END}
    content = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, **settings}))
    return folder


def tokens(tokenizer: object) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(TEXT).input_ids)


@pytest.mark.parametrize("kind", GOLDEN)
@pytest.mark.parametrize("processor", [None, processors.ByteLevel()], ids=["none", "byte-level"])
def test_the_first_token_of_a_text(kind: str, processor: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "own", kind, processor)
    tokenizer = load_tokenizer(folder)
    assert (
        tokens(tokenizer) == [BEGIN, "hello", "Ġdo", "Ġyou"]
        and tokenizer.decode(tokenizer(TEXT).input_ids[1:]) == TEXT
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    assert tokens(AutoTokenizer.from_pretrained(tmp_path / "saved")) == [BEGIN, "hello", "Ġdo", "Ġyou"]
    assert tokens(load_tokenizer(folder, add_bos_token=False)) == ["hello", "Ġdo", "Ġyou"]


def test_both_ends_and_what_is_there_already(tmp_path: Path) -> None:
    own = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    assert tokens(load_tokenizer(write(tmp_path / "both", add_eos_token=True))) == [BEGIN, "hello", "Ġdo", "Ġyou", END]
    folder = write(tmp_path / "template", "deepseek", own, add_eos_token=True)
    assert tokens(load_tokenizer(folder)) == [BEGIN, "hello", "Ġdo", "Ġyou", END]
    assert tokens(load_tokenizer(write(tmp_path / "begin", "deepseek", own))) == [BEGIN, "hello", "Ġdo", "Ġyou"]
    assert tokens(load_tokenizer(write(tmp_path / "none", add_bos_token=False))) == ["hello", "Ġdo", "Ġyou"]
    assert unheeded_flags({"add_bos_token": True, "bos_token": BEGIN}, {}) == []
    with pytest.raises(OSError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind", GOLDEN)
@pytest.mark.parametrize("override", [False, True])
def test_spaces_are_kept_whatever_class_the_settings_name(kind: str, override: bool, tmp_path: Path) -> None:
    modeling_deepseekmoe.register(override_native=override)
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / "own", kind))
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT


OWN_CODE = '''
from transformers import PreTrainedTokenizer


class LettersTokenizer(PreTrainedTokenizer):
    """A token for every letter."""

    vocab_files_names = {"vocab_file": "letters.txt"}

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file) as file:
            self.letters = file.read().split("\\n")
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: place for place, letter in enumerate(self.letters)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
'''
ASK = """
import sys
from transformers import AutoTokenizer
if sys.argv[2] != "none":
    import modeling_deepseekmoe
    modeling_deepseekmoe.register(override_native=sys.argv[2] == "override")
    modeling_deepseekmoe.DeepseekMoeConfig()
for trust in (True, False):
    try:
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=trust)
        print(type(tokenizer).__name__, tokenizer("abcab").input_ids)
    except ValueError as error:
        print("ValueError", "contains custom code" in str(error))
"""


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseekmoe"])
def test_a_tokenizer_with_code_of_its_own(kind: str, tmp_path: Path) -> None:
    """As Moonlight's, of type `deepseek_v3`: this package changes nothing of how it is read."""
    config = json.loads((GOLDEN_ROOT / GOLDEN["deepseek_v3"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    (tmp_path / "letters.txt").write_text("a\nb\nc")
    (tmp_path / "tokenization_letters.py").write_text(OWN_CODE)
    auto_map = {"AutoTokenizer": ["tokenization_letters.LettersTokenizer", None]}
    settings = {"tokenizer_class": "LettersTokenizer", "auto_map": auto_map}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    def ask(package: str) -> list[str]:
        return fresh_process.check("-c", ASK, tmp_path, package).stdout.strip().splitlines()[-2:]

    expected = ["LettersTokenizer [0, 1, 2, 0, 1]", "ValueError True"]
    if kind == "deepseek_v3":  # whose untrusted code transformers itself passes over before 5.22
        answer = ask("none")
        assert answer[0] == expected[0] and answer == ask("override")
    else:
        assert ask("plain") == expected
        arguments = {"model": str(GOLDEN_ROOT / "v1-mha"), "tokenizer": str(tmp_path), "device_map": "cpu"}
        loaded = ModelOptions(**arguments, trust_remote_code=True).load()
        assert type(loaded[1]).__name__ == "LettersTokenizer"
        with pytest.raises(ValueError, match="contains custom code"):
            ModelOptions(**arguments).load()


def test_tables_of_transformers_keep_what_is_not_ours() -> None:
    code = """
from transformers.models.auto import tokenization_auto as auto
def state():
    return set(auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS), dict(auto.TOKENIZER_MAPPING_NAMES)
before = state()
import modeling_deepseekmoe
modeling_deepseekmoe.register(override_native=True)
modeling_deepseekmoe.DeepseekMoeConfig()
after = state()
new = set(after[1].items()) - set(before[1].items())
print(after[0] == before[0], before[1].items() <= after[1].items(), *sorted(name for name, _ in new))
"""
    done = fresh_process.check("-c", code)
    assert done.stdout.split() in (["True", "True"], ["True", "True", "deepseek", "deepseekmoe"])


@pytest.mark.parametrize("kind", GOLDEN)
def test_what_is_published(kind: str, tmp_path: Path) -> None:
    """A class that transformers 4 knows too, and a word about what transformers 5 does not see."""
    from modeling_deepseekmoe.hub.card import CardFacts

    def plan(folder: Path) -> PushPlan:
        return plan_push(folder, "me/x", facts=CardFacts("mit"), ask_hub=False)

    folder = write(tmp_path / "own", kind)
    notes = [note for note in plan(folder).notes if "tokenizer" in note]
    assert "says add_bos_token=true, which transformers 5 ignores" in notes[0] and "load_tokenizer(folder)" in notes[0]
    assert len(notes) == 1 + (kind == "deepseek")
    load_tokenizer(folder).save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    pushed = plan(folder)
    (note,) = (note for note in pushed.notes if "tokenizer" in note)
    assert "names PreTrainedTokenizerFast instead of TokenizersBackend: which transformers 4 reads too" in note
    (folder / "tokenizer_config.json").write_bytes(pushed.files["tokenizer_config.json"])
    assert tokens(AutoTokenizer.from_pretrained(folder)) == [BEGIN, "hello", "Ġdo", "Ġyou"]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(OSError, match=r"model-q4\.gguf"):  # a GGUF file holds one: it is looked for
        load_tokenizer(tmp_path, gguf_file="model-q4.gguf")
