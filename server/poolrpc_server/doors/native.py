"""poolrpc.v1.PoolService: the native protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc import codec
from poolrpc.v1 import pool_pb2, pool_pb2_grpc
from poolrpc_server.dispatch import Call
from poolrpc_server.interceptors import note

if TYPE_CHECKING:
    import grpc

    from poolrpc_server.dispatch import Dispatcher

SERVICE = pool_pb2.DESCRIPTOR.services_by_name["PoolService"].full_name


class PoolDoor(pool_pb2_grpc.PoolServiceServicer):
    """The servicer of PoolService."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def Pool(self, request: pool_pb2.PoolRequest, context: grpc.ServicerContext) -> pool_pb2.PoolResponse:
        """Run every branch of the request on its input."""
        asked = codec.decode_request(request)
        note(layers=asked.branches, shape=asked.input.shape, dtype=asked.input.dtype)
        call = Call(asked, request.payload, context.time_remaining, context.is_active)
        results, payload = self._dispatcher.pool(call)
        note(output=[each.output.shape for each in results])
        return codec.encode_response(results, payload)

    def InferShape(self, request: pool_pb2.InferShapeRequest, _: grpc.ServicerContext) -> pool_pb2.InferShapeResponse:
        """Give the shapes that Pool would give."""
        shape, branches, layout = codec.decode_shape_request(request)
        note(layers=branches, shape=shape)
        return codec.encode_shape_response(self._dispatcher.shapes(shape, branches, layout))

    def GetServerInfo(
        self, _: pool_pb2.GetServerInfoRequest, __: grpc.ServicerContext
    ) -> pool_pb2.GetServerInfoResponse:
        """Tell what the server is."""
        return codec.encode_info(self._dispatcher.info)
