ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# This index has the CPU build of torch; set PIP_EXTRA to "" for the default, CUDA build.
ARG PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN python3 -m venv /opt/trunkline
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY shared shared
# `trunkline demo` starts a trunk of its own.
COPY trunk_service trunk_service
COPY client_service client_service
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/trunkline/bin/pip install ${PIP_EXTRA} -c constraints.txt .

FROM ${BASE_IMAGE}
# A new volume mounted at one of these folders takes over its owner.
RUN useradd --uid 10001 --no-create-home trunkline \
    && install -d -o trunkline -g trunkline /runs /certs
COPY --from=build /opt/trunkline /opt/trunkline
ENV PATH=/opt/trunkline/bin:$PATH \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HOME=/tmp/huggingface
USER 10001:10001
WORKDIR /runs
ENTRYPOINT ["trunkline"]
CMD ["info", "--trunk", "trunk:50052"]
