"""Runs made of models from elsewhere, and what the commands say about them."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import lumiere
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError
from lumiere.importing import source as sources
from lumiere.importing.importing import import_model
from lumiere.importing.verification import TOLERANCE, verify
from lumiere.persistence.runs import Run, RunStore
from tests.cli.commands import invoke, read_json, refuse, stdout_of
from tests.data.foreign import byte_level, sentencepiece
from tests.importing.test_huggingface import LLAMA, save

SIZES = LLAMA | {"vocab_size": 520, "max_position_embeddings": 600, "hidden_size": 16, "intermediate_size": 24}


def folder_of(path: Path, **changes: Any) -> Path:
    """A small random Llama with a tokenizer of 500 tokens and 520 rows."""
    save("Llama", SIZES | changes, path)
    sentencepiece().save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "add_bos_token": True, "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return import_model(str(folder), RunStore(tmp_path_factory.mktemp("runs")))


@pytest.fixture
def runs_dir(imported: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(imported.path.parent))


def test_the_record_says_where_it_is_from(imported: Run, folder: Path) -> None:
    import hashlib

    source = imported.record.source
    assert imported.status == "imported"
    assert source["path"] == str(folder)
    weights = (folder / "model.safetensors").read_bytes()
    assert source["files"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert source["verified"]
    assert source["error"] < TOLERANCE


def test_the_run_computes_what_transformers_does(imported: Run, folder: Path) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    tokens = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(imported.load_model().logits(tokens), expected, atol=1e-4, rtol=1e-4)


def test_padding_is_no_token_of_the_model(imported: Run) -> None:
    """Id 2 is `</s>` here."""
    model, tokens = imported.load_model(), torch.tensor([[1, 2, 40, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, model.logits(tokens))


def test_the_tokenizer_and_its_chat_template_stay(imported: Run, folder: Path) -> None:
    assert (imported.path / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    tokenizer = imported.load_tokenizer()
    assert (tokenizer.start_id, tokenizer.end_ids) == (1, (2,))
    settings = json.loads((imported.path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}"


@pytest.mark.usefixtures("runs_dir")
def test_generation_is_that_of_transformers(folder: Path, imported: Run) -> None:
    tokenizer = imported.load_tokenizer()
    prompt = tokenizer.encode("Once upon a time", start=True)
    theirs: Any = transformers.LlamaForCausalLM.from_pretrained(folder)
    unused = [token for token in range(520) if token not in tokenizer.text_ids and token != 2]
    options: dict[str, Any] = {"do_sample": False, "suppress_tokens": unused, "eos_token_id": 2, "pad_token_id": 0}
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, **options)[0, len(prompt) :].tolist()
    command = ("generate", "--prompt", "Once upon a time", "--greedy", "--max-new-tokens", "12", "--logprobs", "0")
    [found] = read_json(*command)
    assert [token["id"] for token in found["tokens"]] == [token for token in expected if token != 2]


@pytest.mark.usefixtures("runs_dir")
@pytest.mark.parametrize("analysis", ["attention", "lens", "logits", "tokens", "heads", "ablate", "cache"])
def test_analyses_of_a_prompt(analysis: str) -> None:
    found = read_json("inspect", analysis, "--prompt", "Once upon a time")
    assert all(receipt["holds"] for receipt in found["receipts"])


@pytest.mark.usefixtures("runs_dir")
def test_random_tokens_are_those_of_the_tokenizer(imported: Run) -> None:
    found = read_json("inspect", "heads")
    tokenizer = imported.load_tokenizer()
    assert {token for row in found["tokens"] for token in row[1:]} <= set(tokenizer.text_ids)
    assert {row[0] for row in found["tokens"]} == {1}
    assert found["num_averaged"] == len(tokenizer.text_ids)


@pytest.mark.usefixtures("runs_dir")
def test_evaluation_of_a_text(tmp_path: Path, imported: Run) -> None:
    """In windows of 512 tokens unless told: the mean loss by a full forward pass."""
    (tmp_path / "text.txt").write_text("Once upon a time, Mia ran. " * 8)
    found = read_json("eval", "latest", "--text", str(tmp_path / "text.txt"))
    ids = imported.load_tokenizer().encode((tmp_path / "text.txt").read_text(), start=True)
    tokens = torch.tensor([*ids, 2])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(imported.load_model().logits(tokens[None, :-1])[0], tokens[1:])
    assert found["loss"] == pytest.approx(losses.item(), rel=1e-5)
    assert found["context_size"] == 512
    shorter = read_json("eval", "latest", "--text", str(tmp_path / "text.txt"), "--context-size", "20")
    assert shorter["context_size"] == 20


def test_rows_without_a_token_have_no_rank(tmp_path: Path) -> None:
    """Although the model finds one of them the most probable."""
    folder = folder_of(tmp_path / "source")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["lm_head.weight"][510] = 100 * weights["lm_head.weight"][40]
    weights["lm_head.weight"][511] = -weights["lm_head.weight"][510]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    run = import_model(str(folder), RunStore(tmp_path / "runs"), verified=False)
    found = read_json("inspect", "tokens", "--prompt", "Once upon a time", "--runs-dir", str(tmp_path / "runs"))
    lens = read_json("inspect", "lens", "--prompt", "Once upon a time", "--runs-dir", str(tmp_path / "runs"))
    tokens = torch.tensor([found["tokens"]])
    with torch.no_grad():
        logits = run.load_model().logits(tokens)[0, :-1]
    is_above = logits > logits.gather(1, tokens[0, 1:, None])
    assert found["ranks"] == is_above[:, :500].sum(1).tolist()
    assert lens["target_ranks"][-1][:-1] == found["ranks"]
    assert is_above[:, 500:].any(1).all()


@pytest.mark.usefixtures("runs_dir")
def test_the_report_and_the_other_commands(tmp_path: Path, imported: Run) -> None:
    invoke("inspect", "report", "--prompt", "Once upon a time", "--output", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert imported.id in stdout_of("runs", "ls", "--status", "imported")
    assert "imported" in stdout_of("runs", "show", imported.id)
    assert sum(read_json("inspect", "summary")["parameters"].values()) == imported.record.num_parameters


@pytest.mark.usefixtures("runs_dir")
@pytest.mark.parametrize(
    "command",
    [
        ("train", "--resume", "latest"),
        ("eval", "latest"),
        ("inspect", "dynamics"),
        ("inspect", "attention"),
        ("runs", "card", "latest"),
        ("inspect", "attention", "--prompt", "word " * 530),
    ],
)
def test_what_needs_a_training_is_refused(command: tuple[str, ...]) -> None:
    refuse(*command)


def test_a_smaller_context(folder: Path, tmp_path: Path) -> None:
    run = import_model(str(folder), RunStore(tmp_path), context_size=30, verified=False)
    assert run.load_model().context_size == 30
    assert not run.record.source["verified"]
    with pytest.raises(LumiereError):
        import_model(str(folder), RunStore(tmp_path), context_size=601, verified=False)


@pytest.mark.slow
def test_a_run_trained_from_it(folder: Path, tmp_path: Path) -> None:
    """It has the tokenizer and the weights, which are not those of an untrained model, a corpus and snapshots."""
    runs = ("--runs-dir", str(tmp_path / "runs"))
    invoke("import", str(folder), "--name", "toy", "--context-size", "40", "--no-verify", *runs)
    (tmp_path / "more.yaml").write_text(
        "dataset: {num_documents: 10, validation_fraction: 0.2}\n"
        "training: {max_steps: 4, warmup_steps: 1, batch_size: 4, learning_rate: 1.0e-3}\n"
    )
    invoke("train", str(tmp_path / "more.yaml"), "--from", "toy", *runs)
    run, parent = RunStore(tmp_path / "runs").open("latest"), RunStore(tmp_path / "runs").open("toy")
    assert run.load_tokenizer().fingerprint == parent.load_tokenizer().fingerprint
    first, before = run.load_model("0").state_dict(), parent.load_model().state_dict()
    assert all(torch.equal(first[name], weight) for name, weight in before.items())
    assert read_json("eval", "latest", *runs)["loss"] > 0
    followed = read_json("inspect", "dynamics", "--metric", "validation-loss", "--metric", "induction", *runs)
    assert followed["steps"][0] == 0
    assert all(receipt["holds"] for receipt in followed["receipts"])
    assert read_json("inspect", "heads", *runs)["num_averaged"] < len(run.load_tokenizer().text_ids)


@pytest.mark.usefixtures("runs_dir")
def test_exported_again_it_is_the_source(folder: Path, tmp_path: Path) -> None:
    invoke("export", "latest", str(tmp_path / "out"), "--to", "hf")
    theirs, ours = (safetensors.torch.load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    tokenizers: Any = [transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out")]
    assert tokenizers[0]("Once upon a time").input_ids == tokenizers[1]("Once upon a time").input_ids
    assert tokenizers[1].chat_template == "{{ messages }}"


def test_an_export_of_the_model_card_can_be_imported(trained_run: Run, tmp_path: Path) -> None:
    """Its architecture has no class in `transformers`."""
    runs = trained_run.path.parent
    invoke("export", trained_run.id, str(tmp_path / "out"), "--to", "hf", "--runs-dir", str(runs))
    run = import_model(str(tmp_path / "out"), RunStore(tmp_path / "runs"))
    assert not run.record.source["verified"]
    ours, theirs = run.load_model().state_dict(), trained_run.load_model().state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    texts = "Once upon a time", "</s> <|sot|> é"
    tokenizers = run.load_tokenizer(), trained_run.load_tokenizer()
    assert [tokenizers[0].encode(text, start=True) for text in texts] == [
        tokenizers[1].encode(text, start=True) for text in texts
    ]


def test_from_python(folder: Path, tmp_path: Path) -> None:
    run = lumiere.import_model(folder, name="mine", runs_dir=tmp_path, verify=False)
    assert lumiere.open("mine", runs_dir=tmp_path).name == run.name
    assert run.inspect.attention("Once upon a time").result.holds
    with pytest.raises(LumiereError):
        lumiere.import_model(folder, name="no tag", runs_dir=tmp_path)
    assert len(list(tmp_path.glob("run_*"))) == 1


def test_learned_positions_are_cut(tmp_path: Path) -> None:
    sizes = {"vocab_size": 400, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    theirs = save("GPT2", sizes, tmp_path / "gpt2")
    byte_level().save(str(tmp_path / "gpt2/tokenizer.json"))
    run = import_model(str(tmp_path / "gpt2"), RunStore(tmp_path / "runs"), context_size=8)
    tokens = torch.arange(10, 18)[None]
    with torch.no_grad():
        torch.testing.assert_close(run.load_model().logits(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_another_computation_is_refused(folder: Path) -> None:
    found = sources.open_source(str(folder))
    found.model.blocks[1].attention.value.weight.data[0] += 0.01
    assert found.reference is not None
    with pytest.raises(LumiereError):
        verify(found.model, found.reference, found.tokenizer.text_ids)


def break_tokenizer(folder: Path) -> None:
    contents = json.loads((folder / "tokenizer.json").read_text())
    contents["added_tokens"].append(contents["added_tokens"][0] | {"id": 520, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(contents))


BREAKS = {
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a token without a row": break_tokenizer,
    "a link out of the folder": lambda folder: (
        (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
        and (folder / "model.safetensors").symlink_to(folder.parent / "x.safetensors")
    ),
    "an unknown start token": lambda folder: (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<b>", "add_bos_token": true}'
    ),
    "settings that are no mapping": lambda folder: (folder / "generation_config.json").write_text("[1]"),
    "truncated weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-5]
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_bad_sources_leave_no_run(name: str, folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "source")
    BREAKS[name](tmp_path / "source")
    runs = tmp_path / "runs"
    if name == "settings that are no mapping":
        invoke("import", str(tmp_path / "source"), "--no-verify", "--runs-dir", str(runs))
        return
    refuse("import", str(tmp_path / "source"), "--no-verify", "--runs-dir", str(runs))
    assert not list(runs.glob("run_*"))


@pytest.mark.parametrize("source", ["nowhere", "./nowhere/at/all", "model.bin"])
def test_a_missing_source(source: str, tmp_path: Path) -> None:
    refuse("import", source, "--runs-dir", str(tmp_path))


def test_the_hub_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumiere.data.hub.hub_reachable", lambda: False)
    refuse("import", "someone/model", "--runs-dir", str(tmp_path))


def test_only_plain_files_of_a_commit_are_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's cache links into its own `blobs`."""
    commit = tmp_path / "models--a--b/snapshots/0123abc"
    blobs = tmp_path / "models--a--b/blobs"
    commit.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (commit / path.name).symlink_to(Path("../../blobs") / path.name)
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("lumiere.data.hub.hub_reachable", lambda: True)
    run = import_model("a/b", RunStore(tmp_path / "runs"), revision="main", verified=False)
    assert run.record.source["commit"] == "0123abc"
    assert (asked["name"], asked["revision"]) == ("a/b", "main")
    assert not any(pattern.endswith(("py", "bin", "pt", "*")) for pattern in asked["allow_patterns"])


def test_own_tokenizers_are_told_from_others(imported: Run, trained_run: Run) -> None:
    assert type(trained_run.load_tokenizer()) is Tokenizer
    assert type(imported.load_tokenizer()) is not Tokenizer
