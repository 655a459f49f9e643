"""Published models as others meet them: in fresh processes, without this package and with it, online and offline."""

import os
import shlex
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile

import fresh_process
import pytest
import torch
import yaml
from cli_runner import run
from local_hub import WRITER, HubServer, metadata_problems
from markdown_it import MarkdownIt
from paths import DATA, SCRIPTS
from tolerances import SAME_COMPUTATION

from modeling_deepseekmoe.remote_code import CODE_VERSION, code_files
from modeling_deepseekmoe.transformers_support import cache_name

# What the code that travels must do without. (The first two are no dependencies of transformers either.)
ABSENT = ("triton", "peft", "accelerate", "modeling_deepseekmoe", "__editable__")
CARRIED = ("ours", "v1", "v2-code", "v3-code", "classifier", "trained")
CODE = set(code_files())


@dataclass
class Published:
    """A Hub on which `publish.py` was run, and all that was printed by processes that spoke with it."""

    server: HubServer
    folder: Path
    printed: list[str] = field(default_factory=list)

    def python(self, *arguments: object, package: bool = True, home: str = "home", **environment: str) -> str:
        """Run Python, with the package or where neither it nor its other dependencies are installed."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": self.server.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(self.folder / home),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        flags: tuple[str, ...] = ()
        if not package:
            flags = ("-S",)  # no site-packages but these
            environment["PYTHONPATH"] = str(self._bare_packages())
        result = fresh_process.run(*arguments, flags=flags, environment=environment, cwd=self.folder)
        self.printed.append(result.stdout + result.stderr)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def _bare_packages(self) -> Path:
        """The installed packages without the absent ones."""
        bare = self.folder / "packages"
        if not bare.exists():
            bare.mkdir()
            for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
                if not path.name.lower().startswith(ABSENT):
                    (bare / path.name).symlink_to(path)
        return bare

    def card(self, name: str) -> str:
        """The card of a repository."""
        return self.server.files(f"alice/{name}")["README.md"].decode()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("published")
    server = HubServer(folder / "hub")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    it = Published(server, folder)
    (folder / "out").mkdir()
    it.python(SCRIPTS / "publish.py", folder / "out", HF_TOKEN=WRITER)
    yield it
    server.shutdown()
    server.server_close()


def compare(output: str, modules: dict[str, str]) -> None:
    """That every model computed what it did when it was published, with the classes of these modules."""
    lines = dict(line.split(": ", 1) for line in output.splitlines() if " difference " in line)
    assert lines.keys() == modules.keys()
    for name, line in lines.items():
        found, _, difference, *text = line.split()
        assert found == modules[name] and float(difference) <= SAME_COMPUTATION, line
        assert text == ["same", "text", "True"], line
    assert output.count("tokenizer True") == len({"ours", "v1", "trained"} & modules.keys())


def test_without_the_package_and_offline_afterwards(published: Published) -> None:
    for name in ("ours", "v1"):
        assert sum(file.endswith(".safetensors") for file in published.server.files(f"alice/{name}")) > 2
    script = (SCRIPTS / "load_published.py", "remote", published.folder / "out", *CARRIED)
    output = published.python(*script, package=False, home="bare")
    compare(output, dict.fromkeys(CARRIED, "transformers_modules"))
    assert output.splitlines()[-1] == "imported: transformers_modules"
    before = len(published.server.requests)
    output = published.python(*script, package=False, home="bare", HF_HUB_OFFLINE="1")
    compare(output, dict.fromkeys(CARRIED, "transformers_modules"))
    assert len(published.server.requests) == before
    # Storage is another host, which does not get a token.
    assert not any("/storage/" in line for line in published.server.authorized)


def test_with_the_package(published: Published) -> None:
    modules = dict.fromkeys(("ours", "v1", "v3", "classifier", "trained"), "modeling_deepseekmoe") | {
        "adapter": "peft"
    }
    script = (SCRIPTS / "load_published.py", "package", published.folder / "out", *modules)
    output = published.python(*script, home="with", HF_TOKEN=WRITER)
    compare(output, modules)
    assert "transformers_modules" not in output


def test_installed_classes_win_and_nothing_clashes(published: Published) -> None:
    """In either order: the code of the repository first, or the package."""
    code = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
load = lambda: AutoModelForCausalLM.from_pretrained("alice/ours", trust_remote_code=True).eval()
ids = torch.arange(12)[None]
first = load()
assert type(first).__module__.startswith("transformers_modules"), type(first)
import modeling_deepseekmoe
second = load()
assert type(second).__module__ == "modeling_deepseekmoe.modeling_deepseekmoe", type(second)
with torch.no_grad():
    assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
first.save_pretrained("again"); second.save_pretrained("ordinary")
assert type(AutoModelForCausalLM.from_pretrained("ordinary")) is type(second)
import os
assert "modeling_deepseekmoe.py" in os.listdir("again") and "remote_code.py" not in os.listdir("ordinary")
"""
    published.python("-c", code, home="both")


def test_a_copy_saves_its_code_again(published: Published) -> None:
    """Fine-tuned where the package is not installed, and loaded there."""
    code = """
import json, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
for auto, name in ((AutoModelForCausalLM, "v1"), (AutoModelForSequenceClassification, "classifier")):
    model = auto.from_pretrained(f"alice/{name}", trust_remote_code=True)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    model.save_pretrained(f"tuned-{name}")
    again = auto.from_pretrained(f"tuned-{name}", trust_remote_code=True)
    ids = torch.arange(12)[None]
    assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)
    assert auto.__name__ in json.load(open(f"tuned-{name}/config.json"))["auto_map"]
    assert type(again).__module__.startswith("transformers_modules")
"""
    published.python("-c", code, package=False, home="bare")


def test_trainer(published: Published) -> None:
    server = published.server
    titles = [commit["title"] for commit in server.history("alice/trained")]
    # What is in the output folder is uploaded in the background, as it is when its turn comes: one step's upload may
    # find the next step's files, which then has nothing to add. Checkpoints have a folder of their own.
    assert {f"Training in progress, step {step}, checkpoint" for step in (2, 4, 6)} <= set(titles)
    assert {f"Training in progress, step {step}" for step in (2, 4, 6)} & set(titles)
    assert titles[-1] == "initial commit"
    files = server.files("alice/trained")
    assert files.keys() >= CODE and {f"last-checkpoint/{name}" for name in CODE} <= files.keys()
    assert b"auto_map" in files["config.json"] and b"auto_map" in files["last-checkpoint/config.json"]
    arguments = published.folder / "training_args.bin"
    arguments.write_bytes(files["training_args.bin"])
    assert torch.load(arguments, weights_only=False).hub_token is None
    card = published.card("trained")
    assert "| optimizer steps | 6 |" in card and "| `router/max_violation_global`, last logged |" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "apache-2.0" and metadata["datasets"] == ["alice/text"]
    ordinary = published.folder / "out" / "ordinary"
    assert not list(ordinary.glob("*.py")) and "auto_map" not in (ordinary / "config.json").read_text()


def test_trainer_gets_the_callback_when_it_is_imported_later(published: Published) -> None:
    """`publish.py` imports it first. Here the callbacks of the package import it, and somebody has looked for it."""
    code = """
import sys, modeling_deepseekmoe
modeling_deepseekmoe.DeepseekMoeConfig(num_hidden_layers=1)
import importlib.util
assert importlib.util.find_spec("transformers.trainer") and "transformers.trainer" not in sys.modules
modeling_deepseekmoe.register(override_native=True)
modeling_deepseekmoe.DeepseekMoeConfig(num_hidden_layers=1)
from modeling_deepseekmoe import RouterStatsCallback
from transformers import Trainer
modeling_deepseekmoe.register()
modeling_deepseekmoe.DeepseekMoeConfig(num_hidden_layers=1)
from modeling_deepseekmoe.hub.callbacks import RemoteCodeCallback
from modeling_deepseekmoe import LoadBalancingCallback
assert sys.modules["transformers.trainer"].DEFAULT_CALLBACKS.count(RemoteCodeCallback) == 1
assert not any("OnImport" in type(finder).__name__ for finder in sys.meta_path)
"""
    published.python("-c", code)


# --------------------------------------------------------------------------------------------------------------- cards
def snippets(card: str) -> list[tuple[str, str]]:
    """Language and content of the pieces of code in a card."""
    return [(token.info, token.content) for token in MarkdownIt().parse(card) if token.type == "fence"]


def test_every_snippet_runs(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, package, commands = [], [], []
    for name in (*CARRIED[:2], "trained", "v3", "lora"):
        found = snippets(published.card(name))
        assert len(found) == 2
        for language, code in found:
            kind = commands if language == "bash" else package if "modeling_deepseekmoe" in code else remote
            kind.append(code)
    assert len(remote) == 4 and len(package) == 5 and len(commands) == 1
    assert sum("trust_remote_code=True" in code for code in remote) == 3
    printed = published.python("-c", _one_after_the_other(remote), package=False, home="bare")
    assert printed.count("The") == 3  # of those that have a tokenizer
    printed = published.python("-c", _one_after_the_other(package), home="with")
    assert printed.count("The") == 4
    for number, command in enumerate(commands):
        program, *arguments = shlex.split(command)
        assert program == "deepseekmoe" and arguments[-1] == "merged"
        arguments[-1] = str(published.folder / f"merged-{number}")
        printed = published.python("-m", "modeling_deepseekmoe.cli", *arguments, home="with")
        assert (published.folder / f"merged-{number}" / "config.json").is_file()


def _one_after_the_other(codes: list[str]) -> str:
    """Snippets in one process, each with variables of its own."""
    return f"for code in {codes!r}:\n    exec(code, {{}})\n"


def test_cards_render_and_their_metadata_is_valid(published: Published) -> None:
    for name in (*CARRIED[:2], "trained", "v3", "lora"):
        card = published.card(name)
        metadata = yaml.safe_load(card.split("---")[1])
        assert not metadata_problems(metadata)
        assert metadata["pipeline_tag"] == "text-generation" and "mixture-of-experts" in metadata["tags"]
        assert metadata["library_name"] == ("peft" if name == "lora" else "transformers")
        assert ("custom_code" in metadata["tags"]) == (name in CARRIED)
        body = card.split("---\n", 2)[2]
        page = MarkdownIt("commonmark").enable("table").render(body)
        headings = [line[4:-5] for line in page.splitlines() if line.startswith("<h2>")]
        expected = ["Use", "Architecture", "Parameters", *(["Training"] if name == "trained" else []), "Sources"]
        assert headings == ([*expected[:2], "Sources"] if name == "lora" else expected)
        assert page.count("<h1>") == 1 and page.count("<table>") == len(headings) - 2
        assert "{{" not in page and "None" not in page and "|" not in page.replace("||", "")
    assert yaml.safe_load(published.card("lora").split("---")[1])["base_model"] == "alice/ours"


# --------------------------------------------------------------------------------------------------------------- token
def test_the_token_is_nowhere(published: Published) -> None:
    """Not in what was printed, logged at the highest level included, nor in any file: those on the Hub, the trainer's,
    the caches."""
    model = str(published.folder / "out" / "v1")
    code = f"""
import traceback
from modeling_deepseekmoe.cli.app import app
from modeling_deepseekmoe.hub.plan import plan_push
from modeling_deepseekmoe.hub.push import upload
from modeling_deepseekmoe.hub.card import CardFacts
for repo, succeeds in (("alice/again", True), ("bob/theirs", False), ("alice/ours", False)):
    try:
        app(["push", {model!r}, repo, "--license", "mit"], standalone_mode=False)
        assert succeeds
    except BaseException:
        traceback.print_exc()
        assert not succeeds
    try:
        upload(plan_push({model!r}, repo, facts=CardFacts(license="mit")))
    except Exception as error:
        traceback.print_exc()
        print(repr(error), vars(error), error.__cause__ and vars(error.__cause__))
"""
    levels = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    published.python("-c", code, HF_TOKEN=WRITER, **levels)
    assert "curl -X POST" in published.printed[-1] and "PermissionError" in published.printed[-1]
    assert published.server.files("alice/again") and published.server.authorized
    assert not any(WRITER in text for text in published.printed)
    files = [path for path in published.folder.rglob("*") if path.is_file() and "packages" not in path.parts]
    assert len(files) > 100
    assert not [path for path in files if WRITER.encode() in path.read_bytes()]


def test_help() -> None:
    code, output = run("push", "--help")
    assert code == 0 and "--overwrite-card" in output and "--dry-run" in output


LOAD_OLD = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("alice/old", trust_remote_code=True).eval()
ids = torch.arange(2, 14)[None]
settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
texts = [model.generate(ids, use_cache=cached, **settings) for cached in (True, False)]
print("equal", torch.equal(*texts), texts[0].shape[1], type(model).__module__.split(".")[0])
"""
PUSH_OLD = """
import sys
from pathlib import Path
from zipfile import ZipFile
from modeling_deepseekmoe.hub import plan, push
from modeling_deepseekmoe.hub.card import CardFacts
folder = Path(sys.argv[1])
plan.code_files = lambda: {path.name: path for path in folder.iterdir()}
push.upload(plan.plan_push(sys.argv[2], "alice/old", facts=CardFacts(license="mit")))
"""


@pytest.mark.slow
def test_a_repository_of_0_8_0_becomes_right_by_its_code_alone(published: Published) -> None:
    """Its code knows one name of the cache alone. One commit brings this version's, and nothing else."""
    with ZipFile(DATA / "code-0.8.0.zip") as archive:
        archive.extractall(published.folder / "old")
        old_code = set(archive.namelist())
    published.python("-c", PUSH_OLD, published.folder / "old", DATA / "golden" / "v1-mha", HF_TOKEN=WRITER)
    before = published.server.files("alice/old")
    assert {name for name in before if name.endswith(".py")} == old_code
    was_right = cache_name() != "cache"
    said = published.python("-c", LOAD_OLD, package=False, home="bare")
    assert f"equal {was_right} 20 transformers_modules" in said

    def push_code(*options: str) -> str:
        command = "from modeling_deepseekmoe.cli.app import main; main()"
        return published.python("-c", command, "push", "--code-only", "alice/old", *options, HF_TOKEN=WRITER)

    replaces = f"replaces the code of 0.8.0 by that of {CODE_VERSION}"
    assert replaces in push_code("--dry-run")
    assert published.server.files("alice/old") == before
    assert replaces in push_code()
    after = published.server.files("alice/old")
    assert {name for name in after if after[name] != before.get(name)} <= CODE
    assert after.keys() == (before.keys() - old_code) | CODE
    assert all(after[name] == code_files()[name].read_bytes() for name in CODE)
    titles = [commit["title"] for commit in published.server.history("alice/old")]
    assert titles == [f"Upload code of modeling-deepseekmoe {CODE_VERSION}", "Upload model", "initial commit"]
    assert f"the code is that of {CODE_VERSION} already" in push_code()
    assert len(published.server.history("alice/old")) == len(titles)
    assert "equal True 20 transformers_modules" in published.python("-c", LOAD_OLD, package=False, home="bare")
