ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# This index has the CPU build of torch; set PIP_EXTRA to "" for the default, CUDA build.
ARG PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN python3 -m venv /opt/trunkline
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY shared shared
COPY trunk_service trunk_service
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/trunkline/bin/pip install ${PIP_EXTRA} -c constraints.txt .

FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --no-create-home trunkline
COPY --from=build /opt/trunkline /opt/trunkline
COPY docker/healthcheck.py /opt/trunkline/healthcheck.py
ENV PATH=/opt/trunkline/bin:$PATH \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HOME=/tmp/huggingface
USER 10001:10001
WORKDIR /tmp
EXPOSE 50052
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=6 \
    CMD ["python", "/opt/trunkline/healthcheck.py"]
ENTRYPOINT ["trunkd"]
# Mount a folder of ca.pem, cert.pem and key.pem here, readable by uid 10001 (`trunkline certs`). The
# health check is a client too: TRUNKLINE_TLS names a client's folder for it.
CMD ["--listen", "0.0.0.0:50052", "--tls", "/tls"]
