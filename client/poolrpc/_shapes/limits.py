"""The bounds that client and server both hold to; what an operator may set is in the server's Config."""

MAX_PAYLOAD_BYTES = 512 * 2**20
"""Bytes of tensors that one message carries, each way, by default."""

MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + 2**20
"""gRPC's message limit on both sides by default: the payload and room for what describes it."""

MAX_NUMEL = 2**31 - 1
"""Elements in a tensor: torch's pooling kernels count in 32 bits on CUDA (PyTorch issues 68418, 84018, 165297)."""

MAX_PARAMETER = 65535
"""The largest kernel size, stride, padding or dilation. Far larger ones overflow inside torch (issue 142454)."""

MAX_FRACTIONAL_AXIS = 2**22
"""The longest axis of a fractional layer: torch places its windows in float32, exact to the cell below 2**23."""

MAX_NORM = 32768
"""The largest norm of an LPPool, and the inverse of the least: torch raises where float16 can't hold either."""

MAX_RANK = 5
"""Axes of a tensor: N, C and three spatial ones."""

MAX_EXPRESSION_CHARS = 4096
"""The longest layer expression that is parsed."""

MAX_BRANCHES = 64
"""Branches in a request."""

MAX_CHAIN = 64
"""Layers in a branch."""
