"""One end of a stream, with patience: the same for the server and for its sites.

Whatever goes wrong with the connection is one exception, :class:`Broken`, so that both ends can
tell it from what the other end says.
"""

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
from flwr.app import RecordDict

from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import chunks
from fedft.core.link.limits import TooLong, bounded

_EOF: Any = vars(grpc.aio)["EOF"]  # public, and not in the types


class Broken(Exception):
    """The other end left, went silent, takes nothing or makes no sense; says which.

    Attributes:
        code: gRPC's status, where there was one.
    """

    def __init__(self, why: str, code: grpc.StatusCode | None = None) -> None:
        super().__init__(why)
        self.code = code


class Overlong(Broken):
    """The other end sent a text that is longer than any that belongs there; says which."""


class Pipe:
    """Reads and writes whole messages on one stream. One reader; any number of writers.

    Args:
        call: a gRPC stream, as a client or as the context of a server's method.
        outgoing: what this end sends.
        stall: seconds for which the other end may take nothing that is written.
    """

    def __init__(self, call: Any, outgoing: type[pb.FromSite | pb.FromServer], stall: float):
        self._call = call
        self._outgoing = outgoing
        self._stall = stall
        self._writing = asyncio.Lock()
        self._heard = time.monotonic()
        self._reading = False

    @property
    def quiet_s(self) -> float:
        """Seconds since the other end last said anything."""
        return time.monotonic() - self._heard

    async def read(self, silence: float) -> Any:
        """The next message, within ``silence`` seconds.

        Raises:
            Broken: none came.
            Overlong: one did whose texts are not within :data:`~fedft.core.link.limits.LIMITS`.
        """
        self._reading = True
        try:
            async with asyncio.timeout(silence):
                with _broken_alone():
                    message = await self._call.read()
        except TimeoutError:
            raise Broken(f"nothing was heard for {silence:.0f} s") from None
        finally:
            self._reading = False
        if message is _EOF:
            raise Broken("the other side ended the stream")
        self._heard = time.monotonic()
        try:
            return bounded(message)
        except TooLong as error:
            raise Overlong(f"the other side sent too much: {error}") from None

    async def say(self, **body: Any) -> None:
        """Write one message, given as its one field.

        Raises:
            Broken: it is not taken.
        """
        async with self._writing:
            try:
                async with asyncio.timeout(self._stall):
                    with _broken_alone():
                        await self._call.write(self._outgoing(**body))
            except TimeoutError:
                raise Broken(f"the other side took nothing for {self._stall:.0f} s") from None

    async def send(self, content: RecordDict) -> None:
        """Write the tensors of a content whose header was said before."""
        for data in chunks(content):
            await self.say(chunk=pb.Chunk(data=data))

    async def beat(
        self, every: float, made: Callable[[], pb.Heartbeat] = lambda: pb.Heartbeat()
    ) -> None:
        """Write a heartbeat every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(every)
            await self.say(heartbeat=made())

    async def part(self, linger: float) -> None:
        """Write nothing more, and wait until the other end has hung up.

        Hanging up at once could overtake the last word. For clients.

        Raises:
            TimeoutError: it did not within ``linger`` seconds.
            Broken: the stream has ended before that.
        """
        with _broken_alone():
            await self._call.done_writing()
        if self._reading:  # somebody else sees the end
            await asyncio.sleep(linger)
            return
        async with asyncio.timeout(linger):
            with _broken_alone():
                while await self._call.read() is not _EOF:
                    pass


async def first_to_end(*work: Any) -> None:
    """Run coroutines until one of them ends, and raise what it raised."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@contextmanager
def _broken_alone() -> Generator[None]:
    """Whatever gRPC raises inside is :class:`Broken`.

    That includes a cancellation which is not the task's own: a reader that has waited too long gives up
    the call, and gRPC cancels whoever is at a write of it.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        details = (error.details() or "")[:200]
        why = f"no connection ({error.code().name.lower()}: {details})"
        raise Broken(why, error.code()) from None
    except asyncio.InvalidStateError:
        raise Broken("the stream has ended") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Broken("the stream has ended") from None
