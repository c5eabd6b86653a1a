"""One training of a sweep, in its own process; its gradients measured at both ends if wanted."""

from pathlib import Path

from poweropd.config import Config
from poweropd.training import gradient_noise
from poweropd.training.trainer import Result, Trainer


def train_and_measure(config_path: Path, snr: int) -> Result:
    """Trains on from where the run directory is; `snr`: batches for the quality of gradients."""
    trainer = Trainer(Config.load(config_path))
    if snr and trainer.steps_done == 0:
        _measure(trainer, "start", snr)
    result = trainer.train()
    if snr and result.final is not None:
        _measure(trainer, "end", snr)
    return result


def _measure(trainer: Trainer, when: str, batches: int) -> None:
    trainer.run.write_gradients(when, gradient_noise.measure_gradient(trainer, batches))
