"""The semaphore and the gate that bound downloads."""

import asyncio

import pytest
from web_server import serve

from pipeline.ingest.backpressure import AdmissionGate, PrioritySemaphore
from pipeline.ingest.http_client import Fetcher, FetchRules

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def test_no_request_starts_while_too_many_bodies_wait(server):
    def begun() -> int:
        return sum(server.requests[f"good/{n}?gate"] for n in range(3, 30))

    async def run() -> None:
        gate, decoded = AdmissionGate(3), asyncio.Event()
        async with Fetcher(FetchRules(allow_private=True, concurrency=50, per_host=50), gate) as fetcher:

            async def one(n: int) -> None:
                await fetcher.get(f"{server.url}/good/{n}?gate")
                async with gate.decoding():
                    await decoded.wait()

            first = [asyncio.create_task(one(n)) for n in range(3)]
            while gate.waiting < 3:
                await asyncio.sleep(0.01)
            others = [asyncio.create_task(one(n)) for n in range(3, 30)]
            await asyncio.sleep(0.3)
            assert begun() == 0
            others[5].cancel()
            decoded.set()
            await asyncio.gather(*first, *others, return_exceptions=True)
            assert begun() == 26

    asyncio.run(run())


def test_slots_go_to_the_earliest_request_also_at_a_second_try():
    async def run() -> list[int]:
        slots = PrioritySemaphore(1)
        served = list[int]()

        async def one(number: int) -> None:
            async with slots.hold(number):
                served.append(number)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one(number)) for number in (5, 9, 7, 1, 8, 3)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(5), slots.hold(0):
            return served

    assert asyncio.run(run()) == [5, 1, 3, 8, 9]
