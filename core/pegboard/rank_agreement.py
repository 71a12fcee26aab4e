"""What all ranks have to see alike before they train together, whatever machine they are on.

Each rank reads the data for itself, and machines may hold other copies of it. A rank with other samples
would train on packs that don't belong to the others', and the others would wait for it where it has fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

from pegboard.commit import gather_from_ranks
from pegboard.epoch_plan import DataSource
from pegboard.errors import DataError

__all__ = ["check_same_data"]


def check_same_data(sources: Sequence[DataSource]) -> None:
    """Whether every rank has the same samples. Collective.

    Raises:
        DataError: on all ranks; the first dataset of which a rank has others than rank 0.
    """
    ours = [(len(source.store), source.store.content_identity()) for source in sources]
    first, *others = gather_from_ranks(ours)
    for rank, theirs in enumerate(others, start=1):
        for source, expected, found in zip(sources, first, theirs, strict=True):
            if found != expected:
                raise DataError(
                    f"dataset {source.name!r}: rank {rank} has other samples ({found[0]:,}) than rank 0 "
                    f"({expected[0]:,}); give all machines the same data files, and remove a cache_dir "
                    "that was made of others"
                )
