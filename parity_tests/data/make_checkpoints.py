"""Writes ``torch-<version>.pt`` beside itself: the checkpoints of every optimizer of the PyTorch that runs it.

The committed files were each made by the release that they are named after, with this script and nothing else, in
environments like ``python3.8 -m venv old && old/bin/pip install torch==1.4.0 "numpy<2"`` (1.4.0 and Python 3.8, 1.11.0
and 3.9, 1.12.1 and 3.10). So this script keeps to what all of them understand.
"""

import os

import torch

CASES = {
    "SGD": {"lr": 0.1},
    "SGD, momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1},
    "SGD, nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
    "Adadelta": {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01},
    "RMSprop, centered": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Adam": {"lr": 0.01, "betas": (0.8, 0.95)},
    "Adam, amsgrad": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "betas": (0.5, 0.75)},
    "ASGD": {"lr": 0.1, "lambd": 0.1, "t0": 1.0},
    "Rprop": {"lr": 0.01},
    "SparseAdam": {"lr": 0.01},
}


def checkpoint(name, options, steps=3):
    """Parameters and state dict after a few steps of two groups, the second with a rate of its own."""
    params = [torch.linspace(-1, 1, 7).requires_grad_(), torch.linspace(2, -1, 15).reshape(3, 5).requires_grad_()]
    optimizer = getattr(torch.optim, name.split(",")[0])(
        [{"params": params[:1]}, {"params": params[1:], "lr": options["lr"] / 2}], **options
    )
    for step in range(steps):
        for p in params:
            p.grad = torch.cos(p.detach() * 3 + step)
            if name == "SparseAdam":
                p.grad = p.grad.to_sparse()
        optimizer.step()
    return {"params": [p.detach() for p in params], "options": options, "optimizer": optimizer.state_dict()}


def main():
    """All optimizers that this PyTorch has, in one file."""
    version = torch.__version__.split("+")[0]
    present = {name: options for name, options in CASES.items() if hasattr(torch.optim, name.split(",")[0])}
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"torch-{version}.pt")
    torch.save({name: checkpoint(name, options) for name, options in present.items()}, path + ".new")
    os.replace(path + ".new", path)


if __name__ == "__main__":
    main()
