"""Where a run's numbers go: TensorBoard, Weights & Biases, CSV files, Comet."""

from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.csv_files import CsvMonitor
from deepspeed.monitor.monitor import Event, Monitor, MonitorMaster, build_monitors
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

__all__ = [
    "CometMonitor",
    "CsvMonitor",
    "Event",
    "Monitor",
    "MonitorMaster",
    "TensorBoardMonitor",
    "WandbMonitor",
    "build_monitors",
]
