"""Documents of anything that ``datasets.load_dataset`` reads; the only import of that library."""

from collections.abc import Iterator

import datasets

from data.config import HubConfig
from data.errors import DataError
from data.manifest import Settings
from data.text import Document, record_text


class HubSource:
    """The rows of one split."""

    def __init__(self, name: str, *, config: HubConfig, text_key: str) -> None:
        """Open the dataset ``name``.

        Raises:
            DataError: It is not there, has no such config or split, or cannot be downloaded.
        """
        self._name = name
        self._text_key = text_key
        try:
            self._rows = datasets.load_dataset(
                name,
                config.config,
                split=config.split,
                streaming=config.streaming,
                data_files=config.data_files,
                data_dir=config.data_dir,
                revision=config.revision,
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"source=hf:{name}: cannot be loaded: {_first_line(error)}") from error
        self.description = f"hf:{name}"
        self.settings: Settings = {
            "source": f"hf:{name}",
            "text_key": text_key,
            "hub.config": config.config,
            "hub.split": config.split,
            "hub.data_files": config.data_files,
            "hub.data_dir": config.data_dir,
            "hub.revision": config.revision,
        }

    def documents(self, start: int) -> Iterator[Document]:
        """Rows from number ``start`` on."""
        rows = iter(self._rows.skip(start) if start else self._rows)
        number = start
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise DataError(f"hf:{self._name}: row {number} cannot be read: {_first_line(error)}") from error
            where = f"row {number} of hf:{self._name}"
            yield Document(number=number, text=record_text(row, text_key=self._text_key, where=where))
            number += 1


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
