"""Readers of parquet files and of datasets that `datasets` saved: each yields its documents, as iterators of pieces.

Their packages, the extra `illada[data]`, are imported when a source needs them.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from illada.data.sources.folder_kinds import folder_kind
from illada.data.sources.records import in_pieces, no_column
from illada.text.files import InputError
from illada.text.unpacking import open_unpacked

_ROWS = 16  # in memory at a time
_PAGE = 1 << 16  # bytes of a column read at a time
_MAGIC = b"PAR1"


def read_parquet(path: Path, column: str) -> Iterator[Iterator[str]]:
    """Yield the texts of a column of a parquet file, some rows at a time; null is no text."""
    arrow = _import("pyarrow", f"{path} is a parquet file")
    parquet = _import("pyarrow.parquet", f"{path} is a parquet file")
    with _seekable(path) as file:
        try:
            table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_PAGE)
            schema = table.schema_arrow
            if column not in schema.names:
                raise no_column(f'{path}: expected a column "{column}"', column, schema.names)
            _check_type(schema.field(column).type, column, str(path), arrow)
            batches = table.iter_batches(_ROWS, columns=[column], use_threads=False)
            yield from _texts((batch.column(0) for batch in batches), str(path))
        except (arrow.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged, or no parquet file: {error!s:.200}", "damaged") from None


def read_saved(path: Path, column: str, name: str) -> Iterator[Iterator[str]]:
    """Yield the texts of a column of a dataset on disk; null is no text.

    Args:
        path: the folder; behind a # the split, where there is no folder of that name.
        column: the column.
        name: of the source, for errors.
    """
    where, split = path, ""
    if not path.exists():
        before, _, split = str(path).rpartition("#")
        where = Path(before) if before else path
        split = split if before else ""
    if not where.is_dir():
        raise FileNotFoundError(
            f"source {name!r}: {where} is not a folder; "
            "hf:PATH reads what datasets.load_dataset(NAME, split=...).save_to_disk(PATH) wrote"
        )
    if folder_kind(where) != "a saved dataset":
        raise ValueError(
            f"source {name!r}: {where} is no dataset of save_to_disk; dir:PATH reads parquet, csv and jsonl"
        )
    arrow = _import("pyarrow", f"source {name!r} is a saved dataset")
    datasets = _import("datasets", f"source {name!r} is a saved dataset")
    try:
        data = datasets.load_from_disk(str(where))
    except MemoryError:
        raise
    except Exception as error:  # of any kind: datasets checks nothing that it reads
        raise InputError(f"{where} is damaged: {type(error).__name__}: {error!s:.200}", "damaged") from None
    if isinstance(data, dict):
        split = split or "train"
        if split not in data:
            listed = ", ".join(map(str, data))
            raise ValueError(f"source {name!r}: {where} has no split {split}; there is {listed} (hf:PATH#SPLIT)")
        data = data[split]
    elif split:
        raise ValueError(f"source {name!r}: {where} is one split, which has no name: leave out #{split}")
    if column not in data.column_names:
        raise no_column(f'{where}: expected a column "{column}"', column, data.column_names)
    _check_type(data.features.arrow_schema.field(column).type, column, str(where), arrow)
    batches = data.select_columns([column]).with_format("arrow").iter(_ROWS)
    try:
        yield from _texts((chunk for batch in batches for chunk in batch.column(0).chunks), str(where))
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{where} is damaged: {error!s:.200}", "damaged") from None


def _texts(columns: Iterator[Any], where: str) -> Iterator[Iterator[str]]:
    row = 0
    for values in columns:
        for value in values:
            row += 1
            try:
                text = value.as_py()
                text = text.decode() if isinstance(text, bytes) else text
            except UnicodeDecodeError as error:
                message = f"{where}, row {row} is not UTF-8 text: byte 0x{error.object[error.start]:02x}"
                raise InputError(f"{message} at position {error.start}", "not UTF-8") from None
            if text and not text.isspace():
                yield in_pieces(text)


def _check_type(kind: Any, column: str, where: str, arrow: Any) -> None:
    """Raise InputError if values of an Arrow type are neither strings nor bytes."""
    values = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if str(values) not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        raise InputError(f'{where}: column "{column}" must hold strings, it holds {kind!s:.80}', "damaged")


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[Any]:
    """Open a file whose end is read first, unpacked to a temporary file if it is compressed."""
    with open_unpacked(path) as file:
        if file.peek(4)[:4] == _MAGIC and file.seekable():
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            unpacked.seek(0)
            yield unpacked


def _import(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what}: pip install 'illada[data]' ({error})") from None
