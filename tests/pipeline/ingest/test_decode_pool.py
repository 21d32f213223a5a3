"""Decoder processes: their answers, crashes, timeouts, and processes that do not start."""

import asyncio
import os
import signal
import time

import pytest

from pipeline.ingest import decode_pool
from pipeline.ingest.decode_pool import DecodePool, DecoderFailed
from shards_spec.files import UserError

pytestmark = pytest.mark.integration


def answer(data: bytes) -> bytes:
    """What the processes of these tests do."""
    if data.startswith(b"crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"hang"):
        time.sleep(60)
    return data[::-1]


def converted(jobs: list[bytes], number: int = 2, timeout_s: float = 20.0) -> list[bytes | str]:
    async def one(pool: DecodePool, data: bytes) -> bytes | str:
        try:
            return await pool.convert(data)
        except DecoderFailed as error:
            return str(error)

    async def run() -> list[bytes | str]:
        async with DecodePool(answer, number, timeout_s) as pool:
            return list(await asyncio.gather(*(one(pool, data) for data in jobs)))

    return asyncio.run(run())


def test_answers_are_those_of_their_images():
    jobs = [bytes([n]) * (n * 7919 % 300_000) + b"x" for n in range(100)]
    assert converted(jobs) == [job[::-1] for job in jobs]


def test_a_crash_fails_only_the_image_that_caused_it():
    jobs = [b"crash" if n % 10 == 5 else b"good %d" % n for n in range(40)]
    assert converted(jobs) == ["decoder crashed" if job == b"crash" else job[::-1] for job in jobs]


def test_an_image_that_takes_too_long_fails_alone():
    jobs = [b"hang" if n == 3 else b"good %d" % n for n in range(12)]
    assert converted(jobs, timeout_s=2.0) == ["decoding took too long" if job == b"hang" else job[::-1] for job in jobs]


def never_called(data: bytes) -> bytes:
    raise AssertionError


def test_processes_that_cannot_start_are_a_bug_not_a_loop(monkeypatch):
    monkeypatch.setattr(decode_pool, "_serve", os.abort)  # not picklable as a target with arguments: dies at once

    async def run() -> None:
        async with DecodePool(never_called, 1, 5.0) as pool:
            await pool.convert(b"x")

    with pytest.raises(UserError, match="5 decoder processes died before they answered once, the last with exit code"):
        asyncio.run(run())
