"""Test whether the mean of a run's last snapshots beats the last one: `python benchmarks/averaging.py RUN`.

Prints the validation loss of the mean weights of the last 1, 2, 4 and 8 snapshots (Izmailov et al. 2018).
"""

import argparse

import torch

from lumiere.data.dataset import tokenize_corpus
from lumiere.evaluation.loss import evaluate
from lumiere.persistence.runs import RunStore


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", help="an id, or latest")
    parser.add_argument("--runs-dir", default=None)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--until", type=int, default=None, help="use only snapshots up to this step")
    arguments = parser.parse_args()

    run = RunStore(arguments.runs_dir).open(arguments.run)
    config = run.load_config()
    corpus = tokenize_corpus(config)
    windows, facts = corpus.windows("validation", config), corpus.splits["validation"].facts
    names = sorted(path.stem for path in run.checkpoints_dir.glob("step-*.safetensors"))
    if arguments.until is not None:
        names = [name for name in names if int(name.removeprefix("step-")) <= arguments.until]
    model = run.load_model(names[-1])
    for count in arguments.counts:
        states = [run.load_model(name).state_dict() for name in names[-count:]]
        model.load_state_dict({key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]})
        loss = evaluate(model, windows, facts, config.training.batch_size).loss
        print(f"mean of {len(states)} from {names[-len(states)]} to {names[-1]}: validation loss {loss:.4f}")


if __name__ == "__main__":
    main()
