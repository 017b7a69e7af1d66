# specmpc in a container. CPU: docker run -v "$PWD/store:/store" specmpc compare --episodes 3
# CUDA: add --gpus all; torch's Linux wheel brings its own CUDA libraries, so only the host's driver is needed.
FROM python:3.11-slim-bookworm

# g++ compiles the planner's kernels; the GL libraries render without a screen (MUJOCO_GL=egl or osmesa).
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libegl1 libgl1-mesa-dri libosmesa6 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/specmpc
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY specmpc_cli ./specmpc_cli
COPY presets ./presets
RUN pip install --no-cache-dir --constraint constraints.txt .

ENV MUJOCO_GL=egl \
    SPECMPC_STORE=/store \
    XDG_CACHE_HOME=/store/.cache
VOLUME /store
WORKDIR /store
ENTRYPOINT ["specmpc"]
CMD ["--help"]
