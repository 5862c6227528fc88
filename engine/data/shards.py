"""The shards of a streamed data set: which there are, how many samples they hold, and reading one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from ..errors import DataError
from .remote import Cache, Copy, Stream, is_remote
from .samples import FileSample
from .sources import braces, expand_sources
from .tars import DAMAGE, open_tar, read_shard, tar_of, tar_samples, wanted_members, without_ending

ASKERS = 16
"""Threads that ask for the sizes of shards."""


def expand_shards(sources: Iterable[str | Path]) -> list[str]:
    """Addresses, commands and local paths of all shards, each once, in the order given.

    Brace ranges (`{00000..00331}`) in addresses and commands, and all that `sources.expand_sources` knows, are
    expanded. Raises DataError where a local source names nothing.
    """
    found: list[str] = []
    for source in map(str, sources):
        found += braces(source) if is_remote(source) else map(str, expand_sources(source))
    if not found:
        raise DataError("data.train names no shard")
    return list(dict.fromkeys(found))


def count_samples(shards: list[str]) -> list[int]:
    """Samples of each shard: from img2dataset's `_stats.json` beside it, or else by the headers of a local tar.

    Raises DataError where there is neither.
    """
    with ThreadPoolExecutor(ASKERS) as pool:
        return list(pool.map(_count, shards))


def _count(shard: str) -> int:
    if shard.startswith("pipe:"):
        raise DataError(f"{shard}: how many samples a command gives cannot be known; set data.samples")
    beside = without_ending(shard) + "_stats.json"
    try:
        if is_remote(shard):
            with closing(Stream(beside)) as stream:
                content = stream.read()
        else:
            content = Path(beside).read_bytes()
        return int(json.loads(content)["successes"])
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        if is_remote(shard):
            raise DataError(
                f"{shard}: no {beside.rpartition('/')[2]} beside it says how many samples it holds; set data.samples"
            ) from error
        return _count_headers(Path(shard))


def _count_headers(path: Path) -> int:
    """Runs of members of the same name, as `tars.tar_samples` finds them."""
    count, key, extensions = 0, None, set[str]()
    with open_tar(path) as (tar, _):
        try:
            for _, name, extension in wanted_members(tar):
                if name != key or extension in extensions:
                    count, key, extensions = count + 1, name, set()
                extensions.add(extension)
        except DAMAGE:
            pass  # what lies before the damage counts
    return count


def read_any(shard: str, cache: Cache | None) -> Iterator[FileSample]:
    """The samples of a local or remote shard, in order.

    Raises DataError where it cannot be opened or reached, ShardDamaged where it breaks off or becomes unreadable.
    """
    local = Path(shard) if not is_remote(shard) else cache.find(shard) if cache else None
    if local is not None:
        try:
            yield from read_shard(local)
        except DataError:
            if not is_remote(shard) or local.exists():
                raise
            yield from _read_stream(shard, cache)  # another process removed it from the cache just now
        return
    yield from _read_stream(shard, cache)


def _read_stream(shard: str, cache: Cache | None) -> Iterator[FileSample]:
    copy = Copy(cache, shard) if cache else None
    stream = Stream(shard, copy.write) if copy else Stream(shard)
    try:
        with tar_of(stream, shard) as tar:  # type: ignore[arg-type]
            yield from tar_samples(tar, shard, lambda: None)
        while stream.read(1 << 20):  # the padding behind the archive's end
            pass
    finally:
        stream.close()
        if copy:
            copy.finish(stream.ended)
