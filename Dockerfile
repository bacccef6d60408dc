# blora-pyro on a GPU host, with the NVIDIA Container Toolkit:
#
#   docker build -t blora-pyro .
#   docker run --rm --gpus all --ipc host -v blora-cache:/cache -v "$PWD:/work" blora-pyro \
#       fit --base openai/whisper-small --data corpus
#
# torch brings CUDA libraries of its own; CTranslate2 takes cuBLAS and cuDNN of this image.
FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04

# Security fixes of the distribution are wanted, so its packages are not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/blora-pyro \
    && install -d -o 1000 -g 1000 /cache /work
ENV PATH=/opt/blora-pyro/bin:$PATH

COPY pyproject.toml README.md LICENSE constraints.txt /src/
COPY blora_pyro /src/blora_pyro
RUN pip install --no-cache-dir --constraint /src/constraints.txt '/src[fast,studies,track]'

# Whisper checkpoints, features and converted models go to the volume; runs to what is at /work,
# which must be writable for user 1000, or for that of `--user`.
USER 1000:1000
ENV HOME=/cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["blora-pyro"]
CMD ["--help"]
