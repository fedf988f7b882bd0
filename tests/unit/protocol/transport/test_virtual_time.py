import asyncio
import socket
import time
import weakref

import pytest

from protocol.transport import virtual_time
from protocol.transport.virtual_time import VIRTUAL_EPOCH_S, VirtualDeadlockError, virtual_clock


def test_hours_pass_in_no_time():
    async def main():
        loop = asyncio.get_running_loop()
        await asyncio.sleep(4 * 3600)
        return loop.time(), virtual_clock()(), virtual_clock(-300)()

    began = time.perf_counter()
    loop_s, unix_s, skewed_s = virtual_time.run(main())
    assert time.perf_counter() - began < 5
    assert loop_s == pytest.approx(4 * 3600)
    assert unix_s == pytest.approx(VIRTUAL_EPOCH_S + 4 * 3600)
    assert skewed_s == unix_s - 300


def test_timers_fire_in_the_order_of_their_times():
    async def main():
        fired = []

        async def wait(delay_s):
            await asyncio.sleep(delay_s)
            fired.append((delay_s, asyncio.get_running_loop().time()))

        await asyncio.gather(*(wait(delay_s) for delay_s in (3.0, 1.0, 2.5, 1e5, 1e-6, 1.0 + 1e-6)))
        return fired

    fired = virtual_time.run(main())
    assert [delay_s for delay_s, _ in fired] == [1e-6, 1.0, 1.0 + 1e-6, 2.5, 3.0, 1e5]
    assert all(at_s == pytest.approx(delay_s, rel=1e-9) for delay_s, at_s in fired)


def test_timers_of_one_time_fire_in_the_order_in_which_they_were_set():
    async def main():
        loop, fired = asyncio.get_running_loop(), []
        at_s = loop.time() + 1
        for number in range(50):
            loop.call_at(at_s, fired.append, number)
        await asyncio.sleep(2)
        return fired

    assert virtual_time.run(main()) == list(range(50))


def test_cancelled_timers_neither_fire_nor_stay_in_memory():
    async def main():
        loop, fired = asyncio.get_running_loop(), []
        kept = [loop.call_later(10 + number, fired.append, number) for number in range(20)]
        cancelled = []
        for _ in range(50):
            timers = [loop.call_later(1000, fired.append, None) for _ in range(100)]
            cancelled += [weakref.ref(timer) for timer in timers]
            for timer in timers:
                timer.cancel()
            del timers, timer
            await asyncio.sleep(0.01)
        num_in_memory = sum(ref() is not None for ref in cancelled)
        kept[3].cancel()
        await asyncio.sleep(2000)
        return fired, num_in_memory

    fired, num_in_memory = virtual_time.run(main())
    assert fired == [number for number in range(20) if number != 3]
    assert num_in_memory < 500


def test_a_timeout_is_virtual_too():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(600):
                await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == pytest.approx(600)


def test_waiting_for_what_can_never_happen_is_loud():
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(VirtualDeadlockError, match="nothing can ever happen"):
        virtual_time.run(main())


def test_time_stands_still_while_a_thread_works():
    async def main():
        ticks = []

        async def tick():
            while True:
                await asyncio.sleep(1)
                ticks.append(None)

        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0)
        result = await asyncio.to_thread(lambda: (time.sleep(0.05), "done")[1])
        ticking.cancel()
        return result, len(ticks), asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == ("done", 0, 0.0)


def test_sockets_are_refused():
    async def main():
        one, other = socket.socketpair()
        with one, other:
            one.setblocking(False)
            with pytest.raises(RuntimeError, match="virtual time"):
                await asyncio.get_running_loop().sock_recv(one, 1)

    virtual_time.run(main())


def test_an_error_and_what_is_left_behind_are_cleaned_up():
    cancelled = []

    async def background():
        try:
            await asyncio.sleep(1e9)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main():
        asyncio.get_running_loop().task = asyncio.create_task(background())
        await asyncio.sleep(1)
        raise KeyError("bug")

    with pytest.raises(KeyError):
        virtual_time.run(main())
    assert cancelled == [True]
