"""Actions and rewards of many recordings, at any rows.

Legend: B batch, R recordings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchrl_sql.data.mapping import MappedFile, UnreadableRangeError, read_ranges
from torchrl_sql.data.recording import MEMBERS, Recording, never_written


class ScalarReader:
    """Reads one flat file of several recordings at any rows, in one go whatever their number.

    Args:
        recordings (sequence of Recording): ``R`` recordings.
        key (str): the file, of :data:`MEMBERS`.

    Raises:
        ValueError: if a file is missing or shorter than its manifest says.
    """

    def __init__(self, recordings: Sequence[Recording], key: str) -> None:
        self._key, self._dtype = key, MEMBERS[key][1]
        self._files = [recording.member_file(key) for recording in recordings]
        self._mappings = [
            MappedFile(file) if recording.num_steps else None
            for file, recording in zip(self._files, recordings, strict=True)
        ]
        self._address = np.array([0 if mapping is None else mapping.address for mapping in self._mappings], np.int64)

    def read(self, recording: np.ndarray, row: np.ndarray, span: np.ndarray) -> np.ndarray:
        """The values of ``span`` rows (int64 ``[B]``) from ``row`` on (int64 ``[B]``) of each recording (int ``[B]``).

        Returns:
            ``[sum of span]``, one after the other; valid until the next read in this thread.

        Raises:
            ValueError: if a file cannot be read any more, or has values that no writer accepts.
        """
        item_bytes = self._dtype.itemsize
        try:
            data = read_ranges(self._address[recording] + item_bytes * row, item_bytes * span)
        except UnreadableRangeError as error:
            raise ValueError(f"{self._files[recording[error.index]]}: {error}") from error
        values = data.view(self._dtype)
        if len(positions := never_written(self._key, values)):
            ends, position = np.cumsum(span), positions[0]
            index = np.searchsorted(ends, position, side="right")
            bad_row = row[index] + span[index] - (ends[index] - position)
            raise ValueError(f"{self._files[recording[index]]} is damaged: row {bad_row} is {values[position]}")
        return values
