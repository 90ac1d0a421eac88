"""A process of `test_two_processes_train_as_one`; run by torchrun.

distributed_digits.py FOLDER OPTIONS... runs examples/train_digits.py and saves its weights there.
"""

import importlib.util
import sys
from pathlib import Path

import torch


def keep_weights(digits, folder, setattr=setattr):
    """Lets the example save its weights before and after training in a folder."""
    train = digits.train

    def saving(args, model, *data):
        torch.save(model.state_dict(), folder / f"start{digits.RANK}.pt")
        history = train(args, model, *data)
        torch.save(model.state_dict(), folder / f"end{digits.RANK}.pt")
        return history

    setattr(digits, "train", saving)


def main() -> None:
    path = Path(__file__).parents[1] / "examples" / "train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", path)
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    keep_weights(digits, Path(sys.argv[1]))
    if digits.RANK > 0:  # it draws nothing
        digits.plot_curves = digits.plot_spikes = None
    digits.main(sys.argv[2:])


if __name__ == "__main__":
    main()
