"""A router's Announce service that remembers what it heard."""

import asyncio

import grpc.aio

from twostroke.core.guard import Guard
from twostroke.kv.keys import proof_key
from twostroke.protos import worker_pb2, worker_pb2_grpc

KEY = proof_key("a key of the tests")


class Ear(worker_pb2_grpc.AnnounceServicer):
    """Answers every announcement of who knows `KEY`."""

    def __init__(self):
        self.heard = []
        self.changed = asyncio.Event()

    async def Announce(self, requests, context):
        async for message in requests:
            self.heard.append(message)
            self.changed.set()
            yield worker_pb2.AnnounceReply(router_id="ear", sequence=message.sequence)

    async def until(self, condition, timeout_s=60.0):
        async def wait():
            while not condition(self.heard):
                self.changed.clear()
                await self.changed.wait()

        await asyncio.wait_for(wait(), timeout_s)

    async def listen(self, address="127.0.0.1:0"):
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)], interceptors=[Guard(KEY, "ear")])
        worker_pb2_grpc.add_AnnounceServicer_to_server(self, server)
        host, port = address.rpartition(":")[0], server.add_insecure_port(address)
        await server.start()
        return server, f"{host}:{port}"
