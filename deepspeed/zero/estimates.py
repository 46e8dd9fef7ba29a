"""What a model's states will need on each device and each host: arithmetic, nothing is allocated.

    P parameters, T of them trained, L in the largest unit that is gathered at once; N ranks, n on each node
    bytes for each: weight 2 (bf16 or fp16) | fp32 master copy and two moments of Adam 12 | gradient 4

                            per device                       per host
    stage 2                 2P + 16T/N                       4Pn f
    stage 2, states off     2P                               max(4Pn, 16Tn/N) f
    stage 3                 4L + 2P/N + 16T/N                4Pn f
    stage 3, states off     4L + 2P/N                        max(4Pn, 16Tn/N) f
    stage 3, all off        4L                               max(4Pn, (2P + 16T)n/N) f

4Pn is the fp32 model that each rank builds before it is cut; under zero.Init there is none, as modules are made
on the device and cut at once. 4L is the unit in use, its weights and its gradient. f is additional_buffer_factor.
A gradient takes 4 bytes where micro-batches are accumulated, and 2 where they are not.

Not counted, because they depend on the data or the configuration: activations; gradients on their way (a few
units); units gathered ahead or kept for reuse (stage3_prefetch_bucket_size, stage3_max_reuse_distance); small
parameters that stay whole (stage3_param_persistence_threshold); up to 31 elements between parameters. Without
an accelerator "device" is the rank's own memory. Offload itself is not built yet; its rows help to plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deepspeed.common.logging import current_rank
from deepspeed.errors import ConfigError
from deepspeed.zero.grouping import group_blocks
from deepspeed.zero.leaf_modules import get_z3_leaf_modules

WEIGHT, STATES, GRADIENT, BUILT = 2, 12, 4, 4  # bytes for each parameter
GIB = 2**30
LIVE = 1_000_000_000
"""Elements above which a block is gathered layer by layer: the default of stage3_max_live_parameters."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes for one choice of options, given as keys of the configuration and whether zero.Init is used."""

    per_cpu: int
    per_gpu: int
    options: dict[str, str | bool]


@dataclass(frozen=True)
class _Model:
    total: int
    trained: int
    largest: int = 0


@dataclass(frozen=True)
class _Machine:
    per_node: int
    nodes: int
    factor: float

    def __post_init__(self) -> None:
        for name, value in (("num_gpus_per_node", self.per_node), ("num_nodes", self.nodes)):
            if value < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {value}")

    @property
    def ranks(self) -> int:
        return self.per_node * self.nodes


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Return the bytes that a model needs at stage 2, by the formulas above: (per host, per device)."""
    machine = _Machine(num_gpus_per_node, num_nodes, additional_buffer_factor)
    return _stage_2(_Model(total_params, total_params), machine, cpu_offload)


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Return the bytes that a model needs at stage 3: (per host, per device, of those the unit in use)."""
    machine = _Machine(num_gpus_per_node, num_nodes, additional_buffer_factor)
    model = _Model(total_params, total_params, largest_layer_params)
    host, device = _stage_3(model, machine, cpu_offload, cpu_offload and cpu_offload_params, zero_init)
    return host, device, _in_use(model)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[MemoryNeeds]:
    """Print what `model` needs at stage 2 with every choice of offload, and return it.

    Frozen parameters count as such. The model may be on the meta device, or sharded.
    """
    machine = _Machine(num_gpus_per_node, num_nodes, additional_buffer_factor)
    return _all_of_stage_2(_measure(model), machine)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[MemoryNeeds]:
    """Print what `total_params` trained parameters need at stage 2 with every choice, and return it."""
    machine = _Machine(num_gpus_per_node, num_nodes, additional_buffer_factor)
    return _all_of_stage_2(_Model(total_params, total_params), machine)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[MemoryNeeds]:
    """Print what `model` needs at stage 3 with every choice of offload and zero.Init, and return it.

    The largest unit is the largest repeated block or other module, as the engine would cut the model.
    Frozen parameters count as such. The model may be on the meta device, or sharded.
    """
    machine = _Machine(num_gpus_per_node, num_nodes, additional_buffer_factor)
    return _all_of_stage_3(_measure(model), machine)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> list[MemoryNeeds]:
    """Print what `total_params` trained parameters need at stage 3 with every choice, and return it.

    `largest_layer_params` are the parameters gathered at once: here a repeated block, not one layer of it.
    """
    machine = _Machine(num_gpus_per_node, num_nodes, additional_buffer_factor)
    return _all_of_stage_3(_Model(total_params, total_params, largest_layer_params), machine)


def _stage_2(model: _Model, machine: _Machine, offload: bool) -> tuple[int, int]:
    updated = (STATES + GRADIENT) * model.trained
    built = BUILT * model.total * machine.per_node
    if offload:
        return int(max(built, updated / machine.nodes) * machine.factor), WEIGHT * model.total
    return int(built * machine.factor), WEIGHT * model.total + updated // machine.ranks


def _stage_3(
    model: _Model, machine: _Machine, offload: bool, offload_params: bool, zero_init: bool
) -> tuple[int, int]:
    weights, updated = WEIGHT * model.total, (STATES + GRADIENT) * model.trained
    on_host = (updated if offload else 0) + (weights if offload_params else 0)
    built = 0 if zero_init else BUILT * model.total * machine.per_node
    device = _in_use(model) + (weights + updated - on_host) // machine.ranks
    return int(max(built, on_host / machine.nodes) * machine.factor), device


def _in_use(model: _Model) -> int:
    return 2 * WEIGHT * model.largest


def _all_of_stage_2(model: _Model, machine: _Machine) -> list[MemoryNeeds]:
    needs = [
        MemoryNeeds(*_stage_2(model, machine, offload), {"offload_optimizer": "cpu" if offload else "none"})
        for offload in (True, False)
    ]
    _show(2, model, machine, needs)
    return needs


def _all_of_stage_3(model: _Model, machine: _Machine) -> list[MemoryNeeds]:
    needs = []
    for offload, offload_params in ((True, True), (True, False), (False, False)):
        for zero_init in (True, False):
            options: dict[str, str | bool] = {
                "offload_param": "cpu" if offload_params else "none",
                "offload_optimizer": "cpu" if offload else "none",
                "zero_init": zero_init,
            }
            needs.append(MemoryNeeds(*_stage_3(model, machine, offload, offload_params, zero_init), options))
    _show(3, model, machine, needs)
    return needs


def _measure(model: nn.Module) -> _Model:
    named = list(model.named_parameters())
    leaves = {id(part) for part in get_z3_leaf_modules(model)}
    together = {name for name, part in model.named_modules() if id(part) in leaves}
    units = group_blocks(named, lambda _: None, together, LIVE)
    return _Model(
        total=sum(param.numel() for _, param in named),
        trained=sum(param.numel() for _, param in named if param.requires_grad),
        largest=max((sum(param.numel() for _, param in unit) for unit in units), default=0),
    )


def _show(stage: int, model: _Model, machine: _Machine, needs: list[MemoryNeeds]) -> None:
    """Print the figures on the first rank."""
    if current_rank() != 0:
        return
    from rich.console import Console
    from rich.table import Table

    sizes = f"{_count(model.total)} parameters"
    if model.trained != model.total:
        sizes += f", {_count(model.trained)} of them trained"
    if stage == 3:
        sizes += f", {_count(model.largest)} in the largest unit"
    table = Table()
    for name in ("per CPU", "per GPU", *needs[0].options):
        table.add_column(name, justify="right" if name.startswith("per") else "left", no_wrap=True)
    for one in needs:
        options = [str(int(value)) if isinstance(value, bool) else value for value in one.options.values()]
        table.add_row(f"{one.per_cpu / GIB:.2f} GiB", f"{one.per_gpu / GIB:.2f} GiB", *options)
    console = Console()
    console.print(
        f"Parameters, gradients and optimizer states at ZeRO stage {stage}, without activations:",
        soft_wrap=True,
    )
    console.print(
        f"{sizes}; nodes: {machine.nodes}, ranks on each: {machine.per_node}", highlight=False, soft_wrap=True
    )
    console.print(table)


def _count(numel: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if numel >= size:
            return f"{numel / size:.1f}{unit}"
    return str(numel)
