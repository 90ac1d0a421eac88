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


def train_in_double(setattr=setattr):
    """Lets the example train in float64.

    Two ways to add up a gradient then differ by 1e-16. In float32 the difference of 1e-7, which
    depends on the processor, moves a potential across the threshold within a few steps, and from
    that spike on the two trainings have nothing in common.
    """
    make_network, as_input = train.make_network, train.as_input
    setattr(train, "make_network", lambda *arguments: make_network(*arguments).double())
    setattr(train, "as_input", lambda *arguments: as_input(*arguments).double())


def main() -> None:
    train_in_double()
    keep_weights(Path(sys.argv[1]))
    if parallel.RANK > 0:  # it draws nothing
        plots.curves = plots.spikes = None
    train.main(sys.argv[2:])


if __name__ == "__main__":
    main()
