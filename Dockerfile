# remap with all that its exports need, from this checkout.
#
#   docker build -t remap .                                    # CPU
#   docker build -t remap:cuda --build-arg DEVICE=cu128 .      # CUDA; run it with --gpus all
#   docker run --rm -v "$PWD:/work" remap distill --data photos/
#
# DEVICE is the last part of an address of https://download.pytorch.org/whl/: cpu, cu126, cu128 ... The wheels of
# PyTorch bring CUDA's libraries with them, so one base serves both; the host needs NVIDIA's driver and container toolkit.
FROM python:3.13-slim AS build
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir build && python -m build --wheel

FROM python:3.13-slim
ARG DEVICE=cpu
COPY --from=build /src/dist/*.whl /tmp/
RUN wheel=$(ls /tmp/*.whl) \
    && pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${DEVICE}" torch torchvision \
    && pip install --no-cache-dir "${wheel}[onnx,parquet,heic,tiff]" \
    && rm /tmp/*.whl
# Not root: what is written to /work belongs to user 1000, or to --user. Weights and caches lie in /work/.cache.
RUN useradd --uid 1000 --create-home remap && mkdir /work && chown remap /work
USER remap
WORKDIR /work
ENV HF_HOME=/work/.cache/huggingface REMAP_CACHE=/work/.cache/remap
ENTRYPOINT ["remap"]
CMD ["--help"]
