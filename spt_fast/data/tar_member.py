"""One image inside a tar file, read where it lies."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from spt_fast.errors import InputError, MissingFileError

from .images import decode_image


@dataclass(frozen=True, slots=True)
class TarMember:
    """Where one member of an uncompressed tar file lies, so that it can be read without reading the rest.

    The name is for people: no path is ever made of it. ``str(member)`` is ``shard: name``.

    Args:
        path: the tar file.
        offset: the first byte of the content in that file.
        size: the bytes of the content.
        name: the name of the member in the archive.

    Example:
        >>> import tarfile, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (4, 2), "red").save(folder / "square.png")
        >>> with tarfile.open(folder / "train-0.tar", "w") as archive:
        ...     archive.add(folder / "square.png", "a/0.png")
        >>> with tarfile.open(folder / "train-0.tar") as archive:
        ...     found = archive.getmember("a/0.png")
        >>> member = TarMember(folder / "train-0.tar", found.offset_data, found.size, found.name)
        >>> print(member, member.read_image().size)
        train-0.tar: a/0.png (4, 2)
    """

    path: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path.name}: {self.name}"

    def fingerprint(self) -> str:
        """What changes when the content may have changed: the shard's name, size and time, and the place in it.

        Raises:
            MissingFileError: there is no such tar file.
        """
        try:
            shard = self.path.stat()
        except FileNotFoundError:
            raise MissingFileError(f"tar file {self.path} does not exist") from None
        # Only the last part may contain a slash, so that no two places have the same fingerprint.
        return f"{self.path.name}/{shard.st_size}/{shard.st_mtime_ns}/{self.offset}/{self.name}"

    def read_bytes(self) -> bytes:
        """The content.

        Raises:
            MissingFileError: there is no such tar file.
            InputError: it cannot be read, or ends before the member does.
        """
        try:
            with self.path.open("rb") as shard:
                shard.seek(self.offset)
                content = shard.read(self.size)
        except FileNotFoundError:
            raise MissingFileError(f"tar file {self.path} does not exist") from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be read at {self.name!r}: {error}") from error
        if len(content) < self.size:
            raise InputError(f"{self.path} ends inside {self.name!r}, expected {self.size} bytes of it")
        return content

    def read_image(self) -> Image.Image:
        """The image, decoded to RGB as by :func:`spt_fast.data.read_image`.

        Raises:
            MissingFileError: there is no such tar file.
            InputError: it cannot be read, or the content is no whole image.
        """
        return decode_image(io.BytesIO(self.read_bytes()), f"{self.path}: {self.name!r}")
