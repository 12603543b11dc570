"""Where optimizer state, activations and frozen weights live: device, host memory or disk."""

from typing import Literal

from pydantic import Field

from .quantities import Bytes
from .section import Auto, BytesText, Section

Tier = Literal["device", "host", "disk"]


class OffloadConfig(Section):
    """What leaves the device for host memory or the disk. None in a key means: the plan decides."""

    optimizer: Auto[Tier] = Field(
        default=None,
        description="Tier of the optimizer's state. auto takes the first of device, host, disk that fits; "
        "on a machine without an accelerator host memory is the device.",
    )
    update: Literal["host", "device", "split"] = Field(
        default="host",
        description="Where an accelerator's optimizer is updated whose state is elsewhere: on the host "
        "(AdamW with master weights; others on the device), on the device, or both at once.",
    )
    activations: Auto[Literal["device", "host"]] = Field(
        default=None,
        description="Tier of the activations between forward and backward pass; auto takes the host where "
        "that is quicker than computing them again.",
    )
    weights: Tier = Field(
        default="device",
        description="Tier of the layers' weights; from host or disk they are streamed layer by layer.",
    )
    weights_code: Auto[Literal["raw", "lossless"]] = Field(
        default=None,
        description="How frozen bfloat16 layers lie on disk: as they are, or in about 11 bits a weight, "
        "without loss, decoded by C++ while they are read; auto takes that where a step is quicker for it.",
    )
    disk_path: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of the scratch files, on the fastest local disk; null is `.offload` in "
        "output_dir.",
    )
    buffer_size: BytesText = Field(
        default=Bytes.parse("16 MiB"),
        description="Bytes of state that are read, updated and written together; a tensor that cannot be cut "
        "may need more.",
    )
    buffer_count: int = Field(
        default=6, ge=3, le=256, description="Such buffers in memory, all allocated once at the start."
    )
    io: Auto[Literal["threads", "io_uring"]] = Field(
        default=None,
        description="How the disk is read and written; auto tries io_uring at the start and takes threads "
        "where the system forbids it or it is slower.",
    )
    io_threads: int = Field(default=4, ge=1, le=64, description="Threads that read and write.")
    pin_memory: Auto[bool] = Field(
        default=None,
        description="Lock the buffers for direct transfers to an accelerator; auto does where there is one "
        "and the system's limit on locked memory allows it.",
    )
    numa_policy: Literal["default", "local", "interleave"] = Field(
        default="default",
        description="On machines of several memory nodes: put the buffers on the node that computes, or "
        "spread them over all.",
    )
    max_disk_writes: BytesText | None = Field(
        default=None,
        description="Refuse a run that would write more than this to the disk, which wears; null only says "
        "how much it will be.",
    )
