"""Safetensors folders of any size: tensors read slice by slice, shards written tensor by tensor.

Reading maps files into memory and lets go of them again, writing appends to a file whose header is known beforehand:
neither holds more than a tensor beside the model. The format is that of github.com/huggingface/safetensors: the
length of a JSON header as 8 bytes, the header, the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from shared.megatron.hf_config import DamagedFiles

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Pages of a mapped file count as this process's memory until the file is closed.
MAPPED_BYTES = 16 << 20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder:
    """The tensors of all shards of a folder by name. Raises `DamagedFiles`; reads headers only, until `read`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        self._mapped = 0
        names = self._shard_names()
        for shard in sorted(set(names.values())) if names else [SINGLE]:
            file = self._file(shard)
            for name in file.keys():  # noqa: SIM118 - not a dict
                info = file.get_slice(name)
                self._files[name], self.shapes[name] = shard, tuple(info.get_shape())
                self.dtypes[name] = info.get_dtype()
        for name, shard in names.items():
            if self._files.get(name) != shard:
                raise DamagedFiles(
                    f"{folder / INDEX} says that {shard} holds {name}, and it does not: copy both files again"
                )

    def _shard_names(self) -> dict[str, str]:
        """Tensor -> shard as the index says; empty where the folder has one file only."""
        path = self.folder / INDEX
        if not path.exists():
            if not (self.folder / SINGLE).exists():
                raise DamagedFiles(
                    f"{self.folder} has neither {SINGLE} nor {INDEX}: choose a folder with safetensors weights (older "
                    "formats: load them with transformers and save them again)"
                )
            return {}
        try:
            names = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            foreign = [shard for shard in names.values() if Path(shard).name != shard]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFiles(f"{path} cannot be read ({error!r}): copy it again") from error
        if foreign:
            raise DamagedFiles(f"{path} names {foreign[0]!r}, which is not a file of this folder: copy the index again")
        return names

    def _file(self, shard: str) -> Any:
        if self._open is None or self._open[0] != shard or self._mapped > MAPPED_BYTES:
            self._open, self._mapped = None, 0
            path = self.folder / shard
            try:
                self._open = (shard, safe_open(str(path), framework="pt"))
            except FileNotFoundError as error:
                raise DamagedFiles(f"{path} is missing, and the index names it: copy it into the folder") from error
            except (OSError, SafetensorError) as error:
                raise DamagedFiles(f"{path} is not a whole safetensors file ({error}): copy it again") from error
        return self._open[1]

    def read(self, name: str, region: tuple[slice, ...]) -> torch.Tensor:
        """A region of a tensor as a view into the mapped file: copy it before the next call."""
        piece = self._file(self._files[name]).get_slice(name)[region]
        # A slice of columns touches whole rows.
        row = piece.element_size() * torch.Size(self.shapes[name][1:]).numel()
        self._mapped += row * len(piece)
        return piece


class ShardWriter:
    """Safetensors files of at most `max_shard_size` bytes each, except where one tensor is larger, and their index.

    `add` the tensors in the order given here, then `finish`. Raises OSError where the disk does.
    """

    def __init__(
        self, folder: Path, shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype, max_shard_size: int
    ):
        self.folder, self.dtype = folder, dtype
        self._shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
        filled = self.total = 0
        for name, shape in shapes:
            size = dtype.itemsize * torch.Size(shape).numel()
            if filled and filled + size > max_shard_size:
                self._shards.append([])
                filled = 0
            self._shards[-1].append((name, shape))
            filled += size
            self.total += size
        self._position = (0, 0)
        self._file: IO[bytes] | None = None

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _start(self, shard: int) -> IO[bytes]:
        kind = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self._shards[shard]:
            start, end = end, end + self.dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = open(self.folder / self._name(shard), "wb", buffering=0)  # noqa: SIM115 - closed by `close`
        _write(file, len(text).to_bytes(8, "little") + text)
        return file

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor of the announced name, shape and dtype, on the CPU."""
        shard, number = self._position
        assert (name, tuple(tensor.shape)) == self._shards[shard][number]
        assert tensor.dtype == self.dtype
        if self._file is None:
            self._file = self._start(shard)
        _write(self._file, memoryview(cast(Any, tensor.contiguous().view(-1).view(torch.uint8).numpy())))
        self._position = (shard, number + 1)
        if number + 1 == len(self._shards[shard]):
            self.close()
            self._position = (shard + 1, 0)

    def close(self) -> None:
        """Flush the open file to the disk, if there is one."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
                self._file = None

    def finish(self) -> None:
        """Write the index, if there are several files. All tensors have to be there."""
        assert self._position == (len(self._shards), 0)
        if len(self._shards) > 1:
            names = {name: self._name(i) for i, shard in enumerate(self._shards) for name, _ in shard}
            index = {"metadata": {"total_size": self.total}, "weight_map": names}
            write_synced(self.folder / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file through to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
