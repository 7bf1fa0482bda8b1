"""A minimal trainer: `train(load_config("configs/demo.toml"))`, or `illada train configs/demo.toml`."""

from illada.train.config import TrainConfig, load_config
from illada.train.loop import TrainResult, evaluate, train

__all__ = ["TrainConfig", "TrainResult", "evaluate", "load_config", "train"]
