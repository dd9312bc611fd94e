# HEMERA with its workflow and all engines, from requirements.lock; weights are mounted.
#
#   docker build -t hemera .                        for processors
#   docker build -t hemera --build-arg CUDA=yes .   for NVIDIA GPUs
#
# Without CUDA, torch and torchvision are those of the lock's versions from PyTorch's index for
# processors, whose hashes the lock does not have.
FROM python:3.11-slim-bookworm
ARG CUDA=no
WORKDIR /opt/hemera
COPY requirements.lock ./
RUN if [ "$CUDA" = yes ]; then cp requirements.lock installed.lock; else \
        awk '/^[a-z]/ {left_out = /^(torch|torchvision|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==/} !left_out' requirements.lock > installed.lock; \
    fi \
    && python -m pip install --no-cache-dir --no-deps --require-hashes -r installed.lock \
    && if [ "$CUDA" != yes ]; then \
        python -m pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu \
            $(grep -oE '^(torch|torchvision)==[^ ;]+' requirements.lock); \
    fi
COPY pyproject.toml README.md LICENSE Snakefile ./
COPY envs envs
COPY profiles profiles
COPY workflow workflow
COPY hemera hemera
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation .
WORKDIR /data
CMD ["hemera", "--help"]
