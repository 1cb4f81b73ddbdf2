"""TensorBoard: the numbers and histograms of a run as event files in `<folder>/tensorboard`, one a process.

Written without torch. Alerts, results, tables and models have no form here: the report and W&B hold them.
"""

import time
from pathlib import Path
from typing import Any

from alignment.tracked_items import Histogram, Item, Record
from alignment.tracked_marks import Marks


class TensorboardWriter:
    """Appends event files; each record is on the disk before it is marked."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._marks = Marks(folder / "logged.txt")
        self._file = EventFileWriter(str(folder))

    def has(self, item: Item) -> bool:
        """Whether the item was written."""
        return item.mark in self._marks

    def write(self, item: Item) -> None:
        """Write a record; anything else is passed over."""
        if not isinstance(item, Record):
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in item.points.items()]
        values += [Summary.Value(tag=name, histo=_histogram(found)) for name, found in item.histograms.items()]
        self._file.add_event(Event(wall_time=time.time(), step=item.step, summary=Summary(value=values)))
        self._file.flush()
        self._marks.add(item.mark)

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        del failed
        self._file.close()


def _histogram(found: Histogram) -> Any:
    from tensorboard.compat.proto.histogram_pb2 import HistogramProto

    return HistogramProto(
        min=found.edges[0],
        max=found.edges[-1],
        num=sum(found.counts),
        sum=found.total,
        sum_squares=found.squares,
        bucket_limit=found.edges[1:],
        bucket=found.counts,
    )
