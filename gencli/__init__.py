"""gencli: generative and unsupervised deep learning from one command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gencli.contract import Model

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def load(run: Any, weights: str = "ema", device: str = "cpu") -> Model:
    """The model of a run folder, checkpoint folder or ``.safetensors`` file, in evaluation mode.

    ``weights``: "ema" (averaged where the run averaged) or "raw". The model has ``config`` and ``spec``.
    """
    from gencli.checkpoint import load as load_checkpoint

    return load_checkpoint(run, weights=weights, device=device).model
