"""Pool an image in memory that a server on a unix socket shares, without copying or sending it.

python examples/shared_memory.py unix:/run/poolrpc/pool.sock
"""

import sys

from poolrpc import MaxPool2d, PoolClient

with PoolClient(sys.argv[1]) as client:
    image = client.empty((1, 64, 224, 224))
    image[...] = 1
    result = client.pool(image, MaxPool2d(2), copy=False)
    print(result.transport, result.shape, result.output.sum())
