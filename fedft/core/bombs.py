"""A small file that unpacks into a large one: told before memory is full of it.

How much may come of a file is in proportion to its size on disk: no table of text, numbers or
images that anybody means to train on is compressed a hundredfold, but a short one may be.
"""

# pyright: standard
# pyarrow has no types.
import os
from typing import Any

from fedft.core.errors import MismatchError
from fedft.core.extras import extra
from fedft.core.files import MIB

ALWAYS = 256 * MIB
"""Bytes that may come of any file."""
RATIO = 100


def most_of(size: int) -> int:
    """Bytes that may come of a file.

    Args:
        size: of the file, in bytes.
    """
    return max(ALWAYS, RATIO * size)


def bomb(source: str, size: int) -> MismatchError:
    """The error for a file out of which more comes."""
    return MismatchError(
        f"{source} has {size:,} bytes and unpacks into more than {most_of(size):,}, which no data "
        "set does that is meant to be trained on",
        fix="Look at what it holds; if all of it is meant, give it uncompressed, as CSV or JSON lines.",
    )


class Unpacked:
    """A stream that stops where more comes out of it than can be meant.

    Args:
        stream: unpacks while it is read.
        source: of the file, for the error.
        size: of the file, in bytes.
    """

    def __init__(self, stream: Any, source: str, size: int) -> None:
        self._stream = stream
        self._source = source
        self._size = size
        self._left = most_of(size)

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes, or all that are left."""
        if size is None or size < 0:
            size = self._left + 1
        return self._counted(self._stream.read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes, to the end of the line."""
        if size is None or size < 0:
            size = self._left + 1
        return self._counted(self._stream.readline(size))

    def seek(self, offset: int, /) -> int:
        """Go to a place; what comes from there counts anew."""
        self._left = most_of(self._size) - offset
        return self._stream.seek(offset, os.SEEK_SET)

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise bomb(self._source, self._size)
        return data


def read_parquet(source: str, data: bytes) -> Any:
    """A Parquet file as a table whose texts are still in dictionaries.

    A column of one text, repeated, takes a few bytes in the file and a text a row in memory. So the
    values are counted by the file's own metadata first, and their texts by their length in the
    dictionary, before one is made.

    Raises:
        MismatchError: more would come of it than can be meant.
        pyarrow.ArrowException, OSError: it is no readable Parquet file.
    """
    import io

    with extra("data", f"{source} is a Parquet file"):
        import pyarrow.parquet as parquet

    about = parquet.ParquetFile(io.BytesIO(data)).metadata
    values = sum(
        about.row_group(i).column(j).num_values
        for i in range(about.num_row_groups)
        for j in range(about.num_columns)
    )
    if 8 * max(values, about.num_rows) > most_of(len(data)):
        raise bomb(source, len(data))
    leaves = [about.schema.column(j) for j in range(about.num_columns)]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    table = parquet.ParquetFile(io.BytesIO(data), read_dictionary=texts).read()
    total = sum(_decoded(chunk) for column in table.columns for chunk in column.chunks)
    if total > most_of(len(data)):
        raise bomb(source, len(data))
    return table


def _decoded(array: Any) -> int:
    """Bytes of an array once no value stands for several, as Python's objects would hold them."""
    with extra("data", "a Parquet file is read by it"):
        import pyarrow as pa
        import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)  # pyright: ignore[reportAttributeAccessIssue]
        found = pc.sum(pc.cast(pc.take(lengths, array.indices), pa.int64()))  # pyright: ignore[reportAttributeAccessIssue]
        return int(found.as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(_decoded(array.field(i)) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        return _decoded(array.values if hasattr(array, "values") else array.flatten())
    return int(array.nbytes)
