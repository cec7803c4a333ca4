#!/bin/sh
# Remove what no server uses from the packages in a folder: tests, headers, static libraries, torch's test programs.
# It runs in the RUN that installs them, because a later one would not make the image smaller.
set -eu
cd "$1"
find . -type d -name tests -prune -exec rm -rf {} +
find . -type f -name '*.a' -delete
if [ -d torch ]; then
  rm -rf torch/test torch/include torch/share torch/lib/lib*_test.so
  # `import torch` looks for this one.
  find torch/bin -type f ! -name torch_shm_manager -delete
fi
