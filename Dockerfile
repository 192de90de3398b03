# The NGC PyTorch container brings CUDA, Apex and Transformer Engine; this adds the plugin and what it imports.
#   docker build -t bionemo_esm .
#   docker run --gpus all -v /data:/data bionemo_esm pretrain trainer.devices=1 data.store=/data/uniref50
FROM nvcr.io/nvidia/pytorch:25.06-py3

WORKDIR /opt/bionemo_esm
COPY pyproject.toml setup.py README.md LICENSE ./
COPY bionemo_esm bionemo_esm
COPY conf conf
# torch is the container's: pinning it to what is there keeps pip from replacing it.
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/torch.txt \
    && pip install --no-cache-dir --constraint /tmp/torch.txt .

RUN useradd --create-home esm
USER esm
WORKDIR /home/esm
ENTRYPOINT ["bionemo-esm"]
CMD ["--help"]
