"""What a run reports: monitors, communication log, timers and the flops profiler."""

from typing import Literal

from deepspeed.config.base import Amount, Count, FilePath, Integer, Section, Size, key, part


class CommsLoggerSection(Section):
    """A record of collectives: count, bytes, time, bandwidth."""

    enabled: bool = key(False, "record collectives")
    prof_all: bool = key(True, "record every operation")
    prof_ops: list[str] = key([], "with prof_all false: record only these")
    verbose: bool = key(False, "one line per operation")
    debug: bool = key(False, "add the caller's name")


class TensorBoardSection(Section):
    """Scalars for TensorBoard."""

    enabled: bool = key(False, "write them")
    output_path: FilePath = key("", "folder")
    job_name: str = key("DeepSpeedJobName", "sub-folder")


class WandbSection(Section):
    """Scalars for Weights & Biases."""

    enabled: bool = key(False, "write them")
    group: str | None = key(None, "run group")
    team: str | None = key(None, "entity")
    project: str = key("deepspeed", "project")


class CsvMonitorSection(Section):
    """One CSV file per scalar."""

    enabled: bool = key(False, "write them")
    output_path: FilePath = key("", "folder")
    job_name: str = key("DeepSpeedJobName", "sub-folder")


class CometSection(Section):
    """Scalars for Comet."""

    enabled: bool = key(False, "write them")
    samples_log_interval: Count = key(100, "samples between two points")
    project: str | None = key(None, "project")
    workspace: str | None = key(None, "workspace")
    api_key: str | None = key(None, "key of the service; the environment's when null")
    experiment_name: str | None = key(None, "name of the experiment")
    experiment_key: str | None = key(None, "id of the experiment")
    online: bool | None = key(None, "false: write to disk only")
    mode: Literal["get", "create", "get_or_create"] | None = key(None, "continue an experiment or begin one")


class FlopsProfilerSection(Section):
    """Floating-point operations and time per module, for one step."""

    enabled: bool = key(False, "profile one step")
    recompute_fwd_factor: Amount = key(0.0, "share of forward that is computed again in backward")
    profile_step: Count = key(1, "which step")
    module_depth: Integer = key(-1, "depth of the summary; -1: the deepest")
    top_modules: Count = key(1, "modules named per depth")
    detailed: bool = key(True, "print the whole tree")
    output_file: FilePath | None = key(None, "write there instead of printing")


class ThroughputTimerSection(Section):
    """Samples per second."""

    enabled: bool = key(True, "measure it")
    synchronized: bool = key(True, "wait for the device around each measurement")


class TimersSection(Section):
    """Timers of the engine."""

    throughput: ThroughputTimerSection = part(ThroughputTimerSection, "samples per second")


class EigenvalueSection(Section):
    """Eigenvalues of the loss for quantised training."""

    enabled: bool = key(False, "compute them")
    verbose: bool = key(False, "print them")
    max_iter: Count = key(100, "most power iterations")
    tol: Amount = key(1e-2, "relative change at which to stop")
    stability: Amount = key(1e-6, "added to denominators")
    gas_boundary_resolution: Count = key(1, "accumulation boundaries between computations")
    layer_name: str = key("bert.encoder.layer", "module that holds the layers")
    layer_num: Size = key(0, "layers")
