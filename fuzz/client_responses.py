"""How a client reads the messages of a server: results of the request, or an error of its classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError

from fuzz.findings import FoundError
from fuzz.seeds import QUESTIONS
from poolrpc._transport.request import PreparedRequest, Transfer
from poolrpc._transport.stream import StreamReader
from poolrpc._transport.unary import decode_message
from poolrpc._wire import codec
from poolrpc._wire.local_packets import decode_answer
from poolrpc._wire.status import decode_error
from poolrpc.errors import BY_CODE, PoolError
from poolrpc.tensors import numpy_dtype
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from fuzz.mutate import Case


def judge(case: Case) -> str:
    """Let the client read the messages of a case, and return how that ended.

    Raises:
        FoundError: It ended in a way that is a bug.

    """
    first, response = (case[0] if case else b"") or b"\0", case[1:]
    kind, question = first[0] % 6, first[1:]
    try:
        if kind in (0, 1):
            return _results(QUESTIONS[(question or b"\0")[0] % len(QUESTIONS)], response, streamed=kind == 1)
        whole = b"".join(response)
        if kind == 2:
            code = [*BY_CODE, "UNKNOWN", "DATA_LOSS"][(question or b"\0")[0] % (len(BY_CODE) + 2)]
            error = decode_error(code, question[1:].decode(errors="replace"), whole)
            return f"{error.code}"
        if kind == 3:
            codec.decode_shape_response(pool_pb2.InferShapeResponse.FromString(whole))
        elif kind == 5:
            decode_answer(whole)
        else:
            codec.decode_info(pool_pb2.GetServerInfoResponse.FromString(whole))
    except DecodeError:
        if kind in (0, 1):
            raise
        return "not a message"  # gRPC parses these, and has its own status for it
    except PoolError as error:
        return f"{error.code}/{error.reason}"
    return "OK"


def _results(request: codec.Request, response: Case, *, streamed: bool) -> str:
    expected = codec.payload_specs(request.results())
    transfer = Transfer(
        PreparedRequest(request), [np.zeros(spec.shape, numpy_dtype(spec.dtype)) for spec in request.specs]
    )
    if streamed:
        reader = StreamReader(transfer, (response or (b"",))[0], None)
        for each in response[1:]:
            reader.read(each)
        results = reader.finish()
    else:
        results = decode_message(transfer, b"".join(response))
    got = [part.shape for each in results for part in (each.output, each.indices) if part is not None]
    if got != [spec.shape for spec in expected]:
        raise FoundError("shapes that do not match the request")
    return "OK"
