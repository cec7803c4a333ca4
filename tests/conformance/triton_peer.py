"""The tritonclient cases of test_peers.py, run in its own environment: `triton_peer.py CASE ADDRESS`.

The environment also has our client, whose results are the expected ones.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException, shared_memory

import poolrpc
from poolrpc import AvgPool2d, MaxPool2d

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STEM = MaxPool2d(3, stride=2, padding=1)
X = np.random.default_rng(3).standard_normal((2, 3, 16, 20), np.float32)
X[0, 0, 3, 4] = np.nan


def as_input(x: np.ndarray[Any, Any] = X, datatype: str = "FP32") -> triton.InferInput:
    """Return an array as tritonclient's input."""
    tensor = triton.InferInput("input", x.shape, datatype)
    tensor.set_data_from_numpy(x)
    return tensor


def expected(address: str, x: np.ndarray[Any, Any] = X, layer: poolrpc.Layer = STEM) -> np.ndarray[Any, Any]:
    """Return the output that our client gets."""
    with poolrpc.PoolClient(address) as client:
        return client.pool(x, layer).output


def assert_same(actual: np.ndarray[Any, Any] | None, wanted: np.ndarray[Any, Any]) -> None:
    """Check that two arrays have the same shape, dtype and values; which bits a NaN has differs between kernels."""
    assert actual is not None
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(actual, wanted)


def describe(address: str) -> None:
    """Call every method that does not send tensors."""
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("stem")
        assert client.is_model_ready("pool", "1")
        assert not client.is_model_ready("none")
        assert client.get_server_metadata(as_json=True)["name"] == "poolrpc"
        metadata = client.get_model_metadata("stem", as_json=True)
        assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": ["-1"] * 4}]
        config = client.get_model_config("stem").config
        assert config.parameters["layer"].string_value == repr(STEM)
        assert not config.model_transaction_policy.decoupled
        assert {each.name for each in client.get_model_repository_index().models} == {"pool", "stem"}
        before = client.get_inference_statistics("stem").model_stats[0].inference_stats.success.count
        client.infer("stem", [as_input()])
        after = client.get_inference_statistics("stem").model_stats[0].inference_stats.success.count
        assert after == before + 1
        assert len(client.get_inference_statistics().model_stats) == 2


def infer(address: str) -> None:
    """Run presets, with every argument of infer that the server supports."""
    with triton.InferenceServerClient(address) as client:
        result = client.infer("stem", [as_input()], request_id="7", priority=1, timeout=30_000_000, client_timeout=30)
        assert result.get_response().id == "7"
        assert_same(result.as_numpy("output"), expected(address))
        assert result.as_numpy("indices") is None
        layer = "[[MaxPool2d(2)], [AvgPool2d(2), MaxPool2d(2, return_indices=True)]]"
        wanted = [triton.InferRequestedOutput(name) for name in ("indices_1", "output")]
        result = client.infer("pool", [as_input()], outputs=wanted, parameters={"layer": layer})
        with poolrpc.PoolClient(address) as ours:
            right = ours.pool_each(X, [MaxPool2d(2), [AvgPool2d(2), MaxPool2d(2, return_indices=True)]])
        assert_same(result.as_numpy("indices_1"), right[1].indices)
        assert_same(result.as_numpy("output"), right[0].output)
        assert result.as_numpy("output_1") is None
        half = X.astype(np.float16)
        assert_same(client.infer("stem", [as_input(half, "FP16")]).as_numpy("output"), expected(address, half))
        small = (X * 10).astype(np.int8)
        assert_same(client.infer("stem", [as_input(small, "INT8")]).as_numpy("output"), expected(address, small))


def unpool(address: str) -> None:
    """Send two inputs, in the opposite order."""
    with triton.InferenceServerClient(address) as client, poolrpc.PoolClient(address) as ours:
        pooled = ours.pool(X, MaxPool2d(2, return_indices=True))
        right = ours.pool(pooled.output, poolrpc.MaxUnpool2d(2), indices=pooled.indices).output
        indices = triton.InferInput("indices", pooled.indices.shape, "INT64")
        indices.set_data_from_numpy(pooled.indices)
        result = client.infer("pool", [indices, as_input(pooled.output)], parameters={"layer": "MaxUnpool2d(2)"})
        assert_same(result.as_numpy("output"), right)


def errors(address: str) -> None:
    """Send invalid requests and check their statuses."""
    bad = triton.InferInput("input", [1], "BYTES")
    bad.set_data_from_numpy(np.array([b"x"], np.object_))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("NOT_FOUND", {"model_name": "none", "inputs": [as_input()]}),
        ("INVALID_ARGUMENT", {"model_name": "pool", "inputs": [as_input()]}),
        ("INVALID_ARGUMENT", {"model_name": "pool", "inputs": [as_input()], "parameters": {"layer": "MaxPool2d(99)"}}),
        ("INVALID_ARGUMENT", {"model_name": "stem", "inputs": []}),
        ("UNIMPLEMENTED", {"model_name": "stem", "inputs": [bad]}),
        ("DEADLINE_EXCEEDED", {"model_name": "stem", "inputs": [as_input()], "timeout": 1}),
    ]
    with triton.InferenceServerClient(address) as client:
        for status, arguments in cases:
            try:
                client.infer(**arguments)
            except InferenceServerException as error:
                assert error.status() == f"StatusCode.{status}", (arguments, error)  # noqa: PT017 - no pytest here
            else:
                raise AssertionError(arguments)


def async_infer(address: str) -> None:
    """Receive many results in callbacks."""
    results: Queue[tuple[Any, Any]] = Queue()
    with triton.InferenceServerClient(address) as client:
        for _ in range(20):
            client.async_infer("stem", [as_input()], lambda result, error: results.put((result, error)))
        for _ in range(20):
            result, error = results.get(timeout=60)
            assert error is None
            assert_same(result.as_numpy("output"), expected(address))


def compression(address: str) -> None:
    """A compressed request fails with the reason, and the client's next request is answered."""
    with triton.InferenceServerClient(address) as client:
        for algorithm in ("gzip", "deflate"):
            try:
                client.infer("stem", [as_input()], compression_algorithm=algorithm)
            except InferenceServerException as error:
                assert error.status() == "StatusCode.UNIMPLEMENTED", error  # noqa: PT017 - no pytest here
                assert f"'{algorithm}' is disabled" in str(error)  # noqa: PT017 - the same
            else:
                raise AssertionError(algorithm)
        assert_same(client.infer("stem", [as_input()]).as_numpy("output"), expected(address))


def stream(address: str) -> None:
    """Send requests on a stream, one of them invalid."""
    results: Queue[tuple[Any, Any]] = Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        for i in range(10):
            model = "none" if i == 4 else "stem"
            client.async_stream_infer(model, [as_input()], request_id=str(i), enable_empty_final_response=True)
        for i in range(10):
            result, error = results.get(timeout=60)
            if i == 4:
                assert "NOT_FOUND" in error.message()
                continue
            assert error is None
            response = result.get_response()
            assert response.id == str(i)
            assert response.parameters["triton_final_response"].bool_param
            assert_same(result.as_numpy("output"), expected(address))
        client.stop_stream()


def aio(address: str) -> None:
    """Send concurrent requests, and a stream, on an event loop."""

    async def run() -> None:
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            assert (await client.get_model_config("stem")).config.name == "stem"
            results = await asyncio.gather(*(client.infer("stem", [as_input()]) for _ in range(10)))
            right = expected(address)
            for each in results:
                assert_same(each.as_numpy("output"), right)

            async def requests() -> AsyncIterator[dict[str, Any]]:
                for i in range(5):
                    yield {"model_name": "stem", "inputs": [as_input()], "request_id": str(i)}

            ids = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                ids.append(result.get_response().id)
                assert_same(result.as_numpy("output"), right)
            assert ids == list("01234")

    asyncio.run(run())


def shared_memory_regions(address: str) -> None:
    """Send the input and receive the output in shared memory, with tritonclient's own utilities."""
    right = expected(address)
    make = partial(shared_memory.create_shared_memory_region)
    inputs, outputs = make("in", "/poolrpc-peer-in", X.nbytes), make("out", "/poolrpc-peer-out", right.nbytes)
    try:
        shared_memory.set_shared_memory_region(inputs, [X])
        with triton.InferenceServerClient(address) as client:
            client.unregister_system_shared_memory()
            client.register_system_shared_memory("in", "/poolrpc-peer-in", X.nbytes)
            client.register_system_shared_memory("out", "/poolrpc-peer-out", right.nbytes)
            assert set(client.get_system_shared_memory_status().regions) == {"in", "out"}
            x = triton.InferInput("input", X.shape, "FP32")
            x.set_shared_memory("in", X.nbytes)
            wanted = triton.InferRequestedOutput("output")
            wanted.set_shared_memory("out", right.nbytes)
            result = client.infer("stem", [x], outputs=[wanted])
            got = result.get_output("output")
            assert list(got.shape) == list(right.shape)
            assert_same(shared_memory.get_contents_as_numpy(outputs, np.float32, list(got.shape)), right)
            client.unregister_system_shared_memory("in")
            client.unregister_system_shared_memory()
            assert not client.get_system_shared_memory_status().regions
    finally:
        shared_memory.destroy_shared_memory_region(inputs)
        shared_memory.destroy_shared_memory_region(outputs)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
