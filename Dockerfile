# The image that trains: `make image IMAGE=NAME`. CUDA's libraries come inside torch's wheel, the driver comes from the host.
FROM python:3.11-slim-bookworm

# A C++ compiler is what torch.compile works with.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# What changes seldom comes first: the libraries that settings.ini names, with the extra [vertex], in the versions of requirements.lock.
# PyPI's torch is built for CUDA 13, which knows Turing (T4) and younger. V100, P100 and P4 need CUDA=cu126, with drivers of 2024 too:
# another build of the same version, so with hashes of its own.
ARG CUDA=
WORKDIR /app
COPY settings.ini requirements.lock ./
RUN sed -n '/^uv==/,/[^\\]$/p' requirements.lock > uv.txt && pip install --no-deps --require-hashes -r uv.txt \
    && python -c "from configparser import ConfigParser as C; c = C(delimiters=['=']); c.read('settings.ini'); d = c['DEFAULT']; \
print('\n'.join((d['requirements'] + ' ' + d['vertex_requirements']).split()))" > requirements.txt \
    && uv pip install --system --no-cache --compile-bytecode ${CUDA:+--torch-backend "$CUDA" --no-verify-hashes} \
       -c requirements.lock -b requirements.lock -r requirements.txt

COPY setup.py MANIFEST.in README.md LICENSE CHANGELOG.md ./
COPY saxgpt ./saxgpt
RUN pip install --no-deps . && pip check && rm -rf build saxgpt *.egg-info

# Nobody in particular. Caches and runs go to the home folder; what must last goes to gs://.
RUN useradd --create-home --uid 1000 sax
USER sax
WORKDIR /home/sax

ENTRYPOINT ["python", "-m", "saxgpt.train"]
CMD ["--help"]
