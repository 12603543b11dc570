"""bfloat16 weights in about 11 bits, without loss: for frozen ones that are read from a disk again and again.

Exponents of trained weights have 2.6 bits of entropy (arXiv:2504.11651), signs and the seven digits nothing
to spare. A Huffman code reaches 10.6 bits and is slow on a CPU, symbol by symbol. Here every exponent has
three bits, so that vectors of them are decoded at once:

    code       exponent - base of the block for the seven neighbouring exponents that most of its 4,096
               elements have; 7 for any other, which is written out in a byte: one in forty, of weights that
               are normally distributed
    bits       8 (sign and digits) + 3 (code) + 8 times the share of others + 0.006 (base and count)

    layout     magic [8], elements int64, others int64, xxh3-64 of what is before and after
               count of others of each block uint16, base of each block uint8
               low: sign and digits of each element, a byte
               three planes of the codes' bits, of 512 bytes a block: bit i of byte j is element 512 i + j's
               exponents of the others, a byte each, by block, then j, then i

What does not become smaller is kept as it is, under another magic. All integers little-endian.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torch.nn.functional import pad

from .providers import choose

BLOCK = 4096
STRIDE = BLOCK // 8
OTHER = 7
_HEADER = struct.Struct("<8sqqQ")
_CODED, _PLAIN = b"bf16 11b", b"bf16 raw"
_AT_ONCE = 256  # blocks, where PyTorch's operations make tensors of many bytes an element


def encode(weight: Tensor) -> Tensor:
    """uint8 [bytes] of a bfloat16 tensor of any shape on the CPU, whose shape is not kept.

    Raises ValueError for other types and devices.
    """
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        raise ValueError(f"the codec is for bfloat16 on the CPU, not {weight.dtype} on {weight.device}")
    bits = weight.detach().contiguous().view(-1).view(torch.int16)
    elements, blocks = len(bits), -(-len(bits) // BLOCK)
    others = torch.empty(blocks, dtype=torch.int16)
    bases, low = torch.empty(blocks, dtype=torch.uint8), torch.empty(elements, dtype=torch.uint8)
    planes = torch.empty(blocks * 3 * STRIDE, dtype=torch.uint8)
    if choose("lossless", weight.device, ["native"]) == "native":
        from .native.lossless import encode as encode_parts_there

        rest = encode_parts_there(bits, others, bases, low, planes)
    else:
        rest = encode_parts(bits, others, bases, low, planes)
    body = [others.view(torch.uint8), bases, low, planes, rest]
    magic = _CODED
    if sum(map(len, body)) > 2 * elements:
        magic, body, rest = _PLAIN, [bits.view(torch.uint8)], rest[:0]
    result = torch.cat([torch.empty(_HEADER.size, dtype=torch.uint8), *body])
    head = (magic, elements, len(rest))
    header = _HEADER.pack(*head, _checksum(head, result))
    result[: _HEADER.size].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
    return result


def decode(
    data: Tensor, out: Tensor | None = None, *, verify: bool = True, threads: int | None = None
) -> Tensor:
    """The elements that `encode` was given, every bit: bfloat16 [elements], or into `out`, of as many.

    data: uint8, contiguous, on the CPU. verify: compare the checksum, which costs about a third more time.
    threads: of the C++, None for as many as PyTorch has.
    Raises ValueError for data that was not written by `encode`, is cut off or damaged (where only the
    checksum shows that, with `verify`), and for an `out` that does not fit. What it holds then is undefined.
    """
    if data.dtype != torch.uint8 or data.device.type != "cpu" or data.dim() != 1 or not data.is_contiguous():
        raise ValueError(
            f"the codec decodes contiguous uint8 on the CPU, not {data.dtype} {tuple(data.shape)}"
        )
    if len(data) < _HEADER.size:
        raise ValueError(f"compressed weights of {len(data)} bytes are cut off: the header alone has more")
    magic, elements, rest, checksum = _HEADER.unpack(data[: _HEADER.size].numpy().tobytes())
    if magic not in (_CODED, _PLAIN):
        raise ValueError(f"these are no compressed weights: they begin with {magic!r}")
    blocks = -(-elements // BLOCK)
    sizes = [2 * blocks, blocks, elements, blocks * 3 * STRIDE, rest] if magic == _CODED else [2 * elements]
    if elements < 0 or rest < 0 or _HEADER.size + sum(sizes) != len(data):
        raise ValueError(f"compressed weights of {elements:,} elements cannot have {len(data):,} bytes")
    if verify and _checksum((magic, elements, rest), data) != checksum:
        raise ValueError("compressed weights are damaged: their checksum differs")
    if out is None:
        out = torch.empty(elements, dtype=torch.bfloat16)
    elif out.device.type != "cpu":
        raise ValueError(f"the codec decodes on the CPU, not into a tensor on {out.device}")
    elif out.dtype != torch.bfloat16 or out.numel() != elements or not out.is_contiguous():
        raise ValueError(f"{elements:,} bfloat16 elements do not fit {out.dtype} {tuple(out.shape)}")
    bits = out.view(-1).view(torch.int16)
    parts = torch.split(data[_HEADER.size :], sizes)
    if magic == _PLAIN:
        bits.view(torch.uint8).copy_(parts[0])
        return out
    others = parts[0].clone().view(torch.int16)  # where it lies may be odd
    ends = (others.long() & 0xFFFF).cumsum(0)
    if int(ends[-1] if blocks else 0) != rest:
        raise ValueError("compressed weights are damaged: their counts contradict their size")
    starts = ends - (others.long() & 0xFFFF)
    if choose("lossless", data.device, ["native"]) == "native":
        from .native.lossless import decode as decode_parts_there

        fine = decode_parts_there(bits, others, starts, *parts[1:], threads=threads)
        torch.autograd.graph.increment_version(out)  # as PyTorch's operations do themselves
    else:
        fine = decode_parts(bits, others, starts, *parts[1:])
    if not fine:
        raise ValueError("compressed weights are damaged: their codes contradict their counts")
    return out


def encode_parts(bits: Tensor, others: Tensor, bases: Tensor, low: Tensor, planes: Tensor) -> Tensor:
    """Fill what the layout names from int16 patterns; returns the exponents of the others (uint8)."""
    rest = [torch.empty(0, dtype=torch.uint8)]
    low.copy_(bits >> 8 & 0x80 | bits & 0x7F)
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    for first in range(0, len(bases), _AT_ONCE):
        part = bits[first * BLOCK : (first + _AT_ONCE) * BLOCK]
        last = slice(first, first + _AT_ONCE)
        behind = (0, -len(part) % BLOCK)
        exponents = pad((part >> 7 & 0xFF).to(torch.uint8), behind).view(-1, BLOCK)
        real = pad(torch.ones_like(part), behind).view(-1, BLOCK)
        counts = torch.zeros(len(exponents), 256, dtype=torch.int64).scatter_add_(
            1, exponents.long(), real.long()
        )
        inside = counts.unfold(1, OTHER, 1).sum(2)
        base = (inside * 256 + 255 - torch.arange(inside.shape[1])).argmax(1)  # of equal ones the first
        bases[last].copy_(base)
        codes = (exponents.int() - base[:, None].int() & 0xFF).clamp_(max=OTHER).to(torch.uint8) * real.to(
            torch.uint8
        )
        codes, exponents = codes.view(-1, 8, STRIDE), exponents.view(-1, 8, STRIDE)
        split = [((codes >> plane & 1) << places).sum(1, dtype=torch.uint8) for plane in range(3)]
        planes.view(-1, 3, STRIDE)[last].copy_(torch.stack(split, 1))
        other = codes == OTHER
        others[last].copy_(other.sum((1, 2)))
        rest.append(exponents.transpose(1, 2)[other.transpose(1, 2)])
    return torch.cat(rest)


def decode_parts(
    bits: Tensor, others: Tensor, starts: Tensor, bases: Tensor, low: Tensor, planes: Tensor, rest: Tensor
) -> bool:
    """The reverse; False where the codes do not name as many others as there are."""
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    for first in range(0, len(bases), _AT_ONCE):
        last = slice(first, first + _AT_ONCE)
        a, b, c = planes.view(-1, 3, 1, STRIDE)[last].unbind(1)
        codes = (a >> places & 1) | (b >> places & 1) << 1 | (c >> places & 1) << 2
        other = (codes == OTHER).transpose(1, 2)
        found, begin = other.sum((1, 2)), int(starts[first])
        part = bits[first * BLOCK : (first + _AT_ONCE) * BLOCK]
        if bool((found != others[last].long() & 0xFFFF).any()) or bool(
            codes.view(-1)[len(part) :].eq(OTHER).any()
        ):
            return False
        exponents = (codes.int() + bases[last].int()[:, None, None]).transpose(1, 2).contiguous()
        exponents[other] = rest[begin : begin + int(found.sum())].int()
        flat = exponents.transpose(1, 2).reshape(-1)[: len(part)]
        given = low[first * BLOCK : first * BLOCK + len(part)].int()
        part.copy_(((given & 0x80) << 8 | flat << 7 | given & 0x7F).to(torch.int16))
    return True


def _checksum(head: tuple[bytes, int, int], data: Tensor) -> int:
    import xxhash

    digest = xxhash.xxh3_64(struct.pack("<8sqq", *head))
    digest.update(data[_HEADER.size :].numpy().data)
    return digest.intdigest()
