"""x_0 and the text encoders' output of a data set, computed once and kept on disk.

    DIR/latents-KEY/00000.safetensors   x0 [R *]: of all images, then of all images mirrored
    DIR/text-KEY/00000.safetensors      what the text encoders make of R captions, by the names of
                                        the denoiser's arguments

x_0 is the mode of the autoencoder, in which nothing is drawn, so that it never changes. KEY is a
hash of all that it depends on: the content of the images and their shape, or the captions; the
files of the autoencoder, or of the text encoders and tokenizers; the kind of device and torch's
version. Batches have the size of those of the training, and the last one is filled up, so that
values are those of `Diffusion.encode` to the bit.

A file carries its key and the hash of its tensors. One that is damaged or of another key is
computed again. The files are mapped into memory and not read into it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from demerge.data import ImageData
from demerge.data.values import as_floats
from demerge.diffusion.components import running
from demerge.diffusion.conditioning import Condition
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.progress import Progress, silent
from demerge.storage.checkpoint import commit_tensors, content_sha256

FILE_BYTES = 1 << 28  # of one file, about
FORMAT = "demerge.encoded/1"
Rows = dict[str, Tensor]


class Encoder(Protocol):
    """What gives x_0 and text to a training."""

    def x0(self, indices: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
        """Return x_0 [B *] of images, some of them mirrored."""

    def text(self, captions: Sequence[str]) -> Condition | None:
        """Return what the denoiser takes of captions; None if it takes no text."""


@dataclass(frozen=True)
class Table:
    """Rows of some tensors, in files of equal numbers of rows.

    Attributes:
        folder: of the files; its name ends in the key.
        count: the number of rows.
        size: bytes of a row.
        batch: the number of rows that are computed at once.
        compute: returns such a number of rows by their numbers.
    """

    folder: Path
    count: int
    size: int
    batch: int
    compute: Callable[[Sequence[int]], Rows] = field(repr=False)

    @property
    def rows_per_file(self) -> int:
        """The number of rows of a file but the last."""
        return self.batch * max(1, FILE_BYTES // (self.size * self.batch))

    @property
    def bytes(self) -> int:
        """The bytes of all rows."""
        return self.count * self.size

    def files(self) -> Iterator[tuple[Path, range]]:
        """Yield each file and the numbers of its rows."""
        step = self.rows_per_file
        for first in range(0, self.count, step):
            path = self.folder / f"{first // step:05d}.safetensors"
            yield path, range(first, min(first + step, self.count))

    def fill(self, report: Callable[[int], None]) -> None:
        """Compute and write the files that are missing or wrong; report rows that are ready."""
        for path, numbers in self.files():
            if self.is_whole(path, numbers):
                report(len(numbers))
                continue
            parts = []
            for start in range(0, len(numbers), self.batch):
                own = list(numbers[start : start + self.batch])
                filled = own + own[-1:] * (self.batch - len(own))
                rows = self.compute(filled)
                parts.append({name: tensor[: len(own)].cpu() for name, tensor in rows.items()})
                report(len(own))
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            record = {"format": FORMAT, "key": self.folder.name, "sha256": content_sha256(tensors)}
            commit_tensors(path, tensors, record)

    def is_whole(self, path: Path, numbers: range) -> bool:
        """Whether a file has these rows of this table; its tensors are read and hashed."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                record = file.metadata() or {}
            tensors = load_file(path)
        except (OSError, safetensors.SafetensorError):
            return False
        return (
            (record.get("format"), record.get("key")) == (FORMAT, self.folder.name)
            and all(len(tensor) == len(numbers) for tensor in tensors.values())
            and record.get("sha256") == content_sha256(tensors)
        )

    def missing(self) -> int:
        """Return the bytes of the files that do not exist; none is read."""
        return self.size * sum(len(rows) for path, rows in self.files() if not path.is_file())

    def open(self) -> list[Rows]:
        """Map all files into memory."""
        return [load_file(path) for path, _ in self.files()]


class EncodedData:
    """The tables of a model and a data set; `prepare` fills and opens them.

    Raises:
        UsageError: if the model has neither an autoencoder nor text encoders.
    """

    def __init__(
        self,
        base: Diffusion,
        data: ImageData,
        folder: str | Path,
        components: Mapping[str, str],
        *,
        batch: int,
        mirrors: bool = False,
    ) -> None:
        """Describe the tables; nothing is read or written.

        Args:
            components: the hash of each file of the model's components, by its path in the folder.
            mirrors: whether mirrored images are encoded too.
        """
        self.base, self.data, self.folder = base, data, Path(folder)
        self.tables: dict[str, Table] = {}
        self._opened: dict[str, list[Rows]] = {}
        self._row_of: dict[str, int] = {}
        common = {"device": base.device.type, "torch": torch.__version__, "batch": batch}
        if base.vae is not None:
            own = {"data": data.fingerprint, "shape": list(data.shape), "mirrors": mirrors}
            key = {**common, **own, "files": _files_of("vae", components)}
            size, count = 4 * math.prod(base.sample_shape), len(data) * (1 + mirrors)
            self._add("latents", key, count, size, batch, self._encode_images)
        if base.text is not None and data.captions is not None:
            captions = sorted({*data.captions, ""})
            self._row_of = {caption: i for i, caption in enumerate(captions)}
            files = _files_of("text_encoder", components) | _files_of("tokenizer", components)
            key = {**common, "captions": captions, "files": files}
            probe = base.text([""])
            size = sum(tensor[0].numel() * tensor.element_size() for tensor in probe.values())
            self._add("text", key, len(captions), size, batch, self._encode_text)
        if not self.tables:
            what = "--cache-latents: the base has no autoencoder and no text encoder"
            raise UsageError(what, fix="leave out --cache-latents")

    def _add(
        self,
        name: str,
        key: Mapping[str, Any],
        count: int,
        size: int,
        batch: int,
        compute: Callable[[Sequence[int]], Rows],
    ) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        folder = self.folder / f"{name}-{digest}"
        self.tables[name] = Table(folder, count, size, batch, compute)

    @property
    def bytes(self) -> int:
        """The bytes of all tables."""
        return sum(table.bytes for table in self.tables.values())

    def missing(self) -> int:
        """Return the bytes of the files that do not exist."""
        return sum(table.missing() for table in self.tables.values())

    def fill(self, progress: Progress = silent) -> None:
        """Compute and write what is missing or wrong."""
        total, done = sum(table.count for table in self.tables.values()), 0
        for name, table in self.tables.items():

            def report(rows: int, name: str = name) -> None:
                nonlocal done
                done += rows
                progress(done, total, f"encoding {name}")

            table.fill(report)

    def open(self) -> None:
        """Map the files into memory; they must be filled."""
        self._opened = {name: table.open() for name, table in self.tables.items()}

    def release(self) -> None:
        """Move the autoencoder and the text encoders to the host: they are not used any more."""
        modules = [] if self.base.vae is None else [self.base.vae]
        modules += [] if self.base.text is None else self.base.text.modules.values()
        for module in modules:
            module.to("cpu")

    def x0(self, indices: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
        """Return x_0 [B *] on the host; without an autoencoder these are the images."""
        if "latents" not in self.tables:
            return as_floats(images_of(self.data, indices, mirrored))
        n = len(self.data)
        numbers = [i + n * flag for i, flag in zip(indices, mirrored, strict=True)]
        return self._rows("latents", numbers)["x0"]

    def text(self, captions: Sequence[str]) -> Condition | None:
        """Return what the denoiser takes of captions, on the host; None if it takes no text."""
        if "text" not in self.tables:
            return None
        return self._rows("text", [self._row_of[caption] for caption in captions])

    def _rows(self, name: str, numbers: Sequence[int]) -> Rows:
        files, per_file = self._opened[name], self.tables[name].rows_per_file
        places = [divmod(number, per_file) for number in numbers]
        return {
            key: torch.stack([files[file][key][row] for file, row in places]) for key in files[0]
        }

    @torch.no_grad()
    def _encode_images(self, numbers: Sequence[int]) -> Rows:
        n, base = len(self.data), self.base
        images = images_of(self.data, [i % n for i in numbers], [i >= n for i in numbers])
        with running(f"{base.folder}/vae"):
            return {"x0": base.family.encode(as_floats(images.to(base.device)))}

    @torch.no_grad()
    def _encode_text(self, numbers: Sequence[int]) -> Rows:
        captions = list(self._row_of)
        assert self.base.text is not None
        return self.base.text([captions[i] for i in numbers])


class Blank:
    """Zeros in the place of encoded data, to measure a step before anything is encoded."""

    def __init__(self, base: Diffusion) -> None:
        self.shape = base.sample_shape
        self.probe = None if base.text is None else base.text([""])

    def x0(self, indices: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
        """Return zeros of the shape of x_0."""
        return torch.zeros(len(indices), *self.shape)

    def text(self, captions: Sequence[str]) -> Condition | None:
        """Return the text encoders' output for an empty caption."""
        if self.probe is None:
            return None
        n = len(captions)
        return {key: row.cpu().expand(n, *row.shape[1:]) for key, row in self.probe.items()}


def images_of(data: ImageData, indices: Sequence[int], mirrored: Sequence[bool] | Tensor) -> Tensor:
    """Return images uint8 [B C H W], some of them mirrored."""
    images, marked = data.images(indices), torch.as_tensor(mirrored, dtype=torch.bool)
    images[marked] = images[marked].flip(-1)
    return images


def _files_of(part: str, components: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of the components whose name begins so."""
    return {path: digest for path, digest in components.items() if path.startswith(part)}
