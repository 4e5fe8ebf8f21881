"""Whatever the user gets wrong: two lines on stderr, exit code 2, and nothing made."""

import os
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from lumiere.persistence.runs import Run
from lumiere.training import loggers
from tests.cli.commands import refuse


@pytest.fixture
def files() -> None:
    """Configs, corpora and texts in the current folder, each with one thing wrong."""
    for name, content in {
        "empty.txt": b"\n  \n",
        "book.txt": b"A short book.\n",
        "latin.txt": b"one\r\ncaf\xe9",
        "card.md": b"mine",
        "data.yaml": b"dataset: {num_documents: 10}",
        "blank.txt": b"\n \n",
        "bad.jsonl": b'{"prompt": "a"}\n{"prompt":\n',
        "keys.jsonl": b'{"text": "a"}\n',
        "empty.jsonl": b'{"prompt": ""}\n',
    }.items():
        Path(name).write_bytes(content)
    Dataset.from_dict({"body": ["some text"]}).to_parquet("no-text-column.parquet")
    Dataset.from_dict({"text": [1, 2]}).to_parquet("numbers.parquet")
    Dataset.from_dict({"text": ["some text"]}).to_parquet(Path("corpus") / "one" / "train.parquet")
    (Path("corpus") / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*.parquet\n"
        "- config_name: two\n  data_files: one/*.parquet\n---\n"
    )


SETTINGS = [
    ("model.num_head=4", "unknown key model.num_head", "did you mean"),
    ("tokenizer.vocab_size=3", "tokenizer.vocab_size", ""),
    ("dataset.name=./no-such-folder", "'./no-such-folder'", ""),
    ("dataset.name=nobody/nothing", "'nobody/nothing' is not on this machine", ""),
    ("dataset={name: text, data_files: none.txt}", "'none.txt'", ""),
    ("dataset={name: text}", "needs dataset.data_files", ""),
    ("dataset={name: text, data_files: empty.txt}", "holds no text", ""),
    ("dataset={name: text, data_files: {test: book.txt}}", "has no split 'train'", ""),
    ("dataset={name: parquet, data_files: no-text-column.parquet}", "no column 'text', it has body", ""),
    ("dataset={name: parquet, data_files: numbers.parquet}", "'text' holds int64", ""),
    ("dataset={name: ./corpus}", "has several subsets", ""),
    ("dataset={name: corpus, subset: ome}", "'corpus' has no subset 'ome', it has one, two", "dataset.subset=one"),
    ("model.rotary_scaling={type: yarn, factor: 2}", "model.rotary_scaling.type", ""),
    ("model.rotary_scaling={type: linear, factr: 2}", "model.rotary_scaling.factr", "factor"),
    ("training={loss_positions: last, random_window_offset: true}", "training.random_window_offset", ""),
    ("training.loggers=tensorbord", "got 'tensorbord'", "did you mean tensorboard?"),
    ("training.freeze=[embedings]", "no part 'embedings'", "did you mean embeddings?"),
    ("training.freeze=blocks.9", "no 'blocks.9'", "0-1"),
    ("training.freeze=[blocks, embeddings, positions, final_norm]", "no parameter to train", ""),
    ("training.freeze={a: b}", "training.freeze must be a list", ""),
    ("training.loggers=[wandb, wadb]", "got 'wadb'", "did you mean wandb?"),
    (f"training.device=cuda:{torch.cuda.device_count()}", f"'cuda:{torch.cuda.device_count()}'", "cpu"),
]
TRAINING = [
    *((("tiny", "--set", setting), error, hint) for setting, error, hint in SETTINGS),
    (("none.yaml",), "no config 'none.yaml'", ""),
    ((), "no config given", ""),
    (("tiny", "--resume", "latest"), "keeps its own config", ""),
    (("--resume", "latest", "--print-config"), "keeps its own config", ""),
    (("--plan", "--resume", "latest"), "--plan and --resume", "lumiere runs show latest"),
    (("tiny", "--plan", "--resume", "latest", "--print-config"), "--plan and --resume", ""),
    (("tiny", "--plan", "--print-config"), "--plan and --print-config", ""),
    (("--plan",), "no config given", ""),
    (("tiny", "--plan", "--set", "model.n_embd=4"), "unknown key model.n_embd", ""),
    (("tiny", "--from", "latest"), "no run 'latest'", ""),
    (("tiny", "--from", "latest", "--resume", "latest"), "--resume and --from", ""),
    (("--from", "latest"), "no config given", "--from latest"),
]


@pytest.mark.usefixtures("files")
def test_train_refuses() -> None:
    for arguments, in_error, in_hint in TRAINING:
        error, hint = refuse("train", *arguments)
        assert in_error in error
        assert in_hint in hint
        assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_train_refuses_a_logger_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_installed(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(loggers, "distribution", nothing_is_installed)
    error, hint = refuse("train", "tiny", "--set", f"training.loggers={name}")
    assert f"training.loggers={name}" in error
    assert hint == f"hint: pip install {name}"
    assert not Path("runs").exists()


REFERENCES = ["nothere1", "../../etc", "/etc/passwd", "", "a b", "\x1b[31mred", "latest"]
COMMANDS = """
    eval | generate --run | inspect attention --run | train --resume | export --to transformer-lens
    | runs show | runs push | runs card | runs compare | runs plot | runs watch | runs rm --yes | runs prune --yes
    | runs note --
"""


@pytest.mark.parametrize("command", COMMANDS.split("|"))
def test_no_such_run(command: str) -> None:
    for reference in REFERENCES:
        after = ["text"] if any(name in command for name in ("note", "export", "push")) else []
        assert "no run" in refuse(*command.split(), reference, *after)[0]


@pytest.mark.parametrize("name", ["bset", "../best", "step-00000003", "999", ""])
def test_no_such_checkpoint(run: Run, name: str) -> None:
    error, hint = refuse("eval", "latest", "--checkpoint", name)
    assert f"run {run.id} has no checkpoint '{name}'" in error
    assert "it has best, latest" in hint


# A command, what its error names, and in some rows what its hint names.
REFUSED = """
    eval latest --split tset | no split 'tset'
    eval latest --text none.txt | none.txt cannot be read
    eval latest --text runs | runs cannot be read
    eval latest --text none.txt --dataset stories | --text and --dataset
    eval latest --subset raw | --subset
    eval latest --text none.txt --split test | --split
    eval latest --dataset text | 'text' reads files
    eval latest --dataset ./no-such-folder | './no-such-folder'
    eval latest --dataset stories --split tset | no split 'tset'
    eval latest --stride 0 | the stride must be 1 to 16
    eval latest --stride 17 | the stride must be 1 to 16
    eval latest -o eval.gif | 'eval.gif'
    eval latest -o none/eval.png | 'none'
    eval latest --device tpu | there is no device 'tpu'
    eval latest --text empty.txt | the text is empty
    eval latest --text latin.txt | latin.txt, line 2 | iconv
    tokenize tiny --set tokenizer.vocab_size=3 | tokenizer.vocab_size
    inspect tokens --file latin.txt | latin.txt, line 2 | iconv
    generate --prompts latin.txt | latin.txt, line 2 | iconv
    generate --prompt \udc80 | surrogate
    generate --temperature -1 | the temperature must be 0 or more
    generate --temperature nan | the temperature must be 0 or more
    generate --top-k 0 | top-k must be at least 1
    generate --top-p 1.5 | top-p must be more than 0 and at most 1
    generate --prompt a --prompts f | --prompt and --prompts
    generate --interactive --prompt a | --prompt and --interactive
    generate --interactive --json | --interactive and --json
    generate --interactive --logprobs 0 | --interactive and --logprobs
    generate --color --json | --color and --json
    generate --color --logprobs 0 | --color and --logprobs
    generate --greedy --temperature 1 | --temperature has no effect
    generate --temperature 0 --top-k 5 | --top-k has no effect
    generate --num-beams 2 --top-p 0.5 | --top-p has no effect
    generate --num-beams 2 --temperature 0 | --temperature has no effect
    generate --num-beams 2 --seed 0 | --seed has no effect
    generate --num-beams 2 --greedy | --greedy has no effect
    generate --num-beams 2 --stop a | --stop has no effect
    generate --num-beams 2 --num-return-sequences 3 | 2 beams cannot give 3 texts
    generate --greedy --num-return-sequences 3 | temperature 0 gives the same text 3 times
    generate --min-p 2 | min-p must be from 0 to 1
    generate --typical-p 0 | typical-p must be more than 0
    generate --repetition-penalty 0 | the repetition penalty must be more than 0
    generate --no-repeat-ngram-size 0 | n-grams that may not repeat must be at least 1
    generate --stop=| a stop string is empty
    generate --prompts none.txt | none.txt cannot be read
    generate --prompts blank.txt | blank.txt holds no prompt
    generate --prompts bad.jsonl | bad.jsonl, line 2
    generate --prompts keys.jsonl | keys.jsonl, line 1
    generate --prompts empty.jsonl | empty.jsonl, line 1: the prompt is empty
    export latest corpus --to transformer-lens | the folder 'corpus' is not empty
    export latest corpus/README.md --to transformer-lens | 'corpus/README.md' exists and is not a folder
    export latest none/out --to transformer-lens | the folder 'none' does not exist
    export latest . --to transformer-lens | '.' is the current folder
    export latest out --to transformer-lens --checkpoint bset | 'bset'
    export latest out --to transformers-lens | 'transformers-lens'
    inspect attention --layer 2 | there is no layer 2
    inspect attention --layer -3 | there is no layer -3
    inspect attention --head 7 | there is no head 7
    runs ls --status finish | there is no status 'finish'
    runs ls --status \x1b | there is no status '\\x1b'
    runs ls --sort los | there is no order 'los'
    runs ls -n 0 | the limit must be at least 1, not 0
    runs ls --tag a/b | 'a/b' is not a tag
    runs tag latest good b/c | 'b/c' is not a tag
    runs tag latest x --remove | has no tag 'x'
    runs tag nothere1 x | no run 'nothere1'
    runs note latest \udc80 | the note is not valid text
    runs compare latest | a comparison needs two runs or more
    runs compare latest latest | a comparison needs two runs or more
    runs plot latest --x tokns | 'tokns'
    runs plot latest -o loss.gif | 'loss.gif'
    runs plot latest -o none/loss.png | 'none'
    runs plot latest -o loss.png --json | --json and --output
    runs push latest runs | runs is the folder that run
    runs push latest away --checkpoint bset | has no checkpoint 'bset' | did you mean best?
    runs push latest away -c 999 | has no checkpoint '999'
    runs push latest book.txt | 'book.txt | folder
    runs push latest s3:bucket/runs | 's3:bucket/runs' is no URL | s3://bucket/runs
    runs push latest xyz://me:hunter22@host/runs | 'xyz://***@host/runs' | check the address
    runs pull s3://bucket/runs?token=hunter22 | 's3://bucket/runs?***' has a query
    runs pull none | none has no runs | push one first
    runs pull none latest | none has no run 'latest'
    runs pull runs | has no complete run | push it first
    runs pull book.txt | 'book.txt | folder
    runs upload latest away | upload | lumiere runs push RUN URL
    runs rm latest | stdin is not a terminal
    runs rm latest nothere1 --yes | no run 'nothere1'
    runs prune | stdin is not a terminal
    runs prune --keep bset --yes | there is no checkpoint 'bset' to keep
    runs prune --keep , --yes | there is no checkpoint '' to keep
    runs card latest -o card.md | card.md exists
    runs card latest -o runs | 'runs' is a directory
    runs card latest -o no/a.md | 'no' does not exist
    train tiny --from latest | model.embedding_size is 16, not 96 | --set model.embedding_size=16
    train tiny --from latest --plan | model.embedding_size is 16, not 96
    train tiny --from latest --print-config | model.embedding_size is 16, not 96
    train data.yaml --from latest@bset | no checkpoint 'bset' | did you mean best?
    train data.yaml --from latest@ | neither RUN nor
    train data.yaml --from latest@999 | no checkpoint '999'
    train data.yaml --from @best | neither RUN nor
    train data.yaml --from ../latest | no run '../latest'
    train data.yaml --from latest --set tokenizer.normalizer=none | tokenizer.normalizer is nfkc, not none
    train data.yaml --from latest --set training.freeze=blocks.2 | no 'blocks.2'
    train data.yaml --from latest --resume latest | --resume and --from
    train --resume latest --set training.seed=9 | training.seed 0 | --from
    evaluate latest | evaluate | lumiere eval
    sample | sample | lumiere generate
    tokenise | tokenise | tokenize
    ls | ls | lumiere runs ls
    attention | attention | lumiere inspect attention
    frobnicate | frobnicate | inspect, runs
    inspect patching | patching | lumiere inspect patch
    inspect attn | attn | lumiere inspect attention
    inspect atention | atention | attention
    inspect logit-lens | logit-lens | lumiere inspect lens
    inspect sae | sae | lumiere inspect cache
    inspect frobnicate | frobnicate | summary, attention
    runs list | list | lumiere runs ls
    runs delete x | delete | lumiere runs rm
    train tiny --init-from gpt2 | --init-from | --from RUN
    train tiny --lr 1 | --lr | --set training.learning_rate=VALUE
    train tiny --batch-size 1 | --batch-size | --set training.batch_size=VALUE
    train --config tiny | --config | lumiere train FILE
    generate --promt x | --promt | --prompt
    generate --max_new_tokens 3 | --max_new_tokens | --max-new-tokens
    generate --max-length 3 | --max-length | --max-new-tokens
    generate -n x | --max-new-tokens | lumiere generate
    generate -n | -n | --help
    generate --frobnicate | --frobnicate | lumiere generate --help
    inspect --frobnicate | --frobnicate | lumiere inspect --help
    inspect lens --promt x | --promt | --prompt
    eval | RUN | lumiere eval
    train tiny small | small | lumiere train
"""


@pytest.mark.usefixtures("files", "run")
def test_refused_command_lines() -> None:
    def state() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in Path().rglob("*"))

    before = state()
    for line in filter(str.strip, REFUSED.splitlines()):
        command, in_error, *in_hint = (part.strip(" ") for part in line.split("|"))
        error, hint = refuse(*command.split(" "))
        assert in_error in error
        assert all(text in hint for text in in_hint)
        assert state() == before


def test_empty_texts_and_names(run: Run) -> None:
    for prompt in ("", " ", "\n"):
        assert "the prompt is empty" in refuse("generate", "--prompt", prompt)[0]
        assert "the prompt is empty" in refuse("inspect", "attention", "--prompt", prompt)[0]
    assert "the model sees 16" in refuse("inspect", "attention", "--prompt", "word " * 40)[0]
    assert "'.' is a directory" in refuse("runs", "card", "latest", "-o", "")[0]


def test_a_run_without_losses_is_not_drawn(run: Run) -> None:
    run.metrics_path.unlink()
    assert f"run {run.id} has no losses yet" in refuse("runs", "plot", "latest", "-o", "loss.png")[0]
    assert os.listdir() == ["runs"]


def test_card_needs_a_checkpoint_and_its_corpus(run: Run) -> None:
    run.record_path.write_text('{"status": "finished", "corpus_sha256": "another"}')
    command = ("runs", "card", "latest", "-o", "card.md")
    error, hint = refuse(*command, after_notes=True)
    assert "'stories' is not the one" in error
    assert "restore it" in hint
    shutil.rmtree(run.checkpoints_dir)
    assert f"run {run.id} has no checkpoint 'best'" in refuse(*command)[0]
    assert os.listdir() == ["runs"]
