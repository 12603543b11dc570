"""Which engine makes the steps: ours, DeepSpeed's ZeRO, or PyTorch's FSDP2. Keys as theirs."""

from typing import Annotated, Literal

from pydantic import Field

from .section import Auto, Section


class NativeEngineConfig(Section):
    """Ours: one process, or data parallel with the whole model in each."""

    name: Literal["native"] = Field(
        default="native",
        description="Ours: one process, or data parallel with the whole model in each. What leaves the "
        "device is in `offload`.",
    )


class AioConfig(Section):
    """How DeepSpeed reads and writes the NVMe disk."""

    block_size: int = Field(default=1048576, ge=4096, description="Bytes of one read or write.")
    queue_depth: int = Field(default=8, ge=1, description="Reads or writes in flight.")
    intra_op_parallelism: int = Field(default=1, ge=1, description="Threads that share one tensor.")
    single_submit: bool = Field(default=False, description="Submit the blocks one by one.")
    overlap_events: bool = Field(default=True, description="Submit blocks while others complete.")


class ZenFlowConfig(Section):
    """DeepSpeed's ZenFlow: the columns with the largest gradients at once, the others some steps later."""

    topk_ratio: float = Field(
        default=0.1, gt=0, lt=1, description="Share of each matrix's columns that are stepped at once."
    )
    select_strategy: Literal["auto", "step", "epoch"] = Field(
        default="step",
        description="What select_interval counts. Only `step` is offered: DeepSpeed counts epochs by a "
        "loader of its own.",
    )
    select_interval: Auto[int] = Field(
        default=32,
        ge=1,
        description="Steps after which the columns are chosen anew. `auto` goes with select_strategy=auto.",
    )
    update_interval: Auto[int] = Field(
        default=4,
        ge=1,
        description="Steps whose gradients add up before the other columns are stepped. `auto` is not "
        "offered: DeepSpeed may never decide to.",
    )
    full_warm_up_rounds: int = Field(
        default=0, ge=0, description="Steps at the start in which all columns are stepped."
    )
    overlap_step: bool = Field(
        default=False,
        description="Step the other columns in a process of its own. Not offered: its moments are in no "
        "checkpoint.",
    )


class DeepSpeedConfig(Section):
    """DeepSpeed's ZeRO: optimizer state, gradients and weights in shards, on the device, host or disk."""

    name: Literal["deepspeed"] = Field(
        default="deepspeed",
        description="DeepSpeed's ZeRO (arXiv:1910.02054): optimizer state, gradients and weights in shards "
        "over the processes, on the device, in host memory or on NVMe disks.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description="What is in shards: nothing (0), optimizer state (1), gradients too (2), weights too "
        "(3).",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="Where the optimizer's state and its step are: on the device, in host memory, on disk.",
    )
    offload_param: Literal["none", "cpu"] = Field(
        default="none", description="Where the weights are while no layer needs them; for stage 3."
    )
    nvme_path: str | None = Field(
        default=None, min_length=1, description="Folder on the NVMe disk, for offload_optimizer: nvme."
    )
    sub_group_size: int = Field(
        default=1_000_000_000,
        ge=1,
        description="Elements that are read, stepped and written together (stage 3).",
    )
    buffer_count: int = Field(
        default=4,
        ge=4,
        description="Buffers between disk and optimizer, each as large as the largest sub-group; weight, "
        "gradient and two moments need four.",
    )
    pipeline_read: bool = Field(
        default=False,
        description="Read the next sub-group while this one is stepped; needs twice the buffers.",
    )
    pipeline_write: bool = Field(
        default=False,
        description="Write the last sub-group while this one is stepped; needs twice the buffers.",
    )
    zero_hpz_partition_size: int = Field(
        default=1,
        ge=1,
        description="ZeRO++ (arXiv:2306.10209): processes that hold a second copy of the weights in shards, "
        "mostly those of one machine; 1 holds none.",
    )
    zero_quantized_weights: bool = Field(
        default=False, description="ZeRO++: gather the weights in int8. Not exact."
    )
    zero_quantized_gradients: bool = Field(
        default=False, description="ZeRO++: reduce the gradients in int4. Not exact."
    )
    zenflow: ZenFlowConfig | None = Field(
        default=None,
        description="ZenFlow (arXiv:2505.12242): step the columns with the largest gradients on the device "
        "at once, the others in host memory some steps later. Not exact, and without clipping; null is off.",
    )
    aio: AioConfig = Field(
        default_factory=AioConfig,
        description="How the disk is read and written.",
        json_schema_extra={"x-default": "as below"},
    )


class Fsdp2Config(Section):
    """PyTorch's fully_shard: weights, gradients and optimizer state in shards, layer by layer."""

    name: Literal["fsdp2"] = Field(
        default="fsdp2",
        description="PyTorch's fully_shard (arXiv:2304.11277): weights, gradients and optimizer state in "
        "shards over the processes.",
    )
    cpu_offload: bool = Field(
        default=False,
        description="Keep the shards in host memory and step there; gathered layers are on the GPU.",
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="Give a layer's gathered weights back after its forward pass and gather them again in "
        "the backward pass.",
    )


EngineConfig = Annotated[
    NativeEngineConfig | DeepSpeedConfig | Fsdp2Config,
    Field(discriminator="name"),
]
