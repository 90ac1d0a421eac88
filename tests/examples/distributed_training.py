"""A process of `test_two_processes_train_as_one`; run by torchrun.

distributed_training.py FOLDER OPTIONS... runs examples.train and saves its weights there.
"""

import sys
from pathlib import Path

import torch

from examples import parallel, plots, train


def keep_weights(folder, setattr=setattr):
    """Lets the example save its weights before and after training in a folder."""
    run_epochs = train.train

    def saving(args, model, *others):
        torch.save(model.state_dict(), folder / f"start{parallel.RANK}.pt")
        found = run_epochs(args, model, *others)
        torch.save(model.state_dict(), folder / f"end{parallel.RANK}.pt")
        return found

    setattr(train, "train", saving)


def main() -> None:
    keep_weights(Path(sys.argv[1]))
    if parallel.RANK > 0:  # it draws nothing
        plots.curves = plots.spikes = None
    train.main(sys.argv[2:])


if __name__ == "__main__":
    main()
