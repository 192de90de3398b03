# NVIDIA's PyTorch container has CUDA, NCCL, Transformer Engine and Apex. This adds the package and its dependencies.
#   docker build -t bionemo_esm .
#   docker run --rm --gpus all bionemo_esm doctor
#   docker run --gpus all --ipc host -v /data:/data:ro -v "$PWD/runs:/workspace/runs" --user "$(id -u)" bionemo_esm \
#       pretrain trainer.num_nodes=1 trainer.devices=1 data.store=/data/uniref50
# 26.03 has torch 2.11.0a0. 25.12 is too old: its 2.10.0a0 is before 2.10.
FROM nvcr.io/nvidia/pytorch:26.03-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/bionemo_esm

# Dependencies first: this layer stays in the cache until pyproject.toml changes. The base image pins all its packages
# (PIP_CONSTRAINT), so pip cannot resolve conflicts. Here only those stay pinned that are built for each other or for its
# CUDA.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/wanted.txt \
    && pip list --format=freeze | grep -iE '^(torch|triton|pytorch-triton|numpy|apex|flash.attn|transformer.engine.*)=' \
        > /tmp/kept.txt \
    && PIP_CONSTRAINT="" pip install --no-cache-dir --requirement /tmp/wanted.txt --constraint /tmp/kept.txt \
    && rm /tmp/wanted.txt /tmp/kept.txt

COPY setup.py README.md LICENSE ./
COPY conf conf
COPY bionemo_esm bionemo_esm
RUN PIP_CONSTRAINT="" pip install --no-cache-dir --no-deps .

# Runs are written to /workspace/runs. All users may write there and in the caches: under `docker run --user` and Slurm's
# pyxis the process is another user, without a home in the container.
RUN useradd --create-home --uid 10001 esm && install --directory --mode=1777 /workspace /workspace/runs /var/cache/esm
ENV NUMBA_CACHE_DIR=/var/cache/esm MPLCONFIGDIR=/var/cache/esm
USER 10001
WORKDIR /workspace

# Versions, GPUs and fused kernels; without a training step, because a run uses the GPU.
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m --retries=3 CMD ["bionemo-esm", "doctor", "--quick"]
# NVIDIA's own entry point checks the driver, and sets up compatibility libraries.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "bionemo-esm"]
CMD ["--help"]
