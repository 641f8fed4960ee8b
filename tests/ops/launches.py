"""Assertions about launches that the emulator has logged with `--emulation races`."""


def assert_moves_at_most(launches, read, written):
    """Assert that the launches read and write at most a tenth and 4 KiB more bytes than `read` and `written`.

    `read` and `written` are the bytes that any implementation of the op must move. The margin is for labels, partial
    sums and ground-truth boxes. A read counts only if it misses a small cache.
    """
    assert sum(launch.traffic.bytes_fetched for launch in launches) <= 1.1 * read + 4096, launches
    assert sum(launch.traffic.bytes_written for launch in launches) <= 1.1 * written + 4096, launches


def assert_streams(launches, reads=True, writes=True):
    """Assert that nine tenths of the bytes move by 16-byte accesses."""
    traffic = [launch.traffic for launch in launches]
    if reads:
        assert 16 * sum(t.wide_reads for t in traffic) >= 0.9 * sum(t.bytes_read for t in traffic), launches
    if writes:
        assert 16 * sum(t.wide_writes for t in traffic) >= 0.9 * sum(t.bytes_written for t in traffic), launches
