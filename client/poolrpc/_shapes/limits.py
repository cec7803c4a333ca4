"""Limits that the client and the server share; those that an operator may set are in the server's Config."""

MAX_PAYLOAD_BYTES = 512 * 2**20
"""Default maximum size of the tensors in one message, in bytes, in each direction."""

MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + 2**20
"""Default of gRPC's message limit on both sides, in bytes: the payload, and 1 MiB for the header."""

MAX_NUMEL = 2**31 - 1
"""Maximum number of elements of a tensor: torch's pooling kernels count in 32 bits on CUDA (PyTorch issues
68418, 84018, 165297)."""

MAX_PARAMETER = 65535
"""Largest kernel size, stride, padding and dilation. Much larger values overflow in torch (PyTorch issue 142454)."""

MAX_FRACTIONAL_AXIS = 2**22
"""Longest axis of a fractional layer, in cells: torch computes window positions in float32, exactly below 2**23."""

MAX_NORM = 32768
"""Largest norm of an LPPool, and the inverse of the smallest: torch raises for norms that float16 can't represent."""

MAX_NORMALIZED_CHANNELS = 64
"""Maximum number of channels that a Normalize has numbers for; their text fits MAX_EXPRESSION_CHARS."""

MAX_BINS = 1024
"""Most bins of a region of interest along an axis."""

MAX_SAMPLES = 64
"""Most samples of a bin of a region of interest along an axis."""

MAX_RANK = 5
"""Maximum number of axes of a tensor: N, C and three spatial axes."""

MAX_EXPRESSION_CHARS = 4096
"""Maximum length of a layer expression, in characters."""

MAX_BRANCHES = 64
"""Maximum number of branches of a request."""

MAX_CHAIN = 64
"""Maximum number of layers of a branch."""

MAX_OUTPUTS = 128
"""Maximum number of outputs of all branches of a request."""
