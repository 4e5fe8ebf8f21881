"""`lumiere eval` on trained runs: what it prints, keeps, compares, and gives to scripts."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere.data.dataset import TokenizedCorpus, tokenize_corpus
from lumiere.data.tokenizer import EOT, SOT
from lumiere.files import locked
from lumiere.persistence.catalog import disk_bytes
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.notes import MAX_FILES, evaluation_name, read_evaluations, save_evaluation
from lumiere.persistence.runs import Run
from tests.checkpoints import folder_of
from tests.cli.commands import invoke, read_json, refuse, stdout_of
from tests.cli.test_runs import key_paths

OTHER = "run_zzzzzzzz_20990101_000000"


@pytest.fixture
def early(run: Run) -> Run:
    """The same with the weights of the beginning."""
    early = Run(Path(shutil.copytree(run.path, Path("runs") / OTHER)))
    shutil.rmtree(folder_of(early, "best"))
    shutil.copytree(folder_of(early, "step-00000000"), folder_of(early, "best"))
    return early


def test_it_prints_what_it_gives_to_scripts(run: Run) -> None:
    found, printed = read_json("eval", run.id), stdout_of("eval", run.id)
    assert found["accuracy"] < found["accuracy_at_5"]
    assert found["byte_perplexity"] == pytest.approx(2 ** found["bits_per_byte"])
    for value in ("loss", "bits_per_byte"):
        assert f"{found[value]:.4f} ± {found['standard_errors'][value]:.4f}" in printed
    assert f"stories validation ({found['corpus_sha256'][:8]}): {found['documents']} documents" in printed
    assert "windows of 16 tokens that overlap by 4, as in training\ntokens in an overlap are scored twice" in printed
    names = [baseline["name"] for baseline in found["baselines"]]
    assert names == ["uniform", "unigram", "bigram", "kneser-ney 5-gram"]
    assert found["baselines"][0]["perplexity"] == pytest.approx(320)
    for baseline in found["baselines"]:
        assert f"{baseline['loss']:.4f}" in printed
    assert read_json("eval", run.id, "--no-baselines")["baselines"] is None


def test_the_averages_over_batches_are_those_that_the_training_kept(run: Run) -> None:
    kept, found = run.record.best_evaluation, read_json("eval", run.id, "--no-baselines")
    assert found["batch_size"] == kept["batch_size"] == run.load_config().training.batch_size != 32
    for name in ("mean_batch_loss", "mean_batch_perplexity"):
        assert found[name] == pytest.approx(kept[name], rel=1e-6)
    assert read_json("eval", run.id, "--no-baselines", "--batch-size", "32")["batch_size"] == 32


def test_strided_counts_each_token_once_and_says_so(run: Run, tiny_corpus: TokenizedCorpus) -> None:
    twice, once = read_json("eval", run.id), read_json("eval", run.id, "--stride", "8")
    assert once["num_tokens"] == tiny_corpus.splits["validation"].facts.num_targets < twice["num_tokens"]
    assert (twice["protocol"], once["protocol"], once["stride"]) == ("windows", "stride-8", 8)
    printed = stdout_of("eval", run.id, "--stride", "8")
    assert (
        "strided: windows of 16 tokens, each 8 after the one before\neach token is scored once, with at least 9"
        in printed
    )
    assert "the card's loss" not in printed, "which is over other tokens"


def test_a_text_from_stdin_is_that_of_a_file_whatever_its_line_ends(run: Run) -> None:
    text = "Once upon a time there was a fox.\r\nIt sang: é.\n"
    plain = text.replace("\r\n", "\n")
    Path("text.txt").write_bytes(text.encode())
    from_file = read_json("eval", run.id, "--text", "text.txt")
    assert from_file["corpus"] == "text.txt"
    assert from_file["num_bytes"] == len(plain.encode()), "line ends count as the model sees them"
    assert from_file["standard_errors"] is None, "one document"
    for data in (text, plain, plain.replace("\n", "\r"), "\ufeff" + plain):
        from_stdin = read_json("eval", run.id, "--text", "-", text=data.encode())
        assert from_stdin | {"seconds": 0} == from_file | {"corpus": "stdin", "seconds": 0}


def test_bits_per_byte_count_the_bytes_that_the_model_predicts(run: Run) -> None:
    text = "Once upon a time there was a fox."
    wide = "".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in text)
    plain, normalized = (read_json("eval", run.id, "--text", "-", text=data.encode()) for data in (text, wide))
    assert normalized["loss"] == plain["loss"], "the same tokens"
    assert normalized["bits_per_byte"] == plain["bits_per_byte"]
    assert (plain["num_bytes"], plain["num_normalized_bytes"], plain["normalized_share"]) == (33, 33, 0)
    # 26 letters and signs of three bytes, and 7 spaces.
    assert (normalized["num_bytes"], normalized["num_normalized_bytes"]) == (26 * 3 + 7, 33)
    assert normalized["normalized_share"] == 78 / 85
    assert "91.76%" in stdout_of("eval", run.id, "--text", "-", text=wide.encode())
    assert "normalization" not in stdout_of("eval", run.id, "--text", "-", text=text.encode())


def test_a_text_needs_no_corpus_but_for_the_baselines(run: Run) -> None:
    run.update(corpus_sha256="another")
    Path("text.txt").write_text("Once upon a time there was a fox.")
    result = invoke("eval", run.id, "--text", "text.txt", "--json")
    found = json.loads(result.stdout)
    assert math.isfinite(found["loss"])
    assert found["baselines"] is found["by_frequency"] is None
    assert "skipping baselines" in result.stderr


def test_a_dataset_is_scored_in_the_tokens_of_the_model(run: Run) -> None:
    Path("data").mkdir()
    texts = ["The owl sang.", "Once upon a time."]
    for split in ("train", "validation"):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (Path("data") / f"{split}.jsonl").write_text("".join(lines))
    found = read_json("eval", run.id, "--dataset", "data", "--split", "train")
    assert (found["corpus"], found["documents"]) == ("data train", 2)
    assert found["num_bytes"] == sum(map(len, texts))
    nats = 0.0
    for number, text in enumerate(texts):
        alone = read_json("eval", run.id, "--text", "-", text=text)
        assert alone["loss"] == pytest.approx(found["by_document"]["losses"][number], rel=1e-6)
        nats += alone["loss"] * alone["num_tokens"]
    assert found["loss"] == pytest.approx(nats / found["num_tokens"], rel=1e-6)


def test_runs_are_compared_document_by_document(run: Run, early: Run) -> None:
    compared = read_json("eval", run.id, early.id, run.name)
    assert [one["run"] for one in compared["runs"]] == [run.name, early.name], "each once"
    (difference,) = compared["differences"]
    assert (difference["run"], difference["less"]) == (early.name, run.name)
    trained, untrained = compared["runs"]
    for figure in ("loss", "bits_per_byte"):
        paired = difference[figure]
        assert paired["difference"] == pytest.approx(untrained[figure] - trained[figure])
        assert 0 < paired["low"] <= paired["difference"] <= paired["high"], "it has learned something"
        assert (paired["num_documents"], paired["num_lower"]) == (trained["documents"], 0)
    printed = stdout_of("eval", run.id, early.id, "-o", "eval.svg")
    drawn = Path("eval.svg").read_text(encoding="utf-8")
    for text in (f"{run.id}, best", f"{early.id}, best", "stories validation (", "windows of 16 tokens, each 13 after"):
        assert text in drawn
    paired = difference["bits_per_byte"]
    assert f"{early.id} - {run.id}" in printed
    assert f"{paired['difference']:+.4f}  {paired['low']:+.4f} to {paired['high']:+.4f}  0 of 2 documents" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_runs_with_other_windows_are_compared_by_bytes(run: Run, early: Run) -> None:
    config = early.config_path.read_text()
    early.config_path.write_text(config.replace("sliding_window_size: 4", "sliding_window_size: 0"))
    compared = read_json("eval", run.id, early.id)
    assert [one["tokens_scored"] for one in compared["runs"]] == [
        "tokens in an overlap are scored twice",
        "the first token of a window is not scored",
    ]
    assert "loss" not in compared["differences"][0]
    printed = stdout_of("eval", run.id, early.id, "-o", "eval.svg")
    assert "the windows differ" in printed
    assert [*re.findall("16, [0-9]+ apart", printed)] == ["16, 13 apart", "16, 17 apart"]
    assert "windows of" not in Path("eval.svg").read_text(encoding="utf-8")


def test_other_tokenizers_compare_by_bits_per_byte(run: Run, other_tokenizer_run: Run) -> None:
    """Losses in bits over all windows of a text, each token once, over its bytes: by hand, for both."""
    shutil.copytree(other_tokenizer_run.path, Path("runs") / other_tokenizer_run.name)
    text = "Once upon a time there was a small dog. The dog sang, and é was glad.\n"
    compared = read_json("eval", run.id, other_tokenizer_run.id, "--text", "-", "--stride", "16", text=text)
    for one, each in zip(compared["runs"], (run, other_tokenizer_run), strict=True):
        model, tokenizer = each.load_model("best"), each.load_tokenizer()
        ids = torch.tensor([SOT, *tokenizer.encode(text), EOT])
        nats = 0.0
        for first in range(0, len(ids) - 1, model.context_size):
            window = ids[first : first + model.context_size + 1]
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        assert one["num_tokens"] == len(ids) - 1
        assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    first, second = compared["runs"]
    assert first["num_tokens"] < second["num_tokens"], "the smaller vocabulary needs more tokens"
    compared = read_json("eval", run.id, other_tokenizer_run.id)
    (first, second), (difference,) = compared["runs"], compared["differences"]
    assert "loss" not in difference, "over other tokens"
    expected = second["bits_per_byte"] - first["bits_per_byte"]
    assert difference["bits_per_byte"]["difference"] == pytest.approx(expected)
    assert "the tokenizers differ" in stdout_of("eval", run.id, other_tokenizer_run.id)


def test_runs_with_other_texts_are_not_compared(run: Run, early: Run) -> None:
    early.config_path.write_text(early.config_path.read_text().replace("num_documents: 10", "num_documents: 20"))
    early.update(corpus_sha256=tokenize_corpus(early.load_config()).fingerprint)
    assert f"differs between run {early.id} and run {run.id}" in refuse("eval", run.id, early.id, after_notes=True)[0]
    assert not (run.path / "eval").exists(), "nothing is kept of half a comparison"


def test_it_is_kept_with_the_run_and_shown(run: Run) -> None:
    before = disk_bytes(run.path)
    found = read_json("eval", run.id)
    invoke("eval", run.id)  # the same question: the same file
    read_json("eval", run.id, "--stride", "4")
    paths = sorted((run.path / "eval").iterdir())
    hashed = found["corpus_sha256"][:8]
    names = [f"best-stories-validation-{hashed}-stride-4.json", f"best-stories-validation-{hashed}-windows.json"]
    assert [path.name for path in paths] == names
    kept = json.loads(paths[1].read_text())
    assert kept | {"seconds": 0} == found | {"seconds": 0}
    assert disk_bytes(run.path) == before + sum(path.stat().st_size for path in paths)
    shown = read_json("runs", "show", run.id)["evaluations"]
    assert [one["name"] + ".json" for one in shown] == names
    assert shown[1]["figures"]["loss"] == found["loss"]
    printed = stdout_of("runs", "show", run.id)
    assert f"on stories validation, windows: loss {found['loss']:.4f}, bits per byte" in printed
    invoke("runs", "rm", run.id, "--yes")
    assert not run.path.exists()


def test_a_run_that_is_being_trained_can_be_evaluated(run: Run) -> None:
    run.update(status="running")
    with locked(run.path):
        found = read_json("eval", run.id)
        assert run.status == "running"
    assert found["loss"] == pytest.approx(run.record.best_loss, abs=1e-6)


def test_a_checkpoint_that_is_replaced_meanwhile_is_scored_as_it_was(
    run: Run, early: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = CheckpointManager.load

    def load_and_replace(*arguments: Any, **options: Any) -> Any:
        loaded = load(*arguments, **options)
        shutil.copytree(folder_of(early, "best"), folder_of(run, "best"), dirs_exist_ok=True)
        return loaded

    monkeypatch.setattr(CheckpointManager, "load", load_and_replace)
    found = read_json("eval", run.id)
    assert found["step"] == run.record.best_step
    assert found["loss"] == pytest.approx(run.record.best_loss, abs=1e-6)


def test_an_evaluation_that_cannot_be_kept_is_given_all_the_same(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run.path / "eval").symlink_to(tmp_path / "elsewhere")
    result = invoke("eval", run.id, "--json")
    assert "loss" in json.loads(result.stdout)
    assert "not saved: " in result.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_damaged_evaluations_are_named_and_harm_nothing(run: Run) -> None:
    save_evaluation(run, "a", {"loss": "\x1b", "step": [], "corpus": "\x1b[2J", "accuracy": 1.5})
    (run.path / "eval" / "b.json").write_bytes(b"\xff")
    (run.path / "eval" / "c.json").write_text("[]")
    (run.path / "eval" / "d.json").mkdir()
    (run.path / "eval" / "e.txt").write_text("not ours")
    first, *others = read_evaluations(run)
    assert first.problem is None
    figures = first.figures or {}
    assert (figures["loss"], first.step, figures["accuracy"]) == (None, None, 1.5)
    assert [(kept.name, kept.problem is None) for kept in others] == [("b", False), ("c", False), ("d", False)]
    printed = stdout_of("runs", "show", run.id)
    assert printed.count("damaged: ") == 3
    assert printed.replace("\n", "").isprintable()


def test_names_never_leave_the_folder(run: Run) -> None:
    assert evaluation_name("best", "../../x y/é\x1b", "0123456789", "windows") == "best-text-01234567-windows"
    for name in ("../a", ".a", "", "a/b"):
        with pytest.raises(ValueError, match="for an evaluation"):
            save_evaluation(run, name, {})
    for number in range(MAX_FILES + 5):
        (run.path / "eval").mkdir(exist_ok=True)
        (run.path / "eval" / f"{number}.json").touch()
    assert len(read_evaluations(run)) == MAX_FILES


def test_the_keys_of_the_json_are_a_promise(run: Run, early: Run, golden: Callable[[str, str], str]) -> None:
    one, several = read_json("eval", run.id), read_json("eval", run.id, early.id)
    lines = [f"eval {path}" for path in sorted(key_paths(one))]
    lines += [f"eval RUN RUN {path}" for path in sorted(key_paths(several)) if not path.startswith(".runs[]")]
    computed = "\n".join(lines) + "\n"
    assert {path for path in key_paths(several) if path.startswith(".runs[]")} == {
        f".runs[]{path}" for path in key_paths(one)
    }
    assert computed == golden("eval_keys.txt", computed)
