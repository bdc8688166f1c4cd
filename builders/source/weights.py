"""What the headers of safetensors files say: that a file is whole, and how many weights it holds. No library is needed.

A file begins with the length of its header (8 bytes, little endian), then JSON: dtype, shape and place of each tensor.
"""

import json
import math
from pathlib import Path

from serve.errors import ConfigError

_LONGEST_HEADER_BYTES = 100_000_000  # what the format allows


def count_parameters(files: list[Path], where: str) -> int:
    """Return how many weights files hold together. Scales of quantized weights are not counted.

    Raises:
        ConfigError: A file is cut off, or is none; names it.
    """
    return sum(_count(file, where) for file in files)


def _count(file: Path, where: str) -> int:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(_LONGEST_HEADER_BYTES, size - 8):
            raise _broken(file, where, f"its header would take {length:,} bytes, and the file has {size:,}")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
            end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
            shapes = {name: [int(length) for length in tensor["shape"]] for name, tensor in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
            raise _broken(file, where, f"its header cannot be read ({exc})") from None
    if 8 + length + end != size:
        raise _broken(file, where, f"it should have {8 + length + end:,} bytes, and has {size:,}")
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(("_scale", "_scale_2")))


def _broken(file: Path, where: str, why: str) -> ConfigError:
    return ConfigError(f"source.location: {file.name} of {where} is no whole safetensors file: {why}; fetch it again")
