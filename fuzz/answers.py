"""What a client makes of a server's messages: results of what was asked, or an error of its tree."""

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
from poolrpc._wire.status import decode_error
from poolrpc.errors import BY_CODE, PoolError
from poolrpc.tensors import numpy_dtype
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from fuzz.mutate import Case


def judge(case: Case) -> str:
    """Have the client read what a case says and say how it ended.

    Raises:
        FoundError: As none should.

    """
    first, answer = (case[0] if case else b"") or b"\0", case[1:]
    kind, asked = first[0] % 5, first[1:]
    try:
        if kind in (0, 1):
            return _results(QUESTIONS[(asked or b"\0")[0] % len(QUESTIONS)], answer, streamed=kind == 1)
        whole = b"".join(answer)
        if kind == 2:
            code = [*BY_CODE, "UNKNOWN", "DATA_LOSS"][(asked or b"\0")[0] % (len(BY_CODE) + 2)]
            error = decode_error(code, asked[1:].decode(errors="replace"), whole)
            return f"{error.code}"
        if kind == 3:
            codec.decode_shape_response(pool_pb2.InferShapeResponse.FromString(whole))
        else:
            codec.decode_info(pool_pb2.GetServerInfoResponse.FromString(whole))
    except DecodeError:
        if kind in (0, 1):
            raise
        return "no message"  # gRPC reads these, and has its own status for it
    except PoolError as error:
        return f"{error.code}/{error.reason}"
    return "OK"


def _results(request: codec.Request, answer: Case, *, streamed: bool) -> str:
    expected = codec.payload_specs(request.results())
    transfer = Transfer(
        PreparedRequest(request), [np.zeros(spec.shape, numpy_dtype(spec.dtype)) for spec in request.specs]
    )
    if streamed:
        reader = StreamReader(transfer, (answer or (b"",))[0], None)
        for each in answer[1:]:
            reader.read(each)
        results = reader.finish()
    else:
        results = decode_message(transfer, b"".join(answer))
    got = [part.shape for each in results for part in (each.output, each.indices) if part is not None]
    if got != [spec.shape for spec in expected]:
        raise FoundError("other shapes than were asked for")
    return "OK"
