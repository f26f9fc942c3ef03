"""One end of a stream against gRPC itself: whose cancellation it is that comes up in a write or a read."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from fedft.core.link import link_pb2 as pb
from fedft.core.link import link_pb2_grpc
from fedft.core.link.stream import Broken, Pipe

pytestmark = pytest.mark.grpc


class Silent(link_pb2_grpc.FederationServicer):
    """It says nothing, for as long as anybody listens."""

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.FromServer]:
        await asyncio.sleep(60)
        yield pb.FromServer()


def with_pipe(scene: Callable[[Pipe], Awaitable[None]]) -> None:
    async def play() -> None:
        server = grpc.aio.server()
        link_pb2_grpc.add_FederationServicer_to_server(Silent(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = link_pb2_grpc.FederationStub(channel).Session()
                await scene(Pipe(call, pb.FromSite, 5.0))
        finally:
            await server.stop(None)

    asyncio.run(play())


def test_a_reader_that_gives_up_leaves_a_broken_stream_to_writers_and_readers() -> None:
    """Not a cancellation: nobody cancelled them, and what awaits them would end without a word."""

    async def scene(pipe: Pipe) -> None:
        await pipe.say(heartbeat=pb.Heartbeat())
        with pytest.raises(Broken, match="nothing was heard"):
            await pipe.read(0.2)
        for _ in range(2):
            with pytest.raises(Broken):
                await pipe.say(heartbeat=pb.Heartbeat())
        with pytest.raises(Broken):
            await pipe.read(0.2)
        with pytest.raises(Broken):
            await pipe.part(0.2)

    with_pipe(scene)


def test_a_heart_that_beats_meanwhile_ends_as_a_broken_stream() -> None:
    """Some time later gRPC has noted the end of the call, and says so in another way."""

    async def scene(pipe: Pipe) -> None:
        heart = asyncio.create_task(pipe.beat(0.3))
        with pytest.raises(Broken, match="nothing was heard"):
            await pipe.read(0.2)
        with pytest.raises(Broken):
            await heart

    with_pipe(scene)


def test_who_is_cancelled_is_cancelled() -> None:
    """The control: a task's own cancellation is none of the stream's business."""

    async def scene(pipe: Pipe) -> None:
        await pipe.say(heartbeat=pb.Heartbeat())
        reader = asyncio.create_task(pipe.read(30.0))
        await asyncio.sleep(0.1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert reader.cancelled()

    with_pipe(scene)
