# syntax=docker/dockerfile:1
# ping-llm with all that it needs, as a user without rights:   docker build --tag ping-llm .
#
# Without arguments it trains on GPUs, for torch's usual wheels are those for CUDA. For CPUs, a tenth of the size, give the
# index of torch's wheels for CPUs, as PyTorch's installation page names it:   --build-arg TORCH_INDEX=URL
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=
WORKDIR /opt/ping-llm
ENV PIP_CONSTRAINT=/opt/ping-llm/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN test -z "$TORCH_INDEX" || pip install --index-url "$TORCH_INDEX" --no-deps torch
# An empty package: these layers stay as they are while only the code changes.
RUN mkdir -p src/ping_llm && touch src/ping_llm/__init__.py && pip install --editable '.[plots,baselines,serve]'

FROM python:${PYTHON}
# torch.compile calls the compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home ping && install --directory --owner=ping --group=ping /work
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/ping-llm /opt/ping-llm
COPY configs /opt/ping-llm/configs
COPY src /opt/ping-llm/src
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /work
ENTRYPOINT ["ping-llm"]
CMD ["--help"]
